"""Speed and memory as ratios, measured in one run: against diffusers, and against the official way.

    python bench.py                           # all but full, or some: step request
    python bench.py --device cuda --full      # SD3.5-large and Qwen2-VL-2B, random weights

Contestants first show that they compute the same numbers, then take turns. A time is the median
over the rounds and a ratio the median of the rounds' ratios. diffusers and peft are contestants only
(pip install diffusers peft); their rows are left out where they are missing. The official way runs
LMM and ViT inside the sampling loop and keeps nothing from step to step.
"""

import itertools
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import Qwen2VLConfig, Qwen2VLModel

import flow
import mmdit
import shapes
import train
from adapter import Adapter
from claims import table, write
from cli import Parser, one_line_errors
from dream_engine import LMM, STAGE1, DreamEngine, load_tokenizer, noise, usable_device
from prompts import PatchConfig, apply_task, to_images, to_tensor
from vae import VAE, VAEConfig

try:
    from diffusers import SD3Transformer2DModel
    from peft import LoraConfig, inject_adapter_in_model
except ImportError:
    SD3Transformer2DModel = None

PEFT_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
]
MINIATURE = mmdit.MMDiTConfig(6, 128, 32, 8, 2, 4, 128, 128)
MID = mmdit.MMDiTConfig(12, 768, positions=32)
GROWTH = mmdit.MMDiTConfig(6, 128, 32, 8, 2, 64, 128, 128)
LARGE = {
    "mmdit": mmdit.FAMILIES["SD3.5-large"],
    "lmm": {
        "text_config": {
            "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
            "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24],
            },
        },
        "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536},
    },
    "vae": VAEConfig(),
    "size": 1024,
}  # fmt: skip


no_grad = torch.no_grad()


# ---- contestants --------------------------------------------------------------------------------


class Reference(nn.Module):
    """diffusers' transformer under our signature; Dream Engine's conditions bypass its embedders."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = SD3Transformer2DModel(
            sample_size=2 * config.positions,
            patch_size=config.patch,
            in_channels=config.channels,
            out_channels=config.channels,
            num_layers=config.depth,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.width // config.head_dim,
            caption_projection_dim=config.width,
            joint_attention_dim=config.context_dim,
            pooled_projection_dim=config.pooled_dim,
            pos_embed_max_size=config.positions,
            dual_attention_layers=config.dual,
            qk_norm="rms_norm",
        )
        self.eval().requires_grad_(False)
        self.pos_embed = self.transformer.pos_embed.pos_embed  # the engine asks for its dtype

    def ours(self):
        """An MMDiT of the same weights; only then are the embedders bypassed."""
        like = self.transformer.pos_embed.proj.weight
        model = mmdit.build(self.transformer.state_dict(), "diffusers", like.device, like.dtype)
        self.transformer.context_embedder = nn.Identity()
        self.transformer.time_text_embed.text_embedder = nn.Identity()
        return model

    def forward(self, latent, t, txt, vec, mask=None):
        assert mask is None or mask.all(), "diffusers masks no padding"
        t = torch.as_tensor(t, dtype=torch.float32, device=latent.device).expand(len(latent))
        return self.transformer(latent, txt, vec, 1000 * t, return_dict=False)[0]


def contestants(config, device="cpu", dtype=torch.float32):
    """{name: MMDiT-like module} of equal random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        if SD3Transformer2DModel:
            reference = Reference(config).to(dtype)
            return {"diffusers": reference, "ours": reference.ours()}
        return {"ours": mmdit.MMDiT(config).to(dtype).eval().requires_grad_(False)}


