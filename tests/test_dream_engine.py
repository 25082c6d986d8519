"""The system: equal to the official code, whole batches equal to their items, strict loading."""

import copy
import json

import numpy as np
import pytest
import torch
from cases import IMAGE, OFFICIAL
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import relative, tensor, tensors
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLModel

import dream_engine
import mmdit
import shapes
from dream_engine import LMM, SD3, STAGE1, DreamEngine, read_official
from prompts import Batch, mrope_positions

# ---- the published checkpoint -------------------------------------------------------------------


def publish(folder, weights):
    """Write weights as the published checkpoint lies: .bin shards and an index."""
    folder.mkdir()
    index = {}
    for i in range(2):
        part = dict(list(weights.items())[i::2])
        torch.save(part, folder / f"pytorch_model-0000{i + 1}-of-00002.bin")
        index |= dict.fromkeys(part, f"pytorch_model-0000{i + 1}-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("layout", ["bin", "safetensors"])
@pytest.mark.parametrize("case", OFFICIAL["cases"])
def test_the_published_layout_gives_the_official_velocity(case, layout, names, answers, tmp_path):
    scale, r, mrope, prompt, grids = OFFICIAL["cases"][case]
    weights = tensors(names["official"])
    if layout == "bin":
        path = publish(tmp_path / "published", weights)
    else:
        path = tmp_path / "published"
        path.mkdir()
        save_file(weights, path / "model.safetensors")
    parts = read_official(path, scale)
    config = Qwen2VLConfig(**OFFICIAL["lmm"])
    cpu = torch.device("cpu")
    engine = DreamEngine(
        dream_engine.build_lmm(config, parts["lmm"], path, cpu, torch.float32),
        None,
        None,
        dream_engine.build_adapter(parts["adapter"], (64, 64), path, cpu),
        mmdit.build(parts["dit"], path),
        None,
    )
    ids = torch.tensor([prompt])
    image_mask = ids == IMAGE
    positions = torch.arange(len(prompt)).expand(3, -1)
    if mrope:
        positions = mrope_positions(image_mask[0], grids)
    grids = torch.tensor(grids).reshape(-1, 3)
    patches = tensor("patches", (int(grids.prod(1).sum()), 1176)) if grids.numel() else None
    batch = Batch(ids, torch.ones_like(image_mask), image_mask, positions[:, None], patches, grids)
    condition = engine.condition(batch, r)
    velocity = engine.mmdit(
        tensor("latent", (1, 16, 8, 12)), torch.tensor([0.6]), condition.txt, condition.vec
    )
    assert relative(velocity, answers[f"official/{case}"]) < 1e-4


def test_the_published_folder_draws_from_start_to_end(names, write, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(LMM)
    shapes_ = names["official"] | {
        name: [len(tokenizer), 64]
        for name in ("lmm.model.embed_tokens.weight", "lmm.lm_head.weight")
    }
    checkpoint = publish(tmp_path / "published", tensors(shapes_))
    config = copy.deepcopy(OFFICIAL["lmm"])
    config["text_config"]["vocab_size"] = len(tokenizer)
    Qwen2VLConfig(**config).save_pretrained(tmp_path / "lmm")
    tokenizer.save_pretrained(tmp_path / "lmm")
    engine = DreamEngine.load(
        write("vae/16/single", "first_stage_model."), tmp_path / "lmm", checkpoint, device="cpu"
    )
    assert engine.default_size == 512 and engine.patches.patch == 14
    images = engine.generate([["a dog ", PICTURES[0], " on a mat"]], steps=2, r=0.5, size=(48, 64))
    assert images[0].size == (48, 64)


def test_golden_cases_differ(answers):
    """Else a switch without effect would pass for right."""
    cases = [k for k in answers if k.startswith("official/pictures")]
    for a in cases:
        for b in cases:
            assert a == b or relative(answers[a], answers[b]) > 1e-2


@pytest.mark.parametrize("extra", ["surprise.weight", "lmm.surprise", "dit.surprise.weight"])
def test_unknown_tensors_of_a_published_checkpoint_are_refused(extra, names, tmp_path):
    weights = tensors(names["official"]) | {extra: torch.zeros(2)}
    path = publish(tmp_path / "published", weights)
    with pytest.raises(ValueError, match="surprise"):
        parts = read_official(path)
        mmdit.build(parts["dit"], path)
        config = Qwen2VLConfig(**OFFICIAL["lmm"])
        dream_engine.build_lmm(config, parts["lmm"], path, "cpu", torch.float32)


def test_a_missing_lora_is_named(names, tmp_path):
    weights = tensors(names["official"])
    del weights["dit.transformer_blocks.1.attn.to_q.lora_B.default.weight"]
    with pytest.raises(ValueError, match=r"LoRA of dit.transformer_blocks.1.attn.to_q"):
        read_official(publish(tmp_path / "published", weights))


# ---- the miniature through the same code --------------------------------------------------------

PICTURES = [
    shapes.render(shapes.Scene("white", (shapes.Object("red", "star", i),))) for i in range(3)
]
PROMPTS = [
    ["Generate Image: a red circle"],
    ["Generate Image: ", PICTURES[0], " and a blue ring above ", PICTURES[1]],
    ["Copy Image: ", PICTURES[2].resize((96, 48))],
]


@pytest.fixture(scope="module")
def engine():
    return DreamEngine.load(device="cpu")


@torch.no_grad()
def test_states_equal_transformers_own_forward(engine):
    reference = Qwen2VLModel.from_pretrained(LMM, dtype=torch.float32).eval()
    for prompt in PROMPTS:
        batch = engine.collate([prompt])
        images = {}
        if len(batch.grids):
            images = {"pixel_values": batch.patches, "image_grid_thw": batch.grids}
        expected = reference(
            input_ids=batch.ids,
            attention_mask=batch.mask.long(),
            mm_token_type_ids=batch.image_mask.long(),
            **images,
        ).last_hidden_state
        hidden, _ = engine.lmm_states(batch)
        assert relative(hidden, expected) < 1e-5


@pytest.mark.parametrize("r", [0.0, 0.4, 1.0])
def test_a_ragged_batch_equals_its_items_alone(engine, r):
    rates = torch.tensor([0.1, r, 1 - r])
    together = engine.encode(PROMPTS, rates)
    for i, prompt in enumerate(PROMPTS):
        alone = engine.encode([prompt], rates[i])
        n = alone.txt.shape[1]
        assert together.mask[i].sum() == n
        assert relative(together.txt[i, :n], alone.txt[0]) < 1e-5
        assert relative(together.vec[i], alone.vec[0]) < 1e-5


def test_thousands_of_tokens_and_many_pictures_beside_a_short_prompt(engine):
    long = ["a red circle, " * 800, *PICTURES, " and ", *PICTURES]
    batch = engine.collate([long, ["a ring"]])
    assert batch.mask.sum(1)[0] > 3000 and len(batch.grids) == 6
    together, alone = engine.encode([long, ["a ring"]]), engine.encode([["a ring"]])
    n = alone.txt.shape[1]
    assert relative(together.txt[1, :n], alone.txt[0]) < 1e-5
    assert relative(together.vec[1], alone.vec[0]) < 1e-5
    _, image = engine.generate([long, ["a ring"]], steps=1)
    (same,) = engine.generate([["a ring"]], steps=1, seed=1)
    assert np.abs(np.asarray(image, int) - np.asarray(same, int)).max() <= 1


def test_r_moves_image_prompts_only(engine):
    text, image, _ = (engine.encode([p], 0.0).txt for p in PROMPTS)
    assert torch.equal(engine.encode([PROMPTS[0]], 1.0).txt, text)
    assert relative(engine.encode([PROMPTS[1]], 1.0).txt, image) > 1e-2


def test_the_vit_runs_once(engine):
    calls = []
    hook = engine.lmm.visual.register_forward_hook(lambda *_: calls.append(1))
    engine.generate([[PICTURES[0]]], steps=3, task="i2i", r=0.5)
    hook.remove()
    assert len(calls) == 1


def test_same_seed_same_picture_alone_or_in_a_batch(engine):
    prompts = [["a red circle"], ["a blue star and a green ring"]]
    together = engine.generate(prompts, steps=4, seed=7)
    again = engine.generate(prompts, steps=4, seed=7)
    for i, prompt in enumerate(prompts):
        (alone,) = engine.generate([prompt], steps=4, seed=7 + i)
        difference = np.abs(np.asarray(together[i], int) - np.asarray(alone, int))
        assert difference.max() <= 1  # sums in another order may round another way
        assert together[i].tobytes() == again[i].tobytes()


def test_sizes(engine):
    (image,) = engine.generate([["a red circle"]], steps=1, size=(32, 64))
    assert image.size == (32, 64)
    (image,) = engine.generate([["a red circle"]], steps=1, guidance=1)
    assert image.size == (64, 64)


def test_guidance_of_the_null_prompt(engine):
    prompt, settings = [PICTURES[0], "make the star blue"], {"steps": 3, "task": "edit"}
    (plain,) = engine.generate([prompt], **settings)
    (nearly,) = engine.generate([prompt], **settings, null_guidance=1 + 1e-6)
    (strong,) = engine.generate([prompt], **settings, null_guidance=3)
    plain, nearly, strong = (np.asarray(image, int) for image in (plain, nearly, strong))
    assert abs(plain - nearly).max() <= 1 and abs(plain - strong).max() > 20


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"null_guidance": float("nan")}, "guidance"),
        ({"steps": 0}, "steps"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": float("inf")}, "guidance"),
        ({"r": 1.5}, "blend"),
        ({"r": float("nan")}, "blend"),
        ({"size": (64, 50)}, "nearest is 48"),
        ({"size": (0, 64)}, "nearest is 16"),
        ({"size": (128, 64)}, "nearest is 64"),
        ({"task": "draw"}, "unknown task"),
    ],
)
def test_settings_that_cannot_be_drawn_are_refused(engine, setting, message):
    with pytest.raises(ValueError, match=message):
        engine.generate([["a red circle"]], **setting)


