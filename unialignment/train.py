"""Train UniAlignment: the whole MM-DiT learns to draw, edit, perceive and read.

    python -m unialignment.train
    torchrun --nproc-per-node 8 -m unialignment.train --data pairs.jsonl --sd3 ... --lmm ...

Without --data the miniature trains on rendered scenes. T5, VAE and the teacher (Qwen2-VL) stay frozen.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

if not __package__:
    sys.exit("error: start this program as python -m unialignment.train")

from support.cli import Parser, one_line_errors, whole_number

import torch

import train
from dream_engine import MINI, SD3
from lmm import load_lmm
from support.fast import device_and_dtype
from support.options import add_options, complete, refuse, shares
from unialignment.examples import PairedMicrobatches
from unialignment.model import LOSSES, UniAlignment

RECIPE = train.Recipe("unialignment", {"t2i": 1, "edit": 1}, 10000, 1.2e-3, "transformer")


def load_engine(args, device):
    """Load the UniAlignment to start from, with its MM-DiT in fp32, and the teacher."""
    torch.manual_seed(args.seed)  # of new parameters
    if args.checkpoint:
        sd3 = None if args.sd3 == SD3 else args.sd3
        engine = UniAlignment.load(args.checkpoint, sd3, device, torch.float32)
        engine.text_encoder.to(device_and_dtype(device)[1])
        engine.sampling = replace(engine.sampling, size=args.size or engine.default_size)
    else:
        texts = {"slots": args.slots, "size": args.size or 512, "sentence": args.sentence}
        engine = UniAlignment.start(args.sd3, args.text_encoder, device, **texts)
    engine.weights, engine.lmm = args.weights, load_lmm(args.lmm, *device_and_dtype(device))
    engine.lmm_states = args.lmm_states
    engine.start_training()
    engine.mmdit.checkpointing = args.checkpointing
    return engine


def load_data(args, recipe, engine, sources, world):
    """Like `train.load_data`, with PairedMicrobatches. Without --tasks, tasks alternate by step."""
    turn = 0 if args.tasks else args.accumulate * world
    more = {"kind": PairedMicrobatches, "tokens": engine.tokens, "turn": turn}
    return train.load_data(args, recipe, engine, sources, world, **more)


def options():
    parser = Parser(prog="python -m unialignment.train", description=__doc__.splitlines()[0])
    parser.set_defaults(stage=RECIPE.name, shard=False)
    losses = partial(shares, names=LOSSES, example="text=1,isa=0, the losses")
    add = parser.add_argument
    # fmt: off
    add("--checkpoint", type=Path, help="pipeline folder to start from; default: start from SD3")
    add("--loss", choices=("velocity", "x0"), default="x0", help="x0: the published weighting, t^2")
    add("--weights", type=losses, default={}, help="of losses; default: velocity=1,text=0.2,csa=0.05,isa=0.1")
    add("--lmm-states", action="store_true", help="ISA: compare texts with the LMM's states")
    add("--text-encoder", type=Path, help="SD3's T5; default: the one in --sd3, or the miniature's")
    add("--slots", type=whole_number(2, 512), help="of each text; default: 256, for the miniature 42")
    add("--sentence", help="before each caption; default: none, for the miniature 'Describe the image.'")
    # fmt: on
    add_options(parser)
    return parser


def parse(arguments=None):
    args = options().parse_args(arguments)
    miniature = args.sd3 == SD3 and not (args.checkpoint and args.data)
    texts, single = args.text_encoder or args.slots or args.sentence, args.sd3.is_file()
    no_t5 = single and not (args.checkpoint or miniature or args.text_encoder)
    both = "--text-encoder, --slots, --sentence: --checkpoint has its own"
    refuse(
        (no_t5, f"--text-encoder is missing: {args.sd3} holds no T5"),
        (args.checkpoint and texts, both),
    )
    t5, slots, sentence = args.sd3 / "text_encoder_3", 256, ""
    if miniature:
        t5, slots, sentence = MINI / "t5-mini", 42, "Describe the image."
    args.text_encoder, args.slots = args.text_encoder or t5, args.slots or slots
    args.sentence = sentence if args.sentence is None else args.sentence
    args.weights = LOSSES | args.weights
    return complete(args, RECIPE, {"t2i", "edit", "answer"}, miniature, rate=3e-5)


def main(arguments=None):
    train.run(parse(arguments), RECIPE, load_engine, load_data, perception=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
