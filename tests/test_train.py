"""Training: only the right parameters change, nothing is lost, and many processes equal one."""

import errno
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

from support.cli import UserError, one_line_errors

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLConfig, Qwen2VLModel

import data
import dream_engine
import flow
import train
from adapter import Adapter
from dream_engine import DreamEngine
from lmm import PatchConfig, Qwen2VL
from mmdit import FAMILIES, MMDiT, MMDiTConfig
from support import runs
from unialignment import train as unialignment_train
from vae import VAE, VAEConfig

SMALL = ["--batch", "2", "--warmup", "1", "--device", "cpu", "--sample-every", "0"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def engines(monkeypatch):
    """Every engine that a training run loads."""
    loaded, load = [], DreamEngine.load
    monkeypatch.setattr(
        DreamEngine, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1]
    )
    return loaded


def arguments(stage, steps, out, *more):
    return ["--stage", str(stage), "--steps", str(steps), "--out", out, *SMALL, *more]


def run(stage, steps, out="run", *more):
    train.main(arguments(stage, steps, out, *more))
    return load_file(Path(out, f"stage{stage}.safetensors"))


def fails(*arguments):
    with pytest.raises(UserError) as error:
        run(*arguments)
    return str(error.value)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(out):
    return [record["loss"] for record in runs.read_metrics(Path(out))]


# ---- what is trained


@pytest.mark.parametrize("stage, more", [(1, []), (2, []), (2, ["--lmm-lora"])])
def test_not_one_frozen_byte_changes_and_all_that_learns_does(stage, more, engines):
    run(stage, 3, "run", *more)
    (engine,) = engines
    fresh = DreamEngine.load(checkpoint=None, device="cpu").state_dict()
    learned = engine.learned()
    state = {k.replace(".base.", "."): v for k, v in engine.state_dict().items()}
    frozen = {k for k in state if not k.startswith("adapter.") and not k.endswith((".A", ".B"))}
    assert frozen == {k for k in fresh if not k.startswith("adapter.")}
    assert all(state[k].numpy().tobytes() == fresh[k].numpy().tobytes() for k in frozen)
    assert {k.split(".")[1] for k in learned if k.startswith("lora")} == {
        (1, False): set(),
        (2, False): {"mmdit"},
        (2, True): {"mmdit", "lmm"},
    }[stage, bool(more)]
    started = train.load_engine(train.parse(arguments(stage, 3, "other", *more)), "cpu").learned()
    assert started.keys() == learned.keys()
    assert not [k for k in learned if torch.equal(learned[k], started[k])]


def test_adapters_of_other_depth_are_kept_and_gone_on_with():
    deep = run(1, 1, "deep", "--layers", "3", "--mlp-dim", "32")
    assert [len(deep[f"adapter.txt.{i}.bias"]) for i in (0, 2, 4)] == [32, 32, 128]
    goes_on = run(2, 1, "next", "--checkpoint", "deep")
    assert {k for k in goes_on if k.startswith("adapter.")} == deep.keys()
    flat = run(1, 1, "flat", "--layers", "1")
    assert "adapter.txt.0.bias" in flat and "adapter.txt.2.bias" not in flat


def test_stage_2_from_none_starts_a_new_adapter():
    scratch = run(2, 1, "a", "--checkpoint", "none")
    assert any(name.startswith("lora.") for name in scratch)
    learned = load_file(train.STAGE1)["adapter.txt.0.weight"]
    assert (scratch["adapter.txt.0.weight"] - learned).norm() > 0.5 * learned.norm()


def test_noise_t_and_r_depend_on_seed_and_number():
    engine = DreamEngine.load(device="cpu")

    class Micro:
        number, target = 7, torch.zeros(64, 3, 32, 48)

    drawn = {}
    for name, more in {
        "": [],
        "again": [],
        "blend": ["--blend", "0.25"],
        "seed": ["--seed", "1"],
    }.items():
        args = train.parse(["--stage", "1", *SMALL, *more])
        engine.start_training(r=args.blend)
        draws = engine.training_noise(Micro, train.generator(args.seed, Micro.number))
        drawn[name] = [draws[part] for part in ("noise", "t", "r")]
    noise, t, r = drawn[""]
    assert (
        noise.shape == (64, 8, 4, 6)
        and 0 < t.min()
        and t.max() < 1
        and 0 <= r.min()
        and r.max() <= 1
    )
    assert r.std() > 0.2 and abs(noise.std() - 1) < 0.05
    assert all(map(torch.equal, drawn[""], drawn["again"]))
    assert torch.equal(drawn["blend"][0], noise) and torch.equal(drawn["blend"][1], t)
    assert torch.equal(drawn["blend"][2], torch.full((64,), 0.25))
    assert not torch.equal(drawn["seed"][0], noise)


