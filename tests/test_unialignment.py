"""UniAlignment: equal to a reconstruction from diffusers' and transformers' own classes, pitfall by pitfall."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from support.cli import UserError

import numpy as np
import pytest
import torch
from cases import PROMPTS, SLOTS, UNI, VOCABULARY
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import GOLDEN, relative, tensor, uniform
from unialignment_folder import NAMES, publish, transformer_weights

import dream_engine
import flow
import mmdit
from checkpoints import Part
from prompts import to_images
from support import fast
from unialignment import masked
from unialignment.model import LOSSES, UniAlignment, contrast, misalignment
from unialignment.transformer import RULES, Transformer

T = torch.tensor([0.25, 0.9])
MASK = VOCABULARY - 1


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "unialignment.safetensors")


@pytest.fixture(scope="module")
def vae_names(names):
    return names["vae/16/diffusers"]


@pytest.fixture(scope="module")
def uni(uni_folder):
    """Nobody may change it."""
    return UniAlignment.load(uni_folder, device="cpu")


def inputs(uni):
    latent = tensor("latent", (2, 16, 8, 12))
    ids = (uniform("ids", (2, SLOTS)) * MASK).long()
    return latent, uni.context(ids), [tensor(f"source {i}", latent.shape) for i in range(3)]


# ---- equal to the reconstruction ----------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("case", ["published", "normed"])
def test_both_passes_equal_the_reconstruction(case, golden, vae_names, tmp_path):
    uni = UniAlignment.load(publish(tmp_path / "uni", vae_names, case), device="cpu")
    latent, context, sources = inputs(uni)
    adapters = uni.mmdit.image_adapter, uni.mmdit.text_adapter
    for k in (0, 1, 3):
        found = uni.draw(latent, T, context, sources[:k], features=1)
        found = [*found, adapters[0](found[2].mean(1))]
        for name, x in zip(("velocity", "image features", "image tokens", "image aligned"), found):
            assert relative(x, golden[f"{case}/{name}/{k}"]) < 1e-5
        assert torch.equal(uni.draw(latent, T, context, sources[:k]), found[0])
    found = uni.read(latent, context, features=1)
    found = [*found, adapters[1](found[2].mean(1))]
    for name, x in zip(("logits", "text features", "text tokens", "text aligned"), found):
        assert relative(x, golden[f"{case}/{name}"]) < 1e-5
    assert torch.equal(uni.read(latent, context), found[0])


@torch.no_grad()
def test_the_four_losses_equal_the_training_script(uni, golden):
    z, e = tensor("x0", (4, 16, 8, 8)), tensor("noise", (4, 16, 8, 8))
    prompts, ids = ((uniform(name, (4, SLOTS)) * MASK).long() for name in ("p", "w"))
    t = masked.stratified_times(uniform("r", (4,)))
    hidden = masked.mask(ids, t, uniform("hide", (4, SLOTS)), MASK)
    assert torch.equal((hidden == MASK).float(), golden["losses/hidden"])
    teacher = [tensor(f"q{i}", (4, 28)) for i in range(2)]
    texts = SimpleNamespace(prompts=prompts, texts=ids, hidden=hidden, times=t)
    s, source = torch.tensor([0.1, 0.4, 0.7, 0.999]), tensor("source", z.shape)
    losses = uni.losses(texts, z, e, s, [source], teacher=teacher)
    assert list(losses) == list(LOSSES)
    means = torch.stack(list(losses.values())).mean(1)
    assert relative(means, golden["losses"]) < 1e-5 and abs(means - golden["losses"]).max() < 1e-4
    assert uni.losses(texts, z, e, s)["isa"].tolist() == [0] * 4  # without a teacher


def picture(i):
    pixels = (tensor("image", (2, 3, 48, 32)).tanh() * 127.5 + 127.5).round().byte()
    return Image.fromarray(pixels[i].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("case", ["draw", "edit"])
def test_four_steps_with_guidance_equal_the_pipeline(case, uni, golden):
    assert torch.equal(uni.tokens(["on the left"] * 2 + PROMPTS), golden["prompts/ids"].long())
    images = [[picture(i)] for i in range(2)] if case == "edit" else None
    options = {"steps": 4, "guidance": 3, "size": (32, 48), "negative": "on the left", "seed": 5}
    latents = []
    hook = uni.vae.decoder.register_forward_pre_hook(lambda _, args: latents.append(args[0]))
    drawn = uni.generate(PROMPTS, images, **options)
    hook.remove()
    assert relative(uni.vae.decoder(latents[0]), golden[f"pictures/{case}"]) < 1e-4
    for image, expected in zip(drawn, to_images(golden[f"pictures/{case}"])):
        assert abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1


@torch.no_grad()
def test_the_text_sampler_fed_recorded_draws_writes_the_same_text(uni, golden):
    latent, ids = tensor("latent", (2, 16, 8, 12)), torch.full((2, SLOTS), MASK)
    ids[0, :3] = torch.tensor([4, 7, 9])
    draws = uniform("draws", (6, 2, SLOTS, VOCABULARY))
    text = masked.unmask(lambda x: uni.read(latent, uni.context(x)), ids, 6, "sampled", draws)
    assert torch.equal(text, golden["text"].long())


# ---- pitfalls -----------------------------------------------------------------------------------


@torch.no_grad()
def test_c_is_made_of_time_alone_rounded_to_float16(uni):
    """The frequencies are fp32's; rounding moves c by about a thousandth, and not at all at t = 0."""
    t, embedder = torch.linspace(0, 1, 101), uni.mmdit.t_embedder
    sinusoid = mmdit.timestep_embedding(t)
    rounded = embedder.mlp(sinusoid.half().float())
    assert torch.equal(uni.mmdit.embed_time(t, 101), rounded)
    plain = embedder.mlp(sinusoid)
    assert torch.equal(rounded[0], plain[0]) and 1e-5 < relative(rounded, plain) < 2e-3
    assert not hasattr(uni.mmdit, "y_embedder")


