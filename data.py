"""Training examples: rendered by the miniature's world, or read from manifests.

    python data.py check edits.jsonl      # what is in a manifest, what is wrong, and a contact sheet

A manifest is a JSONL file, a line an example of one of four tasks, with paths relative to the file:

    {"task": "t2i", "prompt": "a dog on a beach", "target": "a.jpg"}
    {"task": "i2i", "target": "a.jpg"}
    {"task": "edit", "source": "a.jpg", "instruction": "remove the dog", "target": "b.jpg"}
    {"task": "objects", "target": "a.jpg", "segments": [["a dog", [[120, 300, 480, 910]]], [" on a beach", []]]}

A segment is a piece of the caption and the boxes, in thousandths of the target, of what it names. A
"size": [width, height] of the target may be added; it saves opening the images for --buckets.
"""

import json
import random
import re
import sys
import textwrap
import zlib
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

import shapes
from cli import Parser, one_line_errors
from prompts import (
    Batch,
    apply_task,
    collate,
    crop_to,
    read_image,
    reference_prompt,
    to_tensor,
    upright_size,
)

FIELDS = {  # of a manifest's line, by task, besides "task" and "target"
    "t2i": ("prompt",),
    "i2i": (),
    "edit": ("source", "instruction"),
    "objects": ("segments",),
}
LONGEST = 4000  # letters of a text


def parse_record(line):
    """One line of a manifest as a dictionary; raises ValueError naming what is wrong with it."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(record, dict) or record.get("task") not in FIELDS:
        raise ValueError(f'"task" must be one of {", ".join(FIELDS)}')
    for name in ("target", *FIELDS[record["task"]]):
        value = record.get(name)
        if name == "segments":
            if not isinstance(value, list) or not value or not all(map(_is_segment, value)):
                raise ValueError('"segments" must be a list of [text, [[x1, y1, x2, y2], ...]]')
        elif not _is_text(value) or not value.strip():
            raise ValueError(f'"{name}" must be a text of 1 to {LONGEST} letters')
    return record


def _is_text(value):
    whole = isinstance(value, str) and not re.search("[\ud800-\udfff]", value)  # half a letter
    return whole and len(value) <= LONGEST


def _is_segment(segment):
    def is_box(box):
        numbers = isinstance(box, list) and [type(x) in (int, float) for x in box] == [True] * 4
        return numbers and 0 <= box[0] < box[2] <= 1000 and 0 <= box[1] < box[3] <= 1000

    if not isinstance(segment, list) or [type(part) for part in segment] != [str, list]:
        return False
    return _is_text(segment[0]) and all(map(is_box, segment[1]))


class Manifest:
    """A JSONL file of examples: `lines` (number, offset) by task, `faults` {number: reason}, `crc`.

    Image paths in it are relative to its folder; boxes are in thousandths of the target.
    """

    def __init__(self, file):
        self.file, self.faults, self.crc = Path(file), {}, 0
        if not self.file.is_file():
            raise FileNotFoundError(f"{file}: no such manifest")
        lines, offset = {task: [] for task in FIELDS}, 0
        with self.file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    if line.strip():
                        lines[parse_record(line)["task"]].append((number, offset))
                except ValueError as error:
                    self.faults[number] = str(error)
                offset += len(line)
                self.crc = zlib.crc32(line, self.crc)
        self.lines = {task: np.array(pairs) for task, pairs in lines.items() if pairs}
        self.total = sum(map(len, self.lines.values())) + len(self.faults)

    def raw(self, offset):
        with self.file.open("rb") as stream:
            stream.seek(offset)
            return parse_record(stream.readline())

    def record(self, offset):
        """The line there, its images read; raises ValueError or FileNotFoundError."""
        record = self.raw(offset)
        paths = {k: self.file.parent / record[k] for k in ("source", "target") if k in record}
        return record | {k: read_image(path) for k, path in paths.items()}

    def ratio(self, offset):
        """Width over height of a line's target, from "size" if it says so, else from the image."""
        record = self.raw(offset)
        try:
            with Image.open(self.file.parent / record["target"]) as image:
                width, height = record.get("size") or upright_size(image)
            return min(max(width / height, 0.01), 100)
        except Exception:  # noqa: BLE001 - reading it will tell what is wrong
            return 1.0


