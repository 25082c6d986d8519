"""The table of runs is sound, runs go on where they stopped, and claims are judged with care."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import train
from dream_engine import LMM, STAGE1
from mini import claims
from support.cli import UserError


def test_every_run_is_one_that_train_accepts():
    for study in claims.STUDIES:
        for name, flags in study.runs.items():
            args = train.parse(flags.split())
            assert args.batch in (16, 32) and args.steps <= 3000, name


def test_comparisons_are_of_runs_that_are_there_and_rows_that_can_be_asked():
    for study in claims.STUDIES:
        compared = {n for c in study.comparisons for n in (c.first, c.second)}
        assert compared == study.runs.keys() - {"start"}
    rows = {row for c in claims.COMPARISONS for row in c.rows.split(", ")}
    assert {row.removesuffix(" at r = 1") for row in rows} == claims.CASES.keys()


@pytest.fixture
def here(monkeypatch):
    """Trainings run in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def in_this_process(command, check):
        assert Path(command[1]).samefile(train.__file__)
        train.main(command[2:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", in_this_process)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_run_is_trained_by_its_flags_and_scored(tmp_path, monkeypatch, here):
    tiny = "--steps 1 --batch 1"
    runs = {"both": f"--stage 1 {tiny}", "on top": f"--stage 2 {tiny} --rank 1 --checkpoint BOTH"}
    asked = [claims.Comparison("a claim", "?", "both", "on top", "copies, copies at r = 1")]
    study = claims.Study("Tiny", runs, asked, claims.score_drawing)
    monkeypatch.setattr(claims, "DREAM_ENGINE", study)
    monkeypatch.setattr(claims, "CASES", {"copies": 2})
    scores = claims.run(study, "on top", 5, tmp_path)
    for name, file in (("both", "stage1.safetensors"), ("on-top", "stage2.safetensors")):
        folder = tmp_path / f"{name}-5"
        assert scores == json.loads((folder / "scores.json").read_text())
        assert (folder / file).is_file() and not (folder / "checkpoints").exists()
    assert scores == {row: {"exact": "00"} for row in ("copies", "copies at r = 1")}


def test_a_run_with_a_random_lmm_is_drawn_with_it(tmp_path, monkeypatch, here):
    runs = {"random": "--stage 1 --steps 1 --batch 1 --lmm RANDOM-LMM"}
    asked = [claims.Comparison("a claim", "?", "random", "random", "copies")]
    monkeypatch.setattr(claims, "CASES", {"copies": 1})
    claims.run(claims.Study("", runs, asked, claims.score_drawing), "random", 1, tmp_path)
    found, again = tmp_path / "random-1" / "lmm", claims.random_lmm(tmp_path / "again", 1)
    files = [folder / "model.safetensors" for folder in (found, again, LMM)]
    first, second, learnt = (file.read_bytes() for file in files)
    assert first == second != learnt
    with pytest.raises(UserError, match="another Qwen2-VL"):  # of which it would be refused
        claims.DreamEngine.load(claims.SD3, LMM, tmp_path / "random-1")


class Copier:
    """Stands for an engine that was trained in folder: run `two` copies, run `one` draws nothing."""

    def __init__(self, folder):
        self.copies = Path(folder).name.startswith("two")

    def generate(self, prompts, **_):
        return [prompt[0] if self.copies else Image.new("RGB", (48, 48)) for prompt in prompts]


def test_a_claim_goes_on_where_it_stopped_and_is_reported(tmp_path, monkeypatch, capsys):
    runs = {"one": "--stage 1", "two": "--stage 1 --layers 1"}
    asked = [claims.Comparison("adapter", "Do they help?", "one", "two", "copies")]
    studies = [
        claims.Study("First", runs, asked, claims.score_drawing),
        claims.Study("Second", {}, [], None),
    ]
    monkeypatch.setattr(claims, "STUDIES", studies)
    monkeypatch.setattr(claims, "CASES", {"copies": 4})
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
    assert written.startswith("**First**") and "Second" not in written
    assert written in capsys.readouterr().out


def test_a_training_that_fails_ends_the_command(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(UserError, match="both, seed 0: its training ended with code 3"):
        claims.run(claims.DREAM_ENGINE, "both", 0, tmp_path)


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
    with pytest.raises(UserError, match="unknown claim 'beauty': expected some of joint, blend"):
        claims.main(["beauty"])


def test_the_committed_tables_are_those_of_the_committed_results():
    folder = Path(claims.__file__).parents[1] / "docs" / "results"
    results = json.loads((folder / "claims.json").read_text())
    assert claims.report(results) == (folder / "claims.md").read_text()
