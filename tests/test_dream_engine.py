"""The system: equal to the official code, whole batches equal to their items, parts that fit."""

import copy
import json

import numpy as np
import pytest
import torch
from cases import IMAGE, OFFICIAL
from PIL import Image
from safetensors.torch import load_file, save_file
from test_lmm import PICTURES, PROMPTS
from tiny import relative, tensor, tensors
from transformers import AutoTokenizer, Qwen2VLConfig

from dream_engine import LMM, SD3, STAGE1, STAGE2, DreamEngine
from lmm import Batch, mrope_positions
from support.cli import UserError

# ---- the published checkpoint -------------------------------------------------------------------


@pytest.fixture(scope="module")
def lmm_folder(tmp_path_factory):
    """A Qwen2-VL folder that goes with the golden checkpoint, its own weights left out."""
    folder = tmp_path_factory.mktemp("lmm")
    AutoTokenizer.from_pretrained(LMM).save_pretrained(folder)
    config = copy.deepcopy(OFFICIAL["lmm"])
    config["text_config"]["vocab_size"] = VOCABULARY
    Qwen2VLConfig(**config).save_pretrained(folder)
    return folder


VOCABULARY = 700  # the golden checkpoint's, 200, is smaller than the miniature's tokenizer


def golden(names):
    """The golden checkpoint, its embeddings with rows more."""
    weights = tensors(names["official"])
    for name in ("lmm.model.embed_tokens.weight", "lmm.lm_head.weight"):
        rows = tensor("more rows", (VOCABULARY - 200, 64))
        weights[name] = torch.cat([weights["lmm.model.embed_tokens.weight"][:200], rows])
    return weights


