"""A device named `pretend`: it computes on the CPU, and refuses what a GPU would refuse.

    pretend_device.register()
    with pretend_device.ready():
        x = torch.ones(2, device="pretend")
        x + torch.ones(2)  # RuntimeError: two devices meet in one operation
        np.asarray(x)  # RuntimeError: numpy reads the memory of the CPU only
        with pretend_device.no_waits():
            x.sum().item()  # RuntimeError: the program would wait for the device

A tensor on this device is a PretendTensor, a subclass of torch.Tensor whose `held` is a plain tensor on
the CPU. torch hands every operation on a PretendTensor to `compute`. Operations that make a tensor from
nothing (torch.zeros, torch.tensor) reach `compute` as kernels of the device: these need no mode and
work in every thread.
"""

from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
aten = torch.ops.aten
COPIES = aten._to_copy.default, aten.copy_.default
INDEXING = aten.index.Tensor, aten.index_put.default, aten.index_put_.default
KERNELS = aten.empty, aten.empty_strided, aten.arange, aten.linspace, aten._copy_from
library = []  # the torch.library.Library of the kernels, which live as long as it does
strict = []  # not empty within no_waits()


class PretendTensor(torch.Tensor):
    """A tensor that says it is on the device; held: its data, a plain tensor without gradient."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        like = {"dtype": held.dtype, "device": torch.device(NAME, 0)}
        self = cls._make_wrapper_subclass(cls, held.shape, **layout, **like)
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return compute(op, *args, **(kwargs or {}))

    def __repr__(self, **_):
        return f"{NAME}:{self.held}"

    def tolist(self):  # torch has none for subclasses
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):  # torch.save would ask for the memory of the device
        return self.cpu().__reduce_ex__(protocol)

    def untyped_storage(self):  # safetensors looks for tensors that share memory
        return self.held.untyped_storage()

    def data_ptr(self):
        return self.held.data_ptr()


def compute(op, *args, **kwargs):
    """The result of an operation on tensors of this device; the CPU computes it."""
    parts = op.decompose(*args, **kwargs)  # in inference mode composite operations arrive whole
    if parts is not NotImplemented:
        return parts
    if op is aten._copy_from.default:  # source, destination, non_blocking
        op, args = aten.copy_.default, (args[1], args[0], *args[2:])
    tensors = []

    def inside(x):
        tensors.append(x)
        return x.held if isinstance(x, PretendTensor) else x

    held_args, held_kwargs = mapped(inside, args), mapped(inside, kwargs)
    here = {id(x.held): x for x in tensors if isinstance(x, PretendTensor)}
    stays = bool(here)
    if kwargs.get("device"):
        stays = kwargs["device"].type == NAME
        held_kwargs["device"] = torch.device("cpu")
    check_devices(op, tensors, here, stays, kwargs.get("generator"))
    if strict and waits(op, args, kwargs, here, stays):
        raise RuntimeError(f"{op}: the program would wait for {NAME}")

    result = op(*held_args, **held_kwargs)
    if changed := [x for x in here.values() if x.shape != x.held.shape]:
        raise NotImplementedError(f"{op}: changes the shape of {changed[0]} in place")
    known = {id(x): x for x in tensors} | here  # an operation in place returns its argument

    def outside(x):
        return known.get(id(x)) if id(x) in known else PretendTensor(x) if stays else x

    return mapped(outside, result)


def mapped(function, x):
    """The same lists, tuples and dictionaries with function(tensor) in place of every tensor."""
    if isinstance(x, torch.Tensor):
        return function(x)
    if isinstance(x, dict):
        return {key: mapped(function, value) for key, value in x.items()}
    return type(x)(mapped(function, y) for y in x) if isinstance(x, list | tuple) else x


def check_devices(op, tensors, here, stays, generator):
    """Raise RuntimeError where two devices meet.

    Copies may move tensors between devices, and elementwise operations take numbers of the CPU
    (tensors without dimensions), as on CUDA. CUDA also takes indices of the CPU; this device does not.
    """
    if stays and generator is not None:
        raise RuntimeError(f"{op}: expected a generator on {NAME}, found one on cpu")
    if here and op not in COPIES:
        elementwise = torch.Tag.pointwise in op.tags
        if op._schema.is_mutable:  # the first tensor is where the result goes
            elementwise = elementwise and isinstance(tensors[0], PretendTensor)
        for x in tensors:
            if not isinstance(x, PretendTensor) and (x.ndim or not elementwise):
                raise RuntimeError(f"{op}: expected {NAME}, found a {tuple(x.shape)} tensor on cpu")


def waits(op, args, kwargs, here, stays):
    """Would the program go on only after a GPU has done all its work so far?

    It does where Python or the CPU gets a result, where a shape depends on data, and where memory of the
    CPU is copied to the device, unless non_blocking.
    """
    if op in COPIES:
        source, arrives = args[0], stays
        if op is aten.copy_.default:  # destination, source, non_blocking
            source, arrives = args[1], isinstance(args[0], PretendTensor)
        non_blocking = kwargs.get("non_blocking") or args[2:] == (True,)
        return isinstance(source, PretendTensor) != arrives and not (arrives and non_blocking)
    if not here:
        return False
    if op in INDEXING:
        masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        fills = (
            op is not aten.index.Tensor and args[2].numel() == 1
        )  # as masked_fill, without a wait
        return masked and not fills
    return not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(op.tags)


class Module:
    """What torch asks the module of a device, here `torch.pretend`."""

    is_available = is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])


def register():
    """Make the device known to torch, once in a process."""
    if library:
        return
    _setup_privateuseone_for_python_backend(NAME, Module())
    library.append(torch.library.Library("aten", "IMPL"))
    for packet in KERNELS:
        for op in (getattr(packet, name) for name in packet.overloads() if "out" not in name):
            library[0].impl(op.name(), partial(compute, op), "PrivateUse1")


@contextmanager
def ready():
    """Within, modules move to the device by new parameters, and backward runs in the calling thread."""
    future = torch.__future__
    before = future.get_overwrite_module_params_on_conversion()
    future.set_overwrite_module_params_on_conversion(True)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        future.set_overwrite_module_params_on_conversion(before)


@contextmanager
def no_waits():
    """Within, whatever would make the program wait for the device raises RuntimeError."""
    strict.append(True)
    try:
        yield
    finally:
        strict.pop()
