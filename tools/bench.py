"""Compare the speed of this code with that of diffusers and of the official sampling code.

    python -m tools.bench                           # all parts; or some: step request

Prints a table for each part; --out also writes bench.json and bench.md. A check that all
implementations compute the same numbers comes first. They are timed in turns; times and ratios are
medians over the rounds. The rows of diffusers need `pip install diffusers`.
"""

import math
import time
from collections import defaultdict
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median

from support.cli import Parser, one_line_errors, reading

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import flow
from checkpoints import build_mmdit, read_json
from dream_engine import Condition, DreamEngine, denoise
from mini.cases import picture
from mmdit import MMDiT, MMDiTConfig
from prompts import apply_task, to_images
from support.fast import compile_blocks, usable_device
from support.files import markdown_table, require_writable, write_json, write_text

try:
    from diffusers import SD3Transformer2DModel
except ImportError:
    SD3Transformer2DModel = None

MINIATURE = MMDiTConfig(6, 128, 32, 8, positions=3, context_dim=128, pooled_dim=128)
CIRCLE, STAR = (picture(pair) for pair in (("red", "circle"), ("blue", "star")))
PROMPT = ["top left ", CIRCLE, ", center ", STAR, ", white background"]
MID = MMDiTConfig(12, 768, positions=32)


class Reference(nn.Module):
    """diffusers' transformer with the interface of MMDiT.forward."""

    def __init__(self, config):
        super().__init__()
        self.config, positions = config, config.positions
        self.transformer = SD3Transformer2DModel(
            sample_size=2 * positions, patch_size=config.patch, pos_embed_max_size=positions,
            in_channels=config.channels, out_channels=config.channels, num_layers=config.depth,
            attention_head_dim=config.head_dim, num_attention_heads=config.width // config.head_dim,
            caption_projection_dim=config.width, joint_attention_dim=config.context_dim,
            pooled_projection_dim=config.pooled_dim, dual_attention_layers=config.dual,
            qk_norm="rms_norm",
        )  # fmt: skip
        self.eval().requires_grad_(False)
        self.pos_embed = self.transformer.pos_embed.pos_embed  # `DreamEngine` reads its dtype

    def forward(self, latent, t, txt, vec, mask=None):
        assert mask is None, "diffusers cannot mask padding"
        t = torch.as_tensor(t, dtype=torch.float32, device=latent.device).expand(len(latent))
        return self.transformer(latent, txt, vec, 1000 * t, return_dict=False)[0]


def build_models(config, device="cpu"):
    """{name: MMDiT or Reference} with the same random weights, which take Dream Engine's states."""
    torch.manual_seed(0)
    with torch.device(device):
        if not SD3Transformer2DModel:
            return {"ours": MMDiT(config).eval().requires_grad_(False)}
        reference = Reference(config)
    transformer = reference.transformer
    ours = build_mmdit(transformer.state_dict(), "diffusers", device)
    transformer.context_embedder = transformer.time_text_embed.text_embedder = nn.Identity()
    return {"diffusers": reference, "ours": ours}


def plain_denoise(transformer, condition, noise, steps=28, guidance=4.5):
    """`dream_engine.denoise` without optimisations; condition() is called at every step."""

    def velocity(z, t):
        c = condition()
        z = z.to(c.txt.dtype).repeat(2, 1, 1, 1)
        return flow.guide(*transformer(z, t, c.txt, c.vec, c.padding).float().chunk(2), guidance)

    return flow.euler(velocity, noise, flow.sigma_schedule(steps))


@torch.no_grad()
def official(engine, transformer, prompt, steps, is_masked=False):
    """Draw as the official code does: run the LMM at every step; mask padding only if is_masked."""
    batch = engine.lmm.collate(apply_task(None, prompt))
    side = engine.default_size // 8

    def condition():
        c = engine.condition(batch)
        return c if is_masked else Condition(c.txt, torch.ones_like(c.mask), c.vec)

    noise = flow.noise(1, (transformer.config.channels, side, side), 0).to(batch.ids.device)
    return to_images(engine.vae.decode(plain_denoise(transformer, condition, noise, steps)))


def inputs_of(config, image, text, batch, device):
    """Random latent, txt and vec; image, text: numbers of tokens."""
    generator, side = torch.Generator().manual_seed(0), config.patch * math.isqrt(image)
    sizes = (config.channels, side, side), (text, config.width), (config.width,)
    return [torch.randn(batch, *s, generator=generator).to(device) for s in sizes]


def samplers(models, inputs, steps):
    """{name: function that draws a latent with guidance}; inputs: of a prompt and a null prompt."""
    (latent, txt, vec), draw = inputs, {}
    condition = Condition(txt, torch.ones_like(txt[..., 0], dtype=torch.bool), vec)
    for name, model in models.items():
        plain = partial(plain_denoise, model, lambda: condition, latent[:1], steps)
        fast = partial(denoise, model, condition, latent[:1], steps)
        draw[name] = plain if isinstance(model, Reference) else fast
        if name == "ours":
            draw["ours, plain forward"] = plain
    return {name: torch.no_grad()(function) for name, function in draw.items()}


