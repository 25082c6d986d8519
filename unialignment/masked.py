"""Masked discrete diffusion of text (arXiv 2406.07524) as D-DiT (2501.00289) and UniAlignment have it.

A text is a row of L token ids. Noise hides tokens: at time t in (0, 1] each is replaced by MASK with
probability about t, and t = 1 hides nearly all. The network sees the hidden row and predicts every
token at once; it is never given t. Sampling walks t from 1 to 0: all MASK, then more and more words.
Letters: B batch, L slots, V vocabulary. MASK is an entry of the vocabulary, by default its last one.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

LOWEST = 1e-3  # the smallest t in training, and the share of tokens that is never hidden


def stratified_times(uniform):
    """uniform (B,) in [0, 1) -> t (B,) in [0.001, 1], one in each of B equal parts of the range.

    The loss divides by t: times drawn apart would let the luck of a batch outweigh what it says.
    """
    offsets = torch.arange(len(uniform), device=uniform.device)
    return LOWEST + (1 - LOWEST) * ((uniform + offsets) / len(uniform)).frac()


def mask(ids, t, uniform, mask_id, slots=None):
    """Hide tokens: ids (B, L), t (B,), uniform (B, L) in [0, 1) -> ids (B, L), some of them mask_id.

    slots (B, L) bool: those that may be hidden, an answer's for one; default: all. The result goes
    through the text encoder: states of the clean text, blanked later, would give the words away.
    """
    hidden = uniform < (1 - LOWEST) * t[:, None]
    return ids.masked_fill(hidden if slots is None else hidden & slots, mask_id)


def loss(logits, ids, masked, t, mask_id=-1):
    """The bound on -log p(ids), per example: (B,) fp32.

    1/t times the sum of -log p over the masked slots, divided by all L slots, padding and clean ones
    too. logits (B, L, V), ids (B, L) clean, masked (B, L) bool, t (B,).
    """
    scores = without_mask(logits[masked], mask_id)  # (masked slots of all rows, V)
    errors = F.cross_entropy(scores, ids[masked], reduction="none")
    rows = masked.nonzero()[:, 0]
    return errors.new_zeros(len(ids)).index_add(0, rows, errors) / ids.shape[1] / t


def without_mask(logits, mask_id=-1):
    """logits (..., V) as new fp32 ones, that of MASK minus infinity: no text holds MASK in the end."""
    logits = logits.to(torch.float32, copy=True)
    logits[..., mask_id] = -torch.inf
    return logits


@torch.no_grad()
def unmask(logits_fn, ids, steps, order="sampled", uniforms=None, mask_id=-1):
    """Fill the slots of ids (B, L) that hold MASK, in at most steps + 1 forwards -> ids (B, L).

    logits_fn: ids (B, L) -> logits (B, L, V). Slots that hold a token never change. order: "sampled",
    as in the paper's code, fills slots at random, with tokens drawn from their distributions;
    "confident" fills the slots that are surest, with their likeliest token, equally many each step.
    uniforms: the draws of "sampled", one (B, L, V) in [0, 1) for each step; default: torch.rand.
    """
    if steps < 1 or order not in ("sampled", "confident"):
        raise ValueError(f"{steps} steps, order {order!r}: at least 1, 'sampled' or 'confident'")
    p = without_mask(logits_fn(ids), mask_id).softmax(-1)
    mask_id %= p.shape[-1]
    times = torch.linspace(1, 1e-5, steps + 1).tolist()
    draws = None if uniforms is None else iter(uniforms)
    for i, (t, s) in enumerate([*pairwise(times), (0, 0)]):
        masked = ids == mask_id
        if not masked.any():
            break
        if p is None:
            p = without_mask(logits_fn(ids), mask_id).softmax(-1)
        if i == steps:
            new = p.argmax(-1)
        elif order == "confident":
            new = fill_surest(p, masked, steps - i, mask_id)
        else:
            uniform = next(draws) if draws else torch.rand(p.shape)
            new = fill_at_random(p, t, s, uniform.to(p), mask_id)
        filled = torch.where(masked, new, ids)
        p = p if torch.equal(filled, ids) else None  # if no slot has changed, it still holds
        ids = filled
    return ids


def fill_at_random(p, t, s, uniform, mask_id):
    """From time t to s: a slot stays MASK with probability s / t, else a token is drawn from p.

    p and uniform (B, L, V) -> ids (B, L). An exponential race, the first of all entries to arrive
    wins: argmax_k weight_k / -log u_k draws k in proportion to its weight.
    """
    weights = p * (t - s)
    weights[..., mask_id] = s
    return (weights / (1e-10 - (uniform + 1e-10).log())).argmax(-1)


def fill_surest(p, masked, steps_left, mask_id):
    """The likeliest token in the surest of a row's masked slots, MASK elsewhere: ids (B, L)."""
    confidence, best = p.max(-1)
    count = -(-masked.sum(1, keepdim=True) // steps_left)  # rounded up: none is left in the end
    order = confidence.masked_fill(~masked, -1).argsort(dim=1, descending=True, stable=True)
    return best.where(order.argsort(dim=1) < count, mask_id)
