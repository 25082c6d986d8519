"""Dream Engine (arXiv 2502.20172): an interleaved prompt of text and images draws a picture.

    engine = DreamEngine.load()                       # the miniature
    engine.generate([["a red circle and a blue star"]])[0].save("out.png")

The LMM (Qwen2-VL) reads the prompt once; `adapter.py` turns its states into what the MM-DiT takes;
`flow.py` walks from noise to a latent; the VAE decodes it. Precision: LMM and MM-DiT in `dtype`
(fp32 on CPU, bf16 on CUDA); adapter, VAE, the sampler's latents and all times in fp32.
"""

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

import flow
import mmdit
import weights
from adapter import Adapter, LoRALinear, add_lora, blend, merge_lora
from prompts import PatchConfig, apply_task, collate, to_images
from vae import load_vae

MINI = Path(__file__).parent / "weights" / "mini"
SD3, LMM = MINI / "sd3.5_mini.safetensors", MINI / "qwen2-vl-mini"
STAGE1, STAGE2 = MINI / "stage1.safetensors", MINI / "stage2.safetensors"


@dataclass
class Condition:
    """What the MM-DiT knows of B prompts."""

    txt: torch.Tensor  # (B, L, D)
    mask: torch.Tensor  # (B, L) bool, False at padding
    vec: torch.Tensor  # (B, D)

    def first(self, n):
        """The first n of the prompts."""
        return Condition(self.txt[:n], self.mask[:n], self.vec[:n])


