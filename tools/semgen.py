"""Draw the prompts and edits of SemGen-Bench (UniAlignment, arXiv 2509.23760) for its own scorer.

    python -m tools.semgen --bench semgen_bench.jsonl --engine unialignment --out pictures

Writes OUT/fullset/GROUP/n.png for row n, from 0, in four groups, and n_SRCIMG.png, the source image
of an edit. Steps and guidance are the published script's. The processes of torchrun share the rows.
A second run with the same options draws only what is missing.
"""

from pathlib import Path

from support.cli import Parser, one_line_errors

from PIL import Image

from prompts import read_image
from support.files import require_writable, write_png
from tools import engines
from tools.engines import add_engine_options, load_engine, read_jsonl, settings_of

GUIDANCE = {"t2i_long": 7.0, "t2i_complex": 7.0, "edit_multi": 9.0, "edit_complex": 9.0}
STEPS = 50


def find_picture(bench, path):
    """Find a row's picture: at path, or by name in images/, as paths are from the authors' disk."""
    places = bench.parent / path, Path(path), bench.parent / "images" / Path(path).name
    if not (found := [place for place in places if place.is_file()]):
        raise FileNotFoundError(f"{bench}: expected the picture at {path} or at {places[-1]}")
    return found[0]


def draw(args):
    """Draw each row in every group; skip the pictures that exist."""
    bench, out = Path(args.bench), Path(args.out, "fullset")
    rows = read_jsonl(bench, "image_path", *GUIDANCE)
    pictures = [find_picture(bench, row["image_path"]) for row in rows]

    def is_complete(n, row):
        about = {group: engines.drawing(args, row[group], args.seed) for group in GUIDANCE}
        drawn = [engines.is_drawn(out / g / f"{n}.png", about[g]) for g in GUIDANCE]
        return all(drawn)

    left = engines.to_draw(rows, is_complete, f"{out}: rows")
    require_writable(out / "0.png", "--out")
    engine, is_uni = load_engine(args), args.engine == "unialignment"
    side = args.size or engine.default_size
    settings = {"steps": STEPS} | settings_of(args) | {"size": (side, side)}
    for n, row in left:
        source = read_image(pictures[n]).resize((side, side), Image.BICUBIC)  # not cropped
        for group, guidance in GUIDANCE.items():
            file, text, is_edit = out / group / f"{n}.png", row[group], group.startswith("edit")
            if file.is_file():
                continue
            options = {"guidance": guidance} if is_uni else {"task": "edit" if is_edit else "t2i"}
            prompt = [source, text] if is_edit else [text]
            (image,) = engine.generate([prompt], **options | settings)
            file.parent.mkdir(parents=True, exist_ok=True)
            if is_edit:
                write_png(file.with_stem(f"{n}_SRCIMG"), source)
            about = engines.drawing(args, text, args.seed)
            write_png(file, image, about)  # last: it marks completion


def main(arguments=None):
    parser = Parser(prog="python -m tools.semgen", description=__doc__.splitlines()[0])
    parser.add_argument("--bench", required=True, help="semgen_bench.jsonl")
    add_engine_options(parser, "runs/semgen")
    draw(parser.parse_args(arguments))


if __name__ == "__main__":
    with one_line_errors():
        main()
