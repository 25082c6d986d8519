"""Write tests/golden: what the reference implementations answer for the weights of tiny.py.

    python tests/make_golden.py        # needs diffusers and peft; the tests do not

golden.json holds names and shapes of all weights, golden.safetensors the answers:
  mmdit/FAMILY/LAYOUT/CASE      velocities of diffusers' SD3Transformer2DModel
  vae/CHANNELS/LAYOUT/...       mean, std, normalised latent and decoded image of AutoencoderKL
  flow/SHIFT/STEPS              sigmas of FlowMatchEulerDiscreteScheduler
  flow/trajectory               its latents on the way from noise to the end
  official/CASE                 velocities of DreamEngine as its authors run it
unialignment.json and unialignment.safetensors hold the same for UniAlignment, built of its authors'
description from blocks of diffusers and T5 of transformers.
operations.json holds how many operations a guided sampling step of diffusers takes; see `operations`.
Inputs are tensors of tiny.py as well, named in the code of the tests.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps
from diffusers.models.normalization import AdaLayerNormContinuous
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, T5Config, T5EncoderModel

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cases import (
    LATENTS,
    OFFICIAL,
    PROMPTS,
    SCHEDULES,
    SLOTS,
    T5,
    UNI,
    VOCABULARY,
    drift,
    t5_tokenizer,
)  # fmt: skip
from operations import LATENT, TOKENS, Operations, on_meta
from tiny import GOLDEN, tensor, tensors, uniform

from mmdit import FAMILIES as PUBLISHED
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
        ours = VAE(VAEConfig(channels, 16, groups=4))
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


# ---- UniAlignment -------------------------------------------------------------------------------


class Adapter(nn.Module):
    def __init__(self, width, hidden, out):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, out), nn.SiLU()
        )

    def forward(self, x):
        return self.fc(x.mean(dim=1))


class Time(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(256, width)

    def forward(self, timestep):
        return self.timestep_embedder(self.time_proj(timestep).half().float())


class Joint(nn.Module):
    """UniAlignment's transformer, its modules named as published."""

    def __init__(self, qk_norm=None):
        super().__init__()
        width, heads = UNI["width"], UNI["heads"]
        self.pos_embed = PatchEmbed(48, 48, 2, 16, width, pos_embed_max_size=UNI["positions"])
        self.time_text_embed = Time(width)
        self.context_embedder = nn.Linear(UNI["context"], width)
        self.transformer_blocks = nn.ModuleList(
            JointTransformerBlock(
                width, heads, width // heads, context_pre_only=False, qk_norm=qk_norm
            )
            for _ in range(UNI["depth"])
        )
        self.image_norm_out = AdaLayerNormContinuous(
            width, width, elementwise_affine=False, eps=1e-6
        )
        self.image_proj_out = nn.Linear(width, 64)
        self.text_norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.text_proj_out = nn.Linear(width, VOCABULARY)
        self.null_image_embd = nn.Parameter(torch.zeros(1, 8, width))
        self.siglip_adapter_img = Adapter(width, *UNI["aligned"])
        self.siglip_adapter_text = Adapter(width, *UNI["aligned"])

    def forward(self, latent, states, timestep, sources=(), middle=1):
        n, c = latent[0, 0].numel() // 4, self.time_text_embed(timestep)
        img = torch.cat([self.pos_embed(x) for x in (latent, *sources)], dim=1)
        txt = self.context_embedder(states)
        for i, block in enumerate(self.transformer_blocks):
            txt, img = block(hidden_states=img, encoder_hidden_states=txt, temb=c)
            if i + 1 == middle:
                mid_img, mid_txt = img[:, :n], txt
        g, u = self.image_norm_out(img[:, :n], c), self.text_norm_out(txt)
        h, w = latent.shape[2] // 2, latent.shape[3] // 2
        patches = self.image_proj_out(g).reshape(len(latent), h, w, 2, 2, 16)
        return {
            "velocity": torch.einsum("nhwpqc->nchpwq", patches).reshape(latent.shape),
            "logits": self.text_proj_out(u),
            "image features": g,
            "text features": u,
            "image tokens": mid_img,
            "text tokens": mid_txt,
            "image aligned": self.siglip_adapter_img(mid_img),
            "text aligned": self.siglip_adapter_text(mid_txt),
        }