def test_both_losses(engine):
    """The official one weighs the error by t squared."""
    image = torch.rand(2, 3, 48, 48) * 2 - 1
    prompts = [["a red circle"], ["a blue star"]]
    t, r = torch.tensor([0.3, 0.8]), torch.zeros(2)
    noise = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        plain = engine(engine.lmm.collate(prompts), image, noise, t, r)
        weighted = engine(engine.lmm.collate(prompts), image, noise, t, r, weighted=True)
        torch.testing.assert_close(weighted, t**2 * plain)
        x0 = engine.vae.encode(image)
        c = engine.encode(prompts)
        velocity = engine.mmdit(flow.add_noise(x0, noise, t), t, c.txt, c.vec, c.mask)
    torch.testing.assert_close(plain, (velocity - noise + x0).square().mean((1, 2, 3)))


def test_checkpointing_changes_memory_not_gradients():
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig(3, 128, 32, 4, 2, 8, 16, 16))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    inputs = [torch.rand(shape) for shape in ((2, 4, 8, 8), (2,), (2, 5, 128), (2, 128))]
    gradients = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        model(*inputs).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_frozen_weights_in_bf16_give_nearly_the_same_gradients():
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        engine = DreamEngine.load(checkpoint=None, device="cpu", dtype=dtype)
        learning = engine.start_training(4)
        for name, p in learning.items():
            if name.endswith(".B"):
                torch.nn.init.normal_(p, std=0.1)
        image = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
        batch = engine.lmm.collate([["a red circle"]])
        engine(batch, image, torch.ones(1, 8, 6, 6), torch.tensor([0.5]), torch.zeros(1)).backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in learning.values())
        gradients[dtype] = torch.cat([p.grad.flatten() for p in learning.values()])
    assert torch.cosine_similarity(*gradients.values(), dim=0) > 0.98


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 16])
def test_the_plan_of_activations_is_near_the_truth(rank):
    engine = DreamEngine.load(checkpoint=None, device="cpu")
    engine.start_training(rank)
    txt, vec = (torch.randn(s, requires_grad=True) for s in ((4, 200, 128), (4, 128)))
    frozen = {p.untyped_storage().data_ptr() for p in engine.parameters()}
    for engine.mmdit.checkpointing in (False, True):
        saved = {}

        def count(x, saved=saved):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            engine.mmdit(torch.randn(4, 8, 6, 6), torch.full((4,), 0.5), txt, vec)
        measured = sum(size for pointer, size in saved.items() if pointer not in frozen)
        planned = 4 * runs.activation_bytes(engine.mmdit, 209, engine.mmdit.checkpointing)
        if engine.mmdit.checkpointing:  # on the way back, one block is there in full
            planned -= runs.SAVED * 4 * 209 * 128 * 4
        assert 0.8 < planned / measured < 1.25


@pytest.mark.parametrize("stage, limit", [(1, 48e9), (2, 80e9)])
def test_the_published_sizes_fit_one_gpu_by_the_plan(stage, limit):
    """SD3.5-large and Qwen2-VL-2B, frozen in bf16, 8 examples of 512 x 512 at once."""
    text = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    text |= {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936}
    vision = {"embed_dim": 1280, "depth": 32, "num_heads": 16, "hidden_size": 1536}
    config = Qwen2VLConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        lmm = Qwen2VL(Qwen2VLModel(config).bfloat16(), None, PatchConfig())
        transformer = MMDiT(FAMILIES["SD3.5-large"]).bfloat16()
        adapter, vae = Adapter(1536, 2432), VAE(VAEConfig()).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dream_engine, "fingerprint", lambda weight: 0.0)  # these hold no numbers
        engine = DreamEngine(lmm, adapter, transformer, vae)
    with torch.device("meta"):
        learning = engine.start_training(32 if stage == 2 else None)
    assert all(p.dtype == torch.float32 for p in learning.values())
    args = train.parse(["--stage", str(stage), "--batch", "8", "--checkpointing", "--size", "512"])
    args.rank = 32 if stage == 2 else None
    plan = runs.memory_plan(engine, args, 1).splitlines()
    expected = 2 * (8.0566 + 0.0897 + 2.2090) + 0.335
    assert float(plan[0].split()[0]) == pytest.approx(expected, abs=0.05)
    assert 1e9 * float(plan[-1].split()[0]) < limit


