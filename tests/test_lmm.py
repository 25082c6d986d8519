"""Qwen2-VL: inputs and states equal transformers'; loading is strict."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_prompts import A, B, random_image
from tiny import relative
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import lmm
from dream_engine import LMM
from lmm import PatchConfig, collate, image_patches, load_lmm
from mini import world
from support.cli import UserError

SIZES = [(28, 28), (64, 64), (70, 42), (1, 1), (37, 200), (640, 480), (333, 777), (1204, 812)]
SIZES += [(56, 57), (14, 150), (999, 31), (1500, 8)]
PICTURES = [world.render(world.Scene("white", (world.Object("red", "star", i),))) for i in range(3)]
PROMPTS = [
    ["Generate Image: a red circle"],
    ["Generate Image: ", PICTURES[0], " and a blue ring above ", PICTURES[1]],
    ["Copy Image: ", PICTURES[2].resize((96, 48))],
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch, most", [(14, 512 * 28 * 28), (14, 1280 * 28 * 28), (8, 64 * 64)])
def test_patches_equal_transformers_bit_for_bit(size, patch, most):
    image = random_image(*size)
    config = PatchConfig(patch, 2, 56 * 56, most)
    size = {"shortest_edge": 56 * 56, "longest_edge": most}
    reference = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, size=size)(
        image, return_tensors="pt"
    )
    patches, grid = image_patches(image, config)
    assert torch.equal(patches, reference["pixel_values"])
    assert [list(grid)] == reference["image_grid_thw"].tolist()


def test_extreme_aspect_ratios_are_refused():
    with pytest.raises(UserError, match="200 times"):
        image_patches(Image.new("RGB", (2010, 10)))


@pytest.mark.parametrize("grids", [[], [(1, 4, 6)], [(1, 4, 6), (1, 4, 4)], [(1, 2, 8), (1, 6, 2)]])
def test_mrope_positions_equal_transformers(grids):
    ids, kinds = [1, 2], [0, 0]
    for _, h, w in grids:
        ids += [3, *[4] * (h * w // 4), 5, 1]
        kinds += [0, *[1] * (h * w // 4), 0, 0]
    with torch.device("meta"):
        model = Qwen2VLModel(Qwen2VLConfig())
    expected, _ = model.get_rope_index(
        torch.tensor([ids]),
        mm_token_type_ids=torch.tensor([kinds]),
        image_grid_thw=torch.tensor(grids) if grids else None,
        attention_mask=torch.ones(1, len(ids)),
    )
    assert torch.equal(lmm.mrope_positions(torch.tensor(kinds).bool(), grids), expected[:, 0])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(LMM)


SMALL = PatchConfig(8, 2, 16 * 16, 64 * 64)


def test_special_tokens_in_text_are_plain_text(tokenizer):
    text = "a <|image_pad|> and <|im_end|> and <|endoftext|>"
    batch = collate([[text]], tokenizer, SMALL)
    assert not set(batch.ids[0].tolist()) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(batch.ids[0]) == text
    assert not batch.image_mask.any()


def test_tokens_are_those_of_the_official_string(tokenizer):
    wide = random_image(32, 16)
    batch = collate([["Edit image ", wide, " following:", "make it red"]], tokenizer, SMALL)
    vision = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
    expected = tokenizer.encode(f"Edit image {vision} following:make it red")
    assert batch.ids[0].tolist() == expected
    assert batch.image_mask.sum() == 2 and batch.grids.tolist() == [[1, 2, 4]]


def test_batches_are_padded_on_the_right(tokenizer):
    prompts = [["a red circle"], ["a ", A, " and ", B], ["ring"]]
    batch = collate(prompts, tokenizer, SMALL)
    for i, prompt in enumerate(prompts):
        alone = collate([prompt], tokenizer, SMALL)
        n = alone.ids.shape[1]
        assert torch.equal(batch.ids[i, :n], alone.ids[0])
        assert torch.equal(batch.positions[:, i, :n], alone.positions[:, 0])
        assert batch.mask[i].sum() == n and batch.mask[i, :n].all()
    assert len(batch.patches) == 8 and len(batch.grids) == 2


def test_plain_positions_count_every_token(tokenizer):
    batch = collate([["a ", A]], tokenizer, SMALL, mrope=False)
    assert torch.equal(batch.positions[1, 0], torch.arange(batch.ids.shape[1]))


@torch.no_grad()
def test_states_equal_those_of_transformers(engine):
    reference = Qwen2VLModel.from_pretrained(LMM, dtype=torch.float32).eval()
    for prompt in PROMPTS:
        batch = engine.lmm.collate([prompt])
        images = {}
        if len(batch.grids):
            images = {"pixel_values": batch.patches, "image_grid_thw": batch.grids}
        expected = reference(
            input_ids=batch.ids,
            attention_mask=batch.mask.long(),
            mm_token_type_ids=batch.image_mask.long(),
            **images,
        ).last_hidden_state
        hidden, _ = engine.lmm(batch)
        assert relative(hidden, expected) < 1e-5


def test_prompts_longer_than_the_context_are_refused(engine):
    assert engine.lmm.collate([["a ring " * 250]]).ids.shape[1] <= 512
    with pytest.raises(UserError, match="a prompt of 1601 tokens: the LMM reads 512 at most"):
        engine.lmm.collate([["a ring"], ["a ring " * 800]])


# ---- loading ------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """copy(change=None): copy the miniature's folder, with its tensors changed -> its path."""

    def copy(change=None):
        folder = tmp_path / "lmm"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(LMM, folder)
        if change:
            weights = load_file(LMM / "model.safetensors")
            change(weights)
            save_file(weights, folder / "model.safetensors")
        return folder

    return copy


