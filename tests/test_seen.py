"""No part of the training draws what is held out from it, over 20,000 examples each.

Scenes and prompts are held out from every part, pairs from the stages and UniAlignment. The tests
render nothing: they record the scenes that would be rendered.
"""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mini import lessons, pictures, pretrain, programs, scenes, world
from mini.scenes import BACKGROUNDS, HELD_OUT, PAIRS, SEEN, Object, Scene
from train import STAGES

N = 20_000
is_held_out = scenes.is_reserved  # a test replaces the function itself


@pytest.fixture
def shown(monkeypatch):
    """Record all Scenes, and all single Objects, that the test would render."""
    shown, blank, crop = [], Image.new("RGB", (48, 48)), Image.new("RGB", (16, 16))

    def render(scene):
        shown.append(scene)
        return blank

    def portrait(obj, background="white"):
        shown.append(obj)
        return crop

    def paint(paper, shapes):
        """Record shapes in other colors, too, if the detector takes them for a scene."""
        grounds = BACKGROUNDS.values() if isinstance(paper, tuple) else ()
        near = any(max(abs(a - b) for a, b in zip(paper, ground)) < 30 for ground in grounds)
        if near and (scene := scenes.detect(scenes.picture(original(paper, shapes)))):
            shown.append(scene)
        return nothing

    original, nothing = scenes.paint, np.zeros((48, 48, 3), np.float32)
    scenes.detect(blank)  # paints and caches its templates
    for module in (scenes, world):
        monkeypatch.setattr(module, "render", render)
    for function in (portrait, paint):
        monkeypatch.setattr(scenes, function.__name__, function)
    monkeypatch.setattr(scenes, "edges", render)
    return shown


@pytest.fixture
def made(monkeypatch):
    """Record {text: Prompt or Semantic} of all that the test makes; a Prompt has precedence."""
    made = {}

    def recording(kind, record):
        def make(text, *rest):
            prompt = kind(text, *rest)
            record(text, prompt)
            return prompt

        return make

    prompt = recording(scenes.Prompt, made.__setitem__)
    for module in (scenes, programs):
        monkeypatch.setattr(module, "Prompt", prompt)
    monkeypatch.setattr(programs, "Semantic", recording(programs.Semantic, made.setdefault))
    return made


def check(shown, pairs):
    """No scene is held out; the objects are of exactly these pairs."""
    whole = [scene for scene in shown if isinstance(scene, Scene)]
    assert not any(map(is_held_out, whole))
    found = {o.pair for scene in whole for o in scene.objects}
    found |= {obj.pair for obj in shown if isinstance(obj, Object)}
    assert found == set(pairs)


def check_texts(texts, made, share):
    """No text is of a held-out prompt; more than this share of the texts was recorded."""
    prompts = [made[text] for text in texts if text in made]
    assert not any(map(is_held_out, prompts)) and len(prompts) > share * len(texts)


# ---- the data of each part ----------------------------------------------------------------------


def check_autoencoder(shown, made, n, folder):
    rng = random.Random(0)
    for _ in range(n):
        pictures.sample(rng)
    assert len(shown) > n / 2
    check(shown, PAIRS)


def check_t5(shown, made, n, folder):
    texts = [text.prompt[0] for text in lessons.sample_texts(n, random.Random(0))]
    check_texts(texts, made, 0.55)
    assert all(any(" ".join(pair) in text for text in texts) for pair in HELD_OUT)


def check_base(shown, made, n, folder):
    vae = SimpleNamespace(encode=lambda images: torch.zeros(len(images), 1))
    pool = pretrain.latent_pool(vae, SimpleNamespace(out=folder, device="cpu"))
    assert len(shown) == sum(pretrain.POOL.values())
    check(shown, PAIRS)
    rng, steps = random.Random(0), n // 64
    texts = [text for i in range(steps) for text in pretrain.base_batch(pool, i, steps, rng)[0]]
    check_texts([text for text in texts if text], made, 0.99)


def check_lmm(shown, made, n, folder):
    rng, texts = random.Random(0), []
    for _ in range(n // 64):
        for lesson in lessons.sample_lessons(64, rng):
            if all(isinstance(part, str) for part in lesson.prompt):
                texts.append(lesson.prompt[0].removeprefix("Generate Image: "))
    assert len(texts) > n / 5
    check_texts(texts, made, 0.99)
    check(shown, PAIRS)


def stage(tasks, perception=False):
    def check_stage(shown, made, n, folder):
        rng, examples = random.Random(0), world.Examples(perception)
        for task in rng.choices(list(tasks), tasks.values(), k=n):
            record = examples.record(1, task, rng)
            text = record.get("prompt") or record.get("instruction") or ""
            text += "".join(words for words, _ in record.get("segments", ()))
            text += record.get("caption", "")
            assert not any(" ".join(pair) in text for pair in HELD_OUT)
            if task == "t2i":
                check_texts([record["prompt"]], made, 0.99)
        check(shown, SEEN)

    return check_stage


PARTS = {
    "vae": check_autoencoder,
    "t5": check_t5,
    "base": check_base,
    "lmm": check_lmm,
    "stage 1": stage(STAGES[1].shares),
    "stage 2": stage(STAGES[2].shares),
    "unialignment": stage({"t2i": 1, "edit": 1.5, "answer": 0.8}, perception=True),
}


@pytest.mark.parametrize("part", PARTS)
def test_no_part_draws_what_is_held_out_from_it(part, shown, made, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "to_tensor", lambda images: torch.zeros(len(images), 1))
    PARTS[part](shown, made, N, tmp_path)


@pytest.mark.parametrize("part", PARTS)
def test_a_leak_would_be_found(part, shown, made, tmp_path, monkeypatch):
    """Where `is_reserved` holds out nothing, the checks fail for every part."""
    monkeypatch.setattr(pretrain, "to_tensor", lambda images: torch.zeros(len(images), 1))
    monkeypatch.setattr(pretrain, "POOL", dict.fromkeys(pretrain.POOL, 100))
    monkeypatch.setattr(scenes, "is_reserved", lambda thing: False)
    with pytest.raises(AssertionError, match="is_held_out"):
        PARTS[part](shown, made, 1000, tmp_path)


def test_every_scene_in_a_picture_is_recorded(request):
    images = [pictures.sample(random.Random(seed)) for seed in range(300)]
    shown = request.getfixturevalue("shown")
    for seed, image in enumerate(images):
        pictures.sample(random.Random(seed))
        read = scenes.detect(image)
        assert read is None or read in shown
        shown.clear()