# ---- processes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start():
    """start(function, *arguments, **environment): a process of its own group that runs it here."""
    processes, started = multiprocessing.get_context("forkserver"), []
    processes.set_forkserver_preload([__name__])  # which imports all that a process needs, once
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()

    def start(function, *arguments, **environment):
        here = Path.cwd(), os.environ | environment
        started.append(processes.Process(target=enter, args=(*here, function, arguments)))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def enter(folder, environment, function, arguments):
    os.setpgrp()
    os.chdir(folder)
    os.environ.update(environment)
    log = os.open(f"log{environment.get('RANK', '')}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    multiprocessing.set_start_method("fork", force=True)  # data workers, as outside of tests
    torch.set_num_threads(1)
    with one_line_errors():
        function(*arguments)


def wait_for(condition, process):
    deadline = time.time() + 60
    while not condition():
        assert time.time() < deadline and process.is_alive()
        time.sleep(0.005)


def logged(steps, out="run"):
    """Has a run logged so many steps?"""
    file = Path(out, "metrics.jsonl")
    return lambda: file.exists() and file.read_bytes().count(b"\n") >= steps


def launch(start, *arguments, main=train.main):
    """Two processes that train together, as torchrun starts them."""
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [
        start(main, arguments, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)
    ]


def test_two_processes_equal_one(start):
    """Replicated or with the frozen base in shards, the same microbatches give the same weights."""
    tasks = ["--tasks", "edit=1"]
    looking = ["--shard", "--checkpointing", "--sample-every", "2"]  # drawing needs all shards
    for out, more in {"replicated": [], "sharded": looking}.items():
        processes = launch(start, *arguments(2, 2, out, *tasks, "--save-every", "1", *more))
        if out == "replicated":
            alone = run(2, 2, "alone", "--accumulate", "2", *tasks)
        for process in processes:
            process.join(60)
            assert process.exitcode == 0, Path("log0").read_text() + Path("log1").read_text()
        for name, tensor in load_file(f"{out}/stage2.safetensors").items():
            torch.testing.assert_close(alone[name], tensor, rtol=0, atol=1e-5)
        assert losses("alone") == pytest.approx(losses(out), abs=1e-5)
    assert Path("log0").read_text().count("AdamW") == 2  # one rank speaks, in each of the two runs
    assert "AdamW" not in Path("log1").read_text()
    assert Path("sharded/samples-000002.png").exists()


def test_unialignment_in_two_processes_stops_on_a_signal_and_equals_one(start):
    main, weights = unialignment_train.main, "transformer/diffusion_pytorch_model.safetensors"
    more = ["--steps", "6", *SMALL, "--weights", "csa=0"]  # CSA compares the rows of a microbatch
    processes = launch(start, *more, "--out", "two", main=main)
    wait_for(logged(2, "two"), processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)  # of one alone
    for process in processes:
        process.join(60)
        assert process.exitcode == 128 + signal.SIGTERM, Path("log0").read_text()
    assert 2 <= len(losses("two")) < 6
    for process in launch(start, *more, "--out", "two", "--resume", main=main):
        process.join(60)
        assert process.exitcode == 0, Path("log0").read_text()
    main([*more, "--out", "alone", "--accumulate", "2"])
    assert losses("alone") == pytest.approx(losses("two"), abs=1e-4)
    alone, two = (load_file(Path(out, weights)) for out in ("alone", "two"))
    for name, tensor in two.items():
        torch.testing.assert_close(alone[name], tensor, rtol=0, atol=1e-4)


def test_a_dead_rank_ends_the_run_with_a_clear_line(start):
    first, second = launch(start, *arguments(1, 10**6, "run", "--save-every", "1"))
    wait_for(lambda: runs.latest("run"), first)
    second.kill()
    first.join(60)
    said = Path("log0").read_text().splitlines()[-1]
    assert first.exitcode == 2
    assert said.startswith("error: rank 0: lost the other process") and "--resume continues" in said


@pytest.mark.parametrize("bad, code", [(10, 0), (11, 2)])
def test_a_bad_line_counts_once_however_many_processes_skip_it(bad, code, start):
    """Each microbatch is an epoch, so that both processes meet every bad line."""
    Image.new("RGB", (48, 48), "red").save("a.png")
    lines = [
        {"task": "t2i", "prompt": "red", "target": f"{x}.png"} for x in "abcdefghijkl"[: 1 + bad]
    ]
    Path("a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = ["--data", "a.jsonl", "--tasks", "t2i=1", "--batch", str(len(lines))]
    for rank, process in enumerate(launch(start, *arguments(1, 2, "run", *more))):
        process.join(60)
        said = Path(f"log{rank}").read_text()
        assert process.exitcode == code, said
        assert "skipped a.jsonl:2" in said
        if code:
            assert "error: 11 bad lines are over 1 %: a.jsonl:" in said
    if not code:
        assert [record["bad_lines"] for record in runs.read_metrics("run")] == [10.0, 10.0]
        assert "10 bad lines were skipped" in Path("log0").read_text()


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"MASTER_PORT": None}, "MASTER_PORT=None: torchrun sets it to a whole number"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT=x: torchrun sets it to a whole number"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536: .* from 1 to 65535"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR=None: torchrun sets it to the address of rank 0"),
        ({"MASTER_ADDR": "a" * 99}, "MASTER_ADDR=aaa.*: torchrun sets it to the address of rank 0"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK=None: torchrun sets it to a whole number from 0"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x: torchrun sets it to a whole number from 0"),
        ({"RANK": "x"}, "RANK=x, WORLD_SIZE=2: torchrun sets both to whole numbers"),
        ({"RANK": None}, "RANK=None, WORLD_SIZE=2: torchrun sets both"),
        ({"WORLD_SIZE": "-1"}, "RANK=0, WORLD_SIZE=-1: torchrun sets both"),
        ({"RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({}, "rank 0: cannot join the other processes .*; no checkpoint was saved yet"),
    ],
)
def test_what_torchrun_sets_is_checked(environment, said, monkeypatch):
    with socket.create_server(("", 0)) as taken:
        common = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
        common |= {"MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in (common | environment).items():
            monkeypatch.delenv(name, False) if value is None else monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"^{said}"):
            train.main(arguments(1, 1, "run"))
    assert not Path("run").exists()


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_every_way_to_start_workers_gives_the_same_run(method):
    Image.new("RGB", (48, 48), "red").save("a.png")
    line = {"task": "t2i", "prompt": "red", "target": "a.png"}
    Path("a.jsonl").write_text(json.dumps(line) + "\n")
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        made = run(1, 2, method, "--data", "a.jsonl", "--workers", "1")
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert equal(made, run(1, 2, "alone", "--data", "a.jsonl"))


def test_workers_ignore_ctrl_c_where_there_are_no_process_groups(monkeypatch):
    monkeypatch.delattr(os, "setpgrp")
    data.start_worker(0)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


# ---- nothing lost -------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_stopping_saves_and_resuming_goes_on_bit_exactly(signum, start):
    more = ["--workers", "1", "--accumulate", "2"] if signum == signal.SIGTERM else []
    process = start(train.main, arguments(2, 12, "run", *more))
    wait_for(logged(3), process)
    os.killpg(process.pid, signum)  # the data workers get it, too, as from a terminal or torchrun
    straight = run(2, 12, "straight", *more)
    process.join(60)
    assert process.exitcode == 128 + signum
    assert "stopped after step" in Path("log").read_text()
    assert 3 <= len(losses("run")) < 12
    assert "--resume continues" in fails(2, 12, "run", *more)
    assert equal(run(2, 12, "run", "--resume", *more), straight)
    assert [r["step"] for r in runs.read_metrics("run")] == list(range(1, 13))
    assert losses("run") == losses("straight")
    assert equal(run(2, 12, "run", "--resume", *more), straight)  # nothing is left to do


def test_resume_without_a_run_begins_one():
    assert equal(run(1, 2, "a", "--resume"), run(1, 2, "b"))


def test_resuming_with_other_settings_says_what_differs(monkeypatch):
    run(1, 2, "one")
    run(2, 2, "run", "--rank", "4")
    said = fails(2, 2, "run", "--resume", "--rank", "8", "--tasks", "t2i=1", "--batch", "3")
    assert "rank: 4 then, 8 now" in said and "batch: 2 then, 3 now" in said
    assert "'edit 48x48 x 3 from rendered scenes'" in said
    assert "seed" not in said
    monkeypatch.setattr(dream_engine, "fingerprint", lambda weight: 1.5)
    assert "base: 10.2484 then, 1.5 now" in fails(1, 2, "one", "--resume")


def save_again_and_again(steps):
    engine = DreamEngine.load(checkpoint=None, device="cpu")
    optimizer = torch.optim.AdamW(engine.start_training().values())
    engine(*example(engine)).sum().backward()
    optimizer.step()
    Path("run").mkdir(exist_ok=True)
    first = int(runs.latest("run").name) if runs.latest("run") else 0
    for step in range(first + 1, first + 1 + steps):
        name = "stage1.safetensors"
        runs.save(engine, optimizer, Path("run"), step, SETTINGS, name=name, keep=1)


SETTINGS = {"stage": 1, "rank": None, "alpha": None}


def example(engine):
    batch = engine.lmm.collate([["a red circle"]])
    image, noise = torch.zeros(1, 3, 48, 48), torch.ones(1, 8, 6, 6)
    return batch, image, noise, torch.tensor([0.5]), torch.zeros(1)


def test_a_kill_inside_a_save_leaves_a_whole_checkpoint(start):
    rng, seen = random.Random(0), [0]
    for _ in range(6):
        process = start(save_again_and_again, 10**6)
        wait_for(lambda: runs.latest("run") and int(runs.latest("run").name) > seen[-1], process)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        last = runs.latest("run")
        seen.append(int(last.name))
        assert len(load_file(last / "stage1.safetensors")) == 8
        assert torch.load(last / "state.pt", weights_only=True)["step"] == seen[-1]
        assert len(load_file("run/stage1.safetensors")) == 8
    assert seen == sorted(set(seen))
    save_again_and_again(1)
    assert [f.name for f in Path("run/checkpoints").iterdir()] == [f"{seen[-1] + 1:06d}"]


def test_a_run_killed_again_and_again_goes_on_every_time(start):
    rng, reached = random.Random(0), [0]
    again = arguments(1, 10**6, "run", "--resume", "--save-every", "1", "--batch", "1")
    for _ in range(5):
        process = start(train.main, again)
        wait_for(lambda: runs.latest("run") and int(runs.latest("run").name) > reached[-1], process)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        reached.append(int(runs.latest("run").name))
    steps = [record["step"] for record in runs.read_metrics("run")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= reached[-1] >= 5


def test_two_trainings_in_one_folder_are_refused_and_a_kill_leaves_no_lock(start):
    leftovers = "checkpoints/000007.old/", "checkpoints/000009.partial/", ".loss.png.partial-1a"
    first = start(train.main, arguments(1, 10**6, "run", "--workers", "1"))  # which outlives it
    wait_for(logged(1), first)
    for more in ([], ["--resume"]):
        said = fails(1, 2, "run", *more)
        assert said == "run: another training writes to this folder; choose another --out"
    first.kill()
    first.join()
    for name in leftovers:
        path = Path("run", name)
        path.mkdir(parents=True) if name.endswith("/") else path.touch()
    assert equal(run(1, 2, "run", "--resume"), run(1, 2, "alone"))
    both = [sorted(f.relative_to(out) for f in Path(out).rglob("*")) for out in ("run", "alone")]
    assert both[0] == both[1] and Path(".lock") not in both[0]


def test_windows_locks_a_byte(monkeypatch):
    locked = []

    def locking(file, mode, count):
        if locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        locked.append((mode, count))

    windows = SimpleNamespace(LK_NBLCK=2, locking=locking)
    monkeypatch.setitem(sys.modules, "msvcrt", windows)
    monkeypatch.setattr(runs.sys, "platform", "win32")
    with runs.locked("run"):
        with pytest.raises(UserError, match="^run: another training writes"), runs.locked("run"):
            pass
        assert locked == [(2, 1)] and Path("run/.lock").exists()
    assert not Path("run").exists()


def test_a_folder_that_cannot_be_locked_says_so(monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    run(1, 1)
    assert "run: cannot be locked ([Errno 37] No locks available)" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_weights_without_their_run_are_not_trained_over(more):
    before = run(1, 2, "run")
    shutil.rmtree("run/checkpoints")
    Path("other").mkdir()
    shutil.copy("run/stage1.safetensors", "other/stage2.safetensors")
    for stage, out in ((1, "run"), (2, "run"), (1, "other")):
        said = fails(stage, 2, out, *more)
        assert said.startswith(f"--out holds {out}/stage") and "choose another folder" in said
    assert equal(load_file("run/stage1.safetensors"), before) and losses("run")


def spoil(file, value):
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = value
    with safe_open(file, "pt") as saved:
        save_file(tensors, file, saved.metadata())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_neither_resumed_nor_saved(value):
    run(1, 2, "run", "--save-every", "1")
    shutil.copytree("run", "copy")
    spoil("copy/checkpoints/000002/stage1.safetensors", value)
    said = fails(1, 2, "copy", "--resume")
    assert said.startswith("copy/checkpoints/000002/stage1.safetensors: holds NaN or infinity")
    shutil.rmtree("copy/checkpoints/000002")
    assert equal(
        run(1, 2, "copy", "--resume", "--save-every", "1"), load_file("run/stage1.safetensors")
    )

    spoil("run/stage1.safetensors", value)
    assert "NaN or infinity" in fails(1, 1, "new", "--checkpoint", "run/stage1.safetensors")
    parameter = torch.nn.Parameter(torch.tensor([1.0, value]))
    with pytest.raises(UserError, match="^step 7: NaN or infinity in the weights; no checkpoint"):
        runs.save(None, torch.optim.AdamW([parameter]), Path("new"), 7, SETTINGS, name="x")
    assert not Path("new").exists()


@pytest.mark.parametrize(
    "error, room",
    [
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), False),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("I/O error: File too large (os error 27)"), True),
        (SafetensorError("I/O error: Permission denied (os error 13)"), False),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), True),
    ],
)
def test_only_a_full_disk_asks_for_room(error, room):
    with pytest.raises(UserError) as end, runs.writing(Path("run")):
        raise error
    said = str(end.value)
    assert said.startswith(f"run: cannot be written ({error})") and ("make room" in said) == room
    assert said.endswith("; no checkpoint was saved yet") and "resume" not in said


