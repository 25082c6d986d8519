"""The table of runs is sound, runs go on where they stopped, and the README says what was measured."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import claims
import evaluate
import scores
import shapes
import train
from cli import one_line_errors
from prompts import apply_task

ROOT = Path(claims.__file__).parent


def test_every_run_is_one_that_train_accepts():
    for name, flags in claims.RUNS.items():
        args = train.parse(flags.format(out="runs/claims", seed=0).split())
        assert args.batch == 16 and args.steps <= 3000, name


def test_comparisons_ask_for_what_their_runs_are_scored_on():
    for c in claims.COMPARISONS:
        for name in (c.first, c.second):
            for row in c.rows:
                row, _, r = row.partition(" at r = ")
                assert row in claims.ROWS[int(claims.RUNS[name].split()[1])]
                assert not r or name in claims.AT_R1


def test_odd_prompts_fit_their_templates_and_end_one_way():
    for what, cases in scores.odd_cases(6, "test").items():
        for case in cases:
            apply_task(case.task, case.prompt)
            blank = shapes.read(Image.new("RGB", (64, 64)))
            assert not any(check(blank) for check in case.checks.values()), what
            if case.source:
                ends = scores.judge([case], [case.source])
                assert ends.pop("nothing changed") == "1" and set(ends.values()) == {"0"}


def test_a_claim_is_trained_scored_compared_and_kept(tmp_path, monkeypatch, capsys):
    tiny = "--stage 1 --steps 2 --batch 2"
    monkeypatch.setattr(claims, "RUNS", {"one": tiny, "two": f"{tiny} --layers 1"})
    monkeypatch.setattr(claims, "ROWS", {1: {"copies": 4}})
    asked = claims.Comparison("layers", "Do they help?", "one", "two", ("copies",))
    monkeypatch.setattr(claims, "COMPARISONS", (asked,))
    started, handlers = [], [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]

    def counted(command, check):
        started.append(command)
        if len(started) == 3:
            raise KeyboardInterrupt
        train.main([str(part) for part in command[2:]])
        for number, handler in handlers:
            signal.signal(number, handler)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(claims.subprocess, "run", counted)
    arguments = ["layers", "--out", str(tmp_path)]
    with pytest.raises(SystemExit), one_line_errors():
        evaluate.main(["claims", *arguments])
    assert "interrupted" in capsys.readouterr().err
    evaluate.main(["claims", *arguments])
    assert len(started) == 7  # six runs, one of them tried twice
    assert (tmp_path / "claims.json").is_file()
    evaluate.main(["claims", *arguments])
    assert len(started) == 7
    results = json.loads((tmp_path / "claims.json").read_text())
    assert {
        len(s["copies"]["exact"]) for run in results["runs"].values() for s in run.values()
    } == {4}
    said = (tmp_path / "claims.md").read_text()
    line = "| one | two | 0.000 | 0.000 | +0.000 ± 0.000 | no difference shown | copies |"
    assert f"{line} Do they help? (`layers`) | 3 |" in said and said in capsys.readouterr().out


@pytest.mark.parametrize(
    "first, second, better",
    [
        (["01" * 50] * 3, ["11" * 50] * 3, "B"),
        (["11" * 50] * 3, ["01" * 50] * 3, "A"),
        (["0110"] * 3, ["0111"] * 3, "no difference shown"),
    ],
)
def test_a_difference_is_claimed_only_beyond_its_interval(first, second, better):
    assert claims.compared(first, second)[-1] == better


def test_unknown_claims_end_in_one_line(capsys):
    with pytest.raises(SystemExit), one_line_errors():
        evaluate.main(["claims", "beauty"])
    assert (
        "unknown claim 'beauty': expected some of base, curve, guidance, odd"
        in capsys.readouterr().err
    )
