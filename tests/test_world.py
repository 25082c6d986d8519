"""The world: what is drawn is read back, what is malformed is refused, captions are true."""

import random
from itertools import product

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mini import world
from mini.world import Object, Scene

KINDS = (*world.TASKS, "scene")


def test_every_object_everywhere_is_read_back():
    pairs = list(product(world.COLORS, world.SHAPES))
    for background, first in product(world.BACKGROUNDS, range(len(pairs))):
        shifted = pairs[first:] + pairs[:first]
        scene = Scene(background, tuple(Object(*shifted[place], place) for place in range(9)))
        assert world.detect(world.render(scene)) == scene


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_scenes_are_read_back_and_match_their_captions(kind, held_out):
    rng = random.Random(kind)
    for i in range(60):
        scene = world.sample_scene(kind, rng, held_out)
        assert i >= 15 or world.detect(world.render(scene)) == scene
        assert world.matches(world.caption(scene, kind, rng), scene)
        assert all(((o.color, o.shape) in world.HELD_OUT) == held_out for o in scene.objects)


def picture(shape="square", color="red"):
    return np.array(world.render(Scene("white", (Object(color, shape, 4),))))


def half_erased():
    pixels = picture()
    pixels[24:40, 24:32] = world.BACKGROUNDS["white"]
    return pixels


def mixed_colors():
    pixels = picture()
    pixels[32:40] = picture(color="blue")[32:40]
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
    pixels[44:47, 8:24] = (220, 45, 45)
    return pixels


def blob():
    pixels = picture("circle")
    pixels[20:44, 20:44] = (220, 45, 45)
    return pixels


def noise():
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def gray():
    return np.full((64, 64, 3), 128, np.uint8)


DAMAGES = (
    half_erased, mixed_colors, between_colors, between_shapes, blurred, moved, speck, blob, noise,
    gray,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_malformed_pictures_are_refused(damage):
    assert world.detect(Image.fromarray(damage())) is None


def test_nearly_right_pictures_are_read():
    wobble = np.random.default_rng(0).normal(0, 8, (64, 64, 3))
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


def test_the_reserved_eighth_is_the_one_that_the_committed_weights_never_saw():
    scenes = product(world.BACKGROUNDS, world.COLORS, world.SHAPES)
    assert {" ".join(s) for s in scenes if world.is_exam(Scene(s[0], (Object(*s[1:], 4),)))} == {
        "white red star", "white red ring", "white green triangle", "white green star",
        "white green ring", "white blue square", "black blue square",
    }  # fmt: skip
    prompts = [
        world.Prompt(f"a {color} {shape}", (world.Mention(shape, color),))
        for color, shape in product(world.COLORS, world.SHAPES)
    ]
    assert {p.text for p in prompts if world.is_exam(p)} == {"a green star", "a purple circle"}


# ---- edits and references -----------------------------------------------------------------------


def follow(text, scene):
    """Do what an instruction says, read from its words alone: objects {(color, shape, place)}."""
    words, objects = text.split(), {(o.color, o.shape, o.place) for o in scene.objects}
    background = scene.background
    place = world.PLACES.index(text.split(" to the ")[1]) if " to the " in text else None
    if "background" in words:
        return words[-1], objects
    if words[0] == "add":
        return background, objects | {(words[2], words[3], place)}
    named = words[2:4] if words[2] in world.COLORS else words[2:3]
    (meant,) = [o for o in objects if set(named) <= set(o[:2])]
    objects.remove(meant)
    if words[0] == "move":
        objects.add((*meant[:2], place))
    elif words[0] != "remove":
        objects.add((words[-1], *meant[1:]))
    return background, objects


@pytest.mark.parametrize("kind", world.EDITS)
def test_an_instruction_leads_from_source_to_target(kind):
    rng = random.Random(kind)
    for i in range(300):
        edit = world.sample_edit(kind, rng)
        background, objects = follow(edit.text, edit.source)
        assert edit.target.background == background
        assert {(o.color, o.shape, o.place) for o in edit.target.objects} == objects
        for scene in (edit.source, edit.target):
            assert i >= 10 or world.detect(world.render(scene)) == scene
            assert not any((o.color, o.shape) in world.HELD_OUT for o in scene.objects)
        assert edit.source != edit.target
        changed = set(edit.source.objects) ^ set(edit.target.objects)
        assert changed == {o for o in (edit.before, edit.after) if o}


def test_a_reference_describes_its_scene_and_no_other():
    rng, others = random.Random(0), 0
    for _ in range(500):
        reference = world.sample_reference(rng)
        assert world.matches(reference.prompt, reference.scene)
        shown, text = [o for _, o in reference.segments if o], reference.prompt.text
        assert 1 <= len(shown) <= 3 and text.count("<image>") == len(shown)
        assert "".join(words for words, _ in reference.segments) == text.replace("<image>", "")
        for words, o in reference.segments:  # the words leave the color to the picture
            assert not o or not set(words.split()) & world.COLORS.keys()
        changed = shown[0]
        color = next(c for c in world.COLORS if c != changed.color)
        repainted = Object(color, changed.shape, changed.place)
        objects = tuple(repainted if o == changed else o for o in reference.scene.objects)
        others += world.matches(reference.prompt, Scene(reference.scene.background, objects))
    assert others == 0
