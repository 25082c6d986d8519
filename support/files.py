"""Files that are written whole or not at all, sheets of pictures, tables."""

import json
import math
import os
import textwrap
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo


@contextmanager
def whole(file):
    """Yield a path to write to, which is renamed to file at the end, or deleted after an error."""
    file = Path(file)
    partial = file.with_name(f".{file.stem}.partial{file.suffix}")
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def write_text(file, text):
    with whole(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(file, value):
    write_text(file, json.dumps(value, indent=1) + "\n")


def write_png(file, image, about=()):
    """Write a PIL image as PNG; about: {name: text} for its text fields."""
    info = PngInfo()
    for key, value in dict(about).items():
        info.add_itxt(key, str(value))
    with whole(file) as partial:
        image.save(partial, "PNG", pnginfo=info)


def markdown_table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def sheet(rows, height=None, gap=4):
    """Draw rows, each a list of PIL images or (images, text), as one picture; scale to height."""
    rows = [row if isinstance(row, tuple) else (row, "") for row in rows]
    scaled = [[_scale(image, height) for image in images] for images, _ in rows]
    heights = [max(image.height for image in images) + gap for images in scaled]
    tops = list(accumulate(heights, initial=gap))
    right = gap + max(sum(image.width + gap for image in images) for images in scaled)
    beside = 364 if any(text for _, text in rows) else 0  # room for 60 letters
    page = Image.new("RGB", (right + beside, tops[-1]), "lightgray")
    draw = ImageDraw.Draw(page)
    for top, images, (_, text) in zip(tops, scaled, rows):
        x = gap
        for image in images:
            page.paste(image, (x, top))
            x += image.width + gap
        if text:
            draw.text((right + 4, top), textwrap.fill(text, 60), "black")
    return page


def grid(images):
    """Arrange pictures of one size in a square."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    return sheet(rows, gap=0)


def _scale(image, height):
    if height is None:
        return image
    return image.resize((max(1, image.width * height // image.height), height), Image.NEAREST)


def prompt_row(task, prompt, target):
    """A row of `sheet`: ([pictures of the prompt..., target], text of the prompt)."""
    pictures = [part for part in prompt if not isinstance(part, str)]
    text = "".join(part if isinstance(part, str) else " [image] " for part in prompt)
    return [*pictures, target], f"{task}: {text.strip()}"
