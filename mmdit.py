"""MM-DiT, the denoiser of SD3 and SD3.5 (arXiv 2403.03206), for all three published models.

A text stream and an image stream have separate weights and share one joint attention per block.
Module names are those of the published single file (below `model.diffusion_model.`), so loading it
is a strict load. Letters: B batch, L text tokens, N image tokens, D width, d width of a head,
C latent channels, h w sides of the latent in patches (N = h w), c the embedded time plus vec.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of an MMDiT. Defaults: SD3.5-large, except depth and width."""

    depth: int
    width: int
    head_dim: int = 64
    channels: int = 16  # of the latent
    patch: int = 2
    positions: int = 192  # side of the position table, in patches
    context_dim: int = 4096  # width of SD3's own text encoders
    pooled_dim: int | None = 2048  # width of SD3's pooled text; None: no embedder for it
    qk_norm: bool = True
    dual: tuple[int, ...] = ()  # indices of blocks with a second, image-only attention
    text_out: bool = False  # the last block updates the text, too (UniAlignment predicts text)

    @property
    def largest(self):
        """Longest side of a picture, in pixels."""
        return 8 * self.patch * self.positions


FAMILIES = {
    "SD3-medium": MMDiTConfig(24, 1536, qk_norm=False),
    "SD3.5-medium": MMDiTConfig(24, 1536, positions=384, dual=tuple(range(13))),
    "SD3.5-large": MMDiTConfig(38, 2432),
}


def timestep_embedding(t, dim=256):
    """t (B,) in [0, 1] -> (B, dim) fp32: cosines and sines of 1000 t at geometric frequencies."""
    exponents = -math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2)
    phase = 1000 * t.float()[:, None] * exponents.exp()
    return torch.cat([phase.cos(), phase.sin()], dim=1)


class Embedder(nn.Module):
    """Two linear layers with a SiLU between."""

    def __init__(self, dim, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x):
        return self.mlp(x)


class TimestepEmbedder(Embedder):
    """t (B,) in [0, 1] -> (B, D)."""

    def forward(self, t):
        return super().forward(timestep_embedding(t).to(self.mlp[0].weight.dtype))


class PatchEmbed(nn.Module):
    """latent (B, C, H, W) -> one token per patch, row by row: (B, N, D)."""

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)

    def forward(self, latent):
        return rearrange(self.proj(latent), "B D h w -> B (h w) D").contiguous()


class Modulation(NamedTuple):
    """How c modulates the input (shift, gain) and output (gate) of a layer; each (B, 1, D)."""

    shift: torch.Tensor
    gain: torch.Tensor  # 1 + scale
    gate: torch.Tensor | None = None  # None: the layer's output is not added to the stream


class AdaLN(nn.Sequential):
    """c (B, D) -> one Modulation per three chunks: shift, scale, gate. Two chunks: no gate."""

    def __init__(self, width, chunks):
        super().__init__(nn.SiLU(), nn.Linear(width, chunks * width))

    def forward(self, c):
        chunks = rearrange(super().forward(c), "B (n D) -> n B 1 D", D=c.shape[-1]).unbind()
        triples = [chunks[i : i + 3] for i in range(0, len(chunks), 3)]
        return [Modulation(shift, 1 + scale, *gate) for shift, scale, *gate in triples]


def modulate(x, modulation):
    """LayerNorm without weights, times gain, plus shift."""
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return torch.addcmul(modulation.shift, x, modulation.gain)


class Attention(nn.Module):
    """One stream's projections for attention, which `attend` computes; q, k and v are fused."""

    def __init__(self, config, last=False):
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.width, 3 * config.width)
        if not last:
            self.proj = nn.Linear(config.width, config.width)
        norm = nn.RMSNorm if config.qk_norm else nn.Identity
        self.ln_q, self.ln_k = norm(config.head_dim, eps=1e-6), norm(config.head_dim, eps=1e-6)

    def project(self, x):
        """x (B, n, D) -> q, k, v, each (B, n, heads, d)."""
        pattern = "B n (qkv heads d) -> qkv B n heads d"
        q, k, v = rearrange(self.qkv(x), pattern, qkv=3, d=self.head_dim)
        return self.ln_q(q), self.ln_k(k), v


