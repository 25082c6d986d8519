"""Conversion of public datasets: small files in their layouts, good ones and faulty ones."""

import importlib
import io
import json
import math
import os
import random
import sys
import tarfile
from pathlib import Path

from support.cli import UserError, one_line_errors

import numpy as np
import pytest
from PIL import Image

from data import Manifest
from tools import convert


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()  # a malicious name could write to its parent
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
            else:
                info.size = len(data)
            archive.addfile(info, data and io.BytesIO(data))


def sample(key, image, caption, suffix="jpg", **columns):
    """The members that img2dataset writes for one image; columns: further ones of its JSON."""
    about = json.dumps({**columns, "caption": caption, "key": key, "exif": "{}"}).encode()
    return [(f"{key}.{suffix}", image), (f"{key}.txt", caption.encode()), (f"{key}.json", about)]


def run(arguments):
    """Run the program; return the lines of the manifest, whose name is the last argument."""
    convert.main(arguments.split())
    return [json.loads(line) for line in Path(arguments.split()[-1]).read_bytes().splitlines()]


def fails(arguments, capsys):
    """The last line on stderr of a run that ends with exit code 2 and leaves no new file."""
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(SystemExit) as end, one_line_errors():
        convert.main(arguments.split())
    assert end.value.code == 2
    assert sorted(Path.cwd().rglob("*")) == before
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def said(capsys):
    (line,) = capsys.readouterr().out.splitlines()
    return line


def files_in(folder):
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.*"))


def annotation(path, prompt="p", caption="c"):
    return {"img_path": path, "prompt": prompt, "Task1": {}, "Task2": {"Caption": caption}}


def write_journeydb(*more):
    Path("imgs/000").mkdir(parents=True)
    Path("imgs/000/a-1.jpg").write_bytes(picture(1, (10, 6)))
    Path("imgs/000/b-2.jpg").write_bytes(picture(2, (7, 9)))
    a = annotation("./000/a-1.jpg", "a gold tikka, --ar 5:3", "A golden head jewelry.")
    b = annotation("./000/b-2.jpg", "über\nall", "A mountain.")
    lines = [line if isinstance(line, str) else json.dumps(line) for line in (a, b, *more)]
    Path("anno.jsonl").write_text("\n".join(lines) + "\n")


