"""GenEval, SemGen-Bench, reconstruction and the check of manifests: files, resuming, messages."""

import json
import zlib
from pathlib import Path
from types import SimpleNamespace

from support.cli import one_line_errors

import numpy as np
import pytest
from PIL import Image

from mini import world
from tools import check_manifest, geneval, reconstruct, semgen
from unialignment import UniAlignment

METADATA = [  # as in the public evaluation_metadata.jsonl
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a red circle"},
    {"tag": "counting", "exclude": [{"class": "clock", "count": 3}], "prompt": "two blue stars"},
    {"tag": "colors", "include": [{"class": "bus", "color": "red"}], "prompt": "a ring"},
]
DRAW = ["--metadata", "metadata.jsonl", "--out"]


class Painter:
    """An engine that records its calls; its pictures have one color, set by prompt and seed."""

    default_size = 32

    def __init__(self):
        self.calls = []

    def generate(self, prompts, seed, size=(32, 32), **options):
        self.calls.append((prompts, options | {"seed": seed, "size": size}))
        return [Image.new("RGB", size, (len(p[-1]), seed + i, 9)) for i, p in enumerate(prompts)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl("metadata.jsonl", METADATA)


@pytest.fixture
def painter(monkeypatch):
    painter = Painter()
    for program in (geneval, semgen):
        monkeypatch.setattr(program, "load_engine", lambda args: painter)
    return painter


def write_jsonl(file, records):
    Path(file).write_text("".join(json.dumps(record) + "\n" for record in records))


def files_in(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*.*")}


def fails(main, arguments, capsys):
    """The last line on stderr of a program that ends with exit code 2."""
    with pytest.raises(SystemExit) as end, one_line_errors():
        main(arguments)
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# ---- geneval ------------------------------------------------------------------------------------


def test_geneval_draws_into_the_public_layout(monkeypatch, engine):
    monkeypatch.setattr(geneval, "load_engine", lambda args: engine)
    write_jsonl("metadata.jsonl", METADATA[:1])
    geneval.main([*DRAW, "out", "--num", "3", "--steps", "2", "--seed", "7"])
    samples = [f"00000/samples/{k:04d}.png" for k in range(3)]
    assert files_in("out").keys() == {"00000/metadata.jsonl", "00000/grid.png", *samples}
    assert json.loads(Path("out/00000/metadata.jsonl").read_text()) == METADATA[0]
    pictures = [Image.open(Path("out", sample)) for sample in samples]
    expected = engine.generate([["a red circle"]] * 3, steps=2, seed=7)
    about = {"prompt": "a red circle", "engine": "dream-engine", "steps": "2"}
    for k, picture in enumerate(pictures):
        assert np.array_equal(picture, expected[k])
        assert picture.text == about | {"seed": str(7 + k)}
    grid = np.asarray(Image.open("out/00000/grid.png"))  # 2 x 2 without gaps
    assert grid.shape == (96, 96, 3)
    assert np.array_equal(grid[:48, 48:], pictures[1])
    assert np.array_equal(grid[48:, :48], pictures[2])


def test_geneval_draws_with_unialignment(uni_folder):
    write_jsonl("metadata.jsonl", METADATA[:1])
    engine = ["--engine", "unialignment", "--checkpoint", str(uni_folder), "--device", "cpu"]
    geneval.main([*DRAW, "out", "--num", "1", "--steps", "2", "--seed", "7", *engine])
    uni = UniAlignment.load(uni_folder, device="cpu")
    (expected,) = uni.generate(["a red circle"], steps=2, seed=7)
    assert np.array_equal(Image.open("out/00000/samples/0000.png"), expected)


def test_geneval_draws_only_what_is_missing(painter, capsys):
    geneval.main([*DRAW, "out"])
    before = files_in("out")
    assert len(before) == 3 * 6
    Path("out/00001/grid.png").unlink()
    Path("out/00001/samples/0003.png").unlink()
    Path("out/00000/samples/0000.png").write_bytes(b"not drawn again")
    geneval.main([*DRAW, "out"])
    assert files_in("out") == before | {"00000/samples/0000.png": b"not drawn again"}
    said = fails(geneval.main, [*DRAW, "out", "--num", "3"], capsys)
    assert "samples: holds more than 3 pictures; choose another --out" in said
    write_jsonl("metadata.jsonl", METADATA[::-1])
    assert "00000: holds pictures of another prompt" in fails(geneval.main, [*DRAW, "out"], capsys)


OTHERS = [
    (["--seed", "8"], "drawn with --seed 7, not --seed 8"),
    (["--engine", "unialignment"], "drawn with --engine dream-engine, not --engine unialignment"),
    (["--steps", "3"], "drawn with --steps 2, not --steps 3"),
    (["--size", "32"], "drawn with no --size, not --size 32"),
    (["--guidance", "2"], "drawn with no --guidance, not --guidance 2.0"),
    (["--checkpoint", "x"], "drawn with no --checkpoint, not --checkpoint x"),
]


@pytest.mark.parametrize("options, message", OTHERS)
def test_a_folder_is_not_continued_with_other_settings(options, message, painter, bench, capsys):
    geneval.main([*DRAW, "out", "--seed", "7", "--steps", "2"])
    semgen.main([*SEMGEN, "out", "--seed", "7"])
    Path("out/00000/grid.png").unlink()  # nothing of it may be drawn anew, either
    Path("out/fullset/t2i_long/0.png").unlink()
    before, calls = files_in("out"), len(painter.calls)
    for program, arguments in (geneval, [*DRAW, "out", "--steps", "2"]), (semgen, [*SEMGEN, "out"]):
        said = fails(program.main, [*arguments, "--seed", "7", *options], capsys)
        assert f".png: {message}; choose another --out" in said
    assert files_in("out") == before and len(painter.calls) == calls


def test_a_decompression_bomb_among_the_pictures_is_named(painter, bench, capsys):
    semgen.main([*SEMGEN, "out"])
    file = Path("out/fullset/edit_multi/1.png")
    data = bytearray(file.read_bytes())
    data[16:24] = (40_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    file.write_bytes(data)
    said = fails(semgen.main, [*SEMGEN, "out"], capsys)
    assert "1.png: expected a PNG of this program (DecompressionBomb" in said


def test_geneval_shares_the_prompts_among_processes(painter, monkeypatch):
    geneval.main([*DRAW, "out", "--num", "1"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, folders in ("0", {"00000", "00002"}), ("1", {"00000", "00001", "00002"}):
        monkeypatch.setenv("RANK", rank)
        geneval.main([*DRAW, "split", "--num", "1"])
        assert {folder.name for folder in Path("split").iterdir()} == folders
    assert files_in("split") == files_in("out")


@pytest.mark.parametrize(
    "rank, world", [(None, "2"), ("0", None), ("x", "2"), ("0", "x"), ("2", "2"), ("-1", "2")]
)
@pytest.mark.parametrize("program", [geneval, semgen])
def test_odd_numbers_of_processes_end_before_drawing(
    program, rank, world, painter, bench, monkeypatch, capsys
):
    for name, value in ("RANK", rank), ("WORLD_SIZE", world):
        if value is not None:
            monkeypatch.setenv(name, value)
    arguments = {geneval: [*DRAW, "out"], semgen: [*SEMGEN, "out"]}[program]
    said = fails(program.main, arguments, capsys)
    assert f"RANK={rank}" in said and "WORLD_SIZE" in said
    assert not painter.calls and not Path("out").exists()


GOOD = b'{"prompt": "a", "tag": "b", "exclude": []}\n'


@pytest.mark.parametrize(
    "line",
    [
        b"{broken",
        b'"prompt tag"',
        b'["prompt", "tag"]',
        b"null",
        b'{"prompt": "a"}',
        b'{"prompt": "a", "tag": null}',
        b'{"prompt": "a", "tag": ["b"]}',
        b'{"prompt": " ", "tag": "b"}',
        b'{"prompt": "a", "tag": "\\ud800"}',
        b'{"prompt": "a", "tag": "b\xff"}',
        GOOD.decode().encode("utf-16"),
        b"[" * 100_000,
        bytes(3_000_000),
    ],
)
def test_a_bad_line_of_a_benchmark_is_a_user_error(line, capsys):
    Path("bad.jsonl").write_bytes(GOOD + b"\n" + line + b"\n")
    said = fails(geneval.main, ["--metadata", "bad.jsonl"], capsys)
    expected = "a JSON object with text in the fields prompt, tag ("
    assert said.startswith(f"error: bad.jsonl:3: expected {expected}")


# ---- semgen -------------------------------------------------------------------------------------

GROUPS = "t2i_long", "t2i_complex", "edit_multi", "edit_complex"
SEMGEN = ["--bench", "bench/semgen_bench.jsonl", "--steps", "2", "--device", "cpu", "--out"]


@pytest.fixture
def bench():
    """Two rows as published; the second has its picture in images/, not at the authors' path."""
    Path("bench/images").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for n, path in enumerate(("pictures/1.jpg", "/home/author/coco/2.jpg")):
        file = Path("bench", path if n == 0 else "images/2.jpg")
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 90, 3), dtype=np.uint8)).save(file)
        texts = {group: f"{group} of row {n}" for group in GROUPS}
        rows.append({"image_id": n + 1, "image_path": path, **texts})
    write_jsonl("bench/semgen_bench.jsonl", rows)
    return rows


def test_semgen_draws_into_the_published_layout(bench, engine, monkeypatch):
    monkeypatch.setattr(semgen, "load_engine", lambda args: engine)
    semgen.main([*SEMGEN, "out", "--seed", "7"])
    files = {f"fullset/{group}/{n}.png" for group in GROUPS for n in (0, 1)}
    sources = {f"fullset/{group}/{n}_SRCIMG.png" for group in GROUPS[2:] for n in (0, 1)}
    assert files_in("out").keys() == files | sources
    source = Image.open("bench/images/2.jpg").resize((48, 48), Image.BICUBIC)  # not cropped
    assert np.array_equal(Image.open("out/fullset/edit_multi/1_SRCIMG.png"), source)
    edit = [source, bench[1]["edit_multi"]]
    text = [bench[1]["t2i_long"]]
    for group, prompt, task in ("t2i_long", text, None), ("edit_multi", edit, "edit"):
        picture = Image.open(f"out/fullset/{group}/1.png")
        (expected,) = engine.generate([prompt], steps=2, seed=7, task=task)
        assert np.array_equal(picture, expected)
        settings = {"seed": "7", "engine": "dream-engine", "steps": "2"}
        assert picture.text == settings | {"prompt": bench[1][group]}


def test_semgen_draws_with_unialignment(bench, uni_folder):
    uni = ["--engine", "unialignment", "--checkpoint", str(uni_folder)]
    semgen.main([*SEMGEN, "out", *uni])
    engine = UniAlignment.load(uni_folder, device="cpu")
    source = Image.open("bench/pictures/1.jpg").resize((32, 32), Image.BICUBIC)
    drawn = engine.generate([bench[0]["t2i_complex"]], steps=2, guidance=7)
    edited = engine.generate([bench[0]["edit_complex"]], [[source]], steps=2, guidance=9)
    assert np.array_equal(Image.open("out/fullset/t2i_complex/0.png"), drawn[0])
    assert np.array_equal(Image.open("out/fullset/edit_complex/0.png"), edited[0])


@pytest.mark.parametrize("name", ["dream-engine", "unialignment"])
def test_semgen_uses_the_settings_of_the_published_script(name, painter, bench):
    arguments = ["--bench", "bench/semgen_bench.jsonl", "--engine", name, "--out"]
    semgen.main([*arguments, "a"])
    for group, (_, options) in zip(GROUPS, painter.calls):
        edits = group.startswith("edit")
        uni, ours = {"guidance": 9.0 if edits else 7.0}, {"task": "edit" if edits else "t2i"}
        given = {"steps": 50, "size": (32, 32), "seed": 0}
        assert options == given | (uni if name == "unialignment" else ours)
    semgen.main([*arguments, "b", "--guidance", "3", "--size", "16", "--steps", "5"])
    for _, options in painter.calls[8:]:
        assert (options["guidance"], options["steps"], options["size"]) == (3.0, 5, (16, 16))


def test_semgen_draws_only_what_is_missing(painter, bench, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "0", "1":
        monkeypatch.setenv("RANK", rank)
        semgen.main([*SEMGEN, "out"])
        texts = [prompts[0][-1] for prompts, _ in painter.calls[-4:]]
        assert texts == [bench[int(rank)][group] for group in GROUPS]
    before = files_in("out")
    Path("out/fullset/edit_multi/1.png").unlink()
    semgen.main([*SEMGEN, "out"])
    assert len(painter.calls) == 9 and files_in("out") == before
    write_jsonl("bench/semgen_bench.jsonl", bench[::-1])
    said = fails(semgen.main, [*SEMGEN, "out"], capsys)
    assert "1.png: shows another prompt; choose another --out" in said
    assert len(painter.calls) == 9 and files_in("out") == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_path": "none/3.jpg"}, "picture at none/3.jpg or at bench/images/3.jpg"),
        ({"edit_multi": " "}, "semgen_bench.jsonl:2: expected a JSON object with text in"),
        ({"t2i_long": None}, "semgen_bench.jsonl:2: expected a JSON object with text in"),
        ({"image_path": "cut.jpg"}, "cut.jpg: expected a whole PNG, JPEG or similar file"),
    ],
)
def test_a_bad_row_of_semgen_is_a_user_error(change, message, painter, bench, capsys):
    Path("bench/cut.jpg").write_bytes(Path("bench/images/2.jpg").read_bytes()[:500])
    write_jsonl("bench/semgen_bench.jsonl", [bench[0], bench[1] | change])
    assert message in fails(semgen.main, [*SEMGEN, "out"], capsys)
    assert len(painter.calls) == (4 if "cut" in message else 0)  # else found before drawing


# ---- reconstruct --------------------------------------------------------------------------------


def test_reconstruct_measures_its_copies(monkeypatch, engine, capsys):
    Path("photos").mkdir()
    scene = world.Scene("white", (world.Object("red", "circle", 4),))
    world.render(scene).save("photos/a.png")
    Image.new("RGB", (80, 64), (51, 51, 51)).save("photos/b.jpg", quality=100)
    monkeypatch.setattr(reconstruct, "load_engine", lambda args: engine)
    reconstruct.main(["photos", "--out", "out", "--guidance", "2", "--steps", "10"])
    scores = json.loads(Path("out/metrics.json").read_text())
    assert scores["a.png"]["l2"] < 0.05 and scores["a.png"]["cosine"] > 0.95
    mean = (scores["a.png"]["l2"] + scores["b.jpg"]["l2"]) / 2
    assert scores["mean"]["l2"] == pytest.approx(mean)
    assert Image.open("out/copies.png").height == 2 * 132 + 4
    assert f"L2 {scores['mean']['l2']:.4f}" in capsys.readouterr().out
    black = lambda prompts, **options: [Image.new("RGB", (64, 64))]  # b.jpg is at level 51 of 255
    stub = SimpleNamespace(generate=black, lmm=engine.lmm, default_size=64)
    monkeypatch.setattr(reconstruct, "load_engine", lambda args: stub)
    reconstruct.main(["photos", "--out", "out"])
    scores = json.loads(Path("out/metrics.json").read_text())
    assert scores["b.jpg"]["l2"] == pytest.approx(0.2, abs=0.002)


# ---- check_manifest -----------------------------------------------------------------------------


def test_check_manifest_counts_examples_and_names_bad_lines(capsys):
    Image.new("RGB", (200, 100), "red").save("a.png")
    segments = [["a red box", [[250, 400, 500, 600]]], [" here", []]]
    lines = [
        {"task": "t2i", "prompt": "red", "target": "a.png"},
        {"task": "i2i", "target": "a.png"},
        {"task": "edit", "source": "a.png", "instruction": "mirror it", "target": "a.png"},
        {"task": "objects", "target": "a.png", "segments": segments},
    ]
    write_jsonl("a.jsonl", 2 * lines)
    check_manifest.main(["a.jsonl"])
    said = capsys.readouterr().out
    assert all(f"{task}: 2 examples" in said for task in ("t2i", "i2i", "edit", "objects"))
    assert "edit: 2 examples, 0 with the caption that UniAlignment needs" in said
    assert "0 of 8 lines are bad" in said and "a.check.png" in said
    assert Image.open("a.check.png").height == 8 * 132 + 4
    Path("cut.png").write_bytes(Path("a.png").read_bytes()[:60])
    bad = [{"task": "i2i", "target": f"{name}.png"} for name in ("none", "cut")]
    write_jsonl("a.jsonl", [*lines, {"task": "t2i"}, *bad])
    with pytest.raises(SystemExit) as end:
        check_manifest.main(["a.jsonl"])
    said = capsys.readouterr().out
    assert end.value.code == 1 and "3 of 7 lines are bad" in said
    assert 'a.jsonl:5: "target" must be a text of 1 to 4000 characters' in said
    assert "a.jsonl:6: none.png" in said and "a.jsonl:7: cut.png" in said


def test_check_manifest_prints_no_escape_codes(capsys):
    write_jsonl("a.jsonl", [{"task": "i2i", "target": "\x1b[2J\x1b]0;title\x07\u202enone.png"}])
    with pytest.raises(SystemExit):
        check_manifest.main(["a.jsonl"])
    said = capsys.readouterr().out
    assert "a.jsonl:1: ?[2J?]0;title??none.png: no such image file" in said
    assert all(line.isprintable() for line in said.splitlines())


@pytest.mark.parametrize(
    "program, arguments, message",
    [
        (geneval, [], "required: --metadata"),
        (geneval, ["--metadata", "none.jsonl"], "error: none.jsonl: no such file"),
        (geneval, ["--metadata", "wide.jsonl"], "wide.jsonl: is UTF-16; save as UTF-8"),
        (geneval, ["--metadata", "array.jsonl"], "is one JSON array; expected one object a line"),
        (geneval, [*DRAW, "empty.jsonl"], "--out empty.jsonl/grid.png: cannot be written ("),
        (geneval, [*DRAW, "empty.jsonl/x"], "--out empty.jsonl/x/grid.png: cannot be written"),
        (geneval, [*DRAW, "out", "--engine", "unialignment", "--lmm", "x"], "--lmm is of --engine"),
        (geneval, ["--metadata", "empty.jsonl"], "empty.jsonl: holds no records"),
        (geneval, [*DRAW, "out", "--num", "0"], "expected a whole number from 1 to 1000"),
        (geneval, [*DRAW, "out", "--num", "100000000000000000000"], "expected a whole number"),
        (geneval, [*DRAW, "out", "--steps", "0"], "--steps: '0': expected a whole number"),
        (geneval, [*DRAW, "out", "--guidance", "nan"], "--guidance: 'nan': expected a number"),
        (geneval, [*DRAW, "out", "--seed", "-1"], "--seed: '-1': expected a whole number"),
        (semgen, ["--bench", "none.jsonl"], "error: none.jsonl: no such file"),
        (semgen, ["--bench", "metadata.jsonl"], "metadata.jsonl:1: expected a JSON object with"),
        (reconstruct, ["."], ".: expected a folder of PNG, JPEG or WebP pictures"),
        (reconstruct, [".", "--blend", "1.5"], "--blend: '1.5': expected a number from 0 to 1"),
        (
            reconstruct,
            ["photos", "--out", "empty.jsonl"],
            "empty.jsonl/copies.png: cannot be written",
        ),
        (check_manifest, ["none.jsonl"], "none.jsonl: no such manifest"),
    ],
)
def test_user_errors_are_one_line(program, arguments, message, capsys):
    Path("empty.jsonl").write_bytes(b"\n")
    Path("wide.jsonl").write_text(json.dumps(METADATA[0]), encoding="utf-16")
    Path("array.jsonl").write_text(json.dumps(METADATA))
    Path("photos").mkdir()
    Image.new("RGB", (8, 8)).save("photos/a.png")
    assert message in fails(program.main, arguments, capsys)
