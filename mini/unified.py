"""What UniAlignment makes of pictures: reading, perceiving, and what it says of its own drawings.

Measures of `mini.evaluate`: functions of its options that return tables, {row: [number, ...]}.
"""

import random
import time
from collections import Counter
from functools import partial
from operator import eq
from statistics import fmean

import numpy as np

from dream_engine import LMM, SD3, DreamEngine
from mini import cases, programs, world
from mini.cases import STREAM
from mini.encoders import CAPTION, continued
from mini.world import HELD_OUT, SEEN
from unialignment import UniAlignment

GROUPS = {"": SEEN, ", held-out pairs": HELD_OUT}
OBJECTS = {f"{place} {' '.join(pair)}" for place in world.PLACES for pair in world.PAIRS}


def load(args):
    return UniAlignment.load(args.unialignment, device=args.device)


class Artist:
    """UniAlignment drawing as `DreamEngine.generate` does; it knows no tasks."""

    def __init__(self, engine):
        self.engine, self.vae = engine, engine.vae

    def generate(self, prompts, *, task=None, **settings):
        return self.engine.generate(prompts, **settings)


def random_scenes(what, n, pairs=SEEN):
    rng = random.Random(f"{what} {STREAM}")
    return [world.sample_scene("scene", rng, pairs, exam=True) for _ in range(n)]


def objects_of(text):
    """The objects, a set, that a caption in the words of `world.describe` names."""
    return OBJECTS & set(text.split(", "))


def f1(found, true):
    """2 hits / (found + true) of lists of sets, all of them together."""
    found = list(found)
    return 2 * sum(len(a & b) for a, b in zip(found, true)) / sum(map(len, (*found, *true)))


def lmm_captions(lmm, images):
    """What the LMM says of pictures, its likeliest words."""
    words = lmm.language_model.embed_tokens.weight
    prompts = [[CAPTION, image] for image in images]
    texts = continued(lmm, lambda states: states @ words.T, prompts, 26)
    return [text.partition(" background")[0] + " background" for text in texts]


def reading(args):
    """{pairs: [share of captions that are right word for word, F1 of the objects named]}."""
    engine, result = load(args), {}
    for name, pairs in GROUPS.items():
        scenes = random_scenes(f"captions{name}", args.num, pairs)
        true = list(map(world.describe, scenes))
        texts = engine.answer(list(map(world.render, scenes)))
        found, named = (list(map(objects_of, captions)) for captions in (texts, true))
        result[f"captions{name}"] = [fmean(map(eq, texts, true)), f1(found, named)]
    return result


def questions(args):
    """{kind: [share of answers that are right, of the most frequent answer]}."""
    engine, result = load(args), {}
    for kind in programs.QUESTIONS:
        rng = random.Random(f"questions {kind} {STREAM}")
        asked = [programs.sample_question(kind, rng, exam=True) for _ in range(args.num // 3)]
        texts = engine.answer([world.render(s) for s, _ in asked], [q.text for _, q in asked])
        right = fmean(text == programs.answer(q, s) for text, (s, q) in zip(texts, asked))
        result[kind] = [right, programs.majority(kind)]
    return result | {"mean": np.mean(list(result.values()), axis=0).tolist()}


def edges(args):
    """{pictures: [F1 of the bright pixels]}: drawn edges, the VAE's copies of true ones, the sources."""
    engine, scenes = load(args), random_scenes("edges", args.num)
    sources, true = ([make(scene) for scene in scenes] for make in (world.render, world.edges))
    drawn = engine.generate([world.EDGES] * len(scenes), [[image] for image in sources])
    shown = {"drawn": drawn, "VAE copies of true ones": cases.copies_of(engine.vae, true)}
    shown["unedited"] = sources
    lines = [lit(image) for image in true]
    return {name: [f1(map(lit, images), lines)] for name, images in shown.items()}


def lit(image):
    """The pixels that are bright, a set."""
    return set(np.flatnonzero(np.asarray(image.convert("L")) > 127).tolist())


def fits(engine, images):
    """Is what it reads in each picture just what the detector reads?"""
    reads = map(world.detect, images)
    texts = engine.answer(images)
    return [
        scene is not None and text == world.describe(scene) for scene, text in zip(reads, texts)
    ]


def own(args):
    """{picture fits prompt?: [own caption fits picture, does not]}, shares of all drawings."""
    engine = load(args)
    asked = cases.ask("t2i", args.num, STREAM)
    images = cases.draw(Artist(engine).generate, asked)
    right = cases.judge(asked, images)["exact"]
    counts = Counter(zip(right, fits(engine, images)))
    rows = {"picture fits prompt": "1", "does not": "0"}
    return {
        k: [counts[flag, fit] / len(asked) for fit in (True, False)] for k, flag in rows.items()
    }


def cost(args, n=16):
    """{system: [million parameters, seconds a picture, seconds a caption]}, n at a time."""
    image, prompt = world.render(random_scenes("cost", 1)[0]), "a red circle left of a blue star"
    one, other = load(args), DreamEngine.load(SD3, LMM, args.checkpoint, args.device)

    def system(engine, read):
        parameters = sum(p.numel() for p in engine.parameters())
        draw = seconds(engine.generate, [[prompt]] * n)
        return [parameters / 1e6, draw / n, seconds(read, [image] * n) / n]

    lmm = partial(lmm_captions, other.lmm)
    return {"UniAlignment": system(one, one.answer), "Dream Engine": system(other, lmm)}


def seconds(work, argument):
    """Of the second time, the first being a warm-up."""
    work(argument)
    start = time.perf_counter()
    work(argument)
    return time.perf_counter() - start


MEASURES = {measure.__name__: measure for measure in (reading, questions, edges, own, cost)}
