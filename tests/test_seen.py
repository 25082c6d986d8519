"""Who has seen what: the reserved eighth is met by nobody, the held-out pairs only before the stages.

Over 20,000 examples of each stage. Nothing is rendered: what would be is noted down instead.
"""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mini import lessons, pictures, pretrain, programs, scenes, world
from mini.scenes import BACKGROUNDS, HELD_OUT, PAIRS, SEEN, Object, Scene
from train import SHARES

N = 20_000
is_reserved = scenes.is_exam  # as it is, whatever a test makes of it


@pytest.fixture
def shown(monkeypatch):
    """All Scenes, and Objects by themselves, that would be drawn in the test."""
    shown, blank, crop = [], Image.new("RGB", (48, 48)), Image.new("RGB", (16, 16))

    def render(scene):
        shown.append(scene)
        return blank

    def portrait(obj, background="white"):
        shown.append(obj)
        return crop

    def paint(paper, shapes):
        """Of other colors, which may be so near to the world's that it shows a scene, too."""
        grounds = BACKGROUNDS.values() if isinstance(paper, tuple) else ()
        near = any(max(abs(a - b) for a, b in zip(paper, ground)) < 30 for ground in grounds)
        if near and (scene := scenes.detect(scenes.picture(original(paper, shapes)))):
            shown.append(scene)
        return nothing

    original, nothing = scenes.paint, np.zeros((48, 48, 3), np.float32)
    scenes.detect(blank)  # makes and keeps its templates, which are painted
    for module in (scenes, world):
        monkeypatch.setattr(module, "render", render)
    for function in (portrait, paint):
        monkeypatch.setattr(scenes, function.__name__, function)
    monkeypatch.setattr(scenes, "edges", render)
    return shown


@pytest.fixture
def made(monkeypatch):
    """{text: Prompt or Semantic} of all that are made in the test; no caption is a Semantic, too."""
    made = {}

    def noting(kind, note):
        def make(text, *rest):
            prompt = kind(text, *rest)
            note(text, prompt)
            return prompt

        return make

    prompt = noting(scenes.Prompt, made.__setitem__)
    for module in (scenes, programs):
        monkeypatch.setattr(module, "Prompt", prompt)
    monkeypatch.setattr(programs, "Semantic", noting(programs.Semantic, made.setdefault))
    return made


def check(shown, pairs):
    """No scene is reserved, and all objects are of pairs, each of which is there."""
    whole = [scene for scene in shown if isinstance(scene, Scene)]
    assert not any(map(is_reserved, whole))
    met = {o.pair for scene in whole for o in scene.objects}
    met |= {obj.pair for obj in shown if isinstance(obj, Object)}
    assert met == set(pairs)


def check_texts(texts, made, share):
    """No text is of a reserved prompt; so large a share of them is of one that is known here."""
    prompts = [made[text] for text in texts if text in made]
    assert not any(map(is_reserved, prompts)) and len(prompts) > share * len(texts)


# ---- what each part and stage meets -------------------------------------------------------------


def see_autoencoder(shown, made, n, folder):
    rng = random.Random(0)
    for _ in range(n):
        pictures.sample(rng)
    assert len(shown) > n / 2
    check(shown, PAIRS)


def see_t5(shown, made, n, folder):
    texts = [text.prompt[0] for text in lessons.sample_texts(n, random.Random(0))]
    check_texts(texts, made, 0.55)
    assert all(any(" ".join(pair) in text for text in texts) for pair in HELD_OUT)


def see_base(shown, made, n, folder):
    vae = SimpleNamespace(encode=lambda images: torch.zeros(len(images), 1))
    pool = pretrain.latent_pool(vae, SimpleNamespace(out=folder, device="cpu"))
    assert len(shown) == sum(pretrain.POOL.values())
    check(shown, PAIRS)
    rng, steps = random.Random(0), n // 64
    texts = [text for i in range(steps) for text in pretrain.base_batch(pool, i, steps, rng)[0]]
    check_texts([text for text in texts if text], made, 0.99)


def see_lmm(shown, made, n, folder):
    rng, texts = random.Random(0), []
    for _ in range(n // 64):
        for lesson in lessons.sample_lessons(64, rng):
            if all(isinstance(part, str) for part in lesson.prompt):
                texts.append(lesson.prompt[0].removeprefix("Generate Image: "))
    assert len(texts) > n / 5
    check_texts(texts, made, 0.99)
    check(shown, PAIRS)


def see_stage(tasks, perception=False):
    def see(shown, made, n, folder):
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

    return see


STAGES = {
    "vae": see_autoencoder,
    "t5": see_t5,
    "base": see_base,
    "lmm": see_lmm,
    "stage 1": see_stage(SHARES[1]),
    "stage 2": see_stage(SHARES[2]),
    "unialignment": see_stage({"t2i": 1, "edit": 1.5, "answer": 0.8}, perception=True),
}


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_meets_what_is_kept_from_it(stage, shown, made, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "to_tensor", lambda images: torch.zeros(len(images), 1))
    STAGES[stage](shown, made, N, tmp_path)


@pytest.mark.parametrize("stage", STAGES)
def test_it_would_be_noticed(stage, shown, made, tmp_path, monkeypatch):
    """Without reservation every stage meets what it must not."""
    monkeypatch.setattr(pretrain, "to_tensor", lambda images: torch.zeros(len(images), 1))
    monkeypatch.setattr(pretrain, "POOL", dict.fromkeys(pretrain.POOL, 100))
    monkeypatch.setattr(scenes, "is_exam", lambda thing: False)
    with pytest.raises(AssertionError, match="is_reserved"):
        STAGES[stage](shown, made, 1000, tmp_path)


def test_what_is_noted_is_what_is_drawn(request):
    images = [pictures.sample(random.Random(seed)) for seed in range(300)]
    shown = request.getfixturevalue("shown")
    for seed, image in enumerate(images):
        pictures.sample(random.Random(seed))
        read = scenes.detect(image)
        assert read is None or read in shown
        shown.clear()