def rendered(task, rng):
    """A record as a manifest holds them, its images read, from the miniature's endless world."""
    if task == "edit":
        edit = shapes.sample_edit(rng.choice(shapes.EDITS), rng)
        source, target = shapes.render(edit.source), shapes.render(edit.target)
        return {"task": task, "source": source, "instruction": edit.text, "target": target}
    if task == "objects":
        return rendered_reference(shapes.sample_reference(rng))
    kind = rng.choice((*shapes.TASKS, "scene"))
    scene, prompt = shapes.sample_caption(kind, rng)
    return {"task": task, "prompt": prompt.text, "target": shapes.render(scene)}


def rendered_reference(told):
    """The record of a `shapes.Reference`."""
    segments = [(text, [shapes.box(o)] if o else []) for text, o in told.segments]
    return {"task": "objects", "segments": segments, "target": shapes.render(told.scene)}


def training_example(record, size, rng, flip=False):
    """A record as (task, prompt, target): the target cropped to size, and what shall draw it.

    Source and target share their centre crop and, with flip, the toss of a mirror; pictures of
    objects are cut from the target as it then is: at most three, each at most half of it.
    """
    target, task = crop_to(record["target"], *size), record["task"]
    mirrored = flip and rng.random() < 0.5
    if mirrored:
        target = ImageOps.mirror(target)
    if task == "t2i":
        return task, [record["prompt"]], target
    if task == "i2i":
        return task, [target], target
    if task == "edit":
        source = crop_to(record["source"], *size)
        source = ImageOps.mirror(source) if mirrored else source
        return task, [source, record["instruction"]], target
    boxes = [
        (i, box)
        for i, (_, thousandths) in enumerate(record["segments"])
        for box in (_visible(b, record["target"].size, size, mirrored) for b in thousandths)
        if box
    ]
    chosen = sorted(rng.sample(range(len(boxes)), min(3, len(boxes))))
    pictures = [[] for _ in record["segments"]]
    for i, box in (boxes[k] for k in chosen):
        pictures[i].append(target.crop(box))
    segments = [(text, images) for (text, _), images in zip(record["segments"], pictures)]
    if not chosen:
        return "t2i", ["".join(text for text, _ in segments)], target
    return *reference_prompt(segments, rng.random() < 0.5), target


def _visible(box, old, new, mirrored):
    """A box in thousandths of a picture of size old, in pixels of its crop to new; None if too
    large, too small, or mostly cropped away."""
    scale = max(new[0] / old[0], new[1] / old[1])
    edges = [
        x / 1000 * old[i % 2] * scale - (old[i % 2] * scale - new[i % 2]) / 2
        for i, x in enumerate(box)
    ]
    area = (edges[2] - edges[0]) * (edges[3] - edges[1])
    x1, y1, x2, y2 = (round(min(max(x, 0), new[i % 2])) for i, x in enumerate(edges))
    if mirrored:
        x1, x2 = new[0] - x2, new[0] - x1
    width, height = x2 - x1, y2 - y1
    if min(width, height) < 8 or not area / 2 < width * height <= new[0] * new[1] / 2:
        return None
    return x1, y1, x2, y2


