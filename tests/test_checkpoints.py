"""Loading: every layout and prefix; errors give the names in the file."""

import contextlib
import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import save_file
from test_mmdit import T, inputs
from tiny import relative, tensors

import checkpoints
from checkpoints import build_mmdit, load_mmdit
from support.cli import UserError
from trained import read_checkpoint


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


# ---- files that people have ---------------------------------------------------------------------


def test_an_index_whose_files_are_there_is_used(write, tmp_path):
    """SD3's text_encoder_3 was published so, and people download one of its variants."""
    folder = write("mmdit/sd3.5-large/single", "", 2)
    index = folder / "model.safetensors.index.json"
    expected = checkpoints.read_tensors(folder)
    for name in ("model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"):
        shutil.copy(index, folder / name)
    index.write_text(index.read_text().replace("model-0", "other-0"))
    (folder / "model.bin.index.json").write_text('{"weight_map": {"a": "model.bin"}}')
    assert checkpoints.read_tensors(folder).keys() == expected.keys()
    for file in folder.glob("*.index.fp16.json"):
        file.unlink()
    assert checkpoints.read_tensors(folder).keys() == expected.keys()
    (folder / "model.fp16.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="other-00001-of-00002.* model.safetensors.index"):
        checkpoints.read_tensors(folder)
    save_file({"a": torch.ones(1)}, folder / "model.fp16.safetensors")  # instead of the shards
    assert checkpoints.read_tensors(folder).keys() == {"a"}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("nested", [(), ("state_dict",), ("model",), ("module", "state_dict")])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_programs_wrap_around_weights_is_removed(prefix, nested, zipped, tmp_path):
    x = torch.arange(6.0).reshape(2, 3)
    content = {f"{prefix}blocks.0.{prefix}a": x, f"{prefix}b": x[1]}
    for key in reversed(nested):
        content = {key: content, "epoch": 3, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
    read = checkpoints.read_tensors(tmp_path / "a.bin")
    assert read.keys() == {"blocks.0.a", "b"}
    assert torch.equal(read["blocks.0.a"], x) and torch.equal(read["b"], x[1])


def test_a_model_saved_after_torch_compile_loads(good, tmp_path):
    save_file({f"_orig_mod.{k}": x for k, x in good.items()}, tmp_path / "a.safetensors")
    state = load_mmdit(tmp_path / "a.safetensors").state_dict()
    assert all(torch.equal(state[name], x) for name, x in good.items())
    save_file({k: torch.ones(1) for k in ("a", "module.a")}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="a is stored twice"):
        checkpoints.read_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"GGUF\3\0\0\0" + bytes(99), "is a GGUF file.*expected the model's .safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer; run"),
        (b"\n<!DOCTYPE html><html>", "is a web page; download the weights again"),
        (b"<HTML lang='en'>", "is a web page"),
    ],
)
@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.gguf"])
def test_what_is_no_file_of_weights_is_named(content, message, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=f"{name}: {message}"):
            load_mmdit(path)


QUANTISED = "expected plain weights: fp32, fp16, bf16, or fp8 without scales"
WHOLE = "of another program .*; expected a whole model, or a checkpoint of train.py"


@pytest.mark.parametrize(
    "keys, message",
    [
        (["joint_blocks.0.x_block.attn.qkv.scale_weight", "scaled_fp8"], f"scaled to fp8.*{QUANTISED}"),
        (["joint_blocks.0.x_block.attn.qkv.weight_scale"], "scaled to fp8"),
        (["transformer_blocks.0.attn.to_q.qweight", "a.scales"], f"AWQ or GPTQ.*{QUANTISED}"),
        (["transformer_blocks.0.attn.to_q.weight.absmax"], "by bitsandbytes"),
        (["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"], WHOLE),
        (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], WHOLE),
        (["base_model.model.transformer_blocks.0.attn.to_q.lora_B.default.weight"], WHOLE),
        (["transformer_blocks.0.attn.processor.to_q_lora.down.weight"], WHOLE),
    ],
)  # fmt: skip
def test_weights_in_other_forms_are_named(keys, message, good, tmp_path):
    other = {name: torch.zeros(2, 2) for name in keys}
    with pytest.raises(UserError, match=message):
        build_mmdit(other, "tiny")
    if message != WHOLE:
        with pytest.raises(UserError, match=message):
            build_mmdit(good | other, "tiny")
    save_file(other, tmp_path / "pytorch_lora_weights.safetensors")
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        with pytest.raises(UserError, match=f"{path}: holds .*{message}"):
            read_checkpoint(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_without_scales_loads(dtype, good):
    model = build_mmdit({k: x.to(dtype) for k, x in good.items()}, "tiny")
    name = "joint_blocks.0.x_block.mlp.fc1.weight"
    assert torch.equal(model.state_dict()[name], good[name].to(dtype).float())


@pytest.mark.parametrize("layout, block", [("single", "joint_blocks.{}.x_block.adaLN_modulation.1"),
                                           ("diffusers", "transformer_blocks.{}.norm1.linear")])  # fmt: skip
@pytest.mark.parametrize("i", [0, 1])
def test_a_missing_tensor_of_a_block_is_named_where_blocks_are_counted(layout, block, i, names):
    damaged = tensors(names[f"mmdit/sd3.5-large/{layout}"])
    del damaged[f"{block.format(i)}.weight"]
    with pytest.raises(UserError, match=f"missing {block.format(i)}.weight$"):
        build_mmdit(damaged, "tiny")


def test_a_fifo_is_refused_unopened(tmp_path):
    for name in ("a.safetensors", "a.bin", "config.json", "a.index.json"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        os.mkfifo(folder / name)
        save_file({"a": torch.ones(1)}, folder / "b.safetensors")
        with pytest.raises(UserError, match=f"{name}: is not a regular file"):
            load_mmdit(folder / name if name[0] == "a" and "index" not in name else folder)


@pytest.mark.parametrize("name", ["a\0b.safetensors", "a\0b"])
def test_a_path_with_a_null_byte_is_no_file(name, tmp_path):
    for read in (checkpoints.read_tensors, load_mmdit, checkpoints.load_vae, read_checkpoint):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read(tmp_path / name)
    (tmp_path / "x.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FileNotFoundError, match="no such file"):
        checkpoints.read_tensors(tmp_path)


def test_a_folder_without_a_part_says_which(tmp_path):
    (tmp_path / "text_encoder").mkdir()
    for load, part in ((load_mmdit, "transformer"), (checkpoints.load_vae, "vae")):
        with pytest.raises(FileNotFoundError, match=f"has no {part}/, and no .safetensors"):
            load(tmp_path)
