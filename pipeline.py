"""UniAlignment's pipeline folder: what is in it, from files to models and back.

    transformer/  vae/  text_encoder/  tokenizer/  scheduler/        as published
    sampling.json                                                    ours: how it is used best

Beside a folder of SD3-medium transformer/ alone is enough. The VAE is read by `checkpoints.load_vae`.
"""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from checkpoints import (
    MMDIT_CONFIG,
    MMDIT_DIFFUSERS,
    VAE_DIFFUSERS,
    Layout,
    compare,
    empty,
    fill,
    find_part,
    infer_mmdit,
    read,
    read_config,
    read_json,
    stored,
    table,
)
from mmdit import Embedder, MMDiT
from support.cli import UserError, reading
from support.files import whole, write_json
from vae import SCALE, SHIFT

PARTS = {  # of a pipeline folder: where it lies in a folder of SD3-medium; None: nowhere
    "transformer": None,
    "vae": "vae",
    "text_encoder": "text_encoder_3",
    "tokenizer": "tokenizer_3",
    "scheduler": "scheduler",
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
MASK = "<extra_id_0>"  # the entry of T5's vocabulary that stands for a hidden token
NEGATIVE = (
    "low quality, blurry, low resolution, backlit, cartoon, animated, deformed, oversaturated, "
    "undersaturated, out of frame"
)


@dataclass(frozen=True)
class Sampling:
    """How a folder's weights are used best: its sampling.json; without one as the authors do."""

    slots: int = (
        256  # of every text: T5 and MM-DiT attend the padding too, so it is part of a prompt
    )
    size: int = 512  # side of a picture
    steps: int = 28
    guidance: float = 7.0
    negative: str = NEGATIVE
    text_steps: int = 32
    order: str = "sampled"  # see `masked.unmask`
    shift: float = 3.0  # of the noise levels; stands in scheduler/


def find_folder(folder, sd3, name):
    """Where a part of the pipeline lies; raises UserError if neither folder has it."""
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; expected a pipeline of UniAlignment")
    if (folder / name).is_dir():
        return folder / name
    if name == "transformer":
        return folder  # transformer/ itself, or its one file
    if sd3 and (found := Path(sd3, PARTS[name])).is_dir():
        return found
    where = (
        f"{sd3} no {PARTS[name]}/" if sd3 else "a folder of SD3-medium (--sd3) would complete it"
    )
    raise UserError(f"{folder}: holds no {name}/; {where}")


def read_sampling(folder, scheduler):
    """The Sampling of a pipeline folder: its sampling.json, and its scheduler's shift."""
    file, settings = Path(folder, "sampling.json"), Path(scheduler, "scheduler_config.json")
    stated = read_json(file) if file.is_file() else {}
    stated["shift"] = float(read_json(settings).get("shift", 3.0)) if settings.is_file() else 3.0
    with reading(file, "settings of sampling"):
        sampling = Sampling(**stated)
        for field in fields(sampling):
            value = getattr(sampling, field.name)
            if not isinstance(value, (int, float) if field.type is float else field.type):
                raise TypeError(f"{field.name} is {value!r}")
        if min(sampling.slots, sampling.steps, sampling.text_steps, sampling.size // 16) < 1:
            raise ValueError("slots, steps and size must be positive")
    if not 0 < sampling.shift < 1000:
        raise UserError(f"{settings}: shift {sampling.shift} of the noise levels")
    return sampling


# ---- the transformer ----------------------------------------------------------------------------


class RoundedEmbedder(Embedder):
    """The sinusoid of t passes through float16, as where the published weights were trained."""

    def forward(self, x):
        return super().forward(x.half().to(x.dtype))


class Transformer(MMDiT):
    """SD3's MM-DiT with a head for text, null image tokens, and what aligns it with a teacher."""

    def __init__(self, config, vocabulary, null_tokens=8, aligned=None, rounded=True):
        """aligned: (hidden units, M) of the two adapters that only training needs, or None."""
        super().__init__(config)
        self.rounded = rounded
        if rounded:
            self.t_embedder = RoundedEmbedder(256, config.width)
        self.text_head = nn.Linear(config.width, vocabulary)
        self.null_image = nn.Parameter(torch.zeros(1, null_tokens, config.width))  # never used
        if aligned:
            self.image_adapter = align_adapter(config.width, *aligned)
            self.text_adapter = align_adapter(config.width, *aligned)

    @classmethod
    @torch.no_grad()
    def grow(cls, base, vocabulary):
        """From SD3's MM-DiT, fp32; with a vec of zero it draws the same, as all new gates are zero."""
        config = replace(base.config, pooled_dim=None, text_out=True)
        model = cls(config, vocabulary, rounded=False)
        new = model.joint_blocks[-1].context_block.adaLN_modulation[1]
        for parameter in (new.weight, new.bias):
            parameter.zero_()
        model.null_image.normal_(std=config.width**-0.5)
        state = model.state_dict()
        for name, tensor in base.state_dict().items():
            if name in state:  # of that layer SD3 has the first two of six chunks
                state[name][: len(tensor)] = tensor.float().cpu()
        return model.to(base.pos_embed.device)

    def align(self, out):
        """Have adapters to a teacher of width M = out; new ones where there are none of it."""
        width = self.config.width
        if not hasattr(self, "image_adapter") or self.image_adapter[2].out_features != out:
            hidden = min(2048, 4 * width)
            self.image_adapter = align_adapter(width, hidden, out).to(self.pos_embed.device)
            self.text_adapter = align_adapter(width, hidden, out).to(self.pos_embed.device)


def align_adapter(width, hidden, out):
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, out), nn.SiLU())


