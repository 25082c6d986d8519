"""MM-DiT, the denoiser of SD3 and SD3.5 (arXiv 2403.03206), for all three published models.

Two streams, text and image, each with its own weights, meet in one joint attention in every block.
Module names are those of the published single file (below `model.diffusion_model.`), so loading it
is a strict load. Letters: B batch, L text tokens, N image tokens, D width, C latent channels,
h w the latent's sides in patches (N = h w).
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from torch.utils.checkpoint import checkpoint

import weights


@dataclass(frozen=True)
class MMDiTConfig:
    depth: int
    width: int
    head_dim: int = 64
    channels: int = 16  # of the latent
    patch: int = 2
    positions: int = 192  # side of the position table, in patches
    context_dim: int = 4096  # of SD3's own text encoders
    pooled_dim: int = 2048
    qk_norm: bool = True
    dual: tuple[int, ...] = ()  # blocks with a second, image-only attention


FAMILIES = {
    "SD3-medium": MMDiTConfig(24, 1536, qk_norm=False),
    "SD3.5-medium": MMDiTConfig(24, 1536, positions=384, dual=tuple(range(13))),
    "SD3.5-large": MMDiTConfig(38, 2432),
}


def timestep_embedding(t, dim=256):
    """t (B,) in [0, 1] -> (B, dim) fp32: cosines, then sines, of 1000 t at geometric frequencies."""
    frequencies = torch.exp(
        -math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2)
    )
    phase = 1000 * t.float()[:, None] * frequencies
    return torch.cat([phase.cos(), phase.sin()], dim=1)


def position_table(side, width):
    """Fixed 2-D sine-cosine table (1, side * side, width): columns first, then rows.

    Only training from nothing needs it; published checkpoints carry their own.
    """
    omega = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return rearrange(torch.cat([columns, rows], dim=2), "h w D -> 1 (h w) D").float()


class Embedder(nn.Module):
    """Two-layer MLP with a SiLU between."""

    def __init__(self, dim, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x):
        return self.mlp(x)


class PatchEmbed(nn.Module):
    """Stored as a convolution; its strides do not overlap, so it is one linear map of each patch."""

    def __init__(self, config):
        super().__init__()
        p = config.patch
        self.proj = nn.Conv2d(config.channels, config.width, p, stride=p)

    def forward(self, latent):
        p, _ = self.proj.stride
        patches = rearrange(latent, "B C (h p) (w q) -> B (h w) (C p q)", p=p, q=p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Fused projections of one stream's attention; the attending itself may be joint."""

    def __init__(self, config, last=False):
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.width, 3 * config.width)
        if not last:
            self.proj = nn.Linear(config.width, config.width)
        if config.qk_norm:
            self.ln_q = nn.RMSNorm(config.head_dim, eps=1e-6)
            self.ln_k = nn.RMSNorm(config.head_dim, eps=1e-6)

    def project(self, x):
        """x (B, n, D) -> q, k, v, (3, B, heads, n, d). The last text stream's q, of no use, is zero."""
        if hasattr(self, "proj") or not isinstance(self.qkv, nn.Linear):  # not, but LoRA around it
            qkv = self.qkv(x)
        else:
            D = x.shape[-1]
            qkv = F.pad(F.linear(x, self.qkv.weight[D:], self.qkv.bias[D:]), (D, 0))
        return rearrange(qkv, "B n (qkv heads d) -> qkv B heads n d", qkv=3, d=self.head_dim)

    def gain(self, n):
        """The weights of q's and k's RMS norms, once for each of n tokens: (2, 1, 1, n, d)."""
        weights = torch.stack([self.ln_q.weight, self.ln_k.weight])
        return repeat(weights, "qk d -> qk 1 1 n d", n=n)


def attend(qkv, gain=None, mask=None, silent=0):
    """qkv (3, B, heads, n, d) -> (B, n - silent, D). silent: tokens at the start that ask nothing.

    gain: the weights of q's and k's RMS norms at each token, (2, 1, 1, n, d), as they differ between
    the streams; None: there are no norms.
    """
    qk, v = qkv.split([2, 1])
    if gain is not None:
        qk = F.rms_norm(qk, qk.shape[-1:], eps=1e-6) * gain
    q, k = qk
    y = F.scaled_dot_product_attention(q[:, :, silent:], k, v.squeeze(0), attn_mask=mask)
    return rearrange(y, "B heads n d -> B n (heads d)")


