"""Every faster or leaner way gives what the plain forward gives."""

import numpy as np
import pytest
import torch
from test_lmm import PICTURES
from tiny import relative, tensors
from torch._dynamo.utils import counters

import flow
import mmdit
from adapter import add_lora, merge_lora
from checkpoints import build_mmdit
from dream_engine import Condition, DreamEngine, denoise
from prompts import apply_task, to_images
from support import fast

PROMPTS = [["a red circle and a blue star"], [PICTURES[0], " left of a blue ring"]]
FAMILIES = ("sd3-medium", "sd3.5-medium", "sd3.5-large")


def pixels(images):
    return [np.asarray(image, int) for image in images]


def random_inputs(config, rows=2):
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, config.channels, 8, 8), (rows, 7, config.width), (rows, config.width)
    return [torch.randn(shape, generator=generator) for shape in shapes]


# ---- tables for all steps -----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_tables_equal_the_plain_forward(family, lora, names, monkeypatch):
    """With padding, several rows, LoRA, and steps in chunks that do not divide them."""
    monkeypatch.setattr(fast, "CHUNK", 2)
    model = build_mmdit(tensors(names[f"mmdit/{family}/single"]), "tiny")
    if lora:
        for parameter in add_lora(model, 4).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    latent, txt, vec = random_inputs(model.config)
    mask, times = torch.arange(7) < torch.tensor([[7], [4]]), [1.0, 0.8, 0.6, 0.3, 0.05]
    plain = [model(latent, t, txt, vec, mask) for t in times]
    before = dict(model.named_modules())
    with fast.prepared(model, times, vec) as prepared:
        velocity = prepared(lambda z, t: model(z, t, txt, vec, mask))
        for t, expected in zip(times, plain):
            assert relative(velocity(latent, t), expected) < 1e-5
    assert dict(model.named_modules()) == before
    assert relative(plain[0], plain[1]) > 1e-3  # else the results of one step would do
    assert torch.equal(model(latent, 0.6, txt, vec, mask), plain[2])


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1, 4.5])
def test_sampling_equals_a_plain_loop(guidance, engine):
    """Nothing prepared, both branches of guidance and all prompts one by one."""
    pictures = []
    for i, prompt in enumerate(PROMPTS):
        cond, null = (engine.encode([part]) for part in apply_task(None, prompt))

        def velocity(z, t, cond=cond, null=null):
            v, v0 = (engine.mmdit(z, t, c.txt, c.vec) for c in (cond, null))
            return v0 + guidance * (v - v0)

        start = flow.noise(1, (8, 6, 6), i)
        pictures.append(engine.vae.decode(flow.euler(velocity, start, flow.sigma_schedule(6))))
    plain = pixels(to_images(torch.cat(pictures)))
    drawn = pixels(engine.generate(PROMPTS, steps=6, guidance=guidance))
    assert abs(np.subtract(plain, drawn)).max() <= 1


def test_layers_are_put_back_after_an_error(engine):
    before = dict(engine.mmdit.named_modules())
    with pytest.raises(ZeroDivisionError), fast.prepared(engine.mmdit, [1.0], torch.zeros(1, 128)):
        raise ZeroDivisionError
    assert dict(engine.mmdit.named_modules()) == before


@torch.no_grad()
def test_only_a_chunk_of_steps_is_held_in_memory(engine):
    vec, times = torch.zeros(2, 128), torch.linspace(1, 0.01, 5000).tolist()
    largest = 0
    with fast.prepared(engine.mmdit, times, vec) as prepared:
        for t in times[::50]:
            prepared(lambda z, t: None)(None, t)
            layers = [m for m in engine.mmdit.modules() if isinstance(m, fast.Precomputed)]
            largest = max(largest, max(len(layer.steps) for layer in layers))
    assert largest == fast.CHUNK < 100


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_learns_and_merges_alike(family, names):
    model = build_mmdit(tensors(names[f"mmdit/{family}/single"]), "tiny")
    parameters = add_lora(model, 4)
    torch.manual_seed(0)
    for parameter in parameters.values():
        parameter.data = 0.1 * torch.randn_like(parameter)
    latent, txt, vec = random_inputs(model.config)
    apart = model(latent, 0.6, txt, vec)
    apart.sum().backward()
    last = model.joint_blocks[-1].context_block.attn.qkv
    assert last.B.grad[0].abs().max() == 0  # its queries are not used
    assert min(last.B.grad[1:].abs().amax((1, 2))) > 0
    assert relative(merge_lora(model)(latent, 0.6, txt, vec), apart.detach()) < 1e-5