def unialignment(names, answers):
    t5 = T5EncoderModel(T5Config(**T5)).eval()
    names["t5"] = {k: x for k, x in shapes_of(t5).items() if "embed_tokens" not in k}
    missing, _ = t5.load_state_dict(tensors(names["t5"]), strict=False)
    assert missing == ["encoder.embed_tokens.weight"]
    ids, latent = uniform("ids", (2, SLOTS)) * (VOCABULARY - 1), tensor("latent", (2, 16, 8, 12))
    states = t5(ids.long()).last_hidden_state
    answers["states"] = states
    sources, t = [tensor(f"source {i}", latent.shape) for i in range(3)], torch.tensor([0.25, 0.9])
    for case, qk_norm in (("published", None), ("normed", "rms_norm")):
        model = Joint(qk_norm).eval()
        names[case] = shapes_of(model)
        model.load_state_dict(tensors(names[case]), strict=True)
        for k in (0, 1, 3):
            out = model(latent, states, 1000 * t, sources[:k])
            answers[f"{case}/velocity/{k}"] = out["velocity"]
            for name in ("image features", "image tokens", "image aligned"):
                answers[f"{case}/{name}/{k}"] = out[name]
        out = model(latent, states, torch.zeros(2))
        for name in ("logits", "text features", "text tokens", "text aligned"):
            answers[f"{case}/{name}"] = out[name]
        if qk_norm is None:
            losses(model, t5, answers)
            pictures(model, t5, answers)
            text(model, t5, answers)


def losses(model, t5, answers):
    """As the training script computes them, on both passes of four rows."""
    z, e = tensor("x0", (4, 16, 8, 8)), tensor("noise", (4, 16, 8, 8))
    prompts, ids = ((uniform(name, (4, SLOTS)) * (VOCABULARY - 1)).long() for name in ("p", "w"))
    s = torch.tensor([0.1, 0.4, 0.7, 0.999])[:, None, None, None]
    t = 0.001 + 0.999 * torch.frac((uniform("r", (4,)) + torch.arange(4)) / 4)
    source, teacher = tensor("source", z.shape), [tensor(f"q{i}", (4, 28)) for i in range(2)]
    x_s = (1 - s) * z + s * e
    draw = model(x_s, t5(prompts).last_hidden_state, 1000 * s.flatten(), [source])
    image = (x_s - s * draw["velocity"] - z).square().mean()

    mask_id = VOCABULARY - 1
    hidden = uniform("hide", (4, SLOTS)) < 0.999 * t[:, None]
    read = model(z, t5(torch.where(hidden, mask_id, ids)).last_hidden_state, torch.zeros(4))
    logits = read["logits"].clone()
    logits[..., mask_id] -= 1e6
    log_p = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    sigma = -torch.log1p(-0.999 * t)
    weight = 0.999 / (1 - 0.999 * t) / torch.expm1(sigma)
    text = -(weight[:, None] * hidden * log_p).sum() / ids.numel()

    g, u = (F.normalize(x.mean(1), dim=1) for x in (draw["image features"], read["text features"]))
    scores = g @ u.T / 0.07
    contrast = (
        F.cross_entropy(scores, torch.arange(4)) + F.cross_entropy(scores.T, torch.arange(4))
    ) / 2
    aligned = sum(
        1 - F.cosine_similarity(x, q).mean()
        for x, q in zip((draw["image aligned"], read["text aligned"]), teacher)
    )
    answers["losses"] = torch.stack([image, text, contrast, aligned])
    answers["losses/t"], answers["losses/hidden"] = t, hidden


