"""Numbers for the claims of the paper, in miniature; and GenEval for any weights.

    python evaluate.py            # score the miniature with the exact detector, 300 cases a row
    python evaluate.py claims     # train, score and compare: the paper's claims and open questions

A picture counts only if it is just what was asked. For any weights, on their own kind of pictures:

    python evaluate.py geneval --metadata evaluation_metadata.jsonl --out pictures
    python evaluate.py geneval-summary results.jsonl
    python evaluate.py reconstruct photographs --blend 0.5
"""

import json
import os
import sys
from itertools import chain, islice
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm
from transformers import Qwen2VLForConditionalGeneration

import claims
import sample
import shapes
from cli import Parser, one_line_errors
from data import sheet
from dream_engine import LMM, SD3, STAGE2, DreamEngine
from pretrain import describe_images, grid
from prompts import crop_to, read_image, to_tensor
from scores import CASES, STREAM, bits, controls, draw, interval, judge, share


def score_rows(engine, rows, n, out, **settings):
    """Score rows, each also over held-out pairs: yields (name, {group: {check: bits}}) of each.

    Sheets of the first ten pictures go to out.
    """
    for row in rows:
        for held_out in (False, True):
            name = f"{row}, held-out pairs" if held_out else row
            groups, lines, asked = {}, [], CASES[row](n, STREAM, held_out)
            drawn = iter(draw(engine.generate, chain(*asked.values()), name, **settings))
            for group, cases in asked.items():
                images = list(islice(drawn, len(cases)))
                groups[group] = judge(cases, images) | controls(engine.vae, cases, images)
                lines += [[shapes.render(case.target) for case in cases[:10]], images[:10]]
                if cases[0].source:
                    lines[-2] = [case.source for case in cases[:10]]
            if row == "t2i":
                lines = lines[1::2]  # a prompt has many right pictures
            grid(lines, out / f"{name.replace(', ', '-').replace(' ', '-')}.png")
            yield name, groups


@torch.no_grad()
def score_captions(engine, n):
    """Pictures that the LMM describes without a mistake."""
    lmm = Qwen2VLForConditionalGeneration.from_pretrained(LMM, dtype=torch.float32)
    lmm = lmm.to(engine.device).eval()
    wanted, said = [case.target for case in CASES["copies"](n, STREAM)["copy"]], []
    for i in tqdm(range(0, n, 50), "captions", leave=False):
        said += describe_images(lmm, engine, [shapes.render(s) for s in wanted[i : i + 50]])
    return {"caption": {"exact": bits(t == shapes.describe(s) for t, s in zip(said, wanted))}}


def report(scores):
    """Scores as a Markdown table."""
    head = [
        "",
        "n",
        "score",
        "95 %",
        "true pictures",
        "their VAE copies",
        "other case's",
        "unedited",
    ]
    rows = []
    for row, groups in scores["rows"].items():
        whole = {
            name: "".join(g[name] for g in groups.values()) for name in next(iter(groups.values()))
        }
        for name, checks in {f"**{row}**": whole, **(groups if len(groups) > 1 else {})}.items():
            low, high = interval(checks["exact"])
            line = [
                name,
                len(checks["exact"]),
                f"{share(checks['exact']):.3f}",
                f"{low:.3f} - {high:.3f}",
            ]
            for control in ("renders", "VAE", "shuffled", "unedited"):
                line.append(f"{share(checks[control]):.3f}" if control in checks else "")
            rows.append(line)
    settings = ", ".join(f"{k} {v}" for k, v in scores["settings"].items())
    return f"{claims.table(head, rows)}\n\n({settings})\n"


# ---- any weights, real pictures -----------------------------------------------------------------


