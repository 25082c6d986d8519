"""Scenes of one to four colored shapes: their pictures, their captions and an exact detector.

A picture has 48x48 pixels and a grid of 3x3 cells. A cell of 16 pixels is one token of the MM-DiT
and of the LMM, so an object fills one token. Captions cover the six tasks of GenEval (arXiv
2310.11513). `detect` recovers the scene from a picture, so that no person or model has to judge it.

One eighth of all scenes and prompts is reserved for the test set (`is_reserved`). Dream Engine and
UniAlignment are trained on the pairs of color and shape in SEEN; those in HELD_OUT are held out.
The VAE, the text encoders and the base MM-DiT are trained on all pairs.
"""

import itertools
import random
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SIZE, CELL = 48, 16  # pixels
COLORS = {
    "red": (220, 45, 45),
    "green": (50, 165, 70),
    "blue": (40, 85, 225),
    "yellow": (250, 200, 30),
    "purple": (155, 55, 185),
    "cyan": (40, 195, 220),
}
ANGLES, RADII = np.pi * (np.arange(10) / 5 - 0.5), 56 * np.where(np.arange(10) % 2, 0.45, 1.08)
STAR = 63.5 + RADII[:, None] * np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)
OUTLINES = {  # drawing steps on a cell enlarged to 128 x 128: method of ImageDraw, points, opacity
    "circle": [("ellipse", (8, 8, 119, 119), 255)],
    "square": [("rectangle", (8, 8, 119, 119), 255)],
    "triangle": [("polygon", (63.5, 8, 119, 111, 8, 111), 255)],
    "star": [("polygon", STAR.flatten().tolist(), 255)],
    "cross": [("rectangle", (44, 8, 83, 119), 255), ("rectangle", (8, 44, 119, 83), 255)],
    "ring": [("ellipse", (8, 8, 119, 119), 255), ("ellipse", (36, 36, 91, 91), 0)],
}
SHAPES = tuple(OUTLINES)
BACKGROUNDS = {"white": (240, 240, 240), "black": (22, 22, 26)}
PLACES = ("top left", "top", "top right", "left", "center", "right",
          "bottom left", "bottom", "bottom right")  # fmt: skip
TASKS = ("single", "two", "counting", "colors", "position", "attribution")  # GenEval's six
RELATIONS = {
    "left": ("left of", "to the left of", "on the left side of"),
    "right": ("right of", "to the right of", "on the right side of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath"),
}
PAIRS = tuple(itertools.product(COLORS, SHAPES))
HELD_OUT = (("green", "star"), ("purple", "square"), ("blue", "ring"), ("yellow", "cross"))
SEEN = tuple(pair for pair in PAIRS if pair not in HELD_OUT)
LABELS = dict(zip(SHAPES, ("red", "yellow", "green", "purple", "blue", "cyan")))  # for `segment`
TOLERANCE = 0.10  # for `detect`: largest rms error, of values in [0, 1], over the area of a shape


@dataclass(frozen=True)
class Object:
    color: str
    shape: str
    place: int  # 0..8, row-major

    @property
    def pair(self):
        return self.color, self.shape


@dataclass(frozen=True)
class Scene:
    background: str
    objects: tuple[Object, ...]  # in order of place


@dataclass(frozen=True)
class Reading:
    """The detector's result for every cell of a picture."""

    background: str
    objects: tuple[Object, ...]  # recognised objects, in order of place
    unclear: tuple[int, ...]  # places that match neither an object nor the background

    @property
    def scene(self):
        """The Scene, or None if a cell is unclear or the picture has no object."""
        complete = self.objects and not self.unclear
        return Scene(self.background, self.objects) if complete else None


@dataclass(frozen=True)
class Mention:
    """What a caption says about one noun; None if the caption does not say it."""

    shape: str | None
    color: str | None = None
    count: int = 1
    place: int | None = None

    def fits(self, obj):
        pairs = (self.shape, obj.shape), (self.color, obj.color), (self.place, obj.place)
        return all(said in (None, true) for said, true in pairs)


@dataclass(frozen=True)
class Prompt:
    """A caption and its meaning, which `matches` compares with a scene."""

    text: str
    mentions: tuple[Mention, ...]
    relation: str | None = None  # the first mention is this (left, above, ...) of the second
    background: str | None = None


# ---- drawing and detecting ----------------------------------------------------------------------


@cache
def opacity(shape):
    """Opacity (16, 16) in [0, 1] of a shape in its cell, antialiased by drawing it 8x larger."""
    mask = Image.new("L", (8 * CELL, 8 * CELL))
    for method, points, fill in OUTLINES[shape]:
        getattr(ImageDraw.Draw(mask), method)(points, fill=fill)
    mask = np.asarray(mask, dtype=np.float32).reshape(CELL, 8, CELL, 8)
    return mask.mean(axis=(1, 3)) / 255