def joint_mask(txt_mask, image, dtype):
    """What to add to the scores of attention, (B, 1, 1, L + image): -inf at padding; None without."""
    if txt_mask.all():
        return None
    mask = F.pad(txt_mask, (0, image), value=True)[:, None, None]
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Stream(nn.Module):
    """One stream's weights in a block. The last text stream only lends keys and values."""

    def __init__(self, config, dual=False, last=False):
        super().__init__()
        self.attn = Attention(config, last)
        if dual:
            self.attn2 = Attention(config)
        if not last:
            self.mlp = MLP(config.width)
        chunks = 2 if last else 9 if dual else 6
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(config.width, chunks * config.width)
        )


def modulation(layer, c):
    """What an adaLN layer makes of c (B, D): shift, gain[, gate, shift, gain, gate ...].

    Each is (B, 1, D). The layer knows gains as their difference from 1.
    """
    chunks = rearrange(layer(c), "B (chunks D) -> chunks B 1 D", D=c.shape[-1]).unbind()
    return [1 + x if i % 3 == 1 else x for i, x in enumerate(chunks)]


def modulate(x, shift, gain):
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), gain)


class JointBlock(nn.Module):
    """Figure 2b of the SD3 paper, with the second image attention of SD3.5-medium."""

    def __init__(self, config, index):
        super().__init__()
        self.config = config
        last = index == config.depth - 1
        self.context_block = Stream(config, last=last)
        self.x_block = Stream(config, dual=index in config.dual)

    def forward(self, txt, img, c, mask=None):
        """txt (B, L, D), img (B, N, D), mask from `joint_mask` -> txt (or None), img.

        c (B, D), or what `prepare` made of it.
        """
        L, N = txt.shape[1], img.shape[1]
        if torch.is_tensor(c):
            c = JointBlock.prepare(self, c, L, N)  # not self.prepare, which FSDP may wrap
        txt_mod, img_mod, qk_gain, dual_qk_gain = c
        shift1, gain1, *txt_mod = txt_mod
        img_shift1, img_gain1, img_gate1, *img_mod = img_mod
        is_last = not txt_mod

        txt_qkv = self.context_block.attn.project(modulate(txt, shift1, gain1))
        img_qkv = self.x_block.attn.project(modulate(img, img_shift1, img_gain1))
        y = attend(torch.cat([txt_qkv, img_qkv], dim=3), qk_gain, mask, L if is_last else 0)
        txt_y, img_y = y.split([y.shape[1] - N, N], dim=1)

        x = img
        img = torch.addcmul(img, img_gate1, self.x_block.attn.proj(img_y))
        img_shift2, img_gain2, img_gate2, *dual_mod = img_mod
        if dual_mod:  # reads the same input as the joint attention did
            shift, gain, gate = dual_mod
            y2 = attend(self.x_block.attn2.project(modulate(x, shift, gain)), dual_qk_gain)
            img = torch.addcmul(img, gate, self.x_block.attn2.proj(y2))
        img_mlp = self.x_block.mlp(modulate(img, img_shift2, img_gain2))
        img = torch.addcmul(img, img_gate2, img_mlp)

        if is_last:
            return None, img
        gate1, shift2, gain2, gate2 = txt_mod
        txt = torch.addcmul(txt, gate1, self.context_block.attn.proj(txt_y))
        txt_mlp = self.context_block.mlp(modulate(txt, shift2, gain2))
        return torch.addcmul(txt, gate2, txt_mlp), img

    def prepare(self, c, text, image):
        """What the block makes of c (B, D) before it sees any of so many text and image tokens.

        The modulations of both streams; the gains for the joint and for the second attention.
        """
        streams = self.context_block, self.x_block
        modulations = [modulation(stream.adaLN_modulation, c) for stream in streams]
        if not self.config.qk_norm:
            return *modulations, None, None
        gains = [s.attn.gain(n) for s, n in zip(streams, (text, image))]
        second = self.x_block.attn2.gain(image) if hasattr(self.x_block, "attn2") else None
        return *modulations, torch.cat(gains, dim=3), second


class FinalLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.width, config.patch**2 * config.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, img, c):
        shift, gain = modulation(self.adaLN_modulation, c) if torch.is_tensor(c) else c
        return self.linear(modulate(img, shift, gain))


class MMDiT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # in training: keep a block's input only, compute it twice
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = Embedder(256, config.width)
        self.y_embedder = Embedder(config.pooled_dim, config.width)
        self.context_embedder = nn.Linear(config.context_dim, config.width)
        self.register_buffer("pos_embed", torch.zeros(1, config.positions**2, config.width))
        self.joint_blocks = nn.ModuleList(JointBlock(config, i) for i in range(config.depth))
        self.final_layer = FinalLayer(config)

    def embed_text(self, context, pooled):
        """SD3's own conditioning: context (B, L, 4096), pooled (B, 2048) -> txt (B, L, D), vec (B, D)."""
        return self.context_embedder(context), self.y_embedder(pooled)

    def crop_positions(self, h, w):
        """The centre h x w of the position table, (1, h w, D)."""
        side = self.config.positions
        if h > side or w > side:
            raise ValueError(f"latent of {h}x{w} patches is larger than the table, {side}x{side}")
        top, left = (side - h) // 2, (side - w) // 2
        table = rearrange(self.pos_embed, "1 (h w) D -> h w D", h=side)
        positions = rearrange(table[top : top + h, left : left + w], "h w D -> 1 (h w) D")
        return positions.to(self.x_embedder.proj.weight.device)

    def time_and_vec(self, t, vec):
        """What modulates: t (B,) and vec (B, D) -> c (B, D)."""
        return self.t_embedder(timestep_embedding(t).to(vec.dtype)) + vec

    def forward(self, latent, t, txt, vec, txt_mask=None, prepared=None):
        """Predict the velocity noise - x0.

        latent (B, C, H, W), even sides; t (B,) or a number, in [0, 1], 1 is pure noise;
        txt (B, L, D) and vec (B, D) from `embed_text` or an adapter; txt_mask (B, L) bool, False at
        padding; prepared: from `prepare`, for this t, vec and txt_mask, which then are not read.
        Returns (B, C, H, W).
        """
        p = self.config.patch
        if latent.shape[2] % p or latent.shape[3] % p:
            raise ValueError(
                f"latent sides must be multiples of {p}, got {tuple(latent.shape[2:])}"
            )
        h, w = latent.shape[2] // p, latent.shape[3] // p
        if prepared is None:
            t = torch.as_tensor(t, dtype=torch.float32, device=latent.device).expand(len(latent))
            c = self.time_and_vec(t, vec)
            mask = None if txt_mask is None else joint_mask(txt_mask, h * w, txt.dtype)
            prepared = self.crop_positions(h, w), mask, [c] * self.config.depth, c
        positions, mask, of_blocks, of_final = prepared
        img = self.x_embedder(latent) + positions
        for block, c in zip(self.joint_blocks, of_blocks):
            if self.checkpointing and torch.is_grad_enabled():
                txt, img = checkpoint(block, txt, img, c, mask, use_reentrant=False)
            else:
                txt, img = block(txt, img, c, mask)
        out = self.final_layer(img, of_final)
        return rearrange(out, "B (h w) (p q C) -> B C (h p) (w q)", h=h, p=p, q=p)

    def prepare(self, times, vec, txt_mask, h, w):
        """All that `forward` would compute at each of the times though no latent has a part in it.

        For vec (B, D), txt_mask (B, L) bool and h x w patches. The adaLN layers, a third of all
        parameters, serve nothing else. Returns for each time what `forward` takes as prepared:
        positions, mask, what each block makes of c, what the final layer does.
        """
        t = torch.tensor(times, device=vec.device).repeat_interleave(len(vec))
        c = self.time_and_vec(t, vec.repeat(len(times), 1))

        def by_time(chunks):
            shape = len(times), len(vec)
            return list(zip(*(x.unflatten(0, shape).unbind() for x in chunks)))

        blocks = []
        for block in self.joint_blocks:
            txt_mod, img_mod, *gains = block.prepare(c, txt_mask.shape[1], h * w)
            blocks.append([(*mods, *gains) for mods in zip(by_time(txt_mod), by_time(img_mod))])
        final = by_time(modulation(self.final_layer.adaLN_modulation, c))
        always = self.crop_positions(h, w), joint_mask(txt_mask, h * w, vec.dtype)
        return [(*always, *at_one_time) for at_one_time in zip(zip(*blocks), final)]

    def compile_blocks(self, **options):
        """torch.compile the blocks: one program for all of a kind, and for texts of any length."""
        # A text that happens to have as many tokens as the picture shall not be a special case.
        torch.fx.experimental._config.use_duck_shape = False
        for block in self.joint_blocks[:-1]:  # the last is the only one of its kind
            block.compile(dynamic=True, **options)

    def before_sampling(self):
        """The parts that no step of a prepared sampling loop calls."""
        adaln = [m for name, m in self.named_modules() if name.endswith("adaLN_modulation")]
        return [self.t_embedder, self.y_embedder, self.context_embedder, *adaln]