def test_a_saved_adapter_comes_back(engine, tmp_path):
    engine.save(tmp_path / "a.safetensors", stage=1, step=3)
    again = DreamEngine.load(checkpoint=tmp_path / "a.safetensors", device="cpu")
    for name, parameter in engine.adapter.state_dict().items():
        assert torch.equal(again.adapter.state_dict()[name], parameter)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


# ---- what does not fit is named -----------------------------------------------------------------


def copy_lmm(folder, change=None):
    folder.mkdir()
    for file in LMM.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(LMM / "model.safetensors")
    if change:
        change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


def test_lmm_weights_of_every_transformers_version_load(engine, tmp_path):
    def rename(weights):
        for name in list(weights):
            part = "visual" if name.startswith("visual.") else "language_model"
            new = "model." + part + "." + name.removeprefix("visual.").removeprefix("model.")
            weights[new] = weights.pop(name)
        weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"].clone()

    folder = copy_lmm(tmp_path / "new", rename)
    again = DreamEngine.load(lmm=folder, device="cpu")
    assert torch.equal(again.encode(PROMPTS).txt, engine.encode(PROMPTS).txt)


def test_the_flat_configuration_of_the_published_folder_loads():
    """Qwen2-VL was published with the text configuration at the top level."""
    flat = {
        "model_type": "qwen2_vl",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
    }
    config = Qwen2VLConfig(**flat)
    weights = Qwen2VLForConditionalGeneration(config).state_dict()
    model = dream_engine.build_lmm(config, weights, "flat", "cpu", torch.float32)
    assert config.text_config.hidden_size == 64 and config.text_config.rms_norm_eps == 1e-6
    assert config.text_config.rope_parameters["mrope_section"] == [2, 3, 3]
    assert model.language_model.rotary_emb.inv_freq.shape == (8,)