@torch.no_grad()
def test_reading_is_at_time_zero_for_both_streams(uni):
    latent, context, _ = inputs(uni)
    seen = []
    hook = uni.mmdit.joint_blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    uni.read(latent, context)
    hook.remove()
    assert torch.equal(seen[0], uni.mmdit.embed_time(0.0, 2))


@torch.no_grad()
def test_a_word_under_a_mask_changes_nothing_that_is_read(uni):
    """Tokens are hidden before T5, whose states of the clean text would know them."""
    latent, logits = tensor("latent", (2, 16, 8, 8)), []
    for word in ("red", "green"):
        ids = uni.tokens([f"a {word} circle", f"the {word} ring"])
        slots = torch.zeros(2, SLOTS, dtype=torch.bool).index_fill(1, torch.tensor([1]), True)
        hidden = masked.mask(ids, torch.ones(2), torch.zeros(2, SLOTS), uni.tokens.mask_id, slots)
        logits.append(uni.read(latent, uni.context(hidden)))
    assert torch.equal(*logits)
    clean = uni.read(latent, uni.context(ids))
    assert relative(clean[:, 3:], logits[0][:, 3:]) > 1e-3


@torch.no_grad()
def test_pads_are_ends_of_text_and_attended(uni):
    ids = uni.tokens(["a red circle", ""])
    assert ids[:, 3:].eq(1).all() and ids[1].eq(1).all() and ids.shape == (2, SLOTS)
    assert torch.equal(uni.tokens([" "])[0], ids[1])
    assert uni.tokens(["a " * 40])[0].tolist() == [*[uni.tokens(["a"])[0, 0].item()] * 11, 1]
    latent = tensor("latent", (2, 16, 8, 8))
    short, long = (uni.draw(latent, T, uni.context(x)) for x in (ids[:, :6], ids))
    assert relative(short, long) > 1e-3


@torch.no_grad()
def test_sources_come_after_the_noise_at_the_same_positions(uni):
    latent, context, sources = inputs(uni)
    seen = []
    hook = uni.mmdit.joint_blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    velocity = uni.draw(latent, T, context, sources[:1])
    swapped = uni.draw(latent, T, context, [latent])
    hook.remove()
    n = seen[0].shape[1] // 2
    assert torch.equal(seen[0][:, n:], uni.mmdit.embed_image(sources[0]))
    assert torch.equal(seen[1][:, :n], seen[1][:, n:])
    assert velocity.shape == latent.shape and relative(velocity, swapped) > 1e-3


