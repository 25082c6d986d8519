"""Dream Engine (arXiv 2502.20172): draw pictures from prompts that mix text and images.

    engine = DreamEngine.load()                       # the miniature
    engine.generate([["a red circle and a blue star"]])[0].save("out.png")

The LMM (Qwen2-VL) encodes the prompt once; the adapter turns its hidden states into txt and vec,
the inputs of the MM-DiT; `flow.euler` integrates noise to a latent; the VAE decodes the latent.
Precision: LMM and MM-DiT in `dtype` (fp32 on a CPU, bf16 on a GPU); all else in fp32.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from support.cli import UserError, check_finite, check_list

import torch
from safetensors.torch import save_file
from torch import nn

import flow
from adapter import Adapter, LoRALinear, add_lora, blend, lora_sites, merge_lora
from checkpoints import build_mmdit, check, fingerprint, load_mmdit, load_vae, read_tensors
from lmm import load_lmm
from prompts import apply_task, check_drawing, to_images
from support import fast
from support.files import prompt_row, whole
from trained import build_adapter, read_checkpoint

MINI = Path(__file__).parent / "weights" / "mini"
SD3, LMM = MINI / "sd3.5_mini.safetensors", MINI / "qwen2-vl-mini"
STAGE1, STAGE2 = MINI / "stage1.safetensors", MINI / "stage2.safetensors"


@dataclass
class Condition:
    """What the MM-DiT gets of B prompts."""

    txt: torch.Tensor  # (B, L, D)
    mask: torch.Tensor  # (B, L) bool, False at padding
    vec: torch.Tensor  # (B, D)

    @property
    def padding(self):
        """The mask, or None where nothing is padded."""
        return None if self.mask.all() else self.mask


class DreamEngine(nn.Module):
    """Everything between a prompt and a picture; frozen until `start_training`."""

    guidance = 4.5  # a checkpoint may state its own

    def __init__(self, lmm, adapter, mmdit, vae):
        """A Qwen2VL, an Adapter, an MMDiT and a VAE; raises UserError if they do not fit together."""
        super().__init__()
        if vae.config.latent_channels != mmdit.config.channels:
            has = f"the autoencoder has {vae.config.latent_channels} latent channels, the MM-DiT"
            needed = "--sd3 must be the model that the checkpoint was trained on"
            raise UserError(f"{has} {mmdit.config.channels}: {needed}")
        self.lmm, self.adapter, self.mmdit, self.vae = lmm, adapter, mmdit, vae
        self.parts = {}  # this loss has no parts to log
        self.base = {  # identifies the models that an adapter is trained for
            "base": fingerprint(mmdit.final_layer.linear.weight),
            "lmm": fingerprint(lmm.language_model.norm.weight),
        }

    @classmethod
    def load(
        cls, sd3=SD3, lmm=LMM, checkpoint=STAGE2, device=None, dtype=None,
        *, lora_scale=1.0, mrope=True, merge=True,
    ):  # fmt: skip
        """Load SD3.5 (single file or diffusers folder), Qwen2-VL (Hugging Face folder), an adapter.

        checkpoint: a file written by `save`, or its run folder; or a folder of the published
        DreamEngine, whose LMM and MM-DiT replace those of lmm and sd3; or None, for a new adapter.
        LoRA is merged into the weights; merge=False keeps our own LoRA separate, for more training.
        lora_scale: alpha / rank of the published LoRA (1 in the official demo, 2 in its training; the
        files do not say). mrope=False: positions as in early transformers. Raises FileNotFoundError or
        UserError.
        """
        device, dtype = fast.device_and_dtype(device, dtype)
        trained = None if checkpoint is None else read_checkpoint(checkpoint, lora_scale, dtype)
        if trained and trained.dit:
            mmdit = build_mmdit(trained.dit, trained.source, device, dtype)
        else:
            mmdit = load_mmdit(sd3, device, dtype)
        vae = load_vae(sd3, device)
        language = load_lmm(lmm, device, dtype, mrope, trained)
        ends = language, mmdit
        adapter = build_adapter(trained.adapter, *ends) if trained else new_adapter(*ends)
        engine = cls(language, adapter, mmdit, vae)
        if trained and trained.tensors:
            engine.guidance = trained.config.get("guidance", cls.guidance)
            engine.take_lora(trained)
            if merge:
                merge_lora(engine)
        return engine.requires_grad_(False).eval()

    def take_lora(self, trained):
        """Load the LoRA and adapter of a Checkpoint; UserError if it was trained on other models."""
        for part, name in (("base", "SD3"), ("lmm", "Qwen2-VL")):
            if not math.isclose(trained.config[part], self.base[part], rel_tol=1e-3):
                raise UserError(f"{trained.source}: was trained on another {name} than this one")
        tensors = trained.tensors
        paths = [path for path, _ in lora_sites(self) if f"lora.{path}.A" in tensors]
        if paths:
            rank = max([1, *tensors[f"lora.{paths[0]}.A"].shape[-2:-1]])
            add_lora(self, rank, trained.config["alpha"], paths)
        self.restore(trained.source, tensors)

    @property
    def device(self):
        return self.mmdit.pos_embed.device

    @property
    def default_size(self):
        """1024, or the largest side that the position table allows."""
        return min(1024, self.mmdit.config.largest)

    def condition(self, batch, r=0.0):
        """Batch -> Condition, with gradients. r in [0, 1]: a number, or (B,), one for each row."""
        hidden, vit = self.lmm(batch)
        hidden = blend(hidden, vit, batch.image_mask, r)
        txt, vec = self.adapter(hidden.float(), batch.mask)
        dtype = self.mmdit.pos_embed.dtype
        return Condition(txt.to(dtype), batch.mask, vec.to(dtype))

    @torch.no_grad()
    def encode(self, prompts, r=0.0):
        """Encode prompts, lists of strings and PIL images, exactly as given: no template is added."""
        condition = self.condition(self.lmm.collate(prompts).to(self.device), r)
        check_finite(self, "the condition (of LMM and adapter)", condition.txt, condition.vec)
        return condition

    @torch.inference_mode()
    def generate(
        self, prompts, steps=28, guidance=None, r=0.0, size=None,
        *, seed=0, task=None, progress=iter,
    ):  # fmt: skip
        """Draw one PIL image for each prompt, an interleaved list of strings and PIL images.

        guidance: None is the checkpoint's own. r: see `adapter.blend`. size: (width, height) in pixels,
        multiples of 16. task: one of prompts.TASKS. Image i uses seed + i, and is the same in any
        batch. progress wraps the steps. Raises UserError for an unfit prompt or setting.
        """
        width, height = size or (self.default_size, self.default_size)
        guidance = self.guidance if guidance is None else guidance
        check_list(prompts, str | list | tuple, "a list of prompts, one for each picture")
        rates = torch.as_tensor(r)
        if rates.shape not in ((), (len(prompts),)) or not ((rates >= 0) & (rates <= 1)).all():
            right = "from 0 (LMM) to 1 (ViT), one number or one for each prompt"
            raise UserError(f"blend must lie {right}, got {r}")
        check_drawing(steps, guidance, width, height, self.mmdit.config.largest)
        positives, nulls = zip(*(apply_task(task, prompt) for prompt in prompts))
        both = positives if guidance == 1 else positives + nulls
        condition = self.encode(both, rates.repeat(len(both) // len(prompts)) if rates.ndim else r)
        shape = (self.mmdit.config.channels, height // 8, width // 8)
        start = flow.noise(len(prompts), shape, seed)
        latent = denoise(self.mmdit, condition, start, steps, guidance, progress)
        check_finite(self, "the latent (of the MM-DiT)", latent)
        check_finite(self, "the picture (of the VAE)", picture := self.vae.decode(latent))
        return to_images(picture)

    def start_training(self, rank=None, alpha=None, lmm_lora=False, r=None):
        """Make the adapter trainable and, with a rank, LoRA on the MM-DiT (and the LMM).

        LoRA of a checkpoint is trained further; UserError if its rank or alpha differs. r: a number
        for all examples, or None to draw one for each. Returns the trainable {name: parameter}.
        """
        self.requires_grad_(False)
        self.adapter.requires_grad_(True)
        self.training_r = r
        kind = rank or 0, (rank or 0) if alpha is None else alpha
        parts = ("MM-DiT", self.mmdit, rank), ("LMM", self.lmm.language_model, lmm_lora)
        for name, model, wanted in parts:
            present = [m for m in model.modules() if isinstance(m, LoRALinear)]
            if wanted and not present:
                add_lora(model, *kind)
            for lora in present:
                if not wanted or (lora.rank, lora.alpha) != kind:
                    has = f"has LoRA on the {name} of rank {lora.rank}, alpha {lora.alpha:g}"
                    same = "ask for the same, with --stage 2 --rank --alpha (--lmm-lora)"
                    raise UserError(f"the checkpoint {has}: {same}")
                lora.A.requires_grad_(True)
                lora.B.requires_grad_(True)
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def training_noise(self, micro, generator):
        """The random draws of a Microbatch: noise (B, C, H/8, W/8), t (B,), and r (B,) from U(0, 1)."""
        rows, _, height, width = micro.target.shape
        shape = rows, self.mmdit.config.channels, height // 8, width // 8
        noise = torch.randn(shape, generator=generator)
        t, r = (
            flow.training_sigmas(rows, generator=generator),
            torch.rand(rows, generator=generator),
        )
        r = r if self.training_r is None else torch.full_like(r, self.training_r)
        return {"noise": noise, "t": t, "r": r}

    def forward(self, batch, image, noise, t, r, weighted=False):
        """The flow-matching loss of each image given its prompt: (B,) fp32.

        batch: the prompts; image (B, 3, H, W) in [-1, 1]; noise (B, C, H/8, W/8); t, r (B,) in
        [0, 1]. weighted: by t^2, as in the official code.
        """
        with torch.no_grad():
            x0 = self.vae.encode(image)
        condition = self.condition(batch, r)
        z = flow.add_noise(x0, noise, t).to(condition.txt.dtype)
        velocity = self.mmdit(z, t, condition.txt, condition.vec, condition.padding)
        return flow.velocity_loss(velocity, x0, noise, t if weighted else None)

    def tokens_of_example(self, picture, prompt):
        """Tokens of an example in the MM-DiT, given those of a picture and those of a prompt."""
        return picture + prompt

    def preview(self, task, prompt, target):
        """Draw a training example: (pictures, text), a row of `support.files.sheet`."""
        (drawn,) = self.generate([prompt], size=target.size, task=task)
        (*inputs, target), text = prompt_row(task, prompt, target)
        return [*inputs, drawn, target], text

    def learned(self):
        """The tensors of a checkpoint by name: the adapter, and LoRA if there is any."""
        return {
            name if name.startswith("adapter.") else f"lora.{name}": p.detach()
            for name, p in self.named_parameters()
            if name.startswith("adapter.") or name.endswith((".A", ".B"))
        }

    def save(self, file, **config):
        """Write `learned` and a config (stage, step, alpha ...) to one safetensors file."""
        with whole(file) as partial:
            save_file(self.learned(), partial, {"config": json.dumps({**config, **self.base})})

    def save_frozen(self, folder):
        """Write nothing: a checkpoint is loaded beside the frozen models it was trained with."""

    def restore(self, file, tensors=None):
        """Load what `save` wrote into an engine with the same trainable parameters."""
        tensors, learned = tensors or read_tensors(file), self.learned()
        check(tensors, learned, file)
        with torch.no_grad():
            for name, tensor in learned.items():
                tensor.copy_(tensors[name])


def new_adapter(lmm, mmdit, layers=2, mlp_dim=None):
    """An untrained Adapter; mlp_dim: its hidden units, by default 4 D, at most the official 4096."""
    width = mmdit.config.width
    hidden = mlp_dim or min(4096, 4 * width)
    adapter = Adapter(lmm.config.text_config.hidden_size, width, hidden, layers)
    return adapter.to(mmdit.pos_embed.device)


def denoise(mmdit, condition, noise, steps=28, guidance=4.5, progress=iter):
    """Sample latents (B, C, h, w) from noise, by Euler steps with classifier-free guidance.

    condition: of B prompts, then of their B null prompts; of B prompts alone: without guidance.
    """
    sigmas, mask = flow.sigma_schedule(steps), condition.padding
    copies = len(condition.vec) // len(noise)

    def velocity(z, t):
        z = z.to(condition.txt.dtype).repeat(copies, 1, 1, 1)
        v = mmdit(z, t, condition.txt, condition.vec, mask).float()
        return flow.guide(*v.chunk(2), guidance) if copies == 2 else v

    # `prepared` changes no result: flow.euler(velocity, ...) draws the same, a little slower
    with fast.prepared(mmdit, sigmas[:-1].tolist(), condition.vec) as prepared:
        return flow.euler(prepared(velocity), noise.to(condition.txt.device), sigmas, progress)
