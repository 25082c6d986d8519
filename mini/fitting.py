"""The training loop of the pre-training, shared by all its parts.

A run resumes from its last saved state. Every batch is a function of (seed, step), so that an
interrupted run ends with the same weights as an uninterrupted one.
"""

import json
import random
from pathlib import Path

from support.cli import UserError, reading

import torch
from torch import nn
from tqdm import tqdm

from support.files import whole

SEED = 0
EARLIER = "a file that an earlier run of `python -m mini.pretrain` wrote"


def fit(name, modules, loss_of, steps, lr, args, preview=None, decay=0.3, every=250):
    """Minimise loss_of(step, rng, generator) over the trainable parameters of modules with AdamW.

    lr: the peak learning rate, after a warm-up of 200 steps. decay: the share of steps, at the end,
    over which the rate falls to zero. preview(step): returns scores to log with the loss.
    every: steps between saves to args.out/NAME.pt, from which the next call resumes.
    """
    file = Path(args.out, f"{name}.pt")
    params = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    start, average = 0, None
    if file.exists():
        with reading(file, EARLIER):
            state = torch.load(file, map_location=args.device, weights_only=True)
            modules.load_state_dict(state["modules"])
            optimizer.load_state_dict(state["optimizer"])
            start = state["step"]
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5)
    for step in bar:
        rate = lr * min(1.0, (step + 1) / 200, (steps - step) / (decay * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rng = random.Random(f"{SEED} {name} {step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        loss = loss_of(step, rng, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if step % 10 == 0 or average is None:
            average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
            bar.set_postfix(loss=f"{average:.4f}", lr=f"{rate:.1e}")
        if (step + 1) % every and step + 1 < steps:
            continue
        scores = preview(step + 1) if preview else {}
        state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict()}
        with whole(file) as partial:
            torch.save(state | {"step": step + 1}, partial)
        line = json.dumps({"step": step + 1, "loss": round(average, 5)} | scores)
        tqdm.write(line)
        with Path(args.out, f"{name}.jsonl").open("a", encoding="utf-8") as log:
            log.write(line + "\n")
    return modules.eval()


def trained(name, modules, args):
    """Load the weights of a trained part into modules, and freeze them."""
    file = Path(args.out, f"{name}.pt")
    if not file.exists():
        raise UserError(f"{file}: no such file; first run `python -m mini.pretrain {name}`")
    with reading(file, EARLIER):
        state = torch.load(file, map_location=args.device, weights_only=True)["modules"]
        modules.load_state_dict(state)
    return modules.to(args.device).eval().requires_grad_(False)
