"""Training: only what should learns, nothing is lost, and many processes equal one."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2VLConfig, Qwen2VLModel

import dream_engine
import flow
import logbook
import train
from adapter import Adapter
from cli import one_line_errors
from dream_engine import DreamEngine
from mmdit import FAMILIES, MMDiT, MMDiTConfig
from prompts import PatchConfig
from vae import VAE, VAEConfig

ROOT = Path(__file__).parent.parent
SMALL = ["--batch", "2", "--warmup", "1", "--device", "cpu", "--sample-every", "0"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    yield tmp_path
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before):
        signal.signal(number, handler)


@pytest.fixture
def engines(monkeypatch):
    """Every engine that a training run loads."""
    loaded, load = [], DreamEngine.load
    monkeypatch.setattr(
        DreamEngine, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1]
    )
    return loaded


def run(stage, steps, out="run", *more):
    train.main(["--stage", str(stage), "--steps", str(steps), "--out", out, *SMALL, *more])
    return load_file(Path(out, f"stage{stage}.safetensors"))


def fails(*arguments):
    with pytest.raises(ValueError) as error:
        run(*arguments)
    return str(error.value)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- what learns --------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, more", [(1, []), (2, []), (2, ["--lmm-lora"])])
def test_not_one_frozen_byte_changes_and_all_that_learns_does(stage, more, engines):
    start = [] if stage == 1 else ["--checkpoint", str(train.STAGE1)]
    run(stage, 3, "run", *start, *more)
    (engine,) = engines
    fresh = DreamEngine.load(checkpoint=None, device="cpu").state_dict()
    learnt = engine.learnt()
    state = {k.replace(".base.", "."): v for k, v in engine.state_dict().items()}
    frozen = {k for k in state if not k.startswith("adapter.") and not k.endswith((".A", ".B"))}
    assert frozen == {k for k in fresh if not k.startswith("adapter.")}
    assert all(state[k].numpy().tobytes() == fresh[k].numpy().tobytes() for k in frozen)
    assert {k.split(".")[1] for k in learnt if k.startswith("lora")} == {
        (1, False): set(),
        (2, False): {"mmdit"},
        (2, True): {"mmdit", "lmm"},
    }[stage, bool(more)]
    torch.manual_seed(0)
    before = DreamEngine.load(checkpoint=train.STAGE1 if stage == 2 else None, device="cpu")
    before.start_training(16 if stage == 2 else None, None, bool(more))
    started = before.learnt()
    assert started.keys() == learnt.keys()
    assert not [k for k in learnt if torch.equal(learnt[k], started[k])]


def test_adapters_of_other_depth_are_kept_and_gone_on_with(engines):
    deep = run(1, 1, "deep", "--layers", "3", "--mlp-dim", "32")
    assert [len(deep[f"adapter.txt.{i}.bias"]) for i in (0, 2, 4)] == [32, 32, 128]
    goes_on = run(2, 1, "next", "--checkpoint", "deep")
    assert {k for k in goes_on if k.startswith("adapter.")} == deep.keys()
    assert {"adapter.txt.0.bias", "adapter.txt.2.bias"} & run(
        1, 1, "flat", "--layers", "1"
    ).keys() == {"adapter.txt.0.bias"}


def test_one_r_for_all_and_stage_2_from_none(monkeypatch):
    seen, condition = [], DreamEngine.condition
    keep = lambda self, batch, r: seen.append(r) or condition(self, batch, r)
    monkeypatch.setattr(DreamEngine, "condition", keep)
    scratch = run(2, 2, "a", "--blend", "0.25", "--checkpoint", "none")
    assert len(seen) == 2 and all(torch.equal(r, torch.full((2,), 0.25)) for r in seen)
    assert any(name.startswith("lora.") for name in scratch)
    learnt = load_file(train.STAGE1)["adapter.txt.0.weight"]
    assert (scratch["adapter.txt.0.weight"] - learnt).norm() > 0.5 * learnt.norm()
    run(1, 2, "b")
    assert 0 < torch.stack(seen[2:]).std() and all(r.min() >= 0 and r.max() <= 1 for r in seen)


def test_both_losses(engines):
    """The official one weighs the error by t squared."""
    run(1, 1, "a")
    engine = engines[0]
    data = torch.rand(2, 3, 64, 64) * 2 - 1
    batch = engine.collate([["a red circle"], ["a blue star"]])
    t, r = torch.tensor([0.3, 0.8]), torch.zeros(2)
    noise = torch.randn(2, 8, 8, 8)
    plain = engine(batch, data, noise, t, r)
    torch.testing.assert_close(engine(batch, data, noise, t, r, weighted=True), t**2 * plain)
    x0 = engine.vae.encode(data)
    z = flow.add_noise(x0, noise, t)
    c = engine.encode([["a red circle"], ["a blue star"]])
    velocity = engine.mmdit(z, t, c.txt, c.vec, c.mask)
    torch.testing.assert_close(plain, (velocity - noise + x0).square().mean((1, 2, 3)))


def test_checkpointing_changes_memory_not_gradients():
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig(3, 128, 32, 4, 2, 8, 16, 16))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    shapes = (2, 4, 8, 8), (2,), (2, 5, 128), (2, 128)
    inputs = [torch.rand(s) for s in shapes]
    grads = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        model(*inputs).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads):
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
        image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
        batch = engine.collate([["a red circle"]])
        engine(batch, image, torch.ones(1, 8, 8, 8), torch.tensor([0.5]), torch.zeros(1)).backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in learning.values())
        gradients[dtype] = torch.cat([p.grad.flatten() for p in learning.values()])
    assert torch.cosine_similarity(*gradients.values(), dim=0) > 0.98


@pytest.mark.parametrize("rank", [None, 16])
def test_the_plan_of_activations_is_near_the_truth(rank):
    engine = DreamEngine.load(checkpoint=None, device="cpu")
    engine.start_training(rank)
    txt, vec = (torch.randn(s, requires_grad=True) for s in ((4, 200, 128), (4, 128)))
    frozen = {p.untyped_storage().data_ptr() for p in engine.parameters()}
    for engine.mmdit.checkpointing in (False, True):
        kept = {}

        def count(x, kept=kept):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            engine.mmdit(torch.randn(4, 8, 8, 8), 0.5, txt, vec)
        measured = sum(size for pointer, size in kept.items() if pointer not in frozen)
        planned = 4 * logbook.activation_bytes(engine, 216, engine.mmdit.checkpointing)
        if engine.mmdit.checkpointing:  # on the way back, one block is there in full
            planned -= logbook.KEPT * 4 * 216 * 128 * 4
        assert 0.8 < planned / measured < 1.25


@pytest.mark.parametrize("stage, limit", [(1, 48e9), (2, 80e9)])
def test_the_published_sizes_fit_one_gpu_by_the_plan(stage, limit):
    """SD3.5-large and Qwen2-VL-2B, frozen in bf16, 8 examples of 512 x 512 at once."""
    text = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    text |= {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936}
    vision = {"embed_dim": 1280, "depth": 32, "num_heads": 16, "hidden_size": 1536}
    config = Qwen2VLConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        lmm = Qwen2VLModel(config).bfloat16()
        transformer = MMDiT(FAMILIES["SD3.5-large"]).bfloat16()
        adapter, vae = Adapter(1536, 2432), VAE(VAEConfig()).float()
        engine = DreamEngine(lmm, None, PatchConfig(), adapter, transformer, vae)
        learning = engine.start_training(32 if stage == 2 else None)
    assert all(p.dtype == torch.float32 for p in learning.values())
    args = train.parse(["--stage", str(stage), "--batch", "8", "--checkpointing", "--size", "512"])
    args.rank = 32 if stage == 2 else None
    plan = logbook.memory_plan(engine, args, 1).splitlines()
    assert float(plan[0].split()[0]) == pytest.approx(
        2 * (8.0566 + 0.0897 + 2.2090) + 0.335, abs=0.05
    )
    assert 1e9 * float(plan[-1].split()[0]) < limit


# ---- nothing lost -------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_stopping_saves_and_resuming_goes_on_bit_exactly(signum, monkeypatch, capsys):
    more = ["--workers", "2", "--accumulate", "2"] if signum == signal.SIGTERM else []
    straight = run(2, 40, "straight", *more)

    def log(out, record, log=train.log):
        log(out, record)
        if record["step"] == 20:
            os.killpg(os.getpgrp(), signum)  # as a terminal and torchrun do it
            time.sleep(0.01)

    group = os.getpgrp()
    os.setpgrp()
    with monkeypatch.context() as patch:
        patch.setattr(train, "log", log)
        with pytest.raises(SystemExit) as end:
            run(2, 40, "broken", *more)
    os.setpgid(0, group)
    assert end.value.code == 128 + signum
    assert "stopped after step 2" in capsys.readouterr().err
    assert "--resume goes on" in fails(2, 40, "broken", *more)
    assert equal(run(2, 40, "broken", "--resume", *more), straight)
    logs = [logbook.read_metrics(Path(out)) for out in ("straight", "broken")]
    assert [r["step"] for r in logs[1]] == list(range(1, 41))
    assert [r["loss"] for r in logs[0]] == [r["loss"] for r in logs[1]]
    assert equal(run(2, 40, "broken", "--resume", *more), straight)  # nothing is left to do


def test_resume_without_a_run_begins_one():
    assert equal(run(1, 2, "a", "--resume"), run(1, 2, "b"))


def test_resuming_with_other_settings_says_what_differs(monkeypatch):
    run(1, 2, "one")
    run(2, 2, "run", "--rank", "4")
    said = fails(2, 2, "run", "--resume", "--rank", "8", "--tasks", "t2i=1", "--batch", "3")
    assert "rank: 4 then, 8 now" in said and "batch: 2 then, 3 now" in said
    assert "'edit 64x64 x 3 from rendered scenes'" in said and "now" in said
    assert "seed" not in said
    monkeypatch.setattr(dream_engine, "fingerprint", lambda transformer: 1.5)
    assert "base: 11.1805 then, 1.5 now" in fails(1, 2, "one", "--resume")


@pytest.mark.parametrize("call", range(12))
def test_a_kill_inside_a_save_leaves_a_checkpoint(call, engines):
    """A process dies at each file operation of a save in turn: what is there stays whole."""
    run(1, 2)
    engine = engines[0]
    optimizer = torch.optim.AdamW(engine.start_training().values())
    facts = {"stage": 1, "rank": None, "alpha": None}
    child = os.fork()
    if not child:
        calls = iter(range(100))

        def die(*a, original, **k):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*a, **k)

        for owner, name in ((os, "replace"), (os, "fsync"), (logbook.shutil, "copy")):
            original = getattr(owner, name)
            setattr(owner, name, lambda *a, f=original, **k: die(*a, original=f, **k))
        try:
            for step in (3, 4):
                logbook.save(engine, optimizer, Path("run"), step, facts, keep=1)
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    last = logbook.latest(Path("run"))
    assert last.name in ("000002", "000003", "000004")
    assert len(load_file(last / "stage1.safetensors")) == 8
    torch.load(last / "state.pt", weights_only=True)
    load_file("run/stage1.safetensors")
    logbook.save(engine, optimizer, Path("run"), 5, facts, keep=1)
    assert [f.name for f in Path("run/checkpoints").iterdir()] == ["000005"]


KILLED = """
import os, sys, random, signal, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import train, logbook
arguments = ["--stage", "1", "--steps", "100000", "--out", "run", "--resume", "--batch", "1",
             "--device", "cpu", "--save-every", "1", "--sample-every", "0"]
