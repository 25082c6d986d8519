"""Train Dream Engine (section 3.4 of the paper).

    python train.py --stage 1     # the adapter alone: text -> image and image -> image
    python train.py --stage 2     # adapter and LoRA on the MM-DiT: also editing and objects
    torchrun --nproc-per-node 8 train.py --stage 2 --data edits.jsonl --sd3 ... --lmm ...

Without --data the miniature learns from rendered scenes. LMM, VAE and MM-DiT stay frozen, in bf16
on a GPU; adapter and LoRA learn in fp32. --out gets metrics, pictures, and checkpoints from which
--resume goes on. A microbatch and its noise depend on (seed, number) alone: a resumed run sees what
an unbroken one would have seen, and N processes what one sees that takes N times as many a step.
"""

import argparse
import math
import os
import random
import re
import signal
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import flow
from data import FIELDS, BadLines, Manifest, Microbatches, make_pools
from dream_engine import LMM, SD3, STAGE1, DreamEngine, new_adapter
from lmm import collate
from support import runs
from support.cli import Parser, UserError, number, one_line_errors, whole_number
from support.fast import usable_device

SHARES = {  # by stage: of each task among the microbatches
    1: {"t2i": 1, "i2i": 1},
    2: {"t2i": 3, "i2i": 1, "edit": 3, "objects": 3},
}
STEPS, RATES = {1: 6000, 2: 8000}, {1: 2e-3, 2: 1e-3}  # that made the miniature
PATIENCE = 5  # steps in a row that may fail


def train(args, sources):
    """Train as the options say, on examples [(source, weight)]; see `data.Manifest` for a source."""
    rank, world, device = join(args.device)
    out, bad_lines = Path(args.out), BadLines(sources)
    engine = load_engine(args, device)
    learning = engine.start_training(args.rank, args.alpha, args.lmm_lora)
    params = list(learning.values())
    optimizer = torch.optim.AdamW(params, args.lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    data = dataset(args, engine, sources, world)
    settings = run_settings(args, engine, data.pools, world)
    start = runs.restore(out, engine, optimizer, settings)
    numbers = range(start * args.accumulate * world + rank, len(data), world)
    microbatches = data.load(numbers, args.workers, pin_memory=device.type == "cuda")
    if args.only_load:
        return time_loading(microbatches, args.batch)
    model = distribute(engine, learning, args.shard, world) if world > 1 else engine
    if rank == 0:
        runs.open_folder(out, start)
        print(runs.memory_plan(engine, args, world), runs.mixture(data.pools), sep="\n", flush=True)
        bad_lines.report(bad_lines.scanned)

    stopped, clock = catch_signals(), runs.Clock()
    failures, skipped, bad = 0, 0, 0  # steps not finite in a row and in all; bad lines
    steps, title = range(start, args.steps), f"stage {args.stage}"
    bar = tqdm(steps, title, args.steps, initial=start, disable=rank > 0)
    for step in bar:
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, args)

        # This process's share of the loss and the gradient
        by_t, mean = torch.zeros(2, runs.BINS), 0.0  # losses and their number by t, mean loss
        for a in range(args.accumulate):
            with clock.waiting():
                micro = next(microbatches)
            bad_lines.add(micro.bad_lines)
            noise, t, r = draw(args, micro, engine.mmdit.config.channels)
            inputs = micro.batch, micro.target, noise, t, r
            inputs = [x.to(device, non_blocking=True) for x in inputs]
            with nullcontext() if world == 1 or a + 1 == args.accumulate else model.no_sync():
                losses = model(*inputs, weighted=args.loss == "x0")
                (losses.mean() / args.accumulate).backward()
            losses = losses.detach().cpu()
            by_t.index_add_(1, (t * runs.BINS).long(), torch.stack([losses, torch.ones(len(t))]))
            mean += losses.mean().item() / args.accumulate / world
        totals = torch.tensor([*by_t.flatten(), mean, len(bad_lines.read), len(stopped)])
        *by_t, loss, bad, stopping = sum_over_processes(totals, device, world)

        # The step, unless loss or gradient is not finite
        norm = nn.utils.clip_grad_norm_(params, args.clip).item()
        finite = math.isfinite(loss + norm)
        if finite:
            optimizer.step()
        failures, skipped = 0 if finite else failures + 1, skipped + (not finite)
        optimizer.zero_grad()
        if failures == PATIENCE:
            raise UserError(
                f"loss or gradient not finite in {PATIENCE} steps in a row, up to step {step + 1}; "
                f"the last good checkpoint is {runs.latest(out) or 'none'}; try a smaller --lr"
            )

        # What a person sees, and what a later run goes on from
        batch = args.accumulate * world * args.batch
        bad_lines.check(bad, (step + 1) * batch)
        speed, waiting = clock.lap(batch)
        by_t = [x / n if n else math.nan for x, n in zip(by_t, by_t[runs.BINS :])]
        record = {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm, "skipped": skipped}
        record |= {"examples_per_s": speed, "waiting_for_data": waiting, "bad_lines": bad}
        bar.set_postfix(loss=f"{loss:.4f}", grad=f"{norm:.2f}", lr=f"{lr:.1e}", ex_s=f"{speed:.1f}")
        done = step + 1 == args.steps
        drawing = args.sample_every and ((step + 1) % args.sample_every == 0 or done)
        saving = ((step + 1) % args.save_every == 0 and not failures) or done or stopping
        if drawing:  # in all processes, as the base may be in shards
            preview = runs.preview(engine, preview_examples(data))
        if rank == 0:
            with runs.writing(out):
                runs.log(out, record | {"loss_by_t": by_t})
                if drawing:
                    runs.write_pictures(out, step + 1, preview)
                if saving:
                    runs.save(engine, optimizer, out, step + 1, settings, keep=args.keep)
        if stopping and not done:
            bar.close()
            end(world)
            if rank == 0:
                print(f"stopped after step {step + 1}: saved; --resume goes on", file=sys.stderr)
            sys.exit(128 + (stopped or [signal.SIGTERM])[0])
    end(world)
    if rank == 0:
        if bad_lines.scanned or bad:
            print(f"{len(bad_lines.scanned) + bad:.0f} bad lines were skipped")
        print(out / f"stage{args.stage}.safetensors")


