"""Training in several processes, started by torchrun, and the signals that stop it."""

import os
import re
import signal
import socket
from collections import namedtuple
from contextlib import contextmanager

from support.cli import UserError

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from support.fast import usable_device

Place = namedtuple("Place", "rank world device")  # of a process; world: the number of processes


def rank_and_world():
    """The rank of this process, and the number of processes, as set by torchrun; else 0 and 1."""
    found = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]
    if found == [None, None]:
        return 0, 1
    if None in found or not all(re.fullmatch("[0-9]{1,6}", x) for x in found):
        said = "RANK={}, WORLD_SIZE={}".format(*found)
        raise UserError(f"{said}: torchrun sets both to whole numbers; set them both, or neither")
    rank, world = map(int, found)
    if rank >= world:
        raise UserError(f"RANK={rank} must be below WORLD_SIZE={world}")
    return rank, world


def check_address():
    """Raise UserError unless the environment says where the processes meet, as torchrun does."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    for name, allowed in (("LOCAL_RANK", range(10**6)), ("MASTER_PORT", range(1, 2**16))):
        value = os.environ.get(name)
        if not re.fullmatch("[0-9]{1,6}", value or "") or int(value) not in allowed:
            right = f"a whole number from {allowed[0]} to {allowed[-1]}"
            raise UserError(f"{name}={value}: torchrun sets it to {right}")
    try:
        socket.getaddrinfo(host or "?", port)
    except (OSError, UnicodeError) as error:
        right = "torchrun sets it to the address of rank 0"
        raise UserError(f"MASTER_ADDR={host}: {right} ({error})") from error


@contextmanager
def together(name, advice):
    """Join the processes of torchrun, if there are several; yield the Place of this process.

    name: of the device. Raises UserError, ending in advice(), if the other processes are lost.
    """
    (rank, world), device = rank_and_world(), usable_device(name)
    if world == 1:
        yield Place(rank, world, device)
        return
    check_address()
    what = "cannot join"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        what = "lost"
        yield Place(rank, world, device)
        dist.barrier()  # rank 0 may still be writing
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not re.search("gloo|onnection", str(error)):
            raise
        lost = f"{what} the other processes ({str(error).splitlines()[0][:160]})"
        raise UserError(f"rank {rank}: {lost}; {advice()}") from error
    dist.destroy_process_group()


def union(lines, world):
    """A dictionary with the entries of all processes, which must call this together."""
    parts = [dict(lines)] * world
    if world > 1:
        dist.all_gather_object(parts, dict(lines))
    return {key: value for part in parts for key, value in part.items()}


def distribute(engine, learning, shard, world):
    """The model to train on this process. Gradients are averaged over the processes (DDP).

    With shard the frozen MM-DiT is spread over the processes, block by block (FSDP2).
    """
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
    """Collect each SIGTERM and the first Ctrl-C in a list; a second Ctrl-C ends the program at once."""
    caught = []

    def handle(signum, _):
        caught.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, handle)
    return caught
