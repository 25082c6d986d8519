"""Train Dream Engine (section 3.4 of the paper).

    python train.py --stage 1     # the adapter alone: text -> image and image -> image
    python train.py --stage 2     # adapter and LoRA on the MM-DiT: also editing and objects
    torchrun --nproc-per-node 8 train.py --stage 2 --data edits.jsonl --sd3 ... --lmm ... --checkpoint ...

Without --data the miniature learns from rendered scenes. LMM, VAE and the MM-DiT's own weights stay
frozen, in bf16 on a GPU; what learns is fp32. --out gets all there is to see, and checkpoints from
which --resume goes on. A microbatch and its noise are a function of (seed, number) alone: a resumed
run sees what an unbroken one would have seen, and N processes see what one process sees that takes
N times as many microbatches a step.
"""

import argparse
import math
import os
import random
import re
import signal
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import flow
from cli import Parser, one_line_errors
from data import FIELDS, Faults, Manifest, Microbatches, make_pools
from dream_engine import LMM, SD3, STAGE1, DreamEngine, usable_device
from logbook import (
    BINS,
    Clock,
    keep_metrics,
    latest,
    log,
    loss_curve,
    memory_plan,
    mixture,
    publish,
    restore,
    samples,
    save,
    writing,
)

SHARES = {  # by stage: of each task among the microbatches
    1: {"t2i": 1, "i2i": 1},
    2: {"t2i": 3, "i2i": 1, "edit": 3, "objects": 3},
}
STEPS, RATES = {1: 6000, 2: 8000}, {1: 2e-3, 2: 1e-3}  # that made the miniature
PATIENCE = 5  # steps in a row that may fail