def cell(place):
    row, col = divmod(place, 3)
    return slice(row * CELL, (row + 1) * CELL), slice(col * CELL, (col + 1) * CELL)


def paint(background, shapes):
    """Pixels (48, 48, 3) in [0, 255] of [(place, shape, RGB)] on a background (RGB or pixels)."""
    pixels = np.empty((SIZE, SIZE, 3), dtype=np.float32)
    pixels[:] = background
    for place, shape, rgb in shapes:
        alpha = opacity(shape)[..., None]
        pixels[cell(place)] += alpha * (np.array(rgb, dtype=np.float32) - pixels[cell(place)])
    return pixels


def picture(pixels):
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def render(scene):
    """Draw a scene as a 48x48 RGB picture."""
    shapes = [(o.place, o.shape, COLORS[o.color]) for o in scene.objects]
    return picture(paint(BACKGROUNDS[scene.background], shapes))


def portrait(obj, background="white"):
    """Draw one object alone: its cell, a 16x16 picture."""
    rows, cols = cell(obj.place)
    whole = render(Scene(background, (obj,)))
    return whole.crop((cols.start, rows.start, cols.stop, rows.stop))


def box(obj):
    """The box of an object's cell: left, top, right, bottom in thousandths of the image."""
    rows, cols = cell(obj.place)
    return [1000 * x / SIZE for x in (cols.start, rows.start, cols.stop, rows.stop)]


def segment(scene):
    """The segmentation of a scene, as a Scene: every shape in its color of LABELS, on black."""
    return Scene("black", tuple(Object(LABELS[o.shape], o.shape, o.place) for o in scene.objects))


def edges(scene):
    """Draw the outlines of a scene, white on black."""
    area = paint((0, 0, 0), [(o.place, o.shape, (255, 255, 255)) for o in scene.objects])
    inner = np.pad(area, ((1, 1), (1, 1), (0, 0)))
    sides = inner[:-2, 1:-1], inner[2:, 1:-1], inner[1:-1, :-2], inner[1:-1, 2:]
    return picture(area - np.minimum(area, np.minimum.reduce(sides)))


@cache
def _templates(background):
    """Every content of a cell: pictures (37, 768) in [0, 1], areas (37,), pairs (None: empty)."""
    rgb = np.array(BACKGROUNDS[background], dtype=np.float32)
    pictures, areas = [np.broadcast_to(rgb, (CELL, CELL, 3))], [CELL * CELL / 4]
    for color, shape in PAIRS:
        pictures.append(paint(rgb, [(0, shape, COLORS[color])])[cell(0)])
        areas.append(opacity(shape).sum())
    pictures = np.stack(pictures).astype(np.float64).reshape(len(areas), -1) / 255
    return pictures, np.array(areas), (None, *PAIRS)


