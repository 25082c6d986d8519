"""Test sets accept true pictures alone, and are held out; statistics agree with published values."""

from itertools import product

import numpy as np
import pytest
from PIL import Image

from mini import cases, world
from mini.world import HELD_OUT, SEEN
from prompts import apply_task


@pytest.mark.parametrize("pairs", [SEEN, HELD_OUT], ids=["trained", "held out"])
@pytest.mark.parametrize("row", cases.CASES)
def test_true_pictures_are_right_and_others_are_wrong(row, pairs):
    for group in cases.CASES[row](12, "test", pairs).values():
        images = [world.render(case.target) for case in group]
        assert set(cases.judge(group, images)) == {"1"}
        others = cases.judge(group, [*images[1:], images[0]])
        open_places = ("t2i", "mixing", "composed", "words alone")  # one picture may fit two cases
        assert row in open_places or others.count("1") <= 1
        for case in group:
            apply_task(case.task, case.prompt)
            blank = world.read(Image.new("RGB", (48, 48), (240, 240, 240)))
            assert not case.is_right(blank)
            if case.source and row != "segmentation":  # it leaves a red circle on black as it is
                assert not case.is_right(world.read(case.source))


def test_every_case_is_held_out():
    for row, pairs in product(cases.CASES, (SEEN, HELD_OUT)):
        for group in cases.CASES[row](12, "test", pairs).values():
            for case in group:
                if row not in ("mixing", "segmentation"):  # their input pictures are
                    assert world.is_reserved(case.target)
                if case.source:
                    assert world.is_reserved(world.detect(case.source))
                held_out = {o.pair for o in case.target.objects} & set(HELD_OUT)
                if row in ("semgen", "segmentation"):  # targets of any pair
                    assert pairs is HELD_OUT or not held_out
                    continue
                assert bool(held_out) == (pairs is HELD_OUT)


def test_semgen_has_four_groups_that_no_training_draws():
    groups = cases.semgen_cases(20, "test")
    assert {name: len(group) for name, group in groups.items()} == dict.fromkeys(
        ("long", "semantic", "several", "reference"), 10
    )
    assert all(len(case.prompt[0].split()) > 20 for case in groups["long"])
    assert all(case.prompt[1].count(",") == 1 for case in groups["several"])
    assert all("the object" in case.prompt[1] for case in groups["reference"])


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


def test_the_wider_interval_of_a_difference_counts():
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
