"""Loading: every layout, every number from the shapes; what does not fit is named as the file does."""

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
def test_single_files_load_with_and_without_prefix(prefix, write, answers):
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


# ---- what does not fit is named -----------------------------------------------------------------


@pytest.fixture
def good(names):
    return tensors(names["mmdit/sd3.5-large/single"])


def test_missing_unknown_and_misshapen_tensors_are_named(good):
    cases = {
        "missing joint_blocks.1.x_block.mlp.fc1.bias": lambda t: t.pop(
            "joint_blocks.1.x_block.mlp.fc1.bias"
        ),
        "unknown surprise": lambda t: t.update(surprise=torch.zeros(1)),
        r"final_layer.linear.bias has shape \(3,\), expected \(64,\)": lambda t: t.update(
            {"final_layer.linear.bias": torch.zeros(3)}
        ),
    }
    for message, damage in cases.items():
        damaged = dict(good)
        damage(damaged)
        with pytest.raises(UserError, match=message):
            build_mmdit(damaged, "tiny")


def test_half_a_qkv_of_the_diffusers_layout_is_named(names):
    tensors_ = tensors(names["mmdit/sd3.5-large/diffusers"])
    del tensors_["transformer_blocks.1.attn.to_k.weight"]
    with pytest.raises(UserError, match=r"missing transformer_blocks.1.attn.to_k.weight$"):
        build_mmdit(tensors_, "tiny")


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


def test_of_several_files_without_an_index_none_is_guessed(write, tmp_path):
    write("mmdit/sd3.5-large/single", name="folder/model.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "folder" / "model.fp16.safetensors")
    assert "a" not in checkpoints.read_tensors(tmp_path / "folder")
    save_file({"a": torch.ones(1)}, tmp_path / "folder" / "other.safetensors")
    with pytest.raises(UserError, match="2 weight files and no index"):
        checkpoints.read_tensors(tmp_path / "folder")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        "[]",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": null}}',
    ]
    + ['{"weight_map": {"a": "../a.safetensors"}}', "[" * 100_000, "\ufeff", ""],
)
def test_a_damaged_index_is_named(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index.json: (not a weight index|expected a JSON object)"):
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


def test_pickles_that_run_code_are_refused(tmp_path, capsys):
    torch.save({"a": Bomb()}, tmp_path / "bomb.bin")
    with pytest.raises(UserError, match="bomb.bin: expected a checkpoint"):
        checkpoints.read_tensors(tmp_path / "bomb.bin")
    assert "boom" not in capsys.readouterr().out
    for other in ([torch.ones(2)], {"a": 3}):
        torch.save(other, tmp_path / "other.bin")
        with pytest.raises(UserError, match="a pickle may hold tensors only, by name"):
            checkpoints.read_tensors(tmp_path / "other.bin")
    torch.save({"a": torch.ones(2)}, tmp_path / "good.bin")
    assert torch.equal(checkpoints.read_tensors(tmp_path / "good.bin")["a"], torch.ones(2))


def test_nothing_is_copied_when_dtype_and_device_fit(good):
    model = build_mmdit(good, "tiny")
    name = "joint_blocks.0.x_block.mlp.fc1.weight"
    assert model.get_parameter(name).data_ptr() == good[name].data_ptr()


def test_loaded_models_are_frozen_and_of_the_dtype_asked_for(good):
    model = build_mmdit(good, "tiny", dtype=torch.bfloat16)
    assert {x.dtype for x in model.state_dict().values()} == {torch.bfloat16}
    assert not model.training and not any(p.requires_grad for p in model.parameters())


# ---- hostile files ------------------------------------------------------------------------------

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
def test_tensors_that_cannot_be_a_transformer_are_refused_before_it_is_built(change, message, good):
    damaged = good | {k: torch.zeros(shape) for k, shape in change.items() if shape is not None}
    damaged = {k: x for k, x in damaged.items() if change.get(k, ()) is not None}
    with pytest.raises(UserError, match=message):
        build_mmdit(damaged, "tiny")


def test_whole_numbers_are_no_weights(good):
    name = "final_layer.linear.bias"
    with pytest.raises(UserError, match=f"{name} holds torch.int64, expected floating point"):
        build_mmdit(good | {name: torch.zeros(64, dtype=torch.long)}, "tiny")


def test_a_config_that_says_otherwise_is_refused(write, tmp_path):
    write("mmdit/sd3-medium/diffusers", name="sd3/transformer/model.safetensors")
    config = tmp_path / "sd3" / "transformer" / "config.json"
    config.write_text(json.dumps({"num_layers": 3, "attention_head_dim": 32, "qk_norm": None}))
    assert load_mmdit(tmp_path / "sd3").config.head_dim == 32  # no norm, hence only said here
    for wrong in ({"num_layers": 4}, {"attention_head_dim": 48}, {"patch_size": "2"}, 3, None):
        config.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="sd3"):
            load_mmdit(tmp_path / "sd3")


@pytest.mark.parametrize("kind", range(40))
def test_damaged_pickles_are_one_line(kind, tmp_path):
    torch.save({f"name{i}": torch.ones(2) for i in range(5)}, tmp_path / "a.bin")
    data = bytearray((tmp_path / "a.bin").read_bytes())
    rng = random.Random(kind)
    for _ in range(3):  # in the pickle at the beginning, and anywhere
        data[rng.randrange(400)] = rng.randrange(256)
        data[rng.randrange(len(data))] = rng.randrange(256)
    (tmp_path / "a.bin").write_bytes(data[: rng.choice((len(data), rng.randrange(len(data))))])
    with contextlib.suppress(UserError):
        assert all(
            torch.is_tensor(x) for x in checkpoints.read_tensors(tmp_path / "a.bin").values()
        )


@pytest.mark.parametrize(
    "content",
    [{3: torch.ones(2)}, {(1, 2): torch.ones(2)}, {None: torch.ones(2)}]
    + [{"a": torch.ones(2).to_sparse()}, {"a": [torch.ones(2)]}],
)
def test_names_must_be_text_and_tensors_plain(content, tmp_path):
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(UserError, match="a pickle may hold tensors only, by name"):
        checkpoints.read_tensors(tmp_path / "a.bin")
