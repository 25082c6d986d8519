"""The miniature's report card: what each of its parts can do, judged by the exact detector.

    python -m mini.report guidance weights/mini/stage2.safetensors   # choose and store the guidance
    python -m mini.report card                                       # docs/results/miniature.json

Cases are of the reserved eighth that no training drew. The guidance of a checkpoint is chosen on a
stream of cases of its own; the card uses another, opened only once the weights are fixed.
"""

import json
import random
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoTokenizer, T5EncoderModel

import flow
from checkpoints import load_mmdit, load_vae, metadata, read
from dream_engine import LMM, SD3, STAGE1, STAGE2, DreamEngine, denoise
from lmm import load_lmm
from mini import cases, programs, world
from mini.cases import STREAM, bits, interval, share
from mini.encoders import CAPTION, continued
from mini.pretrain import T5, TextCondition, decibels
from mini.world import HELD_OUT, SEEN
from prompts import to_images, to_tensor
from support.cli import Parser, one_line_errors, whole_number
from support.files import table, whole, write_json

GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.5)
LIKE_TRAINING = ("t2i", "copies", "edits", "objects")
STEPS = (1, 2, 4, 8, 14, 28)
OPEN_PROMPTS = ("a circle", "a star and a ring", "two crosses", "a red square")


# ---- the parts ----------------------------------------------------------------------------------


@torch.no_grad()
def copies_of(vae, images):
    batch = to_tensor(images).split(50)
    return [image for part in batch for image in to_images(vae.decode(vae.encode(part)))]


def vae_rows(vae, n):
    """Shares of rendered pictures whose copy is read exactly."""
    rows = {}
    for name, pairs in (("seen", SEEN), ("held out", HELD_OUT)):
        rng = random.Random(f"vae {name} {STREAM}")
        scenes = [world.sample_scene("scene", rng, pairs, exam=True) for _ in range(n)]
        copies = copies_of(vae, list(map(world.render, scenes)))
        rows[f"VAE, {name} pairs"] = bits(world.detect(c) == s for c, s in zip(copies, scenes))
    return rows


def photograph_decibels(vae, n=300):
    """Mean of the VAE's decibels on crops of real photographs, or None without scikit-image."""
    try:
        from skimage import data
    except ImportError:
        return None
    rng = random.Random("photographs")
    photos = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    crops = []
    for _ in range(n):
        photo = world.Image.fromarray(rng.choice(photos))
        side = rng.randint(world.SIZE, min(photo.size))
        left, top = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
        box = (left, top, left + side, top + side)
        crops.append(photo.crop(box).resize((world.SIZE,) * 2, world.Image.LANCZOS))
    return decibels(crops, copies_of(vae, crops))


@torch.no_grad()
def caption_rows(lmm, n):
    """Shares of pictures that the LMM describes exactly."""
    rows, words = {}, lmm.language_model.embed_tokens.weight
    for name, pairs in (("seen", SEEN), ("held out", HELD_OUT)):
        rng = random.Random(f"captions {name} {STREAM}")
        scenes = [world.sample_scene("scene", rng, pairs, exam=True) for _ in range(n)]
        prompts = [[CAPTION, world.render(scene)] for scene in scenes]
        texts = continued(lmm, lambda states: states @ words.T, prompts, 26)
        right = [text.startswith(world.describe(s)) for text, s in zip(texts, scenes)]
        rows[f"LMM captions, {name} pairs"] = bits(right)
    return rows