_OWN = """
    final_layer.adaLN_modulation.1.*  image_norm_out.linear.*
    final_layer.linear.*              image_proj_out.*
    text_head.*                       text_proj_out.*
    null_image                        null_image_embd
    image_adapter.*                   siglip_adapter_img.fc.*
    text_adapter.*                    siglip_adapter_text.fc.*
"""
# Of the layers that diffusers stores as (scale, shift) only the final one is left.
LAYOUT = Layout(table(_OWN) + MMDIT_DIFFUSERS, swapped=r"final_layer\.adaLN_modulation\.1\.\w+")


def load_transformer(path, device="cpu", dtype=torch.float32):
    """The Transformer of a published transformer/ or of a training script's one file, strictly.

    Raises FileNotFoundError, or UserError naming the tensors that do not fit.
    """
    stated = read_config(path) if Path(path).is_dir() else {}
    part = find_part(read(path), path, ("",), {"transformer_blocks.": LAYOUT})
    if part is None or part.shape("text_head.weight") is None:
        raise UserError(f"{path}: holds no transformer of UniAlignment (text_proj_out.weight)")
    config = infer_mmdit(part, {**stated, "pooled_projection_dim": None}, pooled=False)
    aligned = None
    if part.shape("image_adapter.0.weight"):
        aligned = [part.dimension(f"image_adapter.{i}.weight", 0) for i in (0, 2)]
    sizes = part.dimension("text_head.weight", 0), part.dimension("null_image", 1), aligned
    rounded = stated.get("float16_time", True)
    config = replace(config, text_out=True)
    model = empty(Transformer, path, config, *sizes, rounded)
    compare(path, stated, transformer_config(model))
    return fill(model, part, device, dtype)


def transformer_config(model):
    """What a config.json of the authors states beside what SD3's does."""
    config = model.config
    return {
        "vocab_size": model.text_head.out_features,
        "num_attention_heads": config.width // config.head_dim,
        "caption_projection_dim": config.width,
        "out_channels": config.channels,
        "qk_norm": "rms_norm" if config.qk_norm else None,
        "dual_attention_layers": list(config.dual),
        "float16_time": model.rounded,  # ours; published ones do not say it
    }


def save_transformer(model, folder):
    """Write config.json and the weights in the published names."""
    stated = {name: getattr(model.config, field) for name, field in MMDIT_CONFIG.items()}
    stated |= transformer_config(model) | {"pooled_projection_dim": 2048}
    write_json(folder / "config.json", {"_class_name": "SD3JointModelFlexible", **stated})
    with whole(folder / WEIGHTS) as partial:
        save_file(stored(model, LAYOUT), partial)


# ---- T5 -----------------------------------------------------------------------------------------

_T5 = Layout(table("encoder.embed_tokens.weight  shared.weight"))


def load_text_encoder(folder, device="cpu", dtype=torch.float32):
    """The encoder of a T5, through transformers but filled strictly."""
    file = Path(folder, "config.json")
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no config.json; expected the folder of a T5 encoder")
    if (kind := read_json(file).get("model_type")) != "t5":
        raise UserError(f"{file}: model_type is {str(kind)[:40]!r}; expected 't5'")
    with reading(file, "the config of a T5"):
        config = T5Config.from_pretrained(folder)
    part = find_part(read(folder), folder, ("",), {"encoder.block.": _T5})
    if part is None:
        raise UserError(f"{folder}: holds no T5 encoder (encoder.block.*)")
    if (layers := part.count(r"encoder\.block")) != config.num_layers:
        raise UserError(f"{file}: num_layers is {config.num_layers}, the tensors have {layers}")
    embeddings = part.tensors.pop("encoder.embed_tokens.weight", None)
    part.tensors.setdefault("shared.weight", embeddings)  # a file may keep either name, or both
    if dtype == torch.float16:
        dtype = torch.bfloat16  # T5's states run over in float16
    model = fill(empty(T5EncoderModel, folder, config), part, device, dtype)
    model.encoder.set_input_embeddings(model.shared)  # one table again
    return model


