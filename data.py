"""Training examples: from manifests to microbatches.

A manifest is a JSONL file. Each line is an example of one of five tasks; paths are relative to the file:

    {"task": "t2i", "prompt": "a dog on a beach", "target": "a.jpg"}
    {"task": "i2i", "target": "a.jpg"}
    {"task": "edit", "source": "a.jpg", "instruction": "remove the dog", "target": "b.jpg"}
    {"task": "objects", "target": "a.jpg", "segments": [["a dog", [[120, 300, 480, 910]]], [" on a beach", []]]}
    {"task": "answer", "image": "a.jpg", "question": "how many dogs are there?", "answer": "two"}

Dream Engine learns every task but answer. A segment is a piece of the caption with the boxes of the
objects that it names, in thousandths of the target. A t2i or edit line may have a "caption" of its
target, for systems that read. If it states "size": [width, height], --buckets opens no image.
"""

import json
import os
import random
import re
import signal
import sys
import zlib
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from support.cli import UserError, printable, reading

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from lmm import Batch
from prompts import apply_task, crop_to, read_image, reference_prompt, to_tensor, upright_size
from support.files import LONGEST_LINE, find_file, read_lines

FIELDS = {  # that a line of each task must have, besides "task"
    "t2i": ("target", "prompt"),
    "i2i": ("target",),
    "edit": ("target", "source", "instruction"),
    "objects": ("target", "segments"),
    "answer": ("image", "question", "answer"),
}
LONGEST = 4000  # characters of a text


def parse_record(line):
    """Parse a line of a manifest into a dictionary; UserError names the field that is wrong."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError("not JSON") from None
    if not isinstance(record, dict) or record.get("task") not in list(FIELDS):
        raise UserError(f'"task" must be one of {", ".join(FIELDS)}')
    for name in (*FIELDS[record["task"]], *record.keys() & {"caption"}):
        text = record.get(name)
        if name == "segments":
            with reading('"segments"', "a list of [text, [[x1, y1, x2, y2], ...]]"):
                boxes = [box for _, inside in text for box in inside]
                kinds = {type(x) for box in boxes for x in box} | {type(x) for _, x in text}
                right = (0 <= a < c <= 1000 and 0 <= b < d <= 1000 for a, b, c, d in boxes)
                if not (kinds <= {list, int, float} and all(right)):
                    raise ValueError("a box that is not x1 < x2, y1 < y2 within 0 to 1000")
                name, text = "text of segments", "".join(words for words, _ in text)
        halves = isinstance(text, str) and re.search("[\ud800-\udfff]", text)  # lone surrogates
        if not isinstance(text, str) or halves or not text.strip() or len(text) > LONGEST:
            raise UserError(f'"{name}" must be a text of 1 to {LONGEST} characters')
    size = record.get("size")
    right = isinstance(size, list) and [type(x) in (int, float) and 1 <= x < 1e9 for x in size]
    if size is not None and right != [True, True]:
        raise UserError('"size" must be [width, height] in pixels')
    return record


class Manifest:
    """A JSONL file of examples. A row is a line number, from 1.

    A source of examples, this class or `mini.world.Examples`, has `name`, `identity` (compared by
    --resume), `bad_lines` {row: reason}, the `total` number of rows, and the methods `rows`,
    `record` and `ratio`.
    """

    def __init__(self, file):
        self.file, self.name = Path(file), str(file)
        if not self.file.is_file():
            raise FileNotFoundError(f"{file}: no such manifest")
        rows, starts, crc, self.bad_lines = {task: [] for task in FIELDS}, [0], 0, {}
        for row, line in read_lines(file):
            if len(line) == LONGEST_LINE:
                raise UserError(f"{file}:{row}: over {LONGEST_LINE:,} bytes; expected JSONL")
            try:
                if line.strip():
                    rows[parse_record(line)["task"]].append(row)
            except UserError as error:
                self.bad_lines[row] = str(error)
            starts.append(starts[-1] + len(line))
            crc = zlib.crc32(line, crc)
        self.starts = np.array(starts)
        self.by_task = {task: np.array(numbers, int) for task, numbers in rows.items()}
        self.total = sum(map(len, rows.values())) + len(self.bad_lines)
        self.identity = f"{self.file.name}:{crc:08x}"

    def rows(self, task):
        """The rows (n,) of a task; for i2i every row that has a target to copy."""
        if task != "i2i":
            return self.by_task[task]
        return np.concatenate([rows for t, rows in self.by_task.items() if t != "answer"])

    def line(self, row):
        with self.file.open("rb") as stream:
            stream.seek(self.starts[row - 1])
            return parse_record(stream.readline(LONGEST_LINE))

    def record(self, row, task, rng=None):
        """The example in a row, for a task, with its images. rng: for sources that render them."""
        record = self.line(row) | {"task": task}
        for name in {"source", "target", "image"} & {*FIELDS[task]}:
            record[name] = read_image(find_file(self.file.parent, record[name]))
        return record

    def ratio(self, row):
        """Width over height of a row's target: from its "size", else from the image."""
        try:
            record = self.line(row)
            if not (size := record.get("size")):
                name = record[FIELDS[record["task"]][0]]
                with Image.open(find_file(self.file.parent, name)) as image:
                    size = upright_size(image)
            return min(max(size[0] / size[1], 0.01), 100)
        except Exception:  # noqa: BLE001 - `record` will say what is wrong
            return 1.0


