"""Options, loading of an engine, and JSONL reading for geneval, semgen and reconstruct."""

import json
import warnings

from support.cli import UserError, number, reading, whole_number

from PIL import Image
from tqdm import tqdm

from dream_engine import LMM, SD3, STAGE2, DreamEngine
from support.files import read_lines
from support.processes import rank_and_world
from unialignment import UniAlignment
from unialignment.model import MINI

ENGINES = "dream-engine", "unialignment"
OPTIONS = "engine", "checkpoint", "sd3", "lmm", "steps", "guidance", "size"  # part of a drawing


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
    add("--lmm", help="Qwen2-VL: Hugging Face folder (dream-engine only)")
    add("--checkpoint", help="trained weights of the engine; default: the miniature's")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")


def load_engine(args):
    """The engine of --engine, with the chosen models; raises UserError or FileNotFoundError."""
    if args.engine == "dream-engine":
        sd3, lmm, checkpoint = args.sd3 or SD3, args.lmm or LMM, args.checkpoint or STAGE2
        return DreamEngine.load(sd3, lmm, checkpoint, args.device)
    if args.lmm:
        raise UserError("--lmm is of --engine dream-engine: UniAlignment draws without an LMM")
    return UniAlignment.load(args.checkpoint or MINI, args.sd3, args.device)


def settings_of(args):
    """The options of `generate` that were given."""
    settings = {name: getattr(args, name) for name in ("steps", "guidance", "seed")}
    settings["size"] = args.size and (args.size, args.size)
    return {name: value for name, value in settings.items() if value is not None}


def drawing(args, prompt, seed):
    """The text fields of a PNG: its prompt, its seed, and the options that were given."""
    given = {name: value for name in OPTIONS if (value := vars(args)[name]) is not None}
    given = {name: ascii(str(value))[1:-1] for name, value in given.items()}  # of any path
    return {"prompt": prompt, "seed": str(seed)} | given


def is_drawn(file, wanted):
    """Is a PNG there? Raises UserError unless its text fields are those of `drawing`."""
    if not file.is_file():
        return False
    strict = warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning)
    with reading(file, "a PNG of this program"), strict, Image.open(file, formats=["PNG"]) as image:
        found = image.info
    for name in ("engine", "prompt", "seed", *OPTIONS):
        old, new = (f"--{name} {x[name]}" if name in x else f"no --{name}" for x in (found, wanted))
        if old != new:
            drawn = "shows another prompt" if name == "prompt" else f"drawn with {old}, not {new}"
            raise UserError(f"{file}: {drawn}; choose another --out")
    return True


def read_jsonl(file, *names):
    """The objects of a JSONL file; UserError, with the line, if a field of names holds no text."""
    records, expected = [], f"a JSON object with text in the fields {', '.join(names)}"
    for n, line in read_lines(file):
        with reading(f"{file}:{n}", expected):
            if not (text := line.decode("utf-8-sig").strip()):
                continue
            records.append(json.loads(text))
            if not all(records[-1][name].strip().encode() for name in names):
                raise ValueError("a field is blank")
    if not records:
        raise UserError(f"{file}: holds no records; expected one JSON object a line")
    return records


def to_draw(records, is_complete, title):
    """The (number, record) pairs that this process of torchrun has to draw, with a progress bar.

    is_complete(number, record) says whether an earlier run drew all of a record.
    """
    rank, world = rank_and_world()
    mine = [(i, records[i]) for i in range(rank, len(records), world)]
    left = [pair for pair in mine if not is_complete(*pair)]

    def with_bar():  # shown as late as the first picture
        yield from tqdm(left, title, disable=rank > 0)

    return with_bar()
