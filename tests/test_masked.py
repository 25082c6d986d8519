"""Masked diffusion: masking, loss and sampler, with any network."""

import math

import pytest
import torch

from unialignment import masked

B, L, V = 3, 6, 11
MASK = V - 1


def random_logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---- training -----------------------------------------------------------------------------------


def test_times_lie_one_in_each_part_of_the_range():
    t = masked.stratified_times(uniform(1000))
    assert t.min() >= 1e-3 and t.max() <= 1
    parts = ((t - 1e-3) / 0.999 * 1000).clamp(max=999.5).long()
    assert len(set(parts.tolist())) > 990  # but for rounding at their borders
    torch.testing.assert_close(
        masked.stratified_times(torch.tensor([0.5, 0.25])),
        0.001 + 0.999 * torch.tensor([0.25, 0.625]),
    )


def test_the_share_of_hidden_tokens_is_just_below_t():
    ids, t = torch.zeros(4, 200_000, dtype=torch.long), torch.tensor([1e-3, 0.25, 0.7, 1.0])
    noisy = masked.mask(ids, t, uniform(4, 200_000), MASK)
    share = (noisy == MASK).double().mean(1)
    torch.testing.assert_close(share, 0.999 * t.double(), atol=4e-3, rtol=0)
    assert share[3] < 1


def test_only_the_slots_that_may_be_hidden_are():
    ids, slots = torch.arange(L).repeat(B, 1), torch.arange(L).repeat(B, 1) >= 4
    noisy = masked.mask(ids, torch.ones(B), torch.zeros(B, L), MASK, slots)
    assert noisy.tolist() == [[0, 1, 2, 3, MASK, MASK]] * B
    assert ids.max() < MASK  # in a new tensor


def reference_loss(logits, ids, hidden, t, mask_id):
    """Slot by slot, from section 4 of the specification, its weight as the official code writes it."""
    rows = []
    for b in range(len(ids)):
        total = 0.0
        for i in range(ids.shape[1]):
            if hidden[b, i]:
                scores = [x for k, x in enumerate(logits[b, i].tolist()) if k != mask_id]
                p = math.exp(logits[b, i, ids[b, i]].item()) / math.fsum(map(math.exp, scores))
                total -= math.log(p)
        sigma = -math.log1p(-0.999 * t[b].item())
        rate = 0.999 / (1 - 0.999 * t[b].item())
        rows.append(total * rate / math.expm1(sigma) / ids.shape[1])
    return torch.tensor(rows)


