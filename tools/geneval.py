"""GenEval (arXiv 2310.11513) for any weights: draw its prompts, and sum up what its scorer found.

    python -m tools.geneval draw --metadata evaluation_metadata.jsonl --out pictures
    python -m tools.geneval summary results.jsonl

Between the two runs the benchmark's own scorer, on the folder of pictures.
"""

import json
import os
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from data import LONGEST_LINE
from dream_engine import LMM, SD3, STAGE2, DreamEngine
from support.cli import Parser, UserError, number, one_line_errors, reading, whole_number
from support.files import grid, write_png, write_text
from unialignment import MINI, UniAlignment


def add_engine_options(parser, out):
    """The options that choose models and how they draw; out: the default of --out."""
    add = parser.add_argument
    add("--out", default=out, help="folder to write to")
    add("--steps", type=whole_number(1, 10_000), default=28)
    add("--guidance", type=number(-1000, 1000), help="default: the checkpoint's own")
    add("--size", type=whole_number(16, 16_384), help="side of the pictures; default: the model's")
    add("--seed", type=whole_number(0, 2**63 - 1), default=0)
    add("--sd3", default=SD3, help="SD3 / SD3.5: single file or diffusers folder")
    add("--lmm", default=LMM, help="Qwen2-VL: Hugging Face folder")
    add("--checkpoint", default=STAGE2)
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")


def load_engine(args):
    if getattr(args, "engine", None) == "unialignment":
        sd3, folder = (None if x in (SD3, STAGE2) else x for x in (args.sd3, args.checkpoint))
        return UniAlignment.load(folder or MINI, sd3, args.device)
    return DreamEngine.load(args.sd3, args.lmm, args.checkpoint, args.device)


def read_jsonl(file, **fields):
    """The records of a JSONL file, each an object with these fields: name=type; no text is blank."""
    names = ", ".join(f"{name} ({kind.__name__})" for name, kind in fields.items())
    records = []
    with open(file, "rb") as stream:
        for n, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE), b""), 1):
            with reading(f"{file}:{n}", f"a JSON object with {names}"):
                text = line.decode("utf-8-sig")
                if not text.strip():
                    continue
                records.append(json.loads(text))
                for name, kind in fields.items():
                    value = records[-1][name]
                    if not isinstance(value, kind) or not str(value).strip():
                        raise TypeError(f"{name} is {value!r}")
                    str(value).encode()  # refuses half a surrogate pair
    if not records:
        raise UserError(f"{file}: empty")
    return records


def draw(args):
    """Draw GenEval's prompts into its folder layout.

    Goes on where it was stopped; under torchrun the processes share the prompts.
    """
    records = read_jsonl(args.metadata, prompt=str, tag=str)
    engine = load_engine(args)
    settings = {"steps": args.steps, "guidance": args.guidance}
    settings = {name: value for name, value in settings.items() if value is not None}
    size = args.size and (args.size, args.size)
    names = [f"{k:04d}.png" for k in range(args.num)]
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    for i in tqdm(range(rank, len(records), world), "prompts", disable=rank > 0):
        prompt, line = records[i]["prompt"], json.dumps(records[i])
        folder = Path(args.out, f"{i:05d}")
        metadata, pictures = folder / "metadata.jsonl", folder / "samples"
        if metadata.is_file() and metadata.read_bytes() != line.encode():
            raise UserError(f"{folder}: holds pictures of another prompt; choose another --out")
        found = sorted(file.name for file in pictures.glob("????.png"))
        if len(found) > args.num:
            raise UserError(f"{pictures}: holds {len(found)} pictures, more than --num {args.num}")
        if found == names and (folder / "grid.png").is_file():
            continue
        images = engine.generate([[prompt]] * args.num, **settings, size=size, seed=args.seed)
        pictures.mkdir(parents=True, exist_ok=True)
        write_text(metadata, line)
        for k, image in enumerate(images):
            about = {"prompt": prompt, "seed": args.seed + k}
            write_png(pictures / names[k], image, about)
        write_png(folder / "grid.png", grid(images))  # last: now the folder is complete
    if rank == 0:
        print(args.out)


def summary(args):
    """Print the six scores of GenEval and their mean, from its scorer's results.jsonl."""
    by_tag = {}
    for record in read_jsonl(args.results, tag=str, correct=bool):
        by_tag.setdefault(record["tag"], []).append(record["correct"])
    for tag, correct in by_tag.items():
        print(f"{tag:16} {fmean(correct):.4f}   n = {len(correct)}")
    print(f"{'mean':16} {fmean(map(fmean, by_tag.values())):.4f}")


def main(arguments=None):
    parser = Parser(prog="python -m tools.geneval", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    for run in (draw, summary):
        about = run.__doc__.splitlines()[0]
        command = commands.add_parser(run.__name__, help=about, description=about)
        command.set_defaults(run=run)
        if run is summary:
            command.add_argument("results", help="results.jsonl, as the scorer wrote it")
            continue
        command.add_argument("--metadata", required=True, help="evaluation_metadata.jsonl")
        command.add_argument("--num", type=whole_number(1, 1000), default=4, help="of each prompt")
        engines = ("dream-engine", "unialignment")
        command.add_argument("--engine", choices=engines, default=engines[0])
        add_engine_options(command, "runs/geneval")
        command.set_defaults(steps=None, guidance=None)  # the engine's own
    args = parser.parse_args(arguments)
    args.run(args)


if __name__ == "__main__":
    with one_line_errors():
        main()