def train(args):
    rank, world, device = join(args)
    out = Path(args.out)
    found = latest(out)
    if found and not args.resume:
        raise ValueError(f"{out} holds a run: --resume goes on with it, or choose another --out")
    sources = [(Manifest(file), weight) for file, weight in args.data] or [(None, 1)]
    faults = Faults([manifest for manifest, _ in sources if manifest])
    faults.check(0, 0)
    torch.manual_seed(args.seed)
    engine = DreamEngine.load(
        args.sd3, args.lmm, args.checkpoint, device, merge=False,
        layers=args.layers, mlp_dim=args.mlp_dim,
    )  # fmt: skip
    engine.mmdit.checkpointing = args.checkpointing
    learning = engine.start_training(args.rank, args.alpha, args.lmm_lora)
    params = list(learning.values())
    optimizer = torch.optim.AdamW(params, args.lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    args.size = args.size or min(512, engine.default_size)
    data = dataset(args, engine, sources, world)
    facts = settings(args, engine, data, world)
    start = restore(found, engine, optimizer, facts) if found else 0
    model = distribute(engine, learning, args.shard, world) if world > 1 else engine
    shown = [data.example(p, i, random.Random(i), []) for p in first_pools(data) for i in range(3)]
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        with writing(out):
            keep_metrics(out, start)
            if found:
                publish(out)  # again: the run may have been killed before it could
        print(memory_plan(engine, args, world), mixture(data), sep="\n", flush=True)
        faults.tell(faults.scanned)

    stop = catch_signals()
    loader = torch.utils.data.DataLoader(
        data,
        batch_size=None,  # an item of data is a batch already
        sampler=range(start * args.accumulate * world + rank, len(data), world),
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_group,
    )
    if args.only_load:
        return time_loader(loader, args.batch)
    microbatches, clock = iter(loader), Clock()
    failures, skipped, met = 0, 0, 0  # bad steps in a row and in all; bad lines
    channels = engine.mmdit.config.channels
    steps = range(start, args.steps)
    bar = tqdm(steps, f"stage {args.stage}", args.steps, initial=start, disable=rank > 0)
    for step in bar:
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # This process's share of the loss and the gradient
        by_t, mean = torch.zeros(2, BINS), 0.0  # losses and their number by t, mean loss
        for a in range(args.accumulate):
            with clock.waiting():
                micro = next(microbatches)
            faults.note(micro.faults)
            number = (step * args.accumulate + a) * world + rank
            noise, t, r = draws(args.seed, number, micro.target.shape, channels)
            r = r if args.blend is None else torch.full_like(r, args.blend)
            inputs = micro.batch, micro.target, noise, t, r
            inputs = [x.to(device, non_blocking=True) for x in inputs]
            is_last = a + 1 == args.accumulate
            with nullcontext() if is_last or world == 1 else model.no_sync():
                losses = model(*inputs, weighted=args.loss == "x0")
                (losses.mean() / args.accumulate).backward()
            losses = losses.detach().cpu()
            by_t.index_add_(1, (t * BINS).long(), torch.stack([losses, torch.ones(len(t))]))
            mean += losses.mean().item() / args.accumulate / world
        totals = torch.tensor([*by_t.flatten(), mean, len(faults.met), len(stop)])
        *by_t, loss, met, stopping = over_all(totals, device, world)

        # The step, unless loss or gradient is not finite
        norm = nn.utils.clip_grad_norm_(params, args.clip).item()
        if math.isfinite(loss + norm):
            optimizer.step()
            failures = 0
        else:
            failures, skipped = failures + 1, skipped + 1
        optimizer.zero_grad()
        if failures == PATIENCE:
            raise ValueError(
                f"loss or gradient not finite in {PATIENCE} steps in a row, up to step {step + 1}; "
                f"the last good checkpoint is {latest(out) or 'none'}; try a smaller --lr"
            )

        # What a person sees, and what a later run goes on from
        done, examples = step + 1 == args.steps, args.accumulate * world * args.batch
        faults.check(met, (step + 1) * examples)
        rate, waited = clock.lap(examples)
        by_t = [x / n if n else math.nan for x, n in zip(by_t, by_t[BINS:])]
        record = {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm, "skipped": skipped}
        record |= {"examples_per_s": rate, "waiting_for_data": waited, "bad_lines": met}
        record |= {"loss_by_t": by_t}
        bar.set_postfix(loss=f"{loss:.4f}", grad=f"{norm:.2f}", lr=f"{lr:.1e}", ex_s=f"{rate:.1f}")
        look = args.sample_every and ((step + 1) % args.sample_every == 0 or done)
        if look:
            pictures = samples(engine, shown)  # on every rank: a sharded base needs them all
        if rank == 0:
            with writing(out):
                log(out, record)
                if look:
                    pictures.save(out / f"samples-{step + 1:06d}.png")
                    loss_curve(out).save(out / "loss.png")
                if ((step + 1) % args.save_every == 0 and not failures) or done or stopping:
                    save(engine, optimizer, out, step + 1, facts, args.keep)
        if stopping and not done:
            bar.close()
            end(world)
            if rank == 0:
                print(f"stopped after step {step + 1}: saved; --resume goes on", file=sys.stderr)
            sys.exit(128 + (stop or [signal.SIGTERM])[0])
    end(world)
    if rank == 0:
        if bad := len(faults.scanned) + met:
            print(f"{bad:.0f} bad lines were skipped")
        print(out / f"stage{args.stage}.safetensors")


def draws(seed, number, shape, channels):
    """Noise (B, C, H/8, W/8), t (B,) and r ~ U(0, 1) (B,) of a microbatch of images (B, 3, H, W)."""
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {number}").getrandbits(62))
    n, _, height, width = shape
    noise = torch.randn(n, channels, height // 8, width // 8, generator=generator)
    return noise, flow.training_sigmas(n, generator=generator), torch.rand(n, generator=generator)


def learning_rate(step, args):
    """Linear warm-up, constant, linear to zero over the last 30 %."""
    return args.lr * min(1, (step + 1) / args.warmup, (args.steps - step) / (0.3 * args.steps))


# ---- data ---------------------------------------------------------------------------------------


def dataset(args, engine, sources, world):
    """All microbatches of the run, drawn from [(Manifest or None, weight)]."""
    asked, progress = args.tasks or SHARES[args.stage], tqdm if args.buckets else iter
    pools = make_pools(sources, asked, args.size, args.buckets, progress)
    missing = {task for task, share in asked.items() if share} - {pool.task for pool in pools}
    if not pools or (args.tasks and missing):
        raise ValueError(f"--data holds no example of task {', '.join(sorted(missing))}")
    for pool in pools:
        engine.check(1, 1, 0, *pool.size)
    count = args.steps * args.accumulate * world
    reading = engine.tokenizer, engine.patches, engine.mrope
    return Microbatches(pools, count, args.batch, args.seed, *reading, args.null, args.flip)


def first_pools(data):
    """One pool of each task."""
    return {pool.task: pool for pool in reversed(data.pools)}.values()


def time_loader(loader, batch):
    """Print how many examples per second the data alone could feed."""
    clock = Clock()
    count = sum(1 for _ in tqdm(loader, "loading"))
    print(f"{clock.lap(count * batch)[0]:.1f} examples/s")


def leave_group(_):
    """A data worker leaves Ctrl-C and other signals to the process that it works for."""
    os.setpgrp()


# ---- several processes --------------------------------------------------------------------------


def join(args):
    """(rank, number of processes, device), as torchrun or a plain start gives them."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = usable_device(args.device)
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
            register_fsdp_forward_method(block, "prepare")  # it, too, needs the whole weights
    names = {name for name, _ in (*engine.named_parameters(), *engine.named_buffers())}
    frozen = names - learning.keys()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(engine, frozen)
    return DistributedDataParallel(engine, gradient_as_bucket_view=True)


def over_all(x, device, world):
    """The sum of a tensor over the processes, as a list."""
    if world > 1:
        dist.all_reduce(x := x.to(device))
    return x.tolist()


def end(world):
    if world > 1:
        dist.barrier()  # rank 0 may still be writing
        dist.destroy_process_group()


@contextmanager
def lost_rank(out):
    """One line instead of a trace where another process has died."""
    try:
        yield
    except RuntimeError as error:
        of_network = isinstance(error, dist.DistError) or re.search("gloo|onnection", str(error))
        if not dist.is_initialized() or not of_network:
            raise
        reason = str(error).splitlines()[0][:160]
        raise ValueError(
            f"rank {dist.get_rank()}: lost the other processes ({reason}); "
            f"the last checkpoint is {latest(out) or 'none'}, --resume goes on from it"
        ) from None


# ---- nothing lost -------------------------------------------------------------------------------


def catch_signals():
    """A list that gets each SIGTERM and the first Ctrl-C; a second one ends the program at once."""
    caught = []

    def note(number, _):
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return caught


def settings(args, engine, data, world):
    """What a run and the one that goes on with it must share."""
    names = ("stage", "steps", "batch", "lr", "warmup", "clip", "seed", "rank", "alpha", "lmm_lora")
    facts = {name: getattr(args, name) for name in (*names, "loss", "flip", "blend")}
    facts |= {"microbatches a step": args.accumulate * world, "null": data.null}
    facts |= {"adapter": [list(p.shape) for p in engine.adapter.txt.parameters()], **engine.base}
    facts["examples"] = [
        f"{pool.task} {pool.size[0]}x{pool.size[1]} x {pool.weight:.6g} from "
        + (f"{pool.source.file.name}:{pool.source.crc:08x}" if pool.source else "rendered scenes")
        for pool in data.pools
    ]
    return facts


# ---- the command line ---------------------------------------------------------------------------


def shares(text):
    """'t2i=1,edit=2' -> {task: number}."""
    try:
        result = {k: float(v) for k, v in (part.split("=") for part in text.split(","))}
        if not all(0 <= x < math.inf for x in result.values()):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected such as t2i=1,edit=2") from None
    if unknown := result.keys() - FIELDS.keys():
        known = ", ".join(FIELDS)
        raise argparse.ArgumentTypeError(
            f"unknown task {unknown.pop()!r}: expected some of {known}"
        )
    return result


def probabilities(text):
    """'0.1', or 't2i=0.1,edit=0.2' (else 0.1) -> {task: number in [0, 1]}."""
    every = ",".join(f"{task}={text}" for task in FIELDS)
    result = dict.fromkeys(FIELDS, 0.1) | shares(text if "=" in text else every)
    if max(result.values()) > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers up to 1")
    return result


def weighted_file(text):
    """'a.jsonl' or 'a.jsonl=2' -> (file, weight)."""
    file, _, weight = text.rpartition("=")
    try:
        return (file, float(weight)) if file else (text, 1.0)
    except ValueError:
        return text, 1.0


def parse(arguments=None):
    parser = Parser(description="Train Dream Engine's adapter (stage 1), then LoRA too (stage 2).")
    add = parser.add_argument
    add("--stage", type=int, choices=SHARES, required=True)
    add("--data", type=weighted_file, action="append", default=[], metavar="FILE[=WEIGHT]",
        help="JSONL manifest, may be given several times; WEIGHT: of its share in each of its tasks")  # fmt: skip
    add("--tasks", type=shares, help="shares of the microbatches, such as t2i=1,edit=2")
    add(
        "--null",
        type=probabilities,
        default="0.1",
        help="share of null prompts: 0.1, or t2i=0.1,edit=0.2",
    )
    add("--loss", choices=("velocity", "x0"), default="velocity", help="x0: the official weighting")
    add("--blend", type=float, help="one r for all, 0 to 1; default: each example draws its own")
    add("--layers", type=int, default=2, help="of a new adapter")
    add("--mlp-dim", type=int, help="its hidden units; default: 4096, less for a small MM-DiT")
    add("--steps", type=int, help="default: 6000 in stage 1, 8000 in stage 2")
    add("--batch", type=int, default=16, help="examples in a microbatch")
    add("--accumulate", type=int, default=1, help="microbatches a step, on each process")
    add("--lr", type=float, help="default: 2e-3 and 1e-3 for the miniature, else 5e-5")
    add("--warmup", type=int, default=100, help="steps")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add(
        "--rank",
        type=int,
        help="of LoRA in stage 2; default: 16 for the miniature, else 32; 0: none",
    )
    add("--alpha", type=float, help="of LoRA, whose scale is alpha / rank; default: rank")
    add("--lmm-lora", action="store_true", help="LoRA on the LMM's attention, too")
    add("--size", type=int, help="side of the pictures; default: 512, or all the model can")
    add("--buckets", action="store_true", help="about that size in the picture's own ratio")
    add("--flip", action="store_true", help="mirror every other example; spoils 'left of'")
    add("--checkpointing", action=argparse.BooleanOptionalAction,
        help="compute blocks twice to keep less; default: on a GPU")  # fmt: skip
    add("--shard", action="store_true", help="spread the frozen MM-DiT over the processes")
    add("--only-load", action="store_true", help="time the reading of the data for --steps steps")
    add("--workers", type=int, help="processes that read data; default: 4 with a GPU, else 0")
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=250, help="steps between checkpoints")
    add("--keep", type=int, default=2, help="checkpoints to keep")
    add("--sample-every", type=int, default=500, help="steps between pictures; 0: none")
    add("--out", help="folder of the run; default: runs/stageN")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("--sd3", default=SD3, help="SD3 / SD3.5: single file or diffusers folder")
    add("--lmm", default=LMM, help="Qwen2-VL: Hugging Face folder")
    add("--checkpoint", help="what to start from, or none; default of stage 2: the mini's stage 1")
    args = parser.parse_args(arguments)
    args.steps = STEPS[args.stage] if args.steps is None else args.steps
    for name in ("steps", "batch", "accumulate", "warmup", "save_every", "keep", "layers"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= (args.blend or 0) <= 1:
        raise ValueError(f"--blend must lie between 0 (LMM) and 1 (ViT), got {args.blend}")
    positive = {k: getattr(args, k) for k in ("lr", "clip", "alpha", "size", "mlp_dim")}
    positive |= {f"data {file}": weight for file, weight in args.data}
    for name, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
    miniature = args.sd3 == SD3
    if args.stage == 2:
        args.rank = (16 if miniature else 32) if args.rank is None else args.rank
        args.checkpoint = args.checkpoint or (STAGE1 if miniature else None)
        if args.checkpoint is None:
            raise ValueError(
                "--checkpoint is missing: stage 2 goes on from stage 1's, or from none"
            )
    elif args.rank or args.lmm_lora:
        raise ValueError("--rank and --lmm-lora belong to --stage 2")
    if (args.rank or 0) < int(args.lmm_lora):
        raise ValueError(f"--rank must be at least 1, got {args.rank}")
    if not miniature and not args.data:
        raise ValueError("--data is missing: only the miniature learns from rendered scenes")
    args.checkpoint = None if args.checkpoint == "none" else args.checkpoint
    folder = args.checkpoint and Path(args.checkpoint)
    if folder and folder.is_dir() and not any(folder.glob("stage?.safetensors")):
        raise ValueError(
            f"--checkpoint {folder}: no run of train.py, which alone it can go on from"
        )
    if args.shard and os.environ.get("WORLD_SIZE", "1") == "1":
        raise ValueError("--shard needs several processes: start with torchrun")
    args.alpha = args.alpha or args.rank
    args.lr = args.lr or (RATES[args.stage] if miniature else 5e-5)
    args.out = args.out or f"runs/stage{args.stage}"
    on_gpu = usable_device(args.device).type == "cuda"
    args.workers = (4 if on_gpu else 0) if args.workers is None else args.workers
    args.checkpointing = on_gpu if args.checkpointing is None else args.checkpointing
    return args


def main(arguments=None):
    args = parse(arguments)
    with lost_rank(args.out):
        train(args)


if __name__ == "__main__":
    with one_line_errors():
        main()