@pytest.mark.parametrize("mask_id", [MASK, 3])
def test_the_loss_is_the_sum_over_hidden_slots_over_t(mask_id):
    logits, t = random_logits(B, L, V), torch.tensor([0.02, 0.5, 1.0])
    ids = torch.tensor([[0, 1, 2, 4, 5, 6], [7, 8, 9, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    hidden = uniform(B, L) < 0.6
    found = masked.loss(logits, ids, hidden, t, mask_id)
    torch.testing.assert_close(found, reference_loss(logits, ids, hidden, t, mask_id))
    if mask_id == MASK:  # the last entry is what MASK is unless another one is named
        assert torch.equal(masked.loss(logits, ids, hidden, t), found)


def test_the_networks_logits_stay_as_they_are():
    logits, ids = random_logits(B, L, V), torch.zeros(B, L, dtype=torch.long)
    before = logits.clone()
    masked.loss(logits, ids, ids == 0, torch.ones(B))
    masked.unmask(lambda _: logits, torch.full((B, L), MASK), 4)
    assert torch.equal(logits, before)


def test_nothing_hidden_costs_nothing_and_mask_is_no_answer():
    logits, ids = random_logits(B, L, V).requires_grad_(), torch.zeros(B, L, dtype=torch.long)
    hidden = torch.zeros(B, L, dtype=torch.bool)
    assert masked.loss(logits, ids, hidden, torch.full((B,), 1e-3)).tolist() == [0.0] * B
    masked.loss(logits, ids, ~hidden, torch.ones(B)).sum().backward()
    assert logits.grad[..., MASK].abs().max() == 0 and logits.grad[..., 0].abs().min() > 0


# ---- sampling -----------------------------------------------------------------------------------


class Network:
    """Logits that depend on the row's own visible tokens; counts its calls."""

    def __init__(self, mask_id=MASK):
        self.calls, self.mask_id = [], mask_id
        self.table = 3 * random_logits(L, V, V, seed=5)

    def __call__(self, ids):
        self.calls.append(ids.clone())
        seen = torch.nn.functional.one_hot(ids, V).float()
        return torch.einsum("blv,lvk->bk", seen, self.table)[:, None] + self.table[:, 0]


@pytest.mark.parametrize("order", ["sampled", "confident"])
@pytest.mark.parametrize("steps", [1, 2, 4, 30])
def test_all_slots_are_filled_and_prompts_stay(steps, order):
    network, ids = Network(), torch.full((B, L), MASK)
    ids[1, :2] = torch.tensor([3, 4])
    draws = uniform(steps, B, L, V)
    out = masked.unmask(network, ids, steps, order, draws)
    assert (out != MASK).all() and out[1, :2].tolist() == [3, 4]
    assert (ids == MASK).sum() == B * L - 2  # the prompts themselves are left alone
    assert len(network.calls) <= min(steps, B * L) + 1
    for before, after in zip(network.calls, [*network.calls[1:], out]):
        visible = before != MASK
        assert (
            torch.equal(after[visible], before[visible]) and (after != MASK).sum() > visible.sum()
        )
    if order == "confident":  # half of six in each of two steps, and so on
        counts = [(x[0] != MASK).sum().item() for x in network.calls]
        assert (
            counts
            == {1: [0], 2: [0, 3], 4: [0, 2, 4, 5], 30: [0, 1, 2, 3, 4, 5]}[steps][: len(counts)]
        )


def race(logits, ids, steps, draws):
    """Section 5 of the specification, one slot at a time, with fresh predictions at every step."""
    times, ids = torch.linspace(1, 1e-5, steps + 1).tolist(), ids.clone()
    for i in range(steps):
        p = logits(ids)
        p[..., MASK] -= 1e6
        p, before = p.softmax(-1), ids.clone()
        for b, slot in (before == MASK).nonzero().tolist():
            weights = (p[b, slot] * (times[i] - times[i + 1])).tolist()
            weights[MASK] = times[i + 1]
            scores = [
                w / (1e-10 - math.log(u + 1e-10))
                for w, u in zip(weights, draws[i, b, slot].tolist())
            ]
            ids[b, slot] = scores.index(max(scores))
    last = logits(ids)
    last[..., MASK] -= 1e6
    return torch.where(ids == MASK, last.argmax(-1), ids)


@pytest.mark.parametrize("steps", [2, 7, 40])
def test_the_sampler_fed_recorded_draws_is_the_race_of_the_paper(steps):
    network, ids = Network(), torch.full((B, L), MASK)
    ids[0, 2] = 5
    draws = uniform(steps, B, L, V, seed=steps)
    assert torch.equal(
        masked.unmask(network, ids, steps, "sampled", draws), race(Network(), ids, steps, draws)
    )


@pytest.mark.parametrize("order", ["sampled", "confident"])
def test_a_row_alone_equals_the_row_in_a_batch(order):
    ids, draws = torch.full((B, L), MASK), uniform(8, B, L, V)
    ids[2, 0] = 1
    together = masked.unmask(Network(), ids, 8, order, draws)
    for b in range(B):
        alone = masked.unmask(Network(), ids[b : b + 1], 8, order, draws[:, b : b + 1])
        assert torch.equal(alone[0], together[b])
    assert order == "sampled" or not torch.equal(together[0], together[2])


def test_tokens_are_drawn_in_proportion():
    p = torch.tensor([0.5, 0.3, 0.2, 0.0]).expand(1, 20_000, 4)
    out = masked.fill_at_random(p.clone(), 0.8, 0.2, uniform(1, 20_000, 4), 3)
    shares = out.flatten().bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.375, 0.225, 0.15, 0.25]), atol=0.012, rtol=0)


def test_mask_may_stand_anywhere_in_the_vocabulary():
    network, ids = Network(), torch.full((B, L), 2)
    out = masked.unmask(network, ids, 3, "confident", mask_id=2)
    assert (out != 2).all()


def test_what_cannot_be_sampled_is_refused():
    ids = torch.full((1, L), MASK)
    with pytest.raises(ValueError, match="0 steps, order .*: at least 1"):
        masked.unmask(Network(), ids, 0)
    with pytest.raises(ValueError, match="order 'best': .*'sampled' or 'confident'"):
        masked.unmask(Network(), ids, 1, "best")
