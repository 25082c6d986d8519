"""The folder of a training run: checkpoints, metrics, pictures.

checkpoints/000250/     stageN.safetensors, and state.pt: optimizer, step, settings
stageN.safetensors      the newest, for `sample.py --checkpoint`
transformer/            instead of it, of UniAlignment, whose frozen parts lie beside
metrics.jsonl           a line a step
loss.png, samples-*.png
"""

import json
import math
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors import SafetensorError

from support.cli import UserError, reading
from support.files import prompt_row, sheet, whole, write_png, write_text

BINS = 5  # of t, for the loss


def save(engine, optimizer, out, step, settings, keep=2):
    """Write checkpoints/STEP/ whole or not at all: without a suffix it is complete. Keep a few."""
    folder = out / "checkpoints" / f"{step:06d}"
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = {name: settings[name] for name in ("stage", "rank", "alpha")}
    uni, name = settings["stage"] == "unialignment", f"stage{settings['stage']}.safetensors"
    engine.save(partial / ("transformer" if uni else name), **config, step=step)
    state = {"step": step, "settings": settings, "optimizer": optimizer.state_dict()}
    torch.save(state, partial / "state.pt")
    for written in filter(Path.is_file, partial.rglob("*")):
        with written.open("rb") as file:
            os.fsync(file.fileno())
    if not folder.exists():
        os.replace(partial, folder)
    publish(out)
    for old in checkpoints(out)[:-keep]:
        os.replace(old, old.with_suffix(".old"))
    for leftover in (*folder.parent.glob("*.partial"), *folder.parent.glob("*.old")):
        shutil.rmtree(leftover, ignore_errors=True)


def open_folder(out, step, engine=None):
    """Make the folder of a run, or put it in the state of the step that the run goes on from."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if not step and hasattr(engine, "save_frozen"):
            engine.save_frozen(out)
        kept = [json.dumps(record) for record in read_metrics(out) if record["step"] <= step]
        write_text(out / "metrics.jsonl", "".join(f"{line}\n" for line in kept))
        if step:
            publish(out)  # again: the run may have been killed before it could


def publish(out):
    """Copy the newest checkpoint's stageN.safetensors or transformer/ to the run's own folder."""
    newest = weights_file(latest(out))
    for file in sorted(newest.glob("*")) if newest.is_dir() else [newest]:
        copy = out / file.relative_to(newest.parent)
        copy.parent.mkdir(exist_ok=True)
        with whole(copy) as partial:
            shutil.copy(file, partial)


def weights_file(folder):
    """The one stageN.safetensors of a checkpoint, or its transformer/."""
    files = [*folder.glob("stage?.safetensors"), *folder.glob("transformer")]
    if len(files) != 1:
        raise UserError(f"{folder}: holds {len(files)} files stageN.safetensors; expected one")
    return files[0]


def checkpoints(out):
    """The complete checkpoints of a run, oldest first."""
    complete = [f for f in Path(out, "checkpoints").glob("*") if f.is_dir() and f.name.isdecimal()]
    return sorted(complete, key=lambda folder: int(folder.name))


def latest(out):
    return (checkpoints(out) or [None])[-1]


def advice(out):
    return f"the last good checkpoint is {latest(out) or 'none'}, from which --resume goes on"


def restore(out, engine, optimizer, settings):
    """Put the newest checkpoint, if any, into engine and optimizer; returns its step, or 0."""
    if not (folder := latest(out)):
        return 0
    file = folder / "state.pt"
    shapes = [tuple(p.shape) for p in optimizer.param_groups[0]["params"]]
    expected = {i: {"step": (), "exp_avg": x, "exp_avg_sq": x} for i, x in enumerate(shapes)}
    with reading(file, "the state of a run of train.py"):
        state = torch.load(file, map_location="cpu", weights_only=True)
        step, moments = state["step"], state["optimizer"]["state"]
        if type(step) is not int or step != int(folder.name):
            raise ValueError(f"step {step} in folder {folder.name}")
        check_settings(state["settings"], settings, out)
        found = {i: {k: tuple(x.shape) for k, x in saved.items()} for i, saved in moments.items()}
        if moments and found != expected:  # none before the first good step
            raise ValueError("moments that are not those of these parameters")
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    engine.restore(weights_file(folder))
    return step


def check_settings(before, now, out):
    def same(k):
        a, b = before.get(k), now.get(k)  # fingerprints: another dtype is no other model
        return a == b or (k in ("base", "lmm", "t5") and math.isclose(a, b, rel_tol=1e-3))

    if differing := sorted(k for k in before.keys() | now.keys() if not same(k)):
        changes = "; ".join(f"{k}: {before.get(k)} then, {now.get(k)} now" for k in differing)
        raise UserError(f"--resume: not the run in {out}: {changes}")


@contextmanager
def writing(out):
    """Around what writes to the folder: if that fails (a full disk, say), tell what is left."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        for unfinished in Path(out, "checkpoints").glob("*.partial"):
            shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"{out}: cannot be written ({error}): make room; {advice(out)}") from error


# ---- metrics ------------------------------------------------------------------------------------


