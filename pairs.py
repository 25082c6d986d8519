"""How UniAlignment learns: from a prompt that draws a picture and a text about it, for both passes.

A t2i example's caption is both. An edit's instruction and source draw its target, its "caption" is
read there. Of an answer the text is read after its question, and the picture is drawn from nothing.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch

import flow
import masked
from checkpoints import fingerprint
from data import Microbatches
from lmm import Batch, load_lmm
from prompts import centre_crop, to_tensor
from support.cli import UserError
from unialignment import LOSSES, UniAlignment


@dataclass
class Pairs(Batch):
    """What both passes of UniAlignment read, beside what its teacher does: a Batch of text and target."""

    prompts: torch.Tensor  # (B, L) ids: that shall draw the target
    texts: torch.Tensor  # (B, L) ids: a text about the target
    hidden: torch.Tensor  # (B, L) the same with MASK in some slots
    times: torch.Tensor  # (B,) t of the text
    sources: torch.Tensor  # (B, S, 3, H, W) in [-1, 1]: that the prompt starts from


class PairedMicrobatches(Microbatches):
    """Examples as UniAlignment learns them.

    tokens: a `pipeline.Tokens`. in_turn: the microbatches of a step, to give each step one task, in
    turn; 0: tasks by their shares.
    """

    def __init__(self, *args, tokens, in_turn=0, **options):
        super().__init__(*args, **options)
        self.tokens, tasks = tokens, list(dict.fromkeys(pool.task for pool in self.pools))
        rng, count = np.random.default_rng([self.seed, 1]), len(self)
        for k, task in enumerate(tasks if in_turn else ()):
            turn = np.arange(count) // in_turn % len(tasks) == k
            shares = np.array([pool.weight * (pool.task == task) for pool in self.pools])
            self.pool_of[turn] = rng.choice(len(shares), turn.sum(), p=shares / shares.sum())
        self.count_earlier()

    def read(self, record, size, rng):
        """(task, prompt, target, question, text): a prompt that draws the target, a text about it.

        The question is None unless the text answers one; then nothing but the null prompt draws.
        """
        task = record["task"]
        if task == "answer":
            image = centre_crop(record["image"], *size)
            return task, [], image, record["question"], record["answer"]
        target = centre_crop(record["target"], *size)
        if task == "t2i":
            return task, [record["prompt"]], target, None, record["prompt"]
        if not record.get("caption"):
            raise UserError('an edit without a "caption" of its target, which UniAlignment reads')
        prompt = [centre_crop(record["source"], *size), record["instruction"]]
        return task, prompt, target, None, record["caption"]

    def batch(self, examples, j):
        seed = random.Random(f"{self.seed} {j} text").getrandbits(62)
        generator = torch.Generator().manual_seed(seed)
        times = masked.stratified_times(torch.rand(len(examples), generator=generator))
        rows = [self.tokens.about(question, text) for *_, question, text, _ in examples]
        ids, slots = map(torch.stack, zip(*rows))
        uniform = torch.rand(ids.shape, generator=generator)
        prompts = [
            "" if null else "".join(part for part in prompt if isinstance(part, str))
            for _, prompt, *_, null in examples
        ]
        pictures = [[x for x in prompt if not isinstance(x, str)] for _, prompt, *_ in examples]
        sources = [to_tensor(column) for column in zip(*pictures)]
        target = [target for _, _, target, *_ in examples]
        empty = torch.zeros(len(examples), 0, 3, *target[0].size[::-1])
        lmm = self.collate([[text, x] for x, (*_, text, _) in zip(target, examples)])
        return Pairs(
            **vars(lmm),
            prompts=self.tokens(prompts),
            texts=ids,
            hidden=masked.mask(ids, times, uniform, self.tokens.mask_id, slots),
            times=times,
            sources=torch.stack(sources, 1) if sources else empty,
        )


# ---- training -----------------------------------------------------------------------------------


def load_engine(args, device):
    """The engine to start from: a pipeline folder, or SD3 and T5; its MM-DiT in fp32, and its teacher."""
    torch.manual_seed(args.seed)  # of all that SD3 lacks
    if args.checkpoint:
        engine = UniAlignment.load(args.checkpoint, device=device)
        engine.mmdit.float()
    else:
        size = {"size": args.size or 512, "slots": args.slots}
        engine = UniAlignment.start(args.sd3, args.text_encoder, device, **size)
    engine.mmdit.checkpointing = args.checkpointing
    engine.weights = [(LOSSES | (args.weights or {}))[name] for name in LOSSES]
    dtype = torch.float32 if engine.device.type == "cpu" else torch.bfloat16
    engine.lmm = load_lmm(args.lmm, engine.device, dtype)
    engine.base = {
        "base": fingerprint(engine.mmdit.final_layer.linear.weight),
        "lmm": fingerprint(engine.lmm.language_model.norm.weight),
    }
    return engine


def draw(micro, channels, generator):
    """What `UniAlignment.forward` asks of chance: noise (B, 2 + S, C, H/8, W/8), t (B,), times (B,)."""
    n, _, height, width = micro.target.shape
    shape = n, 2 + micro.batch.sources.shape[1], channels, height // 8, width // 8
    t = (1000 * flow.training_sigmas(n, 1.0, generator)).ceil() / 1000  # unshifted, as published
    return torch.randn(shape, generator=generator), t.clamp(max=0.999), micro.batch.times


def parse(args, text_encoder, slots):
    """Options that depend on others; raises UserError where they do not go together."""
    args.loss = args.loss or "x0"
    for name in ("rank", "alpha", "lmm_lora", "blend", "mlp_dim", "shard"):
        if getattr(args, name):
            raise UserError(
                f"--{name.replace('_', '-')} belongs to stages 1 and 2: all learns here"
            )
    if unknown := (args.tasks or {}).keys() - {"t2i", "edit", "answer"}:
        raise UserError(
            f"--tasks: UniAlignment does not learn {min(unknown)}: t2i, edit and answer"
        )
    if args.checkpoint and (args.text_encoder or args.slots):
        raise UserError("--text-encoder and --slots: the folder of --checkpoint has them already")
    args.slots = args.slots or slots
    args.text_encoder = args.text_encoder or text_encoder
