"""Speed and memory as ratios, measured in one run: against diffusers, and against the official way.

    python -m tools.bench                           # all parts, or some: step request
    python -m tools.bench --device cuda --full      # SD3.5-large and Qwen2-VL-2B, random weights

Contestants first show that they compute the same numbers, then take turns. A time is the median
over the rounds and a ratio the median of the rounds' ratios. Where diffusers and peft are missing
(pip install diffusers peft), so are their rows.
"""

import itertools
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
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import Qwen2VLConfig, Qwen2VLModel

import flow
from checkpoints import read_json
from dream_engine import LMM, DreamEngine, new_adapter
from lmm import PatchConfig, Qwen2VL, load_tokenizer
from mini.cases import picture
from mmdit import FAMILIES, MMDiT, MMDiTConfig
from prompts import crop_to
from support.cli import Parser, UserError, one_line_errors, reading
from support.fast import compile_blocks, prepared, save_memory, usable_device
from support.files import table, write_json, write_text
from tools.contestants import Reference, contestants, inputs_of, official, samplers
from vae import VAE, VAEConfig

MINIATURE = MMDiTConfig(6, 128, 32, 8, positions=3, context_dim=128, pooled_dim=128)
GROWTH = replace(MINIATURE, positions=64)
SIZES = [(n, 16) for n in (64, 256, 1024, 4096)] + [(64, n) for n in (64, 256, 1024, 2048)]
MID = MMDiTConfig(12, 768, positions=32)
LARGE = FAMILIES["SD3.5-large"], VAEConfig(), {  # and Qwen2-VL-2B
    "text_config": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151936,
        "num_attention_heads": 12, "num_key_value_heads": 2, "rope_parameters":
        {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536},
}  # fmt: skip


# ---- measuring ----------------------------------------------------------------------------------


def flops(model, latent, txt, vec):
    """Multiplications and additions of a velocity's attention and linear layers, less adaLN's."""
    with prepared(model, [0.5], vec) as go_to:
        go_to(0.5)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(latent, 0.5, txt, vec)
    return counter.get_total_flops()


def difference(results, tolerance=1e-4):
    """The largest relative difference to the first of some tensors; ValueError if too large."""
    first, *others = (x.float() for x in results)
    apart = [((x - first).norm() / first.norm()).item() for x in others]
    if not all(x <= tolerance for x in apart):
        raise ValueError(f"contestants disagree: relative differences {apart}")
    return max(apart, default=0.0)


def race(functions, rounds):
    """{name: seconds of each round}; the functions take turns, each once untimed first."""
    times, names = defaultdict(list), list(functions)
    for i in tqdm(range(rounds + 1), ", ".join(names), leave=False):
        for name in names if i % 2 else reversed(names):
            start = time.perf_counter()
            functions[name]()
            if torch.cuda.is_initialized():
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


# ---- parts: a device to {"rows": ..., and what else is to tell}; the docstring is the title ------


def sampling(where, config, tokens, steps, rounds, dtype=torch.float32, *, device):
    """A step of sampling with guidance; tokens: of image and text."""
    inputs = inputs_of(config, *tokens, 2, device, dtype)
    models = contestants(config, device, dtype)
    ours = models["ours"]
    twin = deepcopy(ours, {id(x): x for x in (*ours.parameters(), *ours.buffers())})
    compile_blocks(twin)
    draw, start = samplers(models | {"ours, compiled": twin}, inputs, steps), time.perf_counter()
    draw["ours, compiled"]()
    about = {"tokens": list(tokens), "dtype": str(dtype)}
    about["seconds to compile"] = time.perf_counter() - start
    drawn = [f() - inputs[0][:1] for f in draw.values()]
    apart = difference(drawn, 1e-4 if dtype == torch.float32 else 0.05)
    side = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    times = race(draw | {"GEMM": lambda: a @ b}, rounds)
    rate = 2 * side**3 / median(times.pop("GEMM"))
    rows, work = rows_of(times, "ms a step", "diffusers", steps), flops(ours, *inputs)
    for row in rows:
        row["of the GEMM rate"] = 1000 * work / row["ms a step"] / rate
    about |= {"largest relative difference": apart, "GEMM, TFLOP/s": rate / 1e12}
    return {"about": f"A step of sampling with guidance, {where}.", "rows": rows, **about}


