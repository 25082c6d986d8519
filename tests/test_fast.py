"""Every faster or leaner way gives what the plain one gives."""

import shutil

import numpy as np
import pytest
import torch
from tiny import relative, tensors
from torch._dynamo.utils import counters

import dream_engine
import flow
import mmdit
import shapes
import vae
from adapter import add_lora, merge_lora
from dream_engine import Condition, DreamEngine, denoise

PICTURE = shapes.render(shapes.Scene("white", (shapes.Object("red", "star", 4),)))
PROMPTS = [["a red circle and a blue star"], [PICTURE, " left of a blue ring"]]


@pytest.fixture(scope="module")
def engine():
    return DreamEngine.load(device="cpu")


def pixels(images):
    return [np.asarray(image, int) for image in images]


def plain_sampling(engine, told, n, guidance, steps, lo=0.0, hi=1.0):
    """Pictures as the plain forward makes them: nothing prepared, branches and prompts one by one."""
    pictures = []
    for i in range(n):
        cond, null = (engine.encode([prompt]) for prompt in (told[i], told[n + i]))

        def velocity(z, t, cond=cond, null=null):
            v = engine.mmdit(z, t, cond.txt, cond.vec)
            if not lo <= t <= hi:
                return v
            v0 = engine.mmdit(z, t, null.txt, null.vec)
            return v0 + guidance * (v - v0)

        start = dream_engine.noise(1, (8, 8, 8), i)
        pictures.append(engine.vae.decode(flow.euler(velocity, start, flow.sigma_schedule(steps))))
    return dream_engine.to_images(torch.cat(pictures))


@torch.no_grad()
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.9), (0.9, 1.0), (0.0, 0.0)])
def test_prepared_sampling_equals_the_plain_forward(engine, interval):
    pairs = [dream_engine.apply_task(None, prompt) for prompt in PROMPTS]
    told = [*(p for p, _ in pairs), *(null for _, null in pairs)]
    plain = pixels(plain_sampling(engine, told, 2, 4.5, 6, *interval))
    fast = pixels(engine.generate(PROMPTS, steps=6, interval=interval))
    assert abs(np.subtract(plain, fast)).max() <= 1


def test_outside_the_interval_only_the_prompts_are_at_work(engine, monkeypatch):
    rows, forward = [], mmdit.MMDiT.forward

    def counting(self, latent, *args, **options):
        rows.append(len(latent))
        return forward(self, latent, *args, **options)

    monkeypatch.setattr(mmdit.MMDiT, "forward", counting)
    everything = pixels(engine.generate(PROMPTS, steps=6))
    rows.clear()
    some = pixels(engine.generate(PROMPTS, steps=6, interval=(0.3, 0.9)))
    levels = flow.sigma_schedule(6)[:-1].tolist()
    assert rows == [4 if 0.3 <= t <= 0.9 else 2 for t in levels] and set(rows) == {2, 4}
    assert abs(np.subtract(everything, some)).max() > 20
    rows.clear()
    engine.generate(PROMPTS, steps=2, guidance=1)
    assert rows == [2, 2]


def test_outside_the_interval_no_null_prompt_is_at_work(engine):
    settings = {"steps": 3, "task": "edit"}
    prompt = [PICTURE, "make the star blue"]
    alone = pixels(engine.generate([prompt], guidance=1, **settings))
    for strengths in ({"guidance": 7}, {"guidance": 7, "null_guidance": 3}):
        outside = pixels(engine.generate([prompt], interval=(0, 0), **strengths, **settings))
        assert abs(np.subtract(alone, outside)).max() <= 1


@pytest.mark.parametrize("family", ["sd3-medium", "sd3.5-medium", "sd3.5-large"])
def test_lora_learns_and_merges_alike_where_only_keys_and_values_are_computed(family, names):
    model = mmdit.build(tensors(names[f"mmdit/{family}/single"]), "tiny")
    parameters = add_lora(model, 4)
    torch.manual_seed(0)
    for parameter in parameters.values():
        parameter.data = 0.1 * torch.randn_like(parameter)
    inputs = torch.randn(2, 16, 8, 8), 0.6, torch.randn(2, 5, 128), torch.randn(2, 128)
    apart = model(*inputs)
    apart.sum().backward()
    last = model.joint_blocks[-1].context_block.attn.qkv
    assert last.B.grad[0].abs().max() == 0  # nobody reads its queries
    assert min(last.B.grad[1:].abs().amax((1, 2))) > 0
    assert relative(merge_lora(model)(*inputs), apart.detach()) < 1e-5


