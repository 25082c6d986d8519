"""What training made, as a Checkpoint: a file of the house, or the published DreamEngine's folder."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from adapter import Adapter
from checkpoints import Part, build, key_map, metadata, read_json, read_tensors
from support.cli import UserError, reading


@dataclass
class Checkpoint:
    """An adapter, and LoRA beside it; or both frozen models, into which LoRA is merged already."""

    source: Path
    adapter: Part
    config: dict = field(default_factory=dict)  # of the house's files: stage, alpha, base, lmm, ...
    tensors: dict | None = None  # all of such a file: adapter.*, lora.*
    dit: dict | None = None  # the published models, by the names in the file
    lmm: dict | None = None


def read_checkpoint(path, lora_scale=1.0, dtype=torch.float32):
    """A file of `DreamEngine.save`, the folder of a run, or a published DreamEngine -> Checkpoint.

    lora_scale: alpha / rank of a published LoRA, which its files do not say; dtype: of what it is
    merged into. Raises FileNotFoundError, or UserError naming what does not fit.
    """
    path = Path(path)
    if saved := sorted(path.glob("stage?.safetensors")):
        path = saved[-1]
    return read_published(path, lora_scale, dtype) if path.is_dir() else read_saved(path)


def read_saved(file):
    """A file of `DreamEngine.save`: adapter.*, lora.*, and a config in its metadata."""
    tensors = read_tensors(file)
    needed = ["base", "lmm"] + ["alpha"] * any(name.startswith("lora.") for name in tensors)
    with reading(file, "a Dream Engine checkpoint, with a config in its metadata"):
        config = read_json(file, metadata(file)["config"])
        for name in needed + ["guidance"] * ("guidance" in config):
            if not 0 < config[name] < 1e9:
                raise ValueError(f"{name} {config[name]}")
    adapter = {k: x for k, x in tensors.items() if k.startswith("adapter.")}
    return Checkpoint(file, Part(adapter, file, prefix="adapter."), config, tensors)


ADAPTER_PUBLISHED = key_map("""
    txt.*   input_embeds_align_mlp.*
    vec.*   condition_embeds_align_mlp.*
""")
NO_EFFECT = ("norm_lmm_out.weight", "pooled_proj.weight", "pooled_proj.bias")  # official forward


def read_published(folder, scale=1.0, dtype=torch.float32):
    """The published DreamEngine, in shards: both frozen models, LoRA beside them, the adapter."""
    inner, tensors = folder / "transformer", {}
    for name, x in read_tensors(inner if inner.is_dir() else folder).items():
        name = name.replace(".base_layer.", ".")  # as peft names what LoRA wraps
        if name in tensors:
            raise UserError(f"{folder}: {name} is stored twice")
        if name not in NO_EFFECT:
            tensors[name] = x
    merge_published_lora(tensors, folder, scale, dtype)
    starts = "dit.", "lmm.", ("input_embeds_align_mlp.", "condition_embeds_align_mlp.")
    dit, lmm, adapter = ({k: x for k, x in tensors.items() if k.startswith(s)} for s in starts)
    if unknown := tensors.keys() - dit.keys() - lmm.keys() - adapter.keys():
        raise UserError(f"{folder}: not a DreamEngine checkpoint: unknown {min(unknown)}")
    if not dit or not lmm:
        raise UserError(f"{folder}: not a DreamEngine checkpoint: it needs dit.* and lmm.*")
    return Checkpoint(folder, Part(adapter, folder, ADAPTER_PUBLISHED), dit=dit, lmm=lmm)


def merge_published_lora(tensors, source, scale, dtype):
    """Add scale * B A, in fp32, to each weight that has LoRA beside it, and drop the LoRA."""
    pattern = r"(.*)\.lora_([AB])(?:\.default)?\.weight"
    found = {match.groups(): k for k in tensors if (match := re.fullmatch(pattern, k))}
    halves = {key: tensors.pop(name).float() for key, name in found.items()}
    for path in sorted({path for path, _ in halves}):
        with reading(source, f"a weight and both halves of the LoRA of {path}, which fit"):
            weight, delta = tensors[f"{path}.weight"], halves[path, "B"] @ halves[path, "A"]
            if delta.shape != weight.shape:
                raise ValueError(f"{tuple(delta.shape)} to be added to {tuple(weight.shape)}")
            tensors[f"{path}.weight"] = (weight.float() + scale * delta).to(dtype)


def build_adapter(part, lmm, mmdit):
    """The Adapter between these two, filled with a Part, whose shapes say how it is built."""
    widths = lmm.config.text_config.hidden_size, mmdit.config.width
    mlp_dim = part.dimension("txt.0.weight", 0)
    layers = sum(part.shape(f"txt.{2 * i}.weight") is not None for i in range(9))
    device = mmdit.pos_embed.device
    return build(part, lambda: Adapter(*widths, mlp_dim, layers), device, torch.float32)
