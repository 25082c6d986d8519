"""Speed and memory as ratios, measured in one run: against diffusers, and against the official way.

    python -m tools.bench                           # all parts, or some: step request
    python -m tools.bench --device cuda --full      # SD3.5-large and Qwen2-VL-2B, random weights

Contestants first show that they compute the same numbers, then take turns. A time is the median
over the rounds and a ratio the median of the rounds' ratios. diffusers and peft are contestants only
(pip install diffusers peft); their rows are left out where they are missing. The official way runs
LMM and ViT inside the sampling loop and keeps nothing from step to step.
"""

import itertools
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from copy import deepcopy
from dataclasses import replace
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
from checkpoints import read_json
from data import training_example
from dream_engine import LMM, STAGE1, DreamEngine, new_adapter
from lmm import PatchConfig, Qwen2VL, load_tokenizer
from mini import world
from mmdit import FAMILIES, MMDiT, MMDiTConfig
from prompts import apply_task, to_tensor
from support.cli import Parser, UserError, one_line_errors, reading
from support.fast import compile_blocks, compiling, save_memory, usable_device
from support.files import table, write_json, write_text
from tools.contestants import Reference, contestants, inputs_of, official, samplers
from vae import VAE, VAEConfig

MINIATURE = MMDiTConfig(6, 128, 32, 8, positions=4, context_dim=128, pooled_dim=128)
GROWTH = replace(MINIATURE, positions=64)
SIZES = [(n, 16) for n in (64, 256, 1024, 4096)] + [(64, n) for n in (64, 256, 1024, 2048)]
MID = MMDiTConfig(12, 768, positions=32)
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
LARGE = {
    "mmdit": FAMILIES["SD3.5-large"],
    "lmm": {  # Qwen2-VL-2B
        "text_config": {
            "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151936,
            "num_attention_heads": 12, "num_key_value_heads": 2, "rope_parameters": ROPE,
        },
        "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536},
    },
    "vae": VAEConfig(),
    "size": 1024,
}  # fmt: skip


# ---- measuring ----------------------------------------------------------------------------------


def flops(config, batch, image, text):
    """Multiplications and additions of a velocity's attention and linear layers, less adaLN's."""
    D, n = config.width, image + text
    block = 24 * n * D**2 + 4 * n**2 * D
    last = (24 * image + 6 * text) * D**2 + 4 * image * n * D
    dual = len(config.dual) * (8 * image * D**2 + 4 * image**2 * D)
    ends = 4 * image * D * config.channels * config.patch**2
    return batch * ((config.depth - 1) * block + last + dual + ends)


def difference(results, tolerance=1e-4):
    """The largest relative difference to the first of some tensors; ValueError if too large."""
    first, *others = (x.float() for x in results)
    largest = max((((x - first).norm() / first.norm()).item() for x in others), default=0.0)
    if not largest <= tolerance:
        raise ValueError(f"contestants disagree: relative difference {largest:.1e}")
    return largest


def race(functions, rounds, device=None):
    """{name: seconds of each round}; the functions take turns, each once untimed first."""
    times, names = defaultdict(list), list(functions)
    for i in tqdm(range(rounds + 1), ", ".join(names), leave=False):
        for name in names if i % 2 else reversed(names):
            start = time.perf_counter()
            functions[name]()
            if device and device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def rows_of(times, unit, base, steps=1):
    """[{"": name, unit: milliseconds a step, "of base": ratio}], no ratio where base is missing."""
    rows = []
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times.get(base, ()))]
        ratio = median(ratios) if ratios else None
        rows.append({"": name, unit: 1000 * median(seconds) / steps, f"of {base}": ratio})
    return rows


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