def read(image):
    """Match each cell of a 48x48 picture with its nearest template: the Reading of least error."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    cells = pixels.reshape(3, CELL, 3, CELL, 3).swapaxes(1, 2).reshape(9, -1)
    readings = []
    for background in BACKGROUNDS:
        pictures, areas, pairs = _templates(background)
        # |cell - template|^2 for all cells and templates: (9, 37)
        errors = (cells**2).sum(1)[:, None] - 2 * cells @ pictures.T + (pictures**2).sum(1)
        best = errors.argmin(axis=1)
        least = errors[np.arange(9), best].clip(0) / 3
        clear = np.sqrt(least / areas[best]) <= TOLERANCE
        recognised = [place for place in range(9) if clear[place] and best[place]]
        objects = tuple(Object(*pairs[best[place]], place) for place in recognised)
        unclear = tuple(place for place in range(9) if not clear[place])
        readings.append((least.sum(), Reading(background, objects, unclear)))
    return min(readings, key=lambda pair: pair[0])[1]


def detect(image):
    """Recover the Scene of a picture; None: not 48x48 pixels, an unclear cell, or no object."""
    return read(image).scene if image.size == (SIZE, SIZE) else None


# ---- scenes and captions ------------------------------------------------------------------------


def is_reserved(thing):
    """Is a Scene, Prompt or Semantic in the eighth that is reserved for the test set?

    Its repr is hashed: another name of a class or field here would change the test set.
    """
    return zlib.crc32(repr(thing).encode()) % 8 == 0


def sample_scene(task, rng, pairs=SEEN, reserved=False):
    """Draw a random scene for a task: one of TASKS, or "scene" for one to four objects.

    pairs: the allowed pairs of color and shape (SEEN, HELD_OUT or PAIRS).
    reserved: draw from the scenes that are reserved for the test set; default: from all others.
    """
    while is_reserved(scene := _any_scene(task, rng, pairs)) != reserved:
        pass
    return scene


def _any_scene(task, rng, pairs):
    count = {"single": 1, "colors": 1, "counting": rng.randint(2, 4), "scene": rng.randint(1, 4)}
    count = count.get(task, 2)
    if task == "counting":
        shape = rng.choice([s for s in SHAPES if any(s == other for _, other in pairs)])
        pairs = [p for p in pairs if p[1] == shape]
        chosen = rng.choices(pairs, k=count) if rng.random() < 0.5 else [rng.choice(pairs)] * count
    else:
        chosen = rng.choices(pairs, k=count)
        if count == 2 and task != "scene":  # two colors, two shapes: each noun means one object
            while chosen[0][0] == chosen[1][0] or chosen[0][1] == chosen[1][1]:
                chosen = rng.choices(pairs, k=count)
    places = sorted(rng.sample(range(9), count))
    objects = tuple(Object(*pair, place) for pair, place in zip(chosen, places))
    return Scene(rng.choice(list(BACKGROUNDS)), objects)


def as_mention(obj, count=1, color=True, place=False):
    """A Mention of an object: its shape, optionally its color and place."""
    return Mention(obj.shape, obj.color if color else None, count, obj.place if place else None)


def plural(shape):
    return shape + ("es" if shape == "cross" else "s")


def phrase(mention):
    """A mention in words: 'a red circle', 'two circles', ..."""
    number = ("a", "two", "three", "four")[mention.count - 1]
    noun = plural(mention.shape) if mention.count > 1 else mention.shape
    return " ".join(filter(None, (number, mention.color, noun)))


def describe(scene):
    """The full caption of a scene: every object in order of place, then the background."""
    parts = [f"{PLACES[o.place]} {o.color} {o.shape}" for o in scene.objects]
    return ", ".join([*parts, f"{scene.background} background"])


def holding(first, second):
    """List the RELATIONS that hold between two objects: the first is left of the second, ..."""
    (row1, col1), (row2, col2) = divmod(first.place, 3), divmod(second.place, 3)
    true = (col1 < col2, col1 > col2, row1 < row2, row1 > row2)
    return list(itertools.compress(RELATIONS, true))


def caption(scene, task, rng):
    """A Prompt that is true of a scene from `sample_scene(task)`. Wording and detail are random."""
    objects = list(scene.objects)
    rng.shuffle(objects)
    if task == "scene":
        text = describe(Scene(scene.background, tuple(objects)))
        mentions = tuple(as_mention(o, place=True) for o in objects)
        return Prompt(text, mentions, None, scene.background)
    colored = task in ("colors", "attribution") or (task == "position" and rng.random() < 0.5)
    mentions = tuple(as_mention(o, color=colored) for o in objects)
    if task == "counting":
        alike = len({o.color for o in objects}) == 1
        mentions = (as_mention(objects[0], len(objects), alike and rng.random() < 0.5),)
    relation, body = None, " and ".join(map(phrase, mentions))
    if task == "position":
        relation = rng.choice(holding(*objects))
        body = f" {rng.choice(RELATIONS[relation])} ".join(map(phrase, mentions))
    background = scene.background if rng.random() < 0.3 else None
    text = rng.choice(("", "", "a photo of ", "an image of ", "a picture of ")) + body
    if background:
        text += rng.choice((f" on a {background} background", f", {background} background"))
    return Prompt(text, mentions, relation, background)


def sample_caption(task, rng, pairs=SEEN, reserved=False):
    """Draw a Scene and a Prompt, both reserved or neither; arguments as of `sample_scene`."""
    while True:
        scene = sample_scene(task, rng, pairs, reserved)
        prompt = caption(scene, task, rng)
        if is_reserved(prompt) == reserved:
            return scene, prompt


def matches(prompt, scene):
    """Does a detected scene (or None) show exactly the objects of the prompt, and no others?"""
    if scene is None or prompt.background not in (None, scene.background):
        return False
    mentions = [m for m in prompt.mentions for _ in range(m.count)]
    if len(mentions) != len(scene.objects):
        return False
    for objects in itertools.permutations(scene.objects):
        related = prompt.relation is None or prompt.relation in holding(*objects[:2])
        if related and all(mention.fits(obj) for mention, obj in zip(mentions, objects)):
            return True
    return False


def benchmark(n, seed=0, pairs=SEEN):
    """Test cases {task: [(Scene, Prompt), ...]}: n for each of TASKS, reserved for the test set."""
    rng = random.Random(f"benchmark {seed}")
    return {t: [sample_caption(t, rng, pairs, reserved=True) for _ in range(n)] for t in TASKS}