def sampling(model, inputs, times):
    """A function that computes a sampling loop's velocities as the contestant would -> the last."""
    latent, txt, vec = inputs
    if isinstance(model, Reference):
        return no_grad(lambda: [model(latent, t, txt, vec) for t in times][-1])
    h, w = (side // model.config.patch for side in latent.shape[2:])
    mask = torch.ones(txt.shape[:2], dtype=torch.bool, device=txt.device)

    def loop():
        prepared = zip(times, model.prepare(times, vec, mask, h, w))
        return [model(latent, t, txt, vec, prepared=at_t) for t, at_t in prepared][-1]

    return no_grad(loop)


def gemm(device, dtype):
    """A function that multiplies two large matrices, and its FLOPs."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return lambda: a @ b, 2 * n**3


def flops(config, batch, image, text):
    """Multiplications and additions of one velocity's linear layers and attention."""
    D, n = config.width, image + text
    block = 24 * n * D**2 + 4 * n**2 * D
    last = (24 * image + 4 * text) * D**2 + 4 * image * n * D
    dual = len(config.dual) * (8 * image * D**2 + 4 * image**2 * D)
    ends = 4 * image * D * config.channels * config.patch**2
    return batch * ((config.depth - 1) * block + last + dual + ends)


# ---- measuring ----------------------------------------------------------------------------------


def same(a, b, tolerance=1e-4):
    """How far b is from a, relative; ValueError if too far."""
    distance = ((a.float() - b.float()).norm() / a.float().norm()).item()
    if not distance <= tolerance:
        raise ValueError(f"contestants disagree: relative difference {distance:.1e}")
    return distance


def race(functions, rounds, device=None):
    """{name: seconds of each round}; the functions take turns, each once untimed first."""
    times, names = defaultdict(list), list(functions)
    for i in tqdm(range(rounds + 1), f"{', '.join(names)}", leave=False):
        for name in names if i % 2 else reversed(names):
            start = time.perf_counter()
            functions[name]()
            if device and device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times, name, base):
    """Of one contestant's times to another's; None if that one is missing."""
    return median(a / b for a, b in zip(times[name], times[base])) if base in times else None