# ---- loading ------------------------------------------------------------------------------------

# diffusers folder -> published single file; "qkv.0", "qkv.1", "qkv.2" are fused afterwards
_BLOCK = r"transformer_blocks\.(\d+)\."
_DIFFUSERS = [
    (r"pos_embed\.pos_embed", r"pos_embed"),
    (r"pos_embed\.proj\.(\w+)", r"x_embedder.proj.\1"),
    (r"time_text_embed\.timestep_embedder\.linear_1\.(\w+)", r"t_embedder.mlp.0.\1"),
    (r"time_text_embed\.timestep_embedder\.linear_2\.(\w+)", r"t_embedder.mlp.2.\1"),
    (r"time_text_embed\.text_embedder\.linear_1\.(\w+)", r"y_embedder.mlp.0.\1"),
    (r"time_text_embed\.text_embedder\.linear_2\.(\w+)", r"y_embedder.mlp.2.\1"),
    (_BLOCK + r"(attn2?)\.to_q\.(\w+)", r"joint_blocks.\1.x_block.\2.qkv.0.\3"),
    (_BLOCK + r"(attn2?)\.to_k\.(\w+)", r"joint_blocks.\1.x_block.\2.qkv.1.\3"),
    (_BLOCK + r"(attn2?)\.to_v\.(\w+)", r"joint_blocks.\1.x_block.\2.qkv.2.\3"),
    (_BLOCK + r"attn\.add_q_proj\.(\w+)", r"joint_blocks.\1.context_block.attn.qkv.0.\2"),
    (_BLOCK + r"attn\.add_k_proj\.(\w+)", r"joint_blocks.\1.context_block.attn.qkv.1.\2"),
    (_BLOCK + r"attn\.add_v_proj\.(\w+)", r"joint_blocks.\1.context_block.attn.qkv.2.\2"),
    (_BLOCK + r"(attn2?)\.norm_([qk])\.weight", r"joint_blocks.\1.x_block.\2.ln_\3.weight"),
    (
        _BLOCK + r"attn\.norm_added_([qk])\.weight",
        r"joint_blocks.\1.context_block.attn.ln_\2.weight",
    ),
    (_BLOCK + r"(attn2?)\.to_out\.0\.(\w+)", r"joint_blocks.\1.x_block.\2.proj.\3"),
    (_BLOCK + r"attn\.to_add_out\.(\w+)", r"joint_blocks.\1.context_block.attn.proj.\2"),
    (_BLOCK + r"norm1\.linear\.(\w+)", r"joint_blocks.\1.x_block.adaLN_modulation.1.\2"),
    (
        _BLOCK + r"norm1_context\.linear\.(\w+)",
        r"joint_blocks.\1.context_block.adaLN_modulation.1.\2",
    ),
    (_BLOCK + r"ff\.net\.0\.proj\.(\w+)", r"joint_blocks.\1.x_block.mlp.fc1.\2"),
    (_BLOCK + r"ff\.net\.2\.(\w+)", r"joint_blocks.\1.x_block.mlp.fc2.\2"),
    (_BLOCK + r"ff_context\.net\.0\.proj\.(\w+)", r"joint_blocks.\1.context_block.mlp.fc1.\2"),
    (_BLOCK + r"ff_context\.net\.2\.(\w+)", r"joint_blocks.\1.context_block.mlp.fc2.\2"),
    (r"norm_out\.linear\.(\w+)", r"final_layer.adaLN_modulation.1.\1"),
    (r"proj_out\.(\w+)", r"final_layer.linear.\1"),
]


