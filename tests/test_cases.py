"""Perfect pictures score 1, other ones do not; statistics against published values."""

from itertools import product

import numpy as np
import pytest
from PIL import Image

from mini import cases, world
from mini.world import HELD_OUT, SEEN, Scene
from prompts import apply_task


@pytest.mark.parametrize("pairs", [SEEN, HELD_OUT], ids=["seen", "held out"])
@pytest.mark.parametrize("row", cases.CASES)
def test_perfect_pictures_pass_every_check_but_those_of_failure(row, pairs):
    for group in cases.CASES[row](12, "test", pairs).values():
        images = [world.render(case.target) for case in group]
        judged = cases.judge(group, images)
        for name in ("exact", "kept", "followed", "kinds"):
            assert set(judged.pop(name, "1")) == {"1"}
        assert not judged or "1" not in "".join(judged.values())
        others = cases.judge(group, [*images[1:], images[0]])["exact"]
        assert row in ("t2i", "mixing") or others.count("1") <= 1  # small scenes may be alike
        for case in group:
            apply_task(case.task, case.prompt)
            blank = world.read(Image.new("RGB", (48, 48), (240, 240, 240)))
            assert not case.checks["exact"](blank)


def test_weaker_checks_see_what_was_kept_and_what_was_done():
    (case,) = cases.edit_cases(5, "test")["recolor"]
    edit_source = world.detect(case.source)
    read = world.read(case.source)
    assert case.checks["kept"](read) and not case.checks["followed"](read)
    changed = set(case.target.objects) - set(edit_source.objects)
    alone = world.read(world.render(Scene(edit_source.background, tuple(changed))))
    assert case.checks["followed"](alone) and not case.checks["exact"](alone)


def test_mixing_tells_its_failures_apart():
    (case, *_) = cases.mixing_cases(3, "test")["mixing"]
    (mixed,) = case.target.objects
    pictures = [part for part in case.prompt if not isinstance(part, str)]
    for picture, name in zip(pictures, ("first copied", "second copied")):
        page = Image.new("RGB", (48, 48), picture.getpixel((0, 0)))
        page.paste(picture, (16, 16))
        judged = {check: f(world.read(page)) for check, f in case.checks.items()}
        assert judged[name] and not judged["exact"] and not judged["swapped"]
        (pictured,) = world.detect(page).objects
        part = mixed.shape == pictured.shape if name[0] == "f" else mixed.color == pictured.color
        assert part


def test_odd_prompts_fit_their_templates_and_end_one_way():
    for what, group in cases.odd_cases(6, "test").items():
        for case in group:
            apply_task(case.task, case.prompt)
            blank = world.read(Image.new("RGB", (48, 48)))
            assert not any(check(blank) for check in case.checks.values()), what
            if case.source:
                ends = cases.judge([case], [case.source])
                assert ends.pop("nothing changed") == "1" and set(ends.values()) == {"0"}


def test_ends_of_odd_prompts_are_told_apart():
    odd = {what: group[0] for what, group in cases.odd_cases(1, "test").items()}

    def ends(case, *scenes):
        reads = [world.read(world.render(scene)) for scene in scenes]
        return [[name for name, check in case.checks.items() if check(read)] for read in reads]

    def scene(*kinds):
        objects = (world.Object(*kind, place) for place, kind in enumerate(kinds))
        return Scene("white", tuple(objects))

    case = odd["five of a kind (at most four were trained)"]
    _, color, noun = case.prompt[0].split()
    kind = color, next(shape for shape in world.SHAPES if noun.startswith(shape))
    three_five = ends(case, scene(*[kind] * 3), scene(*[kind] * 5))
    assert three_five == [["three of them"], ["five of them"]]

    case = odd["two colors for one object"]
    _, *colors, shape = case.prompt[0].split()
    first, last = ((color, shape) for color in colors)
    ended = ends(case, scene(first), scene(last), scene(last, first), scene(last, last))
    assert ended == [["the first color"], ["the last color"], ["both"], []]

    case = odd["remove what is not there"]
    before = world.detect(case.source)
    (first, *others), background = before.objects, before.background
    recolored = world.Object("red" if first.color != "red" else "blue", first.shape, first.place)
    ended = ends(case, before, Scene(background, (recolored, *others)))
    assert ended == [["nothing changed"], ["another color or shape"]]
    assert ends(case, Scene(background, tuple(others)))[0] == ["an object removed"] * bool(others)


def test_evaluation_asks_only_for_what_training_never_draws():
    for row, pairs in product(cases.CASES, (SEEN, HELD_OUT)):
        for group in cases.CASES[row](12, "test", pairs).values():
            for case in group:
                if row != "mixing":  # its prompts are new, whatever they show
                    assert world.is_exam(case.target)
                if case.source:
                    assert world.is_exam(world.detect(case.source))
                asked = {o.pair for o in case.target.objects}
                assert bool(asked & set(HELD_OUT)) == (pairs is HELD_OUT)


def test_wilsons_interval():
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for ones, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = cases.interval("1" * ones + "0" * (n - ones))
        assert np.allclose(found, (low, high), atol=1e-4)


def test_a_difference_needs_more_than_luck():
    first, better = "0101" * 25, "1101" * 25
    middle, half = cases.difference([first], [better])
    assert middle == 0.25 and abs(half - 1.96 * np.std([1, 0, 0, 0] * 25, ddof=1) / 10) < 1e-9
    # three replicates that disagree: Student's interval, 4.303 s / sqrt(3), is the wider one
    middle, half = cases.difference([first] * 3, [better, first, better])
    assert abs(middle - 1 / 6) < 1e-9
    assert abs(half - 4.303 * np.std([0.25, 0, 0.25], ddof=1) / 3**0.5) < 1e-9
    assert half > middle
    assert cases.difference([first] * 3, [first] * 3) == (0, 0)
    with pytest.raises(ValueError):
        cases.difference(["01"], ["011"])