def bucket_sizes(side):
    """Sizes of about side x side pixels, in ratios from 1:2 to 2:1; sides multiples of 16."""
    widths = range(side // 2, 2 * side + 1, max(16, side // 8))
    sizes = {(w // 16 * 16, max(1, round(side * side / w / 16)) * 16) for w in widths}
    sizes |= {(h, w) for w, h in sizes}
    return sorted(size for size in sizes if max(size) <= 2 * min(size))


@dataclass
class Pool:
    """Examples of one source, task and size: what a microbatch is drawn from."""

    source: Manifest | None  # None is the rendered world
    task: str
    size: tuple[int, int]
    weight: float
    lines: np.ndarray | None = None  # (n, 2): number and offset

    def line(self, position, seed):
        """The line at a position of the endless sequence of epochs, each shuffled anew."""
        epoch, i = divmod(position, len(self.lines))
        return self.lines[_shuffled(len(self.lines), f"{seed} {self.task} {epoch}")[i]]


@lru_cache(maxsize=64)
def _shuffled(n, seed):
    return np.random.default_rng(list(seed.encode())).permutation(n)


def make_pools(sources, tasks, side, buckets=False, progress=iter):
    """Pools of [(Manifest or None, weight)] and {task: weight}; with buckets by ratio of the target.

    A task's weight is its share of the microbatches; sources that hold examples of it share that by
    their own weights. Any target can be copied: every line is an example of i2i.
    """
    pools = []
    for task, share in tasks.items():
        holding = []
        for source, weight in sources:
            found = source.lines if source else {}
            lines = [*found.values()] if task == "i2i" else [found[task]] if task in found else []
            if lines or source is None:
                holding.append((source, weight, np.concatenate(lines) if lines else None))
        for source, weight, lines in holding:
            part = share * weight / sum(w for _, w, _ in holding)
            if source is None:
                pools.append(Pool(None, task, (side, side), part))
                continue
            sizes = [(side, side)]
            which = np.zeros(len(lines), int)
            if buckets:
                sizes = bucket_sizes(side)
                ratios = np.array([source.ratio(offset) for _, offset in progress(lines)])
                logs = np.log([w / h for w, h in sizes])
                which = np.abs(np.log(ratios)[:, None] - logs).argmin(1)
            for i in np.unique(which):
                inside = lines[which == i]
                pools.append(Pool(source, task, sizes[i], part * len(inside) / len(lines), inside))
    return [pool for pool in pools if pool.weight > 0]


@dataclass
class Microbatch:
    """Examples of one task that go through the model together."""

    task: str
    batch: Batch
    target: torch.Tensor  # (B, 3, H, W) in [-1, 1]
    faults: list  # (file:line, reason) of what was skipped on the way

    def pin_memory(self):
        for x in fields(self.batch):
            setattr(self.batch, x.name, getattr(self.batch, x.name).pin_memory())
        self.target = self.target.pin_memory()
        return self


class Microbatches(torch.utils.data.Dataset):
    """Item j is the j-th microbatch of a run: a function of the seed and j, whoever asks, and when.

    size: examples in each. null: {task: share of prompts replaced by their null prompt}, for guidance
    to know its opposite.
    """

    def __init__(self, pools, count, size, seed, tokenizer, patches, mrope, null, flip=False):
        self.pools, self.size, self.seed, self.flip, self.null = pools, size, seed, flip, null
        self.collate = partial(collate, tokenizer=tokenizer, config=patches, mrope=mrope)
        shares = np.array([pool.weight for pool in pools])
        rng = np.random.default_rng([seed, 0])
        self.pool_of = rng.choice(len(pools), count, p=shares / shares.sum())
        self.earlier = np.zeros(count, int)  # microbatches of the same pool
        for i in range(len(pools)):
            mine = self.pool_of == i
            self.earlier[mine] = np.arange(mine.sum())

    def __len__(self):
        return len(self.pool_of)

    def __getitem__(self, j):
        pool, faults, prompts, targets = self.pools[self.pool_of[j]], [], [], []
        for i in range(self.size):
            rng = random.Random(f"{self.seed} {j} {i}")
            position = int(self.earlier[j]) * self.size + i
            task, prompt, target = self.example(pool, position, rng, faults)
            positive, null = apply_task(task, prompt)
            prompts.append(null if rng.random() < self.null[pool.task] else positive)
            targets.append(target)
        return Microbatch(pool.task, self.collate(prompts), to_tensor(targets), faults)

    def example(self, pool, position, rng, faults):
        """(task, prompt, target) at a position of a pool; faulty lines are noted and passed over."""
        if pool.source is None:
            return training_example(rendered(pool.task, rng), pool.size, rng)
        for attempt in range(100):
            number, offset = pool.line(position + attempt, self.seed)
            try:
                record = pool.source.record(offset) | {"task": pool.task}
                made = training_example(record, pool.size, rng, self.flip)
                apply_task(*made[:2])
                return made
            except (ValueError, OSError) as error:
                faults.append((f"{pool.source.file}:{number}", str(error)))
        raise ValueError(f"{pool.source.file}: 100 faulty examples in a row; last: {faults[-1][1]}")


class Faults:
    """The lines that were skipped, each named once."""

    def __init__(self, manifests):
        self.allowed = sum(manifest.total for manifest in manifests) / 100
        self.scanned = {f"{m.file}:{n}": why for m in manifests for n, why in m.faults.items()}
        self.met = {}

    def tell(self, faults):
        for place, reason in faults.items():
            tqdm.write(f"skipped {place}: {reason}", file=sys.stderr)

    def note(self, faults):
        """[(file:line, reason)] met while reading."""
        new = {place: reason for place, reason in faults if place not in self.met}
        self.tell(new)
        self.met |= new

    def check(self, met, read):
        """Raise ValueError if over 1 % of all lines are faulty, or of those read so far.

        met: how many were met among all that were read, by all processes.
        """
        bad = len(self.scanned) + met
        if bad > self.allowed or met > max(10, read / 100):
            first = "; ".join(f"{place}: {why}" for place, why in (self.scanned | self.met).items())
            raise ValueError(f"{bad:.0f} bad lines are over 1 %: {first[:600]}")


# ---- looking at examples ------------------------------------------------------------------------


def sheet(rows, height=128, letters=60):
    """Rows of (images, text) as one picture: all images of one height, the text at their right."""
    scaled = [
        [i.resize((max(1, i.width * height // i.height), height), Image.NEAREST) for i in images]
        for images, _ in rows
    ]
    right = 8 + max(sum(i.width + 4 for i in images) for images in scaled)
    page = Image.new("RGB", (right + 6 * letters, len(rows) * (height + 4) + 4), "white")
    draw = ImageDraw.Draw(page)
    for y, (images, (_, text)) in enumerate(zip(scaled, rows)):
        x, top = 4, 4 + y * (height + 4)
        for image in images:
            page.paste(image, (x, top))
            x += image.width + 4
        draw.text((right, top), textwrap.fill(text, letters), "black")
    return page


def example_row(task, prompt, target):
    """What went in, and what shall come out, as a row of `sheet`."""
    pictures = [part for part in prompt if not isinstance(part, str)]
    text = "".join(part if isinstance(part, str) else " [image] " for part in prompt)
    return [*pictures, target], f"{task}: {text.strip()}"


def check(file, side=256):
    """Read every example of a manifest; print what is in it and what is wrong with it.

    A contact sheet of some of them goes beside it. Returns the number of faulty lines.
    """
    manifest = Manifest(file)
    faults, rows = dict(manifest.faults), []
    for task, lines in manifest.lines.items():
        for i, (number, offset) in enumerate(tqdm(lines, desc=task, leave=False)):
            try:
                record = manifest.record(offset)
                made = training_example(record, (side, side), random.Random(0))
                apply_task(*made[:2])
            except (ValueError, OSError) as error:
                faults[int(number)] = str(error)
                continue
            if i % max(1, len(lines) // 6) == 0 and i // max(1, len(lines) // 6) < 6:
                rows.append(example_row(*made))
        print(f"{task}: {len(lines)} examples")
    for number in sorted(faults)[:10]:
        print(f"{file}:{number}: {faults[number]}")
    print(f"{len(faults)} of {manifest.total} lines are faulty")
    if rows:
        picture = manifest.file.with_suffix(".check.png")
        sheet(rows).save(picture)
        print(picture)
    return len(faults)


def main(arguments=None):
    parser = Parser(description="Check a manifest of training examples and draw a contact sheet.")
    parser.add_argument("action", choices=["check"])
    parser.add_argument("manifest")
    args = parser.parse_args(arguments)
    if check(args.manifest):
        sys.exit(1)


if __name__ == "__main__":
    with one_line_errors():
        main()
