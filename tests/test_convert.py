"""Public datasets become manifests: small files in their layouts, and all that may be wrong there."""

import io
import json
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import convert
from cli import one_line_errors


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()  # hostile names find something to escape to
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def picture(seed, size=(12, 8), kind="JPEG", **options):
    """The bytes of an image file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def write_tar(name, members):
    """A .tar of [(name, bytes, or None for a symbolic link to /etc/passwd)]."""
    Path(name).parent.mkdir(exist_ok=True)
    with tarfile.open(name, "w") as archive:
        for member, data in members:
            info = tarfile.TarInfo(member)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def sample(key, image, caption, suffix="jpg", **columns):
    """The members that img2dataset writes for an image, with its usual columns in the JSON."""
    width, height = Image.open(io.BytesIO(image)).size
    meta = {**columns, "url": f"http://example.com/{key}", "caption": caption, "key": key}
    meta |= {"status": "success", "error_message": None, "width": width, "height": height}
    meta |= {
        "original_width": 4 * width,
        "original_height": 4 * height,
        "exif": "{}",
        "sha256": "0",
    }
    text = json.dumps(meta, indent=4).encode()
    return [(f"{key}.{suffix}", image), (f"{key}.txt", caption.encode()), (f"{key}.json", text)]


def run(*arguments):
    convert.main([str(argument) for argument in arguments])
    return [json.loads(line) for line in Path(arguments[-1]).read_bytes().splitlines()]


def fails(*arguments):
    """The one line that the program says before it ends with exit code 2, leaving no new file."""
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(SystemExit) as end, one_line_errors():
        convert.main([str(argument) for argument in arguments])
    assert end.value.code == 2
    assert sorted(Path.cwd().rglob("*")) == before


def last_line(capsys):
    out, err = capsys.readouterr()
    assert len(out.splitlines()) <= 1
    return (out or err.splitlines()[-1]).strip()


# ---- journeydb ----------------------------------------------------------------------------------


def annotation(path, prompt, caption):
    return {
        "img_path": path,
        "prompt": prompt,
        "Task1": {"Style": ["elegant"], "Content": ["tikka"], "Atmosphere": [], "Others": []},
        "Task2": {"Caption": caption},
        "Task3": {"Style Relevant Questions and Answers": [], "Content Relevant ...": []},
    }


def write_journeydb(*more):
    Path("imgs/000").mkdir(parents=True)
    Path("imgs/000/a-1.jpg").write_bytes(picture(1, (10, 6)))
    Path("imgs/000/b-2.jpg").write_bytes(picture(2, (7, 9)))
    lines = [
        annotation("./000/a-1.jpg", "a gold tikka, --ar 5:3", "A golden head jewelry."),
        annotation("./000/b-2.jpg", "über\nall", "A mountain."),
    ]
    text = [line if isinstance(line, str) else json.dumps(line) for line in (*lines, *more)]
    Path("anno.jsonl").write_text("\n".join(text) + "\n")


def test_journeydb(capsys):
    write_journeydb()
    a, b = (
        {"task": "t2i", "prompt": "a gold tikka, --ar 5:3", "target": "../imgs/000/a-1.jpg"},
        {"task": "t2i", "prompt": "über\nall", "target": "../imgs/000/b-2.jpg"},
    )
    a["size"], b["size"] = [10, 6], [7, 9]
    assert run("journeydb", "anno.jsonl", "--images", "imgs", "--out", "new/j.jsonl") == [a, b]
    assert last_line(capsys) == "new/j.jsonl: 2 lines written, 0 records skipped"
    assert os.listdir("new") == ["j.jsonl"]
    raw = Path("new/j.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert raw == json.dumps(a)  # the order of the keys, too
    told = ["journeydb", "anno.jsonl", "--text", "caption", "--images", "imgs", "--out", "j.jsonl"]
    assert [line["prompt"] for line in run(*told)] == ["A golden head jewelry.", "A mountain."]
    assert run(*told)[0]["target"] == "imgs/000/a-1.jpg"


def test_faulty_annotations_are_skipped_and_counted(folder, capsys):
    (folder / "secret.jpg").write_bytes(picture(3))
    Path("text.jpg").write_text("hello")
    write_journeydb(
        '{"img_path": ',
        "[" * 100_000,
        '"text"',
        annotation("./000/missing.jpg", "p", "c"),
        annotation("../../secret.jpg", "p", "c"),
        annotation(f"{folder}/secret.jpg", "p", "c"),
        annotation("./000/a-1.jpg", " ", "c"),
        annotation("./000/a-1.jpg", "a lone \ud800", "c"),
        annotation("./000/" + 999 * "x", "p", "c"),
        annotation("./000/a\0b.jpg", "p", "c"),
        {"prompt": "p"},
        annotation("./000/cut.jpg", "p", "c"),
        annotation("./000/a-1.jpg", "p", "c") | {"Task2": {}},
    )
    Path("imgs/000/cut.jpg").write_bytes(picture(1)[:100])
    told = ["journeydb", "anno.jsonl", "--images", "imgs", "--out", "j.jsonl"]
    assert [line["prompt"] for line in run(*told)] == ["a gold tikka, --ar 5:3", "über\nall", "p"]
    assert last_line(capsys) == (
        "j.jsonl: 3 lines written, 12 records skipped; anno.jsonl:3 broken JSON; "
        "anno.jsonl:4 broken JSON; anno.jsonl:5 no prompt; ..."
    )
    assert len(run(*told[:2], "--text", "caption", *told[2:])) == 4  # those of the bad prompts


# ---- cc12m --------------------------------------------------------------------------------------


def test_cc12m(capsys):
    images = [picture(0), picture(1, (5, 9)), picture(2, kind="PNG"), picture(3, kind="WEBP")]
    write_tar(
        "shards/00000.tar",
        [
            *sample("000000000", images[0], "a cat"),
            *sample("000000001", images[1], "ein Käfer\nim Gras"),
            *sample("000000003", images[2], "not re-encoded: a PNG in a .jpg"),
        ],
    )
    write_tar("shards/00001.tar", sample("000010000", images[3], "webp", suffix="webp"))
    Path("shards/00000.parquet").write_bytes(b"beside the shards, as img2dataset leaves it")
    lines = run("cc12m", "shards", "--out", "data/cc12m.jsonl")
    assert lines == [
        {"task": "t2i", "prompt": prompt, "target": target, "size": size}
        for prompt, target, size in (
            ("a cat", "cc12m/00000/000000000.jpg", [12, 8]),
            ("ein Käfer\nim Gras", "cc12m/00000/000000001.jpg", [5, 9]),
            ("not re-encoded: a PNG in a .jpg", "cc12m/00000/000000003.png", [12, 8]),
            ("webp", "cc12m/00001/000010000.webp", [12, 8]),
        )
    ]
    for line, data in zip(lines, images):
        file = Path("data", line["target"])
        assert file.read_bytes() == data
        assert np.array_equal(Image.open(file), Image.open(io.BytesIO(data)))
    assert last_line(capsys) == "data/cc12m.jsonl: 4 lines written, 0 records skipped"
    assert run("cc12m", "shards/00001.tar", "--out", "one.jsonl")[0]["prompt"] == "webp"


def test_size_is_that_of_the_upright_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    write_tar("00000.tar", sample("0", picture(0, exif=exif), "lying"))
    (line,) = run("cc12m", "00000.tar", "--out", "c.jsonl")
    assert line["size"] == [8, 12]


def test_images_that_are_there_are_not_written_again():
    write_tar("00000.tar", [*sample("0", picture(0), "a"), *sample("1", picture(1), "b")])
    before = run("cc12m", "00000.tar", "--out", "c.jsonl")
    first, second = (Path("c", "00000", f"{key}.jpg") for key in "01")
    os.utime(first, (1, 1))
    second.write_bytes(b"half")
    assert run("cc12m", "00000.tar", "--out", "c.jsonl") == before
    assert first.stat().st_mtime == 1 and second.read_bytes() == picture(1)


def test_faulty_samples_are_skipped_and_counted(capsys):
    good = sample("000000009", picture(0), "good")
    write_tar(
        "shards/00000.tar",
        [
            *sample("000000000", picture(0), "no image")[1:],
            *sample("000000001", picture(0), " "),
            *sample("000000002", picture(0), "no text")[:1],
            ("000000003.jpg", b"no image"),
            ("000000003.txt", b"a cat"),
            ("000000004.jpg", picture(0)),
            ("000000004.txt", b"\xff\xfe"),
            *good,
        ],
    )
    whole = Path("shards/00000.tar").read_bytes()
    Path("shards/00001.tar").write_bytes(b"no tar at all" * 99)
    Path("shards/00002.tar").write_bytes(whole[: whole.index(b"no image\0") + 3])
    assert [line["prompt"] for line in run("cc12m", "shards", "--out", "c.jsonl")] == ["good"]
    said = last_line(capsys)
    assert said == (
        "c.jsonl: 1 lines written, 7 records skipped; 00000.tar:000000000 no image; "
        "00000.tar:000000001 no txt; 00000.tar:000000002 no txt; ..."
    )
    assert sorted(os.listdir("c")) == ["00000"] and os.listdir("c/00000") == ["000000009.jpg"]


@pytest.mark.parametrize("name", ["../../{}", "/ROOT/{}", "..\\..\\{}", "C:\\{}", "./a/b/{}", "{}"])
def test_names_from_a_shard_cannot_leave_the_folder(name, folder):
    members = [
        (name.format(m).replace("/ROOT", str(folder)), data)
        for m, data in sample("evil", picture(0), "a cat")
    ]
    write_tar("00000.tar", members)
    (line,) = run("cc12m", "00000.tar", "--out", "c.jsonl")
    assert line["target"] == "c/00000/evil.jpg"
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert files == ["work/00000.tar", "work/c.jsonl", "work/c/00000/evil.jpg"]


def test_hostile_members_are_skipped(folder, capsys):
    members = sample("000000000", picture(0), "good")
    for key in ("..", "", "a b", "\x1b[2J\n", "x" * 101, "é", "con:", "\udcff"):
        members += [(m.replace("KEY", key), data) for m, data in sample("KEY", picture(1), "bad")]
    members += [("dir/000000000.jpg", picture(2)), ("dir/000000000.txt", b"takes its place")]
    members += [("000000001.jpg", None), ("000000001.txt", b"a link")]
    members += [("000000002.seg.jpg", picture(3)), ("000000002.txt", b"only a mask")]
    write_tar("00000.tar", members)
    (line,) = run("cc12m", "00000.tar", "--out", "c.jsonl")
    assert line["prompt"] == "good"
    assert Path("c", "00000", "000000000.jpg").read_bytes() == picture(0)
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert files == ["work/00000.tar", "work/c.jsonl", "work/c/00000/000000000.jpg"]
    assert "1 lines written" in last_line(capsys)


# ---- grit ---------------------------------------------------------------------------------------

CAPTION = "a wire hanger with a paper cover that reads we heart our customers"
CHUNKS = [
    [19.0, 32.0, 0.019644069503434333, 0.31054004, 0.9622142865754519, 0.9603442351, 0.79298526],
    [0.0, 13.0, 0.019422357885505368, 0.02763416, 0.9593302408854166, 0.96946756045, 0.67520964],
]


def test_grit(capsys):
    write_tar(
        "grit/00000.tar",
        [
            *sample("000000000", picture(0), CAPTION, noun_chunks=CHUNKS, ref_exps=CHUNKS, id=1),
            *sample("000000001", picture(1), "a dog", noun_chunks=None, ref_exps=None, id=2),
            *sample("000000002", picture(1), "a dog", noun_chunks=CHUNKS),
            *sample("000000003", picture(1), "a dog", noun_chunks=[]),
            *sample("000000004", picture(1), CAPTION, noun_chunks=CHUNKS)[1:],
            *sample("000000005", picture(1), CAPTION, noun_chunks=CHUNKS)[:2],
            ("000000006.jpg", picture(1)),
            ("000000006.json", b'{"caption": "a d'),
        ],
    )
    assert run("grit", "grit", "--out", "g.jsonl") == [
        {
            "task": "objects",
            "target": "g/00000/000000000.jpg",
            "segments": [
                ["a wire hanger", [[19, 28, 959, 969]]],
                [" with ", []],
                ["a paper cover", [[20, 311, 962, 960]]],
                [" that reads we heart our customers", []],
            ],
            "size": [12, 8],
        }
    ]
    assert Path("g/00000/000000000.jpg").read_bytes() == picture(0)
    assert last_line(capsys) == (
        "g.jsonl: 1 lines written, 6 records skipped; 00000.tar:000000001 broken noun_chunks; "
        "00000.tar:000000002 noun chunk from 19 to 32, beyond the caption; "
        "00000.tar:000000003 no noun chunk with a box; ..."
    )


@pytest.mark.parametrize(
    "chunks, segments",
    [
        (  # the higher score stays
            [[0, 5, 0, 0, 0.5, 0.5, 0.6], [2, 10, 0, 0, 1, 1, 0.7]],
            [["a ", []], ["dog on a", [[0, 0, 1000, 1000]]], [" hill", []]],
        ),
        (  # a span with two boxes, of which none gives way to the other
            [[0, 5, 0, 0, 0.5, 0.5, 0.6], [0, 5, 0.25, 0, 1, 1, 0.7], [4, 6, 0, 0, 1, 1, 0.65]],
            [["a dog", [[250, 0, 1000, 1000], [0, 0, 500, 500]]], [" on a hill", []]],
        ),
        (  # neighbours do not overlap; boxes end at the image
            [[0, 6, -0.1, 0, 0.5, 1.2, 0.6], [6, 15, 0, 0, 1, 1, 0.5]],
            [["a dog ", [[0, 0, 500, 1000]]], ["on a hill", [[0, 0, 1000, 1000]]]],
        ),
        (  # boxes without area give way, whatever their score
            [[0, 5, 0.5, 0, 0.5, 1, 0.9], [0, 9, 0.7, 0, 0.2, 1, 0.8], [2, 5, 0, 0, 1, 0.5, 0.1]],
            [["a ", []], ["dog", [[0, 0, 1000, 500]]], [" on a hill", []]],
        ),
    ],
)
def test_a_caption_is_split_at_its_noun_chunks(chunks, segments):
    assert convert.split_caption("a dog on a hill", chunks) == segments


def test_segments_join_to_the_caption():
    rng, caption = random.Random(0), "ein Hündchen 🐕 auf dem Hügel"
    for _ in range(300):
        chunks = []
        for _ in range(rng.randint(1, 6)):
            start, end = sorted(rng.sample(range(len(caption) + 1), 2))
            chunks.append([start, end, 0.1, 0.1, 0.6, 0.7, rng.random()])
        segments = convert.split_caption(caption, chunks)
        assert "".join(text for text, _ in segments) == caption
        assert all(text for text, _ in segments) and any(boxes for _, boxes in segments)


@pytest.mark.parametrize(
    "chunks",
    [
        None,
        [],
        "a dog",
        {"a": 1},
        [3],
        [[0, 5, 0, 0, 1, 1]],
        [[0, 5, 0, 0, 1, 1, 0.5, 0]],
        [[0, 5, 0, 0, 1, 1, None]],
        [["0", 5, 0, 0, "1", 1, 0.5]],
        [[0, 5, 0, 0, float("nan"), 1, 0.5]],
        [[0, float("inf"), 0, 0, 1, 1, 0.5]],
        [[0, 10**400, 0, 0, 1, 1, 0.5]],
        [[5, 5, 0, 0, 1, 1, 0.5]],
        [[-1, 5, 0, 0, 1, 1, 0.5]],
        [[0, 99, 0, 0, 1, 1, 0.5]],
        [[0, 5, 0, 0, 0.0001, 1, 0.5]],
    ],
)
def test_broken_noun_chunks_are_refused(chunks):
    with pytest.raises(ValueError, match="noun"):
        convert.split_caption("a dog on a hill", chunks)


# ---- ultraedit ----------------------------------------------------------------------------------


def write_ultraedit(name, rows):
    """Rows (source, edited, instruction) in UltraEdit's columns; images as the datasets library's."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    before, after, prompts = zip(*rows)
    columns = {
        "clip_sim_source": pa.array([0.3] * len(rows)),
        "source_caption": pa.array(["a hill"] * len(rows)),
        "idx": pa.array(range(len(rows))),
        "edit_prompt": pa.array(prompts, pa.string()),
        "edit_object": pa.nulls(len(rows)),
        "source_image": pa.array([x and {"bytes": x, "path": None} for x in before], image),
        "edited_image": pa.array([x and {"bytes": x, "path": "0.png"} for x in after], image),
        "mask_image": pa.nulls(len(rows)),
    }
    pq.write_table(pa.table(columns), name)


