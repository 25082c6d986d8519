"""How many operations a program asks of a device.

An operation is a call that reaches torch's dispatcher in inference mode, where a composite one (a
Linear, an attention, a norm) counts once. Views count nothing, as they compute nothing.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS, LATENT = 160, (16, 128, 128)  # of a prompt's text; of a picture of 1024x1024 pixels


class Operations(TorchDispatchMode):
    """Within, counts the operations of this thread: use inside torch.inference_mode()."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += not op.is_view
        return op(*args, **(kwargs or {}))


def on_meta(*shape):
    """A tensor in bf16 that has a shape and no data."""
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")
