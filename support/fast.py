"""What a machine wants and no equation says: the same numbers sooner, or in less memory.

`prepared` computes what no latent changes once for many steps; `save_memory` keeps little on the
device; `compile_blocks` hands the blocks to torch.compile.
"""

import os
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import nn

from mmdit import Modulation
from support.cli import UserError


def usable_device(name=None):
    """A device by name, checked; default: the process's own GPU, or else the CPU."""
    name = str(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name).cpu()
        return torch.device(name)
    except Exception as error:  # backends raise anything
        raise UserError(f"device {name}: not usable on this machine; try cpu") from error


def device_and_dtype(device=None, dtype=None):
    """A usable device, and the dtype of models there: fp32 on a CPU, else bf16, unless one is named."""
    device = usable_device(device)
    return device, dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)


# ---- once for many steps ------------------------------------------------------------------------

CHUNK = 32  # steps whose tables lie in memory at once


class Table(nn.Module):
    """Stands where a layer stood, and answers with what the layer made of the present step."""

    def __init__(self, layer):
        super().__init__()
        self.layer = [layer]  # in a list: the model keeps one owner of its weights
        self.rows, self.row = [], None  # of the steps of a chunk; of the present one

    def forward(self, _):
        return self.row


@contextmanager
def prepared(transformer, times, vec=None):
    """Within, all that depends on t and vec alone is looked up and not computed at every step.

    That is `t_embedder` and every `adaLN_modulation`, a third of an MMDiT's parameters. times: the
    sampler's values of t, in order; vec (B, D), default: zero. Yields a function to be called with t before each
    forward at that t. Sharded transformers (FSDP) are left alone: their layers are whole in their own
    forward only.
    """
    if hasattr(transformer, "reshard"):
        yield lambda t: None
        return
    if vec is None:
        vec = transformer.pos_embed.new_zeros(1, transformer.config.width)
    embedder = Table(transformer.t_embedder)
    sites = {
        parent: Table(parent.adaLN_modulation)
        for parent in transformer.modules()
        if hasattr(parent, "adaLN_modulation")
    }
    place = {t: divmod(i, CHUNK) for i, t in enumerate(times)}

    @lru_cache(maxsize=1)
    def compute(chunk):
        t = torch.tensor(times[chunk * CHUNK : (chunk + 1) * CHUNK], device=vec.device)
        embedded = embedder.layer[0](t)
        embedder.rows = embedded.split(1)
        c = (embedded[:, None] + vec).flatten(0, 1)
        for table in sites.values():
            by_step = [[x.split(len(vec)) for x in m if x is not None] for m in table.layer[0](c)]
            table.rows = [[Modulation(*(x[i] for x in m)) for m in by_step] for i in range(len(t))]

    def go_to(t):
        chunk, i = place[t]
        compute(chunk)
        for table in (embedder, *sites.values()):
            table.row = table.rows[i]

    try:
        transformer.t_embedder = embedder
        for parent, table in sites.items():
            parent.adaLN_modulation = table
        yield go_to
    finally:
        transformer.t_embedder = embedder.layer[0]
        for parent, table in sites.items():
            parent.adaLN_modulation = table.layer[0]


# ---- less memory --------------------------------------------------------------------------------


def save_memory(engine, device):
    """Put on the device only what every step of the sampler needs; the rest goes there on demand.

    Of SD3.5-large two thirds stay, as `prepared` needs the other third once a request. Nothing that is
    drawn changes; what the engine cannot do any more is learn.
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
    """Leave a module's tensors where they are; each call brings copies to device and drops them."""
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
    """Those of the module itself, not of its parts."""
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))


def _set(module, tensors):
    for name, x in tensors.items():
        is_parameter = isinstance(getattr(module, name), nn.Parameter)
        setattr(module, name, nn.Parameter(x, requires_grad=False) if is_parameter else x)


# ---- compiled -----------------------------------------------------------------------------------


def compile_blocks(transformer, **options):
    """torch.compile the blocks: one program for all of a kind, and for texts of any length."""
    # A text that happens to have as many tokens as the picture shall not be a special case.
    torch.fx.experimental._config.use_duck_shape = False
    for block in transformer.joint_blocks[:-1]:  # the last is the only one of its kind
        block.compile(dynamic=True, **options)


@contextmanager
def compiling():
    """Around the first call of what is compiled: a machine without a compiler is no bug."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        message = f"torch.compile does not work here, leave --compile out ({reason})"
        raise UserError(message) from error
