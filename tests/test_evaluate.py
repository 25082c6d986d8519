"""Scores of pictures that are known to be right or wrong, and what the command says."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dream_engine import DreamEngine
from mini import evaluate, world
from support.cli import UserError


class Oracle:
    """Stands for an engine: copies exactly, edits by handing back the source, and has no VAE."""

    vae = torch.nn.Linear(1, 1)

    def __init__(self):
        self.vae.encode = self.vae.decode = lambda images: images

    def generate(self, prompts, task, **_):
        return [next(part for part in prompt if not isinstance(part, str)) for prompt in prompts]

    def check(self, *settings):
        pass


def test_copies_score_one_and_edits_that_change_nothing_zero(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(DreamEngine, "load", lambda *_: Oracle())
    arguments = ["copies", "edits", "--num", "10", "--guidance", "2", "--out", str(tmp_path)]
    evaluate.main(arguments)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["settings"]["guidance"] == 2 and scores["settings"]["r"] == 0
    for row, copied, edited in (("", "1", "0"), (", held-out pairs", "1", "0")):
        copies, edits = scores["rows"]["copies" + row], scores["rows"]["edits" + row]
        assert {flag for g in copies.values() for flag in g["exact"] + g["VAE"]} == {copied}
        assert {flag for g in edits.values() for flag in g["exact"] + g["unedited"]} == {edited}
        assert {flag for g in edits.values() for flag in g["renders"]} == {"1"}
    report = (tmp_path / "scores.md").read_text()
    assert "| **copies** | 10 | 1.000 | 0.722 - 1.000 | 1.000 | 1.000 | 0.000 |  |" in report
    assert report in capsys.readouterr().out
    page = Image.open(tmp_path / "copies.png")  # two rows of ten pictures, enlarged
    assert page.size == (10 * 132 + 4, 2 * 132 + 4)
    assert (tmp_path / "edits-held-out-pairs.png").is_file()


def test_a_caption_counts_only_word_by_word(monkeypatch):
    scenes = [case.target for case in evaluate.CASES["copies"](3, evaluate.STREAM)["copy"]]
    captions = [world.describe(scene) for scene in scenes]
    captions[1] = captions[1].replace("background", "")
    monkeypatch.setattr(evaluate, "describe_images", lambda lmm, images: captions)
    scores = evaluate.score_captions(SimpleNamespace(lmm=None), 3)
    assert scores == {"caption": {"exact": "101"}}


def test_scores_is_the_command_without_a_name(monkeypatch):
    ran = []
    monkeypatch.setattr(evaluate, "score", ran.append)
    for arguments in ([], ["scores"], ["t2i", "copies"], ["--guidance", "2"]):
        evaluate.main(arguments)
    assert [args.rows for args in ran] == [[], [], ["t2i", "copies"], []]
    assert [args.guidance for args in ran] == [4.5, 4.5, 4.5, 2]
    assert {args.out for args in ran} == {"runs/evaluate"}


def test_help_names_every_command(capsys):
    for arguments, words in (
        (["--help"], ("scores", "claims")),
        (["scores", "--help"], ("--num", *evaluate.ROWS)),
        (["claims", "--help"], ("--out", "adapter", "stages")),
    ):
        with pytest.raises(SystemExit):
            evaluate.main(arguments)
        assert set(words) <= set(
            capsys.readouterr().out.replace(",", " ").replace(";", " ").split()
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nonsense"], "unknown row 'nonsense': expected some of t2i, copies"),
        (["claims", "beauty"], "unknown claim 'beauty': expected some of base, curve, odd, joint"),
        (["--num", "3"], "--num: '3': expected a whole number from 6"),
        (["copies", "--blend", "2"], "--blend: '2': expected a number from 0 to 1"),
    ],
)
def test_mistakes_name_what_would_be_right(arguments, message):
    with pytest.raises(UserError) as error:
        evaluate.main(arguments)
    assert message in str(error.value)