TOKENIZERS = ("tokenizer.json", "spiece.model")


class Tokens:
    """T5's tokenizer as UniAlignment knows it: rows of so many slots, ended and padded with EOS."""

    def __init__(self, tokenizer, slots):
        self.tokenizer, self.slots, self.end = tokenizer, slots, tokenizer.eos_token_id
        self.mask_id = tokenizer.convert_tokens_to_ids(MASK)
        self.special = {self.mask_id, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}

    def ids(self, text):
        """Its ids as a list; the name of a special token in a text is left out."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return [i for i in ids if i not in self.special]

    def __call__(self, texts):
        """Texts -> ids (B, L), cut to leave one EOS at least."""
        rows = [(self.ids(text)[: self.slots - 1] + [self.end] * self.slots) for text in texts]
        return torch.tensor([row[: self.slots] for row in rows])

    def about(self, question=None, text=None):
        """A caption, or the answer to a question, as ids (L,), and which slots hold it, (L,) bool.

        Without a text MASK stands in these slots. Raises UserError where the question leaves none.
        """
        asked = self.ids(f"Q: {question.strip()} A:") if question else []
        if len(asked) >= self.slots:
            raise UserError(
                f"a question that fills all {self.slots} slots leaves no room to answer"
            )
        room = self.slots - len(asked)
        row = [self.mask_id] * room
        if text is not None:
            row = self.ids(text)[: room - 1] + [self.end] * room
        return torch.tensor(asked + row[:room]), torch.arange(self.slots) >= len(asked)

    def text(self, ids):
        """ids -> the text, without the EOS that end it and pad it."""
        return self.tokenizer.decode(ids[ids != self.end]).strip()


def load_tokenizer(folder):
    """The tokenizer of a T5, with its entry for MASK."""
    if not any(Path(folder, name).is_file() for name in TOKENIZERS):
        raise FileNotFoundError(f"{folder}: no tokenizer (tokenizer.json or spiece.model)")
    with reading(folder, "the tokenizer of a T5"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer.encode("a", split_special_tokens=True, add_special_tokens=False)
        if MASK not in tokenizer.get_vocab() or tokenizer.eos_token_id is None:
            raise ValueError(f"it has no {MASK}, or no end of text")
    return tokenizer


def tokenizer_of(text_encoder):
    """The folder of the tokenizer that belongs to a T5: its own, or the one beside it."""
    folder = Path(text_encoder)
    beside = [folder.with_name(name) for name in ("tokenizer_3", "tokenizer")]
    found = [f for f in (folder, *beside) if any((f / name).is_file() for name in TOKENIZERS)]
    return found[0] if found else folder


def read_vector(file, width):
    """The one tensor (width,) of a file: what T5 shall see where a token is masked."""
    with reading(file, f"one tensor of {width} numbers"):
        vector = torch.load(file, map_location="cpu", weights_only=True)
        if vector.numel() != width:
            raise ValueError(f"it has {vector.numel()}")
    return vector.flatten()


# ---- the rest -----------------------------------------------------------------------------------


def save_settings(sampling, folder):
    """Write scheduler/ and sampling.json."""
    sampling = asdict(sampling)
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": sampling.pop("shift")}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "sampling.json", sampling)


def save_vae(vae, folder):
    """Write the autoencoder as diffusers does."""
    config = vae.config
    levels = len(config.multipliers)
    tensors = stored(vae, Layout(VAE_DIFFUSERS, levels=levels))
    for name, x in tensors.items():
        if ".attentions." in name and x.ndim == 4:  # 1x1 convolutions, there plain matrices
            tensors[name] = x.flatten(1)
    stated = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [config.base * m for m in config.multipliers],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.blocks,
        "norm_num_groups": config.groups,
        "scaling_factor": SCALE,
        "shift_factor": SHIFT,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    write_json(folder / "config.json", stated)
    with whole(folder / WEIGHTS) as partial:
        save_file(tensors, partial)