def from_diffusers(tensors):
    """Turn the tensors of a diffusers `transformer/` folder into the published single file's."""
    renamed = weights.rename(tensors, _DIFFUSERS)
    fused = {}
    for name, tensor in renamed.items():
        if match := re.match(r"(.*\.qkv)\.0\.(\w+)$", name):
            parts = [renamed.get(f"{match[1]}.{i}.{match[2]}") for i in range(3)]
            if all(part is not None for part in parts):
                fused[f"{match[1]}.{match[2]}"] = torch.cat(parts)
        elif not re.search(r"\.qkv\.[12]\.\w+$", name):
            fused[name] = tensor
    # diffusers stores (scale, shift) where only these two exist, the published file (shift, scale)
    last = max((int(m[1]) for k in fused if (m := re.match(r"joint_blocks\.(\d+)", k))), default=0)
    for prefix in (f"joint_blocks.{last}.context_block", "final_layer"):
        for kind in ("weight", "bias"):
            if (name := f"{prefix}.adaLN_modulation.1.{kind}") in fused:
                scale, shift = fused[name].chunk(2)
                fused[name] = torch.cat([shift, scale])
    return fused


def infer_config(tensors):
    """Read the configuration off the names and shapes of single-file tensors."""
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    dual = {
        int(m[1]) for k in tensors if (m := re.match(r"joint_blocks\.(\d+)\.x_block\.attn2", k))
    }
    norm = tensors.get("joint_blocks.0.x_block.attn.ln_q.weight")
    return MMDiTConfig(
        depth=1 + max(int(m[1]) for k in tensors if (m := re.match(r"joint_blocks\.(\d+)", k))),
        width=width,
        head_dim=64 if norm is None else norm.shape[0],
        channels=channels,
        patch=patch,
        positions=math.isqrt(tensors["pos_embed"].shape[1]),
        context_dim=tensors["context_embedder.weight"].shape[1],
        pooled_dim=tensors["y_embedder.mlp.0.weight"].shape[1],
        qk_norm=norm is not None,
        dual=tuple(sorted(dual)),
    )


def build(tensors, source, device="cpu", dtype=torch.float32):
    """An MMDiT filled with tensors in either layout, frozen; raises ValueError if they do not fit."""
    if any(name.startswith("transformer_blocks.") for name in tensors):
        tensors = from_diffusers(tensors)
    try:
        config = infer_config(tensors)
    except KeyError as name:
        raise ValueError(f"{source}: holds no SD3 or SD3.5 transformer: missing {name}") from None
    except (ValueError, IndexError):
        raise ValueError(f"{source}: holds no SD3 or SD3.5 transformer") from None
    with torch.device("meta"):
        model = MMDiT(config)
    return weights.fill(model, tensors, source, device, dtype)


def load_mmdit(path, device="cpu", dtype=torch.float32):
    """Load the transformer of a single SD3 / SD3.5 file or of a diffusers folder (its `transformer/`).

    Raises FileNotFoundError, or ValueError naming the tensors that do not fit.
    """
    folder = Path(path, "transformer")
    tensors = weights.read(folder if folder.is_dir() else path)
    for prefix in ("model.diffusion_model.", "transformer."):
        tensors = weights.cut(tensors, prefix) or tensors
    return build(tensors, path, device, dtype)