def test_the_last_text_block_is_stored_unswapped_and_the_final_layer_swapped(uni):
    weights, model = transformer_weights(), uni.mmdit.state_dict()
    last = f"{UNI['depth'] - 1}"
    name = f"joint_blocks.{last}.context_block.adaLN_modulation.1.weight"
    assert torch.equal(
        model[name], weights[f"transformer_blocks.{last}.norm1_context.linear.weight"]
    )
    shift, scale = weights["image_norm_out.linear.weight"].chunk(2)[::-1]
    assert torch.equal(model["final_layer.adaLN_modulation.1.weight"], torch.cat([shift, scale]))


@torch.no_grad()
def test_image_features_know_the_time_and_text_features_do_not(uni):
    latent, context, _ = inputs(uni)
    velocity, image, tokens = uni.draw(latent, T, context, features=UNI["depth"])
    plain = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
    assert relative(image, plain) > 1e-2
    assert relative(uni.mmdit.unpatch(uni.mmdit.final_layer.linear(image), latent), velocity) < 1e-6
    logits, text, tokens = uni.read(latent, context, features=UNI["depth"])
    assert torch.equal(text, torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6))
    assert torch.equal(uni.mmdit.text_head(text), logits)


# ---- losses -------------------------------------------------------------------------------------


