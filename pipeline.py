"""What a pipeline folder of UniAlignment holds beside its transformer: T5, tokenizer, VAE, settings.

    transformer/  vae/  text_encoder/  tokenizer/  scheduler/        as published
    sampling.json                                                    ours: how it is used best

Beside a folder of SD3-medium transformer/ alone is enough.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from checkpoints import (
    VAE_DIFFUSERS,
    Layout,
    empty,
    fill,
    find_part,
    read,
    read_json,
    stored,
    table,
)
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


# ---- T5 ----------------------------------------------------------------------------------------

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


def load_tokenizer(folder):
    """The tokenizer of a T5, with its entry for MASK."""
    if not any(Path(folder, name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise FileNotFoundError(f"{folder}: no tokenizer (tokenizer.json or spiece.model)")
    with reading(folder, "the tokenizer of a T5"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer.encode("a", split_special_tokens=True, add_special_tokens=False)
        if MASK not in tokenizer.get_vocab() or tokenizer.eos_token_id is None:
            raise ValueError(f"it has no {MASK}, or no end of text")
    return tokenizer


def read_vector(file, width):
    """The one tensor (width,) of a file: what T5 shall see where a token is masked."""
    with reading(file, f"one tensor of {width} numbers"):
        vector = torch.load(file, map_location="cpu", weights_only=True)
        if vector.numel() != width:
            raise ValueError(f"it has {vector.numel()}")
    return vector.flatten()


# ---- the autoencoder ----------------------------------------------------------------------------


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