def training_example(record, size, rng):
    """Turn a record into (task, prompt, target); target is the picture that the prompt describes.

    Target and source are cropped alike, to size. At most three objects are cut from the target.
    """
    target, task = crop_to(record["target"], *size), record["task"]
    if task == "t2i":
        return task, [record["prompt"]], target
    if task == "i2i":
        return task, [target], target
    if task == "edit":
        return task, [crop_to(record["source"], *size), record["instruction"]], target
    old, boxes = record["target"].size, []
    for i, (_, thousandths) in enumerate(record["segments"]):
        boxes += [(i, box) for b in thousandths if (box := visible_box(b, old, size))]
    chosen = sorted(rng.sample(range(len(boxes)), min(3, len(boxes))))
    segments = [(text, []) for text, _ in record["segments"]]
    for i, box in (boxes[k] for k in chosen):
        segments[i][1].append(target.crop(box))
    if not chosen:
        return "t2i", ["".join(text for text, _ in segments)], target
    return *reference_prompt(segments, rng.random() < 0.5), target


def visible_box(box, old, new):
    """Map a box in thousandths of size old to pixels of the crop to size new; None if it is unfit.

    A box is unfit if it is small or thin, lies mostly outside the crop, or covers over half of it.
    """
    scale = max(new[0] / old[0], new[1] / old[1])
    shifts = [(a * scale - b) / 2 for a, b in zip(old, new)]
    edges = [x / 1000 * old[i % 2] * scale - shifts[i % 2] for i, x in enumerate(box)]
    area = (edges[2] - edges[0]) * (edges[3] - edges[1])
    x1, y1, x2, y2 = (round(min(max(x, 0), new[i % 2])) for i, x in enumerate(edges))
    width, height = x2 - x1, y2 - y1
    large = min(width, height) >= max(8, max(width, height) / 200)  # 200: the most the LMM takes
    fits = large and area / 2 < width * height <= new[0] * new[1] / 2
    return (x1, y1, x2, y2) if fits else None