def test_the_alignment_losses_at_their_ends():
    same, other = torch.ones(4, 3, 8), tensor("tokens", (4, 3, 8))
    torch.testing.assert_close(contrast(same, same), torch.full((4,), 4.0).log())
    assert contrast(other[:1], same[:1]).item() == 0
    assert contrast(other, other).mean() < contrast(other, other.roll(1, 0)).mean()
    vector = other.mean(1)
    identity = torch.nn.Identity()
    torch.testing.assert_close(
        misalignment(identity, other, 3 * vector), torch.zeros(4), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(misalignment(identity, other, -vector), torch.full((4,), 2.0))


def test_rows_with_the_same_text_are_no_counterexamples():
    image, text = tensor("i", (3, 2, 8)), tensor("u", (3, 2, 8))
    ids = torch.tensor([[1, 2], [1, 2], [3, 4]])
    found = contrast(image, text, ids)
    pairs = [contrast(image[[i, 2]], text[[i, 2]]) for i in (0, 1)]
    torch.testing.assert_close(found[0], pairs[0][0])
    torch.testing.assert_close(found[1], pairs[1][0])
    torch.testing.assert_close(
        contrast(image, text, torch.arange(6).view(3, 2)), contrast(image, text)
    )


def test_only_what_is_used_gets_a_gradient(uni_folder):
    uni = UniAlignment.load(uni_folder, device="cpu")
    learning = uni.start_training()
    assert (
        all(name.startswith("mmdit.") for name in learning) and "mmdit.null_image" not in learning
    )
    z, ids = tensor("x0", (2, 16, 4, 4)), uni.tokens(PROMPTS)
    rows = {"prompts": ids, "texts": ids, "hidden": torch.full_like(ids, MASK)}
    texts = SimpleNamespace(**rows, times=torch.ones(2))
    teacher = [tensor(f"q{i}", (2, 28)) for i in range(2)]
    noise = tensor("noise", z.shape)
    losses = uni.losses(texts, z, noise, T, teacher=teacher)
    sum(losses.values()).sum().backward()
    assert {name for name, p in learning.items() if p.grad is None} == set()
    assert all(p.grad is None for p in (*uni.text_encoder.parameters(), *uni.vae.parameters()))


# ---- use ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_prepared_steps_equal_the_plain_forward(uni):
    latent, context, sources = inputs(uni)
    plain = [uni.draw(latent, t, context, sources[:1]) for t in (1.0, 0.4)]
    with fast.prepared(uni.mmdit, [1.0, 0.4]) as prepared:
        velocity = prepared(lambda z, t: uni.draw(z, t, context, sources[:1]))
        for t, expected in zip((1.0, 0.4), plain):
            assert relative(velocity(latent, t), expected) < 1e-6
    assert torch.equal(uni.draw(latent, 0.4, context, sources[:1]), plain[1])


def pixels(image):
    return np.asarray(image, int)


@pytest.mark.parametrize("sources", [0, 1, 3])
def test_a_picture_alone_equals_the_picture_in_a_batch(sources, uni):
    images = [[picture((i + k) % 2) for k in range(sources)] for i in range(2)]
    together = uni.generate(PROMPTS, images, steps=2, seed=3)
    mixed = [[*row, prompt] for row, prompt in zip(images, PROMPTS)]  # as Dream Engine's prompts
    for i in range(2):
        alone = uni.generate(PROMPTS[i : i + 1], images[i : i + 1], steps=2, seed=3 + i)[0]
        assert alone.size == (32, 32) and abs(pixels(alone) - pixels(together[i])).max() <= 1
        again = uni.generate([mixed[i]], steps=2, seed=3 + i)[0]
        assert again.tobytes() == alone.tobytes()
    assert abs(pixels(together[0]) - pixels(together[1])).max() > 1


@pytest.mark.parametrize("order", ["sampled", "confident"])
def test_an_answer_alone_equals_the_answer_in_a_batch(order, uni):
    images, questions = [picture(0), picture(1)], ["how many", "a red circle left of the star"]
    for given in (None, questions):
        together = uni.answer(images, given, steps=4, order=order, seed=2)
        for i in range(2):
            (alone,) = uni.answer(
                [images[i]], given and [given[i]], steps=4, order=order, seed=2 + i
            )
            assert alone == together[i]
        assert together[0] != together[1] and "extra" not in "".join(together)


def test_what_the_folder_says_wins(uni, vae_names, tmp_path):
    folder = publish(tmp_path / "uni", vae_names, steps=3, guidance=1.0, negative="a", text_steps=2)
    other = UniAlignment.load(folder, device="cpu")
    seen = []
    hook = other.mmdit.joint_blocks[0].register_forward_pre_hook(
        lambda _, args: seen.append(len(args[1]))
    )
    other.generate(["a ring"])
    hook.remove()
    assert seen == [1, 1, 1]
    assert other.sampling == replace(
        uni.sampling, steps=3, guidance=1.0, negative="a", text_steps=2
    )


@pytest.mark.parametrize(
    "setting", [{"sentence": None}, {"steps": 2.7}, {"size": 50}, {"order": "best"}, {"slots": 0}]
)
def test_settings_that_are_none_are_refused(setting, vae_names, tmp_path):
    folder = publish(tmp_path / "uni", vae_names, **setting)
    with pytest.raises(
        UserError, match=f"scheduler_config.json: .*({next(iter(setting))}|multiple)"
    ):
        UniAlignment.load(folder, device="cpu")


# ---- files --------------------------------------------------------------------------------------


def test_full_size_has_the_published_numbers():
    config = replace(mmdit.FAMILIES["SD3-medium"], pooled_dim=None, text_out=True)
    with torch.device("meta"):
        model = Transformer(config, 32_100, 8, (3584, 2048))
    assert len(Part({}, "", RULES).stored(model)) == 696 and len(model.state_dict()) == 504
    assert len(NAMES["published"]) == 28 * UNI["depth"] + 24
    assert abs(flow.sigma_schedule(28, 3.0)[-2].item() - 0.008929) < 1e-6
    assert sum(p.numel() for p in model.parameters()) == 2_123_838_884
    assert model.pos_embed.numel() == 56_623_104


def test_a_saved_folder_comes_back(uni, tmp_path, vae_names):
    uni.save(tmp_path / "again/transformer")
    uni.save_frozen(tmp_path / "again")
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == [
        "scheduler", "text_encoder", "tokenizer", "transformer", "vae",
    ]  # fmt: skip
    again = UniAlignment.load(tmp_path / "again", device="cpu")
    assert again.sampling == uni.sampling
    for (name, x), y in zip(uni.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    written = load_file(tmp_path / "again/transformer/diffusion_pytorch_model.safetensors")
    expected = transformer_weights()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], x) for name, x in expected.items())
    written = load_file(tmp_path / "again/vae/diffusion_pytorch_model.safetensors")
    assert {name: list(x.shape) for name, x in written.items()} == vae_names


