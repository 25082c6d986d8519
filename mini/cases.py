"""What is asked of the miniature, and the exact judgement of what it drew.

Scenes and prompts are from the eighth of the world that training never draws (`world.is_exam`).
Judgements are strings of 0 and 1, one letter a case, so that models can be compared case by case.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, takewhile
from math import sqrt
from statistics import mean, stdev

import torch
from PIL import Image
from tqdm import tqdm

from data import training_example
from mini import edits, programs, world
from mini.world import HELD_OUT, SEEN, Mention, Object, Prompt, Reading, Scene
from prompts import reference_prompt, to_images, to_tensor

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)  # r, at which its effect is asked
STREAM = "second edition"  # seed of cases that were never used to choose weights or settings


@dataclass(frozen=True)
class Case:
    """Something to draw, and what to check in the picture."""

    task: str  # of prompts.TASKS
    prompt: list  # strings and PIL images
    target: Scene | None  # a right answer, if there is one
    checks: dict[str, Callable[[Reading], bool]]  # "exact" is the score
    source: Image.Image | None = None  # what an edit starts from


# ---- checks -------------------------------------------------------------------------------------


def asked_for(prompt):
    return lambda read: world.matches(prompt, read.scene)


def one_object(color=None, shape=None):
    """Does a picture show one object, of this color or shape?"""
    return asked_for(Prompt("", (Mention(shape, color),)))


def only(*pairs):
    """Does a picture show these (color, shape) pairs and nothing else?"""
    return lambda read: read.scene is not None and kinds(read) == Counter(pairs)


def kinds(scene):
    return Counter(o.pair for o in scene.objects)


def reference_checks(reference, pictured):
    """kept: what the prompt pictures is there. followed: all that its words say holds."""
    wanted = Counter(o.pair for o in pictured)
    words = [
        replace(mention, shape=None, color=None) if obj in pictured else mention
        for obj, mention in zip(reference.objects, reference.prompt.mentions)
    ]
    return {
        "exact": asked_for(reference.prompt),
        "kept": lambda read: wanted <= kinds(read),
        "followed": asked_for(replace(reference.prompt, mentions=tuple(words))),
    }


# ---- cases like those of training ---------------------------------------------------------------


def t2i_cases(n, seed, pairs=SEEN):
    """The six tasks of GenEval."""
    return {
        task: [Case("t2i", [p.text], scene, {"exact": asked_for(p)}) for scene, p in asked]
        for task, asked in world.benchmark(n // 6, seed, pairs=pairs).items()
    }


def copy_cases(n, seed, pairs=SEEN):
    """Pictures of one to four objects, each of which must keep its place."""

    def case(scene):
        checks = {
            "exact": lambda read: read.scene == scene,
            "kept": lambda read: set(scene.objects) <= set(read.objects),
            "kinds": lambda read: kinds(read) == kinds(scene),
        }
        return Case("i2i", [world.render(scene)], scene, checks)

    rng = random.Random(f"copies {seed}")
    return {"copy": [case(world.sample_scene("scene", rng, pairs, True)) for _ in range(n)]}


def edit_cases(n, seed, pairs=SEEN):
    """Instructions of every kind; each has one right result, in which all else is untouched."""

    def case(edit):
        untouched = set(edit.source.objects) & set(edit.target.objects)
        background = edit.target.background

        def followed(read):
            done = edit.before not in read.objects and edit.after in (None, *read.objects)
            return done and (edit.kind != "background" or read.background == background)

        checks = {
            "exact": lambda read: read.scene == edit.target,
            "kept": lambda read: untouched <= set(read.objects),
            "followed": followed,
        }
        source = world.render(edit.source)
        return Case("edit", [source, edit.text], edit.target, checks, source)

    def some(kind):
        rng = random.Random(f"edits {kind} {seed}")
        made = (edits.sample_edit(kind, rng, pairs, True) for _ in range(n // len(asked)))
        return list(map(case, made))

    asked = ("recolor", "add") if pairs is HELD_OUT else edits.EDITS
    return {kind: some(kind) for kind in asked}


def object_cases(n, seed, pairs=SEEN):
    """Scenes described by words and pictures of their objects, in both templates for that."""
    rng, result = random.Random(f"objects {seed}"), {"objects": [], "combine": []}
    while any(len(cases) < n // 2 for cases in result.values()):
        reference = programs.sample_reference(rng, pairs, exam=True)
        record, size = programs.reference_record(reference), (world.SIZE, world.SIZE)
        task, prompt, _ = training_example(record, size, rng)
        if len(result[task]) < n // 2:
            checks = reference_checks(reference, [obj for _, obj in reference.segments if obj])
            result[task].append(Case(task, prompt, reference.scene, checks))
    return result


def mixing_cases(n, seed, pairs=SEEN):
    """The shape of one picture in the color of another, which no training asks for."""
    rng, cases = random.Random(f"mixing {seed}"), []
    while len(cases) < n:
        first, second = (world.sample_scene("single", rng, exam=True) for _ in range(2))
        (a,), (b,) = first.objects, second.objects
        mixed = (b.color, a.shape)
        if a.color == b.color or a.shape == b.shape or mixed not in pairs:
            continue
        pictures = [world.portrait(o, s.background) for o, s in ((a, first), (b, second))]
        prompt = ["the shape of ", pictures[0], " in the color of ", pictures[1]]
        checks = {
            "exact": only(mixed),
            "kept": lambda read, s=a.shape: {o.shape for o in read.objects} == {s},
            "followed": lambda read, c=b.color: {o.color for o in read.objects} == {c},
            "first copied": only(a.pair),
            "second copied": only(b.pair),
            "swapped": only((a.color, b.shape)),
            "both drawn": only(a.pair, b.pair),
        }
        cases.append(Case("objects", prompt, Scene("white", (Object(*mixed, 4),)), checks))
    return {"mixing": cases}


CASES = {
    "t2i": t2i_cases,
    "copies": copy_cases,
    "edits": edit_cases,
    "objects": object_cases,
    "mixing": mixing_cases,
}


# ---- cases like nothing in training, or that contradict themselves ------------------------------


def trained_pair(rng, shape=None):
    """A random (color, shape) that is not held out."""
    while True:
        pair = rng.choice(list(world.COLORS)), shape or rng.choice(world.SHAPES)
        if pair in SEEN:
            return pair


def two_pairs(rng):
    """Two pairs that differ in color and shape; b's color with a's shape is trained, too."""
    while True:
        a, b = trained_pair(rng), trained_pair(rng)
        if a[0] != b[0] and a[1] != b[1] and (b[0], a[1]) in SEEN:
            return a, b


def picture(pair):
    return world.portrait(Object(*pair, 4))


def one_or_both(a, b, names):
    return dict(zip(names, (only(a), only(b), only(a, b))))


def five_of_a_kind(rng):
    color, shape = pair = trained_pair(rng)
    numbers = enumerate(("two", "three", "four", "five", "six"), 2)
    ends = {f"{word} of them": only(*[pair] * n) for n, word in numbers}
    return Case("t2i", [f"five {color} {world.plural(shape)}"], None, ends)


def two_colors(rng):
    (first, shape), (second, _) = two_pairs(rng)
    names = ("the first color", "the last color", "both")
    ends = one_or_both((first, shape), (second, shape), names)
    return Case("t2i", [f"a {first} {second} {shape}"], None, ends)


def unknown_color(rng):
    trained_pair(rng)  # as unknown_shape does, to stay on the stream that was measured
    return Case("t2i", ["an orange circle"], None, {"a circle": one_object(shape="circle")})


def unknown_shape(rng):
    color, _ = trained_pair(rng)
    ends = {"an object of that color": one_object(color=color)}
    return Case("t2i", [f"a {color} hexagon"], None, ends)


def words_against_picture(rng):
    a, b = two_pairs(rng)
    said = (b[0], a[1])
    ends = one_or_both(a, said, ("as the picture", "as the words", "both"))
    return Case("objects", [f"a {b[0]} {a[1]} ", picture(a)], None, ends)


def two_for_one_place(rng):
    a, b = two_pairs(rng)
    place = rng.choice(world.PLACES)
    prompt = [f"{place} ", picture(a), f", {place} ", picture(b), ", white background"]
    ends = one_or_both(a, b, ("the first", "the second", "both, one elsewhere"))
    return Case("objects", prompt, None, ends)


def one_object_in_colors(rng, count):
    shape = rng.choice(world.SHAPES)
    colors = [color for color in world.COLORS if (color, shape) in SEEN]
    pairs = [(color, shape) for color in rng.sample(colors, count)]

    def some(read):
        return read.scene is not None and kinds(read).keys() <= set(pairs)

    ends = {
        "one of them": lambda read: some(read) and len(read.objects) == 1,
        "some of them": lambda read: some(read) and 1 < len(read.objects) < count,
        "all of them": only(*pairs),
    }
    return Case("objects", [f"a {shape} ", *map(picture, pairs)], None, ends)


def pointless_edit(scene, text):
    fewer = [replace(scene, objects=o) for o in combinations(scene.objects, len(scene.objects) - 1)]
    places = {obj.place for obj in scene.objects}

    def changed(read):
        return read.scene not in (None, scene) and {obj.place for obj in read.objects} == places

    ends = {
        "nothing changed": lambda read: read.scene == scene,
        "an object removed": lambda read: read.scene in fewer,
        "another color or shape": changed,
    }
    source = world.render(scene)
    return Case("edit", [source, text], None, ends, source)


def remove_absent(rng):
    scene = world.sample_scene("scene", rng, exam=True)
    present = {obj.shape for obj in scene.objects}
    shape = rng.choice([shape for shape in world.SHAPES if shape not in present])
    return pointless_edit(scene, f"remove the {trained_pair(rng, shape)[0]} {shape}")


def make_it_what_it_is(rng):
    scene = world.sample_scene("single", rng, exam=True)
    (obj,) = scene.objects
    return pointless_edit(scene, f"make the {obj.shape} {obj.color}")


def each_placed(rng, count):
    reference = programs.sample_reference(rng, exam=True, count=count)
    segments = [
        (text, [world.portrait(obj, reference.scene.background)] if obj else [])
        for text, obj in reference.segments
    ]
    checks = reference_checks(reference, reference.objects)
    right, there = checks["exact"], checks["kept"]
    elsewhere = lambda read: there(read) and not right(read)
    ends = {"all right": right, "all there, some elsewhere": elsewhere}
    task, prompt = reference_prompt(segments, named=False)
    return Case(task, prompt, None, ends)


ODD_CASES = {
    "five of a kind (at most four were trained)": five_of_a_kind,
    "two colors for one object": two_colors,
    "a color it does not know": unknown_color,
    "a shape it does not know": unknown_shape,
    "words against picture": words_against_picture,
    "two pictures for one place": two_for_one_place,
    "3 pictures of one object, each in another color": partial(one_object_in_colors, count=3),
    "4 pictures of one object, each in another color": partial(one_object_in_colors, count=4),
    "remove what is not there": remove_absent,
    "make it what it is": make_it_what_it_is,
    "3 pictures, each with its place": partial(each_placed, count=3),
    "4 pictures, each with its place (at most three were trained)": partial(each_placed, count=4),
}


def odd_cases(n, seed=STREAM):
    """{what: [Case, ...]}, n of each; their checks are the ways in which it can end."""
    rng = random.Random(f"odd {seed}")
    return {what: [make(rng) for _ in range(n)] for what, make in ODD_CASES.items()}


# ---- drawing and judging ------------------------------------------------------------------------


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
    cases = [case for group in CASES[row](n, seed).values() for case in group]
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
