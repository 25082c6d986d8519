"""Draw the prompts of GenEval (arXiv 2310.11513) for its own scorer.

    torchrun --nproc-per-node 8 -m tools.geneval --metadata evaluation_metadata.jsonl --out pictures

Writes GenEval's folder layout: OUT/00000/metadata.jsonl, samples/0000.png ... and grid.png for each
prompt. The processes of torchrun share the prompts. A second run draws only what is missing.
"""

import json
from pathlib import Path

from support.cli import Parser, UserError, one_line_errors, whole_number
from support.files import grid, make_folder, write_png, write_text
from tools import engines
from tools.engines import add_engine_options, load_engine, read_jsonl, settings_of, shared


def draw(args):
    """Draw every prompt --num times; skip the folders that are complete."""
    records = read_jsonl(args.metadata, "prompt", "tag")
    mine = shared(records, f"{args.out}: prompts")
    make_folder(args.out)
    engine, settings = load_engine(args), settings_of(args)
    names = [f"{k:04d}.png" for k in range(args.num)]
    for i, record in mine:
        prompt, line = record["prompt"], json.dumps(record)
        folder = Path(args.out, f"{i:05d}")
        metadata, samples = folder / "metadata.jsonl", folder / "samples"
        if metadata.is_file() and metadata.read_bytes() != line.encode():
            raise UserError(f"{folder}: holds pictures of another prompt; choose another --out")
        found = sorted(file.name for file in samples.glob("????.png"))
        if len(found) > args.num:
            raise UserError(f"{samples}: holds more than {args.num} pictures; choose another --out")
        about = engines.drawing(args, prompt, args.seed)
        if found == names and (folder / "grid.png").is_file():
            engines.check_drawing(folder / "grid.png", about)
            continue
        images = engine.generate([[prompt]] * args.num, **settings)
        samples.mkdir(parents=True, exist_ok=True)
        write_text(metadata, line)
        for k, image in enumerate(images):
            write_png(samples / names[k], image, about | {"seed": args.seed + k})
        write_png(folder / "grid.png", grid(images), about)  # last: it marks the folder as complete


def main(arguments=None):
    parser = Parser(prog="python -m tools.geneval", description=__doc__.splitlines()[0])
    parser.add_argument("--metadata", required=True, help="evaluation_metadata.jsonl")
    parser.add_argument("--num", type=whole_number(1, 1000), default=4, help="pictures per prompt")
    add_engine_options(parser, "runs/geneval")
    draw(parser.parse_args(arguments))


if __name__ == "__main__":
    with one_line_errors():
        main()