def parser_of(what, out):
    """A parser of the options that choose models and how they draw."""
    parser = Parser(prog=f"evaluate.py {what.__name__}", description=what.__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", default=out, help="folder to write to")
    add("--steps", type=int, default=28)
    add("--guidance", type=float, default=4.5)
    add("--size", type=int, help="side of the pictures; default: the model's")
    add("--seed", type=int, default=0)
    add("--sd3", default=SD3, help="SD3 / SD3.5: single file or diffusers folder")
    add("--lmm", default=LMM, help="Qwen2-VL: Hugging Face folder")
    add("--checkpoint", default=STAGE2)
    add("--device")
    return parser


def read_jsonl(file, *names):
    """The lines of a JSONL file, each an object that has these names."""
    records = []
    for number, line in enumerate(Path(file).read_text().splitlines(), 1):
        try:
            records.append(json.loads(line))
            if missing := [name for name in names if name not in records[-1]]:
                raise ValueError(f"no {missing[0]!r}")
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file}:{number}: not a line of this kind of file ({error})"
            ) from None
    if not records:
        raise ValueError(f"{file}: empty")
    return records


def geneval(arguments):
    """Draw the prompts of GenEval (arXiv 2310.11513) into its folder layout, for its own scorer.

    Goes on where it was stopped; under torchrun the processes share the prompts.
    """
    parser = parser_of(geneval, "runs/geneval")
    parser.add_argument(
        "--metadata", required=True, help="the benchmark's evaluation_metadata.jsonl"
    )
    parser.add_argument("--num", type=int, default=4, help="pictures for each prompt")
    args = parser.parse_args(arguments)
    if args.num < 1:
        raise ValueError(f"--num must be at least 1, got {args.num}")
    records = read_jsonl(args.metadata, "prompt", "tag")
    engine = DreamEngine.load(args.sd3, args.lmm, args.checkpoint, args.device)
    size = args.size and (args.size, args.size)
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    for i in tqdm(range(rank, len(records), world), "prompts", disable=rank > 0):
        folder, about = Path(args.out, f"{i:05d}"), json.dumps(records[i])
        note, pictures = folder / "metadata.jsonl", folder / "samples"
        if note.is_file() and note.read_text() != about:
            raise ValueError(f"{folder}: holds pictures of another prompt; choose another --out")
        if (folder / "grid.png").is_file() and len(list(pictures.glob("*.png"))) == args.num:
            continue
        prompts = [[records[i]["prompt"]]] * args.num
        images = engine.generate(prompts, args.steps, args.guidance, size=size, seed=args.seed)
        pictures.mkdir(parents=True, exist_ok=True)
        note.write_text(about)
        facts = {"prompt": records[i]["prompt"], "seed": args.seed}
        for k, image in enumerate(images):
            sample.save(image, pictures / f"{k:04d}.png", facts)
        sample.save(sample.grid(images), folder / "grid.png", facts)  # last: the folder is complete
    if rank == 0:
        print(args.out)


def geneval_summary(arguments):
    """The six scores of GenEval and their mean, from its scorer's results.jsonl."""
    parser = Parser(prog="evaluate.py geneval-summary", description=geneval_summary.__doc__)
    parser.add_argument("results")
    by_tag = {}
    for record in read_jsonl(parser.parse_args(arguments).results, "tag", "correct"):
        by_tag.setdefault(record["tag"], []).append(bool(record["correct"]))
    for tag, flags in by_tag.items():
        print(f"{tag:16} {fmean(flags):.4f}   n = {len(flags)}")
    print(f"{'mean':16} {fmean(map(fmean, by_tag.values())):.4f}")


