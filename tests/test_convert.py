"""Public datasets become manifests: small files in their layouts, and all that may be wrong there."""

import importlib
import io
import json
import math
import os
import random
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.cli import UserError, one_line_errors
from tools import convert


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
            else:
                info.size = len(data)
            archive.addfile(info, data and io.BytesIO(data))


def sample(key, image, caption, suffix="jpg", **columns):
    """The members that img2dataset writes for an image, with some of its columns in the JSON."""
    about = {**columns, "url": f"http://example.com/{key}", "caption": caption, "key": key}
    text = json.dumps(about | {"status": "success", "exif": "{}"}, indent=4).encode()
    return [(f"{key}.{suffix}", image), (f"{key}.txt", caption.encode()), (f"{key}.json", text)]


def run(arguments):
    """Run the program -> the lines of the manifest, the last argument."""
    convert.main(arguments.split())
    return [json.loads(line) for line in Path(arguments.split()[-1]).read_bytes().splitlines()]


def fails(arguments, capsys):
    """The one line that the program says before it ends with exit code 2, leaving no new file."""
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
    lines = run("journeydb anno.jsonl --text caption --images imgs --out j.jsonl")
    assert [line["prompt"] for line in lines] == ["A golden head jewelry.", "A mountain."]
    assert lines[0]["target"] == "imgs/000/a-1.jpg"


def test_faulty_annotations_are_skipped_and_counted(folder, capsys):
    (folder / "secret.jpg").write_bytes(picture(3))
    good = "./000/a-1.jpg"
    write_journeydb(
        '{"img_path": ',
        "[" * 100_000,
        '{"img_path": "' + "x" * 3_000_000 + '"}',
        '"text"',
        annotation("./000/missing.jpg"),
        annotation("../../secret.jpg"),
        annotation(f"{folder}/secret.jpg"),
        annotation(good, " ", "c"),
        annotation(good, "a lone \ud800", "c"),
        annotation(good, "longer than a prompt may be" * 1000, "c"),
        annotation("./000/" + 999 * "x"),
        annotation("./000/a\0b.jpg"),
        {"prompt": "p"},
        annotation("./000/cut.jpg"),
        annotation(good) | {"Task2": {}},
    )
    Path("imgs/000/cut.jpg").write_bytes(picture(1)[:100])
    lines = run("journeydb anno.jsonl --images imgs --out j.jsonl")
    assert [line["prompt"] for line in lines] == ["a gold tikka, --ar 5:3", "über\nall", "p"]
    assert said(capsys) == (
        "j.jsonl: 3 lines written, 14 records skipped; anno.jsonl:3 broken JSON; "
        "anno.jsonl:4 broken JSON; anno.jsonl:5 line too long; ..."
    )
    lines = run("journeydb anno.jsonl --text caption --images imgs --out j.jsonl")
    assert [line["prompt"] for line in lines[2:]] == ["c"] * 3  # those of the bad prompts


def test_cc12m(capsys):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    cases = [  # key, image, caption, suffix, that of the copy, size
        ("000000000", picture(0), "a cat", "jpg", "jpg", [12, 8]),
        ("000000001", picture(1, (5, 9)), "ein Käfer\nim Gras", "jpg", "jpg", [5, 9]),
        ("000000003", picture(2, kind="PNG"), "a PNG in a .jpg", "jpg", "png", [12, 8]),
        ("000010000", picture(3, kind="WEBP"), "webp", "webp", "webp", [12, 8]),
        ("000010001", picture(4, exif=exif), "lying", "jpg", "jpg", [8, 12]),
    ]
    write_tar("shards/00000.tar", [m for case in cases[:3] for m in sample(*case[:4])])
    write_tar("shards/00001.tar", [m for case in cases[3:] for m in sample(*case[:4])])
    Path("shards/00000.parquet").write_bytes(b"beside the shards, as img2dataset leaves it")
    lines = run("cc12m shards --out data/cc12m.jsonl")
    assert said(capsys) == "data/cc12m.jsonl: 5 lines written, 0 records skipped"
    for line, (key, data, prompt, _, suffix, size) in zip(lines, cases, strict=True):
        target = f"cc12m/0000{key[4]}/{key}.{suffix}"
        assert line == {"task": "t2i", "prompt": prompt, "target": target, "size": size}
        assert Path("data", target).read_bytes() == data
    assert run("cc12m shards/00001.tar --out one.jsonl")[0]["prompt"] == "webp"


