"""Train Dream Engine in two stages (section 3.4 of its paper).

    python train.py --stage 1     # the adapter alone: text -> image and image -> image
    python train.py --stage 2     # the adapter, and LoRA on the MM-DiT: also editing and objects
    torchrun --nproc-per-node 8 train.py --stage 1 --data photos.jsonl --sd3 ... --lmm ...

Without --data the miniature trains on rendered scenes. LMM, MM-DiT and VAE stay frozen, in bf16 on a
GPU; trainable parameters are fp32. Metrics, pictures and checkpoints go to --out; --resume
continues from the last checkpoint. A microbatch and its noise depend on (seed, number) alone, so a
resumed run gets the same examples, and N processes match one process with --accumulate N.
"""

import argparse
import math
import random
import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from support.cli import Parser, UserError, number, one_line_errors, whole_number

import torch
from torch import nn
from tqdm import tqdm

from data import FIELDS, BadLines, Manifest, Microbatches, make_pools
from dream_engine import SD3, STAGE1, DreamEngine, new_adapter
from lmm import collate
from prompts import check_drawing
from support import runs
from support.files import sheet
from support.options import add_options, complete, positive, refuse
from support.processes import catch_signals, distribute, rank_and_world, together, union

PATIENCE = 5  # failed steps in a row that end the run


@dataclass(frozen=True)
class Recipe:
    """A kind of training: its tasks, and defaults that suit the miniature."""

    name: str  # of its folder in runs/
    shares: dict[str, float]  # of each task among the microbatches
    steps: int
    rate: float  # the highest learning rate
    checkpoint: str  # the file or folder that `engine.save` writes


STAGES = {
    1: Recipe("stage1", {"t2i": 1, "i2i": 1}, 6000, 2e-3, "stage1.safetensors"),
    2: Recipe(
        "stage2", {"t2i": 3, "i2i": 1, "edit": 3, "objects": 3}, 8000, 1e-3, "stage2.safetensors"
    ),
}


