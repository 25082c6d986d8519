"""Load trained checkpoints: this project's own files, and the published DreamEngine folder."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from support.cli import UserError, reading

import torch

from adapter import Adapter
from checkpoints import (
    Part,
    build,
    key_map,
    metadata,
    part_folder,
    read_json,
    read_tensors,
    refuse_foreign,
)


@dataclass
class Checkpoint:
    """A trained adapter. Our files add a config and LoRA, the published folder LMM and MM-DiT."""

    source: Path
    adapter: Part
    config: dict = field(default_factory=dict)  # of our files: stage, alpha, base, lmm, ...
    tensors: dict | None = None  # all tensors of our file: adapter.*, lora.*
    dit: dict | None = None  # published MM-DiT with LoRA merged, {name in the file: tensor}
    lmm: dict | None = None  # published LMM, in the same form


def read_checkpoint(path, lora_scale=1.0, dtype=torch.float32):
    """Read a Checkpoint: a file of `DreamEngine.save`, a run's folder, or a published DreamEngine.

    lora_scale: alpha / rank of a published LoRA, which its files omit. dtype: of the weights into
    which that LoRA is merged. Raises FileNotFoundError, or UserError naming what does not fit.
    """
    path = Path(path)
    if saved := sorted(path.glob("stage?.safetensors")):
        path = saved[-1]
    return read_published(path, lora_scale, dtype) if path.is_dir() else read_saved(path)


def read_saved(file):
    """Read a file of `DreamEngine.save`: adapter.*, lora.*, and a config in its metadata."""
    tensors = read_tensors(file)
    if not any(name.startswith("adapter.") for name in tensors):
        refuse_foreign(tensors, file)
    has_lora = any(name.startswith("lora.") for name in tensors)
    required = {"base", "lmm", "alpha"} if has_lora else {"base", "lmm"}
    with reading(file, "a Dream Engine checkpoint, with a config in its metadata"):
        config = read_json(file, metadata(file)["config"])
        for name in sorted(required | ({"guidance"} & config.keys())):
            if not 0 < config[name] < 1e9:
                raise ValueError(f"{name!r} must be a positive number, got {config[name]}")
        if not all(x.isfinite().all() for x in tensors.values()):
            raise ValueError("it holds NaN or infinity")
    adapter = {k: x for k, x in tensors.items() if k.startswith("adapter.")}
    return Checkpoint(file, Part(adapter, file, prefix="adapter."), config, tensors)


ADAPTER_PUBLISHED = key_map("""
    txt.*   input_embeds_align_mlp.*
    vec.*   condition_embeds_align_mlp.*
""")
UNUSED = ("norm_lmm_out.weight", "pooled_proj.weight", "pooled_proj.bias")  # by the official code


def read_published(folder, scale=1.0, dtype=torch.float32):
    """Read a published DreamEngine, in shards: both frozen models, their LoRA, and the adapter."""
    tensors = {}
    for name, x in read_tensors(part_folder(folder, "transformer")).items():
        name = name.replace(".base_layer.", ".")  # peft's name for a weight with LoRA
        if name in tensors:
            raise UserError(f"{folder}: {name} is stored twice")
        if name not in UNUSED:
            tensors[name] = x
    if not any(name.startswith("dit.") for name in tensors):
        refuse_foreign(tensors, folder)
    merge_published_lora(tensors, folder, scale, dtype)
    prefixes = "dit.", "lmm.", ("input_embeds_align_mlp.", "condition_embeds_align_mlp.")
    dit, lmm, adapter = ({k: x for k, x in tensors.items() if k.startswith(p)} for p in prefixes)
    if unknown := tensors.keys() - dit.keys() - lmm.keys() - adapter.keys():
        raise UserError(f"{folder}: not a DreamEngine checkpoint: unknown {min(unknown)}")
    if not dit or not lmm:
        raise UserError(f"{folder}: not a DreamEngine checkpoint: it must hold dit.* and lmm.*")
    return Checkpoint(folder, Part(adapter, folder, ADAPTER_PUBLISHED), dit=dit, lmm=lmm)


def merge_published_lora(tensors, source, scale, dtype):
    """Add scale * B A, in fp32, to each weight that has LoRA, and remove the LoRA from tensors."""
    pattern = r"(.*)\.lora_([AB])(?:\.default)?\.weight"
    names = {match.groups(): k for k in tensors if (match := re.fullmatch(pattern, k))}
    halves = {key: tensors.pop(name).float() for key, name in names.items()}
    for path in sorted({path for path, _ in halves}):
        with reading(source, f"a weight and both halves of the LoRA of {path}, which fit"):
            weight, update = tensors[f"{path}.weight"], halves[path, "B"] @ halves[path, "A"]
            if update.shape != weight.shape:
                raise ValueError(f"{tuple(update.shape)} to be added to {tuple(weight.shape)}")
            tensors[f"{path}.weight"] = (weight.float() + scale * update).to(dtype)


def build_adapter(part, lmm, mmdit):
    """Build the Adapter between lmm and mmdit from a Part, with sizes read off its shapes."""
    widths = lmm.config.text_config.hidden_size, mmdit.config.width
    mlp_dim = part.dimension("txt.0.weight", 0)
    layers = sum(part.shape(f"txt.{2 * i}.weight") is not None for i in range(9))
    device = mmdit.pos_embed.device
    return build(part, lambda: Adapter(*widths, mlp_dim, layers), device, torch.float32)
