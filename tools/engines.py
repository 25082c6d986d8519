"""Options, loading of an engine, and JSONL reading for geneval, semgen and reconstruct."""

import json
import os

from tqdm import tqdm

from data import LONGEST_LINE
from dream_engine import LMM, SD3, STAGE2, DreamEngine
from support.cli import UserError, number, reading, whole_number
from unialignment import UniAlignment
from unialignment.model import MINI

ENGINES = "dream-engine", "unialignment"


def add_engine_options(parser, out, engines=ENGINES):
    """Add the options that choose models and how they draw; out: the default of --out."""
    add = parser.add_argument
    add("--out", default=out, help="folder to write to")
    add("--engine", choices=engines, default=engines[0])
    add("--steps", type=whole_number(1, 10_000), help="Euler steps")
    add("--guidance", type=number(-1000, 1000), help="default: the checkpoint's own")
    add("--size", type=whole_number(16, 16_384), help="side of the pictures; default: the model's")
    add("--seed", type=whole_number(0, 2**63 - 1), default=0, help="of the noise; default: 0")
    add("--sd3", help="SD3 / SD3.5: single file or diffusers folder")
    add("--lmm", default=LMM, help="Qwen2-VL: Hugging Face folder (dream-engine only)")
    add("--checkpoint", help="trained weights of the engine; default: the miniature's")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")


def load_engine(args):
    """Load the engine that --engine names; raises UserError or FileNotFoundError."""
    if args.engine == "unialignment":
        return UniAlignment.load(args.checkpoint or MINI, args.sd3, args.device)
    return DreamEngine.load(args.sd3 or SD3, args.lmm, args.checkpoint or STAGE2, args.device)


def settings_of(args):
    """The options of `generate` that were given."""
    settings = {name: getattr(args, name) for name in ("steps", "guidance", "seed")}
    settings["size"] = args.size and (args.size, args.size)
    return {name: value for name, value in settings.items() if value is not None}


def read_jsonl(file, *names):
    """The objects of a JSONL file; UserError, with the line, if a field of names holds no text."""
    records, expected = [], f"a JSON object with text in the fields {', '.join(names)}"
    with open(file, "rb") as stream:
        for n, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE), b""), 1):
            with reading(f"{file}:{n}", expected):
                if not (text := line.decode("utf-8-sig").strip()):
                    continue
                records.append(json.loads(text))
                if not all(records[-1][name].strip().encode() for name in names):
                    raise ValueError("a field is blank")
    if not records:
        raise UserError(f"{file}: holds no records; expected one JSON object a line")
    return records


def shared(records, title):
    """Yield the (number, record) pairs that this process of torchrun draws, with a progress bar."""
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    for i in tqdm(range(rank, len(records), world), title, disable=rank > 0):
        yield i, records[i]
