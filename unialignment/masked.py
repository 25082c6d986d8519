"""Masked discrete diffusion of text (arXiv 2406.07524), as in D-DiT (2501.00289) and UniAlignment.

A text is a row of L token ids. Noise hides tokens: at time t in (0, 1] each token becomes MASK with
probability t, up to a small constant. The network gets the row with its MASKs, but not t, and predicts
all tokens at once. Sampling goes from t = 1, all MASK, to t = 0, a whole text.
Letters: B batch, L slots, V vocabulary. MASK is an entry of the vocabulary, by default the last one.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

LOWEST = 1e-3  # the smallest t in training; 1 - LOWEST is the largest probability of MASK


def stratified_times(uniform):
    """uniform (B,) in [0, 1) -> t (B,) in [0.001, 1], one in each of B equal parts of the range.

    The loss divides by t. Independent times would let a few small t dominate a batch.
    """
    offsets = torch.arange(len(uniform), device=uniform.device)
    return LOWEST + (1 - LOWEST) * ((uniform + offsets) / len(uniform)).frac()


def mask(ids, t, uniform, mask_id, slots=None):
    """Hide tokens: ids (B, L), t (B,), uniform (B, L) in [0, 1) -> ids (B, L), some of them mask_id.

    slots (B, L) bool: tokens that may be hidden, such as those of an answer; default: all. The text
    encoder must get the result: states of the clean text would reveal the hidden tokens.
    """
    hidden = uniform < (1 - LOWEST) * t[:, None]
    return ids.masked_fill(hidden if slots is None else hidden & slots, mask_id)


def loss(logits, ids, masked, t, mask_id=-1):
    """An upper bound on -log p(ids) per slot (arXiv 2406.07524): (B,) fp32.

    For each row, the sum of -log p over its masked slots, divided by t and by L, the number of all
    slots. logits (B, L, V), ids (B, L) clean, masked (B, L) bool, t (B,).
    """
    scores = without_mask(logits[masked], mask_id)  # (masked slots of all rows, V)
    errors = F.cross_entropy(scores, ids[masked], reduction="none")
    rows = masked.nonzero()[:, 0]
    return errors.new_zeros(len(ids)).index_add(0, rows, errors) / ids.shape[1] / t


def without_mask(logits, mask_id=-1):
    """Copy logits (..., V) to fp32 and give MASK minus infinity, because no clean text holds it."""
    logits = logits.to(torch.float32, copy=True)
    logits[..., mask_id] = -torch.inf
    return logits


@torch.no_grad()
def unmask(logits_fn, ids, steps, order="sampled", uniforms=None, mask_id=-1):
    """Fill the slots of ids (B, L) that hold MASK, in at most steps + 1 forwards -> ids (B, L).

    logits_fn: ids (B, L) -> logits (B, L, V). Slots that hold a token never change. order: "sampled",
    as in the paper's code, fills random slots with tokens drawn from their distributions; "confident"
    fills the slots with the highest probability with their likeliest token, equally many each step.
    uniforms: the draws of "sampled", one (B, L, V) in [0, 1) for each step; default: torch.rand.
    """
    if steps < 1 or order not in ("sampled", "confident"):
        raise ValueError(f"{steps} steps, order {order!r}: at least 1, 'sampled' or 'confident'")
    p = probabilities(logits_fn, ids, mask_id)
    mask_id %= p.shape[-1]
    draws = None if uniforms is None else iter(uniforms)
    current = True  # was p predicted from these ids?
    for i, (t, s) in enumerate(pairwise(torch.linspace(1, 1e-5, steps + 1).tolist())):
        masked = ids == mask_id
        if not masked.any():
            return ids
        if not current:
            p = probabilities(logits_fn, ids, mask_id)
        if order == "confident":
            new = fill_surest(p, masked, steps - i, mask_id)
        else:
            uniform = next(draws) if draws else torch.rand(p.shape)
            new = fill_at_random(p, t, s, uniform.to(p), mask_id)
        filled = torch.where(masked, new, ids)
        current, ids = torch.equal(filled, ids), filled

    masked = ids == mask_id
    if masked.any():  # slots left over get their likeliest token
        p = p if current else probabilities(logits_fn, ids, mask_id)
        ids = torch.where(masked, p.argmax(-1), ids)
    return ids


def probabilities(logits_fn, ids, mask_id):
    """The probabilities (B, L, V) of the vocabulary in every slot; MASK has 0."""
    return without_mask(logits_fn(ids), mask_id).softmax(-1)


def fill_at_random(p, t, s, uniform, mask_id):
    """Go from time t to s: a slot stays MASK with probability s / t, else a token is drawn from p.

    p and uniform (B, L, V) -> ids (B, L). Draws by an exponential race: argmax_k weight_k / -log u_k
    is k with a probability proportional to weight_k.
    """
    weights = p * (t - s)
    weights[..., mask_id] = s
    return (weights / (1e-10 - (uniform + 1e-10).log())).argmax(-1)


def fill_surest(p, masked, steps_left, mask_id):
    """Each row's surest masked slots get their likeliest token, all others MASK: ids (B, L)."""
    confidence, best = p.max(-1)
    count = -(-masked.sum(1, keepdim=True) // steps_left)  # rounded up: none is left in the end
    order = confidence.masked_fill(~masked, -1).argsort(dim=1, descending=True, stable=True)
    return best.where(order.argsort(dim=1) < count, mask_id)
