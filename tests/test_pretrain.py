"""Pre-training at a tiny scale: every run of one seed gives the same bytes, even if interrupted."""

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
    """As `fit`, but it saves every step and is interrupted just before it saves args.stop."""

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


def test_an_interrupted_run_gives_the_same_bytes(tmp_path, monkeypatch):
    for module in (encoders, pretrain):
        monkeypatch.setattr(module, "fit", fit_and_stop)
    once, resumed = args_of(tmp_path / "once"), args_of(tmp_path / "resumed")
    for part, (train, _) in pretrain.PARTS.items():
        train(once, 2)
        resumed.stop = 2
        with pytest.raises(KeyboardInterrupt):
            train(resumed, 2)
        resumed.stop = None
        train(resumed, 2)
        files = [args.out / f"{part}.pt" for args in (once, resumed)]
        states = [torch.load(file, weights_only=True) for file in files]
        assert [state["step"] for state in states] == [2, 2]
        first, second = map(tensors, states)
        assert len(first) == len(second) > 20 and all(map(torch.equal, first, second))
        lines = [json.loads(line) for line in (resumed.out / f"{part}.jsonl").open()]
        assert [line["step"] for line in lines] == [1, 2]
        assert all(0 < line["loss"] < 100 for line in lines)
    latents = torch.load(once.out / "latents.pt", weights_only=True)
    assert all(x.shape == (30, 8, SIZE // 8, SIZE // 8) for x in latents.values())


def test_previews_are_logged_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "preview_base", lambda *_: {"mean": 0.5})
    log = {}
    for part in ("vae", "t5", "base"):
        pretrain.PARTS[part][0](args_of(tmp_path), 1)
        log[part] = json.loads((tmp_path / f"{part}.jsonl").read_text())
    assert {"right", "db"} <= log["vae"].keys() and (tmp_path / "vae.png").is_file()
    assert 0 <= log["t5"]["masked"] <= 1 and log["base"]["mean"] == 0.5


def test_padding_is_attended_only_on_request_and_the_pooled_vector_can_be_zero(tmp_path):
    tokenizer = encoders.make_t5_tokenizer(tmp_path)
    torch.manual_seed(0)
    t5, model = encoders.new_t5(tokenizer)["t5"].eval(), pretrain.MMDiT(pretrain.BASE_CONFIG)
    condition_of = pretrain.TextCondition(model, t5, tokenizer)
    texts = ["a red circle", "a red circle left of a blue star"]
    single, both = condition_of(texts[:1]), condition_of(texts)
    assert torch.allclose(single.txt[0], both.txt[0, : single.txt.shape[1]], atol=1e-5)
    assert torch.allclose(single.vec[0], both.vec[0], atol=1e-5)
    assert both.mask.sum(1).tolist() == [4, 9] and both.padding is not None
    padded = condition_of(texts, 3, torch.tensor([0.0, 1.0]))
    assert padded.txt.shape[1] == 12 and padded.padding is None
    assert padded.vec[0].eq(0).all() and padded.vec[1].ne(0).any()
    assert not torch.allclose(padded.txt[0, :4], single.txt[0], atol=1e-3)