def prompt_of(side):
    """Words and two pictures of side x side pixels."""
    pictures = (picture(pair) for pair in (("red", "circle"), ("blue", "star")))
    circle, star = (crop_to(image, side, side) for image in pictures)
    return ["top left ", circle, ", center ", star, ", white background"]


def request(device, steps=28):
    """A request in the miniature, from a prompt with two pictures to a picture: 28 steps, guidance."""
    engine, models = DreamEngine.load(device=device), contestants(MINIATURE, device)
    engine.mmdit, prompt = models["ours"], prompt_of(16)
    theirs = partial(official, engine, prompt=prompt, steps=steps)
    ways = {
        f"official way, transformer of {name}": partial(theirs, m) for name, m in models.items()
    }
    base = next(iter(ways))
    ways["official way, ours, padding masked"] = partial(theirs, engine.mmdit, is_masked=True)
    ways["ours"] = partial(engine.generate, [prompt], steps, guidance=4.5)
    *unmasked, masked, fast = (np.asarray(way()[0], dtype=float) for way in ways.values())
    apart = max(abs(unmasked[0] - unmasked[-1]).max(), abs(masked - fast).max())
    if apart > 1:
        raise ValueError(f"contestants disagree: by {apart:g} of 255")
    times = race(ways, 15)
    rows = rows_of(times | {"the official way": times[base]}, "ms", "the official way")
    return {"rows": rows[:-1], "largest difference of 255": apart}