rng, reached, last = random.Random(0), [0], None
for kill in range(int(sys.argv[1])):
    child = os.fork()
    if not child:
        sys.stderr = sys.stdout = open(os.devnull, "w")
        train.main(arguments)
    began = time.time()
    while logbook.latest(Path("run")) == last and time.time() < began + 30:
        time.sleep(0.01)  # until it is at work
    time.sleep(rng.uniform(0, 0.2))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), status  # it was at work, not ended by an error
    last = logbook.latest(Path("run"))
    reached.append(int(last.name))
    assert reached[-1] >= reached[-2], reached
print(reached[-1])
"""


def test_a_run_killed_again_and_again_goes_on_every_time():
    script = [sys.executable, "-c", KILLED, "20"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 20


def test_a_full_disk_keeps_the_previous_checkpoint():
    run(1, 2, "run", "--save-every", "1")
    before = sorted(Path("run/checkpoints").iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        said = fails(1, 2, "new")
        Path("run/checkpoints/000002").rename("run/checkpoints/000002.partial")
        assert "the last good checkpoint is run/checkpoints/000001" in fails(
            1, 2, "run", "--resume"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in said and "make room" in said and "none" in said
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
    records = logbook.read_metrics(Path("run"))
    assert records[-1]["skipped"] == len(bad) and len(records) == 9


# ---- what a person sees -------------------------------------------------------------------------


def test_a_run_leaves_pictures_metrics_and_a_checkpoint_for_sample(capsys):
    run(2, 4, "run", "--sample-every", "2", "--save-every", "1", "--keep", "2")
    assert sorted(p.name for p in Path("run").iterdir()) == [
        "checkpoints",
        "loss.png",
        "metrics.jsonl",
        "samples-000002.png",
        "samples-000004.png",
        "stage2.safetensors",
    ]
    assert sorted(p.name for p in Path("run/checkpoints").iterdir()) == ["000003", "000004"]
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    for record in records:
        assert record["loss"] > 0 and record["grad_norm"] > 0 and record["examples_per_s"] > 0
        assert len(record["loss_by_t"]) == 5
    grid = Image.open("run/samples-000004.png")
    assert grid.height == 12 * 132 + 4  # three rows for each of four tasks
    said = capsys.readouterr().out
    assert "adapter and LoRA: 521,472 parameters" in said and "AdamW" in said


def test_the_saved_file_draws_what_the_trained_engine_draws(engines):
    run(2, 3, "run", "--rank", "4", "--alpha", "8", "--lr", "0.03", "--lmm-lora")
    (trained,) = engines
    merged = DreamEngine.load(checkpoint="run", device="cpu")
    apart = DreamEngine.load(checkpoint="run/stage2.safetensors", device="cpu", merge=False)
    torch.manual_seed(0)
    first, *others = (
        torch.tensor(bytearray(e.generate([["a red circle"]], steps=2)[0].tobytes())).int()
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
    run(2, 2, "run", "--data", "a.jsonl=2", "--workers", "1", "--flip")
    Path("b.jsonl").write_text(json.dumps(lines[0]))
    asked = ["--data", "b.jsonl", "--tasks", "edit=1,i2i=1,objects=0"]
    assert "holds no example of task edit" in fails(2, 1, "b", *asked)
    run(1, 2, "b", "--data", "b.jsonl")  # its target serves to be copied, too
    said = capsys.readouterr().out
    assert "50.0 %   i2i from b.jsonl" in said and "50.0 %   t2i from b.jsonl" in said
    train.main(["--stage", "1", "--steps", "3", "--only-load", "--data", "b.jsonl", *SMALL])
    assert capsys.readouterr().out.strip().endswith("examples/s")
    run(2, 2, "c", "--data", "a.jsonl", "--buckets", "--size", "48")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--stage"),
        (["--stage", "7"], "invalid choice: 7"),
        (["--stage", "1", "--out", "/dev/null/x"], "/dev/null/x"),
        (["--stage", "2", "--data", "none.jsonl"], "none.jsonl: no such manifest"),
        (["--stage", "1", "--lmm-lora"], "--rank and --lmm-lora belong to --stage 2"),
        (["--stage", "2", "--rank", "0", "--lmm-lora"], "--rank must be at least 1"),
        (["--stage", "2", "--rank", "-1"], "--rank must be at least 1"),
        (["--stage", "2", "--data", "a.jsonl=-1"], "--data a.jsonl must be positive"),
        (["--stage", "2", "--null", "edit=2"], "expected numbers up to 1"),
        (["--stage", "2", "--tasks", "draw=1"], "unknown task 'draw'"),
        (["--stage", "2", "--tasks", "t2i"], "expected such as t2i=1,edit=2"),
        (["--stage", "2", "--sd3", "big.safetensors"], "--checkpoint is missing"),
        (["--stage", "1", "--sd3", "big.safetensors"], "--data is missing"),
        (["--stage", "1", "--lr", "-1"], "--lr must be positive"),
        (["--stage", "1", "--size", "72"], "multiples of 16"),
        (["--stage", "1", "--blend", "2"], "--blend must lie between 0"),
        (["--stage", "1", "--layers", "0"], "--layers must be at least 1"),
        (["--stage", "1", "--mlp-dim", "0"], "--mlp-dim must be positive"),
        (["--stage", "1", "--batch", "0"], "--batch must be at least 1"),
        (["--stage", "2", "--checkpoint", "gone.safetensors"], "gone.safetensors"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end, one_line_errors():
        train.main([*SMALL, *arguments])
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(said) == 1 and message in said[0]
    assert not list(Path.cwd().iterdir())


def test_a_checkpoint_of_another_rank_is_refused():
    run(2, 1, "run", "--rank", "4", "--alpha", "2")
    for other in (["--rank", "8"], ["--rank", "4"], ["--rank", "0"]):
        assert "of rank 4, alpha 2" in fails(2, 1, "b", "--checkpoint", "run", *other)
    assert "of rank 4, alpha 2" in fails(1, 1, "b", "--checkpoint", "run")
    run(2, 1, "b", "--checkpoint", "run", "--rank", "4", "--alpha", "2")  # goes on from its LoRA
    assert not equal(load_file("b/stage2.safetensors"), load_file("run/stage2.safetensors"))


# ---- several processes --------------------------------------------------------------------------


def launch(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += [str(ROOT / "train.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def test_two_processes_equal_one():
    """Replicated or with the frozen base in shards, the same microbatches give the same weights."""
    arguments = ["--stage", "2", "--steps", "4", *SMALL, "--save-every", "2"]
    arguments += ["--tasks", "t2i=1,edit=1"]
    replicated = launch(*arguments, "--out", "replicated")
    alone = run(2, 4, "alone", "--accumulate", "2", "--tasks", "t2i=1,edit=1")
    _, errors = replicated.communicate(timeout=120)
    assert replicated.returncode == 0, errors
    looking = ["--sample-every", "2"]  # drawing and saving must not put the shards out of step
    sharded = launch(*arguments, "--out", "sharded", "--shard", "--checkpointing", *looking)
    said, errors = sharded.communicate(timeout=120)
    assert sharded.returncode == 0, errors
    assert said.count("AdamW") == 1  # one rank speaks
    for out in ("replicated", "sharded"):
        learnt = load_file(f"{out}/stage2.safetensors")
        for name, tensor in alone.items():
            torch.testing.assert_close(learnt[name], tensor, rtol=0, atol=1e-5)
        losses = [[r["loss"] for r in logbook.read_metrics(Path(o))] for o in ("alone", out)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_dead_rank_ends_the_run_with_a_clear_line():
    process = launch("--stage", "1", "--steps", "100000", *SMALL, "--out", "run")
    deadline = time.time() + 60
    while not Path("run/metrics.jsonl").exists() or not logbook.read_metrics(Path("run")):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks |= {e[5:]: int(child) for e in environment if e.startswith(b"RANK=")}
    os.kill(ranks[b"1"], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "rank 0: lost the other processes" in errors and "--resume goes on" in errors