def publish(folder, weights):
    """Write weights as the published checkpoint lies: .bin shards and an index."""
    folder.mkdir(parents=True)
    index = {}
    for i in range(2):
        part = dict(list(weights.items())[i::2])
        torch.save(part, folder / f"pytorch_model-0000{i + 1}-of-00002.bin")
        index |= dict.fromkeys(part, f"pytorch_model-0000{i + 1}-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.fixture
def load(lmm_folder, write, tmp_path):
    """load(weights, ...): an engine from a published checkpoint of these weights."""

    def load(weights, layout="bin", name="published", **options):
        if layout == "bin":
            path = publish(tmp_path / name, weights)
        else:
            path = tmp_path / name
            path.mkdir()
            save_file(weights, path / "model.safetensors")
        sd3 = write("vae/16/single", "first_stage_model.")
        path = path.parent if path.name == "transformer" else path
        return DreamEngine.load(sd3, lmm_folder, path, device="cpu", **options)

    return load


def velocity(engine, case):
    _, r, mrope, prompt, grids = OFFICIAL["cases"][case]
    ids = torch.tensor([prompt])
    image_mask = ids == IMAGE
    positions = torch.arange(len(prompt)).expand(3, -1)
    if mrope:
        positions = mrope_positions(image_mask[0], grids)
    grids = torch.tensor(grids).reshape(-1, 3)
    patches = tensor("patches", (int(grids.prod(1).sum()), 1176)) if grids.numel() else None
    batch = Batch(ids, torch.ones_like(image_mask), image_mask, positions[:, None], patches, grids)
    condition = engine.condition(batch, r)
    return engine.mmdit(
        tensor("latent", (1, 16, 8, 12)), torch.tensor([0.6]), condition.txt, condition.vec
    )


@torch.no_grad()
@pytest.mark.parametrize("layout", ["bin", "safetensors"])
def test_the_published_layout_gives_the_official_velocity(layout, names, answers, load):
    for scale in {case[0] for case in OFFICIAL["cases"].values()}:
        engine = load(golden(names), layout, f"scale {scale}", lora_scale=scale)
        assert not any(name.endswith(".A") for name, _ in engine.named_parameters())
        for case in (name for name, c in OFFICIAL["cases"].items() if c[0] == scale):
            assert relative(velocity(engine, case), answers[f"official/{case}"]) < 1e-4


def without_base_layer(weights):
    return {name.replace(".base_layer.", "."): x for name, x in weights.items()}


def plain_weights_beside_lora(weights):
    """A module may carry a pair without being wrapped."""
    for kind in ("weight", "bias"):
        path = "dit.transformer_blocks.1.attn.to_q."
        weights[path + kind] = weights.pop(f"{path}base_layer.{kind}")
    return weights


def head_alone(weights):
    del weights["lmm.model.embed_tokens.weight"]
    return weights


@torch.no_grad()
@pytest.mark.parametrize("change", [without_base_layer, plain_weights_beside_lora, head_alone])
def test_other_spellings_of_the_same_checkpoint_give_the_same(change, names, answers, load):
    engine = load(change(golden(names)), name="published/transformer", lora_scale=2)
    case = "pictures, r 0.3, scale 2"
    assert relative(velocity(engine, case), answers[f"official/{case}"]) < 1e-4


@torch.no_grad()
def test_lora_is_merged_in_the_precision_of_the_engine(names, answers, load):
    """Half precision in the file costs its rounding once, and not again in the merged weights."""
    weights = {name: x.bfloat16() for name, x in golden(names).items()}
    exact = {name: x.float() for name, x in weights.items()}
    half = load(weights, name="half", lora_scale=2)
    full = load(exact, name="full", lora_scale=2)
    case = "pictures, r 0.3, scale 2"
    assert relative(velocity(half, case), velocity(full, case)) < 1e-6


def test_the_published_folder_draws_from_start_to_end(names, load):
    engine = load(golden(names))
    assert engine.default_size == 512 and engine.lmm.patches.patch == 14
    images = engine.generate([["a dog ", PICTURES[0], " on a mat"]], steps=2, r=0.5, size=(48, 64))
    assert images[0].size == (48, 64)


def test_golden_cases_differ(answers):
    """Else a switch without effect would pass for right."""
    cases = [k for k in answers if k.startswith("official/pictures")]
    for a in cases:
        for b in cases:
            assert a == b or relative(answers[a], answers[b]) > 1e-2


Q = "dit.transformer_blocks.1.attn.to_q"


@pytest.mark.parametrize(
    "change, message",
    [
        ("dit.", r"LoRA of dit\..*weight"),
        ("lmm.", r"LoRA of lmm\..*weight"),
        ({"surprise.weight": torch.zeros(2)}, "unknown surprise.weight"),
        ({"lmm.surprise": torch.zeros(2)}, "unknown lmm.surprise"),
        ({"dit.surprise.weight": torch.zeros(2)}, "unknown dit.surprise.weight"),
        ({f"{Q}.surprise": torch.zeros(2)}, f"unknown {Q}.surprise"),
        ({f"{Q}.lora_magnitude_vector": torch.zeros(2)}, f"unknown {Q}.lora_magnitude_vector"),
        ({f"{Q}.base_layer.weight": None}, f"the LoRA of {Q}, .*{Q}.weight"),
        ({f"{Q}.lora_B.default.weight": None}, f"both halves of the LoRA of {Q}, "),
        ({f"{Q}.lora_A.default.weight": torch.zeros(4)}, f"the LoRA of {Q}, which fit"),
        ({f"{Q}.lora_A.default.weight": torch.zeros(2, 64)}, f"the LoRA of {Q}, which fit"),
        ({f"{Q}.lora_B.default.weight": torch.zeros(64, 3)}, f"the LoRA of {Q}, which fit"),
        ({f"{Q}.base_layer.weight": torch.zeros(64, 63)}, rf"the LoRA of {Q}, .*to be added to \(64, 63\)"),
        ({f"{Q}.base_layer.bias": torch.tensor(0.0)}, rf"{Q}.bias has shape \(\)"),
        ({f"{Q}.bias": torch.zeros(64)}, f"{Q}.bias is stored twice"),
        (
            {"dit.norm_out.lora_A.default.weight": torch.zeros(4, 64),
             "dit.norm_out.lora_B.default.weight": torch.zeros(64, 4)},
            "a weight and both halves of the LoRA of dit.norm_out",
        ),
        ({"lmm.model.layers.1.mlp.up_proj.weight": None}, "missing lmm.model.layers.1.mlp.up_proj.weight"),
        ({"input_embeds_align_mlp.2.bias": None}, "missing input_embeds_align_mlp.2.bias"),
        ({"dit.transformer_blocks.9999999.norm1.linear.bias": torch.zeros(2)}, "unknown dit.transformer_blocks.9999999"),
        ({"dit.transformer_blocks.0.attn.norm_q.weight": torch.zeros(48)}, "heads of 48"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_published_checkpoint_is_named_as_its_files_name_it(
    change, message, names, load
):
    weights = golden(names)
    if isinstance(change, str):  # all weights of a model, while its LoRA stays
        change = {k: None for k in weights if k.startswith(change) and ".lora_" not in k}
    weights |= change
    with pytest.raises(UserError, match=message):
        load({name: x for name, x in weights.items() if x is not None})


def test_an_autoencoder_of_another_model_is_refused_before_any_work(names, lmm_folder, tmp_path):
    """As where --sd3 is forgotten: the miniature's autoencoder beside the published transformer."""
    path = publish(tmp_path / "published", golden(names))
    with pytest.raises(UserError, match="has 8 latent channels, the MM-DiT 16: --sd3 must be"):
        DreamEngine.load(SD3, lmm_folder, path, device="cpu")


# ---- the miniature through the same code --------------------------------------------------------


@pytest.mark.parametrize("r", [0.0, 0.4, 1.0])
def test_a_ragged_batch_equals_its_items_alone(engine, r):
    rates = torch.tensor([0.1, r, 1 - r])
    together = engine.encode(PROMPTS, rates)
    for i, prompt in enumerate(PROMPTS):
        alone = engine.encode([prompt], rates[i])
        n = alone.txt.shape[1]
        assert together.mask[i].sum() == n
        assert relative(together.txt[i, :n], alone.txt[0]) < 1e-5
        assert relative(together.vec[i], alone.vec[0]) < 1e-5


def test_r_moves_image_prompts_only(engine):
    text, image, _ = (engine.encode([p], 0.0).txt for p in PROMPTS)
    assert torch.equal(engine.encode([PROMPTS[0]], 1.0).txt, text)
    assert relative(engine.encode([PROMPTS[1]], 1.0).txt, image) > 1e-2


def test_the_vit_runs_once(engine):
    calls = []
    hook = engine.lmm.visual.register_forward_hook(lambda *_: calls.append(1))
    engine.generate([[PICTURES[0]]], steps=3, task="i2i", r=0.5)
    hook.remove()
    assert len(calls) == 1


def test_same_seed_same_picture_alone_or_in_a_batch(engine):
    prompts = [["a red circle"], ["a blue star and a green ring"]]
    together = engine.generate(prompts, steps=4, seed=7)
    again = engine.generate(prompts, steps=4, seed=7)
    for i, prompt in enumerate(prompts):
        (alone,) = engine.generate([prompt], steps=4, seed=7 + i)
        difference = np.abs(np.asarray(together[i], int) - np.asarray(alone, int))
        assert difference.max() <= 1  # sums in another order may round another way
        assert together[i].tobytes() == again[i].tobytes()


def test_sizes(engine):
    (image,) = engine.generate([["a red circle"]], steps=1, size=(32, 48))
    assert image.size == (32, 48)
    (image,) = engine.generate([["a red circle"]], steps=1, guidance=1)
    assert image.size == (48, 48)


def test_hundreds_of_tokens_and_many_pictures_beside_a_short_prompt(engine):
    long = ["a red circle, " * 90, *PICTURES, " and ", *PICTURES]
    batch = engine.lmm.collate([long, ["a ring"]])
    assert batch.mask.sum(1)[0] > 400 and len(batch.grids) == 6
    together, alone = engine.encode([long, ["a ring"]]), engine.encode([["a ring"]])
    n = alone.txt.shape[1]
    assert relative(together.txt[1, :n], alone.txt[0]) < 1e-5
    assert relative(together.vec[1], alone.vec[0]) < 1e-5
    _, image = engine.generate([long, ["a ring"]], steps=1)
    (same,) = engine.generate([["a ring"]], steps=1, seed=1)
    assert np.abs(np.asarray(image, int) - np.asarray(same, int)).max() <= 1


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"steps": 0}, "steps"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": float("inf")}, "guidance"),
        ({"r": 1.5}, "blend"),
        ({"r": float("nan")}, "blend"),
        ({"size": (64, 50)}, "nearest is 48"),
        ({"size": (0, 64)}, "nearest is 16"),
        ({"size": (128, 64)}, "nearest is 48"),
        ({"task": "draw"}, "unknown task"),
    ],
)
def test_settings_that_cannot_be_drawn_are_refused(engine, setting, message):
    with pytest.raises(UserError, match=message):
        engine.generate([["a red circle"]], **setting)


@pytest.mark.parametrize("prompts", ["ab", [], None, [3], [PICTURES[0]], (x for x in "ab")])
def test_what_is_no_list_of_prompts_is_refused(engine, prompts):
    with pytest.raises(UserError, match="expected a list of prompts, one for each picture, got"):
        engine.generate(prompts)


def test_each_prompt_may_have_its_own_r(engine):
    prompts, settings = [[PICTURES[0]]] * 2, {"steps": 2, "task": "i2i"}
    for guidance in (1, 4.5):
        for r in ([0.0, 1.0], torch.tensor([0.0, 1.0])):
            together = engine.generate(prompts, guidance=guidance, r=r, **settings)
            for i, picture in enumerate(together):
                (alone,) = engine.generate(
                    prompts[:1], guidance=guidance, r=float(i), seed=i, **settings
                )
                assert np.abs(np.asarray(picture, int) - np.asarray(alone, int)).max() <= 1


# ---- what is not finite -------------------------------------------------------------------------


def test_a_weight_that_is_not_finite_is_named(engine, monkeypatch):
    for name, made in (
        ("lmm.language_model.norm.weight", "the condition (of LMM and adapter)"),
        ("adapter.txt.0.weight", "the condition (of LMM and adapter)"),
        ("mmdit.x_embedder.proj.bias", "the latent (of the MM-DiT)"),
        ("vae.decoder.conv_out.bias", "the picture (of the VAE)"),
    ):
        for value in (torch.nan, torch.inf):
            weight = engine.get_parameter(name)
            before = weight.data.clone()
            weight.data.flatten()[0] = value
            try:
                with pytest.raises(UserError) as end:
                    engine.generate([["a red circle"]], steps=1)
            finally:
                weight.data.copy_(before)
            said = str(end.value)
            assert said.startswith(f"{made} holds NaN or infinity; so does {name}: ")
    engine.generate([["a red circle"]], steps=1)


def test_an_overflow_is_refused_with_another_dtype_as_advice(engine):
    half = copy.deepcopy(engine).half()  # the VAE, too
    half.adapter.txt[0].weight.data *= 1e5
    half.adapter.float()
    expected = "no weight does; or try --dtype float32"
    with pytest.raises(UserError, match=f"the condition .* holds NaN or infinity; {expected}"):
        half.generate([["a red circle"]], steps=1)


def test_no_step_of_the_sampler_asks_whether_numbers_are_finite(engine, monkeypatch):
    calls, whole = [], torch.Tensor.isfinite
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda x: calls.append(1) or whole(x))
    counts = []
    for steps in (1, 5):
        calls.clear()
        engine.generate([["a red circle"]], steps=steps)
        counts.append(len(calls))
    assert counts == [4, 4]  # of the condition two, a latent and a picture


