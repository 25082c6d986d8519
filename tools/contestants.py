"""Contestants of `tools.bench`: diffusers' transformer and ours, of equal weights, fast and plain."""

import math
from functools import partial

import torch
from torch import nn

import flow
from checkpoints import build_mmdit
from dream_engine import Condition, denoise
from mmdit import MMDiT
from prompts import apply_task, to_images

try:
    from diffusers import SD3Transformer2DModel
    from peft import LoraConfig, inject_adapter_in_model
except ImportError:
    SD3Transformer2DModel = None


class Reference(nn.Module):
    """diffusers' transformer with our forward; Dream Engine's conditions bypass its embedders."""

    def __init__(self, config):
        super().__init__()
        self.config, positions = config, config.positions
        self.transformer = SD3Transformer2DModel(
            sample_size=2 * positions, patch_size=config.patch, pos_embed_max_size=positions,
            in_channels=config.channels, out_channels=config.channels, num_layers=config.depth,
            attention_head_dim=config.head_dim, num_attention_heads=config.width // config.head_dim,
            caption_projection_dim=config.width, joint_attention_dim=config.context_dim,
            pooled_projection_dim=config.pooled_dim, dual_attention_layers=config.dual,
            qk_norm="rms_norm",
        )  # fmt: skip
        self.eval().requires_grad_(False)
        self.pos_embed = self.transformer.pos_embed.pos_embed  # the engine asks for its dtype

    def forward(self, latent, t, txt, vec, mask=None):
        assert mask is None, "diffusers masks no padding"
        t = torch.as_tensor(t, dtype=torch.float32, device=latent.device).expand(len(latent))
        return self.transformer(latent, txt, vec, 1000 * t, return_dict=False)[0]

    def add_lora(self, rank):
        attention = r".*attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=attention)
        inject_adapter_in_model(config, self.transformer)


def contestants(config, device="cpu", dtype=torch.float32):
    """{name: MMDiT or Reference} of equal random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        if not SD3Transformer2DModel:
            return {"ours": MMDiT(config).to(dtype).eval().requires_grad_(False)}
        reference = Reference(config).to(dtype)
    theirs = reference.transformer
    ours = build_mmdit(theirs.state_dict(), "diffusers", device, dtype)
    theirs.context_embedder = theirs.time_text_embed.text_embedder = nn.Identity()
    return {"diffusers": reference, "ours": ours}


def plain_denoise(transformer, condition, noise, steps=28, guidance=4.5):
    """`dream_engine.denoise` with nothing kept from step to step; condition() is called at each."""

    def velocity(z, t):
        c = condition()
        z = z.to(c.txt.dtype).repeat(2, 1, 1, 1)
        return flow.guide(*transformer(z, t, c.txt, c.vec, c.padding).float().chunk(2), guidance)

    return flow.euler(velocity, noise, flow.sigma_schedule(steps))


@torch.no_grad()
def official(engine, transformer, prompt, steps, is_masked=False):
    """`DreamEngine.generate` as the official code does it: the LMM at every step."""
    batch = engine.lmm.collate(apply_task(None, prompt))
    side = engine.default_size // 8

    def condition():
        c = engine.condition(batch)
        return c if is_masked else Condition(c.txt, torch.ones_like(c.mask), c.vec)

    noise = flow.noise(1, (transformer.config.channels, side, side), 0).to(batch.ids.device)
    return to_images(engine.vae.decode(plain_denoise(transformer, condition, noise, steps)))


def inputs_of(config, image, text, batch, device, dtype=torch.float32):
    """A latent of so many image tokens, txt and vec, all random."""
    generator, side = torch.Generator().manual_seed(0), config.patch * math.isqrt(image)
    sizes = (config.channels, side, side), (text, config.width), (config.width,)
    return [torch.randn(batch, *s, generator=generator).to(device, dtype) for s in sizes]


def samplers(models, inputs, steps):
    """{name: function that draws a latent with guidance}, from inputs of a batch of two."""
    (latent, txt, vec), draw = inputs, {}
    condition = Condition(txt, torch.ones_like(txt[..., 0], dtype=torch.bool), vec)
    for name, model in models.items():
        plain = partial(plain_denoise, model, lambda: condition, latent[:1], steps)
        is_theirs = isinstance(model, Reference)
        draw[name] = plain if is_theirs else partial(denoise, model, condition, latent[:1], steps)
        if name == "ours":
            draw["ours, plain forward"] = plain
    return {name: torch.no_grad()(function) for name, function in draw.items()}
