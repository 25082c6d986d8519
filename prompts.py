"""Prompts (lists of strings and PIL images), a template for each task, and image conversion."""

import re
import warnings
from io import BytesIO
from pathlib import Path

from support.cli import UserError, reading

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageOps, PngImagePlugin

# Usual pictures alone: Pillow would hand EPS to Ghostscript
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
Image.MAX_IMAGE_PIXELS = 2**28  # photographs of 200 megapixels pass
PngImagePlugin.MAX_TEXT_CHUNK = 2**24  # bytes


def read_image(path):
    """Read an image file (its first frame) as upright RGB. Raises UserError if it is damaged."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image file")
    expected = f"a whole PNG, JPEG or similar file, one of {', '.join(FORMATS)}"
    with warnings.catch_warnings(action="ignore"), reading(path, expected):  # of odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as image:
            return to_rgb(image)


def upright_size(image):
    """(width, height) of a PIL image after its EXIF orientation is applied."""
    try:
        sideways = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # noqa: BLE001 - Pillow raises anything on damaged EXIF data
        sideways = False
    return image.size[::-1] if sideways and image.format != "TIFF" else image.size


def to_rgb(image):
    """Convert a PIL image to 8-bit sRGB: EXIF orientation applied, transparency over white.

    Raises ValueError if it has levels that are not finite.
    """
    image.load()
    profile, is_full = image.info.get("icc_profile"), image.format == "PPM" or ";" in image.mode
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - Pillow raises anything on damaged EXIF data
        image = image.copy()
    if image.mode == "F" or image.mode.startswith("I"):  # convert() would clip levels at 255
        levels = np.asarray(image, dtype=np.float64)
        if not np.isfinite(levels).all():
            raise ValueError("it has levels that are NaN or infinite")
        # 16 bits use their whole range; that of 32 bits is guessed
        top = next((top for top in (1, 255) if levels.max() <= top and not is_full), 65535)
        image = Image.fromarray((levels / top * 255).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image if image.mode in ("L", "CMYK") else image.convert("RGB")
    image = (to_srgb(image, profile) if profile else image).convert("RGB")
    image.info = {}  # neither profile nor orientation applies any more
    return image


def to_srgb(image, profile):
    """Convert a PIL image to sRGB by its ICC profile; one that is damaged is ignored, as in browsers."""
    try:
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, BytesIO(profile), target, outputMode="RGB")
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return image
    if image.mode != "RGB":
        return converted
    moved = ImageChops.difference(converted, image).getextrema()
    return converted if max(high for _, high in moved) > 2 else image  # 2: rounding within sRGB


def crop_to(image, width, height):
    """Scale and center-crop a PIL image to exactly width x height."""
    return ImageOps.fit(image, (width, height), Image.BICUBIC)


def to_tensor(images):
    """PIL images of one size -> (B, 3, H, W) fp32 in [-1, 1], for the VAE."""
    batch = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return rearrange(batch, "B H W c -> B c H W").float() / 127.5 - 1


def to_images(batch):
    """(B, 3, H, W), clamped to [-1, 1] -> PIL images."""
    levels = (batch.float().clamp(-1, 1) * 127.5 + 127.5).round().byte()
    return [Image.fromarray(x) for x in rearrange(levels, "B c H W -> B H W c").cpu().numpy()]


def check_drawing(steps, guidance, width, height, largest):
    """Raise UserError for invalid settings. largest: the longest side allowed, in pixels."""
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    if not abs(guidance) < float("inf"):
        raise UserError(f"guidance must be a finite number, got {guidance}")
    for side in (width, height):
        if side % 16 or not 16 <= side <= largest:
            near = min(max(round(side / 16) * 16, 16), largest)
            right = f"multiples of 16 up to {largest}"
            raise UserError(f"size {width}x{height}: sides must be {right}; nearest is {near}")


def check_text(text, where="the prompt"):
    if re.search("[\ud800-\udfff]", text):  # a terminal without UTF-8 makes these of an umlaut
        raise UserError(f"{where} holds half a letter (a lone surrogate): use a UTF-8 terminal")


def interleave(text, images):
    """Replace each <image> in text by the next image -> a list of strings and images."""
    parts = text.split("<image>")
    if len(parts) - 1 != len(images):
        counts = f"{len(parts) - 1} <image> placeholders, but {len(images)} images were given"
        raise UserError(f"the prompt has {counts}")
    pairs = zip(parts, [*images, ""])
    return [part for pair in pairs for part in pair if part != ""]


TASKS = {
    "t2i": "draw an image from text",
    "i2i": "copy an image",
    "edit": "change an image by an instruction",
    "combine": "'a dog <image>, a hat <image> the dog wears the hat': named images, then a text",
    "objects": "draw an image from text and images in any order",
}


def split_prompt(prompt):
    """Split a list of strings and images into its whole text and the list of its images."""
    if not all(isinstance(part, str | Image.Image) for part in prompt):
        raise UserError("a prompt must be a list of strings and PIL images")
    images = [part for part in prompt if not isinstance(part, str)]
    text = "".join(part for part in prompt if isinstance(part, str))
    check_text(text)
    return text, images


def apply_task(task, prompt):
    """Wrap a prompt in the official template of its task.

    task: one of TASKS; None means objects with images, else t2i. Returns (positive, null), two lists
    of strings and images; guidance moves away from null. Raises UserError for an unfit prompt.
    """
    prompt = [prompt] if isinstance(prompt, str) else list(prompt)
    text, images = split_prompt(prompt)
    task = task or ("objects" if images else "t2i")
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}: expected one of {', '.join(TASKS)}")
    if not text.strip() and task != "i2i":
        raise UserError(f"empty prompt: task {task} needs some text")
    if text.strip() and task == "i2i":
        raise UserError("task i2i copies its image: it takes no text")
    if task == "t2i" and images:
        raise UserError(f"task t2i takes no image, got {len(images)}")
    if task in ("i2i", "edit") and len(images) != 1:
        raise UserError(f"task {task} takes one image, got {len(images)}")
    if task in ("combine", "objects") and not images:
        raise UserError(f"task {task} takes at least one image, got none")

    if task == "t2i":
        return ["Generate Image: ", text], ["Generate Image: "]
    if task == "i2i":
        return ["Copy Image: ", *images], ["Copy Image: "]
    if task == "edit":
        null = ["Edit image ", *images, " following:"]
        return [*null, text], null
    if task == "combine":
        objects, words = [], ""
        for part in prompt:
            if isinstance(part, str):
                words += part
            else:
                objects += [", ", words.strip(" ,"), part]
                words = ""
        null = ["Combine the objects: ", *objects[1:], " and generate an image following: "]
        return [*null, words.strip(" ,")], null
    # Task objects. The null prompt keeps all text, so guidance strengthens the images only.
    if isinstance(prompt[0], str):
        prompt[0] = prompt[0].lstrip()
    if isinstance(prompt[-1], str):
        prompt[-1] = prompt[-1].rstrip()
    return ["Generate Image: ", *prompt], ["Generate Image: ", text.strip()]


def reference_prompt(segments, named):
    """Return (task, prompt) for segments of a text with images: [(text, [image, ...]), ...].

    named: use task combine, in which each image follows its name, the segment's text, and the whole
    text comes last. Without named, or if an image has no name: task objects, in the given order.
    """
    objects = [(text.strip(" ,"), image) for text, images in segments for image in images]
    if named and objects and all(name for name, _ in objects):
        whole_text = "".join(text for text, _ in segments)
        return "combine", [part for pair in objects for part in pair] + [whole_text]
    return "objects", [part for text, images in segments for part in (text, *images) if part != ""]
