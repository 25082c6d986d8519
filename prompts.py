"""From what a user types to what the models eat, and back: prompts, images, batches.

An interleaved prompt is a list of strings and PIL images in any order. A task's template turns it
into such a list again, the tokenizer and `image_patches` into a row of token ids and image patches,
and `collate` rows into a Batch. Letters: B batch, L tokens, P patches of all images together.
"""

import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import ExifTags, Image, ImageOps

# ---- images -------------------------------------------------------------------------------------


def read_image(path):
    """Read an image file as a person sees it: a PIL image in RGB, turned upright.

    The first frame of an animation. Raises FileNotFoundError, or ValueError for anything that is
    not a whole image of a sane size.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return to_rgb(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS // 10**6
        raise ValueError(f"{path}: image too large; at most {limit} million pixels") from None
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise anything on damaged files
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else "damaged"
        raise ValueError(f"{path}: {reason}; expected a whole PNG, JPEG or similar file") from None


def to_rgb(image):
    """Any PIL image as upright RGB: EXIF orientation applied, transparency over white, 16 bits to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):  # convert() would clip these at 255
        levels = np.asarray(image, dtype=np.float64)
        top = next((top for top in (1, 255) if levels.max() <= top), 65535)
        image = Image.fromarray((levels / top * 255).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def upright_size(image):
    """(width, height) of a PIL image as a person sees it, without reading its pixels."""
    turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def smart_resize(height, width, factor=28, min_pixels=56 * 56, max_pixels=512 * 28 * 28):
    """Qwen2-VL's choice of size: sides the multiples of factor nearest to the image's own.

    Returns (height, width); raises ValueError where one side is over 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"image of {width}x{height}: one side is over 200 times the other")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = (height * width / max_pixels) ** 0.5
        h = max(factor, int(height / shrink / factor) * factor)
        w = max(factor, int(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = (min_pixels / (height * width)) ** 0.5
        h = -int(-height * grow // factor) * factor
        w = -int(-width * grow // factor) * factor
    return h, w


@dataclass(frozen=True)
class PatchConfig:
    """How an LMM wants its images: patch side, patches merged into a token, limits of size.

    At most 512 tokens an image in the official code, whatever Qwen2-VL itself would allow.
    """

    patch: int = 14
    merge: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 512 * 28 * 28


CLIP_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
CLIP_STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)


def image_patches(image, config=PatchConfig()):
    """Cut an RGB image for Qwen2-VL's ViT: patches (n, 3 * 2 * patch * patch), grid (1, gh, gw).

    Equal bit for bit to transformers' Qwen2VLImageProcessorPil. Patches that will be merged into
    one token are neighbours in the order; every patch is there twice, as two video frames.
    """
    p, m = config.patch, config.merge
    h, w = smart_resize(image.height, image.width, p * m, config.min_pixels, config.max_pixels)
    levels = np.asarray(image.resize((w, h), Image.BICUBIC), np.float64) * (1 / 255)
    x = torch.from_numpy((levels.astype(np.float32) - CLIP_MEAN) / CLIP_STD)
    x = rearrange(x, "(h mh p) (w mw q) c -> (h w mh mw) c p q", mh=m, mw=m, p=p, q=p)
    return repeat(x, "n c p q -> n (c t p q)", t=2), (1, h // p, w // p)


def crop_to(image, width, height):
    """Scale and centre-crop a PIL image to exactly width x height."""
    return ImageOps.fit(image, (width, height), Image.BICUBIC)


def to_tensor(images):
    """PIL images of one size -> (B, 3, H, W) fp32 in [-1, 1], for the VAE."""
    batch = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return rearrange(batch, "B H W c -> B c H W").float() / 127.5 - 1


def to_images(batch):
    """(B, 3, H, W), clamped to [-1, 1] -> PIL images."""
    levels = (batch.float().clamp(-1, 1) * 127.5 + 127.5).round().byte()
    return [Image.fromarray(x) for x in rearrange(levels, "B c H W -> B H W c").cpu().numpy()]


# ---- prompts ------------------------------------------------------------------------------------


def interleave(text, images):
    """Put images, in order, in the place of each <image> of text -> a list of strings and images."""
    parts = text.split("<image>")
    if len(parts) - 1 != len(images):
        raise ValueError(
            f"the prompt has {len(parts) - 1} <image> placeholders, but {len(images)} images were given"
        )
    prompt = [parts[0]]
    for image, part in zip(images, parts[1:]):
        prompt += [image, part]
    return [part for part in prompt if part != ""]


TASKS = {
    "t2i": "draw a text",
    "i2i": "copy an image",
    "edit": "change an image as a text says",
    "combine": "'a dog <image>, a hat <image> the dog wears the hat': named images, then a text",
    "objects": "draw what text and images say, in any order",
}


def apply_task(task, prompt):
    """Wrap a prompt in the official template of its task.

    Returns (positive, null), two lists of strings and images; null is what classifier-free guidance
    moves away from. Task None means t2i for text alone, else objects.
    """
    prompt = [prompt] if isinstance(prompt, str) else list(prompt)
    images = [part for part in prompt if not isinstance(part, str)]
    text = "".join(part for part in prompt if isinstance(part, str))
    if task is None:
        task = "objects" if images else "t2i"
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: expected one of {', '.join(TASKS)}")
    if not text.strip() and task != "i2i":
        raise ValueError(f"empty prompt: task {task} needs some text")
    if text.strip() and task == "i2i":
        raise ValueError("task i2i copies its image: it takes no text")
    wanted = {"t2i": "no image", "i2i": "one image", "edit": "one image"}.get(task, "images")
    if not {"no image": not images, "one image": len(images) == 1, "images": images}[wanted]:
        raise ValueError(f"task {task} takes {wanted}, but {len(images)} were given")

    if task == "t2i":
        return ["Generate Image: ", text], ["Generate Image: "]
    if task == "i2i":
        return ["Copy Image: ", images[0]], ["Copy Image: "]
    if task == "edit":
        null = ["Edit image ", images[0], " following:"]
        return [*null, text], null
    if task == "combine":
        *names, text = _texts_around(prompt)
        objects = [part for pair in zip(names, images) for part in (", ", *pair)][1:]
        null = ["Combine the objects: ", *objects, " and generate an image following: "]
        return [*null, text], null
    # All but the images stays in the null prompt: guidance strengthens the images only.
    prompt[0] = prompt[0].lstrip() if isinstance(prompt[0], str) else prompt[0]
    prompt[-1] = prompt[-1].rstrip() if isinstance(prompt[-1], str) else prompt[-1]
    return ["Generate Image: ", *prompt], ["Generate Image: ", text.strip()]


def _texts_around(prompt):
    """The text before each image, and the text after the last; commas and spaces trimmed."""
    texts = [""]
    for part in prompt:
        if isinstance(part, str):
            texts[-1] += part
        else:
            texts.append("")
    return [text.strip(" ,") for text in texts]


def reference_prompt(segments, named):
    """Words and pictures, [(text, [image, ...]), ...], as (task, prompt) in an official template.

    named: each picture first, with the words before it as its name, then the whole text (task
    combine); else text and pictures in their order (task objects), as is done, too, where a picture
    has no name.
    """
    pictured = [(text.strip(" ,"), image) for text, images in segments for image in images]
    if named and pictured and all(name for name, _ in pictured):
        whole = "".join(text for text, _ in segments)
        return "combine", [part for pair in pictured for part in pair] + [whole]
    return "objects", [part for text, images in segments for part in (text, *images) if part != ""]


# ---- batches ------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Right-padded rows of tokens, and the patches of all their images in order."""

    ids: torch.Tensor  # (B, L)
    mask: torch.Tensor  # (B, L) bool, False at padding
    image_mask: torch.Tensor  # (B, L) bool, True where a token stands for a part of an image
    positions: torch.Tensor  # (3, B, L): time, height, width
    patches: torch.Tensor  # (P, 3 * 2 * patch * patch); P = 0 without images
    grids: torch.Tensor  # (images, 3): 1, height and width in patches

    def to(self, device, **options):
        return Batch(**{f.name: getattr(self, f.name).to(device, **options) for f in fields(self)})


def mrope_positions(image_mask, grids, merge=2):
    """Qwen2-VL's multimodal rotary positions of one row: image_mask (L,) bool -> (3, L).

    Text counts up in all three rows at once. An image stands still in time and counts its merged
    rows and columns; the text after it goes on from the largest position so far.
    """
    positions, start, i = torch.zeros(3, len(image_mask), dtype=torch.long), 0, 0
    grids = iter(grids)
    while i < len(image_mask):
        if image_mask[i]:
            _, h, w = (int(n) for n in next(grids))
            h, w = h // merge, w // merge
            cells = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
            positions[1:, i : i + h * w] = start + cells.flatten(1)
            positions[0, i : i + h * w] = start
            i, start = i + h * w, start + max(h, w)
        else:
            positions[:, i] = start
            i, start = i + 1, start + 1
    return positions


def collate(prompts, tokenizer, config=PatchConfig(), mrope=True):
    """Tokenize and pad prompts (lists of strings and PIL images), templates already applied -> Batch.

    Text is always plain text: a special token's name in it is spelt out, not obeyed. With
    mrope=False positions are 0, 1, 2, ... as transformers before 4.47 had them.
    """
    start, pad, end = tokenizer.convert_tokens_to_ids(
        ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    )
    rows, patches, grids = [], [], []
    for prompt in prompts:
        ids, text, first = [], "", len(grids)
        for part in [*prompt, None]:  # None flushes the last text
            if isinstance(part, str):
                text += part
                continue
            if text:
                ids += tokenizer.encode(text, split_special_tokens=True, add_special_tokens=False)
                text = ""
            if part is not None:
                x, grid = image_patches(to_rgb(part), config)
                patches.append(x)
                grids.append(grid)
                ids += [start, *[pad] * (len(x) // config.merge**2), end]
        ids = torch.tensor(ids)
        is_image = ids == pad
        counted = torch.arange(len(ids)).expand(3, -1)
        if mrope:
            counted = mrope_positions(is_image, grids[first:], config.merge)
        rows.append((ids, is_image, counted))

    def padded(tensors, value):
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    ids, image_mask, positions = zip(*rows)
    return Batch(
        ids=padded(ids, tokenizer.pad_token_id),
        mask=padded([torch.ones_like(x, dtype=torch.bool) for x in ids], False),
        image_mask=padded(image_mask, False),
        positions=rearrange(padded([p.T for p in positions], 0), "B L thw -> thw B L"),
        patches=torch.cat(patches) if patches else torch.zeros(0, 6 * config.patch**2),
        grids=torch.tensor(grids).reshape(-1, 3),
    )