def rename(weights):
    for name in list(weights):
        part = "visual" if name.startswith("visual.") else "language_model"
        new = "model." + part + "." + name.removeprefix("visual.").removeprefix("model.")
        weights[new] = weights.pop(name)
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"].clone()


def bare(weights):
    for name in list(weights):
        if name.startswith("model."):
            weights["language_model." + name.removeprefix("model.")] = weights.pop(name)


def only_head(weights):
    """safetensors stores one name of two tied tensors, perhaps this one."""
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")


@torch.no_grad()
@pytest.mark.parametrize("change", [rename, bare, only_head])
def test_weights_of_every_transformers_version_load(change, copy, engine):
    again = load_lmm(copy(change))
    batch = engine.lmm.collate(PROMPTS)
    assert torch.equal(again(batch)[0], engine.lmm(batch)[0])


def test_the_flat_configuration_of_the_published_folder_loads(copy):
    """Qwen2-VL was published with the text configuration at the top level."""
    flat = {
        "model_type": "qwen2_vl",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 700,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
    }
    folder = copy()
    (folder / "config.json").write_text(json.dumps(flat))
    (folder / "preprocessor_config.json").unlink()
    save_file(
        Qwen2VLForConditionalGeneration(Qwen2VLConfig(**flat)).state_dict(),
        folder / "model.safetensors",
    )
    model = load_lmm(folder)
    text = model.config.text_config
    assert text.hidden_size == 64 and text.rms_norm_eps == 1e-6
    assert text.rope_parameters["mrope_section"] == [2, 3, 3]
    assert model.language_model.rotary_emb.inv_freq.shape == (8,)
    assert model.patches == PatchConfig(14, 2)


