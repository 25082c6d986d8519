"""Training examples: every line once an epoch, the same for whoever asks, crops where boxes say."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import data
import shapes
from cli import one_line_errors
from data import Faults, Manifest, Microbatches, make_pools, parse_record, training_example
from dream_engine import LMM, load_tokenizer, patch_config

BOX = [250, 400, 500, 600]  # thousandths of a 200 x 100 picture: pixels 50..100 x 40..60


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A manifest of 12 lines, three a task; the pictures are a red box on noise-free blue."""
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


def microbatches(sources, tasks, count=40, size=2, side=48, null=0.0, **settings):
    pools = make_pools(sources, tasks, side, settings.pop("buckets", False))
    reading = load_tokenizer(LMM), patch_config(LMM), True
    return Microbatches(
        pools, count, size, 0, *reading, dict.fromkeys(data.FIELDS, null), **settings
    )


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "not JSON"),
        ("[]", "must be one of"),
        ('{"task": "draw"}', "must be one of t2i, i2i, edit, objects"),
        ('{"task": "t2i", "target": "a.png"}', '"prompt" must be a text'),
        ('{"task": "t2i", "prompt": "a", "target": ""}', '"target" must be a text'),
        ('{"task": "edit", "source": 3, "instruction": "a", "target": "a"}', '"source"'),
        ('{"task": "objects", "target": "a", "segments": []}', '"segments" must be'),
        ('{"task": "objects", "target": "a", "segments": [["a", [[1, 2, 3]]]]}', "x1"),
        ('{"task": "objects", "target": "a", "segments": [["a", [[9, 2, 3, 4]]]]}', "x1"),
        ('{"task": "objects", "target": "a", "segments": [["a", [["1", 2, 3, 4]]]]}', "x1"),
        ('{"task": "objects", "target": "a", "segments": [["a", 3]]}', '"segments" must be'),
        ('{"task": "objects", "target": "a", "segments": [["a", [[0, 0, 1e999, 4]]]]}', "x1"),
        ('{"task": "t2i", "prompt": "\\ud83d", "target": "a.png"}', '"prompt" must be a text'),
        ('{"task": "t2i", "prompt": "' + "a" * 5000 + '", "target": "a.png"}', "1 to 4000 letters"),
        ("[" * 100_000, "not JSON"),
        ('{"task": "t2i", "prompt": "__import__(\'os\')", "target": NaNa}', "not JSON"),
    ],
)
def test_a_bad_line_is_refused_with_its_reason(line, reason):
    with pytest.raises(ValueError, match=reason):
        parse_record(line)


def test_every_line_comes_once_an_epoch_in_new_order(folder):
    batches = microbatches([(Manifest("a.jsonl"), 1)], {"t2i": 1}, count=9, size=1)
    (pool,) = batches.pools
    numbers = [int(pool.line(k, 0)[0]) for k in range(9)]
    assert [sorted(numbers[i : i + 3]) for i in (0, 3, 6)] == [[1, 5, 9]] * 3
    assert len({tuple(numbers[i : i + 3]) for i in (0, 3, 6)}) > 1


def test_a_microbatch_depends_on_seed_and_number_alone(folder):
    sources = [(Manifest("a.jsonl"), 1), (None, 2)]
    tasks = {"t2i": 1, "edit": 1, "objects": 1}
    first, again = (microbatches(sources, tasks, side=64, flip=True) for _ in range(2))
    for j in (7, 3, 30):
        a, b = first[j], again[j]
        assert a.task == b.task and torch.equal(a.target, b.target)
        assert torch.equal(a.batch.ids, b.batch.ids)
        assert torch.equal(a.batch.patches, b.batch.patches)
    loader = torch.utils.data.DataLoader(first, batch_size=None, sampler=range(4), num_workers=2)
    for j, micro in enumerate(loader):
        assert torch.equal(micro.target, first[j].target)
    assert not torch.equal(first[0].batch.ids, first[1].batch.ids)


def test_tasks_and_sources_come_by_their_weights(folder):
    sources = [(Manifest("a.jsonl"), 1), (None, 3)]
    batches = microbatches(sources, {"t2i": 1, "edit": 3}, count=4000)
    counts = np.bincount(batches.pool_of, minlength=4) / 4000
    names = [(pool.task, pool.source is None) for pool in batches.pools]
    expected = {("t2i", False): 1, ("t2i", True): 3, ("edit", False): 3, ("edit", True): 9}
    for name, count in zip(names, counts):
        assert abs(count - expected[name] / 16) < 0.03


def test_source_and_target_share_crop_and_mirror(folder):
    record = Manifest("a.jsonl").record(0) | {"task": "edit", "instruction": "x"}
    record["source"] = record["target"]
    seen = set()
    for i in range(8):
        _, (source, _), target = training_example(record, (48, 48), random.Random(i), flip=True)
        assert target.size == (48, 48) and source.tobytes() == target.tobytes()
        seen.add(target.tobytes())
    assert len(seen) == 2


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (128, 64)])
def test_objects_are_cut_where_the_target_shows_them(folder, size):
    """The box is all red, and nothing else is: so must its crop be, mirrored or not."""
    manifest = Manifest("a.jsonl")
    record = manifest.record(manifest.lines["objects"][0][1])
    for i in range(8):
        _, prompt, target = training_example(record, size, random.Random(i), flip=True)
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
    picture = Image.new("RGB", (200, 100))  # its middle 100 x 100 is kept
    boxes = [[0, 0, 240, 500], [250, 0, 500, 500], [200, 0, 320, 500]]
    kept = [data._visible(box, picture.size, (100, 100), False) for box in boxes]
    assert kept == [None, (0, 0, 50, 50), (0, 0, 14, 50)]
    assert data._visible(boxes[1], picture.size, (100, 100), True) == (50, 0, 100, 50)


