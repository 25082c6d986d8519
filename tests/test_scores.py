"""Perfect pictures score 1, other ones do not; statistics against published values."""

import random
from itertools import product

import numpy as np
import pytest
from PIL import Image

import scores
import shapes
from data import rendered
from prompts import apply_task
from shapes import Object, Scene


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("row", scores.CASES)
def test_perfect_pictures_pass_every_check_but_those_of_failure(row, held_out):
    for cases in scores.CASES[row](12, "test", held_out).values():
        images = [shapes.render(case.target) for case in cases]
        judged = scores.judge(cases, images)
        for name in ("exact", "kept", "followed", "kinds"):
            assert set(judged.pop(name, "1")) == {"1"}
        assert not judged or "1" not in "".join(judged.values())
        others = scores.judge(cases, [*images[1:], images[0]])["exact"]
        assert row in ("t2i", "mixing") or "1" not in others
        for case in cases:
            apply_task(case.task, case.prompt)
            blank = shapes.read(Image.new("RGB", (64, 64), (240, 240, 240)))
            assert not case.checks["exact"](blank)


def test_weaker_checks_see_what_was_kept_and_what_was_done():
    (case,) = scores.edit_cases(5, "test")["recolor"]
    edit_source = shapes.detect(case.source)
    read = shapes.read(case.source)
    assert case.checks["kept"](read) and not case.checks["followed"](read)
    changed = set(case.target.objects) - set(edit_source.objects)
    alone = shapes.read(shapes.render(Scene(edit_source.background, tuple(changed))))
    assert case.checks["followed"](alone) and not case.checks["exact"](alone)


def test_mixing_tells_its_failures_apart():
    (case, *_) = scores.mixing_cases(3, "test")["mixing"]
    (mixed,) = case.target.objects
    pictures = [part for part in case.prompt if not isinstance(part, str)]
    for picture, name in zip(pictures, ("first copied", "second copied")):
        page = Image.new("RGB", (64, 64), picture.getpixel((0, 0)))
        page.paste(picture, (24, 24))
        judged = {check: f(shapes.read(page)) for check, f in case.checks.items()}
        assert judged[name] and not judged["exact"] and not judged["swapped"]
        (shown,) = shapes.detect(page).objects
        part = mixed.shape == shown.shape if name[0] == "f" else mixed.color == shown.color
        assert part


def test_training_never_draws_what_evaluation_asks():
    rng = random.Random(0)
    for task, _ in product(("t2i", "edit", "objects"), range(300)):
        record = rendered(task, rng)
        for name in ("source", "target"):
            if name in record:
                assert not shapes.is_exam(shapes.detect(record[name]))
    for task, _ in product((*shapes.TASKS, "scene"), range(100)):
        assert not shapes.is_exam(shapes.sample_caption(task, rng)[1])
        assert not shapes.is_exam(shapes.sample_reference(rng).prompt)
    for row, held_out in product(scores.CASES, (False, True)):
        for cases in scores.CASES[row](12, "test", held_out).values():
            for case in cases:
                if row != "mixing":  # its prompts are new, whatever they show
                    assert shapes.is_exam(case.target)
                if case.source:
                    assert shapes.is_exam(shapes.detect(case.source))
                pairs = {(o.color, o.shape) for o in case.target.objects}
                assert bool(pairs & set(shapes.HELD_OUT)) == held_out


def test_a_damaged_cell_leaves_the_others_readable():
    objects = (Object("red", "circle", 0), Object("blue", "star", 8))
    pixels = np.array(shapes.render(Scene("white", objects)))
    pixels[0:8, 0:16] = (40, 195, 220)
    read = shapes.read(Image.fromarray(pixels))
    assert read.objects == objects[1:] and read.unclear == (0,) and read.scene is None
    assert read.background == "white"


def test_wilsons_interval():
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for ones, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = scores.interval("1" * ones + "0" * (n - ones))
        assert np.allclose(found, (low, high), atol=1e-4)


def test_a_difference_needs_more_than_luck():
    first, better = "0101" * 25, "1101" * 25
    middle, half = scores.difference([first], [better])
    assert middle == 0.25 and abs(half - 1.96 * np.std([1, 0, 0, 0] * 25, ddof=1) / 10) < 1e-9
    # three replicates that disagree: Student's interval, 4.303 s / sqrt(3), is the wider one
    middle, half = scores.difference([first] * 3, [better, first, better])
    assert abs(middle - 1 / 6) < 1e-9
    assert abs(half - 4.303 * np.std([0.25, 0, 0.25], ddof=1) / 3**0.5) < 1e-9
    assert half > middle
    assert scores.difference([first] * 3, [first] * 3) == (0, 0)
    with pytest.raises(ValueError):
        scores.difference(["01"], ["011"])