def attend(q, k, v, mask=None):
    """q (B, n, heads, d), k and v (B, m, heads, d), mask as SDPA takes it -> (B, n, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(y, "B heads n d -> B n (heads d)")


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Stream(nn.Module):
    """One stream's weights in a block. In SD3's last block, text provides keys and values only."""

    def __init__(self, config, dual=False, last=False):
        super().__init__()
        self.attn = Attention(config, last)
        if dual:
            self.attn2 = Attention(config)
        if not last:
            self.mlp = MLP(config.width)
        self.adaLN_modulation = AdaLN(config.width, 2 if last else 9 if dual else 6)


class JointBlock(nn.Module):
    """Figure 2b of the SD3 paper, with the second image attention of SD3.5-medium."""

    def __init__(self, config, index):
        super().__init__()
        self.dual = index in config.dual
        self.last = index == config.depth - 1 and not config.text_out
        self.context_block = Stream(config, last=self.last)
        self.x_block = Stream(config, dual=self.dual)

    def forward(self, txt, img, c, mask=None):
        """txt (B, L, D), img (B, N, D), c (B, D), mask (B, 1, 1, L + N) -> txt or None, img."""
        text, image = self.context_block, self.x_block
        txt_mod, img_mod = text.adaLN_modulation(c), image.adaLN_modulation(c)  # attn, mlp, attn2

        # Joint attention: every token attends to all; in SD3's last block only image tokens do
        txt_q, txt_k, txt_v = text.attn.project(modulate(txt, txt_mod[0]))
        img_q, img_k, img_v = image.attn.project(modulate(img, img_mod[0]))
        k, v = torch.cat([txt_k, img_k], dim=1), torch.cat([txt_v, img_v], dim=1)
        if self.last:
            img_y = attend(img_q, k, v, mask)
        else:
            y = attend(torch.cat([txt_q, img_q], dim=1), k, v, mask)
            txt_y, img_y = y.split([txt.shape[1], img.shape[1]], dim=1)

        # addcmul(x, gate, y) = x + gate * y: each layer's gated output is added to its stream
        out = torch.addcmul(img, img_mod[0].gate, image.attn.proj(img_y.contiguous()))
        if self.dual:  # SD3.5-medium; its input is img, as for the joint attention
            img_y = attend(*image.attn2.project(modulate(img, img_mod[2])))
            out = torch.addcmul(out, img_mod[2].gate, image.attn2.proj(img_y))
        img = torch.addcmul(out, img_mod[1].gate, image.mlp(modulate(out, img_mod[1])))
        if self.last:
            return None, img

        txt = torch.addcmul(txt, txt_mod[0].gate, text.attn.proj(txt_y.contiguous()))
        return torch.addcmul(txt, txt_mod[1].gate, text.mlp(modulate(txt, txt_mod[1]))), img


class FinalLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.width, config.patch**2 * config.channels)
        self.adaLN_modulation = AdaLN(config.width, 2)

    def features(self, img, c):
        return modulate(img, self.adaLN_modulation(c)[0])

    def forward(self, img, c):
        return self.linear(self.features(img, c))


class MMDiT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # gradient checkpointing: recompute each block in backward
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(256, config.width)
        if config.pooled_dim:
            self.y_embedder = Embedder(config.pooled_dim, config.width)
        self.context_embedder = nn.Linear(config.context_dim, config.width)
        self.register_buffer("pos_embed", torch.zeros(1, config.positions**2, config.width))
        self.joint_blocks = nn.ModuleList(JointBlock(config, i) for i in range(config.depth))
        self.final_layer = FinalLayer(config)

    def embed_text(self, context, pooled):
        """SD3's text: context (B, L, 4096), pooled (B, 2048) -> txt (B, L, D), vec (B, D)."""
        return self.context_embedder(context), self.y_embedder(pooled)

    def forward(self, latent, t, txt, vec, txt_mask=None):
        """Predict the velocity noise - x0, (B, C, H, W).

        latent (B, C, H, W): sides are multiples of config.patch. t: (B,) or a number in [0, 1]; 1
        is pure noise. txt (B, L, D), vec (B, D): from `embed_text` or an adapter. txt_mask (B, L)
        bool: False at padding, which then has no effect. Raises ValueError if sides do not fit.
        """
        c, img = self.embed_time(t, len(latent)) + vec, self.embed_image(latent)
        mask = None
        if txt_mask is not None:  # a mask to add to the attention scores: -inf at padding
            keys = F.pad(txt_mask, (0, img.shape[1]), value=True)[:, None, None]
            mask = torch.zeros_like(keys, dtype=txt.dtype).masked_fill(~keys, -math.inf)
        _, img = self.run_blocks(txt, img, c, mask)
        return self.unpatch(self.final_layer(img, c), latent)

    def embed_time(self, t, rows):
        """t (rows,) or a number, in [0, 1] -> (rows, D)."""
        device = self.pos_embed.device
        if not isinstance(t, torch.Tensor):
            t = torch.full((), t, device=device)  # a copy from the CPU would make the CPU wait
        return self.t_embedder(t.to(device, torch.float32).expand(rows))

    def embed_image(self, latent):
        """latent (B, C, H, W) -> tokens (B, N, D). Raises ValueError if the sides do not fit."""
        p, side = self.config.patch, self.config.positions
        height, width = latent.shape[2:]
        if height % p or width % p:
            raise ValueError(f"latent sides must be multiples of {p}, got {(height, width)}")
        h, w = height // p, width // p
        if h > side or w > side:
            raise ValueError(f"latent of {h}x{w} patches exceeds the position table, {side}x{side}")
        return self.x_embedder(latent) + self.positions(h, w)

    def positions(self, h, w):
        """The central h x w entries of the position table: (1, h w, D)."""
        side = self.config.positions
        top, left = (side - h) // 2, (side - w) // 2
        table = rearrange(self.pos_embed, "1 (h w) D -> h w D", h=side)
        return rearrange(table[top : top + h, left : left + w], "h w D -> 1 (h w) D")

    def run_blocks(self, txt, img, c, mask=None, start=0, stop=None):
        """Blocks start to stop: txt (B, L, D), img (B, n, D), c (B, D) -> txt, img.

        The last block returns None for txt unless config.text_out.
        """
        for block in self.joint_blocks[start:stop]:
            if self.checkpointing and torch.is_grad_enabled():
                txt, img = checkpoint(block, txt, img, c, mask, use_reentrant=False)
            else:
                txt, img = block(txt, img, c, mask)
        return txt, img

    def unpatch(self, patches, latent):
        """(B, N, p p C) -> (B, C, H, W); H and W are those of latent."""
        h, p = latent.shape[2] // self.config.patch, self.config.patch
        return rearrange(patches, "B (h w) (p q C) -> B C (h p) (w q)", h=h, p=p, q=p)