def test_rendered_objects_are_the_cells_of_their_scene():
    rng = random.Random(0)
    for _ in range(20):
        record = data.rendered("objects", rng)
        scene = shapes.detect(record["target"])
        boxes = [box for _, found in record["segments"] for box in found]
        for box in boxes:
            crop = record["target"].crop(data._visible(box, (64, 64), (64, 64), False))
            places = [o for o in scene.objects if shapes.box(o) == box]
            assert len(places) == 1 and crop.size == (16, 16)


def test_null_prompts_come_as_often_as_asked(folder):
    texts = {}
    for null in (0.0, 1.0):
        batches = microbatches([(Manifest("a.jsonl"), 1)], {"edit": 1}, count=1, size=4, null=null)
        texts[null] = batches.collate.keywords["tokenizer"].batch_decode(batches[0].batch.ids)
    assert all("mirror it" in text for text in texts[0.0])
    assert all("following:" in t and "mirror it" not in t for t in texts[1.0])


def test_buckets_keep_the_ratio_and_batches_rectangular(folder):
    Image.new("RGB", (100, 200)).save("tall.png")
    with open("a.jsonl", "a") as file:
        file.write('{"task": "t2i", "prompt": "tall", "target": "tall.png"}\n')
        file.write('{"task": "t2i", "prompt": "told", "target": "a.png", "size": [50, 50]}\n')
    batches = microbatches([(Manifest("a.jsonl"), 1)], {"t2i": 1}, side=64, buckets=True)
    sizes = {pool.size: len(pool.lines) for pool in batches.pools}
    assert sizes == {(96, 48): 3, (48, 96): 1, (64, 64): 1}
    assert {tuple(batches[j].target.shape[2:]) for j in range(12)} <= {(48, 96), (96, 48), (64, 64)}
    for side in (64, 512, 1024):
        for width, height in data.bucket_sizes(side):
            assert width % 16 == height % 16 == 0 and 0.75 < width * height / side**2 < 1.25


def test_faulty_examples_are_skipped_counted_and_named(folder):
    lines = Path("a.jsonl").read_text().splitlines()
    lines[4] = lines[4].replace("a.png", "gone.png")
    Path("torn.png").write_bytes(Path("a.png").read_bytes()[:200])
    lines[8] = lines[8].replace("a.png", "torn.png")
    lines.insert(0, "{broken")
    Path("a.jsonl").write_text("\n".join(lines) + "\n")
    manifest = Manifest("a.jsonl")
    assert manifest.total == 13 and manifest.faults == {1: "not JSON"}
    batches = microbatches([(manifest, 1)], {"t2i": 1}, count=3, size=2)
    faults = [fault for j in range(3) for fault in batches[j].faults]
    assert {place for place, _ in faults} == {"a.jsonl:6", "a.jsonl:10"}
    assert all(len(batches[j].target) == 2 for j in range(3))
    assert data.check("a.jsonl") == 3


def test_more_than_one_percent_of_all_lines_ends_the_run(capsys):
    class Hundreds:
        file, faults, total = "a.jsonl", {7: "not JSON"}, 200

    faults = Faults([Hundreds])
    faults.check(0, 8)
    faults.note([("a.jsonl:9", "no such image file")])
    faults.note([("a.jsonl:9", "no such image file")])  # the same line once more
    faults.check(len(faults.met), 16)
    faults.note([("a.jsonl:11", "damaged")])
    with pytest.raises(ValueError, match="3 bad lines.*a.jsonl:7: not JSON; a.jsonl:9"):
        faults.check(len(faults.met), 24)
    assert capsys.readouterr().err.count("skipped a.jsonl") == 2


def test_more_than_one_percent_of_what_was_read_ends_the_run():
    class Millions:
        file, faults, total = "a.jsonl", dict.fromkeys(range(11), "not JSON"), 10**6

    faults = Faults([Millions])
    faults.check(10, 64)
    faults.check(11, 1100)
    with pytest.raises(ValueError, match="22 bad lines"):
        faults.check(11, 1000)


def test_check_reports_and_draws_a_contact_sheet(folder, capsys):
    data.main(["check", "a.jsonl"])
    said = capsys.readouterr().out
    assert "t2i: 3 examples" in said and "objects: 3 examples" in said
    assert "0 of 12 lines are faulty" in said
    assert Image.open("a.png").size == (200, 100)
    assert Image.open("a.check.png").width > 300
    with open("a.jsonl", "a") as file:
        file.write('{"task": "t2i"}\n')
    with pytest.raises(SystemExit) as end:
        data.main(["check", "a.jsonl"])
    assert end.value.code == 1
    assert 'a.jsonl:13: "target" must be a text of 1 to 4000 letters' in capsys.readouterr().out


def test_a_missing_manifest_is_one_line(capsys):
    with pytest.raises(SystemExit), one_line_errors():
        data.main(["check", "nothing.jsonl"])
    assert capsys.readouterr().err == "error: nothing.jsonl: no such manifest\n"