class DreamEngine(nn.Module):
    """Everything between a prompt and a picture. `start_training` says what learns; else nothing."""

    def __init__(self, lmm, tokenizer, patches, adapter, transformer, vae, mrope=True):
        super().__init__()
        self.lmm, self.tokenizer, self.patches, self.mrope = lmm, tokenizer, patches, mrope
        self.adapter, self.mmdit, self.vae = adapter, transformer, vae

    @classmethod
    def load(
        cls,
        sd3=SD3,
        lmm=LMM,
        checkpoint=STAGE2,
        device=None,
        dtype=None,
        lora_scale=1.0,
        mrope=True,
        merge=True,
        layers=2,
        mlp_dim=None,
        low_memory=False,
        compile=False,
    ):
        """Load SD3.5 (single file or diffusers folder), Qwen2-VL (Hugging Face folder), an adapter.

        checkpoint: a file of `save` or the run folder that holds it; its LoRA is merged into the
        weights, or kept apart with merge=False, to train on. Or a folder of the published
        DreamEngine, whose LMM and MM-DiT then replace those of lmm and sd3, with lora_scale * B A
        added to their weights (1 as in the official demo, 2 as in its training; the files do not
        say). None starts a new adapter, of so many layers of mlp_dim hidden units. mrope=False counts
        positions as early transformers did. low_memory: see `save_memory`; compile: see
        `MMDiT.compile_blocks`. Raises FileNotFoundError or ValueError, with one line that says what
        does not fit.
        """
        target = usable_device(device)
        dtype = dtype or (torch.float32 if target.type == "cpu" else torch.bfloat16)
        device = "cpu" if low_memory else target
        config = lmm_config(lmm)
        if checkpoint is not None and (own := sorted(Path(checkpoint).glob("stage?.safetensors"))):
            checkpoint = own[-1]
        if checkpoint is not None and Path(checkpoint).is_dir():
            parts = read_official(checkpoint, lora_scale)
            transformer = mmdit.build(parts["dit"], checkpoint, device, dtype)
            language = build_lmm(config, parts["lmm"], checkpoint, device, dtype)
        else:
            parts = {"adapter": None}
            transformer = mmdit.load_mmdit(sd3, device, dtype)
            language = build_lmm(config, weights.read(lmm), lmm, device, dtype)
        base = {"base": fingerprint(transformer), "lmm": lmm_fingerprint(language)}
        if checkpoint is not None and parts["adapter"] is None:
            parts = read_checkpoint(checkpoint, base)
        shape = config.text_config.hidden_size, transformer.config.width
        if parts["adapter"] is None:
            # The official number of hidden units, fewer before an MM-DiT under 1024 wide.
            adapter = Adapter(*shape, mlp_dim or min(4096, 4 * shape[1]), layers).to(device)
        else:
            adapter = build_adapter(parts["adapter"], shape, checkpoint, device)
        vae = load_vae(sd3, device)
        tokenizer, patches = load_tokenizer(lmm), patch_config(lmm)
        engine = cls(language, tokenizer, patches, adapter, transformer, vae, mrope)
        engine.base = base
        if parts.get("lora"):
            engine.load_lora(parts["lora"], parts["alpha"], checkpoint)
            if merge:
                merge_lora(engine.mmdit)
                merge_lora(engine.lmm)
        if low_memory:
            engine.save_memory(target)
        if compile:
            engine.mmdit.compile_blocks()
        return engine

    def save_memory(self, device):
        """Put on the device only what every step of the sampler needs; all else visits it for a call.

        Of SD3.5-large that is two thirds, as the modulations are made once a picture. Nothing that is
        drawn changes; what the engine cannot do any more is learn.
        """
        once = [self.adapter, self.vae.encoder, self.vae.decoder, *self.mmdit.before_sampling()]
        once += [part for part in self.lmm.modules() if not list(part.children())]
        for part in once:
            weights.visit(part, device)
        visiting = {inner for part in once for inner in part.modules()}
        for part in self.mmdit.modules():
            if part not in visiting:
                weights.settle(part, device)

    @property
    def device(self):
        return self.mmdit.x_embedder.proj.weight.device

    @property
    def default_size(self):
        """1024, or all that a smaller position table holds."""
        return min(1024, 8 * self.mmdit.config.patch * self.mmdit.config.positions)

    def lmm_states(self, batch):
        """A Batch -> the LMM's last states (B, L, M), after its final norm, and the ViT's (n, M).

        The ViT runs once: its merged features are the LMM's image tokens and the blend's h_ViT.
        """
        language = self.lmm.language_model
        embeddings = language.embed_tokens(batch.ids)
        vit = embeddings.new_zeros(0, embeddings.shape[-1])
        if len(batch.grids):
            vit = self.lmm.visual(batch.patches.to(embeddings.dtype), batch.grids).pooler_output
            embeddings[batch.image_mask] = vit
        states = language(
            inputs_embeds=embeddings,
            attention_mask=batch.mask.long(),
            position_ids=batch.positions,
            use_cache=False,
        )
        return states.last_hidden_state, vit

    def condition(self, batch, r=0.0):
        """A Batch and r in [0, 1], a number or one a row -> Condition; what learns gets gradients."""
        hidden, vit = self.lmm_states(batch)
        hidden = blend(hidden, vit, batch.image_mask, r)
        txt, vec = self.adapter(hidden.float(), batch.mask)
        dtype = self.mmdit.pos_embed.dtype
        return Condition(txt.to(dtype), batch.mask, vec.to(dtype))

    def collate(self, prompts):
        """Prompts, templates applied, as a Batch on the engine's device."""
        return collate(prompts, self.tokenizer, self.patches, self.mrope).to(self.device)

    @torch.no_grad()
    def encode(self, prompts, r=0.0):
        """Prompts, each a list of strings and PIL images exactly as the LMM shall read them."""
        return self.condition(self.collate(prompts), r)

    @torch.inference_mode()
    def generate(
        self,
        prompts,
        steps=28,
        guidance=4.5,
        r=0.0,
        size=None,
        seed=0,
        task=None,
        progress=iter,
        null_guidance=1.0,
        interval=(0.0, 1.0),
    ):
        """Draw one PIL image for each prompt, an interleaved list of strings and PIL images.

        size: (width, height) in pixels, multiples of 16. Image i is drawn from seed + i, the same
        alone as in any batch. task: one of prompts.TASKS. r: see `adapter.blend`. progress wraps the
        steps, tqdm for one. null_guidance: of what the null prompt still holds, the picture of an
        edit or the text around pictures of objects; see `flow.guide`. interval: the lowest and highest
        t that are guided (arXiv 2404.07724); at others the prompt alone is at work, as with guidance 1.
        Raises ValueError for settings that cannot be drawn.
        """
        width, height = size or (self.default_size, self.default_size)
        self.check(steps, guidance, r, width, height, null_guidance, interval)
        if not prompts:
            raise ValueError("no prompt to draw")
        positives, nulls = zip(*(apply_task(task, prompt) for prompt in prompts))
        n = len(prompts)
        if null_guidance != 1:
            told = [*positives, *nulls, *[["Generate Image: "]] * n]
        else:
            told = [*positives, *nulls] if guidance != 1 else positives  # at 1 it cancels out
        condition = self.encode(told, r)
        shape = (self.mmdit.config.channels, height // 8, width // 8)
        start = noise(n, shape, seed)
        guiding = guidance, null_guidance, interval
        latent = denoise(self.mmdit, condition, start, steps, *guiding, progress)
        return to_images(self.vae.decode(latent))

    def check(self, steps, guidance, r, width, height, null_guidance=1.0, interval=(0.0, 1.0)):
        """Raise ValueError, naming what is wrong and what would be right, before any long work."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        for strength in (guidance, null_guidance):
            if not abs(strength) < float("inf"):
                raise ValueError(f"guidance must be a finite number, got {strength}")
        if not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(
                f"guidance interval must rise within 0 to 1, got {interval[0]} to {interval[1]}"
            )
        if not 0 <= r <= 1:
            raise ValueError(f"blend must lie between 0 (LMM) and 1 (ViT), got {r}")
        largest = 8 * self.mmdit.config.patch * self.mmdit.config.positions
        for side in (width, height):
            if side % 16 or not 16 <= side <= largest:
                near = min(max(round(side / 16) * 16, 16), largest)
                limit = f"multiples of 16 up to {largest}"
                raise ValueError(f"size {width}x{height}: sides must be {limit}; nearest is {near}")

    # ---- training ----

    def start_training(self, rank=None, alpha=None, lmm_lora=False):
        """Let the adapter learn, with a rank also LoRA on the MM-DiT (and LMM); all else is frozen.

        LoRA that a checkpoint brought goes on learning; ValueError if it is of another kind. Returns
        the parameters that learn, by name.
        """
        self.requires_grad_(False)
        self.adapter.requires_grad_(True)
        for name, model, wanted in (
            ("MM-DiT", self.mmdit, bool(rank)),
            ("LMM", self.lmm.language_model, lmm_lora),
        ):
            brought = [m for m in model.modules() if isinstance(m, LoRALinear)]
            if wanted and not brought:
                add_lora(model, rank, alpha)
            for lora in brought:
                has, asked = (lora.rank, lora.alpha), (rank, rank if alpha is None else alpha)
                if not wanted or has != asked:
                    raise ValueError(
                        f"the checkpoint has LoRA on the {name} of rank {has[0]}, alpha {has[1]:g}: "
                        "ask for the same, with --stage 2 --rank --alpha (--lmm-lora)"
                    )
                lora.A.requires_grad_(True)
                lora.B.requires_grad_(True)
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, batch, image, noise, t, r, weighted=False):
        """The flow-matching loss of drawing each image from its prompt: (B,) fp32.

        batch: the prompts; image (B, 3, H, W) in [-1, 1]; noise (B, C, H/8, W/8); t, r (B,) in
        [0, 1]. weighted: by t^2, as in the official code.
        """
        with torch.no_grad():
            x0 = self.vae.encode(image)
        condition = self.condition(batch, r)
        z = flow.add_noise(x0, noise, t).to(condition.txt.dtype)
        velocity = self.mmdit(z, t, condition.txt, condition.vec, condition.mask)
        return flow.velocity_loss(velocity, x0, noise, t if weighted else None)

    def learnt(self):
        """What a checkpoint holds: the adapter, and LoRA if there is any, by name."""
        return {
            name if name.startswith("adapter.") else f"lora.{name}": p.detach()
            for name, p in self.named_parameters()
            if name.startswith("adapter.") or name.endswith((".A", ".B"))
        }

    def save(self, file, **facts):
        """Write what was learnt, and facts such as stage, step and alpha, to one safetensors file."""
        config = {**facts, **self.base}
        partial = Path(file).with_suffix(".partial")
        save_file(self.learnt(), partial, {"config": json.dumps(config)})
        os.replace(partial, file)

    def restore(self, file):
        """Take back what `save` wrote, into an engine that trains the same."""
        tensors, own = weights.read(file), self.learnt()
        weights.check(tensors, own, file)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])

    def load_lora(self, tensors, alpha, source):
        """Wrap what tensors, named as in a checkpoint, are the LoRA of, and fill it; frozen."""
        (rank,) = {t.shape[1] for name, t in tensors.items() if name.endswith(".A")}
        for path in ("mmdit", "lmm.language_model"):
            if any(name.startswith(path) for name in tensors):
                add_lora(self.get_submodule(path), rank, alpha)
        own = {k: p for k, p in self.state_dict().items() if k.endswith((".A", ".B"))}
        weights.check(tensors, own, source)
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
        self.mmdit.requires_grad_(False)
        self.lmm.requires_grad_(False)


def noise(n, shape, seed):
    """Gaussian noise (n, *shape), fp32 on the CPU; row i depends on seed + i alone."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(n)]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def denoise(
    transformer, condition, noise, steps=28, guidance=4.5, null_guidance=1.0, interval=(0.0, 1.0),
    progress=iter,
):  # fmt: skip
    """Noise (B, C, h, w) -> latent, by Euler's method with classifier-free guidance.

    condition holds the B prompts, their B null prompts unless guidance is 1, and B empty prompts if
    null_guidance is not. Outside interval the B prompts alone are at work.
    """
    n, sigmas = len(noise), flow.sigma_schedule(steps)
    h, w = (side // transformer.config.patch for side in noise.shape[2:])
    given = {}  # to the transformer, at each t
    for rows, is_guided in ((condition, True), (condition.first(n), False)):
        times = [t for t in sigmas[:-1].tolist() if (interval[0] <= t <= interval[1]) == is_guided]
        if times:
            prepared = transformer.prepare(times, rows.vec, rows.mask, h, w)
            given |= {t: (rows, at_t) for t, at_t in zip(times, prepared)}

    def velocity(z, t):
        rows, prepared = given[t]
        copies = len(rows.vec) // n
        z = z.to(rows.txt.dtype).repeat(copies, 1, 1, 1)
        v = transformer(z, t, rows.txt, rows.vec, prepared=prepared)
        if copies == 1:
            return v
        cond, null, *empty = v.float().chunk(copies)
        return flow.guide(cond, null, guidance, *empty, null_guidance=null_guidance)

    return flow.euler(velocity, noise.to(condition.txt.device), sigmas, progress)


# ---- loading ------------------------------------------------------------------------------------


def usable_device(name=None):
    """A device by name, checked; None means CUDA where there is a GPU, else the CPU.

    Under torchrun "cuda" is the process's own GPU.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device {name}: not usable on this machine; try cpu") from None
    return torch.device(name)


def lmm_config(folder):
    """The configuration of a Qwen2-VL folder, which must be one."""
    file = Path(folder, "config.json")
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no config.json; expected a Qwen2-VL folder")
    try:
        kind = json.loads(file.read_text()).get("model_type")
    except (ValueError, AttributeError):
        raise ValueError(f"{file}: not a JSON configuration") from None
    if kind != "qwen2_vl":
        raise ValueError(f"{file}: model_type is {kind!r}; expected 'qwen2_vl'")
    return Qwen2VLConfig.from_pretrained(folder)


def load_tokenizer(folder):
    """The tokenizer of a Qwen2-VL folder, with its vision tokens."""
    if not any(Path(folder, name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileNotFoundError(
            f"{folder}: no tokenizer (tokenizer.json, or vocab.json and merges.txt)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - tokenizers raises bare exceptions
        raise ValueError(
            f"{folder}: damaged tokenizer ({str(error).splitlines()[0][:120]})"
        ) from None
    for token in ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"):
        if token not in tokenizer.get_vocab():
            raise ValueError(f"{folder}: the tokenizer has no {token}; expected Qwen2-VL's")
    return tokenizer


def patch_config(folder):
    """Image sizes for this LMM; never more than 512 tokens an image, as in the official code."""
    file, config = Path(folder, "preprocessor_config.json"), PatchConfig()
    if not file.is_file():
        return config
    given = json.loads(file.read_text())
    return replace(
        config,
        patch=given.get("patch_size", config.patch),
        merge=given.get("merge_size", config.merge),
        min_pixels=given.get("min_pixels", config.min_pixels),
        max_pixels=min(given.get("max_pixels", config.max_pixels), config.max_pixels),
    )


def build_lmm(config, tensors, source, device, dtype):
    """Qwen2-VL without its LM head, from tensors under the names of any transformers version.

    transformers would start missing tensors at random, with a warning; here they are an error.
    """
    rules = [
        (r"(?:model\.)?(visual\..*)", r"\1"),
        (r"model\.(language_model\..*)", r"\1"),
        (r"model\.((?:embed_tokens|layers|norm)\..*)", r"language_model.\1"),
    ]
    tensors = weights.rename(tensors, rules)
    tensors.pop("lm_head.weight", None)  # no logits are ever needed
    with torch.device("meta"):
        model = Qwen2VLModel(config)
    weights.fill(model, tensors, source, device, dtype)
    # Rotary frequencies are computed, not stored; they stay fp32.
    vision, text = model.visual, model.language_model
    vision.rotary_pos_emb = type(vision.rotary_pos_emb)(config.vision_config).to(device)
    text.rotary_emb = type(text.rotary_emb)(config.text_config).to(device)
    return model


def build_adapter(tensors, widths, source, device):
    """An Adapter for (LMM width, MM-DiT width), filled with tensors, which tell its own shape."""
    layers = sum(bool(re.fullmatch(r"txt\.\d+\.weight", name)) for name in tensors)
    try:
        mlp_dim, lmm_width = tensors["txt.0.weight"].shape
        width = len(tensors[f"txt.{2 * layers - 2}.bias"])
    except (KeyError, ValueError):
        raise ValueError(f"{source}: holds no adapter (adapter.txt.*, adapter.vec.*)") from None
    if (lmm_width, width) != widths:
        raise ValueError(
            f"{source}: this adapter joins an LMM {lmm_width} wide to an MM-DiT {width} wide; "
            f"the models given are {widths[0]} and {widths[1]} wide"
        )
    with torch.device("meta"):
        adapter = Adapter(*widths, mlp_dim, layers)
    return weights.fill(adapter, tensors, source, device, torch.float32)


def fingerprint(transformer):
    """A number that tells one trained MM-DiT from another, in any dtype."""
    return round(transformer.final_layer.linear.weight.float().norm().item(), 4)


def lmm_fingerprint(lmm):
    """The same for an LMM."""
    return round(lmm.language_model.norm.weight.float().norm().item(), 4)


def read_checkpoint(file, base):
    """A file of `DreamEngine.save` as {"adapter", "lora", "alpha"}; made for these very models.

    base: {"base": fingerprint, "lmm": fingerprint}.
    """
    tensors = weights.read(file)
    if Path(file).suffix != ".safetensors" or "config" not in (facts := weights.metadata(file)):
        raise ValueError(f"{file}: not a Dream Engine checkpoint (no config in its metadata)")
    unknown = [k for k in tensors if not k.startswith(("adapter.", "lora."))]
    if unknown:
        raise ValueError(f"{file}: unknown {unknown[0]}; expected adapter.* and lora.* only")
    config = json.loads(facts["config"])
    for part, name in (("base", "SD3"), ("lmm", "Qwen2-VL")):
        if abs(config.get(part, 0) - base[part]) > 1e-3 * base[part]:
            raise ValueError(f"{file}: was trained on another {name} than the one given")
    parts = {part: weights.cut(tensors, f"{part}.") for part in ("adapter", "lora")}
    return {**parts, "alpha": config.get("alpha")}


# In the published checkpoint, but without effect in the official forward.
IGNORED = r"norm_lmm_out\.weight|pooled_proj\.(weight|bias)|lmm\.lm_head\.weight"


def read_official(folder, lora_scale=1.0):
    """A published DreamEngine checkpoint as {"lmm", "dit", "adapter"}: tensors, LoRA merged."""
    merged, tensors = {}, weights.read(folder)
    for name, tensor in tensors.items():
        if re.fullmatch(IGNORED, name) or re.search(r"\.lora_[AB]\.default\.weight$", name):
            continue
        path, is_wrapped, kind = name.rpartition(".base_layer.")
        if is_wrapped:
            if kind == "weight":
                try:
                    a, b = (tensors[f"{path}.lora_{x}.default.weight"] for x in "AB")
                except KeyError:
                    raise ValueError(f"{folder}: missing the LoRA of {path}") from None
                tensor = (tensor.float() + lora_scale * b.float() @ a.float()).to(tensor.dtype)
            name = f"{path}.{kind}"
        merged[name] = tensor
    rules = [
        (r"input_embeds_align_mlp\.(.*)", r"adapter.txt.\1"),
        (r"condition_embeds_align_mlp\.(.*)", r"adapter.vec.\1"),
    ]
    merged = weights.rename(merged, rules)
    parts = {part: weights.cut(merged, f"{part}.") for part in ("lmm", "dit", "adapter")}
    known = {f"{part}.{name}" for part, names in parts.items() for name in names}
    if unknown := sorted(merged.keys() - known):
        raise ValueError(f"{folder}: not a DreamEngine checkpoint: unknown {unknown[0]}")
    return parts
