"""The public benchmark's own files in and out, and copies measured against closed forms."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import shapes
from cli import one_line_errors

METADATA = [  # as in the public evaluation_metadata.jsonl
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a red circle"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "two blue stars",
    },
    {
        "tag": "colors",
        "include": [{"class": "bus", "count": 1, "color": "red"}],
        "prompt": "a ring",
    },
]
FAST = ["--steps", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("metadata.jsonl").write_text("".join(json.dumps(m) + "\n" for m in METADATA))
    return tmp_path


def geneval(*more):
    evaluate.main(["geneval", "--metadata", "metadata.jsonl", "--out", "out", *FAST, *more])


def fails(arguments, capsys):
    with pytest.raises(SystemExit) as end, one_line_errors():
        evaluate.main(arguments)
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    return said[-1]


def test_geneval_writes_the_public_layout():
    geneval()
    files = sorted(str(p.relative_to("out")) for p in Path("out").rglob("*") if p.is_file())
    assert files == sorted(
        f"{i:05d}/{name}"
        for i in range(3)
        for name in ("metadata.jsonl", "grid.png", *(f"samples/{k:04d}.png" for k in range(4)))
    )
    for i, record in enumerate(METADATA):
        assert json.loads(Path(f"out/{i:05d}/metadata.jsonl").read_text()) == record
        pictures = [Image.open(f"out/{i:05d}/samples/{k:04d}.png") for k in range(4)]
        assert len({p.tobytes() for p in pictures}) == 4
        grid = np.asarray(Image.open(f"out/{i:05d}/grid.png"))
        assert np.array_equal(grid[:64, 64:], np.asarray(pictures[1]))


def test_geneval_goes_on_where_it_was_stopped(monkeypatch, capsys):
    geneval()
    before = {p: p.read_bytes() for p in Path("out").rglob("*.png")}
    Path("out/00001/grid.png").unlink()
    Path("out/00001/samples/0003.png").unlink()
    kept = {p: p.stat().st_mtime_ns for p in Path("out").rglob("0000[02]/**/*.png")}
    geneval()
    assert {p: p.read_bytes() for p in Path("out").rglob("*.png")} == before
    assert kept == {p: p.stat().st_mtime_ns for p in kept}
    METADATA.reverse()
    Path("metadata.jsonl").write_text("".join(json.dumps(m) + "\n" for m in METADATA))
    METADATA.reverse()
    said = fails(["geneval", "--metadata", "metadata.jsonl", "--out", "out", *FAST], capsys)
    assert "pictures of another prompt" in said


def test_ranks_share_the_prompts(monkeypatch):
    geneval("--num", "1")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        evaluate.main(
            ["geneval", "--metadata", "metadata.jsonl", "--out", "split", "--num", "1", *FAST]
        )
        expected = {"0": ["00000", "00002"], "1": ["00000", "00001", "00002"]}[rank]
        assert sorted(p.name for p in Path("split").iterdir()) == expected
    for file in Path("out").rglob("*.png"):
        assert file.read_bytes() == Path("split", file.relative_to("out")).read_bytes()


def test_the_summary_is_the_mean_over_tasks_not_pictures(capsys):
    lines = [{"filename": f"{i}.png", "tag": "counting", "correct": i < 1} for i in range(4)]
    lines += [{"filename": "a.png", "tag": "colors", "correct": True, "reason": ""}]
    Path("results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate.main(["geneval-summary", "results.jsonl"])
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert said[0][:2] == ["counting", "0.2500"] and said[1][:2] == ["colors", "1.0000"]
    assert said[2] == ["mean", "0.6250"]


def test_reconstruction_measures_its_copies(monkeypatch, capsys):
    Path("photos").mkdir()
    scene = shapes.Scene("white", (shapes.Object("red", "circle", 4),))
    shapes.render(scene).save("photos/a.png")
    Image.new("RGB", (80, 64), (51, 51, 51)).save("photos/b.jpg", quality=100)
    evaluate.main(["reconstruct", "photos", "--out", "out", "--guidance", "2", "--device", "cpu"])
    scores = json.loads(Path("out/metrics.json").read_text())
    assert scores["a.png"]["l2"] < 0.05 and scores["a.png"]["cosine"] > 0.95
    assert Image.open("out/copies.png").height == 2 * 132 + 4
    # a copy that is off by 0.2 everywhere
    off = lambda self, prompts, *a, **k: [Image.new("RGB", (64, 64))]
    monkeypatch.setattr(evaluate.DreamEngine, "generate", off)
    evaluate.main(["reconstruct", "photos", "--out", "out", "--device", "cpu"])
    assert abs(json.loads(Path("out/metrics.json").read_text())["b.jpg"]["l2"] - 0.2) < 0.002


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["geneval", "--metadata", "none.jsonl"], "none.jsonl"),
        (["geneval", "--metadata", "bad.jsonl"], "bad.jsonl:1: not a line of this kind"),
        (["geneval", "--metadata", "metadata.jsonl", "--num", "0"], "--num must be at least 1"),
        (["geneval-summary", "metadata.jsonl"], "no 'correct'"),
        (["reconstruct", "."], "holds no PNG, JPEG or WebP picture"),
        (["nonsense"], "unknown row 'nonsense'"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, capsys):
    Path("bad.jsonl").write_text("{broken\n")
    assert message in fails(arguments, capsys)