def test_a_saved_adapter_comes_back(engine, tmp_path):
    engine.save(tmp_path / "a.safetensors", stage=1, step=3)
    again = DreamEngine.load(checkpoint=tmp_path / "a.safetensors", device="cpu")
    for name, parameter in engine.adapter.state_dict().items():
        assert torch.equal(again.adapter.state_dict()[name], parameter)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


# ---- what does not fit is named -----------------------------------------------------------------


def test_adapters_for_other_models_are_refused(engine, tmp_path):
    weights = load_file(STAGE1)
    config = {"config": json.dumps(engine.base)}
    wide = dict(weights)
    wide["adapter.txt.0.weight"] = torch.zeros(512, 1536)
    save_file(wide, tmp_path / "wide.safetensors", config)
    with pytest.raises(UserError, match="txt.0.weight has shape .512, 1536., expected .512, 192."):
        DreamEngine.load(checkpoint=tmp_path / "wide.safetensors", device="cpu")
    for part, name in (("base", "SD3"), ("lmm", "Qwen2-VL")):
        config = {"config": json.dumps({**engine.base, part: 1.0})}
        save_file(weights, tmp_path / "other.safetensors", config)
        with pytest.raises(UserError, match=f"trained on another {name}"):
            DreamEngine.load(checkpoint=tmp_path / "other.safetensors", device="cpu")
    for wrong in (SD3, LMM / "model.safetensors"):
        with pytest.raises(UserError, match="expected a Dream Engine checkpoint"):
            DreamEngine.load(checkpoint=wrong, device="cpu")


