"""The world: what is drawn is read back, what is malformed is refused, captions are true."""

import random
from itertools import product

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mini import world
from mini.scenes import _any_scene
from mini.world import HELD_OUT, PAIRS, SEEN, Object, Scene

KINDS = (*world.TASKS, "scene")


def test_every_object_everywhere_is_read_back():
    for background, first in product(world.BACKGROUNDS, range(len(PAIRS))):
        shifted = PAIRS[first:] + PAIRS[:first]
        scene = Scene(background, tuple(Object(*shifted[place], place) for place in range(9)))
        assert world.detect(world.render(scene)) == scene


@pytest.mark.parametrize("pairs", [SEEN, HELD_OUT, PAIRS])
@pytest.mark.parametrize("kind", KINDS)
def test_scenes_are_read_back_and_match_their_captions(kind, pairs):
    rng = random.Random(kind)
    for i in range(60):
        scene = world.sample_scene(kind, rng, pairs)
        assert i >= 15 or world.detect(world.render(scene)) == scene
        assert world.matches(world.caption(scene, kind, rng), scene)
        assert all(o.pair in pairs for o in scene.objects)


def picture(shape="square", color="red"):
    return np.array(world.render(Scene("white", (Object(color, shape, 4),))))


def half_erased():
    pixels = picture()
    pixels[16:32, 16:24] = world.BACKGROUNDS["white"]
    return pixels


def mixed_colors():
    pixels = picture()
    pixels[24:32] = picture(color="blue")[24:32]
    return pixels


def between_colors():
    return (picture() // 2 + picture(color="blue") // 2).astype(np.uint8)


def between_shapes():
    return (picture("star") // 2 + picture("circle") // 2).astype(np.uint8)


def blurred():
    return np.array(Image.fromarray(picture("star")).filter(ImageFilter.GaussianBlur(4)))


def moved():
    return np.roll(picture(), 5, axis=1)


def speck():
    pixels = picture()
    pixels[36:39, 4:20] = (220, 45, 45)
    return pixels


def blob():
    pixels = picture("circle")
    pixels[14:34, 14:34] = (220, 45, 45)
    return pixels


def noise():
    return np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)


def gray():
    return np.full((48, 48, 3), 128, np.uint8)


DAMAGES = (
    half_erased, mixed_colors, between_colors, between_shapes, blurred, moved, speck, blob, noise,
    gray,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_malformed_pictures_are_refused(damage):
    assert world.detect(Image.fromarray(damage())) is None


def test_nearly_right_pictures_are_read():
    wobble = np.random.default_rng(0).normal(0, 8, (48, 48, 3))
    pixels = (picture("star") + wobble).clip(0, 255).astype(np.uint8)
    assert world.detect(Image.fromarray(pixels)) == Scene("white", (Object("red", "star", 4),))


def test_a_damaged_cell_leaves_the_others_readable():
    objects = (Object("red", "circle", 0), Object("blue", "star", 8))
    pixels = np.array(world.render(Scene("white", objects)))
    pixels[0:8, 0:16] = (40, 195, 220)
    read = world.read(Image.fromarray(pixels))
    assert read.objects == objects[1:] and read.unclear == (0,) and read.scene is None
    assert read.background == "white"


def test_matching_wants_exactly_what_was_asked():
    prompt = world.Prompt(
        "a red circle left of a blue star",
        (world.Mention("circle", "red"), world.Mention("star", "blue")),
        "left",
    )
    circle, star = Object("red", "circle", 0), Object("blue", "star", 5)
    assert world.matches(prompt, Scene("white", (circle, star)))
    mirrored = (Object("blue", "star", 3), Object("red", "circle", 8))
    swapped = (Object("blue", "circle", 0), Object("red", "star", 5))
    extra = (circle, star, Object("cyan", "ring", 7))
    for objects in (mirrored, swapped, extra, (circle,), (star,)):
        assert not world.matches(prompt, Scene("white", objects))
    assert not world.matches(prompt, None)


def test_benchmark_is_fixed_and_covers_the_six_tasks():
    first, again = world.benchmark(5, seed="a"), world.benchmark(5, seed="a")
    assert first == again and tuple(first) == world.TASKS
    assert first != world.benchmark(5, seed="b")


def test_a_tenth_or_so_is_reserved_for_evaluation_alone():
    rng = random.Random(0)
    scenes = [
        world.sample_scene("scene", rng, exam=exam) for exam in (False, True) for _ in range(99)
    ]
    assert [world.is_exam(scene) for scene in scenes] == [False] * 99 + [True] * 99
    every = [_any_scene("scene", rng, PAIRS) for _ in range(4000)]
    assert abs(sum(map(world.is_exam, every)) / 4000 - 1 / 8) < 0.02


def test_two_backgrounds_in_one_picture_are_refused():
    pixels = np.array(world.render(Scene("white", (Object("red", "star", 0),))))
    pixels[32:, 32:] = world.BACKGROUNDS["black"]
    read = world.read(Image.fromarray(pixels))
    assert read.background == "white" and read.unclear == (8,) and read.scene is None


def test_a_segmentation_is_a_picture_of_the_world_with_a_color_a_shape():
    rng = random.Random(0)
    for _ in range(50):
        scene = world.sample_scene("scene", rng, PAIRS)
        read = world.detect(world.render(world.segment(scene)))
        assert [(o.shape, o.place) for o in read.objects] == [
            (o.shape, o.place) for o in scene.objects
        ]
        assert all(o.color == world.LABELS[o.shape] and o.pair in SEEN for o in read.objects)
        assert read.background == "black"
    assert len(set(world.LABELS.values())) == len(world.SHAPES)


def test_edges_are_white_lines_within_the_shapes():
    scene = Scene("white", (Object("red", "square", 4),))
    lines = np.array(world.edges(scene))[..., 0] > 128
    expected = np.zeros((48, 48), bool)
    expected[17:31, 17:31] = True
    expected[18:30, 18:30] = False
    assert (lines == expected).all()
