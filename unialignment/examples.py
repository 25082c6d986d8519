"""Training examples with two texts: a prompt to draw the target from, and a text to read from it.

UniAlignment learns three tasks of a manifest (see `data.py`):

t2i     draws the target from the prompt; reads its "caption", or else the prompt
edit    draws the target from source and instruction; reads its "caption", which is required
answer  reads the answer, given the question; draws the image from the empty prompt
"""

from dataclasses import dataclass

from support.cli import UserError

import numpy as np
import torch

from data import Microbatches, training_example
from lmm import Batch
from prompts import crop_to, to_tensor
from unialignment.masked import mask, stratified_times


@dataclass
class Pairs(Batch):
    """The inputs of both passes. The inherited fields, of text and target, are for the teacher."""

    prompts: torch.Tensor  # (B, L) ids of the text that draws the target
    texts: torch.Tensor  # (B, L) ids of a text about the target
    hidden: torch.Tensor  # (B, L) the same ids with MASK in some slots
    times: torch.Tensor  # (B,) t of the text
    sources: torch.Tensor  # (B, S, 3, H, W) in [-1, 1]: pictures to start from


class PairedMicrobatches(Microbatches):
    """Microbatches whose batches are Pairs. tokens: a `folder.Tokens`."""

    def __init__(self, *args, tokens, **options):
        super().__init__(*args, **options)
        self.tokens = tokens

    def prepare(self, record, size, rng):
        """Turn a record into (task, prompt, target, question or None, text about the target)."""
        if record["task"] == "answer":
            self.tokens.about(record["question"])  # raises UserError if it leaves no slot
            image = crop_to(record["image"], *size)
            return "answer", [], image, record["question"], record["answer"]
        text = record.get("caption", record.get("prompt"))
        if not text:
            raise UserError('an edit needs a "caption" of its target, for UniAlignment to read')
        return *training_example(record, size, rng), None, text

    def batch(self, examples, j):
        rng = np.random.default_rng([self.seed, 1, j])
        rows = [self.tokens.about(question, text) for *_, question, text, _ in examples]
        ids, slots = map(torch.stack, zip(*rows))
        uniform = torch.from_numpy(rng.random((len(ids), 1 + ids.shape[1]), dtype=np.float32))
        times = stratified_times(uniform[:, 0])
        prompts = ["" if null else (prompt or [""])[-1] for _, prompt, *_, null in examples]
        pictures = [to_tensor([target, *prompt[:-1]]) for _, prompt, target, *_ in examples]
        teacher = self.collate([[text, target] for _, _, target, _, text, _ in examples])
        return Pairs(
            **vars(teacher),
            prompts=self.tokens(prompts),
            texts=ids,
            hidden=mask(ids, times, uniform[:, 1:], self.tokens.mask_id, slots),
            times=times,
            sources=torch.stack(pictures)[:, 1:],
        )
