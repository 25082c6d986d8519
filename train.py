"""Train Dream Engine (section 3.4 of its paper) or UniAlignment.

    python train.py --stage 1     # the adapter alone: text -> image and image -> image
    python train.py --stage 2     # adapter and LoRA on the MM-DiT: also editing and objects
    python train.py --stage unialignment      # all of the MM-DiT: drawing, editing and reading
    torchrun --nproc-per-node 8 train.py --stage 2 --data edits.jsonl --sd3 ... --lmm ...

Without --data the miniature learns from rendered scenes. LMM, T5, VAE and, in stages 1 and 2, the
MM-DiT stay frozen, in bf16 on a GPU; what learns is fp32. --out gets metrics, pictures, and checkpoints
from which --resume goes on. A microbatch and its noise depend on (seed, number) alone: a resumed run
sees what an unbroken one does, and N processes what one sees that takes N times as many a step.
"""

import argparse
import math
import os
import random
import re
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import flow
from data import FIELDS, BadLines, Manifest, Microbatches, PairedMicrobatches, make_pools
from dream_engine import LMM, MINI, SD3, STAGE1, DreamEngine, new_adapter
from lmm import collate, load_lmm
from prompts import check_drawing
from support import runs
from support.cli import Parser, UserError, number, one_line_errors, whole_number
from support.fast import device_and_dtype, usable_device
from support.processes import catch_signals, distribute, together
from unialignment.model import LOSSES, UniAlignment

UNI = "unialignment"
SHARES = {  # by stage: of each task among the microbatches
    1: {"t2i": 1, "i2i": 1},
    2: {"t2i": 3, "i2i": 1, "edit": 3, "objects": 3},
    UNI: {"t2i": 1, "edit": 1},  # a step each, in turn
}
STEPS, RATES = {1: 6000, 2: 8000, UNI: 10000}, {1: 2e-3, 2: 1e-3, UNI: 1.2e-3}  # of the miniature
OPTIONS = {  # that belong to some stages only
    "2": ("rank", "lmm_lora"),
    "1 or 2": ("alpha", "blend", "mlp_dim", "shard"),
    UNI: ("weights", "text_encoder", "slots", "sentence", "lmm_states"),
}
PATIENCE = 5  # steps in a row that may fail