def test_killed_trainings_end_as_unbroken_ones():
    command = [sys.executable, "-m", "tests.kills", "--kills", "2", "--out", "kills.json"]
    path = {"PYTHONPATH": str(Path(train.__file__).parent)}
    done = subprocess.run(
        command, env=os.environ | path, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(Path("kills.json").read_text())
    assert rows.keys() == {"stage 1", "stage 2", "UniAlignment"}
    for row in rows.values():
        assert (row["kills"], row["resumptions"], row["full disks"], row["equal"]) == (
            2,
            2,
            1,
            True,
        )
    assert done.stdout.count("| True |") == 3


def test_a_full_disk_keeps_the_previous_checkpoint():
    run(1, 2, "run", "--save-every", "1")
    before = sorted(Path("run/checkpoints").iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        said = fails(1, 2, "new")
        Path("run/checkpoints/000002").rename("run/checkpoints/000002.partial")
        refused = fails(1, 2, "run", "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in said and "make room" in said
    assert said.endswith("no checkpoint was saved yet")
    assert "the last good checkpoint is run/checkpoints/000001" in refused
    assert list(Path("run/checkpoints").iterdir()) == before[:1]
    run(1, 2, "run", "--resume")


@pytest.mark.parametrize("bad", [[2], [2, 3, 4, 6, 7, 8, 9], [3, 4, 5, 6, 7]])
def test_steps_that_are_not_finite_are_skipped_and_five_in_a_row_end_the_run(bad, monkeypatch):
    calls, honest = iter(range(1, 100)), flow.velocity_loss

    def loss(*a):
        return honest(*a) * (math.nan if next(calls) in bad else 1)

    monkeypatch.setattr(flow, "velocity_loss", loss)
    if bad == [3, 4, 5, 6, 7]:
        said = fails(1, 9, "run", "--save-every", "2")
        assert "up to step 7; the last good checkpoint is run/checkpoints/000002" in said
        return
    assert all(x.isfinite().all() for x in run(1, 9).values())
    records = runs.read_metrics("run")
    assert records[-1]["skipped"] == len(bad) and len(records) == 9


# ---- damaged folders ----------------------------------------------------------------------------


def change(edit):
    """What rewrites state.pt with what edit makes of it."""
    return lambda file: torch.save(edit(torch.load(file, weights_only=True)), file)


def put(**values):
    return change(lambda state: state | values)


def without(name):
    return change(lambda state: {k: v for k, v in state.items() if k != name})


def moments(edit):
    def change_moments(state):
        edit(state["optimizer"]["state"])
        return state

    return change(change_moments)


DAMAGE = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:1000]),
    "zeros": lambda file: file.write_bytes(bytes(1000)),
    "text": lambda file: file.write_text("step 2\n"),
    "code": lambda file: file.write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR."),
    "a list": change(lambda state: [1, 2]),
    "no step": without("step"),
    "no settings": without("settings"),
    "no optimizer": without("optimizer"),
    "step -5": put(step=-5),
    "step NaN": put(step=math.nan),
    "settings a text": put(settings="stage 1"),
    "settings tensors": put(settings={"stage": torch.zeros(2)}),
    "base a text": change(lambda state: state | {"settings": state["settings"] | {"base": "x"}}),
    "optimizer a list": put(optimizer=[]),
    "moments of no parameter": moments(lambda saved: saved.update({99: {}})),
    "moments too few": moments(lambda saved: saved.pop(0)),
    "moments of another shape": moments(lambda saved: saved[0].update(exp_avg=torch.zeros(3))),
    "moments missing": moments(lambda saved: saved[1].pop("exp_avg_sq")),
    "moments NaN": moments(lambda saved: saved[0]["exp_avg"].fill_(math.nan)),
}