def test_missing_and_unknown_tensors_have_the_names_of_the_file(copy):
    name = "model.layers.2.mlp.up_proj.weight"
    with pytest.raises(UserError, match=f"missing {name}"):
        load_lmm(copy(lambda w: w.pop(name)))
    with pytest.raises(UserError, match="unknown extra"):
        load_lmm(copy(lambda w: w.update(extra=torch.zeros(1))))
    with pytest.raises(UserError, match="missing visual.blocks.1.attn.qkv.bias"):
        load_lmm(copy(lambda w: w.pop("visual.blocks.1.attn.qkv.bias")))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_an_incomplete_folder_is_named(copy, file):
    folder = copy()
    (folder / file).unlink()
    with pytest.raises((FileNotFoundError, UserError), match=file):
        load_lmm(folder)
    (folder / file).write_text("{}")
    with pytest.raises(UserError, match=str(folder)):
        load_lmm(folder)


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("text_config", "num_hidden_layers", 9),
        ("text_config", "num_attention_heads", 5),
        ("text_config", "num_key_value_heads", 4),
        ("text_config", "hidden_size", "wide"),
        ("text_config", "max_position_embeddings", "many"),
        ("text_config", "rope_parameters", {"rope_type": "default", "mrope_section": [4, 6, 7]}),
        ("vision_config", "depth", 9),
        ("vision_config", "depth", 10**9),
        ("text_config", "num_hidden_layers", 10**9),
        ("text_config", "rms_norm_eps", float("nan")),
        ("vision_config", "num_heads", 7),
        ("vision_config", "patch_size", 7),
        ("vision_config", "hidden_size", 96),
        ("vision_config", "patch_size", 0),
        ("vision_config", "spatial_merge_size", 0),
        ("vision_config", "in_channels", 4),
    ],
)
def test_a_wrong_config_is_a_user_error(part, name, value, copy):
    folder = copy()
    config = json.loads((folder / "config.json").read_text())
    config[part][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=str(folder)):
        load_lmm(folder)


@pytest.mark.parametrize(
    "content",
    ["[]", "null", "", "<html>", '{"min_pixels": 9000, "max_pixels": 8000}', '{"size": 3}']
    + ['{"max_pixels": -1}', '{"max_pixels": "many"}'],
)
def test_wrong_image_sizes_are_refused(content, copy):
    folder = copy()
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(UserError, match=r"preprocessor_config.json"):
        load_lmm(folder)


def test_image_sizes_have_two_spellings_and_defaults(copy):
    folder, expected = copy(), PatchConfig(8, 2, 256, 2304)
    assert load_lmm(folder).patches == expected
    sizes = {"size": {"shortest_edge": 256, "longest_edge": 2304}, "min_pixels": None}
    (folder / "preprocessor_config.json").write_text("\ufeff" + json.dumps(sizes))
    assert load_lmm(folder).patches == expected
    (folder / "preprocessor_config.json").unlink()
    assert load_lmm(folder).patches == PatchConfig(8, 2)


def test_image_sizes_come_from_processor_config_json_first(copy):
    folder = copy()
    image_processor = {"size": {"shortest_edge": 1024, "longest_edge": 4096}}
    file = folder / "processor_config.json"  # as transformers 5 writes it
    file.write_text(json.dumps({"image_processor": image_processor}))
    assert load_lmm(folder).patches == PatchConfig(8, 2, 1024, 4096)
    file.write_text('{"processor_class": "Qwen2VLProcessor"}')  # as transformers 4 does
    assert load_lmm(folder).patches == PatchConfig(8, 2, 256, 2304)
    for content in ("[]", '{"image_processor": 3}', '{"image_processor": {"size": 3}}'):
        file.write_text(content)
        with pytest.raises(UserError, match="processor_config.json"):
            load_lmm(folder)


def test_layers_are_compared_before_the_model_is_built(copy, monkeypatch):
    monkeypatch.setattr(lmm, "build", None)
    for part, name in (("text_config", "num_hidden_layers"), ("vision_config", "depth")):
        folder = copy()
        config = json.loads((folder / "config.json").read_text())
        right = config[part][name]
        config[part][name] = 10_000
        config[part].pop("layer_types", None)
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=f"says {name} 10000, its tensors say {right}"):
            load_lmm(folder)


def test_one_file_instead_of_the_folder_is_named():
    with pytest.raises(UserError, match="is one file; expected the folder of a Qwen2-VL"):
        load_lmm(LMM / "model.safetensors")


@pytest.mark.parametrize(
    "name, value",
    [("model_max_length", "many"), ("unk_token", ""), ("extra_ids", 10**12)],
)
def test_a_setting_of_the_tokenizer_that_would_fail_later_is_named(name, value, copy):
    folder = copy()
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(UserError, match=f"tokenizer_config.json: .*'{name}'"):
        load_lmm(folder)


def test_more_tokens_than_embeddings_are_refused(copy):
    folder = copy()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{i}" for i in range(1000)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"tokenizer has \d+ entries, but the LMM \d+ embeddings"):
        load_lmm(folder)