def pictures(model, t5, answers):
    """Drawing and editing in 4 steps with guidance 3; noise and posterior sample of one generator a row."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(16, 32, 64, 64), layers_per_block=2, latent_channels=16,
        norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
    vae.load_state_dict(tensors(shapes_of(vae)), strict=True)
    options = {
        "padding": "max_length",
        "max_length": SLOTS,
        "truncation": True,
        "return_tensors": "pt",
    }
    tokenizer = t5_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    ids = tokenizer(["on the left"] * 2 + PROMPTS, **options).input_ids
    answers["prompts/ids"], states = ids, t5(ids).last_hidden_state
    generators = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    noise = torch.stack([torch.randn(16, 6, 4, generator=g) for g in generators])
    image = tensor("image", (2, 3, 48, 32)).tanh()
    image = (image * 127.5 + 127.5).round() / 127.5 - 1
    posterior = vae.encode(image).latent_dist
    e = torch.stack([torch.randn(16, 6, 4, generator=g) for g in generators])
    source = (posterior.mean + posterior.std * e - 0.0609) * 1.5305
    for case, sources in (("draw", []), ("edit", [source.repeat(2, 1, 1, 1)])):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(4)
        z = noise
        for step in scheduler.timesteps:
            v = model(z.repeat(2, 1, 1, 1), states, step.expand(4), sources)["velocity"]
            null, cond = v.chunk(2)
            z = scheduler.step(null + 3 * (cond - null), step, z).prev_sample
        answers[f"pictures/{case}"] = vae.decode(z / 1.5305 + 0.0609).sample


def text(model, t5, answers):
    """The authors' sampler, with the draws of 6 steps recorded; the first row has a prompt."""
    latent, draws = tensor("latent", (2, 16, 8, 12)), uniform("draws", (6, 2, SLOTS, VOCABULARY))
    x = torch.full((2, SLOTS), VOCABULARY - 1)
    x[0, :3] = torch.tensor([4, 7, 9])

    def log_p(x):
        logits = model(latent, t5(x).last_hidden_state, torch.zeros(2))["logits"]
        logits[..., -1] -= 1e6
        logits = logits - logits.logsumexp(-1, keepdim=True)
        visible = x != VOCABULARY - 1
        logits[visible] = -1e6
        logits[visible, x[visible]] = 0
        return logits

    times, p = torch.linspace(1, 1e-5, 7), None
    for i in range(6):
        t, s = times[i], times[i] - (1 - 1e-5) / 6
        p = log_p(x).exp() if p is None else p
        weights = p * (t - s)
        weights[..., -1] = s
        new = (weights / (1e-10 - (draws[i] + 1e-10).log())).argmax(-1)
        new = torch.where(x == VOCABULARY - 1, new, x)
        p = None if not torch.equal(new, x) else p
        x = new
    answers["text"] = log_p(x).argmax(-1)


@torch.inference_mode()
def operations():
    """{family: operations} of one guided step at the sizes of SD3.5, on the meta device in bf16.

    Counted as operations.py says, and so is ours in test_device.py: both branches of guidance as one
    batch through the transformer, the guided velocity, and Euler's step on a latent in fp32.
    """
    counts = {}
    for family in ("SD3.5-medium", "SD3.5-large"):
        config = PUBLISHED[family]
        with torch.device("meta"):
            reference = SD3Transformer2DModel(
                sample_size=LATENT[1],
                num_layers=config.depth,
                attention_head_dim=config.head_dim,
                num_attention_heads=config.width // config.head_dim,
                joint_attention_dim=config.context_dim,
                caption_projection_dim=config.width,
                pooled_projection_dim=config.pooled_dim,
                pos_embed_max_size=config.positions,
                qk_norm="rms_norm",
                dual_attention_layers=config.dual,
            )
        reference = reference.to(torch.bfloat16).eval()
        latent, t = on_meta(1, *LATENT).float(), on_meta(2).float()
        context, pooled = on_meta(2, TOKENS, config.context_dim), on_meta(2, config.pooled_dim)
        with Operations() as counter:
            batch = latent.to(torch.bfloat16).repeat(2, 1, 1, 1)
            velocity = reference(batch, context, pooled, t, return_dict=False)[0].float()
            cond, null = velocity.chunk(2)
            latent = latent + 0.1 * (null + 4.5 * (cond - null))
        counts[family] = counter.count
    return counts


def write(name, names, answers):
    answers = {k: v.float().contiguous() for k, v in answers.items()}
    save_file(answers, GOLDEN / f"{name}.safetensors")
    (GOLDEN / f"{name}.json").write_text(json.dumps(names, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, makers in (
        ("golden", (mmdit, vae, flow, official)),
        ("unialignment", (unialignment,)),
    ):
        names, answers = {}, {}
        with torch.no_grad():
            for make in makers:
                make(names, answers)
        write(name, names, answers)
    (GOLDEN / "operations.json").write_text(json.dumps(operations()) + "\n")
