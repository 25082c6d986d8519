"""SD3.5's autoencoder: a 64x64 picture becomes an 8x8 latent of C channels, and back.

Module names are those of the published single file (below `first_stage_model.`), so loading it is
a strict load. Letters: B batch, C latent channels (16 in SD3.5), H W pixels, h w = H/8 W/8.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import weights

SCALE, SHIFT = 1.5305, 0.0609  # latents are normalised to about unit variance for the MM-DiT


@dataclass(frozen=True)
class VAEConfig:
    """Defaults: SD3.5. Channels of level i are base * multipliers[i]; each level halves the sides."""

    latent_channels: int = 16
    base: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2  # residual blocks a level; the decoder has one more

    @property
    def groups(self):
        # 32 at SD3.5's width; never fewer than 4 channels a group, or the norm would erase the
        # mean of a channel, and with it all flat colour.
        return min(32, self.base // 4)


STRIPE = 512 * 512  # pixels that a convolution makes at once


def in_stripes(layer, x, scale=1):
    """layer(x), for a layer that sees a row and its two neighbours; of a large picture by stripes.

    Equal to the whole, but what lies between x and the result is only as large as a stripe. scale:
    rows that the layer makes of one.
    """
    height, rows = x.shape[2], max(1, STRIPE // (scale**2 * x.shape[3]))
    if rows >= height:
        return layer(x)
    result = None
    for top in range(0, height, rows):
        end, above = min(top + rows, height), min(top, 1)
        stripe = layer(x[:, :, top - above : end + 1])
        if result is None:
            shape = *stripe.shape[:2], scale * height, stripe.shape[3]
            like = {"dtype": stripe.dtype, "device": stripe.device}
            result = torch.empty(shape, **like, memory_format=torch.channels_last)
        own = stripe[:, :, scale * above : scale * (above + end - top)]
        result[:, :, scale * top : scale * end] = own
    return result


def norm_silu_conv(norm, conv, x):
    """conv(silu(norm(x))). In stripes the norm, which needs all of x, is made an affine map first."""
    if x.shape[2] * x.shape[3] <= STRIPE:
        return conv(F.silu(norm(x), inplace=True))
    by_channel = torch.var_mean(x, dim=(2, 3), correction=0)
    var, mean = (
        rearrange(y, "B (groups C) -> B groups C", groups=norm.num_groups) for y in by_channel
    )
    var = var.mean(2, keepdim=True) + mean.var(2, correction=0, keepdim=True)
    gain = (var + norm.eps).rsqrt().expand_as(mean).flatten(1) * norm.weight
    shift = norm.bias - mean.mean(2, keepdim=True).expand_as(mean).flatten(1) * gain
    gain, shift = (rearrange(y, "B C -> B C 1 1") for y in (gain, shift))

    def layer(stripe):
        return conv(F.silu(torch.addcmul(shift, stripe, gain), inplace=True))

    return in_stripes(layer, x)


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        y = norm_silu_conv(self.norm1, self.conv1, x)
        y = norm_silu_conv(self.norm2, self.conv2, y)
        y += self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return y


class Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (rearrange(f(y), "B C h w -> B 1 (h w) C") for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(y, "B 1 (h w) C -> B C h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros right and below only


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return in_stripes(lambda stripe: self.conv(F.interpolate(stripe, scale_factor=2.0)), x, 2)


def middle(c, groups):
    return nn.ModuleDict(
        {
            "block_1": ResnetBlock(c, c, groups),
            "attn_1": Attention(c, groups),
            "block_2": ResnetBlock(c, c, groups),
        }
    )


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        groups, c = config.groups, config.base
        self.conv_in = nn.Conv2d(3, c, 3, padding=1)
        self.down = nn.ModuleList()
        for i, multiplier in enumerate(config.multipliers):
            level = nn.ModuleDict({"block": nn.ModuleList()})
            for _ in range(config.blocks):
                level["block"].append(ResnetBlock(c, config.base * multiplier, groups))
                c = config.base * multiplier
            if i + 1 < len(config.multipliers):
                level["downsample"] = Downsample(c)
            self.down.append(level)
        self.mid = middle(c, groups)
        self.norm_out = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):  # (B, 3, H, W) -> mean and log-variance (B, 2C, h, w)
        x = self.conv_in(x)
        for level in self.down:
            for block in level["block"]:
                x = block(x)
            if "downsample" in level:
                x = level["downsample"](x)
        for block in self.mid.values():
            x = block(x)
        return norm_silu_conv(self.norm_out, self.conv_out, x)


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        groups, c = config.groups, config.base * config.multipliers[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, c, 3, padding=1)
        self.mid = middle(c, groups)
        levels = []
        for i, multiplier in reversed(list(enumerate(config.multipliers))):
            level = nn.ModuleDict({"block": nn.ModuleList()})
            for _ in range(config.blocks + 1):
                level["block"].append(ResnetBlock(c, config.base * multiplier, groups))
                c = config.base * multiplier
            if i > 0:
                level["upsample"] = Upsample(c)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # the published names count from fine to coarse
        self.norm_out = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z):  # (B, C, h, w) -> (B, 3, H, W)
        x = self.conv_in(z)
        for block in self.mid.values():
            x = block(x)
        for level in reversed(self.up):
            for block in level["block"]:
                x = block(x)
            if "upsample" in level:
                x = level["upsample"](x)
        return norm_silu_conv(self.norm_out, self.conv_out, x)


class VAE(nn.Module):
    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def posterior(self, image):
        """image (B, 3, H, W) in [-1, 1] -> mean, std (B, C, h, w) of the unnormalised latent."""
        if image.shape[-1] % 8 or image.shape[-2] % 8:
            raise ValueError(f"image sides must be multiples of 8, got {tuple(image.shape[-2:])}")
        mean, logvar = self.encoder(image).chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(-30, 20))

    def encode(self, image, generator=None):
        """image (B, 3, H, W) in [-1, 1] -> normalised latent (B, C, H/8, W/8).

        The mean of the posterior; with a generator, a sample of it.
        """
        mean, std = self.posterior(image)
        if generator is not None:
            mean = mean + std * torch.randn(std.shape, generator=generator).to(std)
        return (mean - SHIFT) * SCALE

    def decode(self, latent):
        """normalised latent (B, C, h, w) -> image (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        return self.decoder(latent / SCALE + SHIFT)


# diffusers folder -> published single file; the decoder's levels are counted the other way round
_DIFFUSERS = [
    (r"(\w+)\.conv_norm_out\.(.*)", r"\1.norm_out.\2"),
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(.*)", r"encoder.down.\1.block.\2"),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.(.*)", r"encoder.down.\1.downsample.\2"),
    (r"decoder\.up_blocks\.(\d+)\.resnets\.(.*)", r"decoder.up.\1.block.\2"),
    (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.(.*)", r"decoder.up.\1.upsample.\2"),
    (r"(\w+)\.mid_block\.resnets\.0\.(.*)", r"\1.mid.block_1.\2"),
    (r"(\w+)\.mid_block\.resnets\.1\.(.*)", r"\1.mid.block_2.\2"),
    (r"(\w+)\.mid_block\.attentions\.0\.group_norm\.(.*)", r"\1.mid.attn_1.norm.\2"),
    (r"(\w+)\.mid_block\.attentions\.0\.to_([qkv])\.(.*)", r"\1.mid.attn_1.\2.\3"),
    (r"(\w+)\.mid_block\.attentions\.0\.to_out\.0\.(.*)", r"\1.mid.attn_1.proj_out.\2"),
]


def from_diffusers(tensors):
    """Rename the tensors of a diffusers `vae/` folder to the published single-file names."""
    top = max(
        (int(m[1]) for k in tensors if (m := re.match(r"decoder\.up_blocks\.(\d+)", k))), default=0
    )
    renamed = {}
    for name, tensor in weights.rename(tensors, _DIFFUSERS).items():
        name = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up.{top - int(m[1])}", name)
        name = name.replace("conv_shortcut", "nin_shortcut")
        if "attn_1" in name and tensor.ndim == 2:  # a Linear there, a 1x1 convolution here
            tensor = tensor[:, :, None, None]
        renamed[name] = tensor
    return renamed


def infer_config(tensors):
    """Read the configuration off the shapes of single-file tensors."""
    base = tensors["encoder.conv_in.weight"].shape[0]
    levels = 1 + max(int(m[1]) for k in tensors if (m := re.match(r"encoder\.down\.(\d+)", k)))
    blocks = 1 + max(
        int(m[1]) for k in tensors if (m := re.match(r"encoder\.down\.0\.block\.(\d+)", k))
    )
    widths = [tensors[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
    latent = tensors["decoder.conv_in.weight"].shape[1]
    return VAEConfig(latent, base, tuple(w // base for w in widths), blocks)


def load_vae(path, device="cpu", dtype=torch.float32):
    """Load the autoencoder of a single SD3.5 file or of a diffusers folder (its `vae/`).

    Raises FileNotFoundError, or ValueError naming the tensors that do not fit.
    """
    folder = Path(path, "vae")
    tensors = weights.read(folder if folder.is_dir() else path)
    part = weights.cut(tensors, "first_stage_model.") or weights.cut(tensors, "vae.") or tensors
    if any(".resnets." in name for name in part):
        part = from_diffusers(part)
    try:
        config = infer_config(part)
    except (KeyError, ValueError, IndexError):
        raise ValueError(f"{path}: holds no SD3.5 autoencoder (first_stage_model.*)") from None
    with torch.device("meta"):
        model = VAE(config)
    model = weights.fill(model, part, path, device, dtype)
    return model.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
