"""Loading: every layout and prefix; errors give the names in the file."""

import contextlib
import json
import random

import pytest
import torch
from safetensors.torch import save_file
from test_mmdit import T, inputs
from tiny import relative, tensors

import checkpoints
from checkpoints import build_mmdit, load_mmdit
from support.cli import UserError


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "transformer.", ""])
def test_single_files_load_with_any_prefix(prefix, write, answers):
    model = load_mmdit(write("mmdit/sd3.5-large/single", prefix))
    latent, context, pooled = inputs("tall")
    velocity = model(latent, T, *model.embed_text(context, pooled))
    assert relative(velocity, answers["mmdit/sd3.5-large/single/tall"]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize("folder", ["sd3/transformer", "transformer"])
def test_diffusers_folders_load_sharded_or_not(folder, shards, write, answers, tmp_path):
    write(
        "mmdit/sd3.5-medium/diffusers", "", shards, f"{folder}/diffusion_pytorch_model.safetensors"
    )
    model = load_mmdit(tmp_path / folder.split("/")[0])
    latent, context, pooled = inputs("wide")
    velocity = model(latent, T, *model.embed_text(context, pooled))
    assert relative(velocity, answers["mmdit/sd3.5-medium/diffusers/wide"]) < 1e-5


# ---- tensors and files that do not fit ----------------------------------------------------------


@pytest.fixture
def good(names):
    return tensors(names["mmdit/sd3.5-large/single"])


def test_missing_unknown_and_misshapen_tensors_are_named(good):
    missing, misshapen = "joint_blocks.1.x_block.mlp.fc1.bias", "final_layer.linear.bias"
    for message, damaged in {
        f"missing {missing}": {k: x for k, x in good.items() if k != missing},
        "unknown surprise": good | {"surprise": torch.zeros(1)},
        rf"{misshapen} has shape \(3,\), expected \(64,\)": good | {misshapen: torch.zeros(3)},
    }.items():
        with pytest.raises(UserError, match=message):
            build_mmdit(damaged, "tiny")


def test_a_missing_part_of_a_fused_qkv_is_named(names):
    damaged = tensors(names["mmdit/sd3.5-large/diffusers"])
    del damaged["transformer_blocks.1.attn.to_k.weight"]
    with pytest.raises(UserError, match=r"missing transformer_blocks.1.attn.to_k.weight$"):
        build_mmdit(damaged, "tiny")


def test_other_models_and_damaged_files_are_refused(tmp_path, write):
    save_file({"some.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    whole = write("mmdit/sd3.5-large/single").read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name in ("other.safetensors", "truncated.safetensors", "empty.safetensors"):
        with pytest.raises(UserError, match=name):
            load_mmdit(tmp_path / name)
    for name in ("nowhere.safetensors", "folder"):
        with pytest.raises(FileNotFoundError, match=name):
            load_mmdit(tmp_path / name)


def test_a_missing_shard_is_named(write):
    folder = write("mmdit/sd3.5-large/single", "", 2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00002"):
        load_mmdit(folder)


def test_several_files_without_an_index_are_refused(write, tmp_path):
    write("mmdit/sd3.5-large/single", name="folder/model.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "folder" / "model.fp16.safetensors")
    assert "a" not in checkpoints.read_tensors(tmp_path / "folder")
    save_file({"a": torch.ones(1)}, tmp_path / "folder" / "other.safetensors")
    with pytest.raises(UserError, match="2 weight files and no index"):
        checkpoints.read_tensors(tmp_path / "folder")


@pytest.mark.parametrize(
    "content",
    ["{", "{}", "[]", "[" * 100_000, "\ufeff", "", '{"weight_map": 3}', '{"weight_map": {"a": 3}}']
    + ['{"weight_map": {"a": null}}', '{"weight_map": {"a": "../a.safetensors"}}'],
)
def test_a_damaged_index_is_named(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="index.json: expected a JSON object"):
        checkpoints.read_tensors(tmp_path)


def test_a_tensor_in_two_shards_is_named(write):
    folder = write("mmdit/sd3.5-large/single", "", 2)
    name = "final_layer.linear.bias"
    for file in folder.glob("*.safetensors"):
        save_file(checkpoints.read_tensors(file) | {name: torch.zeros(64)}, file)
    with pytest.raises(UserError, match=f"{name} is stored twice"):
        load_mmdit(folder)


class Bomb:
    def __reduce__(self):
        return print, ("boom",)


def test_pickles_may_hold_tensors_only(tmp_path, capsys):
    torch.save({"a": Bomb()}, tmp_path / "bomb.bin")
    with pytest.raises(UserError, match="bomb.bin: expected a checkpoint"):
        checkpoints.read_tensors(tmp_path / "bomb.bin")
    assert "boom" not in capsys.readouterr().out
    for content in (
        [torch.ones(2)],
        {"a": 3},
        {"a": [torch.ones(2)]},
        {"a": torch.ones(2).to_sparse()},
        {3: torch.ones(2)},
        {(1, 2): torch.ones(2)},
        {None: torch.ones(2)},
    ):
        torch.save(content, tmp_path / "other.bin")
        with pytest.raises(UserError, match="a pickle may hold tensors only, by name"):
            checkpoints.read_tensors(tmp_path / "other.bin")
    torch.save({"a": torch.ones(2)}, tmp_path / "good.bin")
    assert torch.equal(checkpoints.read_tensors(tmp_path / "good.bin")["a"], torch.ones(2))


def test_tensors_with_the_right_dtype_and_device_are_not_copied(good):
    model = build_mmdit(good, "tiny")
    name = "joint_blocks.0.x_block.mlp.fc1.weight"
    assert model.get_parameter(name).data_ptr() == good[name].data_ptr()


def test_loaded_models_are_frozen_and_have_the_requested_dtype(good):
    model = build_mmdit(good, "tiny", dtype=torch.bfloat16)
    assert {x.dtype for x in model.state_dict().values()} == {torch.bfloat16}
    assert not model.training and not any(p.requires_grad for p in model.parameters())


BLOCK = "joint_blocks.1.x_block."


@pytest.mark.parametrize(
    "change, message",
    [
        ({f"{BLOCK}attn.qkv.weight": (256, 128)}, "attn.qkv.weight has shape"),
        ({f"{BLOCK}attn.qkv.bias": ()}, r"attn.qkv.bias has shape \(\)"),
        ({"x_embedder.proj.weight": (128, 16, 2, 0)}, "x_embedder.proj.weight has shape"),
        ({"x_embedder.proj.weight": (128,)}, "x_embedder.proj.weight has shape"),
        ({"x_embedder.proj.weight": None}, "missing x_embedder.proj.weight"),
        ({"pos_embed": ()}, "pos_embed has shape"),
        ({"pos_embed": (1, 577, 128)}, "pos_embed has shape"),
        ({"joint_blocks.9999999.x_block.attn.qkv.bias": (3,)}, "unknown joint_blocks.9999999"),
        *(
            ({"joint_blocks.0.x_block.attn.ln_q.weight": (heads,)}, f"heads of {heads}|shape")
            for heads in (3, 48, 256, 0)
        ),
    ],
)
def test_impossible_shapes_are_refused_before_a_model_is_built(change, message, good):
    damaged = good | {k: torch.zeros(shape) for k, shape in change.items() if shape is not None}
    damaged = {k: x for k, x in damaged.items() if change.get(k, ()) is not None}
    with pytest.raises(UserError, match=message):
        build_mmdit(damaged, "tiny")


def test_weights_must_be_floating_point(good):
    name = "final_layer.linear.bias"
    with pytest.raises(UserError, match=f"{name} holds torch.int64, expected floating point"):
        build_mmdit(good | {name: torch.zeros(64, dtype=torch.long)}, "tiny")


def test_a_config_that_disagrees_with_the_tensors_is_refused(write, tmp_path):
    write("mmdit/sd3-medium/diffusers", name="sd3/transformer/model.safetensors")
    config = tmp_path / "sd3" / "transformer" / "config.json"
    config.write_text(json.dumps({"num_layers": 3, "attention_head_dim": 32, "qk_norm": None}))
    assert load_mmdit(tmp_path / "sd3").config.head_dim == 32  # only config.json states it
    for wrong in ({"num_layers": 4}, {"attention_head_dim": 48}, {"patch_size": "2"}, 3, None):
        config.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="sd3"):
            load_mmdit(tmp_path / "sd3")


@pytest.mark.parametrize("kind", range(40))
def test_damaged_pickles_end_in_a_user_error(kind, tmp_path):
    torch.save({f"name{i}": torch.ones(2) for i in range(5)}, tmp_path / "a.bin")
    data = bytearray((tmp_path / "a.bin").read_bytes())
    rng = random.Random(kind)
    for _ in range(3):  # damage the pickle at the beginning, and any byte
        data[rng.randrange(400)] = rng.randrange(256)
        data[rng.randrange(len(data))] = rng.randrange(256)
    (tmp_path / "a.bin").write_bytes(data[: rng.choice((len(data), rng.randrange(len(data))))])
    with contextlib.suppress(UserError):
        assert all(map(torch.is_tensor, checkpoints.read_tensors(tmp_path / "a.bin").values()))
