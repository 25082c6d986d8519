"""Scores of pictures that are known to be right or wrong, guidance, reports and messages."""

import json
from pathlib import Path
from types import SimpleNamespace

from support.cli import UserError

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from checkpoints import metadata, read_tensors
from dream_engine import DreamEngine
from mini import cases, evaluate, world


class Oracle:
    """A stand-in for an engine: it returns the first picture of a prompt, through a perfect VAE."""

    vae = torch.nn.Linear(1, 1)

    def __init__(self):
        self.vae.encode = self.vae.decode = lambda images: images

    def generate(self, prompts, task, **_):
        return [next(part for part in prompt if not isinstance(part, str)) for prompt in prompts]


def test_copies_score_one_and_unchanged_sources_zero(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(DreamEngine, "load", lambda *_: Oracle())
    arguments = ["copies", "edits", "--num", "10", "--guidance", "2", "--out", str(tmp_path)]
    evaluate.main(arguments)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["settings"]["guidance"] == 2 and scores["settings"]["r"] == 0
    for pairs in ("", ", held-out pairs"):
        copies, edits = (scores["rows"][row + pairs].values() for row in ("copies", "edits"))
        assert {verdict for g in copies for verdict in g["exact"] + g["VAE"]} == {"1"}
        assert {verdict for g in edits for verdict in g["exact"] + g["unedited"]} == {"0"}
        assert {verdict for g in edits for verdict in g["renders"]} == {"1"}
    report = (tmp_path / "scores.md").read_text()
    assert "| **copies** | 10 | 1.000 | 0.722 - 1.000 |  | 1.000 | 1.000 | 0.000 |  |" in report
    assert report in capsys.readouterr().out
    assert "| **copies, held-out pairs** | 10 | 1.000 | 0.722 - 1.000 | 1.00 | 1.000 |" in report
    for sheet, is_framed in (("copies", False), ("edits-held-out-pairs", True)):
        page = Image.open(tmp_path / f"{sheet}.png").convert("RGB")
        colors = {found for _, found in page.getcolors(1 << 24)}
        assert ((255, 0, 0) in colors) == is_framed  # wrong pictures have a red frame


def test_reconstructions_are_judged_one_by_one(monkeypatch):
    monkeypatch.setattr(evaluate, "load_vae", lambda file: None)
    monkeypatch.setattr(cases, "reconstruct", lambda vae, images: images[:1] + images[:1])
    trained, held_out = evaluate.ROWS["vae"](SimpleNamespace(num=2))
    assert trained == ("VAE", {"VAE": {"exact": "10"}}) and held_out[0] == "VAE, held-out pairs"


def test_variety_counts_distinct_clear_scenes(monkeypatch):
    scenes = [world.Scene("white", (world.Object("red", "star", i),)) for i in range(2)]
    drawn = [*map(world.render, [*scenes, scenes[0]]), Image.new("RGB", (48, 48), "red")]
    monkeypatch.setattr(DreamEngine, "load", lambda *_: DreamEngine)
    monkeypatch.setattr(DreamEngine, "generate", lambda prompts, **_: drawn[: len(prompts)])
    args = SimpleNamespace(checkpoint=None, device=None)
    assert set(map(tuple, evaluate.variety(args, 2, 4).values())) == {(2, 0.25)}


def test_the_best_guidance_is_stored_and_nothing_else_changes(tmp_path, monkeypatch):
    file = tmp_path / "stage1.safetensors"
    save_file({"x": torch.arange(3.0)}, file, {"config": json.dumps({"stage": 1, "base": 1.5})})
    monkeypatch.setattr(DreamEngine, "load", lambda *_: DreamEngine)
    right = {1.0: "00", 1.5: "01", 2.0: "11", 3.0: "01", 4.5: "00"}
    monkeypatch.setattr(evaluate, "score", lambda *_, guidance: right[guidance])
    evaluate.main(["guidance", "--checkpoint", str(file)])
    assert json.loads(metadata(file)["config"]) == {"stage": 1, "base": 1.5, "guidance": 2.0}
    assert read_tensors(file)["x"].tolist() == [0, 1, 2]


def test_minutes_of_resumed_parts_add_up(tmp_path):
    (tmp_path / "minutes.txt").write_text("vae 3.5\nt5 1.0\nvae 2.0\n")
    (tmp_path / "t5.jsonl").write_text('{"masked": 0.1}\n{"masked": 0.8}\n')
    parts = evaluate.parts_of(tmp_path, {"VAE": {"exact": "1110"}})
    assert parts == {"vae": [5.5, 0.75], "t5": [1.0, 0.8], "sum, two at a time": [6.5, None]}


def test_the_committed_scores_have_every_row():
    file = Path(evaluate.__file__).parents[1] / "docs" / "results" / "scores.json"
    rows = json.loads(file.read_text())["rows"].keys()
    assert rows >= {*cases.CASES} - {*evaluate.UNI_ALONE} | {"base", "VAE"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nonsense"], "unknown row 'nonsense': expected some of vae, captions, base, stage1, t2i"),
        (["--num", "3"], "--num: '3': expected a whole number from 6"),
        (["--run", "nowhere"], "--run nowhere: expected a folder of speedrun.sh"),
        (["copies", "--blend", "2"], "--blend: '2': expected a number from 0 to 1"),
        (["vae", "--checkpoint", "x"], "x: "),
        (["vae", "--unialignment", "x"], "x: "),
        (["base", "--device", "x"], "device x: not usable on this machine"),
    ],
)
def test_mistakes_name_what_would_be_right(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_vae", lambda file: pytest.fail("scored first"))
    with pytest.raises((UserError, FileNotFoundError)) as error:
        evaluate.main(arguments)
    assert message in str(error.value)
