"""Who has seen what: the reserved eighth is met by nobody, the held-out pairs only before the stages."""

import random

import pytest

from mini import lessons, picture_lessons, pictures, pretrain, programs, world
from mini.world import HELD_OUT, PAIRS, SEEN

N = 20_000


@pytest.fixture
def prompts(monkeypatch):
    """{text: Prompt} of all captions that are made in the test."""
    made, original = {}, world.caption

    def caption(*args):
        prompt = original(*args)
        made[prompt.text] = prompt
        return prompt

    monkeypatch.setattr(world, "caption", caption)
    return made


def check(images, allowed):
    """Every picture of a scene is of no reserved scene, and of allowed pairs alone; the pairs met."""
    met = set()
    for image in images:
        scene = world.detect(image)
        if scene:
            assert not world.is_exam(scene)
            met |= {o.pair for o in scene.objects}
    assert met == set(allowed)


def test_the_autoencoder_meets_all_pairs_and_no_reserved_scene():
    rng = random.Random(0)
    check((pictures.sample(rng) for _ in range(N)), PAIRS)


def test_the_t5_reads_no_reserved_prompt(prompts):
    rng, held = random.Random(0), set()
    for text in lessons.sample_texts(N, rng):
        if text.text in prompts:
            assert not world.is_exam(prompts[text.text])
        held |= {pair for pair in HELD_OUT if " ".join(pair) in text.text}
    assert held == set(HELD_OUT)


def test_the_base_learns_no_reserved_scene_or_prompt(prompts):
    rng, met = random.Random(0), set()
    pool = {}
    for kind in pretrain.POOL:
        scenes = [world.sample_scene(kind, rng, PAIRS) for _ in range(1000)]
        assert not any(map(world.is_exam, scenes))
        met |= {o.pair for scene in scenes for o in scene.objects}
        pool[kind] = scenes, pretrain.torch.zeros(1000, 1)
    assert met == set(PAIRS)
    for step in range(N // 64):
        texts, _ = pretrain.base_batch(pool, step, N // 64, rng)
        assert not any(text and world.is_exam(prompts[text]) for text in texts)


def test_the_lmm_meets_all_pairs_and_no_reserved_scene_or_prompt(prompts, tmp_path):
    rng, tokenizer = random.Random(0), lessons.make_lmm_tokenizer(tmp_path)
    shown = []
    for _ in range(N // 64):
        for lesson in picture_lessons.sample_lessons(64, tokenizer, rng):
            shown += [part for part in lesson.prompt if not isinstance(part, str)]
            text = lesson.prompt[0] if len(lesson.prompt) == 1 else None
            if text and (prompt := prompts.get(text.removeprefix("Generate Image: "))):
                assert not world.is_exam(prompt)
    check([image for image in shown if image.size == (world.SIZE, world.SIZE)], PAIRS)


@pytest.mark.parametrize("task", ["t2i", "i2i", "edit", "objects"])
def test_dream_engine_is_shown_no_held_out_pair(task, prompts):
    rng, examples = random.Random(0), programs.Examples()
    shown = []
    for _ in range(N // 4):
        record = examples.record(1, task, rng)
        shown += [record[name] for name in ("source", "target") if name in record]
        text = record.get("prompt") or record.get("instruction") or ""
        assert not any(" ".join(pair) in text for pair in HELD_OUT)
        assert task != "t2i" or not world.is_exam(prompts[text])
    check(shown, SEEN)
