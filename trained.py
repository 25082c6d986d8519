"""What training made: a file of the house, or the folder of the published DreamEngine.

Both end as one Checkpoint: an adapter, LoRA on the attention projections of MM-DiT and LMM, and from
the authors' folder the two frozen models as well.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from adapter import Adapter, lora_sites
from checkpoints import Layout, Part, check, empty, fill, metadata, read, read_json, table
from support.cli import UserError


@dataclass(frozen=True)
class Checkpoint:
    """What a trained checkpoint holds, whichever of the two layouts it lies in."""

    source: Path | str
    adapter: Part
    pairs: dict  # LoRA: {path of a module in the file: {"A" or "B": (name in the file, tensor)}}
    config: dict = field(default_factory=dict)  # of the house's files: stage, alpha, base, lmm, ...
    scale: float | None = None  # of a published LoRA
    dit: dict | None = None  # the published models, by the names in the file
    lmm: dict | None = None
    wrapped: frozenset[str] = frozenset()  # see `Layout`

    def lora(self, root, model):
        """The LoRA of a model as `wrap_lora` takes it, {path: (A, B, alpha)}.

        root: the model's name in the engine. A published file, where q, k and v have a pair each, names
        LoRA like the weights that the model was filled with. Raises UserError naming what does not fit.
        """
        layout = model.layout if self.dit else Layout(prefix=f"lora.{root}.")
        rest = {path for path in self.pairs if path.startswith(layout.prefix)}
        found = {}
        for path, (linear, parts) in lora_sites(model):
            names = [k.removesuffix(".weight") for k in layout.names(f"{path}.weight")]
            names = [k.removesuffix(".base_layer") for k in names]
            rest -= set(names)
            pairs = [self.pairs.get(k) for k in names]
            if any(pairs):
                found[path] = self._joined(pairs, linear, parts)
        if rest:
            raise UserError(f"{self.source}: LoRA of {min(rest)}, no attention projection here")
        return found

    def _joined(self, pairs, linear, parts):
        """The pairs of one projection as (A (parts, rank, in), B (parts, out / parts, rank), alpha)."""
        stacked = () if self.dit else (parts,)
        rank = max((min(pair["A"][1].shape[-2:-1], default=0) for pair in pairs if pair), default=0)
        shapes = {"A": (rank, linear.in_features), "B": (linear.out_features // parts, rank)}
        tensors = dict(named for pair in pairs if pair for named in pair.values())
        expected = {name: (*stacked, *shapes[x]) for p in pairs if p for x, (name, _) in p.items()}
        check(tensors, expected, self.source)
        if not rank:
            raise UserError(f"{self.source}: {min(tensors)} is a LoRA of rank 0")
        joined = {
            kind: torch.cat(
                [  # one of q, k and v without LoRA has one of zeros
                    (pair[kind][1] if pair else torch.zeros(shape)).float().view(-1, *shape)
                    for pair in pairs
                ]
            )
            for kind, shape in shapes.items()
        }
        return joined["A"], joined["B"], self.scale * rank if self.dit else self.config["alpha"]


def read_checkpoint(path, lora_scale=1.0):
    """A file of `DreamEngine.save`, the folder of a run, or a published DreamEngine -> Checkpoint.

    lora_scale: alpha / rank of a published LoRA, which its files do not say. Raises
    FileNotFoundError, or UserError naming what does not fit.
    """
    path = Path(path)
    if saved := sorted(path.glob("stage?.safetensors")):
        path = saved[-1]
    return read_published(path, lora_scale) if path.is_dir() else read_saved(path)


def read_saved(file):
    """A file of `DreamEngine.save`: adapter.*, lora.*, and a config in its metadata."""
    tensors = read(file)
    text = metadata(file).get("config") if Path(file).suffix == ".safetensors" else None
    if text is None:
        raise UserError(f"{file}: not a Dream Engine checkpoint (no config in its metadata)")
    config = read_json(file, text)
    adapter = {k: x for k, x in tensors.items() if k.startswith("adapter.")}
    pairs = take_pairs(tensors, r"(lora\.(?:mmdit|lmm)\..*)\.([AB])", file)
    if unknown := sorted(tensors.keys() - adapter.keys()):
        raise UserError(f"{file}: unknown {unknown[0]}; expected adapter.* and lora.* only")
    optional = [*["alpha"] * bool(pairs), *["guidance"] * ("guidance" in config)]
    for name in ("base", "lmm", *optional):
        value = config.get(name)
        if type(value) not in (int, float) or not 0 < value < 1e9:
            raise UserError(f"{file}: its config says {name} {str(value)[:40]}, no positive number")
    return Checkpoint(file, Part(adapter, Layout(prefix="adapter."), file), pairs, config)


_ADAPTER_PUBLISHED = table("""
    txt.*   input_embeds_align_mlp.*
    vec.*   condition_embeds_align_mlp.*
