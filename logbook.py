"""What a person sees of a run, and what it leaves behind in its folder and finds there again.

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
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors import SafetensorError

from data import example_row, sheet

BINS = 5  # of t, for the loss


# ---- checkpoints --------------------------------------------------------------------------------


def save(engine, optimizer, out, step, facts, keep=2):
    """Write checkpoints/STEP/ whole or not at all, publish it; keep the last few.

    A folder without suffix is always complete: it is written and removed under another name.
    """
    folder = out / "checkpoints" / f"{step:06d}"
    partial, weights = folder.with_suffix(".partial"), f"stage{facts['stage']}.safetensors"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    engine.save(partial / weights, **{k: facts[k] for k in ("stage", "rank", "alpha")}, step=step)
    state = {"step": step, "facts": facts, "optimizer": optimizer.state_dict()}
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


def publish(out):
    """Copy the newest checkpoint's stageN.safetensors to the run's own folder."""
    (file,) = latest(out).glob("*.safetensors")
    shutil.copy(file, out / "newest.partial")
    os.replace(out / "newest.partial", out / file.name)


def checkpoints(out):
    """The complete checkpoints of a run, oldest first."""
    complete = [f for f in Path(out, "checkpoints").glob("*") if f.name.isdigit()]
    return sorted(complete, key=lambda folder: int(folder.name))


def latest(out):
    return (checkpoints(out) or [None])[-1]


def restore(folder, engine, optimizer, facts):
    """Put a checkpoint into engine and optimizer; the step to go on with. Says what differs."""
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    then = state["facts"]
    differing = {k for k in then.keys() | facts.keys() if then.get(k) != facts.get(k)}
    for k in {"base", "lmm"} & differing:  # fingerprints; another dtype is no other model
        if math.isclose(then[k], facts[k], rel_tol=1e-3):
            differing.remove(k)
    if differing:
        changes = [f"{k}: {then.get(k)} then, {facts.get(k)} now" for k in sorted(differing)]
        raise ValueError(f"--resume: not the run in {folder.parent.parent}: {'; '.join(changes)}")
    (file,) = folder.glob("*.safetensors")
    engine.restore(file)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


@contextmanager
def writing(out):
    """Say what is left where something cannot be written, on a full disk for one."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        Path(out, "newest.partial").unlink(missing_ok=True)
        for unfinished in Path(out, "checkpoints").glob("*.partial"):
            shutil.rmtree(unfinished, ignore_errors=True)
        raise ValueError(
            f"{out}: cannot be written ({error}); the last good checkpoint is "
            f"{latest(out) or 'none'}; make room, then --resume"
        ) from None


# ---- metrics ------------------------------------------------------------------------------------


def log(out, record):
    """Add a line to metrics.jsonl: six digits a number, null for what is not finite."""

    def short(x):
        if isinstance(x, list):
            return [short(y) for y in x]
        return x if isinstance(x, int) else float(f"{x:.6g}") if math.isfinite(x) else None

    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps({name: short(x) for name, x in record.items()}) + "\n")


def read_metrics(out):
    records = []
    with suppress(FileNotFoundError), open(out / "metrics.jsonl") as file:
        for line in file:
            with suppress(ValueError):  # the last line of a killed run
                records.append(json.loads(line))
    return records


def keep_metrics(out, steps):
    """Forget what was logged after the step that a resumed run goes on from."""
    kept = [json.dumps(r) + "\n" for r in read_metrics(out) if r["step"] <= steps]
    (out / "metrics.partial").write_text("".join(kept))
    os.replace(out / "metrics.partial", out / "metrics.jsonl")


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
        now = time.perf_counter()
        seconds, waited = now - self.start, self.waited
        self.start, self.waited = now, 0.0
        return examples / seconds, waited / seconds


# ---- what a person sees -------------------------------------------------------------------------


