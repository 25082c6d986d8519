"""Measure UniAlignment's reading, perception and cost.

Each measure takes the options of `mini.evaluate` and returns a table, {row: [number, ...]}. Reading is
captions and answers, scored word for word; perception is edges, scored pixel by pixel.
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
from mini.cases import PAIR_SETS, STREAM, random_scenes
from mini.encoders import CAPTION, continued
from unialignment import UniAlignment

OBJECTS = {f"{place} {' '.join(pair)}" for place in world.PLACES for pair in world.PAIRS}


def load(args):
    return UniAlignment.load(args.unialignment, device=args.device)


def without_task(generate):
    """Wrap `UniAlignment.generate`, which has no tasks, to be called as `DreamEngine.generate` is."""
    return lambda prompts, *, task=None, **settings: generate(prompts, **settings)


def objects_of(caption):
    """The set of objects that a caption in the words of `world.describe` names."""
    return OBJECTS & set(caption.split(", "))


def f1(found, true):
    """The F1 score, 2 hits / (found + true), summed over two lists of sets."""
    found = list(found)
    return 2 * sum(len(a & b) for a, b in zip(found, true)) / sum(map(len, (*found, *true)))


def lmm_captions(lmm, images):
    """Caption pictures with the LMM, greedily."""
    words = lmm.language_model.embed_tokens.weight
    prompts = [[CAPTION, image] for image in images]
    texts = continued(lmm, lambda states: states @ words.T, prompts, 26)
    return [text.partition(" background")[0] + " background" for text in texts]


def reading(args):
    """{captions: [share that is right word for word, F1 of the objects named]}."""
    engine, result = load(args), {}
    for suffix, pairs in PAIR_SETS.items():
        scenes = random_scenes(f"captions{suffix}", args.num, pairs)
        true = list(map(world.describe, scenes))
        texts = engine.answer(list(map(world.render, scenes)))
        found, named = (list(map(objects_of, captions)) for captions in (texts, true))
        result[f"captions{suffix}"] = [fmean(map(eq, texts, true)), f1(found, named)]
    return result


def questions(args):
    """{kind of question: [accuracy, accuracy of the most frequent answer]}."""
    engine, result = load(args), {}
    for kind in programs.QUESTIONS:
        rng = random.Random(f"questions {kind} {STREAM}")
        sampled = [programs.sample_question(kind, rng, reserved=True) for _ in range(args.num // 3)]
        texts = engine.answer([world.render(s) for s, _ in sampled], [q.text for _, q in sampled])
        right = fmean(text == programs.answer(q, s) for text, (s, q) in zip(texts, sampled))
        result[kind] = [right, programs.majority(kind)]
    return result | {"mean": np.mean(list(result.values()), axis=0).tolist()}


def edges(args):
    """{pictures: [F1 of bright pixels]} of drawn edges, reconstructed true ones and the sources."""
    engine, scenes = load(args), random_scenes("edges", args.num)
    sources, true = ([make(scene) for scene in scenes] for make in (world.render, world.edges))
    drawn = engine.generate([world.EDGES] * len(scenes), [[image] for image in sources])
    shown = {"drawn": drawn, "VAE copies of true ones": cases.reconstruct(engine.vae, true)}
    shown["unedited"] = sources
    expected = list(map(bright, true))
    return {name: [f1(map(bright, images), expected)] for name, images in shown.items()}


def bright(image):
    """The set of bright pixels."""
    return set(np.flatnonzero(np.asarray(image.convert("L")) > 127).tolist())


def captions_are_right(engine, images):
    """For each picture: is UniAlignment's caption exactly what the detector finds?"""
    scenes = [world.detect(image) for image in images]
    texts = engine.answer(images)
    return [bool(scene) and text == world.describe(scene) for scene, text in zip(scenes, texts)]


def own(args):
    """{does its drawing fit?: [share captioned right, share captioned wrong]}, of all drawings."""
    engine = load(args)
    sampled = cases.sample("t2i", args.num, STREAM)
    images = cases.draw(without_task(engine.generate), sampled)
    counts = Counter(zip(cases.judge(sampled, images), captions_are_right(engine, images)))
    return {
        row: [counts[verdict, right] / len(sampled) for right in (True, False)]
        for row, verdict in (("picture fits prompt", "1"), ("does not", "0"))
    }


def cost(args, n=16):
    """{system: [million parameters, seconds a picture, seconds a caption]}, n at a time."""
    image, prompt = world.render(random_scenes("cost", 1)[0]), "a red circle left of a blue star"
    uni, dream = load(args), DreamEngine.load(SD3, LMM, args.checkpoint, args.device)

    def measure(engine, caption):
        parameters = sum(p.numel() for p in engine.parameters())
        drawing = seconds(engine.generate, [[prompt]] * n)
        return [parameters / 1e6, drawing / n, seconds(caption, [image] * n) / n]

    lmm = partial(lmm_captions, dream.lmm)
    return {"UniAlignment": measure(uni, uni.answer), "Dream Engine": measure(dream, lmm)}


def seconds(work, argument):
    """Time the second of two calls; the first one warms up."""
    work(argument)
    start = time.perf_counter()
    work(argument)
    return time.perf_counter() - start


MEASURES = {measure.__name__: measure for measure in (reading, questions, edges, own, cost)}
