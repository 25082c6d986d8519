"""Write tests/golden: what the reference implementations answer for the weights of tiny.py.

    python tests/make_golden.py        # needs diffusers and peft; the tests do not

golden.json holds names and shapes of all weights, golden.safetensors the answers:
  mmdit/FAMILY/LAYOUT/CASE      velocities of diffusers' SD3Transformer2DModel
  vae/CHANNELS/LAYOUT/...       mean, std, normalised latent and decoded image of AutoencoderKL
  flow/SHIFT/STEPS              sigmas of FlowMatchEulerDiscreteScheduler
  flow/trajectory               its latents on the way from noise to the end
  official/CASE                 velocities of DreamEngine as its authors run it
Inputs are tensors of tiny.py as well, named in the code of the tests.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cases import LATENTS, OFFICIAL, SCHEDULES, drift
from tiny import GOLDEN, tensor, tensors

from mmdit import MMDiT, MMDiTConfig
from vae import VAE, VAEConfig

FAMILIES = {
    "sd3-medium": {"qk_norm": False},
    "sd3.5-medium": {"dual": (0, 1)},
    "sd3.5-large": {},
}


def shapes_of(model):
    return {name: list(x.shape) for name, x in model.state_dict().items()}


def mmdit(names, answers):
    for family, options in FAMILIES.items():
        ours = MMDiT(MMDiTConfig(3, 128, 64, 16, 2, 24, 48, 40, **options))
        reference = SD3Transformer2DModel(
            sample_size=48,
            num_layers=3,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=128,
            pooled_projection_dim=40,
            pos_embed_max_size=24,
            qk_norm="rms_norm" if options.get("qk_norm", True) else None,
            dual_attention_layers=options.get("dual", ()),
        ).eval()
        for layout, shapes in (("single", shapes_of(ours)), ("diffusers", shapes_of(reference))):
            weights = tensors(shapes)
            if layout == "single":
                weights = convert_sd3_transformer_checkpoint_to_diffusers(dict(weights))
            reference.load_state_dict(weights, strict=True)
            names[f"mmdit/{family}/{layout}"] = shapes
            for case, (h, w, length) in LATENTS.items():
                answers[f"mmdit/{family}/{layout}/{case}"] = reference(
                    tensor("latent", (2, 16, h, w)),
                    tensor("context", (2, length, 48)),
                    tensor("pooled", (2, 40)),
                    1000 * torch.tensor([0.25, 0.9]),
                ).sample


def vae(names, answers):
    for channels in (16, 8):
        ours = VAE(VAEConfig(channels, 16))
        reference = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=(16, 32, 64, 64),
            layers_per_block=2,
            latent_channels=channels,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).eval()
        for layout, shapes in (("single", shapes_of(ours)), ("diffusers", shapes_of(reference))):
            weights = tensors(shapes)
            if layout == "single":
                weights = convert_ldm_vae_checkpoint(dict(weights), reference.config)
            reference.load_state_dict(weights, strict=True)
            key = f"vae/{channels}/{layout}"
            names[key] = shapes
            posterior = reference.encode(tensor("image", (2, 3, 48, 32)).tanh()).latent_dist
            answers[f"{key}/mean"] = posterior.mean
            answers[f"{key}/std"] = posterior.std
            answers[f"{key}/latent"] = (posterior.mean - 0.0609) * 1.5305
            z = tensor("z", (2, channels, 6, 4))
            answers[f"{key}/image"] = reference.decode(z / 1.5305 + 0.0609).sample


def flow(_, answers):
    for shift, steps in SCHEDULES:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(steps)
        answers[f"flow/{shift}/{steps}"] = scheduler.sigmas
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(12)
    z, path = tensor("noise", (2, 4, 4, 4)), []
    for t in scheduler.timesteps:
        z = scheduler.step(drift(z, t / 1000), t, z).prev_sample
        path.append(z)
    answers["flow/trajectory"] = torch.stack(path)


class Official(nn.Module):
    """The forward pass of the official code, from its parts in transformers, peft and diffusers."""

    def __init__(self, scale):
        super().__init__()
        self.lmm = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**OFFICIAL["lmm"]))
        self.dit = SD3Transformer2DModel(**OFFICIAL["dit"])
        lmm = LoraConfig(r=4, lora_alpha=4 * scale, target_modules=OFFICIAL["lmm_lora"])
        dit = LoraConfig(r=4, lora_alpha=4 * scale, target_modules=OFFICIAL["dit_lora"])
        inject_adapter_in_model(lmm, self.lmm.model.language_model)
        inject_adapter_in_model(dit, self.dit)
        self.norm_lmm_out = nn.RMSNorm(64)
        self.pooled_proj = nn.Linear(8, 4)
        self.input_embeds_align_mlp = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64))
        self.condition_embeds_align_mlp = nn.Sequential(
            nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64)
        )

    def published_names(self):
        """name in the published files -> name here."""
        names = {}
        for name in self.state_dict():
            old = name.replace("lmm.model.language_model.", "lmm.model.")
            names[old.replace("lmm.model.visual.", "lmm.visual.")] = name
        return names

    def forward(self, ids, patches, grids, positions, r, latent, t):
        image = ids == OFFICIAL["lmm"]["image_token_id"]
        embeddings = self.lmm.model.language_model.embed_tokens(ids)
        vit = None
        if grids is not None:
            vit = self.lmm.model.visual(patches, grids).pooler_output
            embeddings[image] = vit
        hidden = self.lmm.model.language_model(
            inputs_embeds=embeddings, position_ids=positions, output_hidden_states=True
        ).hidden_states[-1]
        if vit is not None:
            hidden = hidden.clone()
            hidden[image] = (1 - r) * hidden[image] + r * vit
        dit = self.dit
        txt = self.input_embeds_align_mlp(hidden)
        vec = self.condition_embeds_align_mlp(hidden.mean(dim=1))
        temb = dit.time_text_embed.timestep_embedder(dit.time_text_embed.time_proj(1000 * t)) + vec
        h, w = latent.shape[2] // 2, latent.shape[3] // 2
        img = dit.pos_embed(latent)
        for block in dit.transformer_blocks:
            txt, img = block(hidden_states=img, encoder_hidden_states=txt, temb=temb)
        img = dit.proj_out(dit.norm_out(img, temb)).reshape(len(latent), h, w, 2, 2, 16)
        return torch.einsum("nhwpqc->nchpwq", img).reshape(latent.shape)


def official(names, answers):
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    listed = {}
    for line in (GOLDEN / "official_keys.txt").read_text().splitlines():
        name, shape = line.split("\t")[:2]
        listed[name] = list(
            json.loads(shape.replace("(", "[").replace(",)", "]").replace(")", "]"))
        )
    listed["pooled_proj.weight"], listed["pooled_proj.bias"] = [4, 8], [4]
    names["official"] = listed
    for case, (scale, r, mrope, prompt, grids) in OFFICIAL["cases"].items():
        model = Official(scale).eval()
        published = model.published_names()
        assert published.keys() == listed.keys(), published.keys() ^ listed.keys()
        weights = tensors(listed)
        weights["lmm.lm_head.weight"] = weights["lmm.model.embed_tokens.weight"]  # tied
        model.load_state_dict({published[k]: weights[k] for k in listed}, strict=True)
        ids = torch.tensor([prompt])
        grids = torch.tensor(grids) if grids else None
        patches = tensor("patches", (int(grids.prod(1).sum()), 1176)) if len(prompt) > 9 else None
        positions = torch.arange(len(prompt)).expand(3, 1, -1)
        if mrope:
            kinds = (ids == OFFICIAL["lmm"]["image_token_id"]).long()
            positions = Qwen2VLModel.get_rope_index(model.lmm.model, ids, kinds, grids)[0]
        answers[f"official/{case}"] = model(
            ids,
            patches,
            grids,
            positions,
            r,
            tensor("latent", (1, 16, 8, 12)),
            torch.tensor([0.6]),
        )


if __name__ == "__main__":
    names, answers = {}, {}
    with torch.no_grad():
        for make in (mmdit, vae, flow, official):
            make(names, answers)
    GOLDEN.mkdir(exist_ok=True)
    save_file(
        {k: v.float().contiguous() for k, v in answers.items()}, GOLDEN / "golden.safetensors"
    )
    (GOLDEN / "golden.json").write_text(json.dumps(names, separators=(",", ":")) + "\n")
