"""What is asked of the miniature, and the exact judgement of what it drew.

A Case is a prompt together with all that tells a right picture from a wrong one. Its scenes and
prompts are of the eighth of the world that training never draws (`shapes.is_exam`). Judgements are
kept as strings of 0 and 1, a letter for each case, so that models are compared case by case.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from math import sqrt
from statistics import mean, stdev

import torch
from PIL import Image
from tqdm import tqdm

import shapes
from data import rendered_reference, training_example
from prompts import reference_prompt, to_images, to_tensor
from shapes import Mention, Object, Prompt, Reading, Scene

SIZE = (shapes.SIZE, shapes.SIZE)
STREAM = "closing"  # of cases that no choice of weights or settings has looked at


@dataclass(frozen=True)
class Case:
    """Something to draw, and what to say of a picture."""

    task: str  # of prompts.TASKS
    prompt: list  # strings and PIL images
    target: Scene  # a right answer
    checks: dict[str, Callable[[Reading], bool]]  # "exact" is the score
    source: Image.Image | None = None  # what an edit starts from


# ---- what is asked ------------------------------------------------------------------------------


def t2i_cases(n, seed, held_out=False):
    """The six tasks of GenEval."""
    return {
        task: [Case("t2i", [p.text], scene, {"exact": asked_for(p)}) for scene, p in pairs]
        for task, pairs in shapes.benchmark(n // 6, seed, held_out=held_out).items()
    }


def copy_cases(n, seed, held_out=False):
    """Pictures of one to four objects, each in its place."""

    def case(scene):
        checks = {
            "exact": lambda read: read.scene == scene,
            "kept": lambda read: set(scene.objects) <= set(read.objects),
            "kinds": lambda read: Counter(map(kind, scene.objects)) == Counter(kinds_of(read)),
        }
        return Case("i2i", [shapes.render(scene)], scene, checks)

    rng = random.Random(f"copies {seed}")
    return {"copy": [case(shapes.sample_scene("scene", rng, held_out, True)) for _ in range(n)]}


def edit_cases(n, seed, held_out=False):
    """Instructions of every kind: the one scene that each makes, all else untouched."""

    def case(edit):
        untouched = set(edit.source.objects) & set(edit.target.objects)
        paper = edit.target.background

        def followed(read):
            gone, come = edit.before not in read.objects, edit.after in (None, *read.objects)
            return gone and come and (edit.kind != "background" or read.background == paper)

        checks = {
            "exact": lambda read: read.scene == edit.target,
            "kept": lambda read: untouched <= set(read.objects),
            "followed": followed,
        }
        source = shapes.render(edit.source)
        return Case("edit", [source, edit.text], edit.target, checks, source)

    kinds = ("recolor", "add") if held_out else shapes.EDITS
    return {
        which: [
            case(shapes.sample_edit(which, rng, held_out, exam=True))
            for _ in range(n // len(kinds))
        ]
        for which in kinds
        for rng in [random.Random(f"edits {which} {seed}")]
    }


def object_cases(n, seed, held_out=False):
    """Scenes told in words and pictures of their objects, in both templates that do so."""
    rng, result = random.Random(f"objects {seed}"), {"objects": [], "combine": []}
    while any(len(cases) < n // 2 for cases in result.values()):
        told = shapes.sample_reference(rng, held_out, exam=True)
        task, prompt, _ = training_example(rendered_reference(told), SIZE, rng)
        shown = [o for _, o in told.segments if o]
        if len(result[task]) < n // 2:
            result[task].append(Case(task, prompt, told.scene, reference_checks(told, shown)))
    return result


def reference_checks(told, shown):
    """Kept: what the pictures show is there. Followed: all that the words say holds."""
    pictured = Counter(map(kind, shown))
    words = [
        replace(m, shape=None, color=None) if o in shown else m
        for o, m in zip(told.objects, told.prompt.mentions)
    ]
    return {
        "exact": asked_for(told.prompt),
        "kept": lambda read: pictured <= Counter(kinds_of(read)),
        "followed": asked_for(replace(told.prompt, mentions=tuple(words))),
    }


def mixing_cases(n, seed, held_out=False):
    """The shape of one picture in the color of another, as no training asks for."""
    rng, cases = random.Random(f"mixing {seed}"), []
    while len(cases) < n:
        first, second = (shapes.sample_scene("single", rng, exam=True) for _ in range(2))
        (a,), (b,) = first.objects, second.objects
        mixed = (b.color, a.shape)
        if a.color == b.color or a.shape == b.shape or (mixed in shapes.HELD_OUT) != held_out:
            continue
        pictures = [shapes.portrait(o, s.background) for o, s in ((a, first), (b, second))]
        prompt = ["the shape of ", pictures[0], " in the color of ", pictures[1]]
        asked = Prompt("", (Mention(a.shape, b.color),))
        checks = {
            "exact": asked_for(asked),
            "kept": lambda read, s=a.shape: {o.shape for o in read.objects} == {s},
            "followed": lambda read, c=b.color: {o.color for o in read.objects} == {c},
            "first copied": only(kind(a)),
            "second copied": only(kind(b)),
            "swapped": only((a.color, b.shape)),
            "both drawn": only(kind(a), kind(b)),
        }
        cases.append(Case("objects", prompt, Scene("white", (Object(*mixed, 4),)), checks))
    return {"mixing": cases}


def odd_cases(n, seed=STREAM):
    """Prompts that nothing in training was like, or that contradict themselves.

    {what: [Case, ...]}; their checks are the ways in which it can end.
    """
    rng, result = random.Random(f"odd {seed}"), {}

    def add(what, make):
        result[what] = [make() for _ in range(n)]

    def pair(color=None, shape=None):
        while True:
            found = color or rng.choice(list(shapes.COLORS)), shape or rng.choice(shapes.SHAPES)
            if found not in shapes.HELD_OUT:
                return found

    def two():
        a, b = pair(), pair()
        while a[0] == b[0] or a[1] == b[1] or (b[0], a[1]) in shapes.HELD_OUT:
            a, b = pair(), pair()
        return a, b

    def picture(kind):
        return shapes.portrait(Object(*kind, 4))

    def case(task, prompt, ends, source=None):
        return Case(task, prompt, None, ends, source)

    def count():
        color, shape = pair()
        text = f"five {color} {shape}{'es' if shape == 'cross' else 's'}"
        numbers = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
        ends = {f"{word} of them": only(*[(color, shape)] * k) for k, word in numbers.items()}
        return case("t2i", [text], ends)

    def two_colors():
        (first, shape), (second, _) = two()
        ends = {"the first color": only((first, shape)), "the last color": only((second, shape))}
        ends["both"] = only((first, shape), (second, shape))
        return case("t2i", [f"a {first} {second} {shape}"], ends)

    def unknown(text, end, holds):
        def make():
            color, _ = pair()
            one = lambda read: read.scene and len(read.objects) == 1
            ends = {end: lambda read: one(read) and holds(read.objects[0], color)}
            return case("t2i", [text.format(color=color)], ends)

        return make

    def word_against_picture():
        a, b = two()
        said = (b[0], a[1])
        ends = {"as the picture": only(a), "as the words": only(said), "both": only(a, said)}
        return case("objects", [f"a {b[0]} {a[1]} ", picture(a)], ends)

    def one_place():
        (a, b), place = two(), rng.choice(range(9))
        name = shapes.PLACES[place]
        ends = {"the first": only(a), "the second": only(b), "both, one elsewhere": only(a, b)}
        prompt = [f"{name} ", picture(a), f", {name} ", picture(b), ", white background"]
        return case("objects", prompt, ends)

    def one_object(k):
        shape = rng.choice(shapes.SHAPES)
        colors = rng.sample([c for c in shapes.COLORS if (c, shape) not in shapes.HELD_OUT], k)
        shown = [(color, shape) for color in colors]
        ends = {
            "one of them": lambda read: any(only(one)(read) for one in shown),
            "some of them": lambda read: read.scene and 1 < len(read.objects) < k
            and set(kinds_of(read)) < set(shown),
            "all of them": only(*shown),
        }  # fmt: skip
        return case("objects", [f"a {shape} ", *map(picture, shown)], ends)

    def placed(k):
        told = shapes.sample_reference(rng, exam=True, count=k)
        paper = told.scene.background
        segments = [(text, [shapes.portrait(o, paper)] if o else []) for text, o in told.segments]
        task, prompt = reference_prompt(segments, named=False)
        checks = reference_checks(told, told.objects)
        elsewhere = lambda read: checks["kept"](read) and not checks["exact"](read)
        ends = {"all right": checks["exact"], "all there, some elsewhere": elsewhere}
        return case(task, prompt, ends)

    def absent():
        scene = shapes.sample_scene("scene", rng, exam=True)
        shape = rng.choice([s for s in shapes.SHAPES if s not in {o.shape for o in scene.objects}])
        return edit(scene, f"remove the {pair(shape=shape)[0]} {shape}")

    def already():
        scene = shapes.sample_scene("single", rng, exam=True)
        (o,) = scene.objects
        return edit(scene, f"make the {o.shape} {o.color}")

    def edit(scene, text):
        left = [Scene(scene.background, tuple(o for o in scene.objects if o != gone))
                for gone in scene.objects]  # fmt: skip
        ends = {"nothing changed": lambda read: read.scene == scene}
        ends["an object removed"] = lambda read: bool(read.objects) and read.scene in left
        ends["another color or shape"] = lambda read: (
            read.scene not in (None, scene)
            and {o.place for o in read.objects} == {o.place for o in scene.objects}
        )
        source = shapes.render(scene)
        return case("edit", [source, text], ends, source)

    add("five of a kind (at most four were trained)", count)
    add("two colors for one object", two_colors)
    add("a color it does not know", unknown("an orange circle", "a circle",
        lambda o, _: o.shape == "circle"))  # fmt: skip
    add("a shape it does not know", unknown("a {color} hexagon", "an object of that color",
        lambda o, color: o.color == color))  # fmt: skip
    add("words against picture", word_against_picture)
    add("two pictures for one place", one_place)
    for k in (3, 4):
        add(f"{k} pictures of one object, each in another color", lambda k=k: one_object(k))
    add("remove what is not there", absent)
    add("make it what it is", already)
    for k in (3, 4):
        never = " (at most three were trained)" if k == 4 else ""
        add(f"{k} pictures, each with its place{never}", lambda k=k: placed(k))
    return result


CASES = {
    "t2i": t2i_cases,
    "copies": copy_cases,
    "edits": edit_cases,
    "objects": object_cases,
    "mixing": mixing_cases,
}


def asked_for(prompt):
    return lambda read: shapes.matches(prompt, read.scene)


def only(*kinds):
    """Are these, as (color, shape), all that a picture shows?"""
    return lambda read: read.scene is not None and Counter(kinds_of(read)) == Counter(kinds)


def kind(obj):
    return obj.color, obj.shape


def kinds_of(read):
    return map(kind, read.objects)


# ---- what is drawn, and how it is judged --------------------------------------------------------


def draw(generate, cases, what="", **settings):
    """A picture for each case, case i from seed i; generate as `DreamEngine.generate`.

    No two cases of a row share their noise: some noise is luckier than other.
    """
    cases, images = list(cases), []
    with tqdm(total=len(cases), desc=what, leave=False) as bar:
        for task, group in groupby(cases, lambda case: case.task):
            group = list(group)
            for i in range(0, len(group), 50):
                prompts = [case.prompt for case in group[i : i + 50]]
                images += generate(prompts, task=task, seed=len(images), **settings)
                bar.update(len(prompts))
    return images


def judge(cases, images):
    """{check: a 0 or 1 for each case}."""
    reads = [shapes.read(image) for image in images]
    return {name: bits(c.checks[name](r) for c, r in zip(cases, reads)) for name in cases[0].checks}


@torch.no_grad()
def controls(vae, cases, images):
    """What perfect pictures, such a VAE's, another case's and unedited ones would score."""
    renders = [shapes.render(case.target) for case in cases]
    batch = to_tensor(renders).to(next(vae.parameters()).device)
    copies = [
        image for part in batch.split(50) for image in to_images(vae.decode(vae.encode(part)))
    ]
    pictures = {"renders": renders, "VAE": copies, "shuffled": [*images[1:], images[0]]}
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
    """second - first, paired case by case, and the half width of its 95 % interval.

    first and second hold a text for each replicate: another seed of training, or of the cases. The
    wider of two intervals counts: Student's over the replicates, and the normal one over all cases.
    """
    pairs = [[int(b) - int(a) for a, b in zip(x, y, strict=True)] for x, y in zip(first, second)]
    means, flat = [mean(d) for d in pairs], [x for d in pairs for x in d]
    half = 1.96 * stdev(flat) / sqrt(len(flat))
    if len(means) > 1:
        half = max(half, STUDENT[len(means)] * stdev(means) / sqrt(len(means)))
    return mean(flat), half