def test_a_transformer_alone_is_completed_by_sd3(uni, vae_names, tmp_path):
    names = {"text_encoder": "text_encoder_3", "tokenizer": "tokenizer_3", "transformer": "unused"}
    sd3 = publish(tmp_path / "sd3", vae_names, names=names)
    weights = {k: x for k, x in transformer_weights().items() if "siglip" not in k}
    (tmp_path / "one").mkdir()
    save_file(weights, tmp_path / "one" / "consolidated.00-of-01.safetensors")
    for source in (tmp_path / "one", tmp_path / "one" / "consolidated.00-of-01.safetensors"):
        other = UniAlignment.load(source, sd3, device="cpu")
        assert not hasattr(other.mmdit, "image_adapter")
        latent, context, _ = inputs(uni)
        assert torch.equal(other.draw(latent, T, context), uni.draw(latent, T, context))
    vector = tensor("mask", (48,)).bfloat16()
    torch.save(vector, tmp_path / "one" / "mask_token_emb.00-of-01.pth")
    other = UniAlignment.load(tmp_path / "one", sd3, device="cpu")
    table = other.text_encoder.shared.weight
    assert torch.equal(table[MASK], vector.float())
    assert torch.equal(table[:MASK], uni.text_encoder.shared.weight[:MASK])
    assert other.text_encoder.encoder.embed_tokens.weight is table
    assert (
        relative(other.context(torch.full((1, 3), MASK)), uni.context(torch.full((1, 3), MASK)))
        > 0.1
    )


def test_t5_may_keep_its_table_under_either_name(uni, vae_names, tmp_path):
    publish(tmp_path / "uni", vae_names)
    file = tmp_path / "uni" / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
    save_file(weights, file)
    other = UniAlignment.load(tmp_path / "uni", device="cpu")
    ids = uni.tokens(PROMPTS)
    assert torch.equal(other.context(ids), uni.context(ids))


def drop(name):
    return lambda folder: change(folder, {name: None})


def change(folder, changes, part="transformer"):
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file) | changes
    save_file({k: x for k, x in weights.items() if x is not None}, file)


def edit(file, **changes):
    def act(folder):
        stated = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(stated))

    return act


def fifo(file):
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def sd3_alone(folder):
    (file,) = (folder / "transformer").glob("*.safetensors")
    weights = load_file(file)
    save_file({k: x for k, x in weights.items() if k.startswith("transformer_blocks.")}, file)


def remove(part):
    return lambda folder: (folder / part).rename(folder / "elsewhere")


