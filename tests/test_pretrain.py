"""Pre-training at a tiny scale: two runs of one seed give the same bytes, and so does a broken one."""

import json
from types import SimpleNamespace

import pytest
import torch

from mini import encoders, fitting, lessons, pretrain
from mini.world import SIZE


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(pretrain, "POOL", dict.fromkeys(pretrain.POOL, 100))


def args_of(folder):
    folder.mkdir(exist_ok=True)
    return SimpleNamespace(out=folder, device="cpu")


def trained(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)["modules"]


def same(first, second):
    return first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)


def interrupt_after(step, monkeypatch):
    """fit saves at every step, and dies once it has made so many."""
    original = fitting.save

    def save(file, modules, optimizer, done, seconds):
        original(file, modules, optimizer, done, seconds)
        if done == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "save", save)
    return original


@pytest.mark.parametrize("part", ["vae", "t5", "lmm"])
def test_a_run_that_was_interrupted_ends_with_the_same_bytes(part, tmp_path, monkeypatch):
    train = pretrain.PARTS[part]
    monkeypatch.setattr(encoders, "preview_lmm", lambda *_: {})
    monkeypatch.setattr(pretrain, "preview_vae", lambda *_: {})
    original = fitting.fit

    def every_step(*args, **options):
        return original(*args, **{**options, "every": 1})

    for module in (encoders, pretrain):
        monkeypatch.setattr(module, "fit", every_step)
    train(args_of(tmp_path / "whole"), 3)
    save = interrupt_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(args_of(tmp_path / "broken"), 3)
    monkeypatch.setattr(fitting, "save", save)
    train(args_of(tmp_path / "broken"), 3)
    assert same(trained(tmp_path / "whole", part), trained(tmp_path / "broken", part))
    losses = [
        line["loss"] for line in map(json.loads, (tmp_path / "whole" / f"{part}.jsonl").open())
    ]
    assert len(losses) == 3 and all(0 < loss < 100 for loss in losses)


def test_the_base_trains_on_what_vae_and_t5_have_learnt(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "preview_vae", lambda *_: {})
    monkeypatch.setattr(pretrain, "preview_base", lambda *_: {"mean": 0.5})
    args = args_of(tmp_path / "runs")
    for part in ("vae", "t5", "base"):
        pretrain.PARTS[part](args, 1)
    latents = torch.load(tmp_path / "runs" / "latents.pt", weights_only=True)
    assert all(x.shape == (100, 8, SIZE // 8, SIZE // 8) for x in latents.values())
    assert '"mean": 0.5' in (tmp_path / "runs" / "base.jsonl").read_text()


def test_pads_are_attended_only_where_asked_and_the_pooled_vector_can_be_zero(tmp_path):
    tokenizer = lessons.make_t5_tokenizer(tmp_path)
    torch.manual_seed(0)
    t5, model = encoders.new_t5(tokenizer).eval(), pretrain.MMDiT(pretrain.BASE_CONFIG)
    condition_of = pretrain.TextCondition(model, t5, tokenizer)
    texts = ["a red circle", "a red circle left of a blue star"]
    apart, both = condition_of(texts[:1]), condition_of(texts)
    assert torch.allclose(apart.txt[0], both.txt[0, : apart.txt.shape[1]], atol=1e-5)
    assert torch.allclose(apart.vec[0], both.vec[0], atol=1e-5)
    assert both.mask.sum(1).tolist() == [4, 9] and both.padding is not None
    padded = condition_of(texts, 3, torch.tensor([0.0, 1.0]))
    assert padded.txt.shape[1] == 12 and padded.padding is None
    assert padded.vec[0].eq(0).all() and padded.vec[1].ne(0).any()
    assert not torch.allclose(padded.txt[0, :4], apart.txt[0], atol=1e-3)