def peak(device, function):
    """GB of tensors that a call needs at most, above those there were."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    with torch.profiler.profile(profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes)) / 1e9


# ---- parts --------------------------------------------------------------------------------------


def inputs_of(config, image, text, device, dtype=torch.float32, batch=2):
    """A latent of so many image tokens, txt and vec."""
    generator, side = torch.Generator().manual_seed(0), config.patch * math.isqrt(image)
    sizes = (config.channels, side, side), (text, config.width), (config.width,)
    return [torch.randn(batch, *s, generator=generator).to(device, dtype) for s in sizes]


def steps_of(config, device, image, text, times, rounds, dtype=torch.float32):
    """Rows of one velocity in a sampling loop with guidance (batch 2), and facts about them."""
    models = contestants(config, device, dtype)
    inputs = inputs_of(config, image, text, device, dtype)
    loops = {name: sampling(model, inputs, times) for name, model in models.items()}
    ours, (multiply, of_gemm) = models["ours"], gemm(device, dtype)
    loops["ours, plain forward"] = no_grad(
        lambda: [ours(inputs[0], t, *inputs[1:]) for t in times][-1]
    )
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    expected, facts = loops["ours, plain forward"](), {"tokens": [image, text], "dtype": str(dtype)}
    twin = mmdit.build(ours.state_dict(), "ours", device, dtype)  # of the same tensors
    twin.compile_blocks()
    loops["ours, compiled"] = sampling(twin, inputs, times)
    start = time.perf_counter()
    try:
        loops["ours, compiled"]()
        facts["seconds to compile"] = time.perf_counter() - start
    except RuntimeError as error:  # no compiler
        del loops["ours, compiled"]
        facts["not compiled"] = str(error).strip().splitlines()[0]
    facts["largest relative difference"] = max(
        same(expected, f(), tolerance) for f in loops.values()
    )
    taken = race(loops | {"GEMM": multiply}, rounds, device)
    rate = of_gemm / median(taken.pop("GEMM"))
    facts["GEMM, TFLOP/s"] = rate / 1e12
    work = flops(config, 2, image, text) * len(times)
    rows = [
        {
            "": name,
            "ms a step": 1000 * median(seconds) / len(times),
            "of diffusers": ratio(taken, name, "diffusers"),
            "of the GEMM rate": work / median(seconds) / rate,
        }
        for name, seconds in taken.items()
    ]
    return {"rows": rows, **facts}


def step(device):
    """One velocity in a sampling loop with guidance, in the miniature."""
    return steps_of(MINIATURE, device, 16, 14, flow.sigma_schedule(28)[:-1].tolist(), 60)


def mid(device):
    """One velocity, 12 blocks of 768."""
    return steps_of(MID, device, 1024, 128, [1.0, 0.5], 15)


@torch.no_grad()
def official(engine, transformer, is_masked, prompts, steps=28, guidance=4.5):
    """`DreamEngine.generate` as the official code does it: the LMM at every step."""
    positives, nulls = zip(*(apply_task(None, prompt) for prompt in prompts))
    batch = engine.collate([*positives, *nulls])
    shape = (transformer.config.channels, *[engine.default_size // 8] * 2)

    def velocity(z, t):
        c = engine.condition(batch)
        z = z.to(c.txt.dtype).repeat(2, 1, 1, 1)
        cond, null = transformer(z, t, c.txt, c.vec, c.mask if is_masked else None).float().chunk(2)
        return flow.guide(cond, null, guidance)

    start = noise(len(prompts), shape, 0).to(engine.device)
    return to_images(engine.vae.decode(flow.euler(velocity, start, flow.sigma_schedule(steps))))


def request(device):
    """A request in the miniature, from a prompt with two pictures to a picture: 28 steps, guidance."""
    engine, models = DreamEngine.load(device=device), contestants(MINIATURE, device)
    engine.mmdit = models["ours"]
    kinds = ("red", "circle"), ("blue", "star")
    circle, star = (shapes.portrait(shapes.Object(*kind, 4)) for kind in kinds)
    prompt = [["top left ", circle, ", center ", star, ", white background"]]
    ways = {
        f"official way, transformer of {name}": partial(official, engine, model, False, prompt)
        for name, model in models.items()
    }
    ways["official way, ours, padding masked"] = partial(
        official, engine, engine.mmdit, True, prompt
    )
    ways["ours"] = partial(engine.generate, prompt)
    *unmasked, masked, fast = (np.asarray(way()[0], dtype=float) for way in ways.values())
    apart = max(abs(unmasked[0] - unmasked[-1]).max(), abs(masked - fast).max())
    if apart > 1:
        raise ValueError(f"contestants disagree: by {apart:g} of 255")
    taken = race(ways, 15, device)
    base = next(iter(ways))
    rows = [
        {"": name, "ms": 1000 * median(times), "of the official way": ratio(taken, name, base)}
        for name, times in taken.items()
    ]
    return {"rows": rows, "largest difference of 255": apart}


def even_batch(data, pool, size):
    """(Batch, images) of examples whose prompts are equally long: diffusers masks no padding."""
    by_length = defaultdict(list)
    for i in itertools.count():
        task, prompt, target = data.example(pool, i, random.Random(i), [])
        prompt, _ = apply_task(task, prompt)
        alike = by_length[data.collate([prompt]).ids.shape[1]]
        alike.append((prompt, target))
        if len(alike) == size:
            prompts, targets = zip(*alike)
            return data.collate(prompts), to_tensor(targets)


def training_step(engine, batches, device):
    """A function that takes one training step on each batch and returns the losses."""
    params = [p for p in engine.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, 1e-5, betas=(0.9, 0.98), fused=True)

    def steps():
        losses = []
        for i, (batch, target) in enumerate(batches):
            drawn = train.draws(0, i, target.shape, engine.mmdit.config.channels)
            inputs = [x.to(device) for x in (batch, target, *drawn)]
            loss = engine(*inputs).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    return steps


def training(device):
    """A training step of 16 examples in the miniature; of it the transformer, forward and backward."""
    rows, apart = [], 0
    for stage in (1, 2):
        steps, passes = {}, {}
        for name, model in contestants(MINIATURE, device).items():
            torch.manual_seed(0)  # for a new adapter
            checkpoint = STAGE1 if stage == 2 else None
            engine = DreamEngine.load(checkpoint=checkpoint, device=device, merge=False)
            engine.mmdit = model
            args = train.parse(["--stage", str(stage), "--size", str(engine.default_size)])
            theirs = isinstance(model, Reference)
            engine.start_training(None if theirs else args.rank)
            if theirs and args.rank:
                config = LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=PEFT_TARGETS)
                inject_adapter_in_model(config, model.transformer)
            data = train.dataset(args, engine, [(None, 1)], 1)
            batches = [even_batch(data, pool, args.batch) for pool in train.first_pools(data)]
            steps[name] = training_step(engine, batches, device)
            passes[name] = partial(forward_backward, model, args.batch, device)
        losses = [f() for f in steps.values()]  # LoRA's B is zero until the first step
        apart = max(apart, *(same(losses[-1], x) for x in losses))
        taken, of_transformer = race(steps, 15, device), race(passes, 30, device)
        rows += [
            {
                "": f"stage {stage}, {name}",
                "ms": 1000 * median(times) / len(batches),
                "of diffusers and peft": ratio(taken, name, "diffusers"),
                "transformer, ms": 1000 * median(of_transformer[name]),
                "of diffusers": ratio(of_transformer, name, "diffusers"),
            }
            for name, times in taken.items()
        ]
    return {"rows": rows, "largest relative difference of losses": apart}


def forward_backward(model, batch, device):
    """What a training step asks of the transformer, at 16 image and 16 text tokens."""
    latent, txt, vec = inputs_of(model.config, 16, 16, device, batch=batch)
    model(latent, 0.5, txt.requires_grad_(), vec.requires_grad_()).sum().backward()


def growth(device):
    """Time and memory of a velocity (batch 2) against tokens, six blocks of 128."""
    rows, apart = [], 0
    sweeps = [
        [(n, 16) for n in (64, 256, 1024, 4096)],
        [(64, n) for n in (16, 64, 256, 1024, 2048)],
    ]
    models = contestants(GROWTH, device)
    for sweep in sweeps:
        before = None
        for image, text in sweep:
            inputs, times = inputs_of(GROWTH, image, text, device), [1.0, 0.5]
            loops = {name: sampling(model, inputs, times) for name, model in models.items()}
            apart = max(apart, *(same(loops["ours"](), loop()) for loop in loops.values()))
            taken = race(loops, 7, device)
            now = image + text, median(taken["ours"]) / len(times)
            power = math.log(now[1] / before[1], now[0] / before[0]) if before else None
            before = now
            rows.append(
                {
                    "image tokens": image,
                    "text tokens": text,
                    "ms a step": 1000 * now[1],
                    "of diffusers": ratio(taken, "ours", "diffusers"),
                    "grows as tokens to the power": power,
                    "MB": 1000 * peak(device, loops["ours"]),
                }
            )
    return {"rows": rows, "largest relative difference": apart}


def start(device):
    """`python sample.py` from the start to the file."""

    def run(*arguments):
        here = Path(__file__).parent
        ended = subprocess.run(
            [sys.executable, *arguments], cwd=here, check=False, capture_output=True, text=True
        )
        if ended.returncode:
            raise ValueError(f"python {' '.join(arguments)}: {ended.stderr[-300:]}")

    with tempfile.TemporaryDirectory() as folder:
        drawing = "--prompt", "a red circle", "--out", f"{folder}/a.png", "--device", str(device)
        runs = {
            "imports alone": partial(run, "-c", "import sample"),
            "whole": partial(run, "sample.py", *drawing),
        }
        taken = race(runs, 9)
    return {"rows": [{"": name, "s": median(times)} for name, times in taken.items()]}


def full(device, models=LARGE, rounds=3):
    """SD3.5-large and Qwen2-VL-2B of random weights: velocity, pictures, training."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    config, side = models["mmdit"], models["size"]
    steps = steps_of(config, device, (side // 16) ** 2, 333, [1.0, 0.5], rounds, dtype)
    found = {"full step": {"about": "One velocity with guidance, SD3.5-large.", **steps}}
    picture = Image.new("RGB", (336, 336), "red")
    prompt = [["a photo of ", picture, " next to ", picture, " on a table in the garden"]]
    rows, drawn = [], []
    for low_memory in (False, True):
        engine = random_engine(models, device, dtype, low_memory)
        draw = partial(engine.generate, prompt, size=(side, side))
        seconds = median(race({"picture": draw}, rounds, device)["picture"])
        memory = peak(device, draw) + resident(engine, device)
        rows.append(
            {
                "": "low memory" if low_memory else "all on the device",
                "s a picture": seconds,
                "GB": memory,
                "of it MM-DiT, GB": resident(engine.mmdit, device),
            }
        )
        drawn += draw()
        del engine, draw
    difference = abs(np.subtract(*(np.asarray(image, dtype=float) for image in drawn))).max()
    about = f"Two pictures and words to a picture, {side} x {side}, 28 steps, guidance."
    found["full request"] = {"about": about, "rows": rows, "largest difference of 255": difference}
    rows = []
    for stage, rank in ((1, None), (2, 32)):
        engine = random_engine(models, device, dtype)
        engine.mmdit.checkpointing = True
        engine.start_training(rank)
        batches = [(engine.collate(prompt * 8), torch.rand(8, 3, side // 2, side // 2) * 2 - 1)]
        run = training_step(engine, batches, device)
        seconds = median(race({"step": run}, rounds, device)["step"])
        name = f"stage {stage}, 8 of {side // 2} x {side // 2}"
        rows.append({"": name, "steps a second": 1 / seconds})
        del engine, run
    found["full training"] = {"about": "Training, blocks computed twice.", "rows": rows}
    return found


def random_engine(models, device, dtype, low_memory=False):
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device:
        transformer = mmdit.MMDiT(models["mmdit"])
        lmm = Qwen2VLModel(Qwen2VLConfig(**models["lmm"]))
    torch.set_default_dtype(torch.float32)
    with device:
        width = models["lmm"]["text_config"]["hidden_size"]
        adapter, vae = Adapter(width, models["mmdit"].width), VAE(models["vae"])
    engine = DreamEngine(lmm, load_tokenizer(LMM), PatchConfig(), adapter, transformer, vae)
    engine.eval().requires_grad_(False)
    if low_memory:
        engine.to("cpu").save_memory(device)
    return engine


def resident(module, device):
    """GB of a module's tensors on a device."""
    tensors = module.state_dict().values()
    return sum(x.numel() * x.element_size() for x in tensors if x.device.type == device.type) / 1e9


# ---- report -------------------------------------------------------------------------------------

PARTS = {f.__name__: f for f in (step, mid, request, training, growth, start)}


def report(results):
    """All results as Markdown, as the README shows them."""

    def cell(x):
        if isinstance(x, float):
            return f"{x:.0f}" if x >= 100 else f"{x:.3g}"
        return "" if x is None else str(x)

    parts = []
    for name, part in results.items():
        rows = part["rows"]
        parts.append(f"**{name}**: {part['about']}")
        parts.append(table(list(rows[0]), [[cell(x) for x in row.values()] for row in rows]))
        facts = {k: v for k, v in part.items() if k not in ("rows", "about")}
        if facts:
            parts.append("; ".join(f"{k}: {cell(v)}" for k, v in facts.items()))
    return "\n\n".join(parts) + "\n"


def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: all"
    )
    parser.add_argument("--full", action="store_true", help=full.__doc__)
    parser.add_argument("--device")
    parser.add_argument("--out", help="folder to write bench.json and bench.md to")
    args = parser.parse_args(arguments)
    if unknown := [part for part in args.parts if part not in PARTS]:
        raise ValueError(f"unknown part {unknown[0]!r}: expected some of {', '.join(PARTS)}")
    if args.full and args.parts:
        raise ValueError("--full is a run of its own: name no parts with it")
    device, about = usable_device(args.device), f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        about = torch.cuda.get_device_name()
    elif args.full:
        raise ValueError("--full needs a GPU; without --full mid is the largest size")
    known, results, file = {}, {}, args.out and Path(args.out, "bench.json")
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(file.read_text()) if file.exists() else {}
    parts = ["full"] if args.full else args.parts or PARTS
    for name in tqdm(parts, "parts"):
        found = full(device) if args.full else {name: PARTS[name](device)}
        for part in found.values():
            part.setdefault("about", PARTS[name].__doc__ if name in PARTS else "")
            part["on"] = about
        results |= found
        if file:
            write(file, json.dumps(known | results, indent=1) + "\n")
            write(file.with_suffix(".md"), report(known | results))
    print(report(results))


if __name__ == "__main__":
    with one_line_errors():
        main()
