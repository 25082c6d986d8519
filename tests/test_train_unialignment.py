"""Training UniAlignment: it starts as SD3, trains both passes, and writes a folder that draws and reads."""

import json
import pickle
import random
import shutil
import signal
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import T5, t5_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import relative, tensor
from transformers import T5Config, T5EncoderModel

import data
import train as loop
from checkpoints import load_mmdit
from dream_engine import LMM, SD3, STAGE1
from lmm import collate, load_tokenizer, patch_config
from mini.world import EDGES, SEGMENT, Examples, describe, detect, edges, is_reserved, segment
from support import runs
from support.cli import UserError
from unialignment import sample, train
from unialignment.examples import PairedMicrobatches
from unialignment.folder import Tokens
from unialignment.model import LOSSES, UniAlignment

SMALL = ["--batch", "3", "--warmup", "1", "--device", "cpu"]
SMALL += ["--text-encoder", "t5", "--slots", "16"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """With a random T5 as wide as the miniature's text states."""
    monkeypatch.chdir(tmp_path)
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    torch.manual_seed(0)
    width = load_mmdit(SD3).config.context_dim
    T5EncoderModel(T5Config(**{**T5, "d_model": width})).save_pretrained("t5")
    t5_tokenizer().save_pretrained("t5")
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


def run(steps, out="run", *more):
    train.main([*SMALL, "--steps", str(steps), "--out", out, "--sample-every", "0", *more])
    return UniAlignment.load(out, device="cpu")


def weights(engine):
    return {k: x for k, x in engine.state_dict().items() if not k.startswith("lmm.")}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- the start ----------------------------------------------------------------------------------


@torch.no_grad()
def test_at_step_0_it_draws_what_sd3_draws_with_a_vec_of_zero():
    base = load_mmdit(SD3)
    engine = train.load_engine(train.parse([*SMALL, "--steps", "1"]), "cpu")
    ids = engine.tokens(["a red circle", "a star"])
    context, latent = engine.context(ids), tensor("latent", (2, base.config.channels, 6, 6))
    states = engine.text_encoder(input_ids=ids).last_hidden_state
    for t in (torch.tensor([0.1, 0.9]), 0.5):
        expected = base(latent, t, base.context_embedder(states), torch.zeros(2, base.config.width))
        assert relative(engine.draw(latent, t, context), expected) < 1e-5
    assert relative(engine.draw(latent, 0.5, context, [latent]), expected) > 1e-3
    gates = engine.mmdit.joint_blocks[-1].context_block.adaLN_modulation[1].weight.chunk(6)
    assert [x.abs().max().item() > 0 for x in gates] == [True, True, False, False, False, False]


# ---- examples -----------------------------------------------------------------------------------


@pytest.fixture
def manifest():
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (60, 40), color).save(name)
    lines = [
        {"task": "t2i", "prompt": "a red circle", "target": "a.png"},
        {"task": "edit", "source": "a.png", "instruction": "make it blue", "target": "b.png",
         "caption": "the blue star"},
        {"task": "answer", "image": "b.png", "question": "how many", "answer": "a star"},
    ]  # fmt: skip
    Path("a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data.Manifest("a.jsonl")


def microbatches(manifest, tasks, count=12, size=2, **options):
    pools = data.make_pools([(manifest, 1)], tasks, 32)
    lmm = partial(collate, tokenizer=load_tokenizer(LMM), config=patch_config(LMM))
    tokens = Tokens(t5_tokenizer(), 12)
    options = {"null": 0, "tokens": tokens, **options}
    return PairedMicrobatches(pools, lmm, count, size, **options)


def test_every_task_says_what_draws_and_what_is_read(manifest):
    words = {}
    made = microbatches(manifest, {"t2i": 1, "edit": 1, "answer": 1})
    tokens = made.tokens
    for micro in made.load(range(12)):
        pair = micro.batch
        hidden = pair.hidden == tokens.mask_id
        assert torch.equal(pair.texts[~hidden], pair.hidden[~hidden])
        words[micro.task] = [tokens.text(x[0]) for x in (pair.prompts, pair.texts)]
        sources = 1 if micro.task == "edit" else 0
        assert pair.sources.shape == (2, sources, 3, 32, 32) and micro.target.shape == (
            2,
            3,
            32,
            32,
        )
        if micro.task == "answer":
            assert not hidden[:, :4].any()  # the question
        if micro.task == "edit":
            assert pair.sources[0, 0, 0, 0, 0] == 1 and micro.target[0, 0, 0, 0] == -1
    assert words == {
        "t2i": ["a red circle"] * 2,
        "edit": ["make it blue", "the blue star"],
        "answer": ["", "Q: how many A: a star"],
    }


def test_tasks_take_turns_step_by_step(manifest):
    made = microbatches(manifest, {"t2i": 1, "edit": 1}, count=12, turn=3)
    assert [micro.task for micro in made.load(range(12))] == (["t2i"] * 3 + ["edit"] * 3) * 2
    again = microbatches(manifest, {"t2i": 1, "edit": 1}, count=12, turn=3)
    again = pickle.loads(pickle.dumps(again))  # as for worker processes that are not forked
    for a, b in zip(made.load(range(12)), again.load(range(12))):
        assert all(
            torch.equal(x, y) for x, y in zip(vars(a.batch).values(), vars(b.batch).values())
        )


def test_null_prompts_keep_their_source_and_their_text(manifest):
    (micro,) = microbatches(manifest, {"edit": 1}, count=1, null=1).load([0])
    assert (micro.batch.prompts == 1).all() and micro.batch.sources.shape[1] == 1
    assert Tokens(t5_tokenizer(), 12).text(micro.batch.texts[0]) == "the blue star"


def test_an_edit_without_a_caption_is_a_bad_line(manifest):
    record = {"task": "edit", "source": "a.png", "instruction": "make it blue", "target": "b.png"}
    Path("b.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match='an edit needs a "caption"'):
        next(microbatches(data.Manifest("b.jsonl"), {"edit": 1}).load([0]))
    with pytest.raises(UserError, match='"caption" must be a text'):
        data.parse_record(json.dumps(record | {"caption": " "}))
    with pytest.raises(UserError, match='"question" must be a text'):
        data.parse_record('{"task": "answer", "image": "a.png", "answer": "two"}')
    edit = Examples().record(1, "edit", random.Random(0))
    assert edit["caption"].endswith("background")


def test_a_caption_is_read_after_its_sentence_and_may_differ_from_the_prompt():
    tokens = Tokens(t5_tokenizer(), 12, "the star")
    row, slots = tokens.about(None, "a red circle")
    assert (
        tokens.text(row) == "the star a red circle" and slots.tolist() == [False] * 2 + [True] * 10
    )
    assert tokens.text(tokens.about("a", "red")[0]) == "Q: a A: red"
    record = Examples().record(1, "t2i", random.Random(0))
    example = PairedMicrobatches.prepare(SimpleNamespace(), record, (48, 48), random.Random(0))
    assert example[1] == [record["prompt"]] and example[-1] == record["caption"] != record["prompt"]


def test_a_third_of_the_miniatures_edits_perceive():
    rng, kinds = random.Random(0), Counter()
    for _ in range(600):
        record = Examples(perception=True).record(1, "edit", rng)
        scene = detect(record["source"])
        kinds[record["instruction"]] += 1
        if record["instruction"] == SEGMENT:
            true = segment(scene)
            assert detect(record["target"]) == true and record["caption"] == describe(true)
            assert not is_reserved(scene) and not is_reserved(true)
        if record["instruction"] == EDGES:
            assert record["target"].tobytes() == edges(scene).tobytes()
    assert 120 < kinds[SEGMENT] < 180 and 30 < kinds[EDGES] < 70


@torch.no_grad()
def test_the_teacher_means_its_own_words_and_picture(manifest):
    (micro,) = microbatches(manifest, {"t2i": 1}, count=1).load([0])
    engine = train.load_engine(train.parse([*SMALL, "--steps", "1"]), "cpu")
    lmm, image = engine.lmm, Image.open("a.png").crop((10, 0, 50, 40)).resize((32, 32))
    words, (_, vit) = lmm.collate([["a red circle"]]), lmm(lmm.collate([[image]]))
    states, _ = lmm(words)
    embeddings = lmm.language_model.embed_tokens(words.ids)
    for engine.lmm_states, expected in ((False, embeddings), (True, states)):
        features, text = engine.teach(micro.batch)
        assert relative(features[0], vit.mean(0)) < 1e-5
        assert relative(text[0], expected[0].mean(0)) < 1e-5


def test_a_question_of_all_slots_is_a_bad_line(manifest):
    lines = [{"task": "answer", "image": "a.png", "question": "how many", "answer": "a star"}] * 3
    lines[1] = lines[1] | {"question": "how many " * 9}
    Path("c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    micros = list(microbatches(data.Manifest("c.jsonl"), {"answer": 1}, count=3).load(range(3)))
    bad = {place: why for micro in micros for place, why in micro.bad_lines}
    assert bad.keys() == {"c.jsonl:2"} and "leaves no room" in bad["c.jsonl:2"]


def test_t_comes_in_thousandths_and_is_not_shifted(manifest):
    (micro,) = microbatches(manifest, {"edit": 1}, count=1, size=512).load([0])
    args = train.parse([*SMALL, "--steps", "1"])
    draws = train.load_engine(args, "cpu").training_noise(micro, torch.Generator().manual_seed(0))
    noise, t = draws["noise"], draws["t"]
    assert noise.shape == (512, 3, 8, 4, 4)
    torch.testing.assert_close(1000 * t, (1000 * t).round(), atol=1e-3, rtol=0)
    assert abs(t.mean() - 0.5) < 0.03 and abs(t.square().mean() - 0.294) < 0.03


# ---- runs ---------------------------------------------------------------------------------------


def test_a_run_learns_everything_but_what_is_frozen_and_leaves_a_folder(capsys):
    engine = run(3)
    started = train.load_engine(train.parse([*SMALL, "--steps", "3", "--out", "other"]), "cpu")
    learning = {name for name, p in started.named_parameters() if p.requires_grad}
    before, after = weights(started), weights(engine)
    assert before.keys() == after.keys()
    same = {k for k in before if torch.equal(before[k], after[k])}
    assert same == before.keys() - learning
    (last, *_) = reversed(runs.read_metrics("run"))
    total = sum(LOSSES[name] * last[name] for name in LOSSES)
    assert abs(total - last["loss"]) < 1e-4 and all(last[name] > 0 for name in LOSSES)
    assert sorted(p.name for p in Path("run").iterdir()) == [
        "checkpoints", "metrics.jsonl", "scheduler", "text_encoder", "tokenizer",
        "transformer", "vae",
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "trainable parameters" in said and "edit 48x48 x 1 from rendered scenes" in said
    assert said.splitlines()[-1] == "run"
    sample.main(["--task", "caption", "--checkpoint", "run", "--image", pixel(), "--device", "cpu"])
    assert len(capsys.readouterr().out.splitlines()) == 1


def pixel():
    Image.new("RGB", (64, 64), "red").save("x.png")
    return "x.png"


def test_a_resumed_run_is_the_unbroken_one():
    whole = run(4, "whole", "--save-every", "2")
    state = Path("whole/checkpoints/000004")
    for file in sorted(state.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    state.rmdir()
    again = run(4, "whole", "--save-every", "2", "--resume")
    assert equal(weights(whole), weights(again))
    assert [r["step"] for r in runs.read_metrics("whole")] == [1, 2, 3, 4]
    with pytest.raises(UserError, match="weights: .* then, .* now"):
        run(4, "whole", "--resume", "--weights", "text=1")


def test_a_folder_of_weights_is_not_trained_over_and_nan_is_not_resumed():
    run(1)
    file = next(Path("run/checkpoints").rglob("*.safetensors"))
    tensors = load_file(file)
    tensors[min(tensors)].view(-1)[0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(UserError, match="^run/checkpoints/000001/transformer: holds NaN"):
        run(1, "run", "--resume")
    shutil.rmtree("run/checkpoints")
    for more in ([], ["--resume"]):
        with pytest.raises(UserError, match="^--out holds run/transformer.*choose another folder"):
            run(1, "run", *more)


def test_weights_and_tasks_can_be_chosen(manifest):
    engine = run(
        2, "run", "--data", "a.jsonl", "--tasks", "answer=1,t2i=1", "--weights", "isa=0,csa=0"
    )
    assert engine.tokens.slots == 16
    (last, *_) = reversed(runs.read_metrics("run"))
    assert abs(last["velocity"] + 0.2 * last["text"] - last["loss"]) < 1e-4
    more = ["--steps", "1", "--checkpoint", "run", "--out", "next", "--size", "32"]
    goes_on = train.parse([*SMALL[:-4], *more])
    started = train.load_engine(goes_on, "cpu")
    assert equal(weights(started), weights(engine)) and started.default_size == 32
    assert goes_on.lr == train.RECIPE.rate
    assert train.parse([*SMALL[:-4], *more, "--data", "a.jsonl"]).lr == 3e-5  # no miniature
    with pytest.raises(UserError, match="texts: .* then, .* now"):
        run(2, "run", "--resume", "--sentence", "the star", "--data", "a.jsonl")


def test_the_sheet_shows_what_is_drawn_and_read(manifest, monkeypatch):
    sheets = []
    monkeypatch.setattr(
        loop, "sheet", lambda rows, height: sheets.append(rows) or Image.new("RGB", (9, 9))
    )
    arguments = [*SMALL, "--steps", "1", "--out", "run", "--sample-every", "1", "--data", "a.jsonl"]
    train.main([*arguments, "--tasks", "t2i=1,edit=1,answer=1", "--size", "32"])
    (rows,) = sheets
    counts = {text.split(":")[0]: len(images) for images, text in rows}
    assert counts == {"t2i": 2, "edit": 3, "answer": 1} and len(rows) == 9
    assert all("/ read: " in text and "/ right: " in text for _, text in rows)
    assert "how many" in next(text for _, text in rows if text.startswith("answer"))
    assert np.asarray(Image.open("run/samples-000001.png")).shape == (9, 9, 3)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--rank", "4"], "unrecognized arguments: --rank 4"),
        (["--stage", "1"], "unrecognized arguments: --stage 1"),
        (["--tasks", "i2i=1"], "--tasks: unialignment learns answer, edit, t2i"),
        (["--weights", "words=1"], "the losses being velocity, text, csa, isa"),
        (
            ["--checkpoint", "run"],
            "--text-encoder, --slots, --sentence: --checkpoint has its own",
        ),
        (["--text-encoder", "nowhere"], "nowhere: expected a T5 tokenizer"),
    ],
)
def test_mistakes_get_one_line(arguments, said):
    with pytest.raises((UserError, FileNotFoundError), match=said):
        run(1, "run", *arguments)
    assert not Path("run").exists()


def test_a_single_file_of_sd3_needs_a_t5_beside_it():
    with pytest.raises(UserError, match="--text-encoder is missing: .*safetensors holds no T5"):
        train.parse(["--sd3", str(STAGE1), "--data", "a.jsonl"])


def test_a_t5_of_another_width_is_refused():
    T5EncoderModel(T5Config(**T5)).save_pretrained("t5")
    with pytest.raises(
        UserError, match="48 numbers in a state of T5: this transformer was trained"
    ):
        run(1)
