"""Devices, and optimisations that leave results unchanged: less time, or less memory."""

import os
from contextlib import contextmanager
from functools import lru_cache

from support.cli import UserError

import torch
from torch import nn

from mmdit import Modulation


def usable_device(name=None):
    """A device by name, checked; None: this process's own GPU, or the CPU if there is none."""
    name = str(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name).cpu()
        return torch.device(name)
    except Exception as error:  # backends raise anything
        raise UserError(f"device {name}: not usable on this machine; try cpu") from error


def device_and_dtype(device=None, dtype=None):
    """A usable device, and the dtype of the frozen models: by default fp32 on a CPU, else bf16."""
    device = usable_device(device)
    return device, dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)


CHUNK = 32  # steps whose results are kept in memory at once


class Precomputed(nn.Module):
    """Replaces a layer while sampling, and returns the layer's output at the current step."""

    def __init__(self, layer):
        super().__init__()
        self.layer = [layer]  # in a list, so that its weights are not registered twice
        self.steps, self.current = [], None  # outputs at all steps of a chunk; at the current step

    def forward(self, _):
        return self.current


@contextmanager
def prepared(transformer, times, vec=None):
    """Compute once all that depends on t and vec alone, not at every step of a sampler.

    That is `t_embedder` and every `adaLN_modulation`, a third of an MMDiT's parameters. times: the
    values of t, in order; vec (B, D), default: zero. Yields a function that wraps velocity(z, t), so
    that each call uses the results for its t; unwrapped calls use those for times[0]. Sharded
    transformers (FSDP) stay unchanged, because their layers are whole only in their own forward.
    """
    if hasattr(transformer, "reshard"):
        yield lambda velocity: velocity
        return
    if vec is None:
        vec = transformer.pos_embed.new_zeros(1, transformer.config.width)
    embedder = Precomputed(transformer.t_embedder)
    modulations = {
        parent: Precomputed(parent.adaLN_modulation)
        for parent in transformer.modules()
        if hasattr(parent, "adaLN_modulation")
    }
    place = {t: divmod(i, CHUNK) for i, t in enumerate(times)}

    @lru_cache(maxsize=1)
    def compute(chunk):
        t = torch.tensor(times[chunk * CHUNK : (chunk + 1) * CHUNK], device=vec.device)
        embedded = embedder.layer[0](t)
        embedder.steps = embedded.split(1)
        c = (embedded[:, None] + vec).flatten(0, 1)  # all steps as one batch
        for layer in modulations.values():
            by_step = [split(modulation, len(vec)) for modulation in layer.layer[0](c)]
            layer.steps = list(zip(*by_step))

    def go_to(t):
        chunk, i = place[t]
        compute(chunk)
        for layer in (embedder, *modulations.values()):
            layer.current = layer.steps[i]

    def at_each_step(velocity):
        def wrapped(z, t):
            go_to(t)
            return velocity(z, t)

        return wrapped

    try:
        transformer.t_embedder = embedder
        for parent, layer in modulations.items():
            parent.adaLN_modulation = layer
        go_to(times[0])
        yield at_each_step
    finally:
        transformer.t_embedder = embedder.layer[0]
        for parent, layer in modulations.items():
            parent.adaLN_modulation = layer.layer[0]


def split(modulation, rows):
    """Split the Modulation of all steps into one Modulation of `rows` rows for each step."""
    parts = [x.split(rows) for x in modulation if x is not None]
    return [Modulation(*step) for step in zip(*parts)]


def save_memory(engine, device):
    """Put on the device only what every step of the sampler needs; copy the rest there on demand.

    Two thirds of SD3.5-large stay on the device: `prepared` needs the other third once per request.
    Pictures stay the same, but the engine can no longer be trained.
    """
    mmdit = engine.mmdit
    ends = "adaLN_modulation", "t_embedder", "y_embedder", "context_embedder"
    once = [module for name, module in mmdit.named_modules() if name.endswith(ends)]
    others = [part for part in engine.children() if part is not mmdit]
    once += [leaf for part in others for leaf in part.modules() if not list(leaf.children())]
    for part in once:
        on_demand(part, device)
    inside = {inner for part in once for inner in part.modules()}
    for part in mmdit.modules():
        if part not in inside:
            _set(part, {name: x.to(device) for name, x in _tensors(part).items()})


def on_demand(module, device):
    """Copy a module's tensors to device for each call, and drop the copies afterwards."""
    home = [(part, _tensors(part)) for part in module.modules()]

    def bring(*_):
        for part, tensors in home:
            _set(part, {name: x.to(device) for name, x in tensors.items()})

    def drop(*_):
        for part, tensors in home:
            _set(part, tensors)

    module.register_forward_pre_hook(bring)
    module.register_forward_hook(drop, always_call=True)


def _tensors(module):
    """The parameters and buffers of a module itself, not of its submodules."""
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))


def _set(module, tensors):
    for name, x in tensors.items():
        is_parameter = isinstance(getattr(module, name), nn.Parameter)
        setattr(module, name, nn.Parameter(x, requires_grad=False) if is_parameter else x)


def compile_blocks(transformer, **options):
    """Compile the blocks; blocks of one kind share a program, which fits texts of any length."""
    # Otherwise a text with as many tokens as the picture would trigger another compilation
    torch.fx.experimental._config.use_duck_shape = False
    for block in transformer.joint_blocks[:-1]:  # the last is the only one of its kind
        block.compile(dynamic=True, **options)


@contextmanager
def compiling():
    """Run code that may compile; raise UserError if the machine has no compiler."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        message = f"torch.compile does not work here, leave --compile out ({reason})"
        raise UserError(message) from error
