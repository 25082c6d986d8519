"""Weights from published files: read without a second copy, rename by a table, fill strictly.

A checkpoint is never trusted to fit: a missing, unknown or wrongly shaped tensor is an error that
names it, and pickles are only ever read as plain tensors.
"""

import json
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn


def read(path):
    """All tensors of a .safetensors or .bin file, or of a folder holding one or several shards.

    Returns {name: tensor}, memory-mapped: nothing is read from disk until it is used.
    Raises FileNotFoundError, or ValueError if a file is damaged or is no checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a checkpoint")
    tensors = {}
    for file in _files(path):
        for name, tensor in _read_file(file).items():
            if name in tensors:
                raise ValueError(f"{path}: {name} is stored twice, again in {file.name}")
            tensors[name] = tensor
    return tensors


def _files(path):
    if path.is_file():
        return [path]
    indices = sorted(path.glob("*.index.json"))
    if indices:
        try:
            names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{indices[0]}: not a weight index (no 'weight_map')") from None
    else:  # without an index a folder holds one file, perhaps beside a variant such as x.fp16.bin
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        names = [f.name for f in files if f.name.count(".") == 1] or [f.name for f in files]
        if len(names) > 1:
            raise ValueError(f"{path}: holds {len(names)} weight files and no index; give one file")
    if not names:
        raise FileNotFoundError(f"{path}: holds no .safetensors or .bin file")
    for name in names:
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name}: this shard of the index is missing")
    return [path / name for name in names]


def _read_file(file):
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as f:
                return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{file}: refused: this pickle holds more than tensors") from None
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        reason = (str(error).splitlines() or ["empty file"])[0]
        raise ValueError(f"{file}: damaged or not a checkpoint ({reason[:120]})") from None
    if not isinstance(tensors, dict) or not all(torch.is_tensor(t) for t in tensors.values()):
        raise ValueError(f"{file}: not a checkpoint: expected a dictionary of tensors")
    return tensors


def metadata(file):
    """The string metadata of a .safetensors file."""
    try:
        with safe_open(file, framework="pt") as f:
            return f.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged or not a safetensors file ({error})") from None


def cut(tensors, prefix):
    """Those tensors whose name starts with prefix, the prefix cut off."""
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def rename(tensors, rules):
    """Rename each tensor by the first rule (regex, replacement) matching its whole name."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            new, hits = re.subn(rf"^{pattern}$", replacement, name)
            if hits:
                name = new
                break
        renamed[name] = tensor
    return renamed


def fill(model, tensors, source, device="cpu", dtype=None):
    """Put tensors into a model built on the meta device; every name and shape must fit.

    Tensors already of the right dtype and device are used as they lie in the file, uncopied; others
    are replaced in the dictionary itself, one by one, so that hardly anything exists twice.
    Raises ValueError naming what is missing, unknown or of another shape.
    """
    check(tensors, model.state_dict(), source)
    for name in tensors:
        tensors[name] = tensors[name].to(device=device, dtype=dtype or tensors[name].dtype)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def check(tensors, expected, source):
    """Raise ValueError unless tensors have just the names and shapes expected."""
    faults = [f"missing {k}" for k in expected.keys() - tensors.keys()]
    faults += [f"unknown {k}" for k in tensors.keys() - expected.keys()]
    faults += [
        f"{k} has shape {tuple(tensors[k].shape)}, expected {tuple(expected[k].shape)}"
        for k in expected.keys() & tensors.keys()
        if tensors[k].shape != expected[k].shape
    ]
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise ValueError(f"{source}: does not fit: {'; '.join(sorted(faults)[:4])}{more}")


# ---- on a device too small for all --------------------------------------------------------------


def settle(module, device):
    """Move a module's own parameters, not those of its parts, to device for good."""
    _put(module, {name: p.to(device) for name, p in module.named_parameters(recurse=False)})


def visit(module, device):
    """Leave a module's tensors where they lie; each call brings copies to device and drops them."""
    home = [(part, _own(part)) for part in module.modules()]

    def come(*_):
        for part, tensors in home:
            _put(part, {name: x.to(device) for name, x in tensors.items()})

    def leave(*_):
        for part, tensors in home:
            _put(part, tensors)

    module.register_forward_pre_hook(come)
    module.register_forward_hook(leave, always_call=True)


def _own(module):
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))


def _put(module, tensors):
    for name, x in tensors.items():
        is_parameter = isinstance(getattr(module, name), nn.Parameter)
        setattr(module, name, nn.Parameter(x, requires_grad=False) if is_parameter else x)
