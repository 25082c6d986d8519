"""The report card: sums of minutes, guidance stored in a checkpoint, a base that draws as asked."""

import json

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import metadata, read
from mini import report


def test_minutes_of_resumed_parts_add_up(tmp_path):
    file = tmp_path / "minutes.txt"
    file.write_text("vae 3.5\nt5 1.0\nvae 2.0\n")
    assert report.minutes_of(file) == {"vae": 5.5, "t5": 1.0}


@pytest.mark.parametrize("config, expected", [({"guidance": 2.0}, 2.0), ({}, 4.5), (None, 4.5)])
def test_a_checkpoint_says_its_guidance_or_is_drawn_at_the_default(tmp_path, config, expected):
    file = tmp_path / "stage2.safetensors"
    about = None if config is None else {"config": json.dumps(config)}
    save_file({"x": torch.zeros(1)}, file, about)
    assert report.stored_guidance(file) == expected


def test_the_best_guidance_is_stored_and_nothing_else_changes(tmp_path, monkeypatch):
    file = tmp_path / "stage1.safetensors"
    save_file({"x": torch.arange(3.0)}, file, {"config": json.dumps({"stage": 1, "base": 1.5})})
    monkeypatch.setattr(report.DreamEngine, "load", lambda checkpoint: report.DreamEngine)
    right = {1.0: "00", 1.5: "01", 2.0: "11", 3.0: "01", 4.5: "00"}
    monkeypatch.setattr(report, "score", lambda *_, guidance: {"single": right[guidance]})
    report.choose_guidance(file, 2)
    assert json.loads(metadata(file)["config"]) == {"stage": 1, "base": 1.5, "guidance": 2.0}
    assert read(file)["x"].tolist() == [0, 1, 2]