@pytest.mark.parametrize(
    "damage, message",
    [
        (drop("text_proj_out.weight"), "missing text_proj_out.weight"),
        (drop("transformer_blocks.0.norm1.linear.weight"), "missing transformer_blocks.0.norm1.linear.weight"),
        (drop("transformer_blocks.2.norm1.linear.weight"), "missing transformer_blocks.2.norm1.linear.weight"),
        (lambda f: sd3_alone(f), "holds no transformer of UniAlignment"),
        (remove("transformer"), "uni: has no transformer/, and no .safetensors or .bin file"),
        (edit("text_encoder/config.json", relative_attention_max_distance=0), "distance 0 must be above 2"),
        (edit("text_encoder/config.json", dropout_rate=float("nan")), "'dropout_rate' cannot be nan"),
        (edit("text_encoder/config.json", dropout_rate=1.5), "dropout probability has to be between 0 and 1"),
        (edit("text_encoder/config.json", num_layers=10**9), "'num_layers' cannot be 1000000000"),
        (edit("text_encoder/config.json", num_layers=999), "num_layers 999, its tensors say 2"),
        (edit("tokenizer/tokenizer_config.json", extra_ids=10**12), "'extra_ids' cannot be 10000000"),
        (edit("tokenizer/tokenizer_config.json", model_max_length="many"), "'model_max_length' cannot be 'many'"),
        (edit("tokenizer/tokenizer_config.json", unk_token=""), "'unk_token' cannot be ''"),
        (edit("scheduler/scheduler_config.json", slots=10**400), "'slots' cannot be 1000"),
        (edit("scheduler/scheduler_config.json", slots=10**9), "positive and not above 10000"),
        (lambda f: fifo(f / "tokenizer" / "vocab.json"), "vocab.json: is not a regular file"),
        (lambda f: fifo(f / "transformer" / "config.json"), "config.json: is not a regular file"),
        (drop("transformer_blocks.1.ff.net.2.bias"), "missing transformer_blocks.1.ff.net.2.bias"),
        (drop("siglip_adapter_text.fc.0.bias"), "missing siglip_adapter_text.fc.0.bias"),
        (drop("transformer_blocks.2.attn.to_add_out.weight"), "missing transformer_blocks.2.attn.to_add"),
        (lambda f: change(f, {"norm_out.linear.bias": torch.zeros(2)}), "unknown norm_out.linear.bias"),
        (lambda f: change(f, {"text_proj_out.bias": torch.zeros(2)}), "text_proj_out.bias has shape"),
        (lambda f: change(f, {"encoder.block.0.x": torch.zeros(2)}, "text_encoder"), "unknown encoder.bl"),
        (edit("transformer/config.json", vocab_size=32100), "vocab_size 32100, its tensors say 23"),
        (edit("transformer/config.json", num_layers=4), "num_layers 4, its tensors say 3"),
        (edit("transformer/config.json", attention_head_dim=32), "num_attention_heads 2, its tensors say 4"),
        (edit("text_encoder/config.json", num_layers=9), "num_layers 9, its tensors say 2"),
        (edit("text_encoder/config.json", d_model=64), "has shape"),
        (lambda f: (f / "text_encoder/config.json").unlink(), "No such file.*text_encoder/config.json"),
        (edit("scheduler/scheduler_config.json", shift=0), "shift must be positive"),
        (edit("scheduler/scheduler_config.json", slots="many"), "expected settings of sampling"),
        (remove("text_encoder"), "holds no text_encoder/; give a folder of SD3-medium"),
        (remove("vae"), "holds no vae/"),
        (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "expected a T5 tokenizer"),
        (lambda f: (f / "mask_token_emb.pth").write_bytes(b"no"), "expected one tensor of 48 numbers"),
        (lambda f: torch.save(torch.zeros(7), f / "mask_token_emb.pth"), "invalid for input of size 7"),
    ],
)  # fmt: skip
def test_a_bad_folder_is_one_line(damage, message, vae_names, tmp_path):
    folder = publish(tmp_path / "uni", vae_names)
    damage(folder)
    with pytest.raises((UserError, FileNotFoundError), match=message):
        UniAlignment.load(folder, device="cpu")