def memory_plan(engine, args, world):
    """What will lie in each process's memory, as text; activations are estimates."""
    frozen = sum(nbytes(x) for x in (*engine.parameters(), *engine.buffers()))
    learning = [p for p in engine.parameters() if p.requires_grad]
    trained = sum(map(nbytes, learning))
    frozen -= trained
    if args.shard:
        blocks = sum(nbytes(p) for p in engine.mmdit.parameters() if not p.requires_grad)
        frozen -= blocks - blocks // world
    patches = engine.patches
    picture = patches.max_pixels // (patches.patch * patches.merge) ** 2
    prompt = 40 + picture  # some words and one picture
    tokens = prompt + (args.size // 8 // engine.mmdit.config.patch) ** 2
    what = "adapter" + " and LoRA" * bool(args.rank) + " (also in the LMM)" * args.lmm_lora
    rows = [
        (frozen, "frozen weights, here" if args.shard else "frozen weights"),
        (trained, f"{what}: {sum(p.numel() for p in learning):,} parameters"),
        (trained, "their gradients"),
        (2 * trained, "their AdamW moments"),
        (args.batch * activation_bytes(engine, tokens, args.checkpointing),
         f"activations: {args.batch} x {tokens} tokens, {prompt} of them prompt (estimate)"),
    ]  # fmt: skip
    if args.lmm_lora:
        config = engine.lmm.config.text_config
        kept = prompt * (6 * config.hidden_size + 3 * config.intermediate_size)  # of a layer
        kept *= config.num_hidden_layers * engine.mmdit.pos_embed.element_size()
        rows.append((args.batch * kept, "activations of the LMM (estimate)"))
    rows.append((sum(size for size, _ in rows), "together"))
    return "\n".join(f"{size / 1e9:9.3f} GB  {name}" for size, name in rows)


def nbytes(x):
    return x.numel() * x.element_size()


KEPT = 18  # tensors as wide as its tokens that a block of the MM-DiT keeps for the backward pass


def activation_bytes(engine, tokens, checkpointing):
    """What the MM-DiT keeps of one example of so many tokens for the backward pass, estimated.

    With checkpointing each block keeps its input only, and one at a time all of it.
    """
    config = engine.mmdit.config
    one = tokens * config.width * engine.mmdit.pos_embed.element_size()
    return (config.depth + KEPT if checkpointing else config.depth * KEPT) * one


def samples(engine, shown):
    """What goes in, what the engine makes of it, and what should have come out, row by row."""
    rows = []
    for (task, size), group in groupby(shown, lambda example: (example[0], example[2].size)):
        group = list(group)
        results = engine.generate([prompt for _, prompt, _ in group], size=size, task=task)
        for example, result in zip(group, results):
            (*inputs, target), text = example_row(*example)
            rows.append(([*inputs, result, target], text))
    return sheet(rows)


def mixture(data):
    """What the microbatches are drawn from, as text."""
    weights = {}
    for pool in data.pools:
        name = f"{pool.task} from {pool.source.file if pool.source else 'rendered scenes'}"
        weights[name] = weights.get(name, 0) + pool.weight
    total = sum(weights.values())
    return "\n".join(f"{100 * weight / total:9.1f} %   {name}" for name, weight in weights.items())


def loss_curve(out):
    """The loss over the steps, and that of each fifth of t, averaged over hundredths of the run."""
    records = read_metrics(out)
    window = max(1, len(records) // 100)
    lines = {}
    for k in range(BINS + 1):
        values = [r["loss_by_t"][k - 1] if k else r["loss"] for r in records]
        parts = [values[i : i + window] for i in range(0, len(values), window)]
        parts = [[x for x in part if x is not None and math.isfinite(x)] for part in parts]
        name = f"t {(k - 1) / BINS:.1f} - {k / BINS:.1f}" if k else "loss"
        lines[name] = [sum(part) / len(part) if part else None for part in parts]
    return plot(lines, f"{len(records)} steps")


COLORS = ("black", "#b2182b", "#ef8a62", "#999999", "#67a9cf", "#2166ac")


def plot(lines, below, limits=None, width=800, height=400):
    """Lines {name: [y or None, ...]}, evenly spaced in x, the first one thick, as a picture."""
    known = limits or [y for line in lines.values() for y in line if y is not None] or [0]
    low, high = min(known), max(known)
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    for k, (name, line) in reversed(list(enumerate(lines.items()))):
        points = [
            (
                50 + (width - 170) * i / max(1, len(line) - 1),
                20 + (height - 60) * (high - y) / (high - low or 1),
            )
            for i, y in enumerate(line)
            if y is not None
        ]
        draw.line(points, fill=COLORS[k], width=3 if k == 0 else 1)
        draw.text((width - 110, 20 + 16 * k), name, fill=COLORS[k])
    draw.text((4, 14), f"{high:.3f}", fill="black")
    draw.text((4, height - 46), f"{low:.3f}", fill="black")
    draw.text((50, height - 24), below, fill="black")
    return page