def test_ultraedit(capsys):
    before, after = picture(0, kind="PNG"), picture(1, (6, 4))
    write_ultraedit(
        "FreeForm_0-00000-of-00002.parquet",
        [
            (before, after, "add a dog"),
            (before, None, "a"),
            (None, after, "b"),
            (before, after, None),
        ],
    )
    write_ultraedit("FreeForm_0-00001-of-00002.parquet", [(after, before, "no dog")])
    lines = run("ultraedit", ".", "--out", "u.jsonl")
    assert lines == [
        {
            "task": "edit",
            "source": "u/FreeForm_0-00000-of-00002/000000000-source.png",
            "instruction": "add a dog",
            "target": "u/FreeForm_0-00000-of-00002/000000000-target.jpg",
            "size": [6, 4],
        },
        {
            "task": "edit",
            "source": "u/FreeForm_0-00001-of-00002/000000000-source.jpg",
            "instruction": "no dog",
            "target": "u/FreeForm_0-00001-of-00002/000000000-target.png",
            "size": [12, 8],
        },
    ]
    for name, data in zip(("source", "target"), (before, after)):
        file = Path(lines[0][name])
        assert file.read_bytes() == data
        assert np.array_equal(Image.open(file), Image.open(io.BytesIO(data)))
    assert last_line(capsys) == (
        "u.jsonl: 2 lines written, 3 records skipped; "
        "FreeForm_0-00000-of-00002.parquet:1 no image; "
        "FreeForm_0-00000-of-00002.parquet:2 no image; "
        "FreeForm_0-00000-of-00002.parquet:3 no edit_prompt"
    )


