"""Programs: instructions, prompts and questions, each against a reading of its words alone."""

import random
import re
from collections import Counter

import pytest

from mini import edits, programs, world
from mini.world import HELD_OUT, PAIRS, SEEN, Object

WAYS = {way: name for name, ways in world.RELATIONS.items() for way in ways}


def triples(scene):
    return {(o.color, o.shape, o.place) for o in scene.objects}


def named(words, objects):
    """The one object of {(color, shape, place)} that "the red circle" or "the circle" means."""
    names = set(words.split()) - {"the"}
    (meant,) = [o for o in objects if names <= set(o[:2])]
    return meant


def stands(first, second):
    """The relations of one place to another, from their numbers."""
    (row1, col1), (row2, col2) = divmod(first, 3), divmod(second, 3)
    pairs = {"left": col1 < col2, "right": col1 > col2, "above": row1 < row2, "below": row1 > row2}
    return {name for name, holds in pairs.items() if holds}


def meant_by(words, objects):
    """Of "the red circle" or "the object left of the star"."""
    if not words.startswith("the object "):
        return named(words, objects)
    way, _, anchor = words.removeprefix("the object ").rpartition(" the ")
    anchor = named(anchor, objects)
    (meant,) = [o for o in objects if o != anchor and WAYS[way] in stands(o[2], anchor[2])]
    return meant


def follow(text, background, objects):
    """Do what an instruction says, read from its words alone: background, {(color, shape, place)}."""
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
        meant = named(rest.split(" to the ")[0], objects)
        return background, objects - {meant} | {(*meant[:2], place)}
    if verb == "remove":
        return background, objects - {meant_by(rest, objects)}
    words, color = rest.removesuffix(" to").rsplit(" ", 1)
    meant = meant_by(words.removesuffix(" to"), objects)
    return background, objects - {meant} | {(color, *meant[1:])}


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
def test_what_a_held_out_edit_makes_is_a_held_out_pair(kind):
    rng = random.Random(kind)
    for _ in range(100):
        edit = edits.sample_edit(kind, rng, HELD_OUT, exam=True)
        assert edit.after.pair in HELD_OUT and world.is_exam(edit.target)
        assert all(o.pair in SEEN for o in edit.source.objects)


def test_a_reference_describes_its_scene_and_no_other():
    rng = random.Random(0)
    for _ in range(500):
        reference = programs.sample_reference(rng)
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
        assert not world.matches(reference.prompt, world.Scene(reference.scene.background, objects))


def test_a_long_prompt_tells_all_of_four_objects():
    rng = random.Random(0)
    for _ in range(100):
        scene, prompt = programs.sample_long(rng, PAIRS)
        assert world.matches(prompt, scene) and len(scene.objects) == 4
        words = Counter(re.findall(r"\w+", prompt.text))
        for o in scene.objects:
            assert words[o.shape] and words[o.color] and world.PLACES[o.place] in prompt.text
        other = world.sample_scene("scene", rng, PAIRS)
        assert world.matches(prompt, other) == (other == scene)


def claimed(text, scene):
    """What a semantic prompt says, read from its words: True if the scene is so."""
    shapes, colors = (
        Counter(o.shape for o in scene.objects),
        Counter(o.color for o in scene.objects),
    )
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
    told = Counter()
    for number, noun in re.findall(
        "(a|two|three|four) (?:{} )?(\\w+)".format(" |".join(world.COLORS)), text
    ):
        shape = next(s for s in world.SHAPES if noun in (s, world.plural(s)))
        told[shape] += numbers[number]
    return told == shapes


def test_a_semantic_prompt_is_true_where_its_words_are():
    rng, lies = random.Random(0), 0
    for _ in range(600):
        scene, prompt = programs.sample_semantic(rng, PAIRS)
        assert programs.satisfies(prompt, scene) and not programs.satisfies(prompt, None)
        assert claimed(prompt.text, scene)
        other = world.sample_scene("scene", rng, PAIRS)
        if not any(claim.relation for claim in prompt.claims):
            assert programs.satisfies(prompt, other) == claimed(prompt.text, other)
        else:
            mirrored = world.Scene(
                scene.background,
                tuple(Object(*o.pair, 8 - o.place) for o in reversed(scene.objects)),
            )
            assert not programs.satisfies(prompt, mirrored)
        lies += not programs.satisfies(prompt, other)
    assert lies > 400


@pytest.mark.parametrize("kind", programs.QUESTIONS)
def test_questions_have_the_answer_that_their_words_ask_for(kind):
    rng, answers = random.Random(kind), Counter()
    for _ in range(400):
        scene, question = programs.sample_question(kind, rng, PAIRS)
        found, text = programs.answer(question, scene), question.text
        answers[found] += 1
        names = [w for w in re.findall(r"\w+", text)]
        singular = {world.plural(s): s for s in world.SHAPES}
        names = {singular.get(w, w) for w in names} & {*world.COLORS, *world.SHAPES}
        fitting = [o for o in scene.objects if names <= {o.color, o.shape}]
        if kind in ("total", "count"):
            assert found == programs.NUMBERS[len(fitting)]
        elif kind == "exists":
            assert found == ("yes" if fitting else "no")
        elif kind == "background":
            assert found == scene.background
        elif kind == "at":
            place = world.PLACES.index(text.removeprefix("what is at the ").removesuffix("?"))
            there = [f"a {o.color} {o.shape}" for o in scene.objects if o.place == place]
            assert found == (there or ["nothing"])[0]
        elif kind == "relation":
            first, rest = re.split(
                f" (?={'|'.join(map(re.escape, sorted(WAYS, key=len)))})", text[7:-1], maxsplit=1
            )
            way, second = rest.split(" the ")[:-1], rest.split(" the ")[-1]
            a, b = named(first, triples(scene)), named(second, triples(scene))
            assert (found == "yes") == (WAYS[" the ".join(way)] in stands(a[2], b[2]))
        else:
            (o,) = fitting
            assert found == (o.color if kind == "color" else world.PLACES[o.place])
    assert max(answers.values()) / 400 < {"at": 0.25, "place": 0.2, "color": 0.25}.get(kind, 0.58)
