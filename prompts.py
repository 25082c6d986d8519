"""Prompts (lists of strings and PIL images), a template for each task, and image conversion."""

import re
import warnings
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageOps

from support.cli import UserError, reading


def read_image(path):
    """Read an image file (its first frame) as upright RGB. Raises UserError if it is damaged."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image file")
    strict = warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning)
    with reading(path, "a whole PNG, JPEG or similar file"), strict, Image.open(path) as image:
        return to_rgb(image)


def to_rgb(image):
    """Convert a PIL image to 8-bit RGB: EXIF orientation applied, transparency over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):  # convert() would clip levels at 255
        levels = np.asarray(image, dtype=np.float64)
        top = next((top for top in (1, 255) if levels.max() <= top), 65535)
        image = Image.fromarray((levels / top * 255).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def upright_size(image):
    """(width, height) of a PIL image after its EXIF orientation is applied; reads no pixels."""
    sideways = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return image.size[::-1] if sideways else image.size


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
    images = [part for part in prompt if not isinstance(part, str)]
    return "".join(part for part in prompt if isinstance(part, str)), images


def apply_task(task, prompt):
    """Wrap a prompt in the official template of its task.

    task: one of TASKS; None means objects with images, else t2i. Returns (positive, null), two lists
    of strings and images; guidance moves away from null. Raises UserError for an unfit prompt.
    """
    prompt = [prompt] if isinstance(prompt, str) else list(prompt)
    if not all(isinstance(part, str | Image.Image) for part in prompt):
        raise UserError("a prompt must be a list of strings and PIL images")
    text, images = split_prompt(prompt)
    task = task or ("objects" if images else "t2i")
    if re.search("[\ud800-\udfff]", text):  # e.g. an umlaut typed in a terminal without UTF-8
        raise UserError("the prompt holds half a letter (a lone surrogate): use a UTF-8 terminal")
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