def test_a_damaged_state_ends_in_one_line_that_names_it():
    run(1, 2, "whole")
    args = train.parse(arguments(1, 2, "other"))
    engine = train.load_engine(args, "cpu")
    optimizer = torch.optim.AdamW([p for p in engine.parameters() if p.requires_grad])
    settings = torch.load("whole/checkpoints/000002/state.pt", weights_only=True)["settings"]
    assert runs.restore(Path("whole"), engine, optimizer, settings) == 2
    for name, damage in DAMAGE.items():
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree("whole", "run")
        damage(Path("run/checkpoints/000002/state.pt"))
        with pytest.raises(UserError) as error:
            runs.restore(Path("run"), engine, optimizer, settings)
        said = str(error.value)
        assert said.startswith("run/checkpoints/000002/state.pt: ") and "\n" not in said, name
    assert not Path("hacked").exists()

    two = "stage1.safetensors, stage2.safetensors"
    for name, found in (("stage2.safetensors", two), (None, "nothing")):
        shutil.rmtree("run")
        shutil.copytree("whole", "run")
        weights = Path("run/checkpoints/000002/stage1.safetensors")
        shutil.copy(weights, weights.with_name(name)) if name else weights.unlink()
        said = fails(1, 2, "run", "--resume")
        assert (
            said.startswith("run/checkpoints/000002: expected state.pt and one") and found in said
        )
    Path("run/checkpoints/000002/state.pt").write_text("")
    assert "run/checkpoints/000002/state.pt: " in fails(1, 2, "run", "--resume")


