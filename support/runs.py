"""The folder of a training run: checkpoints, metrics, pictures.

checkpoints/000250/     the checkpoint itself, and state.pt: optimizer, step, settings
stage1.safetensors      the newest checkpoint under its own name (a file or a folder)
metrics.jsonl           one line for each step
loss.png, samples-*.png
"""

import errno
import json
import math
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from support.cli import UserError, reading

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from safetensors import SafetensorError

from support.files import whole, write_png, write_text

BINS = 5  # of t, for the loss
STATE, LOCK = "state.pt", ".lock"
FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG  # of a disk, a quota, a file


@contextmanager
def locked(out, rank=0):
    """Lock the folder of a run, in rank 0; UserError if another process holds the lock.

    The system releases it when the process ends, however it ends. An empty folder is removed.
    """
    if rank:
        yield
        return
    out = Path(out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        file = (out / LOCK).open("a")
    with file:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # workers do not inherit it
            taken = os.fstat(file.fileno()).st_nlink == 0  # by a run that has just removed the file
        except OSError as error:
            taken = error.errno in (errno.EACCES, errno.EAGAIN)
            print(f"{out}: cannot be locked ({error}): start no other run there", file=sys.stderr)
        if taken:
            raise UserError(f"{out}: another training writes to this folder; choose another --out")
        remove_leftovers(out)
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes no open file
                (out / LOCK).unlink()
                out.rmdir()


def remove_leftovers(out):
    """Remove what a killed run left: unfinished and outdated checkpoints, partial files."""
    names = "checkpoints/*.partial", "checkpoints/*.old", ".*.partial*", "*/.*.partial*"
    for leftover in [file for name in names for file in out.glob(name)]:
        with suppress(OSError):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def save(engine, optimizer, out, step, settings, *, name, keep=2):
    """Write checkpoints/STEP/ whole or not at all, then delete all but the newest `keep`.

    name: the file or folder that the engine writes into it. Folders with a suffix are incomplete.
    """
    learned = optimizer.param_groups[0]["params"]
    require_finite(learned, f"step {step}: NaN or infinity in the weights; {advice(out)}")
    folder = out / "checkpoints" / f"{step:06d}"
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = {key: settings[key] for key in ("stage", "rank", "alpha") if key in settings}
    engine.save(partial / name, **config, step=step)
    state = {"step": step, "settings": settings, "optimizer": optimizer.state_dict()}
    torch.save(state, partial / STATE)
    for written in filter(Path.is_file, partial.rglob("*")):
        with written.open("rb+") as file:  # Windows syncs only what is open for writing
            os.fsync(file.fileno())
    if not folder.exists():
        os.replace(partial, folder)
    publish(out)
    for old in checkpoints(out)[:-keep]:
        os.replace(old, old.with_suffix(".old"))
    remove_leftovers(out)


def open_folder(out, step, engine=None):
    """Make the folder of a run, or reset it to the step at which the run resumes."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if not step and engine:
            engine.save_frozen(out)
        records = [json.dumps(record) for record in read_metrics(out) if record["step"] <= step]
        write_text(out / "metrics.jsonl", "".join(f"{line}\n" for line in records))
        if step:
            publish(out)  # again, because the run may have been killed before it did


def publish(out):
    """Copy the newest checkpoint, a file or a folder, to the run's own folder."""
    newest = weights_of(latest(out))
    for file in sorted(newest.glob("*")) if newest.is_dir() else [newest]:
        copy = out / file.relative_to(newest.parent)
        copy.parent.mkdir(exist_ok=True)
        with whole(copy) as partial:
            shutil.copy(file, partial)


def weights_of(folder):
    """The file or folder in a checkpoint that holds the weights, not the training state."""
    found = [file for file in folder.iterdir() if file.name != STATE]
    if len(found) != 1:
        names = ", ".join(sorted(file.name for file in found)) or "nothing"
        raise UserError(f"{folder}: expected {STATE} and one file or folder, found {names}")
    return found[0]


def checkpoints(out):
    """The complete checkpoints of a run, oldest first."""
    complete = [f for f in Path(out, "checkpoints").glob("*") if f.is_dir() and f.name.isdecimal()]
    return sorted(complete, key=lambda folder: int(folder.name))


def latest(out):
    return (checkpoints(out) or [None])[-1]


def advice(out):
    if not (folder := latest(out)):
        return "no checkpoint was saved yet"
    return f"the last good checkpoint is {folder}, from which --resume continues"


def restore(out, engine, optimizer, settings):
    """Load the newest checkpoint, if any, into engine and optimizer. Returns its step, or 0."""
    if not (folder := latest(out)):
        require_finite(engine.parameters(), "NaN or infinity in the weights to start from")
        return 0
    file = folder / STATE
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
        if not all(x.isfinite().all() for saved in moments.values() for x in saved.values()):
            raise ValueError("moments that are NaN or infinite")
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    engine.restore(weights := weights_of(folder))
    older = "delete its folder to go on from an older checkpoint"
    require_finite(engine.parameters(), f"{weights}: holds NaN or infinity; {older}")
    return step


def require_finite(weights, message):
    """Raise UserError with a message if a weight is NaN or infinite."""
    if not torch.stack([x.isfinite().all() for x in weights]).all():
        raise UserError(message)


def check_settings(before, now, out):
    def same(k):
        a, b = before.get(k), now.get(k)  # fingerprints, which rounding changes a little
        return a == b or (k in ("base", "lmm", "t5") and math.isclose(a, b, rel_tol=1e-3))

    if differing := sorted(k for k in now if not same(k)):
        changes = "; ".join(f"{k}: {before.get(k)} then, {now.get(k)} now" for k in differing)
        raise UserError(f"--resume: not the run in {out}: {changes}")


@contextmanager
def writing(out):
    """Run code that writes to the folder. If it fails, the UserError names the last checkpoint."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # Rust gives the number of an errno, torch only this phrase
        numbers = "|".join(map(str, FULL))
        said = re.search(rf"os error ({numbers})\b|failed writing file", str(error))
        room = ": make room" if said or getattr(error, "errno", None) in FULL else ""
        raise UserError(f"{out}: cannot be written ({error}){room}; {advice(out)}") from error


def log(out, record):
    """Add a line to metrics.jsonl: numbers of six digits, null for what is not finite."""
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


class Meter:
    """The losses of one step: their mean, and their means in each fifth of t."""

    def __init__(self, accumulate, world):
        self.accumulate, self.world = accumulate, world
        self.mean, self.by_t = 0.0, torch.zeros(2, BINS)  # sums of losses and their numbers

    def add(self, losses, t):
        """Add a microbatch: losses and t (B,)."""
        losses = losses.detach().cpu()
        self.by_t.index_add_(1, (t * BINS).long(), torch.stack([losses, torch.ones(len(t))]))
        self.mean += losses.mean().item() / self.accumulate / self.world

    def total(self, device, *counts):
        """Over all processes: the mean loss, the mean losses by t (NaN where none), sums of counts."""
        sums = torch.tensor([*self.by_t.flatten(), self.mean, *counts])
        if self.world > 1:
            dist.all_reduce(sums := sums.to(device))
        *by_t, mean = sums[: 2 * BINS + 1].tolist()
        by_t = [x / n if n else math.nan for x, n in zip(by_t, by_t[BINS:])]
        return mean, by_t, *sums[2 * BINS + 1 :].tolist()


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


SAVED = 18  # tensors of (tokens, width) that a block of the MM-DiT saves for the backward pass


def memory_plan(engine, args, processes):
    """Describe the memory that each process will need; activations are an estimate."""
    trainable = [p for p in engine.parameters() if p.requires_grad]
    trained = sum(p.nbytes for p in trainable)
    frozen = sum(x.nbytes for x in (*engine.parameters(), *engine.buffers())) - trained
    if args.shard:
        shared = sum(p.nbytes for p in engine.mmdit.parameters() if not p.requires_grad)
        frozen -= shared - shared // processes
    lmm, patches = engine.lmm.language_model, engine.lmm.patches
    picture = (args.size // 8 // engine.mmdit.config.patch) ** 2
    prompt = 40 + patches.max_pixels // (patches.patch * patches.merge) ** 2  # and one picture
    tokens = engine.tokens_of_example(picture, prompt)
    activations = activation_bytes(engine.mmdit, tokens, args.checkpointing)
    if any(p.requires_grad for p in lmm.parameters()):
        layer = prompt * (6 * lmm.config.hidden_size + 3 * lmm.config.intermediate_size)
        size = engine.mmdit.pos_embed.element_size()
        activations += lmm.config.num_hidden_layers * layer * size
    rows = [
        (frozen, "frozen weights" + ", here" * args.shard),
        (4 * trained, f"{sum(p.numel() for p in trainable):,} trainable parameters, with AdamW"),
        (args.batch * activations, f"activations (estimate): {args.batch} x {tokens} tokens"),
    ]
    rows.append((sum(size for size, _ in rows), "together"))
    return "\n".join(f"{size / 1e9:9.3f} GB  {name}" for size, name in rows)


def activation_bytes(mmdit, tokens, checkpointing):
    """What the MM-DiT saves of one example of so many tokens for the backward pass, estimated."""
    depth, size = mmdit.config.depth, mmdit.pos_embed.element_size()
    return (depth + SAVED if checkpointing else depth * SAVED) * tokens * mmdit.config.width * size


def write_pictures(out, step, preview):
    write_png(out / f"samples-{step:06d}.png", preview)
    write_png(out / "loss.png", loss_curve(out))


def loss_curve(out):
    """Plot the loss (thick line) and the loss in each fifth of t, as means over 1 % of the run."""
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
