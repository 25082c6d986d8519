"""Files: found, read by lines, written whole or not at all. Also sheets of pictures, and tables."""

import json
import math
import os
import re
import textwrap
import unicodedata
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path

from support.cli import UserError, message_of

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

LONGEST_LINE = 2**20  # bytes of a line of a JSONL file


@contextmanager
def whole(file):
    """Yield a path to write to, which is renamed to file at the end, or deleted after an error."""
    file = Path(file)
    partial = fresh(file)
    mode = partial.stat().st_mode
    try:
        yield partial
        partial.chmod(mode)  # safetensors sets its own
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def fresh(file):
    """Make an empty file beside file, with its suffix and a new random name, and return its path.

    No other program can have the same name, and a link of that name is not followed.
    """
    suffix = file.suffix if len(os.fsencode(file.suffix)) < 32 else ""  # a name has 255 bytes
    path = file.with_name(f".{os.urandom(8).hex()}.partial{suffix}")
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
    try:
        os.close(os.open(path, flags, 0o666))  # less the umask
    except OSError as error:
        error.filename = os.fspath(file)
        raise
    return path


def require_writable(file, option):
    """Make the folder of file, an option's, and raise UserError unless `whole` can write file."""
    file = Path(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.lstat(file)  # raises if the name is too long, or none
        if file.is_dir():
            raise IsADirectoryError(f"{file}: is a folder")
        fresh(file).unlink()
    except (OSError, ValueError) as error:
        cause = message_of(error).removeprefix(f"{file}: ")
        raise UserError(f"{option} {file}: cannot be written ({cause})") from error


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


def find_file(folder, name):
    """The picture of a name in a folder, also with \\ for /, or in Unicode's other normal form."""
    slashes = name.replace("\\", "/")
    names = name, *(unicodedata.normalize(form, slashes) for form in ("NFC", "NFD"))
    if file := next((f for x in names if os.path.isfile(f := Path(folder, x))), None):
        return file
    raise FileNotFoundError(f"{Path(folder, name)}: no such image file")


def read_lines(file, longest=LONGEST_LINE):
    """Yield (number, bytes) of the lines of a JSONL file, from 1; longer lines come in pieces."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file")
    with open(file, "rb") as stream:
        start = stream.read(1000)
        if re.match(rb"\xff\xfe|\xfe\xff|\0[^\0]|[^\0]\0", start):
            raise UserError(f"{file}: is UTF-16; save as UTF-8")
        if re.match(rb"(\xef\xbb\xbf)?\s*\[\s*\{", start):
            raise UserError(f"{file}: is one JSON array; expected one object a line")
        stream.seek(0)
        yield from enumerate(iter(lambda: stream.readline(longest), b""), 1)