def load_engine(args, device):
    """The engine to start from, its LoRA apart; without a checkpoint it gets a new adapter."""
    engine = DreamEngine.load(args.sd3, args.lmm, args.checkpoint, device, merge=False)
    engine.mmdit.checkpointing = args.checkpointing
    torch.manual_seed(args.seed)  # of the new adapter, and of new LoRA
    if args.checkpoint is None:
        engine.adapter = new_adapter(engine.lmm, engine.mmdit, args.layers, args.mlp_dim)
    return engine


def draw(args, micro, channels):
    """A microbatch's noise (B, C, H/8, W/8), t (B,) and r (B,), which is U(0, 1) without --blend."""
    seed = random.Random(f"{args.seed} {micro.number}").getrandbits(62)
    generator = torch.Generator().manual_seed(seed)
    n, _, height, width = micro.target.shape
    noise = torch.randn(n, channels, height // 8, width // 8, generator=generator)
    t, r = flow.training_sigmas(n, generator=generator), torch.rand(n, generator=generator)
    return noise, t, r if args.blend is None else torch.full_like(r, args.blend)


def learning_rate(step, args):
    """Linear warm-up, constant, linear to zero over the last 30 %."""
    return args.lr * min(1, (step + 1) / args.warmup, (args.steps - step) / (0.3 * args.steps))


# ---- data ---------------------------------------------------------------------------------------


def dataset(args, engine, sources, world):
    """All microbatches of the run, drawn from [(source, weight)]; sets args.size where there was no --size."""
    args.size = args.size or min(512, engine.default_size)
    tasks, progress = args.tasks or SHARES[args.stage], tqdm if args.buckets else iter
    pools = make_pools(sources, tasks, args.size, args.buckets, progress)
    missing = {task for task, share in tasks.items() if share} - {pool.task for pool in pools}
    if not pools or (args.tasks and missing):
        raise UserError(f"--data holds no example of task {', '.join(sorted(missing))}")
    for pool in pools:
        engine.check(1, 1, 0, *pool.size)
    lmm = engine.lmm  # workers shall have the tokenizer, but no model
    batches = partial(collate, tokenizer=lmm.tokenizer, config=lmm.patches, mrope=lmm.mrope)
    count = args.steps * args.accumulate * world
    return Microbatches(pools, batches, count, args.batch, args.seed, args.null)


def preview_examples(data):
    """Three examples of each task, that the engine draws while it trains."""
    pools = {pool.task: pool for pool in reversed(data.pools)}.values()
    return [data.example(pool, i, random.Random(i), []) for pool in pools for i in range(3)]


def time_loading(microbatches, batch):
    """Print how many examples per second the data alone could feed."""
    clock = runs.Clock()
    count = sum(1 for _ in tqdm(microbatches, "loading"))
    print(f"{clock.lap(count * batch)[0]:.1f} examples/s")


def run_settings(args, engine, pools, world):
    """What a run and the one that goes on with it must share."""
    names = ("stage", "steps", "batch", "lr", "warmup", "clip", "seed", "rank", "alpha", "lmm_lora")
    settings = {name: getattr(args, name) for name in (*names, "loss", "blend", "null")}
    settings["microbatches a step"] = args.accumulate * world
    settings["adapter"] = [list(p.shape) for p in engine.adapter.txt.parameters()]
    settings["examples"] = [
        f"{p.task} {p.size[0]}x{p.size[1]} x {p.weight:.6g} from {p.source.identity}" for p in pools
    ]
    return settings | engine.base


# ---- several processes --------------------------------------------------------------------------


def join(name):
    """(rank, number of processes, device), as torchrun or a plain start gives them."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = usable_device(name)
    if world == 1:
        return 0, 1, device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), world, device


def distribute(engine, learning, shard, world):
    """What learns is on every process, its gradients averaged (DDP); so is the frozen rest, unless
    shard spreads the MM-DiT over the processes (FSDP2), block by block."""
    if shard:
        ignored = set(learning.values())
        mesh = dist.init_device_mesh(engine.device.type, (world,))
        for block in (*engine.mmdit.joint_blocks, engine.mmdit):
            fully_shard(block, mesh=mesh, ignored_params=ignored)
    names = {name for name, _ in (*engine.named_parameters(), *engine.named_buffers())}
    frozen = names - learning.keys()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(engine, frozen)
    return DistributedDataParallel(engine, gradient_as_bucket_view=True)


def sum_over_processes(x, device, world):
    """The sum of a tensor over the processes, as a list."""
    if world > 1:
        dist.all_reduce(x := x.to(device))
    return x.tolist()


def end(world):
    if world > 1:
        dist.barrier()  # rank 0 may still be writing
        dist.destroy_process_group()


@contextmanager
def one_line_if_a_process_dies(out):
    try:
        yield
    except RuntimeError as error:
        of_network = isinstance(error, dist.DistError) or re.search("gloo|onnection", str(error))
        if not dist.is_initialized() or not of_network:
            raise
        reason = str(error).splitlines()[0][:160]
        raise UserError(
            f"rank {dist.get_rank()}: lost the other processes ({reason}); "
            f"the last checkpoint is {runs.latest(out) or 'none'}, --resume goes on from it"
        ) from error


def catch_signals():
    """A list that gets each SIGTERM and the first Ctrl-C; a second one ends the program at once."""
    caught = []

    def note(signum, _):
        caught.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, note)
    return caught


# ---- the command line ---------------------------------------------------------------------------


def shares(text):
    """'t2i=1,edit=2' -> {task: number}."""
    try:
        result = {task: float(x) for task, x in (part.split("=") for part in text.split(","))}
        valid = all(0 <= x <= 1e6 for x in result.values()) and any(result.values())
        if not valid or result.keys() - FIELDS.keys():
            raise ValueError
    except ValueError:
        expected = f"such as t2i=1,edit=2, the tasks being {', '.join(FIELDS)}"
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}") from None
    return result


def weighted_file(text):
    """'a.jsonl' or 'a.jsonl=2' -> (file, weight)."""
    file, _, weight = text.rpartition("=")
    try:
        float(weight)
    except ValueError:
        file = ""  # the = is part of the name
    return (file, number(0, 1e6, exclude_low=True)(weight)) if file else (text, 1.0)


def options():
    """The parser: every option and its range."""
    parser = Parser(description="Train Dream Engine's adapter (stage 1), then LoRA too (stage 2).")
    add, positive = parser.add_argument, partial(number, 0, exclude_low=True)
    # fmt: off
    add("--stage", type=int, choices=SHARES, required=True)
    add("--data", type=weighted_file, action="append", default=[], metavar="FILE[=WEIGHT]",
        help="JSONL manifest, repeatable; WEIGHT: of its share in each of its tasks")
    add("--tasks", type=shares, help="shares of the microbatches, such as t2i=1,edit=2")
    add("--null", type=number(0, 1), default=0.1, help="share of null prompts; default: 0.1")
    add("--loss", choices=("velocity", "x0"), default="velocity", help="x0: the official weighting")
    add("--blend", type=number(0, 1), help="one r for all, 0: LMM, 1: ViT; default: a random one each")
    add("--layers", type=whole_number(1, 8), default=2, help="of a new adapter; default: 2")
    add("--mlp-dim", type=whole_number(1, 65536),
        help="its hidden units; default: 4096, less for a small MM-DiT")
    add("--steps", type=whole_number(1, 10**7), help="default: 6000 in stage 1, 8000 in stage 2")
    add("--batch", type=whole_number(1, 4096), default=16, help="examples in a microbatch")
    add("--accumulate", type=whole_number(1, 10**4), default=1,
        help="microbatches a step, on each process")
    add("--lr", type=positive(10), help="default: 2e-3 and 1e-3 for the miniature, else 5e-5")
    add("--warmup", type=whole_number(1), default=100, help="steps")
    add("--clip", type=positive(1e9), default=1.0, help="largest norm of the gradient")
    add("--rank", type=whole_number(0, 4096),
        help="of LoRA in stage 2; default: 16 for the miniature, else 32; 0: none")
    add("--alpha", type=positive(1e6), help="of LoRA, whose scale is alpha / rank; default: rank")
    add("--lmm-lora", action="store_true", help="LoRA on the LMM's attention, too")
    add("--size", type=whole_number(16, 8192), help="of a side; default: 512, or all the model can")
    add("--buckets", action="store_true", help="about that size in the picture's own ratio")
    add("--checkpointing", action=argparse.BooleanOptionalAction,
        help="compute blocks twice to keep less; default: on a GPU")
    add("--shard", action="store_true", help="spread the frozen MM-DiT over the processes")
    add("--only-load", action="store_true", help="time the reading of the data for --steps steps")
    add("--workers", type=whole_number(0, 256), help="data readers; default: 4 with a GPU, else 0")
    add("--seed", type=whole_number(0, 2**32), default=0)
    add("--save-every", type=whole_number(1), default=250, help="steps between checkpoints")
    add("--keep", type=whole_number(1), default=2, help="checkpoints to keep")
    add("--sample-every", type=whole_number(0), default=500, help="steps between pictures; 0: none")
    add("--out", help="folder of the run; default: runs/stageN")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("--sd3", type=Path, default=SD3, help="SD3 / SD3.5: single file or diffusers folder")
    add("--lmm", type=Path, default=LMM, help="Qwen2-VL: Hugging Face folder")
    add("--checkpoint", type=Path, help="to start from, or none; default: the mini's stage 1")
    # fmt: on
    return parser


def parse(arguments=None):
    """The options, with defaults that depend on others; UserError where they do not go together."""
    args = options().parse_args(arguments)
    miniature, world = args.sd3 == SD3, int(os.environ.get("WORLD_SIZE", "1"))
    if args.stage == 1 and (args.rank or args.lmm_lora):
        raise UserError("--rank and --lmm-lora belong to --stage 2")
    if args.stage == 2:
        args.rank = (16 if miniature else 32) if args.rank is None else args.rank
        args.checkpoint = args.checkpoint or (STAGE1 if miniature else None)
        if args.checkpoint is None:
            raise UserError("--checkpoint is missing: stage 2 goes on from stage 1's, or from none")
        if args.lmm_lora and not args.rank:
            raise UserError("--lmm-lora needs a --rank of at least 1")
    if not miniature and not args.data:
        raise UserError("--data is missing: only the miniature learns from rendered scenes")
    start = args.checkpoint = None if args.checkpoint == Path("none") else args.checkpoint
    if start and start.is_dir() and not any(start.glob("stage?.safetensors")):
        raise UserError(f"--checkpoint {start}: no run of train.py, which alone it can go on from")
    if args.shard and world == 1:
        raise UserError("--shard needs several processes: start with torchrun")
    args.steps = args.steps or STEPS[args.stage]
    if args.steps * args.accumulate * world > 10**8:
        raise UserError("--steps times --accumulate: over 100 million microbatches in all")
    args.alpha = args.alpha or args.rank
    args.lr = args.lr or (RATES[args.stage] if miniature else 5e-5)
    args.out = args.out or f"runs/stage{args.stage}"
    if runs.latest(args.out) and not args.resume:
        raise UserError(
            f"{args.out} holds a run: --resume goes on with it, or choose another --out"
        )
    on_gpu = usable_device(args.device).type == "cuda"
    args.workers = (4 if on_gpu else 0) if args.workers is None else args.workers
    args.checkpointing = on_gpu if args.checkpointing is None else args.checkpointing
    return args


def main(arguments=None):
    args = parse(arguments)
    sources = [(Manifest(file), weight) for file, weight in args.data]
    if not sources:
        from mini.world import Examples

        sources = [(Examples(), 1)]
    with one_line_if_a_process_dies(args.out):
        train(args, sources)


if __name__ == "__main__":
    with one_line_errors():
        main()
