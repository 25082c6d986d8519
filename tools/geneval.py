"""GenEval (arXiv 2310.11513) for any weights: draw its prompts, for its own scorer to look at.

    torchrun --nproc-per-node 8 -m tools.geneval --metadata evaluation_metadata.jsonl --out pictures

Goes on where it was stopped; the processes of torchrun share the prompts.
"""

import json
import os
from pathlib import Path

from tqdm import tqdm

from data import LONGEST_LINE
from dream_engine import LMM, SD3, STAGE2, DreamEngine
from support.cli import Parser, UserError, number, one_line_errors, reading, whole_number
from support.files import grid, write_png, write_text
from unialignment.model import MINI, UniAlignment

ENGINES = "dream-engine", "unialignment"


def add_engine_options(parser, out, engines=ENGINES):
    """The options that choose models and how they draw; out: the default of --out."""
    add = parser.add_argument
    add("--out", default=out, help="folder to write to")
    add("--engine", choices=engines, default=engines[0])
    add("--steps", type=whole_number(1, 10_000), help="of Euler")
    add("--guidance", type=number(-1000, 1000), help="default: the checkpoint's own")
    add("--size", type=whole_number(16, 16_384), help="side of the pictures; default: the model's")
    add("--seed", type=whole_number(0, 2**63 - 1), default=0)
    add("--sd3", default=SD3, help="SD3 / SD3.5: single file or diffusers folder")
    add("--lmm", default=LMM, help="Qwen2-VL: Hugging Face folder")
    add("--checkpoint", default=STAGE2)
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")


def load_engine(args):
    if args.engine == "unialignment":
        sd3, folder = (None if x in (SD3, STAGE2) else x for x in (args.sd3, args.checkpoint))
        return UniAlignment.load(folder or MINI, sd3, args.device)
    return DreamEngine.load(args.sd3, args.lmm, args.checkpoint, args.device)


def settings_of(args):
    """The options of `generate`, as far as they were given."""
    size = args.size and (args.size, args.size)
    settings = {"steps": args.steps, "guidance": args.guidance, "size": size, "seed": args.seed}
    return {name: value for name, value in settings.items() if value is not None}


def read_jsonl(file, *names):
    """The records of a JSONL file, each an object that has a text of every name, none blank."""
    records, expected = [], f"a JSON object with the texts {', '.join(names)}"
    with open(file, "rb") as stream:
        for n, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE), b""), 1):
            with reading(f"{file}:{n}", expected):
                if not (text := line.decode("utf-8-sig").strip()):
                    continue
                records.append(json.loads(text))
                if not all(records[-1][name].strip().encode() for name in names):
                    raise ValueError("a text is blank")
    if not records:
        raise UserError(f"{file}: empty")
    return records


def shared(records, name):
    """(number, record) of those that this process of torchrun draws, with a progress bar."""
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    for i in tqdm(range(rank, len(records), world), name, disable=rank > 0):
        yield i, records[i]


def draw(args):
    """Draw GenEval's prompts into its folder layout."""
    records = read_jsonl(args.metadata, "prompt", "tag")
    engine, settings = load_engine(args), settings_of(args)
    names = [f"{k:04d}.png" for k in range(args.num)]
    for i, record in shared(records, f"{args.out}: prompts"):
        prompt, line = record["prompt"], json.dumps(record)
        folder = Path(args.out, f"{i:05d}")
        metadata, pictures = folder / "metadata.jsonl", folder / "samples"
        if metadata.is_file() and metadata.read_bytes() != line.encode():
            raise UserError(f"{folder}: holds pictures of another prompt; choose another --out")
        found = sorted(file.name for file in pictures.glob("????.png"))
        if len(found) > args.num:
            raise UserError(f"{pictures}: holds {len(found)} pictures, more than --num {args.num}")
        if found == names and (folder / "grid.png").is_file():
            continue
        images = engine.generate([[prompt]] * args.num, **settings)
        pictures.mkdir(parents=True, exist_ok=True)
        write_text(metadata, line)
        for k, image in enumerate(images):
            write_png(pictures / names[k], image, {"prompt": prompt, "seed": args.seed + k})
        write_png(folder / "grid.png", grid(images))  # last: now the folder is complete


def main(arguments=None):
    parser = Parser(prog="python -m tools.geneval", description=__doc__.splitlines()[0])
    parser.add_argument("--metadata", required=True, help="evaluation_metadata.jsonl")
    parser.add_argument("--num", type=whole_number(1, 1000), default=4, help="of each prompt")
    add_engine_options(parser, "runs/geneval")
    draw(parser.parse_args(arguments))


if __name__ == "__main__":
    with one_line_errors():
        main()
