"""The table of runs is sound, runs go on where they stopped, and claims are judged with care."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import train
from dream_engine import STAGE1
from mini import claims
from support.cli import UserError


def test_every_run_is_one_that_train_accepts():
    for name, flags in claims.RUNS.items():
        args = train.parse(flags.format(out="runs/claims", seed=0).split())
        assert args.batch == 16 and args.steps <= 3000, name


def test_comparisons_ask_for_what_their_runs_are_scored_on():
    for c in claims.COMPARISONS:
        for name in (c.first, c.second):
            for row in c.rows.split(", "):
                row, _, r = row.partition(" at r = ")
                assert row in claims.ROWS[int(claims.RUNS[name].split()[1])]
                assert not r or name in claims.AT_R1


def test_a_run_is_trained_by_its_flags_and_scored(tmp_path, monkeypatch):
    monkeypatch.setitem(claims.RUNS, "tiny", "--stage 1 --steps 1 --batch 1 --layers 1")
    monkeypatch.setitem(claims.ROWS, 1, {"copies": 2})
    monkeypatch.setattr(claims, "AT_R1", ("tiny",))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def in_this_process(command, check):
        assert Path(command[1]).samefile(train.__file__)
        train.main(command[2:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", in_this_process)
    try:
        scores = claims.run("tiny", 5, tmp_path)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    folder = tmp_path / "tiny-5"
    assert scores == json.loads((folder / "scores.json").read_text())
    assert scores["copies"]["exact"] == scores["copies at r = 1"]["exact"] == "00"
    assert (folder / "stage1.safetensors").is_file() and not (folder / "checkpoints").exists()


class Copier:
    """Stands for an engine that was trained in folder: run `two` copies, run `one` draws nothing."""

    def __init__(self, folder):
        self.copies = Path(folder).name.startswith("two")

    def generate(self, prompts, **_):
        return [prompt[0] if self.copies else Image.new("RGB", (48, 48)) for prompt in prompts]


def test_a_claim_goes_on_where_it_stopped_and_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claims, "RUNS", {"one": "--stage 1", "two": "--stage 1 --layers 1"})
    monkeypatch.setattr(claims, "ROWS", {1: {"copies": 4}})
    compared = claims.Comparison("adapter", "Do they help?", "one", "two", "copies")
    monkeypatch.setattr(claims, "COMPARISONS", (compared,))
    monkeypatch.setattr(claims.DreamEngine, "load", lambda sd3, lmm, folder: Copier(folder))
    started = []

    def trained(command, check):
        started.append(command)
        if len(started) == 3:
            raise KeyboardInterrupt
        args = train.options().parse_args(command[2:])
        assert args.resume
        Path(args.out, "checkpoints").mkdir(parents=True)
        shutil.copy(STAGE1, args.out)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", trained)
    command = ["adapter", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        claims.main(command)
    claims.main(command)
    claims.main(command)
    assert len(started) == 7  # six runs, one of them started twice
    seeds = [line[line.index("--seed") + 1] for line in started]
    assert seeds == ["0", "1", "2", "2", "0", "1", "2"]
    results = json.loads((tmp_path / "claims.json").read_text())
    exact = {n: [s["copies"]["exact"] for s in run.values()] for n, run in results["runs"].items()}
    assert exact == {"one": ["0000"] * 3, "two": ["1111"] * 3}
    written = (tmp_path / "claims.md").read_text()
    line = "| one | two | 0.000 | 1.000 | +1.000 ± 0.000 | B | copies |"
    assert f"{line} Do they help? (`adapter`) | 3 |" in written
    assert written in capsys.readouterr().out


def test_a_training_that_fails_ends_the_command(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(UserError, match="both, seed 0: its training ended with code 3"):
        claims.run("both", 0, tmp_path)


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


def test_mistakes_name_what_would_be_right():
    with pytest.raises(
        UserError, match="unknown claim 'beauty': expected some of curve, odd, joint"
    ):
        claims.main(["beauty"])


def test_the_committed_tables_are_those_of_the_committed_results():
    folder = Path(claims.__file__).parents[1] / "docs" / "results"
    results = json.loads((folder / "claims.json").read_text())
    assert claims.report(results) == (folder / "claims.md").read_text()