# ---- measuring ----------------------------------------------------------------------------------


def largest_difference(results):
    """The largest relative difference of tensors from the first; ValueError above 1e-4."""
    first, *others = results
    found = [((x - first).norm() / first.norm()).item() for x in others]
    if not all(x <= 1e-4 for x in found):
        raise ValueError(f"expected relative differences of at most 1e-4, got {found}")
    return max(found, default=0.0)


def time_in_turns(functions, rounds):
    """{name: seconds of each round}; a first round is not timed, every other one is reversed."""
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


def rows_of(times, unit, base, steps=1, label=None):
    """[{"": name, unit: milliseconds a step, "of base": ratio}]; without base the ratio is None."""
    rows = []
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times.get(base, ()))]
        ratio = median(ratios) if ratios else None
        rows.append({"": name, unit: 1000 * median(seconds) / steps, f"of {label or base}": ratio})
    return rows


# ---- parts: device -> {"rows": ..., "about": title (default: the docstring), other results} ------


def sampling(where, config, tokens, steps, rounds, *, device):
    """Time one step of sampling with guidance; tokens: numbers of image and text tokens."""
    inputs, models = inputs_of(config, *tokens, 2, device), build_models(config, device)
    compiled = deepcopy(models["ours"])
    compile_blocks(compiled)
    draw = samplers(models | {"ours, compiled": compiled}, inputs, steps)
    start = time.perf_counter()
    draw["ours, compiled"]()
    seconds = time.perf_counter() - start
    largest = largest_difference([f() - inputs[0][:1] for f in draw.values()])
    return {
        "about": f"A step of sampling with guidance, {where}.",
        "rows": rows_of(time_in_turns(draw, rounds), "ms a step", "diffusers", steps),
        "tokens": list(tokens),
        "seconds to compile": seconds,
        "largest relative difference": largest,
    }


def request(device, steps=28):
    """A request to the miniature: a prompt with two pictures, 28 steps, guidance."""
    engine, models = DreamEngine.load(device=device), build_models(MINIATURE, device)
    engine.mmdit = models["ours"]
    slow = partial(official, engine, prompt=PROMPT, steps=steps)
    ways = {f"official way, transformer of {name}": partial(slow, m) for name, m in models.items()}
    ways["official way, ours, padding masked"] = partial(slow, engine.mmdit, is_masked=True)
    ways["ours"] = partial(engine.generate, [PROMPT], steps, guidance=4.5)
    *unmasked, masked, ours = (np.asarray(way()[0], dtype=float) for way in ways.values())
    largest = max(abs(unmasked[0] - unmasked[-1]).max(), abs(masked - ours).max())
    if largest > 1:
        raise ValueError(f"expected pictures that differ by at most 1 of 255, got {largest:g}")
    rows = rows_of(time_in_turns(ways, 15), "ms", next(iter(ways)), label="the official way")
    return {"rows": rows, "largest difference of 255": largest}


PARTS = {
    "step": partial(sampling, "in the miniature", MINIATURE, (9, 14), 28, 60),
    "mid": partial(sampling, "12 blocks of 768", MID, (1024, 128), 2, 7),
    "request": request,
}


def report(results):
    """The results of all parts as Markdown."""

    def cell(x):
        if isinstance(x, float):
            return f"{x:.0f}" if x >= 100 else f"{x:.3g}"
        return "" if x is None else str(x)

    parts = []
    for name, part in results.items():
        rows = part["rows"]
        parts.append(f"**{name}**: {part['about']}")
        parts.append(markdown_table(list(rows[0]), [map(cell, row.values()) for row in rows]))
        about = [f"{k}: {cell(v)}" for k, v in part.items() if k not in ("rows", "about")]
        parts += ["; ".join(about)] if about else []
    return "\n\n".join(parts) + "\n"


def parse(arguments=None):
    parser = Parser(prog="python -m tools.bench", description=__doc__.splitlines()[0])
    add = parser.add_argument
    names = ", ".join(PARTS)  # no choices=: with no part, Python 3.11 looks up a list in them
    add("parts", nargs="*", metavar="part", default=list(PARTS), help=f"{names}; default: all")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("--out", help="folder to write bench.json and bench.md to")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"part {unknown[0]!r}: expected one of {names}")
    return args


def main(arguments=None):
    args = parse(arguments)
    device, place = usable_device(args.device), f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        place = torch.cuda.get_device_name()
    if file := args.out and Path(args.out, "bench.json"):
        require_writable(file, "--out")
    results = read_json(file) if file and file.exists() else {}
    with reading(file, "the results of an earlier run"):
        report(results)  # fails now, not after the measurements, if the file is of another kind
    for name in tqdm(args.parts, "parts"):
        results[name] = {"about": PARTS[name].__doc__} | PARTS[name](device=device) | {"on": place}
        if file:
            write_json(file, results)
            write_text(file.with_suffix(".md"), report(results))
    print(report(results))


if __name__ == "__main__":
    with one_line_errors():
        main()
