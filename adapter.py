"""What Dream Engine adds between LMM and MM-DiT: blending, the adapter, and LoRA.

Letters: B batch, L tokens, D width of the MM-DiT, M width of the LMM, n image tokens in all rows.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


def blend(hidden, vit, image_mask, r):
    """Set h = (1 - r) h_LLM + r h_ViT at image positions and h = h_LLM elsewhere (section 3.3).

    hidden (B, L, M): LMM states. vit (n, M): merged ViT features, row by row. image_mask (B, L):
    True at image positions. r in [0, 1]: a number, or (B,). Returns a new (B, L, M).
    """
    r = torch.as_tensor(r, dtype=hidden.dtype, device=hidden.device).expand(len(hidden))
    r = r[:, None].expand(image_mask.shape)[image_mask][:, None]
    blended = hidden.clone()
    blended[image_mask] = (1 - r) * hidden[image_mask] + r * vit.to(hidden.dtype)
    return blended


def masked_mean(x, mask):
    """Mean of x (B, L, M) over the positions where mask (B, L) is True -> (B, M)."""
    weight = mask.to(x.dtype)[..., None]
    return (x * weight).sum(1) / weight.sum(1)


def _mlp(widths):
    layers = [m for a, b in pairwise(widths) for m in (nn.SiLU(), nn.Linear(a, b))]
    return nn.Sequential(*layers[1:])


class Adapter(nn.Module):
    """Two MLPs: LMM states -> the MM-DiT's text tokens; mean LMM state -> its modulation vector."""

    def __init__(self, lmm_width, width, mlp_dim=4096, layers=2):
        super().__init__()
        widths = [lmm_width, *[mlp_dim] * (layers - 1), width]
        self.txt, self.vec = _mlp(widths), _mlp(widths)

    def forward(self, hidden, mask):
        """hidden (B, L, M), mask (B, L) bool -> txt (B, L, D), vec (B, D)."""
        return self.txt(hidden), self.vec(masked_mean(hidden, mask))


class LoRALinear(nn.Module):
    """A frozen Linear plus (alpha / rank) * B A. A fused qkv has one pair (A, B) for each third.

    A starts Gaussian with standard deviation 1 / rank. B starts at zero: the output is unchanged.
    """

    def __init__(self, base, rank, alpha, parts=1):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        like = {"device": base.weight.device, "dtype": torch.float32}
        self.A = nn.Parameter(torch.randn(parts, rank, base.in_features, **like) / rank)
        self.B = nn.Parameter(torch.zeros(parts, base.out_features // parts, rank, **like))

    def forward(self, x):
        lows = F.linear(x, self.A.to(x.dtype).flatten(0, 1)).chunk(len(self.A), dim=-1)
        updates = [F.linear(low, B) for low, B in zip(lows, self.B.to(x.dtype))]
        return self.base(x).add(torch.cat(updates, dim=-1), alpha=self.scale)


# Attention projections of MMDiT and of transformers' Qwen2 -> number of matrices fused in each
PROJECTIONS = {"qkv": 3, "proj": 1, "q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 1}


def lora_sites(model, kind=nn.Linear):
    """Yield (path, (module, number of fused matrices)) of attention projections of class kind."""
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if isinstance(module, kind) and name in PROJECTIONS and "attn" in parent:
            yield path, (module, PROJECTIONS[name])


def add_lora(model, rank=32, alpha=None, paths=None):
    """Freeze a model and add LoRA at paths (default: all lora_sites): {name: new parameter}."""
    model.requires_grad_(False)
    for path, (linear, parts) in lora_sites(model):
        if paths is None or path in paths:
            lora = LoRALinear(linear, rank, rank if alpha is None else alpha, parts)
            model.set_submodule(path, lora)
    return {k: p for k, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def merge_lora(model):
    """Add each LoRA's update to the weight that it wraps, and remove the LoRA; returns model."""
    for path, (lora, _) in lora_sites(model, LoRALinear):
        weight = lora.base.weight
        update = rearrange(lora.B @ lora.A, "parts o i -> (parts o) i")
        weight.copy_(weight.float() + lora.scale * update)
        model.set_submodule(path, lora.base)
    return model