# ---- little memory ------------------------------------------------------------------------------


def test_low_memory_draws_the_same(engine):
    lean = DreamEngine.load(device="cpu")
    fast.save_memory(lean, torch.device("cpu"))
    for whole, saving in zip(engine.generate(PROMPTS, 3), lean.generate(PROMPTS, 3)):
        assert whole.tobytes() == saving.tobytes()


@torch.no_grad()
def test_low_memory_brings_everything_to_the_device_and_leaves_nothing_there():
    """On the device "meta", which computes shapes only and refuses to meet tensors of the CPU."""
    engine = DreamEngine.load(device="cpu")
    homes = {name: p.data_ptr() for name, p in engine.named_parameters()}
    fast.save_memory(engine, torch.device("meta"))
    staying = {name for name, p in engine.named_parameters() if p.is_meta}
    assert staying and all(name.startswith("mmdit.") for name in staying)
    assert not any("adaLN" in name or "t_embedder" in name for name in staying)
    language, positions = engine.lmm.language_model, torch.zeros(3, 1, 7).to("meta")
    embedded = language.embed_tokens(torch.zeros(1, 7, dtype=torch.long).to("meta"))
    states = language(inputs_embeds=embedded, position_ids=positions, use_cache=False)
    mask = torch.ones(1, 7, dtype=torch.bool)
    txt, vec = engine.adapter(states.last_hidden_state, mask.to("meta"))
    start = torch.zeros(1, 8, 6, 6)
    latent = denoise(engine.mmdit, Condition(txt, mask, vec), start, steps=2, guidance=1)
    image = engine.vae.decode(latent)
    assert engine.vae.encode(image).is_meta
    assert image.is_meta and image.shape == (1, 3, 48, 48)
    assert {n: p.data_ptr() for n, p in engine.named_parameters() if n not in staying} == {
        n: at for n, at in homes.items() if n not in staying
    }


def test_low_memory_hands_the_lmm_its_prompts_on_the_device():
    """Its embeddings, from which the device could be read, have stayed on the CPU."""
    engine = DreamEngine.load(device="cpu")
    fast.save_memory(engine, torch.device("meta"))
    seen = []
    engine.lmm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.encode([PROMPTS[1]])
    assert seen[0].ids.is_meta and seen[0].patches.is_meta and seen[0].mask.is_meta


def test_what_stays_of_sd35_large_is_two_thirds():
    with torch.device("meta"):
        model = mmdit.MMDiT(mmdit.FAMILIES["SD3.5-large"])
    embedders = ("t_embedder.", "y_embedder.", "context_embedder.")
    sizes = {name: 2 * p.numel() for name, p in model.named_parameters()}  # bytes in bf16
    staying = [n for n in sizes if "adaLN" not in n and not n.startswith(embedders)]
    assert sum(sizes.values()) > 16.1e9 and sum(map(sizes.get, staying)) < 10.8e9


def test_a_failed_call_leaves_nothing_on_the_device():
    layer = torch.nn.Linear(3, 3)
    fast.on_demand(layer, "meta")
    with pytest.raises(RuntimeError):
        layer(torch.zeros(2, 3))  # of the CPU
    assert not layer.weight.is_meta


# ---- compiled -----------------------------------------------------------------------------------


def test_blocks_are_compiled_once_for_prompts_of_every_length(engine):
    compiled = DreamEngine.load(device="cpu")
    fast.compile_blocks(compiled.mmdit, backend="eager")  # what is compiled, without the compiler
    counters.clear()
    longer = "a red circle above a blue star on the left of a green ring on a black background"
    words = longer.split()
    texts = [[" ".join(words[:n])] for n in range(1, len(words))]
    lengths = [engine.lmm.collate([apply_task(None, t)[0]]).ids.shape[1] for t in texts]
    as_long_as_the_picture = texts[lengths.index(16)]
    for i, prompt in enumerate((as_long_as_the_picture, [longer], texts[2], PROMPTS[1])):
        drawn, plain = (pixels(e.generate([prompt], steps=2)) for e in (compiled, engine))
        assert abs(np.subtract(drawn, plain)).max() <= 1
        if i == 0:
            first = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == first == 1