""")
_NO_EFFECT = r"norm_lmm_out\.weight|pooled_proj\.(weight|bias)"  # in the official forward


def read_published(folder, scale=1.0):
    """The published DreamEngine, in shards: both frozen models with LoRA beside, and the adapter."""
    inner = Path(folder, "transformer")
    tensors = read(inner if inner.is_dir() else folder)
    tensors = {k: x for k, x in tensors.items() if not re.fullmatch(_NO_EFFECT, k)}
    pairs = take_pairs(tensors, r"((?:dit|lmm)\..*)\.lora_([AB])(?:\.default)?\.weight", folder)
    wrapped = {k.rpartition(".base_layer.")[0] for k in tensors if ".base_layer." in k}
    wrapped |= {path for path in pairs if f"{path}.weight" not in tensors}
    heads = ("input_embeds_align_mlp.", "condition_embeds_align_mlp.")
    dit, lmm, adapter = (
        {k: x for k, x in tensors.items() if k.startswith(start)}
        for start in ("dit.", "lmm.", heads)
    )
    if unknown := sorted(tensors.keys() - dit.keys() - lmm.keys() - adapter.keys()):
        raise UserError(f"{folder}: not a DreamEngine checkpoint: unknown {unknown[0]}")
    for name, part in (("dit", dit), ("lmm", lmm)):
        if not part:
            raise UserError(f"{folder}: not a DreamEngine checkpoint: missing {name}.*")
    adapter = Part(adapter, Layout(_ADAPTER_PUBLISHED), folder)
    return Checkpoint(folder, adapter, pairs, {}, scale, dit, lmm, frozenset(wrapped))


def take_pairs(tensors, pattern, source):
    """Move LoRA out of tensors: {path: {"A": (name, tensor), "B": ...}}; none may be alone."""
    pairs = {}
    for name in list(tensors):
        if match := re.fullmatch(pattern, name):
            path, kind = match.groups()
            if kind in pairs.setdefault(path, {}):
                raise UserError(f"{source}: two LoRA of {path}")
            pairs[path][kind] = name, tensors.pop(name)
    for path, pair in pairs.items():
        if len(pair) == 1:
            raise UserError(f"{source}: missing the other half of the LoRA of {path}")
    return pairs


def load_adapter(part, widths, device):
    """An Adapter for (LMM width, MM-DiT width), filled with a Part, whose shapes say how it is built."""
    layers = sum(part.shape(f"txt.{2 * i}.weight") is not None for i in range(9))
    if not layers:
        raise UserError(f"{part.source}: holds no adapter ({part.layout.names('txt.0.weight')[0]})")
    mlp_dim, lmm_width = (part.dimension("txt.0.weight", i) for i in (0, 1))
    width = part.dimension(f"txt.{2 * layers - 2}.weight", 0)
    if (lmm_width, width) != widths:
        raise UserError(
            f"{part.source}: this adapter joins an LMM {lmm_width} wide to an MM-DiT {width} wide; "
            f"the models at hand are {widths[0]} and {widths[1]} wide"
        )
    return fill(empty(Adapter, part.source, *widths, mlp_dim, layers), part, device, torch.float32)
