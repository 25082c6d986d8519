"""The options that the training programs of both systems share, and their defaults."""

import argparse
import re
from functools import partial
from pathlib import Path

from support.cli import UserError, number, whole_number

from data import FIELDS
from dream_engine import LMM, SD3
from support import runs
from support.fast import usable_device
from support.processes import rank_and_world

positive = partial(number, 0, exclude_low=True)  # a type for argparse: above 0, up to a limit


def shares(text, names=FIELDS, example="t2i=1,edit=2, the tasks"):
    """'t2i=1,edit=2' -> {task: number}."""
    parts = [re.fullmatch(r"(\w+)=(\d{1,6}|\d{0,6}\.\d+)", part) for part in text.split(",")]
    if not all(part and part[1] in names for part in parts):
        expected = f"such as {example} being {', '.join(names)}"
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
    return {part[1]: float(part[2]) for part in parts}


def weighted_file(text):
    """'a.jsonl' or 'a.jsonl=2' -> (file, weight)."""
    file, _, weight = text.rpartition("=")
    if not file or not re.fullmatch(r"[-+.e\d]+|nan|inf", weight):  # the = is part of the name
        return text, 1.0
    return file, number(0, 1e6, exclude_low=True)(weight)


def add_options(parser):
    """Add the options that both training programs share."""
    add = parser.add_argument
    # fmt: off
    add("--data", type=weighted_file, action="append", default=[], metavar="FILE[=WEIGHT]", help="JSONL manifest, repeatable; WEIGHT divides the share of a task among manifests")
    add("--tasks", type=shares, help="shares of the microbatches, such as t2i=1,edit=2")
    add("--null", type=number(0, 1), default=0.1, help="share of null prompts; default: 0.1")
    add("--steps", type=whole_number(1, 10**7), help="default: a number that suits the miniature")
    add("--batch", type=whole_number(1, 4096), default=16, help="examples in a microbatch")
    add("--accumulate", type=whole_number(1, 10**4), default=1, help="microbatches in a step, for each process")
    add("--lr", type=positive(10), help="highest learning rate; default: depends on model and training")
    add("--warmup", type=whole_number(1), default=100, help="first steps, with a rising rate")
    add("--decay", type=positive(1), default=0.3, help="final share of steps, with a falling rate")
    add("--clip", type=positive(1e9), default=1.0, help="largest norm of the gradient; default: 1")
    add("--size", type=whole_number(16, 8192), help="side in pixels; default: 512, or the model's largest")
    add("--buckets", action="store_true", help="keep aspect ratios, at about the area of --size")
    add("--checkpointing", action=argparse.BooleanOptionalAction, help="save memory by computing each block twice; default: on a GPU")
    add("--workers", type=whole_number(0, 256), help="processes that read data; default: 4 with a GPU, else 0")
    add("--seed", type=whole_number(0, 2**32), default=0)
    add("--save-every", type=whole_number(1), default=250, help="steps between checkpoints")
    add("--keep", type=whole_number(1), default=2, help="number of checkpoints to keep")
    add("--sample-every", type=whole_number(0), default=500, help="steps between pictures; 0: none")
    add("--out", help="folder of the run; default: runs/ and the name of the training")
    add("--resume", action="store_true", help="continue the run in --out, if there is one")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("--sd3", type=Path, default=SD3, help="SD3 / SD3.5: single file or diffusers folder")
    add("--lmm", type=Path, default=LMM, help="Qwen2-VL: Hugging Face folder")
    # fmt: on


def refuse(*faults):
    """Raise UserError with the message of the first (condition, message) that holds."""
    for is_so, message in faults:
        if is_so:
            raise UserError(message)


def complete(args, recipe, tasks, miniature, rate):
    """Fill in defaults that depend on other options; UserError if options contradict each other.

    tasks: all that the system can learn. rate: default of --lr for all models but the miniature.
    """
    args.steps = args.steps or recipe.steps
    args.out = args.out or f"runs/{recipe.name}"
    args.lr = args.lr or (recipe.rate if miniature else rate)
    wanted, total = args.tasks or {}, args.steps * args.accumulate * rank_and_world()[1]
    learns = f"--tasks: {recipe.name} learns {', '.join(sorted(tasks))}"
    weights = [Path(args.out, recipe.checkpoint), *sorted(Path(args.out).glob("*.safetensors"))]
    held = not runs.latest(args.out) and next(filter(Path.exists, weights), None)
    refuse(
        (args.tasks and not any(wanted.values()), "--tasks: expected such as t2i=1,edit=2"),
        (wanted.keys() - tasks, learns),
        (not miniature and not args.data, "--data is missing: only the miniature can do without"),
        (total > 10**8, "--steps times --accumulate: over 100 million microbatches in all"),
        (runs.latest(args.out) and not args.resume, f"{args.out} holds a run: --resume continues"),
        (held, f"--out holds {held}, and no checkpoint to go on from; choose another folder"),
    )
    on_gpu = usable_device(args.device).type == "cuda"
    args.workers = (4 if on_gpu else 0) if args.workers is None else args.workers
    args.checkpointing = on_gpu if args.checkpointing is None else args.checkpointing
    return args
