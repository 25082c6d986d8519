"""The committed miniature: the published layouts, the promised size, and pictures that are right."""

import random

import pytest
import torch
from safetensors import safe_open
from transformers import AutoImageProcessor, Qwen2VLForConditionalGeneration

import shapes
import weights
from data import rendered_reference, training_example
from dream_engine import LMM, MINI, SD3, DreamEngine
from pretrain import TEXT_ENCODER, TextEncoder, describe_images
from prompts import to_images, to_tensor


@pytest.fixture(scope="module")
def engine():
    return DreamEngine.load(device="cpu")


def scenes(n, seed):
    rng = random.Random(seed)
    return [shapes.sample_scene("scene", rng) for _ in range(n)]


def test_all_files_together_are_small():
    assert sum(f.stat().st_size for f in MINI.rglob("*") if f.is_file()) <= 24e6


def test_the_single_file_has_the_published_prefixes():
    with safe_open(SD3, "pt") as file:
        names = list(file.keys())
    prefixes = ("model.diffusion_model.", "first_stage_model.")
    assert all(name.startswith(prefixes) for name in names)
    assert {f"{prefixes[0]}joint_blocks.0.x_block.attn.ln_q.weight"} <= set(names)


def test_transformers_itself_loads_the_folder():
    model, report = Qwen2VLForConditionalGeneration.from_pretrained(LMM, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.image_token_id == 504
    assert AutoImageProcessor.from_pretrained(LMM).patch_size == 8
    with safe_open(LMM / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert "model.embed_tokens.weight" in names and "visual.merger.ln_q.weight" in names


def test_the_text_encoder_fits():
    tensors = weights.read(TEXT_ENCODER)
    with torch.device("meta"):
        encoder = TextEncoder(len(tensors["token.weight"]))
    weights.fill(encoder, tensors, TEXT_ENCODER, dtype=torch.float32)


@torch.no_grad()
def test_reconstructions_are_read_exactly(engine):
    wanted = scenes(40, "test vae")
    images = to_tensor([shapes.render(s) for s in wanted])
    copies = to_images(engine.vae.decode(engine.vae.encode(images)))
    assert sum(shapes.detect(c) == s for c, s in zip(copies, wanted)) >= 39


@torch.no_grad()
def test_the_lmm_describes_what_it_sees(engine):
    lmm = Qwen2VLForConditionalGeneration.from_pretrained(LMM, dtype=torch.float32).eval()
    wanted = scenes(30, "test captions")
    said = describe_images(lmm, engine, [shapes.render(s) for s in wanted])
    assert sum(text == shapes.describe(s) for text, s in zip(said, wanted)) >= 27


def test_pictures_match_their_prompts(engine):
    prompts = [p for pairs in shapes.benchmark(5, seed="test").values() for _, p in pairs]
    images = engine.generate([[p.text] for p in prompts])
    right = sum(shapes.matches(p, shapes.detect(i)) for p, i in zip(prompts, images))
    assert right >= 20  # of 30


def test_edits_are_followed_exactly(engine):
    rng = random.Random("test edits")
    edits = [shapes.sample_edit(kind, rng) for kind in shapes.EDITS for _ in range(4)]
    prompts = [[shapes.render(edit.source), edit.text] for edit in edits]
    images = engine.generate(prompts, task="edit", guidance=2)
    assert sum(shapes.detect(i) == e.target for i, e in zip(images, edits)) >= 15  # of 20


def test_pictures_of_objects_are_combined(engine):
    rng = random.Random("test objects")
    told = [shapes.sample_reference(rng) for _ in range(20)]
    right = 0
    for reference in told:
        task, prompt, _ = training_example(rendered_reference(reference), (64, 64), rng)
        (image,) = engine.generate([prompt], task=task, guidance=2)
        right += shapes.matches(reference.prompt, shapes.detect(image))
    assert right >= 13


def test_copies_keep_every_place(engine):
    wanted = scenes(20, "test copies")
    images = engine.generate([[shapes.render(s)] for s in wanted], task="i2i", r=0.5)
    assert sum(shapes.detect(i) == s for i, s in zip(images, wanted)) >= 15