def sampling(config, device, tokens, steps, rounds, dtype=torch.float32):
    """A step of sampling with guidance; tokens: of image and text."""
    models = contestants(config, device, dtype)
    inputs, ours = inputs_of(config, *tokens, 2, device, dtype), models["ours"]
    draw, about = samplers(models, inputs, steps), {"tokens": list(tokens), "dtype": str(dtype)}
    twin = deepcopy(ours, {id(x): x for x in (*ours.parameters(), *ours.buffers())})
    compile_blocks(twin)
    compiled = samplers({"ours": twin}, inputs, steps)["ours"]
    start = time.perf_counter()
    try:
        with compiling():
            compiled()
        draw["ours, compiled"] = compiled
        about["seconds to compile"] = time.perf_counter() - start
    except UserError as error:
        about["not compiled"] = str(error)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    drawn = [f() - inputs[0][:1] for f in draw.values()]
    about["largest relative difference"] = difference(drawn, tolerance)
    side = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    times = race(draw | {"GEMM": lambda: a @ b}, rounds, device)
    rate = 2 * side**3 / median(times.pop("GEMM"))
    about["GEMM, TFLOP/s"] = rate / 1e12
    rows, work = rows_of(times, "ms a step", "diffusers", steps), flops(config, 2, *tokens)
    for row in rows:
        row["of the GEMM rate"] = 1000 * work / row["ms a step"] / rate
    return {"rows": rows, **about}


def step(device):
    """A step of sampling with guidance, in the miniature."""
    return sampling(MINIATURE, device, (16, 14), steps=28, rounds=60)


def mid(device):
    """A step of sampling with guidance, 12 blocks of 768."""
    return sampling(MID, device, (1024, 128), steps=2, rounds=7)


def request(device, steps=28):
    """A request in the miniature, from a prompt with two pictures to a picture: 28 steps, guidance."""
    engine, models = DreamEngine.load(device=device), contestants(MINIATURE, device)
    engine.mmdit = ours = models["ours"]
    kinds = ("red", "circle"), ("blue", "star")
    circle, star = (world.portrait(world.Object(*kind, 4)) for kind in kinds)
    prompt = ["top left ", circle, ", center ", star, ", white background"]
    ways = {
        f"official way, transformer of {name}": partial(official, engine, model, prompt, steps)
        for name, model in models.items()
    }
    base = next(iter(ways))
    with_mask = partial(official, engine, ours, prompt, steps, is_masked=True)
    ways["official way, ours, padding masked"] = with_mask
    ways["ours"] = partial(engine.generate, [prompt], steps)
    *unmasked, masked, fast = (np.asarray(way()[0], dtype=float) for way in ways.values())
    apart = max(abs(unmasked[0] - unmasked[-1]).max(), abs(masked - fast).max())
    if apart > 1:
        raise ValueError(f"contestants disagree: by {apart:g} of 255")
    times = race(ways, 15, device)
    times["the official way"] = times[base]
    rows = rows_of(times, "ms", "the official way")[:-1]
    return {"rows": rows, "largest difference of 255": apart}


def example_batch(engine, task, size):
    """(Batch, images) of one example again and again, as diffusers masks no padding."""
    rng, side = random.Random(0), engine.default_size
    record = world.Examples().record(1, task, rng)
    task, prompt, target = training_example(record, (side, side), rng)
    prompt, _ = apply_task(task, prompt)
    return engine.lmm.collate([prompt] * size), to_tensor([target] * size)


