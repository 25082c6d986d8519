"""Other people's files: what a file of weights is that cannot be used; damaged and large pictures."""

import json
import re
import struct
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageCms, PngImagePlugin

from support.cli import UserError, reading

# ---- weights ------------------------------------------------------------------------------------

SUFFIXES = (".safetensors", ".bin", ".gguf")  # of weights, in order of preference
LARGEST = sys.float_info.max
LISTS = ("num_hidden_layers", "num_layers", "depth", "num_labels", "extra_ids")  # lengths of lists
RANGES = dict.fromkeys(LISTS, (0, 10_000)) | {"dropout_rate": (0, 1)}  # of settings
NO_WEIGHTS = {  # pattern of a file's first bytes: what the file is, and what would be right
    rb"GGUF": "a GGUF file, quantised for llama.cpp; expected the model's .safetensors",
    rb"version https://git-lfs": "a Git LFS pointer; run `git lfs pull` to get the weights",
    rb"(?i)\s*<(!doctype|html|\?xml)": "a web page; download the weights again, logged in if need be",
}
PLAIN = "expected plain weights: fp32, fp16, bf16, or fp8 without scales"
FOREIGN = {  # pattern of a tensor's name: what its file holds, and what would be right
    r"[._](scale_weight|weight_scale(_2)?|weight_packed|comfy_quant)$|scaled_fp8$": (
        "weights scaled to fp8 or fewer bits",
        PLAIN,
    ),
    r"\.(qweight|qzeros|wscales)$": ("weights quantised by AWQ or GPTQ", PLAIN),
    r"\.(absmax|quant_map|SCB)$|\.quant_state\.": ("weights quantised by bitsandbytes", PLAIN),
    r"(^|[._])(lora_|lokr_|loha_|hada_)|[._]lora\.": (
        "a LoRA of another program",
        "expected a whole model, or a checkpoint of train.py",
    ),
}
NESTED = ("state_dict", "model", "module")  # under which training programs store the tensors
WRAPPERS = r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."


def check_settings(config):
    """Return a config. Raises ValueError for a setting that would make a library fail or hang."""
    for name, x in config.items():
        low, high = RANGES.get(name, (-LARGEST, LARGEST))
        if isinstance(x, (int, float)) and not low <= x <= high or (name, x) == ("unk_token", ""):
            raise ValueError(f"{name!r} cannot be {x!r:.40}")
        if name == "model_max_length" and isinstance(x, str):
            raise ValueError(f"{name!r} must be a number, got {x!r:.40}")
    return config


def check_folder(folder, kind):
    """Check the *config.json of a kind of model's folder, which a library is going to read.

    Raises UserError if one is damaged, or if folder is a single file.
    """
    if Path(folder).is_file():
        inside = "its config.json, weights and tokenizer"
        raise UserError(f"{folder}: is one file; expected the folder of a {kind}, with {inside}")
    for file in sorted(Path(folder).glob("*config.json")):
        with reading(file, "JSON"):
            json.loads(file.read_text(encoding="utf-8-sig"), object_hook=check_settings)


def part_folder(path, name):
    """A part of a diffusers folder, path/name; or path itself, if that holds the part's weights."""
    path, inner = Path(path), Path(path, name)
    if inner.is_dir():
        return inner
    if path.is_dir() and not any(file.suffix in SUFFIXES for file in path.iterdir()):
        raise FileNotFoundError(f"{path}: has no {name}/, and no .safetensors or .bin file")
    return path


def first_bytes(file):
    """The first 64 bytes of a file. Raises UserError if they are of no weights; says what it is."""
    with reading(file, "weights"), open(file, "rb") as stream:
        head = stream.read(64)
    for pattern, kind in NO_WEIGHTS.items():
        if re.match(pattern, head):
            raise UserError(f"{file}: is {kind}")
    return head


def refuse_foreign(names, source):
    """Raise UserError if names of tensors are those of quantised weights or of a LoRA."""
    for pattern, (kind, right) in FOREIGN.items():
        if name := next((k for k in names if re.search(pattern, k)), None):
            raise UserError(f"{source}: holds {kind} ({name}); {right}")


def innermost(tensors):
    """The tensors of a pickle, perhaps {"state_dict": {name: tensor}, ...}."""
    for _ in range(3):
        nested = (x for key in NESTED if isinstance(x := tensors.get(key), dict))
        tensors = next(nested, tensors)
    return tensors


# ---- pictures -----------------------------------------------------------------------------------

# Not EPS, which Pillow gives to Ghostscript, nor any other format that is no usual picture
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
Image.MAX_IMAGE_PIXELS = 2**28  # photographs of 200 megapixels pass; one at this limit takes 1 GB
PngImagePlugin.MAX_TEXT_CHUNK = 2**24  # bytes, unpacked; all texts of a file: 64 MB
SRGB = ImageCms.createProfile("sRGB")
COLOURS = Image.new("RGB", (6, 36))
COLOURS.putdata([(51 * r, 51 * g, 51 * b) for r in range(6) for g in range(6) for b in range(6)])
UPRIGHT = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2))))  # by orientation
SIDEWAYS = [UPRIGHT[orientation] for orientation in (5, 6, 7, 8)]


def upright(image):
    """How to transpose a PIL image to turn it upright; None if it is, or its EXIF is damaged."""
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return None


def to_srgb(image, profile):
    """Convert a PIL image in L, RGB or CMYK to sRGB by the bytes of its ICC profile -> RGB.

    A profile that is damaged, or of other colours than the image's, is ignored, as browsers do. One
    that moves no colour by more than 2 levels is sRGB itself; the image then stays as it is.
    """
    try:
        given = ImageCms.ImageCmsProfile(BytesIO(profile))
        transform = ImageCms.buildTransform(given, SRGB, image.mode, "RGB")
        if image.mode == "RGB":
            moved = ImageChops.difference(transform.apply(COLOURS), COLOURS)
            if max(high for _, high in moved.getextrema()) <= 2:
                return image
        return transform.apply(image)
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return image


def to_rgb(image):
    """Convert a PIL image to 8-bit sRGB: EXIF orientation applied, transparency over white.

    Raises ValueError if it has levels that are not finite.
    """
    image.load()
    profile, is_full = image.info.get("icc_profile"), image.format == "PPM" or ";" in image.mode
    if (turn := upright(image)) is not None:
        image = image.transpose(turn)
    if image.mode == "F" or image.mode.startswith("I"):  # convert() would clip levels at 255
        levels = np.asarray(image, dtype=np.float64)
        if not np.isfinite(levels).all():
            raise ValueError("it has levels that are NaN or infinite")
        # 16 bits use their whole range; that of 32 bits is guessed
        top = next((top for top in (1, 255) if levels.max() <= top and not is_full), 65535)
        image = Image.fromarray((levels / top * 255).clip(0, 255).round().astype(np.uint8))
    mode, alpha = {"L": "L", "C": "CMYK"}.get(image.getbands()[0], "RGB"), None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if profile:
        image = to_srgb(image.convert(mode), profile).convert("RGB")
    if alpha:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = {}  # neither profile nor orientation applies any more
    return image
