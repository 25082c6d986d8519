"""MM-DiT: equal to diffusers for three families and two layouts; loading is strict and loud."""

import math

import pytest
import torch
from cases import LATENTS
from safetensors.torch import save_file
from tiny import relative, tensor, tensors

import mmdit
import weights

FAMILIES = ("sd3-medium", "sd3.5-medium", "sd3.5-large")
T = torch.tensor([0.25, 0.9])


def inputs(case):
    h, w, length = LATENTS[case]
    return (
        tensor("latent", (2, 16, h, w)),
        tensor("context", (2, length, 48)),
        tensor("pooled", (2, 40)),
    )


@torch.no_grad()
@pytest.mark.parametrize("case", LATENTS)
@pytest.mark.parametrize("layout", ["single", "diffusers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_velocity_equals_diffusers(family, layout, case, names, answers):
    model = mmdit.build(tensors(names[f"mmdit/{family}/{layout}"]), "tiny")
    latent, context, pooled = inputs(case)
    velocity = model(latent, T, *model.embed_text(context, pooled))
    assert relative(velocity, answers[f"mmdit/{family}/{layout}/{case}"]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "transformer.", ""])
def test_single_files_load_with_and_without_prefix(prefix, write, answers):
    model = mmdit.load_mmdit(write("mmdit/sd3.5-large/single", prefix))
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
    model = mmdit.load_mmdit(tmp_path / folder.split("/")[0])
    latent, context, pooled = inputs("wide")
    velocity = model(latent, T, *model.embed_text(context, pooled))
    assert relative(velocity, answers["mmdit/sd3.5-medium/diffusers/wide"]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_is_read_off_the_tensors(family, names):
    config = mmdit.build(tensors(names[f"mmdit/{family}/single"]), "tiny").config
    dual = (0, 1) if family == "sd3.5-medium" else ()
    qk_norm = family != "sd3-medium"
    assert config == mmdit.MMDiTConfig(3, 128, 64, 16, 2, 24, 48, 40, qk_norm, dual)


@torch.no_grad()
def test_padding_changes_nothing(names):
    model = mmdit.build(tensors(names["mmdit/sd3.5-medium/single"]), "tiny")
    latent, context, pooled = inputs("wide")
    txt, vec = model.embed_text(context, pooled)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[1, 4:] = False
    together = model(latent, T, txt, vec, mask)
    for i, length in enumerate((13, 4)):
        alone = model(latent[i : i + 1], T[i : i + 1], txt[i : i + 1, :length], vec[i : i + 1])
        assert relative(together[i : i + 1], alone) < 1e-5


@pytest.mark.parametrize(
    "family, keys, parameters, positions",
    [
        ("SD3-medium", 491, 2_028_328_000, 56_623_104),
        ("SD3.5-medium", 665, 2_243_171_520, 226_492_416),
        ("SD3.5-large", 923, 8_056_627_520, 89_653_248),
    ],
)
def test_full_sizes_have_the_published_numbers(family, keys, parameters, positions):
    with torch.device("meta"):
        model = mmdit.MMDiT(mmdit.FAMILIES[family])
    assert len(model.state_dict()) == keys
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.pos_embed.numel() == positions


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_prepared_at_once_equals_what_every_step_computes(family, names):
    model = mmdit.build(tensors(names[f"mmdit/{family}/single"]), "tiny")
    config, times = model.config, [1.0, 0.7, 0.05]
    generator = torch.Generator().manual_seed(0)
    shapes = (2, config.channels, 8, 8), (2, 7, config.width), (2, config.width)
    latent, txt, vec = (torch.randn(shape, generator=generator) for shape in shapes)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    for t, prepared in zip(times, model.prepare(times, vec, mask, 4, 4), strict=True):
        plain = model(latent, t, txt, vec, mask)
        assert relative(model(latent, None, txt, None, prepared=prepared), plain) < 1e-5
        assert relative(model(latent, 0.3, txt, vec, mask), plain) > 1e-3


def test_the_position_table_counts_columns_in_its_first_half():
    table = mmdit.position_table(5, 16).reshape(5, 5, 16)
    assert torch.equal(table[0, :, :8], table[4, :, :8])
    assert torch.equal(table[:, 0, 8:], table[:, 4, 8:])
    expected = torch.tensor([math.sin(3), math.sin(0.3), math.cos(3), math.cos(0.3)])
    torch.testing.assert_close(table[2, 3, [0, 1, 4, 5]], expected)


def test_latents_larger_than_the_position_table_are_refused(names):
    model = mmdit.build(tensors(names["mmdit/sd3.5-large/single"]), "tiny")
    txt, vec = model.embed_text(torch.zeros(1, 1, 48), torch.zeros(1, 40))
    for h, w in ((50, 8), (8, 50)):
        with pytest.raises(ValueError, match="larger than the table"):
            model(torch.zeros(1, 16, h, w), 0.5, txt, vec)
    with pytest.raises(ValueError, match="multiples of 2"):
        model(torch.zeros(1, 16, 9, 8), 0.5, txt, vec)


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
        with pytest.raises(ValueError, match=message):
            mmdit.build(damaged, "tiny")


def test_half_a_qkv_of_the_diffusers_layout_is_named(names):
    tensors_ = tensors(names["mmdit/sd3.5-large/diffusers"])
    del tensors_["transformer_blocks.1.attn.to_k.weight"]
    with pytest.raises(ValueError, match="missing joint_blocks.1.x_block.attn.qkv.weight"):
        mmdit.build(tensors_, "tiny")


def test_other_models_and_damaged_files_are_refused(tmp_path, write):
    save_file({"some.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    whole = write("mmdit/sd3.5-large/single").read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name in ("other.safetensors", "truncated.safetensors", "empty.safetensors"):
        with pytest.raises(ValueError, match=name):
            mmdit.load_mmdit(tmp_path / name)
    for name in ("nowhere.safetensors", "folder"):
        with pytest.raises(FileNotFoundError, match=name):
            mmdit.load_mmdit(tmp_path / name)


def test_a_missing_shard_is_named(write):
    folder = write("mmdit/sd3.5-large/single", "", 2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00002"):
        mmdit.load_mmdit(folder)


def test_of_several_files_without_an_index_none_is_guessed(write, tmp_path):
    write("mmdit/sd3.5-large/single", name="folder/model.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "folder" / "model.fp16.safetensors")
    assert "a" not in weights.read(tmp_path / "folder")
    save_file({"a": torch.ones(1)}, tmp_path / "folder" / "other.safetensors")
    with pytest.raises(ValueError, match="2 weight files and no index"):
        weights.read(tmp_path / "folder")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index.json: not a weight index"):
        weights.read(tmp_path)


def test_a_tensor_in_two_shards_is_named(write):
    folder = write("mmdit/sd3.5-large/single", "", 2)
    name = "final_layer.linear.bias"
    for file in folder.glob("*.safetensors"):
        save_file(weights.read(file) | {name: torch.zeros(64)}, file)
    with pytest.raises(ValueError, match=f"{name} is stored twice"):
        mmdit.load_mmdit(folder)


class Bomb:
    def __reduce__(self):
        return print, ("boom",)


def test_pickles_that_run_code_are_refused(tmp_path, capsys):
    torch.save({"a": Bomb()}, tmp_path / "bomb.bin")
    with pytest.raises(ValueError, match="refused"):
        weights.read(tmp_path / "bomb.bin")
    assert "boom" not in capsys.readouterr().out
    for other in ([torch.ones(2)], {"a": 3}):
        torch.save(other, tmp_path / "other.bin")
        with pytest.raises(ValueError, match="expected a dictionary of tensors"):
            weights.read(tmp_path / "other.bin")
    torch.save({"a": torch.ones(2)}, tmp_path / "good.bin")
    assert torch.equal(weights.read(tmp_path / "good.bin")["a"], torch.ones(2))


def test_nothing_is_copied_when_dtype_and_device_fit(good):
    model = mmdit.build(good, "tiny")
    name = "joint_blocks.0.x_block.mlp.fc1.weight"
    assert model.get_parameter(name).data_ptr() == good[name].data_ptr()


def test_loaded_models_are_frozen_and_of_the_dtype_asked_for(good):
    model = mmdit.build(good, "tiny", dtype=torch.bfloat16)
    assert {x.dtype for x in model.state_dict().values()} == {torch.bfloat16}
    assert not model.training and not any(p.requires_grad for p in model.parameters())
