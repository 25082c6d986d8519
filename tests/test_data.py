"""Training examples: every line once an epoch, the same for whoever asks, crops where boxes say."""

import json
import random
import unicodedata
import zlib
from functools import partial
from pathlib import Path

from support.cli import UserError

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import data
from data import BadLines, Manifest, Microbatches, make_pools, parse_record, training_example
from dream_engine import LMM
from lmm import collate, load_tokenizer, patch_config
from mini import world
from mini.world import Examples

BOX = [250, 400, 500, 600]  # thousandths of a 200 x 100 picture: pixels 50..100 x 40..60


@pytest.fixture(scope="module")
def tokens():
    return partial(collate, tokenizer=load_tokenizer(LMM), config=patch_config(LMM))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A manifest of 12 lines, three a task; the pictures are a red box on blue."""
    monkeypatch.chdir(tmp_path)
    picture = Image.new("RGB", (200, 100), "blue")
    picture.paste("red", (50, 40, 100, 60))
    picture.save("a.png")
    ImageOps.mirror(picture).save("b.png")
    lines = []
    for i in range(3):
        lines += [
            {"task": "t2i", "prompt": f"a red box {i}", "target": "a.png"},
            {"task": "i2i", "target": "a.png"},
            {"task": "edit", "source": "b.png", "instruction": f"mirror it {i}", "target": "a.png"},
            {
                "task": "objects",
                "target": "a.png",
                "segments": [["a red box", [BOX]], [f" {i}", []]],
            },
        ]
    Path("a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.fixture
def microbatches(tokens):
    def make(sources, tasks, count=40, size=2, side=48, null=0.0, buckets=False):
        pools = make_pools(sources, tasks, side, buckets)
        return Microbatches(pools, tokens, count, size, seed=0, null=null)

    return make


def same(a, b):
    tensors = [(m.target, m.batch.ids, m.batch.patches) for m in (a, b)]
    return a.task == b.task and all(map(torch.equal, *tensors))


# ---- manifests ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "not JSON"),
        ("[]", "must be one of"),
        ('{"task": "draw"}', "must be one of t2i, i2i, edit, objects"),
        ('{"task": ["t2i"]}', "must be one of t2i, i2i, edit, objects"),
        ('{"task": {"t2i": 1}}', "must be one of t2i, i2i, edit, objects"),
        ('{"task": "t2i", "target": "a.png"}', '"prompt" must be a text'),
        ('{"task": "t2i", "prompt": " ", "target": "a.png"}', '"prompt" must be a text'),
        ('{"task": "t2i", "prompt": "a", "target": ""}', '"target" must be a text'),
        ('{"task": "edit", "source": 3, "instruction": "a", "target": "a"}', '"source"'),
        ('{"task": "edit", "source": null, "instruction": "a", "target": "a"}', '"source"'),
        ('{"task": "objects", "target": "a", "segments": 3}', '"segments": expected'),
        ('{"task": "objects", "target": "a", "segments": []}', '"text of segments" must be'),
        ('{"task": "objects", "target": "a", "segments": [["a", [[1, 2, 3]]]]}', "x1"),
        ('{"task": "objects", "target": "a", "segments": [["a", [[9, 2, 3, 4]]]]}', "x1"),
        ('{"task": "objects", "target": "a", "segments": [["a", [["1", 2, 3, 4]]]]}', "x1"),
        ('{"task": "objects", "target": "a", "segments": [["a", 3]]}', '"segments": expected'),
        ('{"task": "objects", "target": "a", "segments": [["a", {}]]}', '"segments": expected'),
        ('{"task": "objects", "target": "a", "segments": [["a", true]]}', '"segments": expected'),
        ('{"task": "objects", "target": "a", "segments": [["a", [[0, 0, true, true]]]]}', "x1"),
        ('{"task": "objects", "target": "a", "segments": [["a", [[0, 0, NaN, 1]]]]}', "x1"),
        *(
            (f'{{"task": "i2i", "target": "a", "size": {size}}}', '"size" must be .width, height.')
            for size in ("[NaN, 1]", "[1, NaN]", "[0, 1]", "[1]", "[true, 5]", '["x"]', "{}", "5")
        ),
        (f'{{"task": "i2i", "target": "a", "size": [1, {10**400}]}}', '"size" must be'),
        ('{"task": "objects", "target": "a", "segments": [["a", [[0, 0, 1e999, 4]]]]}', "x1"),
        ('{"task": "objects", "target": "a", "segments": [["\\udc00", []]]}', "text of segments"),
        ('{"task": "t2i", "prompt": "\\ud83d", "target": "a.png"}', '"prompt" must be a text'),
        (
            '{"task": "t2i", "prompt": "' + "a" * 5000 + '", "target": "a.png"}',
            "1 to 4000 characters",
        ),
        ("[" * 100_000, "not JSON"),
        ('{"task": "t2i", "prompt": "__import__(\'os\')", "target": NaNa}', "not JSON"),
    ],
)
def test_a_bad_line_is_refused_with_its_reason(line, reason):
    with pytest.raises(UserError, match=reason):
        parse_record(line)


def test_what_a_task_does_not_need_is_not_read(folder):
    odd = {"task": "t2i", "prompt": "a", "target": "a.png", "source": None, "segments": 0}
    gone = {"task": "edit", "source": "gone.png", "instruction": "a", "target": "a.png"}
    Path("b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (odd, gone)))
    manifest = Manifest("b.jsonl")
    assert not manifest.bad_lines and manifest.record(1, "t2i")["prompt"] == "a"
    assert manifest.record(2, "i2i")["target"].size == (200, 100)  # copying needs no source
    with pytest.raises(FileNotFoundError, match="gone.png"):
        manifest.record(2, "edit")


def test_what_is_no_manifest_ends_in_one_line(folder):
    for file in ("nothing.jsonl", ".", "/dev/zero"):
        with pytest.raises(FileNotFoundError, match="no such manifest"):
            Manifest(file)
    with open("holes.jsonl", "wb") as file:
        file.truncate(10**12)
    with pytest.raises(UserError, match="holes.jsonl:1: over 1,048,576 bytes"):
        Manifest("holes.jsonl")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named(folder, encoding):
    text = Path("a.jsonl").read_text()
    Path("b.jsonl").write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match="b.jsonl: is UTF-16; save as UTF-8"):
        Manifest("b.jsonl")
    Path("b.jsonl").write_bytes(text.encode("utf-8-sig"))
    assert Manifest("b.jsonl").total == 12 and not Manifest("b.jsonl").bad_lines


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_named(folder, indent):
    lines = list(map(json.loads, Path("a.jsonl").read_text().splitlines()))
    Path("b.jsonl").write_text(json.dumps(99 * lines, indent=indent))
    with pytest.raises(UserError, match="is one JSON array; expected one object a line"):
        Manifest("b.jsonl")


@pytest.mark.parametrize("on_disk, named", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_picture_is_found_by_the_other_spellings_of_its_name(folder, on_disk, named):
    """Back-slashes of Windows, and the two forms in which Unicode spells an umlaut."""
    file = Path(unicodedata.normalize(on_disk, "Übung/Bär.png"))
    file.parent.mkdir()
    Image.new("RGB", (40, 20), "red").save(file)
    name = unicodedata.normalize(named, "Übung\\Bär.png")
    Path("b.jsonl").write_text(json.dumps({"task": "i2i", "target": name}))
    manifest = Manifest("b.jsonl")
    assert manifest.record(1, "i2i")["target"].getpixel((0, 0)) == (255, 0, 0)
    assert manifest.ratio(1) == 2
    Image.new("RGB", (30, 30), "blue").save(name)  # the exact name comes first
    assert manifest.record(1, "i2i")["target"].size == (30, 30)


def test_examples_of_a_manifest_are_its_lines(folder):
    manifest = Manifest("a.jsonl")
    assert manifest.total == 12 and [len(manifest.rows(t)) for t in data.FIELDS] == [3, 12, 3, 3, 0]
    record = manifest.record(7, "edit")
    assert record["instruction"] == "mirror it 1" and record["target"].size == (200, 100)
    assert record["source"].tobytes() == ImageOps.mirror(record["target"]).tobytes()
    with open("a.jsonl", "a") as file:
        file.write("\n")
    assert manifest.identity != Manifest("a.jsonl").identity


# ---- mixing -------------------------------------------------------------------------------------


def test_every_line_comes_once_an_epoch_in_new_order(folder):
    (pool,) = make_pools([(Manifest("a.jsonl"), 1)], {"t2i": 1}, 48)
    rows = [int(pool.row(k, 0)) for k in range(9)]
    assert [sorted(rows[i : i + 3]) for i in (0, 3, 6)] == [[1, 5, 9]] * 3
    assert len({tuple(rows[i : i + 3]) for i in (0, 3, 6)}) > 1


def test_a_microbatch_depends_on_seed_and_number_alone(folder, microbatches):
    sources = [(Manifest("a.jsonl"), 1), (Examples(), 2)]
    tasks = {"t2i": 1, "edit": 1, "objects": 1}
    first, again = (microbatches(sources, tasks, side=64) for _ in range(2))
    assert all(same(first[j], again[j]) for j in (7, 3, 30))
    loaded = list(first.load(range(4), workers=2))
    assert [m.number for m in loaded] == [0, 1, 2, 3]
    assert all(same(m, first[m.number]) for m in loaded)
    assert not torch.equal(first[0].batch.ids, first[1].batch.ids)


def test_the_rendered_examples_are_those_that_the_miniature_learned_from(microbatches):
    """Targets and token ids, as the program that trained the published weights made them."""
    batches, crc = (
        microbatches([(Examples(), 1)], dict.fromkeys(CRC, 1), 12, 2, 48, 0.1),
        {},
    )
    for micro in map(batches.__getitem__, range(12)):
        for x in (micro.target, micro.batch.ids):
            crc[micro.task] = zlib.crc32(x.numpy().tobytes(), crc.get(micro.task, 0))
    assert crc == CRC


CRC = {"t2i": 2304502364, "i2i": 1482869335, "edit": 2205244589, "objects": 440436579}


def test_tasks_and_sources_come_by_their_weights(folder, microbatches):
    sources = [(Manifest("a.jsonl"), 1), (Examples(), 3)]
    batches = microbatches(sources, {"t2i": 1, "edit": 3, "objects": 0}, count=4000)
    counts = np.bincount(batches.pool_of, minlength=4) / 4000
    names = [(pool.task, pool.source.name) for pool in batches.pools]
    expected = {("t2i", 0): 1, ("t2i", 1): 3, ("edit", 0): 3, ("edit", 1): 9}
    expected = {(task, ("a.jsonl", "rendered scenes")[i]): n for (task, i), n in expected.items()}
    assert set(names) == set(expected)
    for name, count in zip(names, counts):
        assert abs(count - expected[name] / 16) < 0.03


def test_null_prompts_come_as_often_as_asked(folder, microbatches):
    texts = {}
    for null in (0.0, 1.0):
        batches = microbatches([(Manifest("a.jsonl"), 1)], {"edit": 1}, count=1, size=4, null=null)
        texts[null] = batches.collate.keywords["tokenizer"].batch_decode(batches[0].batch.ids)
    assert all("mirror it" in text for text in texts[0.0])
    assert all("following:" in t and "mirror it" not in t for t in texts[1.0])


def test_buckets_keep_the_ratio_and_batches_rectangular(folder, microbatches):
    Image.new("RGB", (100, 200)).save("tall.png")
    with open("a.jsonl", "a") as file:
        file.write('{"task": "t2i", "prompt": "tall", "target": "tall.png"}\n')
        file.write('{"task": "t2i", "prompt": "stated", "target": "a.png", "size": [50, 50]}\n')
        file.write('{"task": "t2i", "prompt": "gone", "target": "gone.png", "size": null}\n')
    sources = [(Manifest("a.jsonl"), 1)]
    batches = microbatches(sources, {"t2i": 1}, side=64, buckets=True)
    sizes = {pool.size: len(pool.rows) for pool in batches.pools}
    assert sizes == {(96, 48): 3, (48, 96): 1, (64, 64): 2}
    assert {tuple(batches[j].target.shape[2:]) for j in range(12)} <= {(48, 96), (96, 48), (64, 64)}
    (pool,) = make_pools([(Examples(), 1)], {"t2i": 1}, 64, buckets=True)
    assert pool.size == (64, 64)
    for side in (16, 64, 512, 1024):
        for width, height in data.bucket_sizes(side):
            assert width % 16 == height % 16 == 0 and 0.75 < width * height / side**2 < 1.25


# ---- examples -----------------------------------------------------------------------------------


def test_source_and_target_share_their_crop(folder):
    record = Manifest("a.jsonl").record(3, "edit")
    _, (source, text), target = training_example(record, (48, 48), random.Random(0))
    assert target.size == (48, 48) and text == "mirror it 0"
    assert source.tobytes() == ImageOps.mirror(target).tobytes() != target.tobytes()


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (128, 64)])
def test_objects_are_cut_where_the_target_shows_them(folder, size):
    """The box is all red, and nothing else is: so must its crop be."""
    record = Manifest("a.jsonl").record(4, "objects")
    for i in range(4):
        _, prompt, target = training_example(record, size, random.Random(i))
        (crop,) = {p.tobytes(): p for p in prompt if not isinstance(p, str)}.values()
        pixels = np.asarray(crop, int)[1:-1, 1:-1].reshape(-1, 3)
        assert (abs(pixels - [255, 0, 0]) < 30).all()
        share = crop.width * crop.height / (size[0] * size[1])
        red = (np.asarray(target, int)[..., 0] > 128).mean()
        assert abs(share - red) < 0.03
        assert target.size == size


def test_at_most_three_objects_each_at_most_half():
    picture = Image.new("RGB", (100, 100))
    boxes = [[0, 0, 300, 300], [300, 0, 600, 300], [0, 300, 300, 600], [0, 0, 900, 900]]
    record = {"task": "objects", "target": picture, "segments": [["a", boxes * 2], [" b", []]]}
    for i in range(20):
        _, prompt, _ = training_example(record, (100, 100), random.Random(i))
        crops = [p for p in prompt if not isinstance(p, str)]
        assert len(crops) == 3 and all(c.size == (30, 30) for c in crops)
    record["segments"] = [["a", [boxes[3]]], [" b", []]]
    assert training_example(record, (100, 100), random.Random(0))[:2] == ("t2i", ["a b"])


def test_boxes_outside_the_crop_are_dropped():
    size = 200, 100  # its middle 100 x 100 remains
    boxes = [[0, 0, 240, 500], [250, 0, 500, 500], [200, 0, 320, 500]]
    visible = [data.visible_box(box, size, (100, 100)) for box in boxes]
    assert visible == [None, (0, 0, 50, 50), (0, 0, 14, 50)]
    assert data.visible_box([0, 0, 1000, 4], (2000, 2000), (2000, 2000)) is None  # 1 : 250


def test_rendered_objects_are_the_cells_of_their_scene():
    rng = random.Random(0)
    for _ in range(20):
        record = Examples().record(1, "objects", rng)
        scene = world.detect(record["target"])
        for box in (box for _, found in record["segments"] for box in found):
            crop = record["target"].crop(data.visible_box(box, (48, 48), (48, 48)))
            places = [o for o in scene.objects if world.box(o) == box]
            assert len(places) == 1 and crop.size == (16, 16)


# ---- bad lines ----------------------------------------------------------------------------------


def test_bad_lines_are_skipped_counted_and_named(folder, microbatches):
    lines = Path("a.jsonl").read_text().splitlines()
    lines[4] = lines[4].replace("a.png", "gone.png")
    Path("torn.png").write_bytes(Path("a.png").read_bytes()[:200])
    lines[8] = lines[8].replace("a.png", "torn.png")
    lines.insert(0, "{broken")
    Path("a.jsonl").write_text("\n".join(lines) + "\n")
    manifest = Manifest("a.jsonl")
    assert manifest.total == 13 and manifest.bad_lines == {1: "not JSON"}
    batches = microbatches([(manifest, 1)], {"t2i": 1}, count=3, size=2)
    bad_lines = [line for j in range(3) for line in batches[j].bad_lines]
    assert {place for place, _ in bad_lines} == {"a.jsonl:6", "a.jsonl:10"}
    assert all(len(batches[j].target) == 2 for j in range(3))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_manifest_without_one_good_line_ends_in_one_line(folder, microbatches, workers):
    Path("a.png").unlink()
    batches = microbatches([(Manifest("a.jsonl"), 1)], {"t2i": 1})
    with pytest.raises(UserError) as error:
        next(batches.load([0], workers))
    said = str(error.value)
    assert "100 bad lines in a row" in said and "a.png: no such image" in said and "\n" not in said


class Lines:
    name = "a.jsonl"

    def __init__(self, total, bad):
        self.total, self.bad_lines = total, dict.fromkeys(range(7, 7 + bad), "not JSON")


def test_more_than_one_percent_of_all_lines_ends_the_run(capsys):
    bad_lines = BadLines([(Lines(1500, 14), 1), (Examples(), 1)])
    bad_lines.add([("a.jsonl:90", "\x1b[2Jno such image file")])
    bad_lines.add([("a.jsonl:90", "no such image file")])  # the same line once more
    bad_lines.check(len(bad_lines) - bad_lines.scanned, 16)
    bad_lines.add([("a.jsonl:91", "damaged")])
    with pytest.raises(UserError, match="16 bad lines.*a.jsonl:7: not JSON; a.jsonl:8"):
        bad_lines.check(len(bad_lines) - bad_lines.scanned, 24)
    said = capsys.readouterr().err
    assert said.count("skipped a.jsonl") == 2 and "\x1b" not in said
    with pytest.raises(UserError, match="16 bad lines"):
        BadLines([(Lines(1500, 16), 1)])


@pytest.mark.parametrize("total, most", [(12, 10), (200, 10), (1000, 10), (1200, 12)])
def test_ten_bad_lines_do_not_end_a_run(total, most):
    BadLines([(Lines(total, most), 1)])
    with pytest.raises(UserError, match=f"{most + 1} bad lines are over 1 %"):
        BadLines([(Lines(total, most + 1), 1)])


def test_more_than_one_percent_of_what_was_read_ends_the_run():
    bad_lines = BadLines([(Lines(10**6, 11), 1)])
    bad_lines.check(10, 64)
    bad_lines.check(11, 1100)
    with pytest.raises(UserError, match="22 bad lines"):
        bad_lines.check(11, 1000)