@pytest.mark.parametrize(
    "line",
    [
        "5",
        '{"step": 2, "lo',
        '{"step": 2, "loss": 1.0}',
        '{"step": 2, "loss": "low", "loss_by_t": [0, 0, 0, 0, 0]}',
        '{"step": 2, "loss": 1.0, "loss_by_t": [0, 0, 0, 0, "x"]}',
        '{"step": 2, "loss": 1.0, "loss_by_t": [0, 0]}',
        '{"step": "2", "loss": 1.0, "loss_by_t": [0, 0, 0, 0, 0]}',
        '{"step": 2, "loss": 1' + 400 * "0" + ', "loss_by_t": [0, 0, 0, 0, 0]}',
        "[" * 100_000,
    ],
)
def test_a_damaged_line_of_metrics_is_named(line):
    good = json.dumps({"step": 1, "loss": None, "loss_by_t": [None, 1, 2.5, 0, 1]})
    Path("run").mkdir()
    file = Path("run/metrics.jsonl")
    file.write_text(f"{good}\n{line}")  # a killed run may leave half of its last line
    assert runs.read_metrics("run") == [json.loads(good)]
    file.write_text(f"{good}\n{line}\n{good}\n")
    for use in (runs.loss_curve, lambda out: runs.open_folder(out, 0)):
        with pytest.raises(
            UserError, match=r"^run/metrics\.jsonl:2: expected a line that train.py"
        ):
            use(Path("run"))
    file.write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match=r"^run/metrics\.jsonl: damaged"):
        runs.read_metrics("run")