@pytest.mark.parametrize("place", ["/", ".", "t5.safetensors"])
def test_what_is_no_folder_of_a_t5_is_named(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t5.safetensors").write_bytes(b"")
    message = "is one file; expected the folder of a T5" if "t5" in place else "a T5 tokenizer"
    with pytest.raises(UserError, match=rf"^{place}: .*{message}"):
        UniAlignment.start(dream_engine.SD3, place, device="cpu")


def test_parts_of_other_models_are_refused(uni, tmp_path):
    class Tokenizer:
        def __len__(self):
            return 9

    def other(**config):
        return SimpleNamespace(config=SimpleNamespace(**config))

    names = ("mmdit", "text_encoder", "tokenizer", "vae", "sampling")
    for i, part, message in (
        (3, other(latent_channels=4), "4 latent channels of the autoencoder: .* with 16"),
        (1, other(d_model=64, vocab_size=40), "64 numbers in a state of T5: .* with 48"),
        (2, Tokenizer(), "9 entries of the tokenizer: .* with 23"),
        (1, other(d_model=48, vocab_size=20), "of 23 entries: T5 has embeddings of 20"),
    ):
        parts = [getattr(uni, name, uni.tokens.tokenizer) for name in names]
        parts[i] = part
        with pytest.raises(UserError, match=message):
            UniAlignment(*parts)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        UniAlignment.load(tmp_path / "nowhere", device="cpu")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda uni: uni.generate([" "]), "empty prompt"),
        (lambda uni: uni.generate([]), "expected a list of prompts"),
        (lambda uni: uni.generate("ab"), "expected a list of prompts"),
        (lambda uni: uni.generate([3]), "expected a list of prompts"),
        (lambda uni: uni.generate([["a", 3]]), "a list of strings and PIL images"),
        (
            lambda uni: uni.generate(["a"], [picture(0)]),
            "expected a list of PIL images for each prompt",
        ),
        (
            lambda uni: uni.generate(["a", "b"], [[picture(0)]]),
            "expected a list of PIL images for each",
        ),
        (lambda uni: uni.generate(["caf\ud800"]), "half a letter"),
        (lambda uni: uni.generate(["a"], negative="caf\ud800"), "half a letter"),
        (lambda uni: uni.answer([picture(0)], ["caf\ud800"]), "half a letter"),
        (
            lambda uni: uni.answer([picture(0)], "a"),
            "expected a list of questions, one for each image",
        ),
        (lambda uni: uni.answer(picture(0)), "expected a list of PIL images"),
        (lambda uni: uni.answer(["a.png"]), "expected a list of PIL images"),
        (lambda uni: uni.generate(["a"], steps=0), "steps must be at least 1"),
        (lambda uni: uni.generate(["a"], guidance=float("nan")), "finite"),
        (lambda uni: uni.generate(["a"], size=(32, 50)), "nearest is 48"),
        (lambda uni: uni.generate(["a", "a"], [[], [picture(0)]]), r"found \[0, 1\]"),
        (lambda uni: uni.answer([picture(0)], ["how " * 20]), "the question fills all 12 slots"),
        (lambda uni: uni.answer([picture(0)], [" "]), "empty question"),
        (lambda uni: uni.answer([picture(0)], ["a", "b"]), "questions, one for each image, got"),
        (lambda uni: uni.answer([]), "expected a list of PIL images, got"),
        (lambda uni: uni.answer([picture(0)], steps=0), "steps must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_done_is_refused(call, message, uni):
    with pytest.raises(UserError, match=message):
        call(uni)


@pytest.mark.parametrize(
    "name, made, reads",
    [
        ("text_encoder.encoder.final_layer_norm.weight", "the condition (of T5)", False),
        ("mmdit.x_embedder.proj.bias", "the latent (of the MM-DiT)", False),
        ("vae.decoder.conv_out.bias", "the picture (of the VAE)", False),
        ("vae.encoder.conv_out.bias", "the latent of an image (of the VAE)", True),
        ("mmdit.text_head.weight", "the logits (of T5 and MM-DiT)", True),
        ("text_encoder.encoder.final_layer_norm.weight", "the logits (of T5 and MM-DiT)", True),
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(name, made, reads, value, uni_folder):
    uni = UniAlignment.load(uni_folder, device="cpu")
    uni.get_parameter(name).data.flatten()[0] = value
    with pytest.raises(UserError) as end:
        uni.answer([picture(0)], steps=2) if reads else uni.generate(["a ring"], steps=1)
    said = str(end.value)
    assert said.startswith(f"{made} holds NaN or infinity; so does {name}: look at its file")


def test_half_a_letter_in_the_settings_is_one_line(vae_names, tmp_path):
    for setting in ("sentence", "negative"):
        folder = publish(tmp_path / setting, vae_names, **{setting: "caf\ud800"})
        with pytest.raises(UserError, match="scheduler_config.json holds half a letter"):
            UniAlignment.load(folder, device="cpu")


def test_special_tokens_in_what_a_user_types_are_left_out(uni):
    ids = uni.tokens(["a </s> <extra_id_0> star", "a star", "a dog star"])
    assert torch.equal(ids[0], ids[1]) and ids[2, 1] == uni.tokens.tokenizer.unk_token_id


def test_with_little_memory_everything_is_the_same(uni, uni_folder):
    lean = UniAlignment.load(uni_folder, device="cpu")
    fast.save_memory(lean, torch.device("cpu"))
    for engine in (uni, lean):
        drawn = engine.generate(PROMPTS, [[picture(i)] for i in range(2)], steps=2)
        read = engine.answer([picture(0)], steps=2)
        if engine is uni:
            expected = [x.tobytes() for x in drawn], read
    assert ([x.tobytes() for x in drawn], read) == expected
