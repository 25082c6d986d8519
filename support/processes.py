"""Several processes that train together, as torchrun starts them, and the signals that stop one."""

import os
import re
import signal
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from support.cli import UserError
from support.fast import usable_device


@contextmanager
def together(name, advice):
    """Within, this process is one of those that torchrun started: yields rank, their number, device.

    Where the others are lost, a UserError says so; advice() is its end.
    """
    world, device = int(os.environ.get("WORLD_SIZE", "1")), usable_device(name)
    if world == 1:
        yield 0, 1, device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), world, device
        dist.barrier()  # rank 0 may still be writing
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not re.search("gloo|onnection", str(error)):
            raise
        lost = f"lost the other processes ({str(error).splitlines()[0][:160]})"
        raise UserError(f"rank {dist.get_rank()}: {lost}; {advice()}") from error
    dist.destroy_process_group()


def distribute(engine, learning, shard, world):
    """What learns is on every process, its gradients averaged (DDP); so is the frozen rest, unless
    shard spreads the MM-DiT over the processes (FSDP2), block by block."""
    if world == 1:
        return engine
    if shard:
        ignored = set(learning.values())
        mesh = dist.init_device_mesh(engine.device.type, (world,))
        for block in (*engine.mmdit.joint_blocks, engine.mmdit):
            fully_shard(block, mesh=mesh, ignored_params=ignored)
    names = {name for name, _ in (*engine.named_parameters(), *engine.named_buffers())}
    frozen = names - learning.keys()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(engine, frozen)
    return DistributedDataParallel(engine, gradient_as_bucket_view=True)


def catch_signals():
    """A list that gets each SIGTERM and the first Ctrl-C; a second one ends the program at once."""
    caught = []

    def note(signum, _):
        caught.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, note)
    return caught