def test_images_already_there_are_not_written_again():
    write_tar("00000.tar", [*sample("0", picture(0), "a"), *sample("1", picture(1), "b")])
    before = run("cc12m 00000.tar --out c.jsonl")
    first, second = (Path("c", "00000", f"{key}.jpg") for key in "01")
    os.utime(first, (1, 1))
    second.write_bytes(b"half")
    assert run("cc12m 00000.tar --out c.jsonl") == before
    assert first.stat().st_mtime == 1 and second.read_bytes() == picture(1)


def test_faulty_samples_are_skipped_and_counted(capsys):
    members = [
        *sample("000000000", picture(0), "no image")[1:],
        *sample("000000001", picture(0), " "),
        *sample("000000002", picture(0), "no text")[:1],
        *(("000000003.jpg", b"no image"), ("000000003.txt", b"a cat")),
        *(("000000004.jpg", picture(0)), ("000000004.txt", b"\xff\xfe")),
        *sample("000000009", picture(0), "good"),
    ]
    write_tar("shards/00000.tar", members)
    whole = Path("shards/00000.tar").read_bytes()
    Path("shards/00001.tar").write_bytes(b"no tar at all" * 99)
    Path("shards/00002.tar").write_bytes(whole[: whole.index(b"no image\0") + 3])
    assert [line["prompt"] for line in run("cc12m shards --out c.jsonl")] == ["good"]
    assert said(capsys) == (
        "c.jsonl: 1 lines written, 7 records skipped; 00000.tar:000000000 no image; "
        "00000.tar:000000001 no txt; 00000.tar:000000002 no txt; ..."
    )
    assert files_in(Path("c")) == ["00000/000000009.jpg"]


@pytest.mark.parametrize("name", ["../../{}", "/ROOT/{}", "..\\..\\{}", "C:\\{}", "./a/b/{}", "{}"])
def test_names_from_a_shard_cannot_leave_the_folder(name, folder):
    name = name.replace("/ROOT", str(folder))
    members = [(name.format(m), data) for m, data in sample("evil", picture(0), "a cat")]
    write_tar("00000.tar", members)
    (line,) = run("cc12m 00000.tar --out c.jsonl")
    assert line["target"] == "c/00000/evil.jpg"
    assert files_in(folder) == ["work/00000.tar", "work/c.jsonl", "work/c/00000/evil.jpg"]


def test_hostile_members_are_skipped(folder, capsys):
    members = sample("000000000", picture(0), "good")
    for key in ("..", "", "a b", "\x1b[2J\n", "x" * 101, "é", "con:", "\udcff"):
        members += [(m.replace("KEY", key), data) for m, data in sample("KEY", picture(1), "bad")]
    members += [("dir/000000000.jpg", picture(2)), ("dir/000000000.txt", b"takes its place")]
    members += [("000000001.jpg", None), ("000000001.txt", b"a link")]
    members += [("000000002.seg.jpg", picture(3)), ("000000002.txt", b"only a mask")]
    members += [("000000003.jpg", picture(4)), ("000000003.txt", b"too long" * 200_000)]
    write_tar("00000.tar", members)
    (line,) = run("cc12m 00000.tar --out c.jsonl")
    assert line["prompt"] == "good" and said(capsys).startswith("c.jsonl: 1 lines written, 11 ")
    assert Path("c/00000/000000000.jpg").read_bytes() == picture(0)
    assert files_in(folder) == ["work/00000.tar", "work/c.jsonl", "work/c/00000/000000000.jpg"]


NAME, ATTRIBUTES = tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE


@pytest.mark.parametrize(
    "kind, size, times, reason",
    [
        (tarfile.REGTYPE, 20 * 10**9, 1, "too large"),  # a hole
        (tarfile.REGTYPE, 2**63, 1, "cannot fit"),
        (tarfile.REGTYPE, -1024, 1, "negative size"),
        (tarfile.REGTYPE, -5, 1, "negative size"),
        (NAME, 2**63, 1, "a header of 9223372036854775808 bytes"),
        (NAME, 20 * 10**9, 1, "a header of"),
        (NAME, -512, 1, "a header of -512 bytes"),
        (NAME, 0, 20_000, "RecursionError"),
        (ATTRIBUTES, 20 * 10**9, 1, "a header of"),
    ],
)
def test_no_shard_exhausts_memory_or_patience(kind, size, times, reason, capsys):
    write_tar("good.tar", sample("a", picture(0), "a cat") + sample("b", picture(1), "b"))
    good = Path("good.tar").read_bytes().rstrip(b"\0")
    info = tarfile.TarInfo("c.jpg")
    info.type, info.size = kind, size
    with open("00000.tar", "wb") as file:
        file.write(good + bytes(-len(good) % 512) + times * info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(30 * 10**9)
    assert run("cc12m 00000.tar --out c.jsonl")[0]["prompt"] == "a cat"
    line = said(capsys)
    assert " 1 records skipped; 00000.tar:" in line and reason in line


CAPTION = "a wire hanger with a paper cover that reads we heart our customers"
CHUNKS = [
    [19.0, 32.0, 0.019644069503434333, 0.31054004, 0.9622142865754519, 0.9603442351, 0.79298526],
    [0.0, 13.0, 0.019422357885505368, 0.02763416, 0.9593302408854166, 0.96946756045, 0.67520964],
]


def test_grit(capsys):
    members = [
        *sample("000000000", picture(0), CAPTION, noun_chunks=CHUNKS, ref_exps=CHUNKS, id=1),
        *sample("000000001", picture(1), "a dog", noun_chunks=None, ref_exps=None, id=2),
        *sample("000000002", picture(1), "a dog", noun_chunks=CHUNKS),
        *sample("000000003", picture(1), "a dog", noun_chunks=[]),
        *sample("000000004", picture(1), CAPTION, noun_chunks=CHUNKS)[1:],
        *sample("000000005", picture(1), CAPTION, noun_chunks=CHUNKS)[:2],
        *(("000000006.jpg", picture(1)), ("000000006.json", b'{"caption": "a d')),
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


BROKEN = [None, [], "a dog", {"a": 1}, [3], [[0, 5, 0, 0, 1, 1]], [[0, 5, 0, 0, 1, 1, 0.5, 0]]]
BROKEN += [
    [[0, 5, 0, 0, *x]] for x in ((1, 1, None), ("1", 1, 1), (math.nan, 1, 1), (0.0001, 1, 1))
]
SPANS = (0, math.inf), (0, 10**400), (5, 5), (-1, 5), (0, 99)


@pytest.mark.parametrize("chunks", BROKEN + [[[*span, 0, 0, 1, 1, 0.5]] for span in SPANS])
def test_broken_noun_chunks_are_refused(chunks):
    with pytest.raises(UserError, match="noun"):
        convert.split_caption("a dog on a hill", chunks)


def write_parquet(name, columns):
    pa = pytest.importorskip("pyarrow")
    importlib.import_module("pyarrow.parquet").write_table(pa.table(columns), name)


def write_ultraedit(name, rows):
    """Rows (source, edited, instruction) in UltraEdit's columns; images as the datasets library's."""
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
        "u.jsonl: 2 lines written, 3 records skipped; Free-0.parquet:1 no image; "
        "Free-0.parquet:2 no image; Free-0.parquet:3 no edit_prompt"
    )


def test_mistakes_with_parquet_files_get_one_line(capsys, monkeypatch):
    write_ultraedit("a.parquet", [(picture(0), picture(1), "add a dog")])
    write_parquet("b.parquet", {"image": ["x"], "edit_prompt": ["y"]})
    Path("c.parquet").write_bytes(b"no parquet")
    line = fails("ultraedit a.parquet b.parquet --out u.jsonl", capsys)
    assert line == "error: b.parquet: no column source_image, only image, edit_prompt"
    line = fails("ultraedit a.parquet c.parquet --out u.jsonl", capsys)
    assert line.startswith("error: c.parquet: expected a parquet file (")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert fails("ultraedit a.parquet --out u.jsonl", capsys).endswith("pip install pyarrow")


def test_damaged_parquet_files_and_wrong_types_are_counted(capsys):
    write_ultraedit("a.parquet", [(picture(0), picture(1), "add a dog")])
    data = Path("a.parquet").read_bytes()
    Path("b.parquet").write_bytes(data.replace(b"add a dog", b"add \xff dog"))
    footer = int.from_bytes(data[-8:-4], "little") + 8
    Path("c.parquet").write_bytes(data[:4] + bytes(len(data) - footer - 4) + data[-footer:])
    write_parquet("d.parquet", {name: [{"bytes": "a text"}] for name in convert.COLUMNS})
    write_ultraedit("e.parquet", [("a text", "a text", "add a dog")])
    assert len(run("ultraedit . --out u.jsonl")) == 1
    assert "1 lines written, 4 records skipped; b.parquet: damaged" in said(capsys)


def test_an_interrupted_conversion_leaves_whole_files_only(monkeypatch, capsys):
    write_tar("00000.tar", [m for i in range(4) for m in sample(f"{i}", picture(i), "a cat")])
    Path("c.jsonl").write_text("an earlier manifest")
    measure, seen = convert.measure, []

    def stop_at_third(file):
        seen.append(file)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return measure(file)

    with monkeypatch.context() as patch, pytest.raises(SystemExit), one_line_errors():
        patch.setattr(convert, "measure", stop_at_third)
        convert.main(["cc12m", "00000.tar", "--out", "c.jsonl"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "error: interrupted; files already written are whole"
    assert files_in(Path()) == ["00000.tar", "c.jsonl", "c/00000/0.jpg", "c/00000/1.jpg"]
    assert Path("c.jsonl").read_text() == "an earlier manifest"
    assert len(run("cc12m 00000.tar --out c.jsonl")) == 4


def test_a_full_disk_leaves_no_half_image(monkeypatch, capsys):
    write_tar("00000.tar", sample("0", picture(0), "a cat"))

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit), one_line_errors():
        convert.main(["cc12m", "00000.tar", "--out", "c.jsonl"])
    assert "No space left" in capsys.readouterr().err
    assert files_in(Path()) == ["00000.tar"]


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ("laion 00000.tar --out c.jsonl", "invalid choice: 'laion'"),
        ("cc12m none --out c.jsonl", "none: no such file or folder"),
        ("cc12m empty --out c.jsonl", "empty: no .tar file in this folder"),
        ("journeydb /dev/zero --images empty --out c.jsonl", "/dev/zero: not a regular file"),
        ("cc12m 00000.tar 00000.tar --out c.jsonl", "several files have the same name"),
        ("cc12m 00000.tar --out c", "--out must be a file that ends in .jsonl"),
        ("cc12m 00000.tar --out folder.jsonl", "--out must be a file that ends in .jsonl"),
        ("cc12m 00000.tar --out 00000.tar/c.jsonl", "00000.tar"),
        ("cc12m a.jsonl --out c.jsonl", "no usable record; a.jsonl: expected a .tar file"),
        ("grit 00000.tar --out c.jsonl", "no usable record; 00000.tar:0 broken noun_chunks"),
        ("journeydb a.jsonl --images none --out c.jsonl", "--images must be the folder"),
        ("journeydb a.jsonl --images empty --out a.jsonl", "would overwrite the dataset"),
        ("journeydb a.jsonl --images empty --out c.jsonl", "no usable record; a.jsonl:1 no image"),
    ],
)
def test_mistakes_get_one_line(arguments, reason, capsys):
    for name in ("empty", "folder.jsonl"):
        Path(name).mkdir()
    write_tar("00000.tar", sample("0", picture(0), "a cat"))
    Path("a.jsonl").write_text(json.dumps(annotation("a.jpg")) + "\n")
    assert reason in fails(arguments, capsys)