def test_mistakes_with_parquet_files_get_one_line(capsys):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    write_ultraedit("a.parquet", [(picture(0), picture(1), "add a dog")])
    pq.write_table(pa.table({"image": ["x"], "edit_prompt": ["y"]}), "b.parquet")
    Path("c.parquet").write_bytes(b"no parquet")
    fails("ultraedit", "a.parquet", "b.parquet", "--out", "u.jsonl")
    said = "error: b.parquet: no column source_image, only image, edit_prompt"
    assert last_line(capsys) == said
    fails("ultraedit", "a.parquet", "c.parquet", "--out", "u.jsonl")
    assert last_line(capsys) == "error: c.parquet: not a parquet file"


def test_a_damaged_parquet_file_is_counted(capsys):
    write_ultraedit("a.parquet", [(picture(0), picture(1), "add a dog")])
    data = Path("a.parquet").read_bytes()
    Path("b.parquet").write_bytes(data.replace(b"add a dog", b"add \xff dog"))
    footer = int.from_bytes(data[-8:-4], "little") + 8
    Path("c.parquet").write_bytes(data[:4] + bytes(len(data) - footer - 4) + data[-footer:])
    assert len(run("ultraedit", ".", "--out", "u.jsonl")) == 1
    assert "1 lines written, 2 records skipped; b.parquet" in last_line(capsys)


