"""Copy every picture of a folder, and measure how similar the copies are.

    python -m tools.reconstruct photographs --blend 0.5

Prints the mean L2 and cosine, and writes OUT/metrics.json and OUT/copies.png. L2 is the root mean
squared difference of pixels in [0, 1]. Cosine compares the ViT features, averaged over tokens.
"""

from pathlib import Path
from statistics import fmean

from support.cli import Parser, number, one_line_errors

import torch
from tqdm import tqdm

from prompts import crop_to, read_image, to_tensor
from support.files import require_writable, sheet, write_json, write_png
from tools.engines import ENGINES, add_engine_options, load_engine, settings_of

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
SHOWN = 20  # pictures on the sheet


def compare(lmm, source, copy):
    """{"l2": ..., "cosine": ...} of two PIL images of one size."""
    difference = (to_tensor([source]) - to_tensor([copy])) / 2
    features = [lmm(lmm.collate([[image]]))[1].float().mean(0) for image in (source, copy)]
    cosine = torch.cosine_similarity(*features, dim=0)
    return {"l2": difference.square().mean().sqrt().item(), "cosine": cosine.item()}


@torch.no_grad()
def main(arguments=None):
    parser = Parser(prog="python -m tools.reconstruct", description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder of PNG, JPEG or WebP pictures")
    parser.add_argument("--blend", type=number(0, 1), default=0.0, help="r: LMM (0) to ViT (1)")
    add_engine_options(parser, "runs/reconstruct", ENGINES[:1])
    args = parser.parse_args(arguments)
    files = sorted(f for f in Path(args.folder).glob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"{args.folder}: expected a folder of PNG, JPEG or WebP pictures")
    require_writable(Path(args.out, "copies.png"), "--out")
    engine, out, scores, rows = load_engine(args), Path(args.out), {}, []
    side = args.size or engine.default_size
    options = settings_of(args) | {"size": (side, side), "r": args.blend, "task": "i2i"}
    for file in tqdm(files, "copies"):
        source = crop_to(read_image(file), side, side)
        (copy,) = engine.generate([[source]], **options)
        score = scores[file.name] = compare(engine.lmm, source, copy)
        text = f"{file.name}: L2 {score['l2']:.4f}, cosine {score['cosine']:.4f}"
        rows += [([source, copy], text)] if len(rows) < SHOWN else []
    mean = {k: fmean(score[k] for score in scores.values()) for k in ("l2", "cosine")}
    write_json(out / "metrics.json", {"mean": mean, **scores})
    write_png(out / "copies.png", sheet(rows, 128))
    print(f"L2 {mean['l2']:.4f}, cosine {mean['cosine']:.4f}, n = {len(scores)}")


if __name__ == "__main__":
    with one_line_errors():
        main()