def train(args, recipe, engine, data, place):
    """Train all parameters of an engine that require gradients, with AdamW.

    args: see `support.options`. data: the Microbatches of the whole run. place: this process, see
    `support.processes.together`. The engine makes random draws for a microbatch (`training_noise`),
    computes losses from both (`forward`), draws a `preview`, and can `save` and `restore` itself.
    Returns the signal that stopped the run, or None.
    """
    rank, world, device = place
    out, bad_lines = Path(args.out), data.bad_lines
    learning = {name: p for name, p in engine.named_parameters() if p.requires_grad}
    params = list(learning.values())
    optimizer = torch.optim.AdamW(params, args.lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    settings = run_settings(args, engine, data.pools, world)
    start = runs.restore(out, engine, optimizer, settings)
    numbers = range(start * args.accumulate * world + rank, len(data), world)
    microbatches = data.load(numbers, args.workers)
    model = distribute(engine, learning, args.shard, world)
    if rank == 0:
        runs.open_folder(out, start, engine)
        print(runs.memory_plan(engine, args, world), *settings["examples"], sep="\n", flush=True)
        bad_lines.report()

    stopped, clock = catch_signals(), runs.Clock()
    failures, skipped, bad = 0, 0, 0.0  # steps not finite, in a row and in all; bad lines
    bar = tqdm(range(start, args.steps), recipe.name, args.steps, initial=start, disable=rank > 0)
    for step in bar:
        lr = learning_rate(step, args)
        optimizer.param_groups[0]["lr"] = lr

        # Forward and backward: the gradient of the mean loss over the examples of this step
        meter = runs.Meter(args.accumulate, world)
        for a in range(args.accumulate):
            with clock.waiting():
                micro = next(microbatches)
            draws = engine.training_noise(micro, generator(args.seed, micro.number))
            batch, target = (x.to(device, non_blocking=True) for x in (micro.batch, micro.target))
            noise = {name: x.to(device, non_blocking=True) for name, x in draws.items()}
            with nullcontext() if world == 1 or a + 1 == args.accumulate else model.no_sync():
                losses = model(batch, target, **noise, weighted=args.loss == "x0")
                (losses.mean() / args.accumulate).backward()
            meter.add(losses, draws["t"])
            bad_lines.add(micro.bad_lines)
        loss, loss_by_t, found, stopping = meter.total(device, bad_lines.found, len(stopped))
        if found > world * bad:  # a process found a bad line
            bad_lines |= union(bad_lines, world)
            bad = float(bad_lines.found)

        # Update the parameters, unless loss or gradient is not finite
        norm = nn.utils.clip_grad_norm_(params, args.clip).item()
        finite = math.isfinite(loss + norm)
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        failures, skipped = (0, skipped) if finite else (failures + 1, skipped + 1)
        if failures == PATIENCE:
            raise UserError(
                f"loss or gradient not finite in {PATIENCE} steps in a row, up to step {step + 1}; "
                f"{runs.advice(out)}; try a smaller --lr"
            )

        # Metrics, pictures, checkpoints
        examples = args.accumulate * world * args.batch
        bad_lines.check(bad, (step + 1) * examples)
        speed, waiting = clock.lap(examples)
        record = {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm, "skipped": skipped}
        record |= {"examples_per_s": speed, "waiting_for_data": waiting, "bad_lines": bad}
        bar.set_postfix(loss=f"{loss:.4f}", grad=f"{norm:.2f}", lr=f"{lr:.1e}", ex_s=f"{speed:.1f}")
        done = step + 1 == args.steps
        drawing = args.sample_every and ((step + 1) % args.sample_every == 0 or done)
        saving = ((step + 1) % args.save_every == 0 and not failures) or done or stopping
        if drawing:  # in all processes, because the MM-DiT may be sharded
            preview = sheet([engine.preview(*x) for x in preview_examples(data)], height=128)
        if rank == 0:
            with runs.writing(out):
                runs.log(out, record | engine.parts | {"loss_by_t": loss_by_t})
                if drawing:
                    runs.write_pictures(out, step + 1, preview)
                if saving:
                    name, keep = recipe.checkpoint, args.keep
                    runs.save(engine, optimizer, out, step + 1, settings, name=name, keep=keep)
        if stopping and not done:
            bar.close()
            if rank == 0:
                print(f"stopped after step {step + 1}: saved; --resume continues", file=sys.stderr)
            return (stopped or [signal.SIGTERM])[0]
    if rank == 0 and bad_lines.scanned + bad:
        print(f"{bad_lines.scanned + bad:.0f} bad lines were skipped")


def learning_rate(step, args):
    """Rise linearly for args.warmup steps; fall linearly to 0 over the last share args.decay."""
    left = (args.steps - step) / (args.decay * args.steps)
    return args.lr * min(1, (step + 1) / args.warmup, left)


def generator(seed, number):
    """The random generator of a microbatch's noise."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {number}").getrandbits(62))


def load_data(args, recipe, engine, sources, world, kind=Microbatches, **options):
    """Make the Microbatches of a run from [(source, weight)]; see `data.Manifest` for a source.

    kind: Microbatches or a subclass, which takes options. Sets args.size if --size was not given.
    """
    args.size = args.size or min(512, engine.default_size)
    tasks, progress = args.tasks or recipe.shares, tqdm if args.buckets else iter
    pools = make_pools(sources, tasks, args.size, args.buckets, progress)
    missing = {task for task, share in tasks.items() if share} - {pool.task for pool in pools}
    if not pools or (args.tasks and missing):
        raise UserError(f"--data holds no example of task {', '.join(sorted(missing))}")
    for pool in pools:
        check_drawing(1, 1, *pool.size, engine.mmdit.config.largest)
    lmm = engine.lmm  # its tokenizer goes to the worker processes, its model does not
    batches = partial(collate, tokenizer=lmm.tokenizer, config=lmm.patches, mrope=lmm.mrope)
    count = args.steps * args.accumulate * world
    data = kind(pools, batches, count, args.batch, seed=args.seed, null=args.null, **options)
    data.bad_lines = BadLines(sources)
    return data


def load_engine(args, device):
    """The Dream Engine to start from, its LoRA not merged, ready for `train`."""
    torch.manual_seed(args.seed)
    engine = DreamEngine.load(args.sd3, args.lmm, args.checkpoint, device, merge=False)
    torch.manual_seed(args.seed)  # of new parameters
    if args.checkpoint is None:
        engine.adapter = new_adapter(engine.lmm, engine.mmdit, args.layers or 2, args.mlp_dim)
    engine.start_training(args.rank, args.alpha, args.lmm_lora, args.blend)
    engine.mmdit.checkpointing = args.checkpointing
    return engine


def preview_examples(data):
    """Choose three examples of each task, which the engine draws during training."""
    pools = {pool.task: pool for pool in reversed(data.pools)}.values()
    return [data.example(pool, i, random.Random(i), []) for pool in pools for i in range(3)]


SETTINGS = "stage steps batch lr warmup decay clip seed rank alpha lmm_lora loss blend null tasks"


def run_settings(args, engine, pools, world):
    """The settings that must be the same when a run is resumed."""
    settings = {name: getattr(args, name) for name in SETTINGS.split() if hasattr(args, name)}
    settings["microbatches a step"] = args.accumulate * world
    shapes = {name: list(p.shape) for name, p in engine.named_parameters() if "adapter." in name}
    settings["adapter"] = list(shapes.values())
    settings["examples"] = [
        f"{p.task} {p.size[0]}x{p.size[1]} x {p.weight:.6g} from {p.source.identity}" for p in pools
    ]
    return settings | engine.base


def options():
    parser = Parser(
        description="Train Dream Engine: the adapter (stage 1), and LoRA too (stage 2)."
    )
    add = parser.add_argument
    # fmt: off
    add("--stage", type=stage, choices=STAGES, required=True)
    add("--checkpoint", type=Path, help="to start from, or none; default: the miniature's stage 1")
    add("--loss", choices=("velocity", "x0"), default="velocity", help="x0: the official weighting, t^2")
    add("--blend", type=number(0, 1), help="one r for all examples; default: uniform in [0, 1]")
    add("--layers", type=whole_number(1, 8), help="of a new adapter; default: 2")
    add("--mlp-dim", type=whole_number(1, 65536), help="hidden units of a new adapter; default: up to 4096")
    add("--rank", type=whole_number(0, 4096), help="of LoRA; default: 16 for the miniature, else 32; 0: none")
    add("--alpha", type=positive(1e6), help="of LoRA, whose scale is alpha / rank; default: rank")
    add("--lmm-lora", action="store_true", help="LoRA on the LMM's attention, too")
    add("--shard", action="store_true", help="spread the frozen MM-DiT over the processes")
    # fmt: on
    add_options(parser)
    return parser


def stage(text):
    """The number of a stage, for argparse."""
    if text == "unialignment":
        raise argparse.ArgumentTypeError(f"this training is now started by python -m {text}.train")
    return int(text) if text.isdecimal() else text


def parse(arguments=None):
    args = options().parse_args(arguments)
    is_first, miniature = args.stage == 1, args.sd3 == SD3
    lora = args.rank or args.alpha or args.lmm_lora
    if not is_first:
        args.rank = (16 if miniature else 32) if args.rank is None else args.rank
        args.checkpoint = args.checkpoint or (STAGE1 if miniature else None)
    start = None if args.checkpoint == Path("none") else args.checkpoint
    foreign = start and start.is_dir() and not any(start.glob("stage?.safetensors"))
    shape = args.layers or args.mlp_dim
    refuse(
        (is_first and lora, "--rank, --alpha and --lmm-lora belong to --stage 2"),
        (not is_first and not args.checkpoint, "--checkpoint is missing: give stage 1, or none"),
        (args.lmm_lora and not args.rank, "--lmm-lora needs a --rank of at least 1"),
        (start and shape, "--layers and --mlp-dim are for a new adapter: --checkpoint has its own"),
        (foreign, f"--checkpoint {start}: no run of train.py; only its own runs can continue"),
        (args.shard and rank_and_world()[1] == 1, "--shard needs several processes: use torchrun"),
    )
    args.checkpoint, args.alpha = start, args.alpha or args.rank
    learned = FIELDS.keys() - {"answer"}
    return complete(args, STAGES[args.stage], learned, miniature, rate=5e-5)


def run(args, recipe, load_engine, load_data=load_data, **rendering):
    """Train, and exit if a signal stopped the run. rendering: options of `mini.world.Examples`."""
    sources = [(Manifest(file), weight) for file, weight in args.data]
    if not sources:
        from mini.world import Examples

        sources = [(Examples(**rendering), 1)]
    BadLines(sources)  # raises UserError if over 1 % of the lines are bad
    with together(args.device, partial(runs.advice, args.out)) as place:
        engine = load_engine(args, place.device)
        data = load_data(args, recipe, engine, sources, place.world)
        with runs.locked(Path(args.out), place.rank):
            stopped = train(args, recipe, engine, data, place)
    if stopped:
        sys.exit(128 + stopped)
    result = Path(args.out, recipe.checkpoint)
    if place.rank == 0:
        print(result if result.is_file() else args.out)


def main(arguments=None):
    args = parse(arguments)
    run(args, STAGES[args.stage], load_engine)


if __name__ == "__main__":
    with one_line_errors():
        main()