@pytest.mark.parametrize(
    "config",
    ["null", "[]", "3", "NaN", '{"base": 1', "[" * 100_000, "{}", '{"base": "1", "lmm": 1}']
    + ['{"base": null, "lmm": 1}', '{"base": {}, "lmm": 1}', '{"base": 1e400, "lmm": 1}']
    + ['{"base": BASE, "lmm": LMM, "alpha": "16"}', '{"base": BASE, "lmm": LMM, "alpha": -1}']
    + ['{"base": BASE, "lmm": LMM, "alpha": NaN}', '{"base": BASE, "lmm": LMM}'],
)
def test_a_wrong_config_of_a_checkpoint_is_one_line(config, engine, tmp_path):
    config = config.replace("BASE", str(engine.base["base"])).replace(
        "LMM", str(engine.base["lmm"])
    )
    save_file(load_file(STAGE2), tmp_path / "a.safetensors", {"config": config})
    with pytest.raises(UserError, match="a.safetensors: "):
        DreamEngine.load(checkpoint=tmp_path / "a.safetensors", device="cpu")


SITE = "lora.mmdit.joint_blocks.2.x_block.attn.qkv"


@pytest.mark.parametrize(
    "change, message",
    [
        ({f"{SITE}.A": None}, f"unknown {SITE}.B"),
        ({f"{SITE}.B": None}, f"missing {SITE}.B"),
        ({f"{SITE}.A": torch.zeros(16, 128)}, rf"{SITE}.A has shape \(16, 128\)"),
        ({f"{SITE}.A": torch.zeros(3, 8, 128)}, rf"{SITE}.A has shape \(3, 8, 128\)"),
        ({f"{SITE}.A": torch.zeros(3, 0, 128), f"{SITE}.B": torch.zeros(3, 128, 0)}, rf"{SITE}.A has shape \(3, 0, 128\)"),
        ({"lora.mmdit.joint_blocks.9.x_block.attn.qkv.A": torch.zeros(3, 16, 128),
          "lora.mmdit.joint_blocks.9.x_block.attn.qkv.B": torch.zeros(3, 128, 16)}, "unknown lora.mmdit.joint_blocks.9"),
        ({"lora.vae.A": torch.zeros(2)}, "unknown lora.vae.A"),
        ({"adapter.txt.0.bias": torch.tensor(0.0)}, r"adapter.txt.0.bias has shape \(\)"),
    ],
)  # fmt: skip
def test_lora_that_does_not_fit_is_named(change, message, engine, tmp_path):
    weights = load_file(STAGE2) | change
    weights = {name: x for name, x in weights.items() if x is not None}
    config = {"config": json.dumps({**engine.base, "alpha": 16})}
    save_file(weights, tmp_path / "a.safetensors", config)
    with pytest.raises(UserError, match=message):
        DreamEngine.load(checkpoint=tmp_path / "a.safetensors", device="cpu")


def test_pictures_are_pil_rgb(engine):
    (image,) = engine.generate([["a red circle"]], steps=1)
    assert isinstance(image, Image.Image) and image.mode == "RGB"
