"""Every program on a device that is not the CPU: `pretend` (pretend_device.py), or pytest --device cuda."""

import json
import signal
from contextlib import contextmanager

import numpy as np
import pretend_device
import pytest
import torch
from operations import LATENT, TOKENS, Operations, on_meta
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import GOLDEN, relative
from torch.nn.attention import SDPBackend, sdpa_kernel

import mmdit
import sample
import train
from dream_engine import Condition, DreamEngine, denoise
from support import runs
from unialignment import UniAlignment
from unialignment import sample as uni_sample
from unialignment import train as uni_train

TRAIN = ["--batch", "2", "--warmup", "1", "--sample-every", "0", "--save-every", "1"]
TRAIN += ["--workers", "0", "--steps", "2"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, device):
    """Two pictures to start from; everything runs as the device needs it."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("dog.png", "cat.png"):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(name)
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    if device == "pretend":
        pretend_device.register()
        with (
            pretend_device.ready(),
            sdpa_kernel(SDPBackend.MATH),
        ):  # the CPU's own attention differs
            yield
    else:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextmanager
def no_waits(device):
    """Within, whatever makes the program wait for the device raises RuntimeError."""
    if device == "pretend":
        with pretend_device.no_waits():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- the device itself --------------------------------------------------------------------------


def test_it_refuses_what_a_gpu_refuses(device):
    x = torch.ones(3, device=device)
    generator = torch.Generator()
    for refused in (
        lambda: x + torch.ones(3),
        lambda: torch.ones(3) + x,
        lambda: x.add_(torch.ones(3)),
        lambda: torch.tensor(1.0).add_(x[0]),
        lambda: torch.cat([x, torch.ones(3)]),
        lambda: torch.stack([x[0], torch.tensor(1.0)]),
        lambda: torch.where(x > 0, x, torch.ones(3)),
        lambda: torch.nn.functional.linear(torch.ones(2, 3), x[None]),
        lambda: torch.randn(3, device=device, generator=generator),
        lambda: x.numpy(),
        lambda: np.asarray(x),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            refused()
    one = torch.tensor(2.0)  # a number of the CPU
    assert [(x * one).tolist(), torch.where(x > 2, x, one).tolist()] == [[2, 2, 2]] * 2


def test_it_computes_as_the_cpu_does(device):
    made = torch.tensor([[1.0, 2], [3, 4]], device=device)
    assert made.device.type == torch.device(device).type and made.device.index is not None
    weight = torch.nn.Parameter(made)
    assert isinstance(weight, torch.nn.Parameter)
    x = torch.tensor([[0.5, -1.0]]).to(device)
    (x @ weight.T).square().sum().backward()
    assert weight.grad.tolist() == [[-1.5, 3.0], [-2.5, 5.0]]
    made[made > 2] = torch.tensor([7.0, 8.0], device=device)
    assert made.tolist() == weight.tolist() == [[1, 2], [7, 8]]
    save_file({"made": made}, "a.safetensors")
    torch.save({"made": made}, "a.pt")
    loaded = load_file("a.safetensors"), torch.load("a.pt", map_location="cpu", weights_only=True)
    assert all(torch.equal(tensors["made"], made.cpu()) for tensors in loaded)
    assert next(torch.nn.Linear(2, 2).to(device).parameters()).device == made.device


def test_it_knows_what_waits(device):
    x, mask = torch.ones(3, device=device), torch.tensor([True, False, True]).to(device)
    values, index = torch.zeros(2, device=device), torch.tensor([0, 2]).to(device)
    for waiting in (
        x.sum().item,
        x.tolist,
        x.cpu,
        lambda: bool(mask.any()),
        lambda: torch.equal(x, x),
        mask.nonzero,
        lambda: x[mask],
        lambda: x.__setitem__(mask, values),
        lambda: torch.tensor(1.0, device=device),
        lambda: torch.ones(3).to(device),
    ):
        waiting()
        with pytest.raises(RuntimeError), no_waits(device):
            waiting()
    with no_waits(device):
        x[index] = 2 * x[index] + torch.full((2,), 3.0, device=device)
        x.masked_fill_(mask, 4.0)
        torch.ones(3).to(device, non_blocking=True)
    assert x.tolist() == [4, 1, 4]


# ---- drawing and reading ------------------------------------------------------------------------

EDIT = ["--prompt", "make it red", "--image", "dog.png"]
OBJECTS = ["--prompt", "<image> and <image>", "--prompt", "a star", "--blend", "0.3"]
OBJECTS += ["--image", "dog.png", "--image", "cat.png"]
DRAWING = {
    "t2i": (sample, ["--prompt", "a red circle"]),
    "t2i, low memory": (sample, ["--prompt", "a red circle", "--low-memory"]),
    "edit": (sample, ["--task", "edit", *EDIT]),
    "objects, low memory": (sample, [*OBJECTS, "--low-memory"]),
    "uni t2i": (uni_sample, ["--prompt", "a red circle"]),
    "uni edit": (uni_sample, EDIT),
    "uni edit, low memory": (uni_sample, [*EDIT, "--low-memory"]),
}


def run(program, arguments, device, *more):
    """The program in fp32, two steps."""
    program.main([*arguments, "--steps", "2", "--dtype", "float32", "--device", device, *more])


@pytest.mark.parametrize("case", DRAWING)
def test_it_draws_the_pixels_of_the_cpu(case, device, tmp_path):
    drawn = []
    for where in ("cpu", device):
        run(*DRAWING[case], where, "--out", f"{where}/a.png")
        files = sorted((tmp_path / where).glob("*.png"))
        drawn.append([np.asarray(Image.open(file), int) for file in files])
    assert len(drawn[0]) == len(drawn[1]) > 0
    largest = max(abs(a - b).max() for a, b in zip(*drawn))
    assert largest <= (0 if device == "pretend" else 2)


def test_it_reads_what_the_cpu_reads(device, capsys):
    about = ["--image", "dog.png", "--image", "cat.png"]
    questions = ["--prompt", "how many stars?", "--prompt", "what is on the left?"]
    for arguments in (["--task", "caption", *about], ["--task", "answer", *about, *questions]):
        read = []
        for where in ("cpu", device):
            run(uni_sample, arguments, where)
            read.append(capsys.readouterr().out)
        assert read[0] == read[1] and read[0].strip()


@pytest.mark.parametrize("guidance", [1, 4.5])
def test_no_step_of_drawing_waits_for_the_device(guidance, device):
    def progress(steps):
        first, *others = steps
        yield first  # which makes the tables for all steps
        with no_waits(device):
            yield from others

    picture = Image.open("dog.png")
    options = {"steps": 3, "guidance": guidance, "progress": progress}
    engine = DreamEngine.load(device=device)
    assert len(engine.generate([["a star"], [picture, " and a ring"]], **options)) == 2
    assert len(UniAlignment.load(device=device).generate(["a star"], [[picture]], **options)) == 1


# ---- training -----------------------------------------------------------------------------------

TRAINING = {
    "stage 1, a worker": (train, ["--stage", "1", "--workers", "1"]),
    "stage 2": (train, ["--stage", "2", "--lmm-lora", "--checkpointing"]),
    "unialignment": (uni_train, ["--checkpointing"]),
}


@pytest.mark.parametrize("case", TRAINING)
def test_a_resumed_training_equals_an_unbroken_one_and_the_cpu_s(case, device, tmp_path):
    """Frozen models are fp32 on the CPU and bf16 elsewhere: losses are about the same."""
    program, more = TRAINING[case]
    for where, out in (("cpu", "cpu"), (device, "whole"), (device, "parts")):
        arguments = [*TRAIN, *more, "--device", where, "--out", out]
        program.main(arguments)
        if out == "parts":
            (last,) = (tmp_path / out / "checkpoints").glob("000002")
            last.rename(tmp_path / "removed")
            program.main([*arguments, "--resume"])
    losses = {out: [r["loss"] for r in runs.read_metrics(out)] for out in ("cpu", "whole", "parts")}
    assert losses["whole"] == pytest.approx(losses["cpu"], rel=0.05)
    exact = device == "pretend"
    assert losses["parts"] == (
        losses["whole"] if exact else pytest.approx(losses["whole"], rel=1e-3)
    )
    whole, parts = (weights(tmp_path / out) for out in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, x in whole.items():
        assert torch.equal(x, parts[name]) if exact else relative(x, parts[name]) < 1e-3, name


def weights(out):
    (file,) = [*out.glob("stage?.safetensors"), *out.glob("transformer/*.safetensors")]
    return load_file(file)


# ---- the number of operations -------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("family", ["SD3.5-medium", "SD3.5-large"])
def test_a_guided_step_takes_two_fifths_of_the_operations_of_diffusers(family):
    """One more operation in each block would be over the limit."""
    config, counts = mmdit.FAMILIES[family], []
    with torch.device("meta"):
        model = mmdit.MMDiT(config).to(torch.bfloat16)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    condition = Condition(on_meta(2, TOKENS, config.width), mask, on_meta(2, config.width))

    def progress(steps):
        for step in steps:
            counts.append(counter.count)
            yield step

    with Operations() as counter:
        denoise(model, condition, on_meta(1, *LATENT).float(), steps=3, progress=progress)
    one_step = counter.count - counts[-1]  # the first also makes the tables for all steps
    assert counts[2] - counts[1] == one_step
    diffusers = json.loads((GOLDEN / "operations.json").read_text())[family]
    assert 0 < one_step <= 0.42 * diffusers