def bucket_sizes(side):
    """Sizes of about side x side pixels, with ratios from 1:2 to 2:1 and sides in multiples of 16."""
    widths = range(side // 2, 2 * side + 1, max(16, side // 8))
    sizes = {(w // 16 * 16, max(1, round(side * side / w / 16)) * 16) for w in widths}
    sizes |= {(h, w) for w, h in sizes}
    return sorted(size for size in sizes if max(size) <= 2 * min(size))


@dataclass
class Pool:
    """Examples of one source, task and size, from which whole microbatches are drawn."""

    source: object  # a Manifest, or another class with its methods
    task: str
    size: tuple[int, int]
    weight: float
    rows: np.ndarray  # (n,)

    def row(self, position, seed):
        """The row at a position in an endless sequence of epochs, each in its own random order."""
        epoch, i = divmod(position, len(self.rows))
        return self.rows[_shuffled(len(self.rows), f"{seed} {self.task} {epoch}")[i]]


@lru_cache(maxsize=64)
def _shuffled(n, seed):
    return np.random.default_rng(list(seed.encode())).permutation(n)


def make_pools(sources, tasks, side, buckets=False, progress=iter):
    """Make Pools from [(source, weight)] and {task: share}; weights divide a share among sources."""
    pools = []
    for task, share in tasks.items():
        holding = [(s, weight, rows) for s, weight in sources if len(rows := s.rows(task))]
        total = sum(weight for _, weight, _ in holding)
        for source, weight, rows in holding if share else ():
            sizes, nearest = [(side, side)], np.zeros(len(rows), int)
            if buckets:
                sizes = bucket_sizes(side)
                ratios = np.array([source.ratio(row) for row in progress(rows)])
                logs = np.log([w / h for w, h in sizes])
                nearest = np.abs(np.log(ratios)[:, None] - logs).argmin(1)
            for i in np.unique(nearest):
                inside = rows[nearest == i]
                part = share * weight / total * len(inside) / len(rows)
                pools.append(Pool(source, task, sizes[i], part, inside))
    return pools


@dataclass
class Microbatch:
    """Examples of one task that go through the model together."""

    number: int
    task: str
    batch: Batch
    target: torch.Tensor  # (B, 3, H, W) in [-1, 1]
    bad_lines: list  # (file:line, reason) of lines that were skipped


class Microbatches(torch.utils.data.Dataset):
    """All microbatches of a run; item j depends on the seed and j alone.

    collate: turns prompts into a Batch. size: examples in a microbatch. null: share of null prompts.
    turn: 0 draws the task of each microbatch at random; n changes the task every n microbatches.
    """

    def __init__(self, pools, collate, count, size, seed=0, null=0.1, turn=0):
        self.pools, self.collate, self.size, self.seed, self.null = pools, collate, size, seed, null
        shares, tasks = np.array([p.weight for p in pools]), np.array([p.task for p in pools])
        rng = np.random.default_rng([seed, 0])
        self.pool_of = rng.choice(len(pools), count, p=shares / shares.sum())
        kinds = list(dict.fromkeys(tasks)) if turn else ()
        for k, task in enumerate(kinds):
            own = np.arange(count) // turn % len(kinds) == k
            weights = shares * (tasks == task)
            self.pool_of[own] = rng.choice(len(pools), own.sum(), p=weights / weights.sum())
        self.earlier = np.zeros(count, int)  # microbatches of the same pool
        for i in range(len(pools)):
            same = self.pool_of == i
            self.earlier[same] = np.arange(same.sum())

    def __len__(self):
        return len(self.pool_of)

    def __getitem__(self, j):
        try:
            return self.microbatch(j)
        except UserError as error:
            return error  # raised by `load`, because worker processes would add a traceback

    def microbatch(self, j):
        pool, bad_lines, examples = self.pools[self.pool_of[j]], [], []
        for i in range(self.size):
            rng = random.Random(f"{self.seed} {j} {i}")
            position = int(self.earlier[j]) * self.size + i
            example = self.example(pool, position, rng, bad_lines)
            examples.append((*example, rng.random() < self.null))
        target = to_tensor([target for _, _, target, *_ in examples])
        return Microbatch(j, pool.task, self.batch(examples, j), target, bad_lines)

    def batch(self, examples, j):
        """[(task, prompt, target, replace it by the null prompt?)] -> Batch."""
        pairs = [(apply_task(task, prompt), null) for task, prompt, _, null in examples]
        return self.collate([prompts[null] for prompts, null in pairs])

    prepare = staticmethod(training_example)

    def example(self, pool, position, rng, bad_lines):
        """Prepare the row at a position of a pool; a bad line is added to bad_lines and skipped."""
        for attempt in range(100):
            row = pool.row(position + attempt, self.seed)
            try:
                record = pool.source.record(row, pool.task, rng)
                return self.prepare(record, pool.size, rng)
            except (UserError, OSError) as error:
                bad_lines.append((f"{pool.source.name}:{row}", str(error)))
        place, reason = bad_lines[-1]
        raise UserError(f"100 bad lines in a row, the last one {place}: {reason}")

    def load(self, numbers, workers=0):
        """Yield the microbatches of these numbers. workers: processes to make them; 0: this one."""
        options = {"batch_size": None, "num_workers": workers, "sampler": numbers}
        for item in torch.utils.data.DataLoader(self, **options, worker_init_fn=start_worker):
            if isinstance(item, UserError):
                raise item
            yield item


def start_worker(_):
    """Hide Ctrl-C, which goes to the whole process group, from a worker process."""
    ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)  # on Windows
    getattr(os, "setpgrp", ignore)()


class BadLines(dict):
    """Lines skipped while opening manifests or in training: {file:line: reason}."""

    def __init__(self, sources):
        for source, _ in sources:
            self |= {f"{source.name}:{row}": why for row, why in source.bad_lines.items()}
        self.scanned, self.allowed = len(self), sum(source.total for source, _ in sources) / 100
        self.check(0, 0)

    @property
    def found(self):
        """How many were found in training."""
        return len(self) - self.scanned

    def add(self, bad_lines):
        """Count and report [(file:line, reason)], each line once."""
        for place, reason in bad_lines:
            if place not in self:
                self[place] = reason
                self.report({place: reason})

    def report(self, lines=None):
        for place, reason in (self if lines is None else lines).items():
            tqdm.write(printable(f"skipped {place}: {reason}"), file=sys.stderr)

    def check(self, found, examples):
        """Raise UserError if over 1 % of all lines are bad, or of all examples read in training."""
        bad = self.scanned + found
        if bad > max(10, self.allowed) or found > max(10, examples / 100):
            lines = "; ".join(f"{place}: {why}" for place, why in self.items())
            raise UserError(f"{bad:.0f} bad lines are over 1 %: {lines[:600]}")
