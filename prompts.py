"""What a user types, a list of strings and PIL images, and pictures on their way in and out."""

import re
import warnings
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageOps

from support.cli import UserError, reading


def read_image(path):
    """An image file, or the first frame of one, as upright RGB; UserError if it is not whole."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image file")
    strict = warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning)
    with reading(path, "a whole PNG, JPEG or similar file"), strict, Image.open(path) as image:
        return to_rgb(image)


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


def check_drawing(steps, guidance, width, height, largest):
    """Raise UserError for settings that cannot be drawn, naming what is wrong and what would be right."""
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    if not abs(guidance) < float("inf"):
        raise UserError(f"guidance must be a finite number, got {guidance}")
    for side in (width, height):
        if side % 16 or not 16 <= side <= largest:
            near = min(max(round(side / 16) * 16, 16), largest)
            limit = f"multiples of 16 up to {largest}"
            raise UserError(f"size {width}x{height}: sides must be {limit}; nearest is {near}")


def interleave(text, images):
    """Put images, in order, in the place of each <image> of text -> a list of strings and images."""
    parts = text.split("<image>")
    if len(parts) - 1 != len(images):
        counts = f"{len(parts) - 1} <image> placeholders, but {len(images)} images were given"
        raise UserError(f"the prompt has {counts}")
    pairs = zip(parts, [*images, ""])
    return [part for pair in pairs for part in pair if part != ""]


TASKS = {
    "t2i": "draw a text",
    "i2i": "copy an image",
    "edit": "change an image as a text says",
    "combine": "'a dog <image>, a hat <image> the dog wears the hat': named images, then a text",
    "objects": "draw what text and images say, in any order",
}
READING = {
    "caption": "say what each image shows",
    "answer": "answer the prompt, a question about the image",
}


def split_prompt(prompt):
    """A list of strings and images as one text and the list of images."""
    images = [part for part in prompt if not isinstance(part, str)]
    return "".join(part for part in prompt if isinstance(part, str)), images


def apply_task(task, prompt):
    """Wrap a prompt in the official template of its task.

    Returns (positive, null), two lists of strings and images; null is what classifier-free guidance
    moves away from. Task None means t2i for text alone, else objects.
    """
    prompt = [prompt] if isinstance(prompt, str) else list(prompt)
    if not all(isinstance(part, str | Image.Image) for part in prompt):
        raise UserError("a prompt is a list of strings and PIL images")
    text, images = split_prompt(prompt)
    if re.search("[\ud800-\udfff]", text):  # as a terminal without UTF-8 makes of an umlaut
        raise UserError("the prompt holds half a letter (a lone surrogate): use a UTF-8 terminal")
    task = task or ("objects" if images else "t2i")
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}: expected one of {', '.join(TASKS)}")
    if not text.strip() and task != "i2i":
        raise UserError(f"empty prompt: task {task} needs some text")
    if text.strip() and task == "i2i":
        raise UserError("task i2i copies its image: it takes no text")
    wanted = {"t2i": "no image", "i2i": "one image", "edit": "one image"}.get(task, "images")
    if not {"no image": not images, "one image": len(images) == 1, "images": images}[wanted]:
        raise UserError(f"task {task} takes {wanted}, but {len(images)} were given")

    nulls = {
        "t2i": ["Generate Image: "],
        "i2i": ["Copy Image: "],
        "edit": ["Edit image ", *images, " following:"],
    }
    if null := nulls.get(task):
        return [*null, *(images if task == "i2i" else [text])], null
    if task == "combine":
        marked = "".join(part if isinstance(part, str) else "\udfff" for part in prompt)
        *names, text = (part.strip(" ,") for part in marked.split("\udfff"))
        objects = [part for pair in zip(names, images) for part in (", ", *pair)][1:]
        null = ["Combine the objects: ", *objects, " and generate an image following: "]
        return [*null, text], null
    # All but the images stays in the null prompt: guidance strengthens the images only.
    prompt[0] = prompt[0].lstrip() if isinstance(prompt[0], str) else prompt[0]
    prompt[-1] = prompt[-1].rstrip() if isinstance(prompt[-1], str) else prompt[-1]
    return ["Generate Image: ", *prompt], ["Generate Image: ", text.strip()]


def reference_prompt(segments, named):
    """Words and pictures, [(text, [image, ...]), ...], as (task, prompt) in an official template.

    named: each picture first, with the words before it as its name, then the whole text (task
    combine); else, or where a picture has no name, text and pictures in their order (task objects).
    """
    pictured = [(text.strip(" ,"), image) for text, images in segments for image in images]
    if named and pictured and all(name for name, _ in pictured):
        whole = "".join(text for text, _ in segments)
        return "combine", [part for pair in pictured for part in pair] + [whole]
    return "objects", [part for text, images in segments for part in (text, *images) if part != ""]