def train(args, sources, rank, world, device):
    """Train as the options say, on examples [(source, weight)]; see `data.Manifest` for a source.

    rank: the number of this one of so many processes. Returns the signal that stopped it, if any.
    """
    out, bad_lines = Path(args.out), BadLines(sources)
    engine = load_engine(args, device)
    learning = engine.start_training(args.rank, args.alpha, args.lmm_lora)
    params = list(learning.values())
    optimizer = torch.optim.AdamW(params, args.lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    data = dataset(args, engine, sources, world)
    settings = run_settings(args, engine, data.pools, world)
    start = runs.restore(out, engine, optimizer, settings)
    numbers = range(start * args.accumulate * world + rank, len(data), world)
    microbatches = data.load(numbers, args.workers)
    model = distribute(engine, learning, args.shard, world)
    if rank == 0:
        runs.open_folder(out, start, engine)
        print(runs.memory_plan(engine, args, world), *settings["examples"], sep="\n", flush=True)
        for place, reason in bad_lines.items():
            print(f"skipped {place}: {reason}", file=sys.stderr)

    stopped, clock = catch_signals(), runs.Clock()
    failures, skipped, bad = 0, 0, 0  # steps not finite in a row and in all; bad lines
    steps, title = range(start, args.steps), f"stage {args.stage}"
    bar = tqdm(steps, title, args.steps, initial=start, disable=rank > 0)
    for step in bar:
        # A linear warm-up, then constant, to zero in the end
        left = (args.steps - step) / (args.decay * args.steps)
        lr = args.lr * min(1, (step + 1) / args.warmup, left)
        optimizer.param_groups[0]["lr"] = lr

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
        found = len(bad_lines) - bad_lines.scanned
        totals = torch.tensor([*by_t.flatten(), mean, found, len(stopped)])
        if world > 1:
            dist.all_reduce(totals := totals.to(device))
        *by_t, loss, bad, stopping = totals.tolist()

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
                f"{runs.advice(out)}; try a smaller --lr"
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
                runs.log(out, record | engine.parts | {"loss_by_t": by_t})
                if drawing:
                    runs.write_pictures(out, step + 1, preview)
                if saving:
                    runs.save(engine, optimizer, out, step + 1, settings, keep=args.keep)
        if stopping and not done:
            bar.close()
            if rank == 0:
                print(f"stopped after step {step + 1}: saved; --resume goes on", file=sys.stderr)
            return (stopped or [signal.SIGTERM])[0]
    if rank == 0:
        if bad_lines.scanned + bad:
            print(f"{bad_lines.scanned + bad:.0f} bad lines were skipped")
        print(out if args.stage == UNI else out / f"stage{args.stage}.safetensors")


def load_engine(args, device):
    """The engine to start from, its LoRA apart; without a checkpoint it gets what is to be learnt.

    Of UniAlignment the MM-DiT, which learns, is fp32; beside it stands a teacher.
    """
    torch.manual_seed(args.seed)  # of new parts
    if args.stage != UNI:
        engine = DreamEngine.load(args.sd3, args.lmm, args.checkpoint, device, merge=False)
        torch.manual_seed(args.seed)
        if args.checkpoint is None:
            engine.adapter = new_adapter(engine.lmm, engine.mmdit, args.layers, args.mlp_dim)
    else:
        if args.checkpoint:
            sd3 = None if args.sd3 == SD3 else args.sd3
            engine = UniAlignment.load(args.checkpoint, sd3, device, torch.float32)
            engine.text_encoder.to(device_and_dtype(device)[1])
            engine.sampling = replace(engine.sampling, size=args.size or engine.default_size)
        else:
            texts = {"slots": args.slots, "size": args.size or 512, "sentence": args.sentence}
            engine = UniAlignment.start(args.sd3, args.text_encoder, device, **texts)
        engine.weights, engine.lmm = args.weights, load_lmm(args.lmm, *device_and_dtype(device))
        engine.lmm_states = args.lmm_states
    engine.mmdit.checkpointing = args.checkpointing
    return engine


def draw(args, micro, channels):
    """A microbatch's noise (B, C, H/8, W/8), t (B,) and r (B,), which is U(0, 1) without --blend.

    Of UniAlignment noise for the posteriors too, (B, 2 + S, C, H/8, W/8), and the times of the texts.
    """
    seed = random.Random(f"{args.seed} {micro.number}").getrandbits(62)
    generator = torch.Generator().manual_seed(seed)
    n, _, height, width = micro.target.shape
    shape = channels, height // 8, width // 8
    if args.stage == UNI:
        noise = torch.randn(n, 2 + micro.batch.sources.shape[1], *shape, generator=generator)
        t = (1000 * flow.training_sigmas(n, 1.0, generator)).ceil() / 1000  # not shifted
        return noise, t.clamp(max=0.999), micro.batch.times
    noise = torch.randn(n, *shape, generator=generator)
    t, r = flow.training_sigmas(n, generator=generator), torch.rand(n, generator=generator)
    return noise, t, r if args.blend is None else torch.full_like(r, args.blend)


def dataset(args, engine, sources, world):
    """All microbatches of the run, drawn from [(source, weight)]; sets args.size where there was no --size."""
    args.size = args.size or min(512, engine.default_size)
    tasks, progress = args.tasks or SHARES[args.stage], tqdm if args.buckets else iter
    pools = make_pools(sources, tasks, args.size, args.buckets, progress)
    missing = {task for task, share in tasks.items() if share} - {pool.task for pool in pools}
    if not pools or (args.tasks and missing):
        raise UserError(f"--data holds no example of task {', '.join(sorted(missing))}")
    for pool in pools:
        check_drawing(1, 1, *pool.size, engine.mmdit.config.largest)
    lmm = engine.lmm  # workers shall have the tokenizer, but no model
    batches = partial(collate, tokenizer=lmm.tokenizer, config=lmm.patches, mrope=lmm.mrope)
    step = args.accumulate * world
    count, options = args.steps * step, {"seed": args.seed, "null": args.null}
    if args.stage == UNI:
        options |= {"tokens": engine.tokens, "turn": 0 if args.tasks else step}
    kind = PairedMicrobatches if args.stage == UNI else Microbatches
    return kind(pools, batches, count, args.batch, **options)


def preview_examples(data):
    """Three examples of each task, that the engine draws while it trains."""
    pools = {pool.task: pool for pool in reversed(data.pools)}.values()
    return [data.example(pool, i, random.Random(i), []) for pool in pools for i in range(3)]


def run_settings(args, engine, pools, world):
    """What a run and the one that goes on with it must share."""
    names = "stage steps batch lr warmup decay clip seed rank alpha lmm_lora loss blend null"
    settings = {name: getattr(args, name) for name in f"{names} weights lmm_states tasks".split()}
    settings["microbatches a step"] = args.accumulate * world
    shapes = {name: list(p.shape) for name, p in engine.named_parameters() if "adapter." in name}
    settings["adapter"] = list(shapes.values())
    settings["examples"] = [
        f"{p.task} {p.size[0]}x{p.size[1]} x {p.weight:.6g} from {p.source.identity}" for p in pools
    ]
    return settings | engine.base


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


def options():
    """The parser: every option and its range."""
    parser = Parser(description="Train Dream Engine (adapter: 1, LoRA too: 2) or UniAlignment.")
    add, positive = parser.add_argument, partial(number, 0, exclude_low=True)
    # fmt: off
    add("--stage", type=lambda x: int(x) if x.isdecimal() else x, choices=SHARES, required=True)
    add("--data", type=weighted_file, action="append", default=[], metavar="FILE[=WEIGHT]",
        help="JSONL manifest, repeatable; WEIGHT: of its share in each of its tasks")
    add("--tasks", type=shares, help="shares of the microbatches, such as t2i=1,edit=2")
    add("--null", type=number(0, 1), default=0.1, help="share of null prompts; default: 0.1")
    add("--loss", choices=("velocity", "x0"), help="x0: the official weighting, default of UniAlignment")
    add("--weights", type=partial(shares, names=LOSSES, example="text=1,isa=0, the losses"),
        help="of UniAlignment's losses; default: velocity=1,text=0.2,csa=0.05,isa=0.1")
    add("--blend", type=number(0, 1), help="one r for all, 0: LMM, 1: ViT; default: a random one each")
    add("--layers", type=whole_number(1, 8), default=2, help="of a new adapter; default: 2")
    add("--mlp-dim", type=whole_number(1, 65536), help="its hidden units; default: up to 4096")
    add("--steps", type=whole_number(1, 10**7), help="default: 6000, 8000, 10000 by stage")
    add("--batch", type=whole_number(1, 4096), default=16, help="examples in a microbatch")
    add("--accumulate", type=whole_number(1, 10**4), default=1, help="microbatches a step and process")
    add("--lr", type=positive(10), help="default: 2e-3, 1e-3, 1.2e-3 for the miniature, else 5e-5, 3e-5")
    add("--warmup", type=whole_number(1), default=100, help="steps")
    add("--decay", type=positive(1), default=0.3, help="last share of the steps, lr falls to 0")
    add("--clip", type=positive(1e9), default=1.0, help="largest norm of the gradient")
    add("--rank", type=whole_number(0, 4096), help="of LoRA; default: of the mini 16, else 32; 0: none")
    add("--alpha", type=positive(1e6), help="of LoRA, whose scale is alpha / rank; default: rank")
    add("--lmm-lora", action="store_true", help="LoRA on the LMM's attention, too")
    add("--lmm-states", action="store_true", help="ISA: align words with the LMM's states, not embeddings")
    add("--size", type=whole_number(16, 8192), help="of a side; default: 512, or all the model can")
    add("--buckets", action="store_true", help="about that size in the picture's own ratio")
    add("--checkpointing", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    add("--shard", action="store_true", help="spread the frozen MM-DiT over the processes")
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
    add("--text-encoder", type=Path, help="UniAlignment: SD3's T5; default: in --sd3, or the mini's")
    add("--slots", type=whole_number(2, 512), help="of its texts; default: 256, of the miniature 42")
    add("--sentence", help="in front of its captions; default: none, of the miniature Describe the image.")
    add("--checkpoint", type=Path, help="to start from, or none; default: the mini's stage 1")
    # fmt: on
    return parser


def parse(arguments=None):
    """The options, with defaults that depend on others; UserError where they do not go together."""
    args = options().parse_args(arguments)
    stage, uni = args.stage, args.stage == UNI
    miniature = args.sd3 == SD3 and not (uni and args.checkpoint and args.data)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    for stages, names in OPTIONS.items():
        if str(stage) not in stages and any(getattr(args, name) for name in names):
            named = " and ".join(f"--{name.replace('_', '-')}" for name in names)
            raise UserError(f"{named} belong to --stage {stages}")
    if stage == 2:
        args.rank = (16 if miniature else 32) if args.rank is None else args.rank
        args.checkpoint = args.checkpoint or (STAGE1 if miniature else None)
    start = None if args.checkpoint == Path("none") else args.checkpoint
    tasks = args.tasks or {}
    learnt = {"t2i", "edit", "answer"} if uni else FIELDS.keys() - {"answer"}
    args.steps = args.steps or STEPS[stage]
    args.out = args.out or f"runs/{'' if uni else 'stage'}{stage}"
    own = args.text_encoder or args.slots or args.sentence
    single = uni and not start and not miniature and args.sd3.is_file()
    total = args.steps * args.accumulate * world
    not_ours = not uni and start and start.is_dir() and not any(start.glob("stage?.safetensors"))
    for wrong, message in (
        (args.tasks and not any(tasks.values()), "--tasks: expected such as t2i=1,edit=2"),
        (tasks.keys() - learnt, f"--tasks: --stage {stage} learns {', '.join(sorted(learnt))}"),
        (stage == 2 and not args.checkpoint, "--checkpoint is missing: of stage 1, or none"),
        (args.lmm_lora and not args.rank, "--lmm-lora needs a --rank of at least 1"),
        (not miniature and not args.data, "--data is missing: what is not the miniature needs it"),
        (single and not args.text_encoder, f"--text-encoder is missing: {args.sd3} holds no T5"),
        (uni and start and own, "--text-encoder, --slots, --sentence: a --checkpoint has its own"),
        (not_ours, f"--checkpoint {start}: no run of train.py, which alone it can go on from"),
        (args.shard and world == 1, "--shard needs several processes: start with torchrun"),
        (total > 10**8, "--steps times --accumulate: over 100 million microbatches in all"),
        (runs.latest(args.out) and not args.resume, f"{args.out} holds a run: --resume goes on"),
    ):
        if wrong:
            raise UserError(message)
    if uni:
        t5 = MINI / "t5-mini" if miniature else args.sd3 / "text_encoder_3"
        args.text_encoder = args.text_encoder or t5
        args.slots = args.slots or (42 if miniature else 256)
        if args.sentence is None:
            args.sentence = "Describe the image." if miniature else ""
        args.weights = LOSSES | (args.weights or {})
    args.checkpoint, args.alpha = start, args.alpha or args.rank
    args.loss = args.loss or ("x0" if uni else "velocity")
    args.lr = args.lr or (RATES[stage] if miniature else 3e-5 if uni else 5e-5)
    on_gpu = usable_device(args.device).type == "cuda"
    args.workers = (4 if on_gpu else 0) if args.workers is None else args.workers
    args.checkpointing = on_gpu if args.checkpointing is None else args.checkpointing
    return args


def main(arguments=None):
    args = parse(arguments)
    sources = [(Manifest(file), weight) for file, weight in args.data]
    if not sources:
        from mini.world import Examples

        sources = [(Examples(perception=args.stage == UNI), 1)]
    with together(args.device, partial(runs.advice, args.out)) as place:
        stopped = train(args, sources, *place)
    if stopped:
        sys.exit(128 + stopped)


if __name__ == "__main__":
    with one_line_errors():
        main()