# ---- large pictures -----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("stripe", [1, 40 * 24 * 3, 16 * 24 * 64])
def test_a_vae_in_stripes_equals_the_whole(stripe, write, monkeypatch):
    model = vae.load_vae(write("vae/16/single"))
    generator = torch.Generator().manual_seed(0)
    latent = 2 * torch.randn(2, 16, 24, 20, generator=generator)
    image = model.decode(latent)
    mean = model.encode(image)
    monkeypatch.setattr(vae, "STRIPE", stripe)
    assert relative(model.decode(latent), image) < 1e-5
    assert relative(model.encode(image), mean) < 1e-5


@torch.no_grad()
def test_stripes_hold_less_at_once(write, monkeypatch):
    """The largest convolution input is a stripe, and not the picture."""
    model, largest = vae.load_vae(write("vae/16/single")), []
    for module in model.decoder.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_pre_hook(lambda _, x: largest.append(x[0][0, 0].numel()))
    monkeypatch.setattr(vae, "STRIPE", 1000)
    model.decode(torch.zeros(1, 16, 16, 16))
    assert max(largest) <= 1000 + 4 * 128  # an upsampled row and its neighbours are two rows each


# ---- little memory ------------------------------------------------------------------------------


def test_low_memory_draws_the_same(engine):
    lean = DreamEngine.load(device="cpu", low_memory=True)
    for whole, visiting in zip(engine.generate(PROMPTS, 3), lean.generate(PROMPTS, 3)):
        assert whole.tobytes() == visiting.tobytes()


def test_weights_of_sd35_large_that_stay_on_the_device():
    with torch.device("meta"):
        model = mmdit.MMDiT(mmdit.FAMILIES["SD3.5-large"])
    visiting = {id(p) for part in model.before_sampling() for p in part.parameters()}
    staying = sum(p.numel() for p in model.parameters() if id(p) not in visiting)
    assert 2 * staying < 10.8e9  # bytes in bf16
    assert 2 * sum(p.numel() for p in model.parameters()) > 16.1e9


@torch.no_grad()
def test_low_memory_brings_everything_to_the_device_and_leaves_nothing_there():
    """On the device "meta", which computes shapes only and refuses to meet tensors of the CPU."""
    engine = DreamEngine.load(device="cpu")
    homes = {name: p.data_ptr() for name, p in engine.named_parameters()}
    engine.save_memory(torch.device("meta"))
    staying = {name for name, p in engine.named_parameters() if p.is_meta}
    assert staying and all(name.startswith("mmdit.") for name in staying)
    assert not any("adaLN" in name or "t_embedder" in name for name in staying)
    embedded = engine.lmm.language_model.embed_tokens(
        torch.zeros(1, 7, dtype=torch.long).to("meta")
    )
    states = engine.lmm.language_model(
        inputs_embeds=embedded, position_ids=torch.zeros(3, 1, 7).to("meta"), use_cache=False
    ).last_hidden_state
    txt, vec = engine.adapter(states, torch.ones(1, 7, dtype=torch.bool).to("meta"))
    latent = denoise(
        engine.mmdit, Condition(txt, torch.ones(1, 7, dtype=torch.bool), vec), torch.zeros(1, 8, 8, 8),
        steps=2, guidance=1,
    )  # fmt: skip
    image = engine.vae.decode(latent)
    assert engine.vae.encode(image).is_meta
    assert image.is_meta and image.shape == (1, 3, 64, 64)
    assert {n: p.data_ptr() for n, p in engine.named_parameters() if n not in staying} == {
        n: at for n, at in homes.items() if n not in staying
    }


def test_a_failed_visit_leaves_nothing_behind():
    layer = torch.nn.Linear(3, 3)
    dream_engine.weights.visit(layer, "meta")
    with pytest.raises(RuntimeError):
        layer(torch.zeros(2, 3))  # of the CPU
    assert not layer.weight.is_meta


# ---- compiled -----------------------------------------------------------------------------------


def test_blocks_are_compiled_once_for_prompts_of_every_length(engine):
    compiled = DreamEngine.load(device="cpu")
    compiled.mmdit.compile_blocks(backend="eager")  # what is compiled, without the compiler
    counters.clear()
    longer = "a red circle above a blue star on the left of a green ring on a black background"
    words = longer.split()
    texts = [[" ".join(words[:n])] for n in range(1, len(words))]
    told = [dream_engine.apply_task(None, text)[0] for text in texts]
    lengths = [engine.collate([prompt]).ids.shape[1] for prompt in told]
    as_long_as_the_picture = texts[lengths.index(16)]
    for i, prompt in enumerate((as_long_as_the_picture, [longer], texts[2], PROMPTS[1])):
        fast, plain = (pixels(e.generate([prompt], steps=2)) for e in (compiled, engine))
        assert abs(np.subtract(fast, plain)).max() <= 1
        if i == 0:
            first = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == first == 1


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_draw_the_same(engine):
    fast = pixels(DreamEngine.load(device="cpu", compile=True).generate(PROMPTS, steps=3))
    assert abs(np.subtract(fast, pixels(engine.generate(PROMPTS, steps=3)))).max() <= 1
