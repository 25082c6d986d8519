"""SD3.5's autoencoder: it turns a 64x64 picture into an 8x8 latent of C channels, and back.

Module names are those of the published single file (below `first_stage_model.`), so loading it is
a strict load. Letters: B batch, C latent channels (16 in SD3.5), H W pixels, h w = H/8 W/8.
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

SCALE, SHIFT = 1.5305, 0.0609  # (latent - SHIFT) * SCALE has about unit variance


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a VAE. Level i has base * multipliers[i] channels. Defaults: SD3.5."""

    latent_channels: int = 16
    base: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2  # residual blocks per level of the encoder; the decoder has one more
    groups: int = 32  # of each GroupNorm; groups of fewer than 4 channels would erase flat color


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
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """Self-attention over all positions, with one head."""

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
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros on the right and at the bottom only


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0))


def level(c_in, c_out, blocks, groups, resize):
    """Residual blocks from c_in to c_out channels, then resize: {name: its layer's class} or {}."""
    widths = pairwise([c_in, *[c_out] * blocks])
    parts = {"block": nn.Sequential(*(ResnetBlock(*w, groups) for w in widths))}
    parts |= {name: kind(c_out) for name, kind in resize.items()}
    return nn.Sequential(OrderedDict(parts))


def middle(c, groups):
    """The layers at the smallest sides, in the encoder and in the decoder."""
    parts = {"block_1": ResnetBlock(c, c, groups), "attn_1": Attention(c, groups)}
    return nn.Sequential(OrderedDict(parts, block_2=ResnetBlock(c, c, groups)))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        groups, c = config.groups, config.base
        self.conv_in = nn.Conv2d(3, c, 3, padding=1)
        self.down = nn.Sequential()
        for i, multiplier in enumerate(config.multipliers, 1):
            resize = {"downsample": Downsample} if i < len(config.multipliers) else {}
            self.down.append(level(c, config.base * multiplier, config.blocks, groups, resize))
            c = config.base * multiplier
        self.mid = middle(c, groups)
        self.norm_out = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):  # (B, 3, H, W) -> mean and log-variance (B, 2C, h, w)
        x = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        groups, c = config.groups, config.base * config.multipliers[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, c, 3, padding=1)
        self.mid = middle(c, groups)
        levels = []
        for i, multiplier in reversed(list(enumerate(config.multipliers))):
            resize = {"upsample": Upsample} if i > 0 else {}
            levels.append(level(c, config.base * multiplier, config.blocks + 1, groups, resize))
            c = config.base * multiplier
        self.up = nn.ModuleList(reversed(levels))  # published names count from fine to coarse
        self.norm_out = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z):  # (B, C, h, w) -> (B, 3, H, W)
        x = self.mid(self.conv_in(z))
        for part in reversed(self.up):
            x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))


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

    def encode(self, image, noise=None):
        """image (B, 3, H, W) in [-1, 1] -> normalised latent (B, C, h, w): the posterior's mean.

        With noise, a sample of the posterior. noise: (B, C, h, w), or a torch.Generator to draw it.
        """
        mean, std = self.posterior(image)
        if isinstance(noise, torch.Generator):
            noise = torch.randn(std.shape, generator=noise)
        if noise is not None:
            mean = mean + std * noise.to(std)
        return (mean - SHIFT) * SCALE

    def decode(self, latent):
        """normalised latent (B, C, h, w) -> image (B, 3, H, W), about [-1, 1], not clamped."""
        return self.decoder(latent / SCALE + SHIFT)
