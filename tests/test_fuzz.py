"""The fuzzer: 500 hostile inputs of one seed find no bug, and it sees each kind of bug."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from support.cli import UserError
from tools import fuzz


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("first", range(0, 500, 50))
def test_hostile_inputs_find_no_bug(first):
    counts, causes = fuzz.fuzz(0, range(first, first + 50))
    assert not causes, "\n".join(causes.values())
    assert sum(sum(ends.values()) for ends in counts.values()) == 50


def refuse(_):
    raise UserError("b.png: expected a picture")


def refuse_in_two_lines(_):
    print("a warning", file=sys.stderr)
    refuse(_)


def give_up(_):
    sys.exit(1)


def print_escape_codes(_):
    print("\x1b[31mred")


def run_code(_):
    Path("code was run").mkdir()


def compute_nan(_):
    torch.nn.ReLU()(torch.tensor([0.0, torch.nan]))


def save_nan(_):
    Path("run").mkdir()
    save_file({"x": torch.tensor([torch.inf])}, "run/a.safetensors")


@pytest.mark.parametrize(
    "function, how",
    [
        (print, "accepted"),
        (refuse, "refused"),
        (refuse_in_two_lines, "tracebacks"),
        (len, "accepted"),
        (abs, "tracebacks"),
        (give_up, "tracebacks"),
        (print_escape_codes, "tracebacks"),
        (run_code, "wrong"),
        (compute_nan, "wrong"),
        (save_nan, "wrong"),
    ],
)
def test_ends(function, how):
    assert fuzz.end(function, [])[0] == how


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="this platform has no alarm")
def test_hangs(monkeypatch):
    monkeypatch.setattr(fuzz, "LIMIT", 0.2)
    assert fuzz.end(lambda _: time.sleep(20), [])[0] == "hangs"


def test_a_seed_and_a_number_make_the_same_input(tmp_path):
    def build(n, name):
        os.mkdir(tmp_path / name)
        os.chdir(tmp_path / name)
        kind, function, arguments = fuzz.build(random.Random(f"0 {n}"))
        files = {f: f.read_bytes() for f in Path().rglob("*") if f.is_file() and f.suffix != ".tar"}
        return kind, function, arguments, files

    for n in range(20):
        assert build(n, f"{n} a") == build(n, f"{n} b")


def test_the_program_counts_prints_and_repeats(monkeypatch, capsys):
    def crash(_):
        raise KeyError("a cause")

    monkeypatch.setattr(fuzz, "COMMANDS", [(1, crash, "records.jsonl")])
    monkeypatch.setattr(fuzz, "count", lambda: range(3))
    with pytest.raises(SystemExit) as stop:
        fuzz.main(["--seed", "7", "--out", "new/fuzz.json"])
    report = json.loads(Path("new/fuzz.json").read_text())
    assert stop.value.code == 1
    assert (report["seed"], report["inputs"], report["tracebacks"], report["hangs"]) == (7, 3, 3, 0)
    said = capsys.readouterr().out
    assert said.count("tracebacks: --seed 7 --only") == 1  # of one cause
    with pytest.raises(SystemExit):
        fuzz.main(["--seed", "7", "--only", "2"])
    assert "KeyError: 'a cause'" in capsys.readouterr().out
