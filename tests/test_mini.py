"""The committed miniature has the published layouts, at most 40 MB, and draws right pictures."""

import json
import random

import torch
from safetensors import safe_open
from transformers import AutoImageProcessor, Qwen2VLForConditionalGeneration, T5EncoderModel

from checkpoints import metadata
from data import training_example
from dream_engine import LMM, MINI, SD3, STAGE1, STAGE2
from mini import edits, programs, world
from mini.encoders import CAPTION, continued
from mini.evaluate import Base
from mini.pretrain import T5
from prompts import to_images, to_tensor


def scenes(n, seed):
    rng = random.Random(seed)
    return [world.sample_scene("scene", rng) for _ in range(n)]


def right(prompts, images):
    return sum(world.matches(p, world.detect(image)) for p, image in zip(prompts, images))


def same(scenes, images):
    return sum(world.detect(image) == scene for scene, image in zip(scenes, images))


def test_all_files_together_have_at_most_40_mb():
    assert sum(f.stat().st_size for f in MINI.rglob("*") if f.is_file()) <= 40e6


def test_the_single_file_has_the_published_prefixes():
    with safe_open(SD3, "pt") as file:
        names = list(file.keys())
    prefixes = ("model.diffusion_model.", "first_stage_model.")
    assert all(name.startswith(prefixes) for name in names)
    assert f"{prefixes[0]}joint_blocks.0.x_block.attn.ln_q.weight" in names


def test_transformers_loads_both_folders():
    for kind, folder in ((Qwen2VLForConditionalGeneration, LMM), (T5EncoderModel, T5)):
        model, report = kind.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"], folder
        words = model.get_input_embeddings().weight.shape[0]
        assert model.config.get_text_config().vocab_size == words
    assert AutoImageProcessor.from_pretrained(LMM).patch_size == 8
    with safe_open(LMM / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert "model.embed_tokens.weight" in names and "visual.merger.ln_q.weight" in names


def test_checkpoints_hold_their_default_guidance(engine):
    for file in (STAGE1, STAGE2):
        assert json.loads(metadata(file)["config"])["guidance"] >= 1
    assert engine.guidance == json.loads(metadata(STAGE2)["config"])["guidance"]


@torch.no_grad()
def test_the_detector_recovers_reconstructions(engine):
    expected = scenes(20, "test vae")
    images = to_tensor([world.render(s) for s in expected])
    assert same(expected, to_images(engine.vae.decode(engine.vae.encode(images)))) >= 19


@torch.no_grad()
def test_the_lmm_captions_pictures(engine):
    expected, words = scenes(10, "test captions"), engine.lmm.language_model.embed_tokens.weight
    prompts = [[CAPTION, world.render(scene)] for scene in expected]
    texts = continued(engine.lmm, lambda states: states @ words.T, prompts, 26)
    assert sum(text.startswith(world.describe(s)) for text, s in zip(texts, expected)) >= 9


FAST = {"steps": 14}


def test_pictures_match_their_prompts(engine):
    prompts = [p for pairs in world.benchmark(8, seed="test").values() for _, p in pairs]
    images = engine.generate([[p.text] for p in prompts], **FAST)
    assert right(prompts, images) >= 40  # of 48


def test_the_base_draws_with_its_own_text_encoder():
    prompts = [p for pairs in world.benchmark(2, seed="test").values() for _, p in pairs]
    images = Base().generate([[p.text] for p in prompts], guidance=2, **FAST)
    assert right(prompts, images) >= 9  # of 12


def test_edited_pictures_show_the_target(engine):
    rng = random.Random("test edits")
    cases = [edits.sample_edit(kind, rng) for kind in edits.EDITS for _ in range(3)]
    prompts = [[world.render(edit.source), edit.text] for edit in cases]
    images = engine.generate(prompts, task="edit", **FAST)
    assert same([edit.target for edit in cases], images) >= 12  # of 15


def test_pictures_of_objects_are_combined(engine):
    rng, by_task, count = random.Random("test objects"), {"objects": [], "combine": []}, 0
    for reference in (programs.sample_reference(rng) for _ in range(16)):
        task, prompt, _ = training_example(programs.reference_record(reference), (48, 48), rng)
        by_task[task].append((prompt, reference.prompt))
    for task, pairs in by_task.items():
        prompts, expected = zip(*pairs)
        count += right(expected, engine.generate(prompts, task=task, **FAST))
    assert count >= 10  # of 16


def test_copies_show_the_same_scene(engine):
    expected = scenes(12, "test copies")
    images = engine.generate([[world.render(s)] for s in expected], task="i2i", r=0.5, **FAST)
    assert same(expected, images) >= 10  # of 12