def test_journeydb(capsys):
    write_journeydb()
    a = {"task": "t2i", "prompt": "a gold tikka, --ar 5:3", "target": "../imgs/000/a-1.jpg"}
    b = {"task": "t2i", "prompt": "über\nall", "target": "../imgs/000/b-2.jpg"}
    expected = [a | {"size": [10, 6]}, b | {"size": [7, 9]}]
    assert run("journeydb anno.jsonl --images imgs --out new/j.jsonl") == expected
    assert said(capsys) == "new/j.jsonl: 2 lines written, 0 records skipped"
    assert os.listdir("new") == ["j.jsonl"]
    first = Path("new/j.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert first == json.dumps(expected[0])  # the order of the keys, too


def test_journeydb_skips_and_counts_faulty_annotations(capsys):
    good = "./000/a-1.jpg"
    write_journeydb(
        '{"img_path": ',
        "[" * 100_000,
        '"text"',
        annotation("./000/missing.jpg"),
        annotation(good, " ", "c"),
        annotation(good, "a lone \ud800", "c"),
        annotation(good, "longer than a prompt may be" * 1000, "c"),
        annotation("./000/" + 999 * "x"),
        annotation("./000/a\0b.jpg"),
        {"prompt": "p"},
        annotation("./000/cut.jpg"),
        annotation(good) | {"Task2": {}},
        '{"img_path": "' + "x" * 3_000_000 + '"}',
    )
    Path("imgs/000/cut.jpg").write_bytes(picture(1)[:100])
    lines = run("journeydb anno.jsonl --images imgs --out j.jsonl")
    assert [line["prompt"] for line in lines] == ["a gold tikka, --ar 5:3", "über\nall", "p"]
    report = said(capsys)
    assert report.startswith("j.jsonl: 3 lines written, 12 records skipped; anno.jsonl:3: record: ")
    assert report.count("expected a JSON object (") == 3 and report.endswith("; ...")


@pytest.mark.parametrize(
    "path", ["../secret.png", "..\\secret.png", "./000/../../secret.png", "/ROOT/work/secret.png"]
)
def test_journeydb_takes_no_picture_from_outside_of_its_folder(path, folder, capsys):
    Path("secret.png").write_bytes(picture(9, kind="PNG"))
    write_journeydb(annotation(path.replace("/ROOT", str(folder))))
    assert len(run("journeydb anno.jsonl --images imgs --out j.jsonl")) == 2
    report = said(capsys)
    assert "1 records skipped; anno.jsonl:3: expected a JPEG, PNG or WebP image inside i" in report
    os.chdir("imgs")  # inside of "." is not whatever lies above it
    arguments = "journeydb ../anno.jsonl --images . --out ../j.jsonl"
    assert len(run(arguments)) == 2


@pytest.mark.parametrize(
    "start, encoding, message",
    [("", "utf-16", "is UTF-16; save as UTF-8"), ("[", "utf-8", "is one JSON array; expected one")],
)
def test_what_is_no_jsonl_is_named(start, encoding, message, capsys):
    Path("imgs").mkdir()
    Path("anno.jsonl").write_text(start + json.dumps(annotation("a.jpg")), encoding=encoding)
    line = fails("journeydb anno.jsonl --images imgs --out j.jsonl", capsys)
    assert f"no record is good; anno.jsonl: {message}" in line


def test_a_folder_of_pictures_with_captions(capsys):
    names = "a.jpg", "deep/b.PNG", "deep/Bär.webp", "blank.jpg", "alone.jpg", "damaged.jpg"
    Path("photos/deep").mkdir(parents=True)
    for i, name in enumerate(names):
        file = Path("photos", name)
        kind = {".jpg": "JPEG", ".PNG": "PNG", ".webp": "WEBP"}[file.suffix]
        file.write_bytes(picture(i, (12 + i, 8), kind))
        file.with_suffix(".txt").write_text(f" caption {i},\nüber\n", encoding="utf-8-sig")
    Path("photos/blank.txt").write_text(" \n")
    Path("photos/alone.txt").unlink()
    Path("photos/damaged.jpg").write_bytes(b"no picture")
    Path("photos/notes.txt").write_text("beside no picture")
    os.mkfifo("photos/fifo.jpg")
    lines = run("folder photos --out data/x.jsonl")
    found = [(line["target"], line["prompt"], line["size"]) for line in lines]
    assert found == [
        ("../photos/a.jpg", "caption 0,\nüber", [12, 8]),
        ("../photos/deep/Bär.webp", "caption 2,\nüber", [14, 8]),
        ("../photos/deep/b.PNG", "caption 1,\nüber", [13, 8]),
    ]
    assert {line["task"] for line in lines} == {"t2i"} and os.listdir("data") == ["x.jsonl"]
    assert said(capsys) == (
        "data/x.jsonl: 3 lines written, 3 records skipped; photos:alone.jpg: expected its caption "
        "in alone.txt; photos:blank.jpg: '.txt' must hold text; "
        "photos:damaged.jpg: expected a JPEG, PNG or WebP image"
    )


def test_a_folder_with_metadata_of_hugging_face(capsys):
    Path("set/train/0").mkdir(parents=True)
    Path("set/train/0/a.jpg").write_bytes(picture(0))
    Path("set/secret.jpg").write_bytes(picture(1))
    rows = [
        {"file_name": "0/a.jpg", "text": "a cat", "objects": {"bbox": []}},
        {"file_name": "0\\a.jpg", "text": "again"},
        {"file_name": "../secret.jpg", "text": "outside"},
        {"file_name": "0/gone.jpg", "text": "gone"},
        {"file_name": "0/a.jpg"},
        ["no object"],
    ]
    text = "\n\n".join(map(json.dumps, rows))
    Path("set/train/metadata.jsonl").write_text(text, encoding="utf-8-sig")
    for arguments in "folder set --out x.jsonl", "folder set/train --out x.jsonl":
        lines = run(arguments)
        assert [(x["target"], x["prompt"]) for x in lines] == [
            ("set/train/0/a.jpg", "a cat"),
            ("set/train/0/a.jpg", "again"),
        ]
        assert "2 lines written, 4 records skipped; metadata.jsonl:5: expected a" in said(capsys)
    assert Manifest("x.jsonl").record(1, "t2i")["target"].size == (12, 8)
    line = fails("folder set --out set/train/metadata.jsonl", capsys)
    assert "would overwrite the dataset" in line


def test_cc12m_takes_captions_from_json(capsys):
    members = [
        *sample("0", picture(0), "a cat")[:1],
        ("0.json", json.dumps({"caption": "from its JSON", "key": "0"}).encode()),
        *sample("1", picture(1), "from its text", width=3),
        *sample("2", picture(2), "x")[:1],
        ("2.json", b"{}"),
    ]
    write_tar("0.tar", members)
    lines = run("cc12m 0.tar --out c.jsonl")
    assert [line["prompt"] for line in lines] == ["from its JSON", "from its text"]
    assert said(capsys).endswith("1 records skipped; 0.tar:2: 'caption' must hold text")


def test_another_picture_of_the_same_size_is_written_again():
    first = picture(0, kind="PNG")
    second = first[:-1] + b"\x00"
    write_tar("00000.tar", sample("0", first, "old"))
    run("cc12m 00000.tar --out c.jsonl")
    write_tar("00000.tar", sample("0", second, "new"))
    assert run("cc12m 00000.tar --out c.jsonl")[0]["prompt"] == "new"
    assert len(first) == len(second) and Path("c/00000/000000000.png").read_bytes() == second


def test_cc12m(capsys):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    cases = [  # key, image, caption, suffix; name and size of the copy
        ("000", picture(0), "a cat", "jpg", "0/000000000.jpg", [12, 8]),
        ("001", picture(1, (5, 9)), "ein Käfer\nim Gras", "jpg", "0/000000001.jpg", [5, 9]),
        ("003", picture(2, kind="PNG"), "a PNG in a .jpg", "jpg", "0/000000002.png", [12, 8]),
        ("100", picture(3, kind="WEBP"), "webp", "webp", "1/000000000.webp", [12, 8]),
        ("101", picture(4, exif=exif), "rotated", "jpg", "1/000000001.jpg", [8, 12]),
    ]
    write_tar("shards/0.tar", [m for case in cases[:3] for m in sample(*case[:4])])
    write_tar("shards/1.tar", [m for case in cases[3:] for m in sample(*case[:4])])
    Path("shards/0.parquet").write_bytes(b"beside the shards, as img2dataset leaves it")
    lines = run("cc12m shards --out data/cc12m.jsonl")
    assert said(capsys) == "data/cc12m.jsonl: 5 lines written, 0 records skipped"
    for line, (_, data, prompt, _, name, size) in zip(lines, cases, strict=True):
        target = f"cc12m/{name}"
        assert line == {"task": "t2i", "prompt": prompt, "target": target, "size": size}
        assert Path("data", target).read_bytes() == data
    assert run("cc12m shards/1.tar --out one.jsonl")[0]["prompt"] == "webp"


def test_existing_images_are_not_written_again():
    write_tar("00000.tar", [*sample("0", picture(0), "a"), *sample("1", picture(1), "b")])
    before = run("cc12m 00000.tar --out c.jsonl")
    first, second = (Path(f"c/00000/00000000{n}.jpg") for n in (0, 1))
    os.utime(first, (1, 1))
    second.write_bytes(b"half")
    assert run("cc12m 00000.tar --out c.jsonl") == before
    assert first.stat().st_mtime == 1 and second.read_bytes() == picture(1)


def test_cc12m_skips_and_counts_faulty_samples(folder, capsys):
    members = [
        *sample("0", picture(0), "no image")[1:],
        *sample("1", picture(0), " "),
        *sample("2", picture(0), "no text")[:1],
        *(("3.jpg", b"no image"), ("3.txt", b"a cat")),
        *(("4.jpg", picture(0)), ("4.txt", b"\xff\xfe")),
        *(("5.jpg", None), ("5.txt", b"a link")),
        *(("6.seg.jpg", picture(3)), ("6.txt", b"only a mask")),  # two samples, both incomplete
        *(("7.jpg", picture(4)), ("7.txt", b"too long" * 200_000)),
        *sample("9", picture(0), "good"),
    ]
    write_tar("shards/00000.tar", members)
    whole = Path("shards/00000.tar").read_bytes()
    Path("shards/00001.tar").write_bytes(b"no tar at all" * 99)
    Path("shards/00002.tar").write_bytes(whole[: whole.index(b"no image\0") + 3])
    assert [line["prompt"] for line in run("cc12m shards --out c.jsonl")] == ["good"]
    assert said(capsys) == (
        "c.jsonl: 1 lines written, 11 records skipped; 00000.tar:0: no image; "
        "00000.tar:1: 'txt' must hold text; 00000.tar:2: 'txt' must hold text; ..."
    )


@pytest.mark.parametrize(
    "name", ["../../x", "/ROOT/x", "..\\x", "C:\\x", "..", "a/", "\x1b[2J\n", "\udcff", "x" * 300]
)
def test_names_in_a_shard_are_not_used_as_paths(name, folder, capsys):
    name = name.replace("/ROOT", str(folder))
    write_tar("00000.tar", sample(name, b"", "no image") + sample("b", picture(0), "a cat"))
    run("cc12m 00000.tar --out c.jsonl")
    report = said(capsys)
    assert report.isprintable() and len(report) < 200
    (image,) = {file for file in files_in(folder) if file.endswith(".jpg")}
    assert image.startswith("work/c/00000/00000000")


@pytest.mark.parametrize("size", [20 * 10**9, 2**62])
def test_a_member_too_large_to_read_is_skipped(size, capsys):
    write_tar("good.tar", sample("a", picture(0), "a cat") + sample("b", picture(1), "b"))
    good = Path("good.tar").read_bytes().rstrip(b"\0")
    info = tarfile.TarInfo("c.jpg")
    info.size = size
    with open("00000.tar", "wb") as file:
        file.write(good + bytes(-len(good) % 512) + info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(30 * 10**9)  # a hole
    assert run("cc12m 00000.tar --out c.jsonl")[0]["prompt"] == "a cat"
    said(capsys)


CAPTION = "a wire hanger with a paper cover that reads we heart our customers"
CHUNKS = [
    [19.0, 32.0, 0.019644069503434333, 0.31054004, 0.9622142865754519, 0.9603442351, 0.79298526],
    [0.0, 13.0, 0.019422357885505368, 0.02763416, 0.9593302408854166, 0.96946756045, 0.67520964],
]


def test_grit(capsys):
    members = [
        *sample("0", picture(0), CAPTION, noun_chunks=CHUNKS, ref_exps=CHUNKS, id=1),
        *sample("1", picture(1), "a dog", noun_chunks=CHUNKS),
        *sample("2", picture(1), "a dog", noun_chunks=[]),
        *sample("3", picture(1), CAPTION, noun_chunks=CHUNKS)[1:],
        *sample("4", picture(1), "a dog", noun_chunks=None, ref_exps=None, id=2),
        *sample("5", picture(1), CAPTION, noun_chunks=CHUNKS)[:2],
        *(("6.jpg", picture(1)), ("6.json", b'{"caption": "a d')),
    ]
    write_tar("grit/00000.tar", members)
    (line,) = run("grit grit --out g.jsonl")
    assert line.pop("segments") == [
        ["a wire hanger", [[19, 28, 959, 969]]],
        [" with ", []],
        ["a paper cover", [[20, 311, 962, 960]]],
        [" that reads we heart our customers", []],
    ]
    assert line == {"task": "objects", "target": "g/00000/000000000.jpg", "size": [12, 8]}
    assert Path("g/00000/000000000.jpg").read_bytes() == picture(0)
    assert said(capsys) == (
        "g.jsonl: 1 lines written, 6 records skipped; "
        "00000.tar:1: noun chunk 19 to 32 must lie inside the caption; "
        "00000.tar:2: no noun chunk has a box; 00000.tar:3: no image; ..."
    )


@pytest.mark.parametrize(
    "chunks, segments",
    [
        (  # the highest score stays
            [[0, 5, 0, 0, 0.5, 0.5, 0.6], [2, 10, 0, 0, 1, 1, 0.7]],
            [["a ", []], ["dog on a", [[0, 0, 1000, 1000]]], [" hill", []]],
        ),
        (  # one span keeps both of its boxes
            [[0, 5, 0, 0, 0.5, 0.5, 0.6], [0, 5, 0.25, 0, 1, 1, 0.7], [4, 6, 0, 0, 1, 1, 0.65]],
            [["a dog", [[250, 0, 1000, 1000], [0, 0, 500, 500]]], [" on a hill", []]],
        ),
        (  # adjacent spans do not overlap; boxes are clipped to the image
            [[0, 6, -0.1, 0, 0.5, 1.2, 0.6], [6, 15, 0, 0, 1, 1, 0.5]],
            [["a dog ", [[0, 0, 500, 1000]]], ["on a hill", [[0, 0, 1000, 1000]]]],
        ),
        (  # boxes without area are dropped, whatever their score
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


BROKEN = [None, [], "a dog", {"a": 1}, [3], [[0, 5, 0, 0, 1, 1]], [[0, 5, 0, 0, 1, 1, 0.5, 0]]]
ENDS = (1, 1, None), ("1", 1, 1), (math.nan, 1, 1), (0.0001, 1, 1)
SPANS = (0, math.inf), (0, 10**400), (5, 5), (-1, 5), (0, 99)
BROKEN += [[[0, 5, 0, 0, *end]] for end in ENDS] + [[[*s, 0, 0, 1, 1, 0.5]] for s in SPANS]


@pytest.mark.parametrize("chunks", BROKEN)
def test_malformed_noun_chunks_are_a_user_error(chunks):
    with pytest.raises(UserError, match="noun"):
        convert.split_caption("a dog on a hill", chunks)


def write_parquet(name, columns):
    pa = pytest.importorskip("pyarrow")
    importlib.import_module("pyarrow.parquet").write_table(pa.table(columns), name)


def write_ultraedit(name, rows):
    """Write rows (source, edited, instruction) in UltraEdit's columns, images as {bytes, path}."""
    before, after, prompts = zip(*rows)
    columns = {"clip_sim_source": [0.3] * len(rows), "edit_prompt": prompts}
    for column, images in (("source_image", before), ("edited_image", after)):
        columns[column] = [x and {"bytes": x, "path": "0.png"} for x in images]
    write_parquet(name, columns)


def test_ultraedit(capsys):
    before, after = picture(0, kind="PNG"), picture(1, (6, 4))
    bad = [(before, None, "a"), (None, after, "b"), (before, after, None)]
    write_ultraedit("Free-0.parquet", [(before, after, "add a dog"), *bad])
    write_ultraedit("Free-1.parquet", [(after, before, "no dog")])
    images = "u/Free-0/000000000-source.png", "u/Free-0/000000000-target.jpg"
    first, second = run("ultraedit . --out u.jsonl")
    paths = {"source": images[0], "target": images[1]}
    assert first == {"task": "edit", "instruction": "add a dog", "size": [6, 4]} | paths
    paths = {"source": "u/Free-1/000000000-source.jpg", "target": "u/Free-1/000000000-target.png"}
    assert second == {"task": "edit", "instruction": "no dog", "size": [12, 8]} | paths
    assert [Path(file).read_bytes() for file in images] == [before, after]
    assert said(capsys) == (
        "u.jsonl: 2 lines written, 3 records skipped; Free-0.parquet:1: no image; "
        "Free-0.parquet:2: no image; Free-0.parquet:3: 'edit_prompt' must hold text"
    )


def test_ultraedit_counts_damaged_files_and_wrong_types(capsys):
    write_ultraedit("a.parquet", [(picture(0), picture(1), "add a dog")])
    data = Path("a.parquet").read_bytes()
    Path("b.parquet").write_bytes(data.replace(b"add a dog", b"add \xff dog"))
    footer = int.from_bytes(data[-8:-4], "little") + 8
    Path("c.parquet").write_bytes(data[:4] + bytes(len(data) - footer - 4) + data[-footer:])
    write_parquet("d.parquet", {name: [{"bytes": "a text"}] for name in convert.COLUMNS})
    write_ultraedit("e.parquet", [("a text", "a text", "add a dog")])
    assert len(run("ultraedit . --out u.jsonl")) == 1
    assert "1 lines written, 4 records skipped; b.parquet: expected a " in said(capsys)


def test_user_errors_with_parquet_files_are_one_line(capsys, monkeypatch):
    write_parquet("b.parquet", {"image": ["x"], "edit_prompt": ["y"]})
    line = fails("ultraedit b.parquet --out u.jsonl", capsys)
    assert line.endswith("no record is good; b.parquet:0: no image")
    Path("c.parquet").write_bytes(b"no parquet")
    line = fails("ultraedit c.parquet --out u.jsonl", capsys)
    assert "; c.parquet: expected a parquet file, and" in line
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "(pip install pyarrow)" in fails("ultraedit b.parquet --out u.jsonl", capsys)


def test_an_interrupted_conversion_leaves_only_complete_files(monkeypatch, capsys):
    write_tar("00000.tar", [m for i in range(4) for m in sample(f"{i}", picture(i), "a cat")])
    Path("c.jsonl").write_text("an earlier manifest")
    measure, opened = convert.measure, []

    def stop_at_third(file):
        opened.append(file)
        if len(opened) == 3:
            raise KeyboardInterrupt
        return measure(file)

    with monkeypatch.context() as patch, pytest.raises(SystemExit), one_line_errors():
        patch.setattr(convert, "measure", stop_at_third)
        convert.main(["cc12m", "00000.tar", "--out", "c.jsonl"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "error: interrupted; files already written are whole"
    images = [f"c/00000/00000000{n}.jpg" for n in (0, 1)]
    assert files_in(Path()) == ["00000.tar", "c.jsonl", *images]
    assert Path("c.jsonl").read_text() == "an earlier manifest"
    assert len(run("cc12m 00000.tar --out c.jsonl")) == 4


def test_a_full_disk_leaves_no_partial_image(monkeypatch, capsys):
    write_tar("00000.tar", sample("0", picture(0), "a cat"))

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit), one_line_errors():
        convert.main(["cc12m", "00000.tar", "--out", "c.jsonl"])
    assert "no space left" in capsys.readouterr().err.lower()
    assert files_in(Path()) == ["00000.tar"]


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ("laion 00000.tar --out c.jsonl", "invalid choice: 'laion'"),
        ("folder none --out c.jsonl", "none: expected a folder of images"),
        ("folder a.jsonl --out c.jsonl", "a.jsonl: expected a folder of images"),
        ("folder empty --out c.jsonl", "empty: holds no JPEG, PNG or WebP image"),
        ("cc12m none --out c.jsonl", "none: expected a .tar file or a folder of .tar files"),
        ("cc12m empty --out c.jsonl", "empty: expected a .tar file or a folder of .tar files"),
        ("journeydb /dev/zero --images empty --out c.jsonl", "/dev/zero: expected a .jsonl file"),
        ("cc12m 00000.tar 00000.tar --out c.jsonl", "several files have the same name"),
        ("cc12m 00000.tar --out c", "--out c: expected a file name that ends in .jsonl"),
        ("cc12m 00000.tar --out folder.jsonl", "folder.jsonl: expected a file name"),
        ("cc12m 00000.tar --out 00000.tar/c.jsonl", "00000.tar"),
        ("cc12m a.jsonl --out c.jsonl", "no record is good; a.jsonl: expected a .tar file"),
        ("grit 00000.tar --out c.jsonl", "00000.tar:0: 'noun_chunks': expected a list of [start"),
        ("journeydb a.jsonl --images none --out c.jsonl", "--images: expected the folder of the"),
        ("journeydb a.jsonl --images empty --out a.jsonl", "would overwrite the dataset"),
        ("journeydb a.jsonl --images empty --out c.jsonl", "is good; a.jsonl:1: expected a JPEG"),
    ],
)
def test_user_errors_are_one_line(arguments, reason, capsys):
    for name in ("empty", "folder.jsonl"):
        Path(name).mkdir()
    write_tar("00000.tar", sample("0", picture(0), "a cat"))
    Path("a.jsonl").write_text(json.dumps(annotation("a.jpg")) + "\n")
    assert reason in fails(arguments, capsys)
