"""The folder of a training run: checkpoints, metrics, pictures.

checkpoints/000250/     stageN.safetensors, and state.pt: optimizer, step, settings
stageN.safetensors      the newest, for `sample.py --checkpoint`
metrics.jsonl           a line a step
loss.png, samples-*.png
"""

import json
import math
import os
import shutil
import time
from collections import Counter
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors import SafetensorError

from support.cli import UserError, reading
from support.files import prompt_row, sheet, whole, write_png, write_text

BINS = 5  # of t, for the loss


# ---- checkpoints --------------------------------------------------------------------------------


def save(engine, optimizer, out, step, settings, keep=2):
    """Write checkpoints/STEP/ whole or not at all, publish it; keep the last few.

    A folder without suffix is always complete: it is written and removed under another name.
    """
    folder = out / "checkpoints" / f"{step:06d}"
    partial, weights = folder.with_suffix(".partial"), f"stage{settings['stage']}.safetensors"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = {name: settings[name] for name in ("stage", "rank", "alpha")}
    engine.save(partial / weights, **config, step=step)
    state = {"step": step, "settings": settings, "optimizer": optimizer.state_dict()}
    torch.save(state, partial / "state.pt")
    for written in partial.iterdir():
        with written.open("rb") as file:
            os.fsync(file.fileno())
    if not folder.exists():
        os.replace(partial, folder)
    publish(out)
    for old in checkpoints(out)[:-keep]:
        os.replace(old, old.with_suffix(".old"))
    for leftover in (*folder.parent.glob("*.partial"), *folder.parent.glob("*.old")):
        shutil.rmtree(leftover, ignore_errors=True)


def open_folder(out, step):
    """Make the folder of a run, or put it in the state of the step that the run goes on from."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(out) if record["step"] <= step]
        write_text(out / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
        if step:
            publish(out)  # again: the run may have been killed before it could


def publish(out):
    """Copy the newest checkpoint's stageN.safetensors to the run's own folder."""
    newest = weights_file(latest(out))
    with whole(out / newest.name) as partial:
        shutil.copy(newest, partial)


def weights_file(folder):
    """The one stageN.safetensors of a checkpoint."""
    files = list(folder.glob("stage?.safetensors"))
    if len(files) != 1:
        raise UserError(f"{folder}: holds {len(files)} files stageN.safetensors; expected one")
    return files[0]


def checkpoints(out):
    """The complete checkpoints of a run, oldest first."""
    complete = [f for f in Path(out, "checkpoints").glob("*") if f.is_dir() and f.name.isdecimal()]
    return sorted(complete, key=lambda folder: int(folder.name))


def latest(out):
    return (checkpoints(out) or [None])[-1]


def restore(out, engine, optimizer, settings):
    """Put the newest checkpoint, if any, into engine and optimizer; returns the steps it has behind it.

    Raises UserError if it was trained with other settings, or a file of it is damaged.
    """
    if not (folder := latest(out)):
        return 0
    file = folder / "state.pt"
    with reading(file, "the state of a run of train.py"):
        state = torch.load(file, map_location="cpu", weights_only=True)
        step, moments = state["step"], state["optimizer"]["state"]
        if type(step) is not int or step != int(folder.name):
            raise ValueError(f"step {step} in folder {folder.name}")
        check_settings(state["settings"], settings, out)
    engine.restore(weights_file(folder))
    with reading(file):
        load_moments(optimizer, moments)
    return step


def check_settings(before, now, out):
    differing = {k for k in before.keys() | now.keys() if before.get(k) != now.get(k)}
    for k in {"base", "lmm"} & differing:  # fingerprints; another dtype is no other model
        if math.isclose(before[k], now[k], rel_tol=1e-3):
            differing.remove(k)
    if differing:
        changes = [f"{k}: {before.get(k)} then, {now.get(k)} now" for k in sorted(differing)]
        raise UserError(f"--resume: not the run in {out}: {'; '.join(changes)}")


def load_moments(optimizer, moments):
    """Put AdamW's state {number of a parameter: tensors} into it; raises if it does not fit."""
    shapes = [p.shape for p in optimizer.param_groups[0]["params"]]
    if moments and set(moments) != set(range(len(shapes))):  # none before the first good step
        raise ValueError(f"moments of {len(moments)} parameters; expected {len(shapes)}")
    for i, saved in moments.items():
        found = saved["step"].shape, saved["exp_avg"].shape, saved["exp_avg_sq"].shape
        if found != ((), shapes[i], shapes[i]):
            raise ValueError(f"moments of parameter {i} do not have its shape {tuple(shapes[i])}")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


