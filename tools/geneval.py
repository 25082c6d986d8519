"""Draw the prompts of GenEval (arXiv 2310.11513) for its own scorer.

    torchrun --nproc-per-node 8 -m tools.geneval --metadata evaluation_metadata.jsonl --out pictures

Writes GenEval's folder layout: OUT/00000/metadata.jsonl, samples/0000.png ... and grid.png for each
prompt. The processes of torchrun share the prompts. A second, equal run draws what is missing.
"""

import json
from functools import partial
from pathlib import Path

from support.cli import Parser, UserError, one_line_errors, whole_number

from support.files import grid, require_writable, write_png, write_text
from tools import engines
from tools.engines import add_engine_options, load_engine, read_jsonl, settings_of


def is_complete(args, i, record):
    """Is everything of prompt i drawn? Raises UserError if its folder was drawn otherwise."""
    folder = Path(args.out, f"{i:05d}")
    metadata, samples = folder / "metadata.jsonl", folder / "samples"
    if metadata.is_file() and metadata.read_bytes() != json.dumps(record).encode():
        raise UserError(f"{folder}: holds pictures of another prompt; choose another --out")
    found = sorted(file.name for file in samples.glob("????.png"))
    if len(found) > args.num:
        raise UserError(f"{samples}: holds more than {args.num} pictures; choose another --out")
    about = engines.drawing(args, record["prompt"], args.seed)
    has_grid = engines.is_drawn(folder / "grid.png", about)
    return has_grid and found == [f"{k:04d}.png" for k in range(args.num)]


def draw(args):
    """Draw every prompt --num times; skip the folders that are complete."""
    records = read_jsonl(args.metadata, "prompt", "tag")
    left = engines.to_draw(records, partial(is_complete, args), f"{args.out}: prompts")
    require_writable(Path(args.out, "grid.png"), "--out")
    engine = load_engine(args)
    for i, record in left:
        prompt, folder = record["prompt"], Path(args.out, f"{i:05d}")
        images = engine.generate([[prompt]] * args.num, **settings_of(args))
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        write_text(folder / "metadata.jsonl", json.dumps(record))
        for k, image in enumerate(images):
            about = engines.drawing(args, prompt, args.seed + k)
            write_png(folder / "samples" / f"{k:04d}.png", image, about)
        about = engines.drawing(args, prompt, args.seed)
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