def training_step(engine, batches, device):
    """A function that takes a training step on each (Batch, images) and returns the losses."""
    params = [p for p in engine.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, 1e-5, betas=(0.9, 0.98), fused=True)
    torch.manual_seed(0)  # the same noise for every contestant
    inputs = []
    for batch, images in batches:
        n, _, height, width = images.shape
        noise = torch.randn(n, engine.mmdit.config.channels, height // 8, width // 8)
        inputs.append((batch, images, noise, flow.training_sigmas(n), torch.rand(n)))

    def step(example):
        loss = engine(*(x.to(device) for x in example)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return lambda: torch.stack([step(example) for example in inputs])


def training(device, size=16):
    """A training step of 16 examples in the miniature; of it the transformer, forward and backward."""
    rows, apart, rank = [], 0, 16
    for stage, tasks in (1, ("t2i", "i2i")), (2, ("t2i", "i2i", "edit", "objects")):
        steps, passes = {}, {}
        for name, model in contestants(MINIATURE, device).items():
            torch.manual_seed(0)  # for a new adapter
            checkpoint = STAGE1 if stage == 2 else None
            engine = DreamEngine.load(checkpoint=checkpoint, device=device, merge=False)
            engine.mmdit, is_theirs = model, isinstance(model, Reference)
            engine.start_training(rank if stage == 2 and not is_theirs else None)
            if stage == 2 and is_theirs:
                model.add_lora(rank)
            batches = [example_batch(engine, task, size) for task in tasks]
            steps[name] = training_step(engine, batches, device)
            passes[name] = partial(forward_backward, model, size, device)
        losses = [f() for f in steps.values()]  # LoRA's B is zero until the first step
        apart = max(apart, difference(losses))
        whole = rows_of(race(steps, 15, device), "ms", "diffusers", len(tasks))
        parts = rows_of(race(passes, 30, device), "transformer, ms", "diffusers")
        for row, part in zip(whole, parts):
            row["of diffusers and peft"] = row.pop("of diffusers")
            rows.append(row | part | {"": f"stage {stage}, {row['']}"})
    return {"rows": rows, "largest relative difference of losses": apart}


def forward_backward(model, batch, device):
    """What a training step asks of the transformer, at 16 image and 16 text tokens."""
    latent, txt, vec = inputs_of(model.config, 16, 16, batch, device)
    model(latent, 0.5, txt.requires_grad_(), vec.requires_grad_()).sum().backward()


def growth(device):
    """Time and memory of a step of sampling with guidance against tokens, six blocks of 128."""
    models, rows, apart, steps = contestants(GROWTH, device), [], 0, 2
    for image, text in SIZES:
        inputs = inputs_of(GROWTH, image, text, 2, device)
        draw = samplers(models, inputs, steps)
        apart = max(apart, difference([f() - inputs[0][:1] for f in draw.values()]))
        times = rows_of(race(draw, 7, device), "ms a step", "diffusers", steps)
        (ours,) = (row for row in times if row.pop("") == "ours")
        row = {"image tokens": image, "text tokens": text, **ours}
        rows.append(row | {"MB": 1000 * peak(device, draw["ours"])})
    return {"rows": rows, "largest relative difference": apart}


def start(device):
    """`python sample.py` from the start to the file."""
    run = partial(subprocess.run, cwd=Path(__file__).parents[1], check=True, capture_output=True)
    with tempfile.TemporaryDirectory() as folder:
        whole = [sys.executable, "sample.py", "--prompt", "a red circle", "--device", str(device)]
        whole += ["--out", f"{folder}/a.png"]
        imports = [sys.executable, "-c", "import sample"]
        times = race({"imports alone": partial(run, imports), "whole": partial(run, whole)}, 9)
    return {"rows": [{"": name, "s": median(seconds)} for name, seconds in times.items()]}


# ---- at full size -------------------------------------------------------------------------------


def full(device, models=LARGE, rounds=3):
    """SD3.5-large and Qwen2-VL-2B of random weights: velocity, pictures, training."""
    dtype, side = torch.float32 if device.type == "cpu" else torch.bfloat16, models["size"]
    tokens = (side // 16) ** 2, 333
    step = sampling(models["mmdit"], device, tokens, 2, rounds, dtype)
    picture = Image.new("RGB", (336, 336), "red")
    prompt = ["a photo of ", picture, " next to ", picture, " on a table in the garden"]
    requests, drawn, steps = [], [], []
    for name in ("all on the device", "low memory"):
        engine = random_engine(models, device, dtype)
        if name == "low memory":
            save_memory(engine.to("cpu"), device)
        draw = partial(engine.generate, [prompt], size=(side, side))
        seconds = median(race({"picture": draw}, rounds, device)["picture"])
        memory = peak(device, draw) + resident(engine, device)
        row = {"": name, "s a picture": seconds, "GB": memory}
        requests.append(row | {"of it MM-DiT, GB": resident(engine.mmdit, device)})
        drawn += draw()
        del engine, draw
    apart = abs(np.subtract(*(np.asarray(image, dtype=float) for image in drawn))).max()
    for stage, rank in (1, None), (2, 32):
        engine = random_engine(models, device, dtype)
        engine.mmdit.checkpointing = True
        engine.start_training(rank)
        images = torch.rand(8, 3, side // 2, side // 2) * 2 - 1
        run = training_step(engine, [(engine.lmm.collate([prompt] * 8), images)], device)
        seconds = median(race({"step": run}, rounds, device)["step"])
        name = f"stage {stage}, 8 of {side // 2} x {side // 2}"
        steps.append({"": name, "steps a second": 1 / seconds})
        del engine, run
    request = f"Two pictures and words to a picture, {side} x {side}, 28 steps, guidance."
    return {
        "full step": {"about": "A step of sampling with guidance, SD3.5-large.", **step},
        "full request": {"about": request, "rows": requests, "largest difference of 255": apart},
        "full training": {"about": "Training, blocks computed twice.", "rows": steps},
    }


def random_engine(models, device, dtype):
    torch.manual_seed(0)
    with device:
        transformer, vae = MMDiT(models["mmdit"]).to(dtype), VAE(models["vae"])
        language = Qwen2VLModel(Qwen2VLConfig(**models["lmm"])).to(dtype)
    language = Qwen2VL(language, load_tokenizer(LMM), PatchConfig())
    adapter = new_adapter(language, transformer)
    return DreamEngine(language, adapter, transformer, vae).eval().requires_grad_(False)


def resident(module, device):
    """GB of a module's tensors on a device."""
    tensors = module.state_dict().values()
    return sum(x.nbytes for x in tensors if x.device.type == device.type) / 1e9


# ---- report -------------------------------------------------------------------------------------

PARTS = {f.__name__: f for f in (step, mid, request, training, growth, start)}


def report(results):
    """All results as Markdown."""

    def cell(x):
        if isinstance(x, float):
            return f"{x:.0f}" if x >= 100 else f"{x:.3g}"
        return "" if x is None else str(x)

    parts = []
    for name, part in results.items():
        rows = part["rows"]
        parts.append(f"**{name}**: {part['about']}")
        parts.append(table(list(rows[0]), [[cell(x) for x in row.values()] for row in rows]))
        about = {k: v for k, v in part.items() if k not in ("rows", "about")}
        if about:
            parts.append("; ".join(f"{k}: {cell(v)}" for k, v in about.items()))
    return "\n\n".join(parts) + "\n"


def main(arguments=None):
    parser = Parser(prog="python -m tools.bench", description=__doc__.splitlines()[0])
    names = ", ".join(PARTS)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {names}; default: all")
    parser.add_argument("--full", action="store_true", help=full.__doc__)
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda if there is one")
    parser.add_argument("--out", help="folder to write bench.json and bench.md to")
    args = parser.parse_args(arguments)
    if unknown := [part for part in args.parts if part not in PARTS]:
        raise UserError(f"unknown part {unknown[0]!r}: expected some of {names}")
    if args.full and args.parts:
        raise UserError("--full is a run of its own: name no parts with it")
    device, place = usable_device(args.device), f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        place = torch.cuda.get_device_name()
    elif args.full:
        raise UserError("--full needs a GPU; without --full mid is the largest size")
    results, earlier, file = {}, {}, args.out and Path(args.out, "bench.json")
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        earlier = read_json(file) if file.exists() else {}
        with reading(file, "the results of an earlier run"):
            report(earlier)
    for name in tqdm(["full"] if args.full else args.parts or PARTS, "parts"):
        parts = full(device) if args.full else {name: PARTS[name](device)}
        for part in parts.values():
            part.setdefault("about", PARTS[name].__doc__ if name in PARTS else "")
            part["on"] = place
        results |= parts
        if file:
            write_json(file, earlier | results)
            write_text(file.with_suffix(".md"), report(earlier | results))
    print(report(results))


if __name__ == "__main__":
    with one_line_errors():
        main()
