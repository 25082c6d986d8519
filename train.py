"""Train Dream Engine. Stage 1: the adapter alone, so that the MM-DiT understands the LMM.

    python train.py --stage 1                # the miniature, on rendered scenes

Half of the batches are text -> image, half image -> image, each picture being its own prompt, with
the blend's r drawn anew; LMM, MM-DiT and VAE stay frozen. Run it again to go on where it stopped:
--out holds stage1.safetensors, for `sample.py --checkpoint`, beside it the optimizer's state, and
every batch is a function of (seed, step). Samples and a loss curve are drawn as it goes.
"""

import os
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

import flow
import shapes
from cli import Parser, one_line_errors
from data import apply_task, to_tensor
from dream_engine import LMM, SD3, DreamEngine

NULL_SHARE = 0.1  # of the prompts become the null prompt, so that guidance knows its opposite


def make_batch(rng, size):
    """A batch of one task: its prompts, templates applied, and the scenes to be drawn."""
    task = rng.choice(("t2i", "i2i"))
    prompts, scenes = [], []
    for _ in range(size):
        kind = rng.choice((*shapes.TASKS, "scene"))
        scene = shapes.sample_scene(kind, rng)
        source = shapes.caption(scene, kind, rng).text if task == "t2i" else shapes.render(scene)
        positive, null = apply_task(task, [source])
        prompts.append(null if rng.random() < NULL_SHARE else positive)
        scenes.append(scene)
    return prompts, scenes


def loss_of(engine, prompts, scenes, generator):
    """The flow-matching loss of drawing each scene from its prompt: (B,)."""
    device = engine.device
    n = len(prompts)
    with torch.no_grad():
        x0 = engine.vae.encode(to_tensor([shapes.render(scene) for scene in scenes]).to(device))
    noise = torch.randn(x0.shape, generator=generator).to(device)
    t = flow.training_sigmas(n, generator=generator).to(device)
    r = torch.rand(n, generator=generator).to(device)
    condition = engine.condition(engine.collate(prompts), r)
    z = flow.add_noise(x0, noise, t).to(condition.txt.dtype)
    velocity = engine.mmdit(z, t, condition.txt, condition.vec, condition.mask)
    return flow.velocity_loss(velocity, x0, noise)


def learning_rate(step, steps, peak, warmup=100):
    """Linear warm-up, constant, linear to zero over the last 30 %."""
    return peak * min(1, (step + 1) / warmup, (steps - step) / (0.3 * steps))


def train(engine, args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, resume = out / "stage1.safetensors", out / "stage1.state.pt"
    engine.requires_grad_(False)
    params = list(engine.adapter.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(params, args.lr, betas=(0.9, 0.98), weight_decay=1e-4)
    start, losses = 0, []
    if resume.exists():
        state = torch.load(resume, map_location=engine.device, weights_only=True)
        if state["settings"] != settings(args):
            raise ValueError(f"{resume}: of a run with other settings; choose another --out")
        engine.adapter.load_state_dict(state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        start, losses = state["step"], state["losses"]

    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="stage 1")
    for step in bar:
        rng = random.Random(f"{args.seed} stage 1 {step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)

        loss = loss_of(engine, *make_batch(rng, args.batch), generator).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(params, 1.0)
        if not norm.isfinite():
            raise ValueError(f"step {step}: the gradient is not finite; try a smaller --lr")
        optimizer.step()

        losses.append(loss.item())
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}", grad=f"{norm:.2f}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            state = {"step": step + 1, "losses": losses, "settings": settings(args)}
            state |= {"adapter": engine.adapter.state_dict(), "optimizer": optimizer.state_dict()}
            partial = resume.with_suffix(".partial")
            torch.save(state, partial)
            os.replace(partial, resume)
            engine.save(checkpoint, stage=1, step=step + 1, seed=args.seed)
            curve(losses).save(out / "loss.png")
            samples(engine).save(out / "samples.png")
    print(checkpoint)


def settings(args):
    """What a resumed run must share with the run it goes on with."""
    return {name: getattr(args, name) for name in ("steps", "batch", "lr", "seed")}


def samples(engine, n=8):
    """Two rows drawn from text, then a row of pictures and the row of their copies."""
    rng = random.Random("samples")
    texts = [[shapes.sample_prompt(shapes.TASKS[i % 6], rng).text] for i in range(2 * n)]
    originals = [shapes.render(shapes.sample_scene("scene", rng)) for _ in range(n)]
    drawn = engine.generate(texts, steps=12)
    copies = engine.generate([[image] for image in originals], steps=12, task="i2i")
    rows = [drawn[:n], drawn[n:], originals, copies]
    side = originals[0].width + 4
    sheet = Image.new("RGB", (n * side, len(rows) * side), "gray")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * side + 2, y * side + 2))
    return sheet.resize((2 * sheet.width, 2 * sheet.height), Image.NEAREST)


def curve(losses, width=640, height=320):
    """The loss over the steps, averaged over a hundredth of them, as a picture."""
    window = max(1, len(losses) // 100)
    means = [
        sum(losses[i : i + window]) / window for i in range(0, len(losses) - window + 1, window)
    ]
    low, high = min(means), max(means)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    points = [
        (
            40 + (width - 60) * i / max(1, len(means) - 1),
            20 + (height - 50) * (high - y) / (high - low or 1),
        )
        for i, y in enumerate(means)
    ]
    draw.line(points, fill="black", width=2)
    draw.text((4, 14), f"{high:.3f}", fill="black")
    draw.text((4, height - 36), f"{low:.3f}", fill="black")
    draw.text((40, height - 20), f"loss over {len(losses)} steps", fill="black")
    return sheet


def main(arguments=None):
    parser = Parser(description="Train Dream Engine's adapter (stage 1).")
    add = parser.add_argument
    add("--stage", type=int, choices=[1], required=True)
    add("--steps", type=int, default=3000)
    add("--batch", type=int, default=64)
    add("--lr", type=float, default=2e-3)
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=250, help="steps between checkpoints and pictures")
    add("--out", default="runs/stage1", help="folder of checkpoint, state and pictures")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("--sd3", default=SD3, help="SD3 / SD3.5: single file or diffusers folder")
    add("--lmm", default=LMM, help="Qwen2-VL: Hugging Face folder")
    args = parser.parse_args(arguments)
    for name in ("steps", "batch", "save_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    torch.manual_seed(args.seed)
    train(DreamEngine.load(args.sd3, args.lmm, None, args.device), args)


if __name__ == "__main__":
    with one_line_errors():
        main()
