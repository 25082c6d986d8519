"""Sample the miniature's test sets, and judge the pictures that a model draws for them.

A case is a prompt with an exact check of the picture. Its scenes and prompts are from the eighth
that `world.is_reserved` holds out from every training. The verdicts on a test set form a string of
0 and 1, one for each case, so that two models can be compared case by case.
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

STREAM = "second edition"  # seed of the test cases; settings are chosen on other samples
HELD = ", held-out pairs"
PAIR_SETS = {"": SEEN, HELD: HELD_OUT}  # suffix of a row's name: pairs of color and shape


@dataclass(frozen=True)
class Case:
    """A prompt, and the check of a picture that is drawn for it."""

    task: str  # of prompts.TASKS
    prompt: list  # strings and PIL images
    target: Scene  # of one right picture
    is_right: Callable[[Reading], bool]
    source: Image.Image | None = None  # of an edit


def picture(pair):
    """A picture of one object, with this color and shape, on white."""
    return world.portrait(Object(*pair, 4))


def matches(prompt):
    """Accept every picture that the prompt describes."""
    return lambda read: world.matches(prompt, read.scene)


def shows(scene):
    """Accept a picture of exactly this scene."""
    return lambda read: read.scene == scene


def edit_case(source, instruction, target):
    """A Case of an edit. Only the target is right: all other objects must stay unchanged."""
    return Case("edit", [source, instruction], target, shows(target), source)


# ---- test sets ----------------------------------------------------------------------------------


def t2i_cases(n, seed, pairs=SEEN):
    """Text to image: the six tasks of GenEval."""
    return {
        task: [Case("t2i", [p.text], scene, matches(p)) for scene, p in sampled]
        for task, sampled in world.benchmark(n // 6, seed, pairs=pairs).items()
    }


def copy_cases(n, seed, pairs=SEEN):
    """Pictures of one to four objects to copy; each object must keep its place."""
    rng = random.Random(f"copies {seed}")
    scenes = [world.sample_scene("scene", rng, pairs, reserved=True) for _ in range(n)]
    return {"copy": [Case("i2i", [world.render(s)], s, shows(s)) for s in scenes]}


def edit_cases(n, seed, pairs=SEEN):
    """Edits: an equal number of each kind."""
    kinds = ("recolor", "add") if pairs is HELD_OUT else edits.EDITS
    return {kind: edits_of(kind, n // len(kinds), seed, pairs) for kind in kinds}


def edits_of(kind, n, seed, pairs=SEEN):
    """Sample n edits of a kind."""
    rng = random.Random(f"edits {kind} {seed}")
    sampled = [edits.sample_edit(kind, rng, pairs, reserved=True) for _ in range(n)]
    return [edit_case(world.render(edit.source), edit.text, edit.target) for edit in sampled]


def object_cases(n, seed, pairs=SEEN):
    """Scenes described by words and pictures of their objects, in both prompt templates."""
    rng, result = random.Random(f"objects {seed}"), {"objects": [], "combine": []}
    while any(len(cases) < n // 2 for cases in result.values()):
        reference = programs.sample_reference(rng, pairs, reserved=True)
        record, size = programs.reference_record(reference), (world.SIZE, world.SIZE)
        task, prompt, _ = training_example(record, size, rng)
        if len(result[task]) < n // 2:
            result[task].append(Case(task, prompt, reference.scene, matches(reference.prompt)))
    return result


def mixing_cases(n, seed, pairs=SEEN):
    """The shape of one picture in the color of another. Neither stage is trained on these."""
    rng, cases = random.Random(f"mixing {seed}"), []
    while len(cases) < n:
        first, second = (world.sample_scene("single", rng, reserved=True) for _ in range(2))
        (a,), (b,) = first.objects, second.objects
        mixed = Object(b.color, a.shape, 4)
        if a.color == b.color or a.shape == b.shape or mixed.pair not in pairs:
            continue
        pictures = [world.portrait(o, s.background) for o, s in ((a, first), (b, second))]
        prompt = ["the shape of ", pictures[0], " in the color of ", pictures[1]]
        right = matches(Prompt("", (as_mention(mixed),)))
        cases.append(Case("objects", prompt, Scene("white", (mixed,)), right))
    return {"mixing": cases}


def semgen_cases(n, seed, pairs=SEEN):
    """The four groups of SemGen-Bench, in shapes, n // 2 cases each. No system trains on them."""

    def prompts(sample, stream, accept):
        rng = random.Random(f"{stream} {seed}")
        sampled = (sample(rng, pairs, reserved=True) for _ in range(n // 2))
        return [Case("t2i", [p.text], scene, accept(p)) for scene, p in sampled]

    def satisfies(prompt):
        return lambda read: programs.satisfies(prompt, read.scene)

    groups = {"long": prompts(programs.sample_long, "sample_long", matches)}
    groups["semantic"] = prompts(programs.sample_semantic, "sample_semantic", satisfies)
    return groups | {kind: edits_of(kind, n // 2, seed) for kind in ("several", "reference")}


def segmentation_cases(n, seed, pairs=SEEN):
    """Segmentations: each shape in the color of its label, on black."""
    rng = random.Random(f"segmentation {seed}")
    scenes = [world.sample_scene("scene", rng, pairs, reserved=True) for _ in range(n)]
    cases = [edit_case(world.render(s), world.SEGMENT, world.segment(s)) for s in scenes]
    return {"segmentation": cases}


def composed_cases(n, seed, pairs=SEEN, pictures=2):
    """Two objects to draw together: a prompt of `pictures` pictures of one each, and their shapes."""
    rng, cases = random.Random(f"composed {seed}"), []
    for scene in (world.sample_scene("two", rng, pairs, reserved=True) for _ in range(n)):
        shown = [world.render(replace(scene, objects=(o,))) for o in scene.objects]
        words = " and ".join(f"a {o.shape}" for o in scene.objects)
        right = matches(Prompt("", tuple(map(as_mention, scene.objects))))
        prompt = [*shown[:pictures], words]
        cases.append(Case("objects" if pictures else "t2i", prompt, scene, right))
    return {"composed": cases}


CASES = {  # test set: function of (n, seed, pairs) -> {group: [Case]}
    "t2i": t2i_cases,
    "copies": copy_cases,
    "edits": edit_cases,
    "objects": object_cases,
    "mixing": mixing_cases,
    "semgen": semgen_cases,
    "segmentation": segmentation_cases,
    "composed": composed_cases,
    "words alone": partial(composed_cases, pictures=0),  # the baseline of composed
}


def sample(test_set, n, seed):
    """Sample n cases of a test set of CASES, one group after the other."""
    return [case for group in CASES[test_set](n, seed).values() for case in group]


def random_scenes(what, n, pairs=SEEN):
    """Sample n held-out scenes of one to four objects, from the stream of a measure."""
    rng = random.Random(f"{what} {STREAM}")
    return [world.sample_scene("scene", rng, pairs, reserved=True) for _ in range(n)]


# ---- drawing and judging ------------------------------------------------------------------------


def draw(generate, cases, title="", **settings):
    """Draw case i with seed i, for all cases; generate takes what `DreamEngine.generate` takes."""
    images = []
    with tqdm(total=len(cases), desc=title, leave=False) as bar:
        while left := cases[len(images) :]:
            same = takewhile(lambda case, task=left[0].task: case.task == task, left[:50])
            prompts = [case.prompt for case in same]
            images += generate(prompts, task=left[0].task, seed=len(images), **settings)
            bar.update(len(prompts))
    return images


def judge(cases, images):
    """Judge one picture a case: a string of verdicts."""
    return bits(case.is_right(world.read(image)) for case, image in zip(cases, images))


def score(generate, test_set, n, seed, title="", **settings):
    """Draw n cases of a test set, as `draw` does, and judge them: a string of verdicts."""
    cases = sample(test_set, n, seed)
    return judge(cases, draw(generate, cases, title, **settings))


@torch.no_grad()
def reconstruct(vae, images):
    """Encode and decode PIL images."""
    batch = to_tensor(images).to(next(vae.parameters()).device)
    return to_images(torch.cat([vae.decode(vae.encode(part)) for part in batch.split(50)]))


def controls(vae, cases, images):
    """Judge baselines: true pictures, VAE copies, other cases' drawings, unedited sources."""
    renders = [world.render(case.target) for case in cases]
    pictures = {"renders": renders, "VAE": reconstruct(vae, renders)}
    pictures["shuffled"] = [*images[1:], images[0]]
    if cases[0].source:
        pictures["unedited"] = [case.source for case in cases]
    return {name: judge(cases, shown) for name, shown in pictures.items()}


def bits(flags):
    """Write one verdict a flag: 1 for right, 0 for wrong."""
    return "".join("1" if flag else "0" for flag in flags)


# ---- statistics ---------------------------------------------------------------------------------

STUDENT = {3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantiles of Student's t, by number of values


def share(verdicts):
    """The share of ones: the score."""
    return verdicts.count("1") / len(verdicts)


def interval(verdicts):
    """Wilson's 95 % interval of the share of ones."""
    n, p, z = len(verdicts), share(verdicts), 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return middle - half, middle + half


def difference(first, second):
    """The mean of second - first, paired case by case, and the half width of its 95 % interval.

    Both are lists of verdict strings, one for each replicate: a seed of the training and the cases. The
    wider of two intervals counts: Student's over the replicates, and the normal one over all cases.
    """
    pairs = [[int(b) - int(a) for a, b in zip(x, y, strict=True)] for x, y in zip(first, second)]
    means, flat = [mean(d) for d in pairs], [x for d in pairs for x in d]
    half = 1.96 * stdev(flat) / sqrt(len(flat))
    if len(means) > 1:
        half = max(half, STUDENT[len(means)] * stdev(means) / sqrt(len(means)))
    return mean(flat), half