def test_without_pyarrow_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    Path("a.parquet").write_bytes(b"")
    fails("ultraedit", "a.parquet", "--out", "u.jsonl")
    assert last_line(capsys).endswith("pip install pyarrow")


# ---- interruptions and mistakes -----------------------------------------------------------------


def test_an_interrupted_conversion_leaves_whole_files_only(monkeypatch, capsys):
    members = [m for i in range(4) for m in sample(f"{i:09}", picture(i), "a cat")]
    write_tar("00000.tar", members)
    Path("c.jsonl").write_text("an earlier manifest")
    measure, seen = convert.measure, []

    def stop_at_third(file):
        seen.append(file)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return measure(file)

    monkeypatch.setattr(convert, "measure", stop_at_third)
    with pytest.raises(SystemExit), one_line_errors():
        convert.main(["cc12m", "00000.tar", "--out", "c.jsonl"])
    assert last_line(capsys) == "error: interrupted; files already written are whole"
    assert sorted(os.listdir()) == ["00000.tar", "c", "c.jsonl"]
    assert Path("c.jsonl").read_text() == "an earlier manifest"
    assert sorted(os.listdir("c/00000")) == ["000000000.jpg", "000000001.jpg"]
    monkeypatch.setattr(convert, "measure", measure)
    assert len(run("cc12m", "00000.tar", "--out", "c.jsonl")) == 4