@contextmanager
def writing(out):
    """Around what writes to the folder: if that fails (a full disk, say), tell what is left."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        for unfinished in Path(out, "checkpoints").glob("*.partial"):
            shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(
            f"{out}: cannot be written ({error}); the last good checkpoint is "
            f"{latest(out) or 'none'}; make room, then --resume"
        ) from error


# ---- metrics ------------------------------------------------------------------------------------


def log(out, record):
    """Add a line to metrics.jsonl: six digits a number, null for what is not finite."""

    def short(x):
        if isinstance(x, list):
            return [short(y) for y in x]
        return x if isinstance(x, int) else float(f"{x:.6g}") if math.isfinite(x) else None

    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({name: short(x) for name, x in record.items()}) + "\n")


def read_metrics(out):
    """The records of metrics.jsonl; a last line that a killed run left unfinished is dropped."""
    file = Path(out, "metrics.jsonl")
    if not file.exists():
        return []
    records = []
    with reading(file):
        *lines, _ = file.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        with reading(f"{file}:{number}", "a line that train.py wrote"):
            record = json.loads(line)
            values = [record["step"], record["loss"], *record["loss_by_t"]]
            math.fsum(x for x in values if x is not None)  # raises unless all are numbers
            if len(values) != 2 + BINS or type(record["step"]) is not int:
                raise ValueError("not the record of a step")
        records.append(record)
    return records


class Clock:
    """Examples per second from lap to lap, and the share of the time spent waiting for data."""

    def __init__(self):
        self.start, self.waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self):
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    def lap(self, examples):
        seconds, waited = time.perf_counter() - self.start, self.waited
        self.__init__()
        return examples / seconds, waited / seconds


# ---- what a person sees -------------------------------------------------------------------------


def memory_plan(engine, args, processes):
    """What will lie in each process's memory, as text; activations are estimates."""
    frozen = sum(nbytes(x) for x in (*engine.parameters(), *engine.buffers()))
    trainable = [p for p in engine.parameters() if p.requires_grad]
    trained = sum(map(nbytes, trainable))
    frozen -= trained
    if args.shard:
        shared = sum(nbytes(p) for p in engine.mmdit.parameters() if not p.requires_grad)
        frozen -= shared - shared // processes
    patches = engine.lmm.patches
    picture = patches.max_pixels // (patches.patch * patches.merge) ** 2
    prompt = 40 + picture  # some words and one picture
    tokens = prompt + (args.size // 8 // engine.mmdit.config.patch) ** 2
    parts = "adapter" + " and LoRA" * bool(args.rank) + " (also in the LMM)" * args.lmm_lora
    activations = args.batch * activation_bytes(engine.mmdit, tokens, args.checkpointing)
    rows = [
        (frozen, "frozen weights" + ", here" * args.shard),
        (trained, f"{parts}: {sum(p.numel() for p in trainable):,} parameters"),
        (trained, "their gradients"),
        (2 * trained, "their AdamW moments"),
        (activations, f"activations (estimate): {args.batch} x {tokens} tokens, {prompt} of prompt"),
    ]  # fmt: skip
    if args.lmm_lora:
        config = engine.lmm.language_model.config
        kept = prompt * (6 * config.hidden_size + 3 * config.intermediate_size)  # of a layer
        kept *= config.num_hidden_layers * engine.mmdit.pos_embed.element_size()
        rows.append((args.batch * kept, "activations of the LMM (estimate)"))
    rows.append((sum(size for size, _ in rows), "together"))
    return "\n".join(f"{size / 1e9:9.3f} GB  {name}" for size, name in rows)


def nbytes(x):
    return x.numel() * x.element_size()


KEPT = 18  # tensors as wide as its tokens that a block of the MM-DiT keeps for the backward pass


def activation_bytes(mmdit, tokens, checkpointing):
    """What the MM-DiT keeps of one example of so many tokens for the backward pass, estimated.

    With checkpointing each block keeps its input only, and one at a time all of it.
    """
    depth = mmdit.config.depth
    one = tokens * mmdit.config.width * mmdit.pos_embed.element_size()
    return (depth + KEPT if checkpointing else depth * KEPT) * one


def mixture(pools):
    """What the microbatches are drawn from, as text."""
    weights = Counter()
    for pool in pools:
        weights[f"{pool.task} from {pool.source.name}"] += pool.weight / sum(
            p.weight for p in pools
        )
    return "\n".join(f"{100 * weight:9.1f} %   {name}" for name, weight in weights.items())


def preview(engine, examples):
    """A sheet of [(task, prompt, target)]: what goes in, what the engine draws, what is right."""
    rows = []
    for (task, size), group in groupby(examples, lambda example: (example[0], example[2].size)):
        group = list(group)
        drawn = engine.generate([prompt for _, prompt, _ in group], size=size, task=task)
        for example, image in zip(group, drawn):
            (*inputs, target), text = prompt_row(*example)
            rows.append(([*inputs, image, target], text))
    return sheet(rows, height=128)


def write_pictures(out, step, preview):
    write_png(out / f"samples-{step:06d}.png", preview)
    write_png(out / "loss.png", loss_curve(out))


def loss_curve(out):
    """The loss over the steps, and that of each fifth of t, averaged over hundredths of the run."""
    records = read_metrics(out)
    window, lines = max(1, len(records) // 100), {}

    def mean(values):
        known = [x for x in values if x is not None and math.isfinite(x)]
        return sum(known) / len(known) if known else None

    for k in range(BINS + 1):
        values = [r["loss_by_t"][k - 1] if k else r["loss"] for r in records]
        name = f"t {(k - 1) / BINS:.1f} - {k / BINS:.1f}" if k else "loss"
        lines[name] = [mean(values[i : i + window]) for i in range(0, len(values), window)]
    return plot(lines, f"{len(records)} steps")


COLORS = ("black", "#b2182b", "#ef8a62", "#999999", "#67a9cf", "#2166ac")


def plot(lines, below, limits=None, width=800, height=400):
    """Lines {name: [y or None, ...]}, evenly spaced in x, the first one thick, as a picture."""
    known = limits or [y for line in lines.values() for y in line if y is not None] or [0]
    low, high = min(known), max(known)
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    for k, (name, line) in reversed(list(enumerate(lines.items()))):
        x = [50 + (width - 170) * i / max(1, len(line) - 1) for i in range(len(line))]
        points = [
            (right, 20 + (height - 60) * (high - y) / (high - low or 1))
            for right, y in zip(x, line)
            if y is not None
        ]
        draw.line(points, fill=COLORS[k], width=3 if k == 0 else 1)
        draw.text((width - 110, 20 + 16 * k), name, fill=COLORS[k])
    draw.text((4, 14), f"{high:.3f}", fill="black")
    draw.text((4, height - 46), f"{low:.3f}", fill="black")
    draw.text((50, height - 24), below, fill="black")
    return page