def test_missing_and_unknown_lmm_tensors_are_named(tmp_path):
    name = "model.layers.2.mlp.up_proj.weight"
    folder = copy_lmm(tmp_path / "a", lambda w: w.pop(name))
    with pytest.raises(ValueError, match="missing language_model.layers.2.mlp.up_proj.weight"):
        DreamEngine.load(lmm=folder, device="cpu")
    folder = copy_lmm(tmp_path / "b", lambda w: w.update(extra=torch.zeros(1)))
    with pytest.raises(ValueError, match="unknown extra"):
        DreamEngine.load(lmm=folder, device="cpu")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_an_incomplete_lmm_folder_is_named(tmp_path, file):
    folder = copy_lmm(tmp_path / "lmm")
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        DreamEngine.load(lmm=folder, device="cpu")
    (folder / file).write_text("{}")
    with pytest.raises(ValueError, match=str(folder)):
        DreamEngine.load(lmm=folder, device="cpu")


def test_adapters_for_other_models_are_refused(engine, tmp_path):
    weights = load_file(STAGE1)
    config = {"config": json.dumps(engine.base)}
    wide = dict(weights)
    wide["adapter.txt.0.weight"] = torch.zeros(512, 1536)
    save_file(wide, tmp_path / "wide.safetensors", config)
    with pytest.raises(ValueError, match="LMM 1536 wide to an MM-DiT 128 wide"):
        DreamEngine.load(checkpoint=tmp_path / "wide.safetensors", device="cpu")
    for part, name in (("base", "SD3"), ("lmm", "Qwen2-VL")):
        config = {"config": json.dumps({**engine.base, part: 1.0})}
        save_file(weights, tmp_path / "other.safetensors", config)
        with pytest.raises(ValueError, match=f"trained on another {name}"):
            DreamEngine.load(checkpoint=tmp_path / "other.safetensors", device="cpu")
    for wrong in (SD3, LMM / "model.safetensors"):
        with pytest.raises(ValueError, match="not a Dream Engine checkpoint"):
            DreamEngine.load(checkpoint=wrong, device="cpu")


def test_pictures_are_pil_rgb(engine):
    (image,) = engine.generate([["a red circle"]], steps=1)
    assert isinstance(image, Image.Image) and image.mode == "RGB"
