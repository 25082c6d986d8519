"""MM-DiT: equal to diffusers for three model families in two file layouts."""

import math

import pytest
import torch
from cases import LATENTS
from tiny import relative, tensor, tensors

import mmdit
from checkpoints import build_mmdit
from mini.pretrain import position_table

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
    model = build_mmdit(tensors(names[f"mmdit/{family}/{layout}"]), "tiny")
    latent, context, pooled = inputs(case)
    velocity = model(latent, T, *model.embed_text(context, pooled))
    assert relative(velocity, answers[f"mmdit/{family}/{layout}/{case}"]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_is_inferred_from_shapes(family, names):
    config = build_mmdit(tensors(names[f"mmdit/{family}/single"]), "tiny").config
    dual = (0, 1) if family == "sd3.5-medium" else ()
    qk_norm = family != "sd3-medium"
    assert config == mmdit.MMDiTConfig(3, 128, 64, 16, 2, 24, 48, 40, qk_norm, dual)


@torch.no_grad()
def test_padding_has_no_effect(names):
    model = build_mmdit(tensors(names["mmdit/sd3.5-medium/single"]), "tiny")
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
def test_full_sizes_have_the_published_parameter_counts(family, keys, parameters, positions):
    with torch.device("meta"):
        model = mmdit.MMDiT(mmdit.FAMILIES[family])
    assert len(model.state_dict()) == keys
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.pos_embed.numel() == positions


def test_the_position_table_encodes_columns_in_its_first_half():
    table = position_table(5, 16).reshape(5, 5, 16)
    assert torch.equal(table[0, :, :8], table[4, :, :8])
    assert torch.equal(table[:, 0, 8:], table[:, 4, 8:])
    expected = torch.tensor([math.sin(3), math.sin(0.3), math.cos(3), math.cos(0.3)])
    torch.testing.assert_close(table[2, 3, [0, 1, 4, 5]], expected)


def test_latents_that_do_not_fit_are_refused(names):
    model = build_mmdit(tensors(names["mmdit/sd3.5-large/single"]), "tiny")
    txt, vec = model.embed_text(torch.zeros(1, 1, 48), torch.zeros(1, 40))
    for h, w, message in (
        (50, 8, "25x4 patches exceeds the position table, 24x24"),
        (8, 50, "4x25 patches exceeds the position table, 24x24"),
        (9, 8, "multiples of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            model(torch.zeros(1, 16, h, w), 0.5, txt, vec)


def test_the_forward_calls_every_module(names):
    """So hooks fire and LoRA takes effect."""
    model, called = build_mmdit(tensors(names["mmdit/sd3.5-medium/single"]), "tiny"), set()
    layers = {name: m for name, m in model.named_modules() if not list(m.children())}
    for name, module in layers.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    latent, context, pooled = inputs("square")
    model(latent, T, *model.embed_text(context, pooled))
    assert called == layers.keys()
