"""Pre-training at a tiny scale: two runs of one seed give the same bytes, and so does a broken one."""

import json
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from mini import encoders, fitting, pretrain
from mini.scenes import SIZE


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(pretrain, "POOL", dict.fromkeys(pretrain.POOL, 30))
    monkeypatch.setattr(encoders, "world_words", cache(encoders.world_words))


def args_of(folder):
    folder.mkdir(exist_ok=True)
    return SimpleNamespace(out=folder, device="cpu", stop=None)


def fit_and_stop(name, modules, loss_of, steps, lr, args, preview=None, decay=0.3):
    """As `fit`, saving at every step, without previews; dies before it saves step args.stop."""

    def stop(step):
        if step == args.stop:
            raise KeyboardInterrupt
        return {}

    return fitting.fit(name, modules, loss_of, steps, lr, args, stop, decay, every=1)


def tensors(state):
    """All tensors in nested dictionaries and lists."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def test_two_runs_of_one_seed_give_the_same_bytes_even_if_one_was_interrupted(
    tmp_path, monkeypatch
):
    for module in (encoders, pretrain):
        monkeypatch.setattr(module, "fit", fit_and_stop)
    whole, broken = args_of(tmp_path / "whole"), args_of(tmp_path / "broken")
    for part, (train, _) in pretrain.PARTS.items():
        train(whole, 2)
        broken.stop = 2
        with pytest.raises(KeyboardInterrupt):
            train(broken, 2)
        broken.stop = None
        train(broken, 2)
        states = [
            torch.load(args.out / f"{part}.pt", weights_only=True) for args in (whole, broken)
        ]
        assert [state["step"] for state in states] == [2, 2]
        first, second = map(tensors, states)
        assert len(first) == len(second) > 20 and all(map(torch.equal, first, second))
        lines = [json.loads(line) for line in (broken.out / f"{part}.jsonl").open()]
        assert [line["step"] for line in lines] == [1, 2]
        assert all(0 < line["loss"] < 100 for line in lines)
    latents = torch.load(whole.out / "latents.pt", weights_only=True)
    assert all(x.shape == (30, 8, SIZE // 8, SIZE // 8) for x in latents.values())


def test_previews_are_logged_and_drawn(tmp_path, monkeypatch):
    scores = {"mean": 0.5}
    monkeypatch.setattr(pretrain, "preview_base", lambda *_: scores)
    args = args_of(tmp_path)
    for part in ("vae", "t5", "base"):
        pretrain.PARTS[part][0](args, 1)
    log = {
        part: json.loads((tmp_path / f"{part}.jsonl").read_text()) for part in ("vae", "t5", "base")
    }
    assert {"right", "db"} <= log["vae"].keys() and (tmp_path / "vae.png").is_file()
    assert 0 <= log["t5"]["masked"] <= 1 and log["base"]["mean"] == 0.5


def test_pads_are_attended_only_where_asked_and_the_pooled_vector_can_be_zero(tmp_path):
    tokenizer = encoders.make_t5_tokenizer(tmp_path)
    torch.manual_seed(0)
    t5, model = encoders.new_t5(tokenizer)["t5"].eval(), pretrain.MMDiT(pretrain.BASE_CONFIG)
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