# ---- what a person sees -------------------------------------------------------------------------


def test_a_run_leaves_pictures_metrics_and_a_checkpoint_for_sample(capsys):
    more = ["--sample-every", "3", "--save-every", "1", "--keep", "2"]
    run(2, 4, "run", "--tasks", "t2i=1,objects=1", *more)
    assert sorted(p.name for p in Path("run").iterdir()) == [
        "checkpoints",
        "loss.png",
        "metrics.jsonl",
        "samples-000003.png",
        "samples-000004.png",
        "stage2.safetensors",
    ]
    assert sorted(p.name for p in Path("run/checkpoints").iterdir()) == ["000003", "000004"]
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    for record in records:
        assert record["loss"] > 0 and record["grad_norm"] > 0 and record["examples_per_s"] > 0
        assert len(record["loss_by_t"]) == 5
    grid = Image.open("run/samples-000004.png")
    assert grid.height == 6 * 132 + 4  # three rows for each of two tasks
    said = capsys.readouterr().out
    assert "521,472 trainable parameters" in said and "AdamW" in said


def test_the_saved_file_draws_what_the_trained_engine_draws(engines):
    run(2, 3, "run", "--rank", "4", "--alpha", "8", "--lr", "0.03", "--lmm-lora")
    (trained,) = engines
    merged = DreamEngine.load(checkpoint="run", device="cpu")
    apart = DreamEngine.load(checkpoint="run/stage2.safetensors", device="cpu", merge=False)
    torch.manual_seed(0)
    first, *others = (
        torch.tensor(bytearray(e.generate([["a red circle"]], 2, guidance=2)[0].tobytes())).int()
        for e in (trained, merged, apart, DreamEngine.load(checkpoint=None, device="cpu"))
    )
    assert [bool((first - other).abs().max() <= 1) for other in others] == [True, True, False]


