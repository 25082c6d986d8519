"""What is asked of the miniature, and the exact judgement of what it drew.

Scenes and prompts are from the eighth of the world that training never draws (`world.is_exam`).
Judgements are strings of 0 and 1, one letter a case, so that models can be compared case by case.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from math import sqrt
from statistics import mean, stdev

import torch
from PIL import Image
from tqdm import tqdm

from data import training_example
from mini import edits, programs, world
from mini.world import HELD_OUT, SEEN, Object, Prompt, Reading, Scene, as_mention
from prompts import to_images, to_tensor

STREAM = "second edition"  # seed of cases that were never used to choose weights or settings


@dataclass(frozen=True)
class Case:
    """Something to draw, and what to check in the picture."""

    task: str  # of prompts.TASKS
    prompt: list  # strings and PIL images
    target: Scene  # a right answer
    checks: dict[str, Callable[[Reading], bool]]  # "exact" is the score
    source: Image.Image | None = None  # what an edit starts from


def picture(pair):
    """A color and shape, alone on white."""
    return world.portrait(Object(*pair, 4))


def asked_for(prompt):
    return lambda read: world.matches(prompt, read.scene)


# ---- cases ---------------------------------------------------------------------------------------


def t2i_cases(n, seed, pairs=SEEN):
    """The six tasks of GenEval."""
    return {
        task: [Case("t2i", [p.text], scene, {"exact": asked_for(p)}) for scene, p in asked]
        for task, asked in world.benchmark(n // 6, seed, pairs=pairs).items()
    }


def copy_cases(n, seed, pairs=SEEN):
    """Pictures of one to four objects, each of which must keep its place."""

    def case(scene):
        return Case("i2i", [world.render(scene)], scene, {"exact": lambda r: r.scene == scene})

    rng = random.Random(f"copies {seed}")
    return {"copy": [case(world.sample_scene("scene", rng, pairs, True)) for _ in range(n)]}


def edit_cases(n, seed, pairs=SEEN):
    """Instructions of every kind; each has one right result, in which all else is untouched."""
    kinds = ("recolor", "add") if pairs is HELD_OUT else edits.EDITS
    return {kind: edits_of(kind, n // len(kinds), seed, pairs) for kind in kinds}


def edits_of(kind, n, seed, pairs=SEEN):
    """n Cases of a kind of edits."""

    def case(edit):
        source, checks = world.render(edit.source), {"exact": lambda r: r.scene == edit.target}
        return Case("edit", [source, edit.text], edit.target, checks, source)

    rng = random.Random(f"edits {kind} {seed}")
    return [case(edits.sample_edit(kind, rng, pairs, True)) for _ in range(n)]


def object_cases(n, seed, pairs=SEEN):
    """Scenes described by words and pictures of their objects, in both templates for that."""
    rng, result = random.Random(f"objects {seed}"), {"objects": [], "combine": []}
    while any(len(cases) < n // 2 for cases in result.values()):
        reference = programs.sample_reference(rng, pairs, exam=True)
        record, size = programs.reference_record(reference), (world.SIZE, world.SIZE)
        task, prompt, _ = training_example(record, size, rng)
        if len(result[task]) < n // 2:
            checks = {"exact": asked_for(reference.prompt)}
            result[task].append(Case(task, prompt, reference.scene, checks))
    return result


def mixing_cases(n, seed, pairs=SEEN):
    """The shape of one picture in the color of another, which no training asks for."""
    rng, cases = random.Random(f"mixing {seed}"), []
    while len(cases) < n:
        first, second = (world.sample_scene("single", rng, exam=True) for _ in range(2))
        (a,), (b,) = first.objects, second.objects
        mixed = Object(b.color, a.shape, 4)
        if a.color == b.color or a.shape == b.shape or mixed.pair not in pairs:
            continue
        pictures = [world.portrait(o, s.background) for o, s in ((a, first), (b, second))]
        prompt = ["the shape of ", pictures[0], " in the color of ", pictures[1]]
        checks = {"exact": asked_for(Prompt("", (as_mention(mixed),)))}
        cases.append(Case("objects", prompt, Scene("white", (mixed,)), checks))
    return {"mixing": cases}


def semgen_cases(n, seed, pairs=SEEN):
    """The four groups of SemGen-Bench, in shapes, n // 2 of each, which no training draws."""

    def prompts(sample, satisfied):
        rng = random.Random(f"{sample.__name__} {seed}")
        made = (sample(rng, pairs, exam=True) for _ in range(n // 2))
        return [Case("t2i", [p.text], scene, {"exact": satisfied(p)}) for scene, p in made]

    def satisfied(prompt):
        return lambda read: programs.satisfies(prompt, read.scene)

    groups = {"long": prompts(programs.sample_long, asked_for)}
    groups["semantic"] = prompts(programs.sample_semantic, satisfied)
    return groups | {kind: edits_of(kind, n // 2, seed) for kind in ("several", "reference")}


def segmentation_cases(n, seed, pairs=SEEN):
    """Every shape in its one color, on black."""
    rng, cases = random.Random(f"segmentation {seed}"), []
    for scene in (world.sample_scene("scene", rng, pairs, exam=True) for _ in range(n)):
        source, true = world.render(scene), world.segment(scene)
        checks = {"exact": lambda read, true=true: read.scene == true}
        cases.append(Case("edit", [source, world.SEGMENT], true, checks, source))
    return {"segmentation": cases}


def composed_cases(n, seed, pairs=SEEN, pictures=2):
    """Two objects, each in a picture of its own, into one; the words do not say their colors."""
    rng, cases = random.Random(f"composed {seed}"), []
    for scene in (world.sample_scene("two", rng, pairs, exam=True) for _ in range(n)):
        shown = [world.render(replace(scene, objects=(o,))) for o in scene.objects]
        words = " and ".join(f"a {o.shape}" for o in scene.objects)
        mentions = tuple(map(as_mention, scene.objects))
        task, checks = "objects" if pictures else "t2i", {"exact": asked_for(Prompt("", mentions))}
        cases.append(Case(task, [*shown[:pictures], words], scene, checks))
    return {"composed": cases}


CASES = {
    "t2i": t2i_cases,
    "copies": copy_cases,
    "edits": edit_cases,
    "objects": object_cases,
    "mixing": mixing_cases,
    "semgen": semgen_cases,
    "segmentation": segmentation_cases,
    "composed": composed_cases,
    "words alone": partial(composed_cases, pictures=0),  # the floor of composed
}


# ---- drawing and judging ------------------------------------------------------------------------


def ask(row, n, seed):
    """n cases of a row of CASES, its groups one after the other."""
    return [case for group in CASES[row](n, seed).values() for case in group]


def draw(generate, cases, what="", **settings):
    """A picture for each case, case i from seed i; generate as `DreamEngine.generate`."""
    cases, images = list(cases), []
    with tqdm(total=len(cases), desc=what, leave=False) as bar:
        while left := cases[len(images) :]:
            same = takewhile(lambda case, task=left[0].task: case.task == task, left[:50])
            prompts = [case.prompt for case in same]
            images += generate(prompts, task=left[0].task, seed=len(images), **settings)
            bar.update(len(prompts))
    return images


def judge(cases, images):
    """{check: a 0 or 1 for each case}."""
    reads = [world.read(image) for image in images]
    return {name: bits(c.checks[name](r) for c, r in zip(cases, reads)) for name in cases[0].checks}


def score(generate, row, n, seed, what="", **settings):
    """{check: bits} of n cases of a row of CASES; settings as of `DreamEngine.generate`."""
    cases = ask(row, n, seed)
    return judge(cases, draw(generate, cases, what, **settings))


@torch.no_grad()
def copies_of(vae, images):
    """What the VAE makes of pictures."""
    batch = to_tensor(images).to(next(vae.parameters()).device)
    return to_images(torch.cat([vae.decode(vae.encode(part)) for part in batch.split(50)]))


def controls(vae, cases, images):
    """The scores of perfect pictures, their VAE copies, other cases' pictures and unedited ones."""
    renders = [world.render(case.target) for case in cases]
    pictures = {"renders": renders, "VAE": copies_of(vae, renders)}
    pictures["shuffled"] = [*images[1:], images[0]]
    if cases[0].source:
        pictures["unedited"] = [case.source for case in cases]
    return {name: judge(cases, drawn)["exact"] for name, drawn in pictures.items()}


def bits(flags):
    return "".join("1" if flag else "0" for flag in flags)


# ---- statistics ---------------------------------------------------------------------------------

STUDENT = {3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantiles of Student's t, by number of values


def share(text):
    return text.count("1") / len(text)


def interval(text):
    """95 % interval of the share of ones (Wilson's)."""
    n, p, z = len(text), share(text), 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return middle - half, middle + half


def difference(first, second):
    """Mean of second - first, paired case by case, and the half width of its 95 % interval.

    They hold a text for each replicate: another seed of training, or of the cases. The interval is
    the wider of two: Student's over the replicates, and the normal one over all cases.
    """
    pairs = [[int(b) - int(a) for a, b in zip(x, y, strict=True)] for x, y in zip(first, second)]
    means, flat = [mean(d) for d in pairs], [x for d in pairs for x in d]
    half = 1.96 * stdev(flat) / sqrt(len(flat))
    if len(means) > 1:
        half = max(half, STUDENT[len(means)] * stdev(means) / sqrt(len(means)))
    return mean(flat), half
