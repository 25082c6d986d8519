"""SD3's MM-DiT with UniAlignment's heads, and the published names of its tensors."""

from dataclasses import replace

import torch
from torch import nn

import checkpoints
from mmdit import MMDiT, TimestepEmbedder, timestep_embedding


class RoundedEmbedder(TimestepEmbedder):
    """Rounds the sinusoid of t to float16, as in the training of the published weights."""

    def forward(self, t):
        return self.mlp(timestep_embedding(t).half().to(self.mlp[0].weight.dtype))


class Transformer(MMDiT):
    """SD3's MM-DiT with a text head, and two adapters that align it with a teacher (ISA)."""

    def __init__(self, config, vocabulary, null_tokens=8, aligned=None, rounded=True):
        """aligned: (M, hidden units) of the adapters, which only training needs, or None."""
        super().__init__(config)
        if rounded:
            self.t_embedder = RoundedEmbedder(256, config.width)
        self.text_head = nn.Linear(config.width, vocabulary)
        self.null_image = nn.Parameter(torch.zeros(1, null_tokens, config.width))  # never used
        if aligned:
            self.align(*aligned)

    def align(self, out, hidden=None):
        """Add adapters from a mean token (B, D) to a teacher's vector (B, out), if missing."""
        if hasattr(self, "image_adapter") and self.image_adapter[2].out_features == out:
            return
        width, device = self.config.width, self.pos_embed.device
        hidden = hidden or min(2048, 4 * width)
        for name in ("image_adapter", "text_adapter"):
            layers = nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, out), nn.SiLU()
            self.add_module(name, nn.Sequential(*layers).to(device))

    def settings(self):
        """The content of its config.json, in the authors' names."""
        config = self.config
        return checkpoints.mmdit_settings(config) | {
            "vocab_size": self.text_head.out_features,
            "num_attention_heads": config.width // config.head_dim,
            "caption_projection_dim": config.width,
            "out_channels": config.channels,
            "qk_norm": "rms_norm" if config.qk_norm else None,
            "dual_attention_layers": list(config.dual),
            "float16_time": isinstance(self.t_embedder, RoundedEmbedder),  # ours
        }


@torch.no_grad()
def grow(base, vocabulary):
    """Make a Transformer in fp32 from SD3's. New gates are zero: it draws as with vec = 0."""
    config = replace(base.config, pooled_dim=None, text_out=True)
    model = Transformer(config, vocabulary, rounded=False).to(base.pos_embed.device)
    for parameter in model.joint_blocks[-1].context_block.adaLN_modulation.parameters():
        parameter.zero_()
    state = model.state_dict()
    last = f"joint_blocks.{config.depth - 1}.context_block.adaLN_modulation.1."
    for name, tensor in base.state_dict().items():
        if name.startswith(last):  # SD3 has shift and scale; the gate and the MLP's triple are new
            state[name][: 2 * config.width] = tensor
        elif name in state:
            state[name].copy_(tensor)
    return model


# Published names that differ from those of diffusers' SD3
RULES = checkpoints.key_map("""
    final_layer.adaLN_modulation.1.*  image_norm_out.linear.*
    final_layer.linear.*              image_proj_out.*
    text_head.*                       text_proj_out.*
    null_image                        null_image_embd
    image_adapter.*                   siglip_adapter_img.fc.*
    text_adapter.*                    siglip_adapter_text.fc.*
""")
RULES += checkpoints.MMDIT_DIFFUSERS
MARKS = ("text_proj_out.", "image_proj_out.", "null_image_embd")  # SD3 has none of these


def load_transformer(path, device="cpu", dtype=torch.float32):
    """Load a published transformer/, or a single file; UserError if it holds no Transformer."""
    stated = checkpoints.read_config(path)
    kind, layouts = "transformer of UniAlignment", dict.fromkeys(MARKS, RULES)
    part = checkpoints.find_part(checkpoints.read_tensors(path), path, kind, ("",), layouts)
    aligned = None
    if part.shape("image_adapter.0.weight"):
        aligned = [part.dimension(f"image_adapter.{i}.weight", 0) for i in (2, 0)]
    sizes = part.dimension("text_head.weight", 0), part.dimension("null_image", 1), aligned
    built = checkpoints.infer_mmdit(part, stated), *sizes, stated.get("float16_time", True)
    model = checkpoints.build(part, lambda: Transformer(*built), device, dtype)
    checkpoints.compare(path, stated, model.settings())
    return model
