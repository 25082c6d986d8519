"""Blending, the adapter and LoRA against their formulas."""

import pytest
import torch
from torch import nn

from adapter import Adapter, LoRALinear, add_lora, blend, masked_mean, merge_lora
from mmdit import MMDiT, MMDiTConfig


@pytest.mark.parametrize("r", [0.0, 0.3, 1.0, [0.2, 0.9]])
def test_blending_changes_image_positions_only(r):
    torch.manual_seed(0)
    hidden, vit = torch.randn(2, 5, 4), torch.randn(3, 4)
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]).bool()
    out = blend(hidden, vit, mask, torch.tensor(r))
    each = r if isinstance(r, list) else [r, r]
    expected = hidden.clone()
    for k, (i, j) in enumerate([(0, 1), (0, 2), (1, 3)]):
        expected[i, j] = (1 - each[i]) * hidden[i, j] + each[i] * vit[k]
    torch.testing.assert_close(out, expected)


def test_mean_pooling_ignores_padding():
    x = torch.tensor([[[1.0], [3.0], [99.0]]])
    assert masked_mean(x, torch.tensor([[True, True, False]])).item() == 2


def test_adapter_is_two_silu_mlps_with_the_official_shapes():
    adapter = Adapter(6, 8, 10)
    shapes = {k: tuple(v.shape) for k, v in adapter.state_dict().items()}
    assert shapes["txt.0.weight"] == shapes["vec.0.weight"] == (10, 6)
    assert shapes["txt.2.weight"] == shapes["vec.2.weight"] == (8, 10)
    hidden, mask = torch.randn(2, 3, 6), torch.ones(2, 3).bool()
    txt, vec = adapter(hidden, mask)
    silu = nn.functional.silu(hidden @ adapter.txt[0].weight.T + adapter.txt[0].bias)
    torch.testing.assert_close(txt, silu @ adapter.txt[2].weight.T + adapter.txt[2].bias)
    torch.testing.assert_close(vec, adapter.vec(hidden.mean(1)))


def test_lora_on_fused_qkv_equals_lora_on_q_k_and_v():
    torch.manual_seed(0)
    base = nn.Linear(8, 24)
    lora = LoRALinear(base, rank=2, alpha=6, parts=3)
    nn.init.normal_(lora.B)
    x = torch.randn(5, 8)
    for i, y in enumerate(lora(x).chunk(3, dim=1)):
        weight = base.weight[8 * i : 8 * i + 8] + 3 * lora.B[i] @ lora.A[i]
        torch.testing.assert_close(y, x @ weight.T + base.bias[8 * i : 8 * i + 8])


def test_lora_starts_without_effect_is_all_that_trains_and_merges():
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig(2, 64, 32, 4, 2, 8, 16, 16, dual=(0,)))
    args = (
        torch.randn(2, 4, 8, 8),
        torch.tensor([0.3, 0.8]),
        torch.randn(2, 5, 64),
        torch.randn(2, 64),
    )
    before, names = model(*args), set(model.state_dict())
    trained = add_lora(model, rank=4)
    torch.testing.assert_close(model(*args), before)
    # qkv and proj of x_block, context_block and attn2; the last context_block has no proj
    assert len(trained) == 2 * (2 * 4 + 2 - 1)
    assert all(name.endswith((".A", ".B")) and p.requires_grad for name, p in trained.items())
    assert sum(p.requires_grad for p in model.parameters()) == len(trained)
    for name, parameter in trained.items():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.1)
    adapted = model(*args)
    assert (adapted - before).abs().max() > 1e-3
    merge_lora(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(*args), adapted, rtol=1e-4, atol=1e-5)