def test_a_full_disk_leaves_no_half_image(monkeypatch, capsys):
    write_tar("00000.tar", sample("0", picture(0), "a cat"))

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit), one_line_errors():
        convert.main(["cc12m", "00000.tar", "--out", "c.jsonl"])
    assert "No space left" in last_line(capsys)
    assert [str(file) for file in Path().rglob("*") if file.is_file()] == ["00000.tar"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("", "required: dataset, files, --out"),
        ("laion 00000.tar --out c.jsonl", "invalid choice: 'laion'"),
        ("cc12m 00000.tar", "required: --out"),
        ("cc12m --out c.jsonl", "required: files"),
        ("cc12m none --out c.jsonl", "none: no such file or folder"),
        ("cc12m empty --out c.jsonl", "empty: no .tar file in this folder"),
        ("grit empty --out c.jsonl", "empty: no .tar file in this folder"),
        ("ultraedit empty --out c.jsonl", "empty: no .parquet file in this folder"),
        ("cc12m 00000.tar 00000.tar --out c.jsonl", "several files have the same name"),
        ("cc12m 00000.tar --out c", "--out must be a file that ends in .jsonl"),
        ("cc12m 00000.tar --out folder.jsonl", "--out must be a file that ends in .jsonl"),
        ("cc12m 00000.tar --out 00000.tar/c.jsonl", "00000.tar"),
        ("cc12m a.jsonl --out c.jsonl", "no usable record; a.jsonl not a .tar file"),
        ("grit 00000.tar --out c.jsonl", "no usable record; 00000.tar:0 broken noun_chunks"),
        ("journeydb a.jsonl --out c.jsonl", "--images must be the folder"),
        ("journeydb a.jsonl --images none --out c.jsonl", "--images must be the folder"),
        ("journeydb a.jsonl --images empty --out a.jsonl", "would overwrite the dataset"),
        ("journeydb a.jsonl --images empty --out c.jsonl", "no usable record; a.jsonl:1 no image"),
        ("journeydb a.jsonl --images empty --text tags --out c.jsonl", "invalid choice: 'tags'"),
    ],
)
def test_mistakes_get_one_line(arguments, said, capsys):
    for name in ("empty", "folder.jsonl"):
        Path(name).mkdir()
    write_tar("00000.tar", sample("0", picture(0), "a cat"))
    Path("a.jsonl").write_text(json.dumps(annotation("a.jpg", "p", "c")) + "\n")
    fails(*arguments.split())
    line = last_line(capsys)
    assert line.startswith("error: ") and said in line