@torch.no_grad()
def reconstruct(arguments):
    """Copy the pictures of a folder and measure how near the copies are.

    Prints, and writes to metrics.json, the root of the mean squared difference of pixels in [0, 1],
    and the cosine of the LMM's own image features, each the mean over their tokens.
    """
    parser = parser_of(reconstruct, "runs/reconstruct")
    parser.add_argument("folder")
    parser.add_argument("--blend", type=float, default=0.0)
    args = parser.parse_args(arguments)
    folder, out = Path(args.folder), Path(args.out)
    suffixes = {".png", ".jpg", ".jpeg", ".webp"}
    files = sorted(f for f in folder.glob("*") if f.suffix.lower() in suffixes)
    if not files:
        raise FileNotFoundError(f"{folder}: holds no PNG, JPEG or WebP picture")
    engine = DreamEngine.load(args.sd3, args.lmm, args.checkpoint, args.device)
    side = args.size or engine.default_size
    engine.check(args.steps, args.guidance, args.blend, side, side)

    def features(image):
        return engine.lmm_states(engine.collate([[image]]))[1].float().mean(0)

    scores, rows = {}, []
    for file in tqdm(files, "copies"):
        source = crop_to(read_image(file), side, side)
        (copy,) = engine.generate(
            [[source]], args.steps, args.guidance, args.blend, (side, side), args.seed, task="i2i"
        )
        difference = (to_tensor([source]) - to_tensor([copy])) / 2
        cosine = torch.cosine_similarity(features(source), features(copy), dim=0)
        scores[file.name] = {
            "l2": difference.square().mean().sqrt().item(),
            "cosine": cosine.item(),
        }
        if len(rows) < 20:
            text = f"{file.name}: L2 {scores[file.name]['l2']:.4f}, cosine {cosine:.4f}"
            rows.append(([source, copy], text))
    out.mkdir(parents=True, exist_ok=True)
    mean = {k: sum(s[k] for s in scores.values()) / len(scores) for k in ("l2", "cosine")}
    Path(out, "metrics.json").write_text(json.dumps({"mean": mean, **scores}, indent=2) + "\n")
    sheet(rows).save(out / "copies.png")
    print(f"L2 {mean['l2']:.4f}, cosine {mean['cosine']:.4f}, n = {len(scores)}")


COMMANDS = {
    "claims": claims.main,
    "geneval": geneval,
    "geneval-summary": geneval_summary,
    "reconstruct": reconstruct,
}
ROWS = (*CASES, "captions")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    parser = Parser(description="Score the miniature with the exact detector.")
    add = parser.add_argument
    add("rows", nargs="*", metavar="row", help=f"of {', '.join(ROWS)}; default: all")
    add("--num", type=int, default=300, help="cases a row")
    add("--checkpoint", default=STAGE2)
    add("--guidance", type=float, default=4.5)
    add("--blend", type=float, default=0.0, help="r")
    add("--out", default="runs/evaluate", help="folder of scores.json, scores.md and pictures")
    add("--device")
    args = parser.parse_args(arguments)
    if unknown := set(args.rows) - set(ROWS):
        raise ValueError(f"unknown row {unknown.pop()!r}: expected some of {', '.join(ROWS)}")
    if args.num < 6:
        raise ValueError(f"--num must be at least 6, got {args.num}")
    out, rows = Path(args.out), args.rows or ROWS
    out.mkdir(parents=True, exist_ok=True)
    engine = DreamEngine.load(SD3, LMM, args.checkpoint, args.device)
    engine.check(28, args.guidance, args.blend, shapes.SIZE, shapes.SIZE)
    results = {}
    drawn = [row for row in rows if row in CASES]
    for name, groups in score_rows(
        engine, drawn, args.num, out, guidance=args.guidance, r=args.blend
    ):
        results[name] = groups
        print(f"{name:24} {share(''.join(g['exact'] for g in groups.values())):.3f}", flush=True)
    if "captions" in rows:
        results["captions"] = score_captions(engine, args.num)
    settings = {"checkpoint": Path(args.checkpoint).name, "guidance": args.guidance}
    settings |= {"r": args.blend, "steps": 28, "cases and noise from seed": STREAM}
    scores = {"settings": settings, "rows": results}
    claims.write(out / "scores.json", json.dumps(scores, indent=1) + "\n")
    claims.write(out / "scores.md", report(scores))
    print(report(scores))
    return None


if __name__ == "__main__":
    with one_line_errors():
        main()
