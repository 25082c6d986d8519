"""Instructions, prompts and questions mean what a second interpreter reads in their words alone."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from mini import edits, programs, world
from mini.world import HELD_OUT, PAIRS, SEEN, Object

WAYS = {way: name for name, ways in world.RELATIONS.items() for way in ways}


def triples(scene):
    return {(o.color, o.shape, o.place) for o in scene.objects}


def named(words, objects):
    """The only object of {(color, shape, place)} that "the red circle" or "the circle" names."""
    names = set(words.split()) - {"the"}
    (found,) = [o for o in objects if names <= set(o[:2])]
    return found


def relations(first, second):
    """The relations of one place to another, from their numbers."""
    (row1, col1), (row2, col2) = divmod(first, 3), divmod(second, 3)
    pairs = {"left": col1 < col2, "right": col1 > col2, "above": row1 < row2, "below": row1 > row2}
    return {name for name, holds in pairs.items() if holds}


def related(words, objects):
    """The object that "the red circle" or "the object left of the star" names."""
    if not words.startswith("the object "):
        return named(words, objects)
    way, _, anchor = words.removeprefix("the object ").rpartition(" the ")
    anchor = named(anchor, objects)
    (found,) = [o for o in objects if o != anchor and WAYS[way] in relations(o[2], anchor[2])]
    return found


def follow(text, background, objects):
    """Apply an instruction, from its words alone: the new background, {(color, shape, place)}."""
    last = text.split(" to the ")[-1]
    place = world.PLACES.index(last) if last in world.PLACES else None
    if "the background" in text:
        return text.split()[-1], objects
    if text.startswith("add "):
        _, _, color, shape, *_ = text.split()
        return background, objects | {(color, shape, place)}
    if swap := re.fullmatch("swap the (colors|places) of (the .*) and (the .*)", text):
        a, b = (named(words, objects) for words in swap.groups()[1:])
        if swap[1] == "colors":
            new = {(b[0], *a[1:]), (a[0], *b[1:])}
        else:
            new = {(*a[:2], b[2]), (*b[:2], a[2])}
        return background, objects - {a, b} | new
    verb, rest = text.split(" ", 1)
    if verb == "move":
        before = named(rest.split(" to the ")[0], objects)
        return background, objects - {before} | {(*before[:2], place)}
    if verb == "remove":
        return background, objects - {related(rest, objects)}
    words, color = rest.rsplit(" ", 1)
    before = related(words.removesuffix(" to"), objects)
    return background, objects - {before} | {(color, *before[1:])}


@pytest.mark.parametrize("kind", edits.MAKERS)
def test_an_instruction_leads_from_source_to_target(kind):
    rng = random.Random(kind)
    for i in range(300):
        edit = edits.sample_edit(kind, rng)
        background, objects = edit.source.background, triples(edit.source)
        parts = re.split(", | and ", edit.text) if kind == "several" else [edit.text]
        assert len(parts) == (3 if kind == "several" else 1)
        for part in parts:
            background, objects = follow(part, background, objects)
        assert (edit.target.background, triples(edit.target)) == (background, objects)
        assert edit.source != edit.target and 1 <= len(objects) <= 4
        if kind in edits.EDITS:
            changed = set(edit.source.objects) ^ set(edit.target.objects)
            assert changed == {o for o in (edit.before, edit.after) if o}
        assert i >= 10 or world.detect(world.render(edit.target)) == edit.target


@pytest.mark.parametrize("kind", ["recolor", "add"])
def test_an_edit_with_held_out_pairs_changes_a_seen_source(kind):
    rng = random.Random(kind)
    for _ in range(100):
        edit = edits.sample_edit(kind, rng, HELD_OUT, reserved=True)
        assert edit.after.pair in HELD_OUT and world.is_reserved(edit.target)
        assert all(o.pair in SEEN for o in edit.source.objects)


def test_a_reference_matches_its_scene_and_not_a_recolored_one():
    rng = random.Random(0)
    for _ in range(500):
        reference = programs.sample_reference(rng)
        assert world.matches(reference.prompt, reference.scene)
        pictured, text = [o for _, o in reference.segments if o], reference.prompt.text
        assert 1 <= len(pictured) <= 3 and text.count("<image>") == len(pictured)
        assert "".join(words for words, _ in reference.segments) == text.replace("<image>", "")
        for words, o in reference.segments:  # only the picture of an object shows its color
            assert not o or not set(words.split()) & world.COLORS.keys()
        color = next(c for c in world.COLORS if c != pictured[0].color)
        recolored = replace(pictured[0], color=color)
        objects = tuple(recolored if o == pictured[0] else o for o in reference.scene.objects)
        assert not world.matches(reference.prompt, world.Scene(reference.scene.background, objects))


def test_a_long_prompt_describes_four_objects_completely():
    rng = random.Random(0)
    for _ in range(100):
        scene, prompt = programs.sample_long(rng, PAIRS)
        assert world.matches(prompt, scene) and len(scene.objects) == 4
        words = Counter(re.findall(r"\w+", prompt.text))
        for o in scene.objects:
            assert words[o.shape] and words[o.color] and world.PLACES[o.place] in prompt.text
        other = world.sample_scene("scene", rng, PAIRS)
        assert world.matches(prompt, other) == (other == scene)


def holds(text, scene):
    """Is a semantic prompt true of a scene? From its words alone, without relations."""
    shapes = Counter(o.shape for o in scene.objects)
    colors = Counter(o.color for o in scene.objects)
    numbers = dict(zip(("a", "one", "two", "three", "four", "none"), (1, 1, 2, 3, 4, 0)))
    if found := re.fullmatch("(\\w+) objects, (\\w+) of them (?:a )?(\\w+)", text):
        noun = found[3] if found[3] in world.SHAPES or found[3] in world.COLORS else found[3][:-1]
        noun = noun.removesuffix("e") if noun == "crosse" else noun
        right = numbers[found[2]] == shapes[noun] + colors[noun]
        return right and numbers[found[1]] == len(scene.objects)
    text, _, denied = text.partition(", nothing ")
    text, _, other = text.partition(" that is not ")
    if colors[denied] or colors[other]:
        return False
    counts = Counter()
    pattern = f"(a|two|three|four) (?:{' |'.join(world.COLORS)} )?(\\w+)"
    for number, noun in re.findall(pattern, text):
        shape = next(s for s in world.SHAPES if noun in (s, world.plural(s)))
        counts[shape] += numbers[number]
    return counts == shapes


def test_a_semantic_prompt_is_satisfied_exactly_if_its_words_are_true():
    rng, unsatisfied = random.Random(0), 0
    for _ in range(600):
        scene, prompt = programs.sample_semantic(rng, PAIRS)
        assert programs.satisfies(prompt, scene) and not programs.satisfies(prompt, None)
        assert holds(prompt.text, scene)
        other = world.sample_scene("scene", rng, PAIRS)
        if not any(claim.relation for claim in prompt.claims):
            assert programs.satisfies(prompt, other) == holds(prompt.text, other)
        else:
            mirrored = tuple(Object(*o.pair, 8 - o.place) for o in reversed(scene.objects))
            assert not programs.satisfies(prompt, replace(scene, objects=mirrored))
        unsatisfied += not programs.satisfies(prompt, other)
    assert unsatisfied > 400


@pytest.mark.parametrize("kind", programs.QUESTIONS)
def test_answers_agree_with_the_words_of_the_question(kind):
    rng, answers = random.Random(kind), Counter()
    for _ in range(400):
        scene, question = programs.sample_question(kind, rng, PAIRS)
        found, text = programs.answer(question, scene), question.text
        answers[found] += 1
        singular = {world.plural(s): s for s in world.SHAPES}
        words = {singular.get(word, word) for word in re.findall(r"\w+", text)}
        names = words & {*world.COLORS, *world.SHAPES}
        fitting = [o for o in scene.objects if names <= {o.color, o.shape}]
        if kind in ("total", "count"):
            assert found == programs.NUMBERS[len(fitting)]
        elif kind == "exists":
            assert found == ("yes" if fitting else "no")
        elif kind == "background":
            assert found == scene.background
        elif kind == "at":
            place = world.PLACES.index(text.removeprefix("what is at the ").removesuffix("?"))
            objects = [f"a {o.color} {o.shape}" for o in scene.objects if o.place == place]
            assert found == (objects or ["nothing"])[0]
        elif kind == "relation":
            pattern = f"is the (.*?) ({'|'.join(WAYS)}) the (.*)\\?"
            first, way, second = re.fullmatch(pattern, text).groups()
            a, b = named(first, triples(scene)), named(second, triples(scene))
            assert (found == "yes") == (WAYS[way] in relations(a[2], b[2]))
        else:
            (o,) = fitting
            assert found == (o.color if kind == "color" else world.PLACES[o.place])
    assert max(answers.values()) / 400 < {"at": 0.25, "place": 0.2, "color": 0.25}.get(kind, 0.58)