class Base:
    """The miniature SD3.5 with its own T5, drawing as `DreamEngine.generate` does."""

    def __init__(self):
        self.mmdit, self.vae = load_mmdit(SD3), load_vae(SD3)
        t5 = T5EncoderModel.from_pretrained(T5, dtype=torch.float32).eval()
        self.condition = TextCondition(self.mmdit, t5, AutoTokenizer.from_pretrained(T5))

    @torch.no_grad()
    def generate(self, prompts, task=None, seed=0, steps=28, guidance=4.5, alone=False):
        """alone: without the pooled vector, and with pads attended, as UniAlignment starts."""
        texts = [prompt[0] for prompt in prompts] + [""] * len(prompts)
        how = (4, torch.zeros(len(texts))) if alone else ()
        shape = (self.mmdit.config.channels, world.SIZE // 8, world.SIZE // 8)
        start = flow.noise(len(prompts), shape, seed)
        latent = denoise(self.mmdit, self.condition(texts, *how), start, steps, guidance)
        return to_images(self.vae.decode(latent))


# ---- rows ---------------------------------------------------------------------------------------


def score(generate, name, n, seed=STREAM, pairs=SEEN, **settings):
    """{kind of case: a letter for each}."""
    asked = cases.CASES[name](n, seed, pairs=pairs)
    flat = [case for group in asked.values() for case in group]
    images = iter(cases.draw(generate, flat, name, **settings))
    return {
        kind: cases.judge(group, [next(images) for _ in group])["exact"]
        for kind, group in asked.items()
    }


def joined(rows, name, scores):
    rows[name] = "".join(scores.values())
    rows |= {f"{name}: {kind}": text for kind, text in scores.items() if len(scores) > 1}


def drawing_rows(n, guidance):
    """Base, stage 1 and stage 2, on the cases of their training and on the held-out pairs."""
    rows, base = {}, Base()
    joined(rows, "base", score(base.generate, "t2i", n, guidance=guidance["base"]))
    alone = partial(base.generate, alone=True)
    joined(rows, "base, time alone", score(alone, "t2i", n, guidance=guidance["base"]))
    held = score(base.generate, "t2i", n, pairs=HELD_OUT, guidance=guidance["base"])
    rows["base, held-out pairs"] = "".join(held.values())
    stage1 = DreamEngine.load(checkpoint=STAGE1)
    joined(rows, "stage 1", score(stage1.generate, "t2i", n, guidance=guidance["stage1"]))
    stage2 = DreamEngine.load(checkpoint=STAGE2)
    for name in (*LIKE_TRAINING, "mixing"):
        for pairs, which in ((SEEN, ""), (HELD_OUT, ", held-out pairs")):
            scores = score(stage2.generate, name, n, pairs=pairs, guidance=guidance["stage2"])
            joined(rows, f"stage 2, {name}{which}", scores)
    return rows


def variety(engine, guidance, seeds=8):
    """{r: (distinct readings of 8 seeds of an open prompt, share of unclear pictures)}."""
    result = {}
    for r in (0.0, 0.25, 0.5, 0.75, 1.0):
        distinct, unclear, count = [], 0, 0
        for text in OPEN_PROMPTS:
            images = engine.generate([[text]] * seeds, task="t2i", guidance=guidance, r=r)
            scenes = [world.detect(image) for image in images]
            distinct.append(len(set(scenes) - {None}))
            unclear, count = unclear + scenes.count(None), count + seeds
        result[r] = sum(distinct) / len(distinct), unclear / count
    return result


def by_steps(engine, guidance, n):
    """{Euler steps: (share of text to image right, seconds a picture)}."""
    result = {}
    for steps in STEPS:
        start = time.perf_counter()
        scores = score(engine.generate, "t2i", n, "steps", guidance=guidance, steps=steps)
        seconds = (time.perf_counter() - start) / n
        result[steps] = share("".join(scores.values())), round(seconds, 4)
    return result


# ---- guidance -----------------------------------------------------------------------------------


def stored_guidance(checkpoint):
    """The guidance at which a checkpoint draws best, or 4.5 where it does not say."""
    return json.loads(metadata(checkpoint).get("config", "{}")).get("guidance", 4.5)


def choose_guidance(checkpoint, n):
    """Try GUIDANCES on a stream of cases of its own, and store the best in the checkpoint."""
    engine = DreamEngine.load(checkpoint=checkpoint)
    config = json.loads(metadata(checkpoint)["config"])
    names = LIKE_TRAINING if config["stage"] == 2 else ("t2i",)
    means = {}
    for guidance in tqdm(GUIDANCES, "guidance"):
        scores = [score(engine.generate, name, n, "guidance", guidance=guidance) for name in names]
        means[guidance] = sum(share("".join(s.values())) for s in scores) / len(names)
    best = max(means, key=means.get)
    tensors = {name: tensor.clone() for name, tensor in read(checkpoint).items()}
    with whole(checkpoint) as partial_file:
        save_file(tensors, partial_file, {"config": json.dumps(config | {"guidance": best})})
    print(table(("guidance", "score"), [(g, f"{m:.3f}") for g, m in means.items()]))


def base_guidance(n):
    """The guidance at which the base draws best, on the same stream."""
    base, means = Base(), {}
    for guidance in GUIDANCES:
        scores = score(base.generate, "t2i", n, "guidance", guidance=guidance)
        means[guidance] = share("".join(scores.values()))
    return max(means, key=means.get)


# ---- the card -----------------------------------------------------------------------------------


def minutes_of(file):
    """{part: minutes} of a file of lines "NAME MINUTES"; what was resumed adds up."""
    result = {}
    for name, minutes in (line.split() for line in file.read_text().splitlines()):
        result[name] = round(result.get(name, 0) + float(minutes), 1)
    return result


def card(n, out, minutes):
    guidance = {"base": base_guidance(120)}
    guidance |= {f"stage{i}": stored_guidance(file) for i, file in ((1, STAGE1), (2, STAGE2))}
    vae = load_vae(SD3)
    rows = vae_rows(vae, n) | caption_rows(load_lmm(LMM), n) | drawing_rows(n, guidance)
    engine = DreamEngine.load(checkpoint=STAGE2)
    result = {
        "rows": rows,
        "minutes": minutes,
        "guidance": guidance,
        "photographs, dB": photograph_decibels(vae),
        "variety": variety(engine, guidance["stage2"]),
        "steps": by_steps(engine, guidance["stage2"], n),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    lines = [(name, f"{share(x):.3f}", "{:.3f} to {:.3f}".format(*interval(x)), len(x))
             for name, x in rows.items()]  # fmt: skip
    print(table(("", "score", "95 %", "cases"), lines))
    if minutes:
        print(
            table(
                ("part", "minutes"),
                [*minutes.items(), ("sum of parts", round(sum(minutes.values()), 1))],
            )
        )
    kinds = {kind: programs.majority(kind) for kind in programs.QUESTIONS}
    print("majority answers:", ", ".join(f"{k} {v:.2f}" for k, v in kinds.items()))
    print(json.dumps({name: x for name, x in result.items() if name != "rows"}, indent=1))


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("guidance", "card"))
    parser.add_argument("checkpoint", nargs="?", type=Path, default=STAGE2)
    parser.add_argument("--n", type=whole_number(6), default=300, help="cases of each row")
    parser.add_argument("--minutes", type=Path, help="file of the minutes that each part took")
    parser.add_argument("--out", type=Path, default=Path("docs/results/miniature.json"))
    args = parser.parse_args()
    if args.what == "guidance":
        choose_guidance(args.checkpoint, args.n)
    else:
        card(args.n, args.out, minutes_of(args.minutes) if args.minutes else {})


if __name__ == "__main__":
    with one_line_errors():
        main()