def test_manifests_of_all_tasks_train(capsys):
    Image.new("RGB", (80, 60), "red").save("a.png")
    lines = [
        {"task": "t2i", "prompt": "red", "target": "a.png"},
        {"task": "edit", "source": "a.png", "instruction": "none", "target": "a.png"},
        {"task": "objects", "target": "a.png", "segments": [["a", [[100, 100, 600, 600]]]]},
    ]
    Path("a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(2, 2, "run", "--data", "a.jsonl=2", "--workers", "1")
    Path("b=1.jsonl").write_text(json.dumps(lines[0]))
    wanted = ["--data", "b=1.jsonl", "--tasks", "edit=1,i2i=1,objects=0"]
    assert "holds no example of task edit" in fails(2, 1, "b", *wanted)
    run(1, 2, "b", "--data", "b=1.jsonl")  # its target serves to be copied, too
    said = capsys.readouterr().out
    assert "\ni2i 48x48 x 1 from b=1.jsonl:" in said and "\nt2i 48x48 x 1 from b=1.jsonl:" in said
    run(2, 2, "c", "--data", "a.jsonl", "--buckets", "--size", "48")


@pytest.mark.parametrize(
    "mistake, message",
    [
        ([], "--stage"),
        (["--stage", "7"], "invalid choice: 7"),
        (["--stage", "1", "--out", "/dev/null/x"], "/dev/null/x"),
        (["--stage", "2", "--data", "none.jsonl"], "none.jsonl: no such manifest"),
        (["--stage", "1", "--lmm-lora"], "--rank, --alpha and --lmm-lora belong to --stage 2"),
        (["--stage", "2", "--rank", "0", "--lmm-lora"], "--lmm-lora needs a --rank of at least 1"),
        (["--stage", "2", "--data", "a.jsonl=-1"], "a number above 0"),
        (["--stage", "2", "--data", "a.jsonl=nan"], "a number above 0"),
        (["--stage", "2", "--null", "2"], "--null: '2': expected a number from 0 to 1"),
        (["--stage", "1", "--alpha", "4"], "belong to --stage 2"),
        (["--stage", "2", "--layers", "3"], "--checkpoint has its own"),
        (["--stage", "unialignment"], "now started by python -m unialignment.train"),
        (["--stage", "2", "--tasks", "draw=1"], "the tasks being t2i, i2i, edit, objects"),
        (["--stage", "2", "--tasks", "t2i"], "expected such as t2i=1,edit=2"),
        (["--stage", "2", "--tasks", "t2i=0"], "expected such as t2i=1,edit=2"),
        (["--stage", "2", "--sd3", "big.safetensors"], "--checkpoint is missing"),
        (["--stage", "1", "--sd3", "big.safetensors"], "--data is missing"),
        (["--stage", "2", "--checkpoint", "gone.safetensors"], "gone.safetensors"),
        (["--stage", "2", "--checkpoint", "/tmp"], "no run of train.py"),
        (["--stage", "1", "--shard"], "--shard needs several processes"),
        (["--stage", "1", "--size", "72"], "multiples of 16"),
        (["--stage", "1", "--device", "hpu"], "device hpu: not usable"),
        (["--stage", "1", "--device", "privateuseone"], "device privateuseone: not usable"),
        (["--stage", "1", "--steps", "10000000", "--accumulate", "1000"], "100 million"),
    ],
)
def test_mistakes_end_in_one_line(mistake, message, capsys):
    with pytest.raises(SystemExit) as end, one_line_errors():
        train.main([*SMALL, *mistake])
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(said) == 1 and message in said[0]
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    "option, values",
    {
        "--steps": ("0", "1000000000000", "1e3", "x"),
        "--batch": ("0", "1000000"),
        "--accumulate": ("0", "1000000"),
        "--lr": ("0", "-1", "nan", "inf"),
        "--warmup": ("0",),
        "--clip": ("0", "nan", "inf"),
        "--rank": ("-1", "100000000000000000000"),
        "--alpha": ("0", "1e308", "nan"),
        "--layers": ("0", "1000"),
        "--mlp-dim": ("0", "1000000000000"),
        "--size": ("1", "1000000"),
        "--blend": ("-0.1", "2", "nan"),
        "--workers": ("-1", "100000"),
        "--seed": ("-1", "100000000000000000000"),
        "--save-every": ("0",),
        "--keep": ("0",),
        "--sample-every": ("-1",),
    }.items(),
)
def test_numbers_have_a_range(option, values):
    for value in values:
        with pytest.raises(UserError, match=f"argument {option}: '{value}': expected a.* number"):
            train.main(["--stage", "2", "--buckets", f"{option}={value}"])


def test_a_checkpoint_of_another_rank_is_refused():
    run(2, 1, "run", "--rank", "4", "--alpha", "2")
    for other in (["--rank", "8"], ["--rank", "4"], ["--rank", "0"]):
        assert "of rank 4, alpha 2" in fails(2, 1, "b", "--checkpoint", "run", *other)
    assert "of rank 4, alpha 2" in fails(1, 1, "b", "--checkpoint", "run")
    run(2, 1, "b", "--checkpoint", "run", "--rank", "4", "--alpha", "2")  # goes on from its LoRA
    assert not equal(load_file("b/stage2.safetensors"), load_file("run/stage2.safetensors"))