def training_step(engine, prompt, size, side, device):
    """A function that takes a training step on size times a prompt and returns the losses."""
    params = [p for p in engine.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, 1e-5, betas=(0.9, 0.98), fused=True)
    torch.manual_seed(0)  # the same pictures and noise for every contestant
    images = torch.rand(size, 3, side, side) * 2 - 1
    noise = torch.randn(size, engine.mmdit.config.channels, side // 8, side // 8)
    batch = engine.lmm.collate([prompt] * size)  # equally long, as diffusers masks no padding
    inputs = batch, images, noise, flow.training_sigmas(size), torch.rand(size)

    def step():
        losses = engine(*(x.to(device) for x in inputs))
        losses.mean().backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return losses.detach()

    return step


def training(device, size=16):
    """A training step of 16 examples in the miniature; of it the transformer, forward and backward."""
    rows, apart = [], 0
    for stage, rank in (1, None), (2, 16):
        steps, passes = {}, {}
        for name, model in contestants(MINIATURE, device).items():
            torch.manual_seed(0)  # for a new adapter
            engine = DreamEngine.load(checkpoint=None, device=device)
            engine.mmdit, is_theirs = model, isinstance(model, Reference)
            engine.start_training(None if is_theirs else rank)
            if rank and is_theirs:
                model.add_lora(rank)
            steps[name] = training_step(engine, prompt_of(16), size, engine.default_size, device)
            passes[name] = partial(forward_backward, model, size, device)
        losses = [f() for f in steps.values()]  # LoRA's B is zero until the first step
        apart = max(apart, difference(losses))
        whole = rows_of(race(steps, 15), "ms", "diffusers")
        parts = rows_of(race(passes, 30), "transformer, ms", "diffusers")
        for row, part in zip(whole, parts):
            row["of diffusers and peft"] = row.pop("of diffusers")
            rows.append(row | part | {"": f"stage {stage}, {row['']}"})
    return {"rows": rows, "largest relative difference of losses": apart}


def forward_backward(model, batch, device):
    """What a training step asks of the transformer, at 9 image and 16 text tokens."""
    latent, txt, vec = inputs_of(model.config, 9, 16, batch, device)
    model(latent, 0.5, txt.requires_grad_(), vec.requires_grad_()).sum().backward()


def growth(device):
    """Time and memory of a step of sampling with guidance against tokens, six blocks of 128."""
    models, rows, apart, steps = contestants(GROWTH, device), [], 0, 2
    for image, text in SIZES:
        inputs = inputs_of(GROWTH, image, text, 2, device)
        draw = samplers(models, inputs, steps)
        apart = max(apart, difference([f() - inputs[0][:1] for f in draw.values()]))
        times = rows_of(race(draw, 7), "ms a step", "diffusers", steps)
        (ours,) = (row for row in times if row.pop("") == "ours")
        row = {"image tokens": image, "text tokens": text, **ours}
        rows.append(row | {"MB": 1000 * peak(device, draw["ours"])})
    return {"rows": rows, "largest relative difference": apart}


def start(device):
    """`python sample.py` from the start to the file."""
    run = partial(subprocess.run, cwd=Path(__file__).parents[1], check=True, capture_output=True)
    with tempfile.TemporaryDirectory() as folder:
        imports = [sys.executable, "-c", "import sample"]
        whole = [sys.executable, "sample.py", "--prompt", "a red circle"]
        whole += ["--device", str(device), "--out", f"{folder}/a.png"]
        times = race({"imports alone": partial(run, imports), "whole": partial(run, whole)}, 9)
    return {"rows": [{"": name, "s": median(seconds)} for name, seconds in times.items()]}


# ---- parts at full size, of random weights ------------------------------------------------------


def random_engine(device):
    torch.manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    config, vae, language = LARGE
    with device:
        transformer, vae = MMDiT(config).to(dtype), VAE(vae)
        language = Qwen2VLModel(Qwen2VLConfig(**language)).to(dtype)
    lmm = Qwen2VL(language, load_tokenizer(LMM), PatchConfig())
    engine = DreamEngine(lmm, new_adapter(lmm, transformer), transformer, vae)
    return engine.eval().requires_grad_(False)


def full_request(device):
    """Two pictures and words to a picture, 1024 x 1024, 28 steps, guidance."""
    rows, drawn = [], []
    for name in ("all on the device", "low memory"):
        engine = random_engine(device)
        if name == "low memory":
            save_memory(engine.to("cpu"), device)
        draw = partial(engine.generate, [prompt_of(336)])
        row = {"": name, "s a picture": median(race({name: draw}, 3)[name])}
        there = [x.nbytes for x in engine.state_dict().values() if x.device.type == device.type]
        rows.append(row | {"GB": peak(device, draw) + sum(there) / 1e9})
        drawn.append(np.asarray(draw()[0], dtype=float))
        del engine, draw
    return {"rows": rows, "largest difference of 255": abs(np.subtract(*drawn)).max()}


def full_training(device):
    """Training, blocks computed twice."""
    rows = []
    for stage, rank in (1, None), (2, 32):
        engine = random_engine(device)
        engine.mmdit.checkpointing, side = True, engine.default_size // 2
        engine.start_training(rank)
        name = f"stage {stage}, 8 of {side} x {side}"
        times = race({name: training_step(engine, prompt_of(336), 8, side, device)}, 3)
        rows.append({"": name, "steps a second": 1 / median(times[name])})
        del engine, times
    return {"rows": rows}


# ---- report -------------------------------------------------------------------------------------

PARTS = {
    "step": partial(sampling, "in the miniature", MINIATURE, (9, 14), 28, 60),
    "mid": partial(sampling, "12 blocks of 768", MID, (1024, 128), 2, 7),
    **{part.__name__: part for part in (request, training, growth, start)},
}
FULL = {
    "full step": partial(sampling, "SD3.5-large", LARGE[0], (4096, 333), 2, 3, torch.bfloat16),
    "full request": full_request,
    "full training": full_training,
}


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
        parts.append(table(list(rows[0]), [map(cell, row.values()) for row in rows]))
        about = [f"{k}: {cell(v)}" for k, v in part.items() if k not in ("rows", "about")]
        parts += ["; ".join(about)] if about else []
    return "\n\n".join(parts) + "\n"


def main(arguments=None):
    parser = Parser(prog="python -m tools.bench", description=__doc__.splitlines()[0])
    names = ", ".join(PARTS)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {names}; default: all")
    parser.add_argument("--full", action="store_true", help="SD3.5-large, Qwen2-VL-2B: on a GPU")
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
    file = args.out and Path(args.out, "bench.json")
    results = read_json(file) if file and file.exists() else {}
    with reading(file, "the results of an earlier run"):
        report(results)
    parts = FULL if args.full else {name: PARTS[name] for name in args.parts or PARTS}
    for name, part in tqdm(parts.items(), "parts"):
        results[name] = {"about": part.__doc__} | part(device=device) | {"on": place}
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, results)
            write_text(file.with_suffix(".md"), report(results))
    print(report(results))


if __name__ == "__main__":
    with one_line_errors():
        main()