def log(out, record):
    """Add a line to metrics.jsonl: six digits a number, null for what is not finite."""
    rules = {"parse_float": lambda x: float(f"{float(x):.6g}"), "parse_constant": lambda _: None}
    record = json.loads(json.dumps(record), **rules)
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


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
            values = [record["loss"], *record["loss_by_t"]]
            finite = all(x is None or math.isfinite(x) for x in values)  # raises unless numbers
            if not finite or len(values) != 1 + BINS or type(record["step"]) is not int:
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
        now = time.perf_counter()
        seconds, waited = now - self.start, self.waited
        self.start, self.waited = now, 0.0
        return examples / seconds, waited / seconds


# ---- what a person sees -------------------------------------------------------------------------

KEPT = 18  # tensors as wide as its tokens that a block of the MM-DiT keeps for the backward pass


def memory_plan(engine, args, processes):
    """What will lie in each process's memory, as text; activations are an estimate."""
    learning = [p for p in engine.parameters() if p.requires_grad]
    trained = sum(p.nbytes for p in learning)
    frozen = sum(x.nbytes for x in (*engine.parameters(), *engine.buffers())) - trained
    if args.shard:
        shared = sum(p.nbytes for p in engine.mmdit.parameters() if not p.requires_grad)
        frozen -= shared - shared // processes
    image, patches = (args.size // 8 // engine.mmdit.config.patch) ** 2, engine.lmm.patches
    prompt = 40 + patches.max_pixels // (patches.patch * patches.merge) ** 2  # and one picture
    uni = args.stage == "unialignment"  # both passes of an edit
    tokens = 3 * image + 2 * engine.sampling.slots if uni else image + prompt
    activations = activation_bytes(engine.mmdit, tokens, args.checkpointing)
    if args.lmm_lora:
        lmm = engine.lmm.language_model.config
        kept = lmm.num_hidden_layers * (6 * lmm.hidden_size + 3 * lmm.intermediate_size)
        activations += prompt * kept * engine.mmdit.pos_embed.element_size()
    rows = [
        (frozen, "frozen weights" + ", here" * args.shard),
        (4 * trained, f"{sum(p.numel() for p in learning):,} parameters that learn, with AdamW"),
        (args.batch * activations, f"activations (estimate): {args.batch} x {tokens} tokens"),
    ]
    rows.append((sum(size for size, _ in rows), "together"))
    return "\n".join(f"{size / 1e9:9.3f} GB  {name}" for size, name in rows)


def activation_bytes(mmdit, tokens, checkpointing):
    """What the MM-DiT keeps of one example of so many tokens for the backward pass, estimated."""
    depth = mmdit.config.depth
    one = tokens * mmdit.config.width * mmdit.pos_embed.element_size()
    return (depth + KEPT if checkpointing else depth * KEPT) * one


def preview(engine, examples):
    """A sheet: what goes in, what the engine draws, what is right; and what UniAlignment reads there."""
    rows = []
    for task, prompt, target, *text in examples:
        options = {} if text else {"task": task}
        drawn = engine.generate([prompt], size=target.size, **options) if prompt else []
        question, right = text or (None, None)
        (*inputs, target), words = prompt_row(task, prompt or [question], target)
        if text:
            (read,) = engine.answer([target], question and [question])
            words += f" / read: {read} / right: {right}"
        rows.append(([*inputs, *drawn, target], words))
    return sheet(rows, height=128)


def write_pictures(out, step, preview):
    write_png(out / f"samples-{step:06d}.png", preview)
    write_png(out / "loss.png", loss_curve(out))


def loss_curve(out):
    """The loss over the steps, thick, and that of each fifth of t, averaged over hundredths of the run."""
    records = [[r["loss"], *r["loss_by_t"]] for r in read_metrics(out)]
    values = torch.tensor([[math.nan if x is None else x for x in row] for row in records])
    means = torch.stack([part.nanmean(0) for part in values.split(max(1, len(values) // 100))])
    known = means[~means.isnan()].tolist() or [0]
    low, high = min(known), max(known)
    right, down = 630 / max(1, len(means) - 1), 340 / (high - low or 1)  # pixels of a mean, of 1
    names = ["loss", *(f"t {k / BINS:.1f} - {(k + 1) / BINS:.1f}" for k in range(BINS))]
    colors = ("black", "#b2182b", "#ef8a62", "#999999", "#67a9cf", "#2166ac")
    page = Image.new("RGB", (800, 400), "white")
    draw = ImageDraw.Draw(page)
    for k, line in reversed(list(enumerate(means.T.tolist()))):
        points = [(50 + right * i, 20 + down * (high - y)) for i, y in enumerate(line)]
        points = [(x, y) for x, y in points if not math.isnan(y)]
        draw.line(points, fill=colors[k], width=3 if k == 0 else 1)
        draw.text((690, 20 + 16 * k), names[k], fill=colors[k])
    draw.text((4, 14), f"{high:.3f}", fill="black")
    draw.text((4, 354), f"{low:.3f}", fill="black")
    draw.text((50, 376), f"{len(records)} steps", fill="black")
    return page
