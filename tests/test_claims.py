"""Every run of the claims can be trained, continued and scored; a difference needs its interval."""

import json
import shutil
import signal
import subprocess
from importlib import import_module
from pathlib import Path

from support.cli import UserError

import pytest
from PIL import Image

import train
from dream_engine import LMM, STAGE1
from mini import claims


@pytest.mark.parametrize("study", claims.STUDIES, ids=lambda study: study.program)
def test_every_run_has_flags_that_its_program_accepts(study):
    for name, flags in study.runs.items():
        args = import_module(study.program).parse(flags.split())
        assert args.batch in (16, 32) and args.steps <= 3000, name


def test_comparisons_name_existing_runs_and_test_sets():
    for study in claims.STUDIES:
        compared = {n for c in study.comparisons for n in (c.first, c.second)}
        assert compared == study.runs.keys() - {"start"}
    rows = {row for c in claims.COMPARISONS for row in c.rows.split(", ")}
    assert {row.removesuffix(" at r = 1") for row in rows} == claims.CASES.keys()


@pytest.fixture
def in_process(monkeypatch):
    """Let trainings run in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(command, check):
        assert command[1:3] == ["-m", "train"]
        train.main(command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_run_is_trained_with_its_flags_and_scored(tmp_path, monkeypatch, in_process):
    tiny = "--steps 1 --batch 1"
    runs = {"both": f"--stage 1 {tiny}", "on top": f"--stage 2 {tiny} --rank 1 --checkpoint BOTH"}
    pair = claims.Comparison("a claim", "?", "both", "on top", "copies, copies at r = 1")
    study = claims.Study("Tiny", "train", runs, [pair], claims.score_drawing)
    monkeypatch.setattr(claims, "DREAM_ENGINE", study)
    monkeypatch.setattr(claims, "CASES", {"copies": 2})
    scores = claims.run(study, "on top", 5, tmp_path)
    for name, file in (("both", "stage1.safetensors"), ("on-top", "stage2.safetensors")):
        folder = tmp_path / f"{name}-5"
        assert scores == json.loads((folder / "scores.json").read_text())
        assert (folder / file).is_file() and not (folder / "checkpoints").exists()
    assert scores == {row: {"exact": "00"} for row in ("copies", "copies at r = 1")}


def test_a_run_with_a_random_lmm_also_draws_with_it(tmp_path, monkeypatch, in_process):
    runs = {"random": "--stage 1 --steps 1 --batch 1 --lmm RANDOM-LMM"}
    pair = claims.Comparison("a claim", "?", "random", "random", "copies")
    study = claims.Study("", "train", runs, [pair], claims.score_drawing)
    monkeypatch.setattr(claims, "CASES", {"copies": 1})
    claims.run(study, "random", 1, tmp_path)
    found, again = tmp_path / "random-1" / "lmm", claims.random_lmm(tmp_path / "again", 1)
    files = [folder / "model.safetensors" for folder in (found, again, LMM)]
    first, second, trained = (file.read_bytes() for file in files)
    assert first == second != trained
    with pytest.raises(UserError, match="another Qwen2-VL"):  # a checkpoint refuses any other LMM
        claims.DreamEngine.load(claims.SD3, LMM, tmp_path / "random-1")


class Copier:
    """A stand-in for the engine of a run: of `two` it copies its prompt, of `one` it draws black."""

    def __init__(self, folder):
        self.copies = Path(folder).name.startswith("two")

    def generate(self, prompts, **_):
        return [prompt[0] if self.copies else Image.new("RGB", (48, 48)) for prompt in prompts]


def test_a_claim_continues_where_it_stopped_and_is_reported(tmp_path, monkeypatch, capsys):
    runs = {"one": "--stage 1", "two": "--stage 1 --layers 1"}
    pair = claims.Comparison("adapter", "Do they help?", "one", "two", "copies")
    study = claims.Study("First", "train", runs, [pair], claims.score_drawing)
    monkeypatch.setattr(claims, "STUDIES", [study, claims.Study("Second", "train", {}, [], None)])
    monkeypatch.setattr(claims, "CASES", {"copies": 4})
    monkeypatch.setattr(claims.DreamEngine, "load", lambda sd3, lmm, folder: Copier(folder))
    started = []

    def trained(command, check):
        started.append(command)
        if len(started) == 3:
            raise KeyboardInterrupt
        args = train.options().parse_args(command[3:])
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
    assert len(started) == 7  # six runs; one was started twice
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
