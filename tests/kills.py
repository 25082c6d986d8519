"""Kill trainings at random moments, resume them, and compare their weights with an unbroken run's.

    python -m tests.kills              # 30 kills of each training, in minutes

Each training is short, and is started with --resume until it ends; then it begins again, until there
were enough kills. Once, a limit on the size of files stands for a disk that fills during a save.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from support.cli import one_line_errors

import torch

import train
from support import runs
from support.files import markdown_table, write_json
from unialignment import train as unialignment_train

try:
    import resource
except ImportError:  # Windows: no disk fills
    resource = None

STEPS = 8
OPTIONS = (
    f"--steps {STEPS} --batch 2 --warmup 1 --save-every 2 --sample-every 0 --device cpu --resume"
)
TRAININGS = {  # program, options, weights
    "stage 1": (train.main, ["--stage", "1"], "stage1.safetensors"),
    "stage 2": (train.main, ["--stage", "2"], "stage2.safetensors"),
    "UniAlignment": (
        unialignment_train.main, [], "transformer/diffusion_pytorch_model.safetensors"
    ),
}  # fmt: skip
METHODS = multiprocessing.get_all_start_methods()
PROCESSES = multiprocessing.get_context("fork" if "fork" in METHODS else "spawn")


def enter(name, out, limit):
    """Train in this process; limit: the largest size of a file, in bytes, or None."""
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    if limit:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
    main, more, _ = TRAININGS[name]
    with one_line_errors():
        main([*OPTIONS.split(), *more, "--out", str(out)])


def attempt(name, out, seconds=None, limit=None):
    """Train until the end, or for some seconds: -> was it killed? Raises RuntimeError if it fails."""
    process = PROCESSES.Process(target=enter, args=(name, out, limit))
    process.start()
    process.join(seconds)
    killed = process.is_alive()
    process.kill()
    process.join()
    if process.exitcode != (2 if limit else 0) and not killed:
        raise RuntimeError(
            f"{name}: exit code {process.exitcode}\n{Path(f'{out}.log').read_text()}"
        )
    return killed


def trial(name, kills, folder, rng):
    """Kill one training so many times: its row of the table."""
    unbroken, out, file = folder / "unbroken", folder / "broken", TRAININGS[name][-1]
    start = time.perf_counter()
    attempt(name, unbroken)
    seconds, weights = time.perf_counter() - start, (unbroken / file).read_bytes()
    row = {"kills": 0, "resumptions": 0, "full disks": 0, "whole runs": 0, "equal": True}
    while row["kills"] < kills:
        shutil.rmtree(out, ignore_errors=True)
        starts, killed = 0, True
        while killed:
            if resource and starts == 1 and not row["full disks"]:
                attempt(name, out, limit=rng.randrange(len(weights) // 2, len(weights)))
                row["full disks"] += 1
            last = row["kills"] == kills
            killed = attempt(name, out, None if last else rng.uniform(0, seconds))
            row["kills"] += killed
            row["resumptions"] += starts > 0
            starts += 1
        row["whole runs"] += 1
        steps = [record["step"] for record in runs.read_metrics(out)]
        left = [*out.rglob("*.partial*"), *out.rglob("*.old"), *out.rglob(runs.LOCK)]
        same = (out / file).read_bytes() == weights and steps == [*range(1, STEPS + 1)]
        row["equal"] &= same and not left
    return row


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="of each training; default: 30")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=Path("docs/results/kills.json"))
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    rng, rows = random.Random(args.seed), {}
    for name in TRAININGS:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = trial(name, args.kills, Path(folder), rng)
    write_json(args.out, rows)
    names = ["training", *rows["stage 1"]]
    print(markdown_table(names, [[name, *row.values()] for name, row in rows.items()]))
    return not all(row["equal"] for row in rows.values())


if __name__ == "__main__":
    sys.exit(main())
