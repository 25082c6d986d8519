"""The miniature world: 64x64 pictures of one to four coloured shapes.

A laptop can learn it, and it is exact at both ends: every caption is true of its picture by
construction, and `detect` reads a picture back into the scene that drew it, or refuses. Captions
cover the six tasks of GenEval (arXiv 2310.11513). Some (colour, shape) pairs, and an eighth of all
scenes and prompts (`is_exam`), are held out of all training, so that drawing them is no memory.
"""

import itertools
import random
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SIZE, CELL, PITCH = 64, 16, 24  # pixels; the cells of the 3x3 grid start at 0, 24 and 48
COLORS = {
    "red": (220, 45, 45),
    "green": (50, 165, 70),
    "blue": (40, 85, 225),
    "yellow": (250, 200, 30),
    "purple": (155, 55, 185),
    "cyan": (40, 195, 220),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
BACKGROUNDS = {"white": (240, 240, 240), "black": (22, 22, 26)}
PLACES = ("top left", "top", "top right", "left", "center", "right")  # row-major over the grid
PLACES += ("bottom left", "bottom", "bottom right")
TASKS = ("single", "two", "counting", "colors", "position", "attribution")  # GenEval's six
RELATIONS = {
    "left": ("left of", "to the left of", "on the left side of"),
    "right": ("right of", "to the right of", "on the right side of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath"),
}
HELD_OUT = (("green", "star"), ("purple", "square"), ("blue", "ring"), ("yellow", "cross"))
EDITS = ("recolor", "remove", "add", "move", "background")
VERBS = (("make", ""), ("turn", ""), ("change", "to "), ("recolor", "to "))  # of EDITS
TOLERANCE = 0.10  # of `detect`: rms error in [0, 1] over the area of a shape


@dataclass(frozen=True)
class Object:
    color: str
    shape: str
    place: int  # 0..8, row-major

    @property
    def row_col(self):
        return divmod(self.place, 3)


@dataclass(frozen=True)
class Scene:
    background: str
    objects: tuple[Object, ...]  # in order of place


@dataclass(frozen=True)
class Reading:
    """What can be read of a picture, clear or not."""

    background: str | None  # None: the space between the cells is not bare
    objects: tuple[Object, ...]  # the clear ones, in order of place
    unclear: tuple[int, ...]  # places that hold neither one drawing nor bare background

    @property
    def scene(self):
        """All of it as a Scene, or None where any part is not clear."""
        whole = self.background and self.objects and not self.unclear
        return Scene(self.background, self.objects) if whole else None


@dataclass(frozen=True)
class Mention:
    """What a caption says of one noun; None is 'not said'."""

    shape: str | None
    color: str | None = None
    count: int = 1
    place: int | None = None


@dataclass(frozen=True)
class Prompt:
    """A caption together with what it claims, so that `matches` can judge a picture."""

    text: str
    mentions: tuple[Mention, ...]
    relation: str | None = None  # of the first mention to the second
    background: str | None = None


@dataclass(frozen=True)
class Edit:
    """An instruction, and the one scene that it makes of another."""

    kind: str  # one of EDITS
    source: Scene
    text: str
    target: Scene
    before: Object | None = None  # the object meant, as it is in the source
    after: Object | None = None  # and in the target


@dataclass(frozen=True)
class Reference:
    """A scene described in words and in pictures of its objects."""

    scene: Scene
    segments: tuple[tuple[str, Object | None], ...]  # words, and the object pictured after them
    objects: tuple[Object, ...]  # in order of mention
    prompt: Prompt  # what is claimed in all, an <image> for each picture


# ---- drawing and reading ------------------------------------------------------------------------


@cache
def opacity(shape):
    """(16, 16) coverage in [0, 1] of a shape in its cell, antialiased by drawing it 8 times larger."""
    k, n = 8, 8 * CELL
    mask = Image.new("L", (n, n))
    draw = ImageDraw.Draw(mask)
    center, end, hole = (n - 1) / 2, n - k - 1, 4.5 * k  # one pixel of margin
    box, a, b = (k, k, end, end), n // 2 - 5 * k // 2, n // 2 + 5 * k // 2 - 1
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    radii = (n / 2 - k) * np.where(np.arange(10) % 2, 0.45, 1.08)
    star = center + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    outlines = {
        "circle": [(draw.ellipse, box)],
        "square": [(draw.rectangle, box)],
        "triangle": [(draw.polygon, [(center, k), (end, end - k), (k, end - k)])],
        "star": [(draw.polygon, [tuple(point) for point in star])],
        "cross": [(draw.rectangle, (a, k, b, end)), (draw.rectangle, (k, a, end, b))],
        "ring": [(draw.ellipse, box)],
    }
    for method, outline in outlines[shape]:
        method(outline, fill=255)
    if shape == "ring":
        draw.ellipse((hole, hole, n - 1 - hole, n - 1 - hole), fill=0)
    mask = np.asarray(mask, dtype=np.float32).reshape(CELL, k, CELL, k)
    return mask.mean(axis=(1, 3)) / 255


@cache
def _templates(background):
    """All that a cell can hold: pictures (37, 16, 16, 3) in [0, 1], areas (37,), (color, shape)s."""
    paper = np.array(BACKGROUNDS[background], dtype=np.float32) / 255
    names = [None, *itertools.product(COLORS, SHAPES)]
    pictures, areas = [np.broadcast_to(paper, (CELL, CELL, 3))], [CELL * CELL / 4]
    for color, shape in names[1:]:
        alpha, rgb = opacity(shape)[..., None], np.array(COLORS[color], dtype=np.float32)
        pictures.append(alpha * rgb / 255 + (1 - alpha) * paper)
        areas.append(alpha.sum())
    return np.stack(pictures), np.array(areas), names


def cell(place):
    row, col = divmod(place, 3)
    return slice(row * PITCH, row * PITCH + CELL), slice(col * PITCH, col * PITCH + CELL)


def render(scene):
    """Draw a scene as a 64x64 RGB picture."""
    pixels = np.full((SIZE, SIZE, 3), np.array(BACKGROUNDS[scene.background], np.float32) / 255)
    pictures, _, names = _templates(scene.background)
    for obj in scene.objects:
        pixels[cell(obj.place)] = pictures[names.index((obj.color, obj.shape))]
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def portrait(obj, background="white"):
    """The 16x16 picture of an object alone, as it stands in any scene."""
    return render(Scene(background, (obj,))).crop([x * SIZE / 1000 for x in box(obj)])


def box(obj):
    """Where an object is drawn: its cell's left, top, right and bottom in thousandths of the side."""
    rows, cols = cell(obj.place)
    return [1000 * x / SIZE for x in (cols.start, rows.start, cols.stop, rows.stop)]


def read(image):
    """Read a picture cell by cell, whatever it shows: a Reading."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    between = np.arange(SIZE) % PITCH >= CELL
    between = between | between[:, None]
    papers = {name: np.array(rgb) / 255 for name, rgb in BACKGROUNDS.items()}
    error = {name: np.sqrt(((pixels[between] - p) ** 2).mean()) for name, p in papers.items()}
    background = min(error, key=error.get)
    pictures, areas, names = _templates(background)
    objects, unclear = [], []
    for place in range(9):
        squares = ((pixels[cell(place)] - pictures) ** 2).mean(axis=3).sum(axis=(1, 2))
        best = int(squares.argmin())
        if np.sqrt(squares[best] / areas[best]) > TOLERANCE:
            unclear.append(place)
        elif names[best]:
            objects.append(Object(*names[best], place))
    background = background if error[background] <= TOLERANCE else None
    return Reading(background, tuple(objects), tuple(unclear))


def detect(image):
    """Read a picture back into its Scene, or None if any part of it is not as `render` draws.

    Blobs, mixed colours, half shapes and specks, over TOLERANCE in any cell, are all refused.
    """
    return read(image).scene if image.size == (SIZE, SIZE) else None


# ---- scenes and captions ------------------------------------------------------------------------


def is_exam(thing):
    """Is a Scene or Prompt one of the eighth that training never draws, and evaluation alone does?"""
    return zlib.crc32(repr(thing).encode()) % 8 == 0


def sample_scene(task, rng, held_out=False, exam=False):
    """A random scene that a caption of `task` (one of TASKS, or "scene": one to four) can describe.

    Held-out pairs never occur; with `held_out` every object is such a pair instead.
    """
    while is_exam(scene := _any_scene(task, rng, held_out)) != exam:
        pass
    return scene


def _any_scene(task, rng, held_out):
    counts = {"single": 1, "colors": 1, "counting": rng.randint(2, 4), "scene": rng.randint(1, 4)}
    count = counts.get(task, 2)
    pairs = [p for p in itertools.product(COLORS, SHAPES) if (p in HELD_OUT) == held_out]
    if task == "counting":
        shape = rng.choice(SHAPES if not held_out else [s for _, s in HELD_OUT])
        pairs = [p for p in pairs if p[1] == shape]
        chosen = rng.choices(pairs, k=count) if rng.random() < 0.5 else [rng.choice(pairs)] * count
    else:
        chosen = rng.choices(pairs, k=count)
        if count == 2 and task != "scene":  # both differ, so that "which is which" has one answer
            while chosen[0][0] == chosen[1][0] or chosen[0][1] == chosen[1][1]:
                chosen = rng.choices(pairs, k=count)
    places = sorted(rng.sample(range(9), count))
    objects = tuple(Object(*pair, place) for pair, place in zip(chosen, places))
    return Scene(rng.choice(list(BACKGROUNDS)), objects)


def _phrase(mention):
    number = ("a", "two", "three", "four")[mention.count - 1]
    noun = mention.shape + ("es" if mention.shape == "cross" else "s") * (mention.count > 1)
    return " ".join(filter(None, (number, mention.color, noun)))


def describe(scene):
    """The one full caption of a scene: every object in order of place, then the background."""
    parts = [f"{PLACES[o.place]} {o.color} {o.shape}" for o in scene.objects]
    return ", ".join([*parts, f"{scene.background} background"])


def relations(first, second):
    """All RELATIONS of one object to another that hold."""
    (row1, col1), (row2, col2) = first.row_col, second.row_col
    holds = col1 < col2, col1 > col2, row1 < row2, row1 > row2
    return [name for name, is_true in zip(RELATIONS, holds) if is_true]


def caption(scene, task, rng):
    """A true Prompt for a scene from `sample_scene(task)`, in varied wording and detail."""
    objects = list(scene.objects)
    rng.shuffle(objects)
    if task == "scene":
        mentions = tuple(Mention(o.shape, o.color, 1, o.place) for o in objects)
        text = describe(Scene(scene.background, tuple(objects)))
        return Prompt(text, mentions, None, scene.background)
    relation = None
    colored = task in ("colors", "attribution") or (task == "position" and rng.random() < 0.5)
    if task == "counting":
        colors = {o.color for o in objects}
        color = objects[0].color if len(colors) == 1 and rng.random() < 0.5 else None
        mentions = (Mention(objects[0].shape, color, len(objects)),)
    else:
        mentions = tuple(Mention(o.shape, o.color if colored else None) for o in objects)
    phrases = [_phrase(m) for m in mentions]
    if task == "position":
        relation = rng.choice(relations(*objects))
        body = f"{phrases[0]} {rng.choice(RELATIONS[relation])} {phrases[1]}"
    else:
        body = " and ".join(phrases)
    background = scene.background if rng.random() < 0.3 else None
    text = rng.choice(("", "", "a photo of ", "an image of ", "a picture of ")) + body
    if background:
        text += rng.choice((f" on a {background} background", f", {background} background"))
    return Prompt(text, mentions, relation, background)


def sample_caption(task, rng, held_out=False, exam=False):
    """A random Scene of one of TASKS (or "scene") and a Prompt for it."""
    scene = sample_scene(task, rng, held_out, exam)
    while is_exam(prompt := caption(scene, task, rng)) != exam:
        scene = sample_scene(task, rng, held_out, exam)
    return scene, prompt


def sample_edit(kind, rng, held_out=False, exam=False):
    """A random Edit of a kind; the object that it names is the only one of that name.

    With `held_out` (kinds recolor and add) what it makes is an object of a held-out pair.
    """
    while is_exam((edit := _any_edit(kind, rng, held_out, exam)).target) != exam:
        pass
    return edit


def _any_edit(kind, rng, held_out, exam):
    pairs = [p for p in itertools.product(COLORS, SHAPES) if (p in HELD_OUT) == held_out]
    while True:
        source = sample_scene("scene", rng, exam=exam)
        objects = list(source.objects)
        if kind == "background":
            (paper,) = BACKGROUNDS.keys() - {source.background}
            verb, to = rng.choice(VERBS[:3])
            text = f"{verb} the background {to}{paper}"
            return Edit(kind, source, text, Scene(paper, source.objects))
        place = rng.choice([p for p in range(9) if p not in {o.place for o in objects}])
        if kind == "add":
            after = Object(*rng.choice(pairs), place)
            text = f"add a {after.color} {after.shape} to the {PLACES[place]}"
            if len(objects) < 4:
                return Edit(kind, source, text, _scene(source, [*objects, after]), None, after)
            continue
        before = rng.choice(objects)
        objects.remove(before)
        ambiguous = any((o.color, o.shape) == (before.color, before.shape) for o in objects)
        if ambiguous or (kind == "remove" and not objects):
            continue
        alone = all(o.shape != before.shape for o in objects)
        name = before.shape if alone and rng.random() < 0.5 else f"{before.color} {before.shape}"
        if kind == "remove":
            text, after = f"remove the {name}", None
        elif kind == "move":
            after = Object(before.color, before.shape, place)
            text = f"move the {name} to the {PLACES[place]}"
        else:
            colors = [c for c, s in pairs if s == before.shape and c != before.color]
            if not colors:
                continue
            after = Object(rng.choice(colors), before.shape, before.place)
            verb, to = rng.choice(VERBS)
            text = f"{verb} the {name} {to}{after.color}"
        return Edit(kind, source, text, _scene(source, [*objects, after]), before, after)


def _scene(source, objects):
    return Scene(source.background, tuple(sorted(filter(None, objects), key=lambda o: o.place)))


def sample_reference(rng, held_out=False, exam=False, count=None):
    """A random Reference: one to three objects, at least one of them shown and its color not said.

    With a count, so many, and all of them shown.
    """
    while is_exam((reference := _any_reference(rng, held_out, exam, count)).prompt) != exam:
        pass
    return reference


def _any_reference(rng, held_out, exam, count):
    task = "scene" if count else rng.choice(("single", "two", "position", "scene"))
    scene = sample_scene(task, rng, held_out, exam)
    while not (len(scene.objects) == count if count else len(scene.objects) <= 3):
        scene = sample_scene(task, rng, held_out, exam)
    full = caption(scene, task, rng)
    objects, mentions, segments, rest = [], [], [], full.text
    shown = rng.sample(range(len(full.mentions)), count or rng.randint(1, len(full.mentions)))
    for i, m in enumerate(full.mentions):
        key = m.shape if m.place is None else m.place  # either tells the objects apart
        (obj,) = [o for o in scene.objects if key in (o.shape, o.place)]
        said = f"{m.color} {m.shape}" if task == "scene" else _phrase(m)
        article = "" if task == "scene" else "a "
        before, _, rest = rest.partition(said)
        name = article + obj.shape
        name = name if full.text == said else rng.choice(("", name))  # some word must be left
        words, picture = (name, obj) if i in shown else (f"{article}{obj.color} {obj.shape}", None)
        segments += [(before, None), (words, picture)]
        objects.append(obj)
        mentions.append(Mention(obj.shape, obj.color, 1, m.place))
    segments = tuple(s for s in (*segments, (rest, None)) if s != ("", None))
    text = "".join(words + "<image>" * (picture is not None) for words, picture in segments)
    prompt = Prompt(text, tuple(mentions), full.relation, full.background)
    return Reference(scene, segments, tuple(objects), prompt)


def matches(prompt, scene):
    """Is a detected scene (or None) exactly what the prompt asks for: no object more, none less?"""
    if scene is None or prompt.background not in (None, scene.background):
        return False
    wanted = [m for m in prompt.mentions for _ in range(m.count)]
    if len(wanted) != len(scene.objects):
        return False

    def fits(m, obj):
        said = (m.shape, obj.shape), (m.color, obj.color), (m.place, obj.place)
        return all(claim in (None, fact) for claim, fact in said)

    return any(
        all(map(fits, wanted, order))
        and (prompt.relation is None or prompt.relation in relations(*order[:2]))
        for order in itertools.permutations(scene.objects)
    )


def benchmark(n, seed=0, tasks=TASKS, held_out=False):
    """{task: [(Scene, Prompt), ...]}, n of each task, of those that no training draws."""
    rng = random.Random(f"benchmark {seed}")
    return {t: [sample_caption(t, rng, held_out, exam=True) for _ in range(n)] for t in tasks}


# ---- training examples --------------------------------------------------------------------------


class Examples:
    """Endless training examples, with a `data.Manifest`'s interface: one row, another each time."""

    name = identity = "rendered scenes"
    bad_lines, total = {}, 0

    def rows(self, task):
        return np.array([] if task == "answer" else [1], int)

    def ratio(self, row):
        return 1.0

    def record(self, row, task, rng):
        if task == "edit":
            edit = sample_edit(rng.choice(EDITS), rng)
            record = {"task": task, "instruction": edit.text, "caption": describe(edit.target)}
            return record | {"source": render(edit.source), "target": render(edit.target)}
        if task == "objects":
            return reference_record(sample_reference(rng))
        scene, prompt = sample_caption(rng.choice((*TASKS, "scene")), rng)
        return {"task": task, "prompt": prompt.text, "target": render(scene)}


def reference_record(reference):
    """A Reference as an example of task objects."""
    segments = [(text, [box(obj)] if obj else []) for text, obj in reference.segments]
    return {"task": "objects", "segments": segments, "target": render(reference.scene)}
