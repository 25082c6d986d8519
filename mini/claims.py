"""The paper's claims and open questions, answered by many short trainings of the miniature.

    python -m mini.claims                  # all of them, or only some: adapter rank

Each run is trained with three seeds or five, scored on cases of that seed, and kept in
--out/NAME-SEED, so that an interrupted command goes on where it was.
"""

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from checkpoints import read_json
from dream_engine import LMM, SD3, DreamEngine
from mini.cases import RATIOS, STREAM, difference, draw, judge, odd_cases, score, share
from support.cli import Parser, UserError, one_line_errors, reading
from support.files import grid, prompt_row, sheet, table, write_json, write_png, write_text
from support.runs import plot

TRAIN = Path(__file__).parent.parent / "train.py"
GUIDANCE = 2.0  # of short trainings, which say none

# ---- what is trained ----------------------------------------------------------------------------

ALIGN = "--stage 1 --steps 1000 --batch 16"
TUNE = "--stage 2 --steps 500 --batch 16"
BOTH = "{out}/both-{seed}"

RUNS = {  # by name: flags of train.py
    "both": ALIGN,
    "t2i alone": f"{ALIGN} --tasks t2i=1",
    "t2i alone, 3000 steps": f"{ALIGN} --tasks t2i=1 --steps 3000",
    "i2i alone": f"{ALIGN} --tasks i2i=1",
    "r = 0": f"{ALIGN} --blend 0",
    "1 layer": f"{ALIGN} --layers 1",
    "2 layers of 128": f"{ALIGN} --mlp-dim 128",
    "3 layers of 128": f"{ALIGN} --mlp-dim 128 --layers 3",
    "3 layers of 512": f"{ALIGN} --layers 3",
    "random LMM": f"{ALIGN} --lmm {{out}}/untrained-{{seed}}",
    "LoRA of rank 16": TUNE,
    "LoRA of rank 4": f"{TUNE} --rank 4",
    "LoRA of rank 1": f"{TUNE} --rank 1",
    "adapter alone": f"{TUNE} --rank 0",
    "LoRA on the LMM": f"{TUNE} --lmm-lora",
    "stage 2 at r = 0": f"{TUNE} --blend 0",
    "both, then stage 2": f"{TUNE} --checkpoint {BOTH}",
    "stage 2 from scratch": f"{TUNE} --steps 1500 --checkpoint none",
}
ROWS = {  # by stage: what a run is scored on, cases for each seed
    1: {"t2i": 120, "copies": 100},
    2: {"t2i": 60, "copies": 50, "edits": 100, "objects": 100, "mixing": 60},
}
AT_R1 = ("both", "r = 0", "LoRA of rank 16", "stage 2 at r = 0")  # scored at r = 1, too


# ---- what is asked ------------------------------------------------------------------------------

# Is run `second`, B, better than run `first`, A? By these rows, separated by commas.
Comparison = namedtuple("Comparison", "claim question first second rows seeds", defaults=[3])
STAGE1_ROWS, STAGE2_ROWS = "t2i, copies", "edits, objects, copies, t2i"
COMPARISONS = [Comparison(*fields) for fields in (
    ("joint", "Does copying help text -> image?", "t2i alone", "both", "t2i", 5),
    ("joint", "Does text -> image help copying?", "i2i alone", "both", "copies"),
    ("joint", "Is copying zero-shot?", "t2i alone, 3000 steps", "both", "copies, t2i"),
    ("blend", "Is r at random better than r = 0?", "r = 0", "both", "t2i, copies, copies at r = 1"),
    ("blend", "The same in stage 2", "stage 2 at r = 0", "LoRA of rank 16",
     "edits, objects, mixing, edits at r = 1, objects at r = 1"),
    ("adapter", "Are two layers better than one?", "1 layer", "both", STAGE1_ROWS),
    ("adapter", "Are three better than two?", "both", "3 layers of 512", STAGE1_ROWS),
    ("adapter", "512 hidden units or 128?", "2 layers of 128", "both", STAGE1_ROWS),
    ("adapter", "The same with three layers", "3 layers of 128", "3 layers of 512", STAGE1_ROWS),
    ("lmm", "Does it matter what the LMM has learnt?", "random LMM", "both", STAGE1_ROWS),
    ("rank", "LoRA, or the adapter alone?", "adapter alone", "LoRA of rank 16", STAGE2_ROWS),
    ("rank", "Rank 16 or 4?", "LoRA of rank 4", "LoRA of rank 16", STAGE2_ROWS),
    ("rank", "Rank 4 or 1?", "LoRA of rank 1", "LoRA of rank 4", STAGE2_ROWS),
    ("stages", "Stage 2 from stage 1, or all in one?", "stage 2 from scratch", "both, then stage 2",
     STAGE2_ROWS),
    ("lmm-lora", "LoRA on the LMM, too?", "LoRA of rank 16", "LoRA on the LMM", STAGE2_ROWS),
)]  # fmt: skip


def run(name, seed, out):
    """Train and score a run, or what is missing of that -> {row: {check: bits}}."""
    folder = out / f"{name.replace(' ', '-')}-{seed}"
    result = folder / "scores.json"
    if result.is_file():
        return read_json(result)
    flags = [flag.format(out=out, seed=seed) for flag in RUNS[name].split()]
    lmm = flags[flags.index("--lmm") + 1] if "--lmm" in flags else LMM
    if not Path(lmm, "config.json").is_file():
        random_lmm(lmm, seed)
    if BOTH in RUNS[name]:
        run("both", seed, out)
    command = [sys.executable, str(TRAIN), *flags, "--out", str(folder), "--seed", str(seed)]
    command += ["--resume", "--keep", "1", "--sample-every", "0"]
    if code := subprocess.run(command, check=False).returncode:
        raise UserError(f"{name}, seed {seed}: its training ended with code {code}")
    engine, scores = DreamEngine.load(SD3, lmm, folder), {}
    rows = dict(ROWS[int(flags[1])])
    if name in AT_R1:  # without pictures nothing is blended
        rows |= {f"{row} at r = 1": n for row, n in rows.items() if row != "t2i"}
    for row, n in rows.items():
        settings = {"guidance": GUIDANCE, "r": float(row.endswith(" at r = 1"))}
        cases = row.removesuffix(" at r = 1"), n, f"claims {seed}"
        scores[row] = score(engine.generate, *cases, f"{name}, {row}", **settings)
    write_json(result, scores)
    shutil.rmtree(folder / "checkpoints")  # what was learned lies beside it
    return scores


def random_lmm(folder, seed):
    """Write an LMM like the miniature's that has learned nothing."""
    torch.manual_seed(seed)
    partial = Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(LMM, partial)
    Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(LMM)).save_pretrained(partial)
    os.replace(partial, folder)


# ---- what is asked of the committed weights -----------------------------------------------------


def blend_curve(engine, _, n=200):
    """{row: {r: {check: bits}}}, all of the same cases."""

    def at(row, r):
        return score(engine.generate, row, n, STREAM, f"{row}, r = {r}", r=r)

    rows = ("copies", "edits", "objects", "mixing")
    return {row: {str(r): at(row, r) for r in RATIOS} for row in rows}


def draw_curve(curve):
    """Each row as a plot over r: the exact score, what was kept, what was followed."""
    panels = []
    for row, by_r in curve.items():
        names = [name for name in ("exact", "kept", "followed") if name in by_r["0.0"]]
        lines = {name: [share(at[name]) for at in by_r.values()] for name in names}
        panels.append(plot(lines, f"{row}: r = 0 to 1, score from 0 to 1", (0, 1), 500, 300))
    return grid(panels)


def odd_ends(engine, out, n=50):
    """{what: {end: bits}}, and a sheet of pictures."""
    result, rows = {}, []
    for what, cases in odd_cases(n).items():
        images = draw(engine.generate, cases, what)
        result[what] = judge(cases, images)
        rows.append(prompt_row(what, cases[0].prompt, images[0]))
    write_png(out / "odd.png", sheet(rows, 96, letters=70))
    return result


EXTRAS = {"curve": blend_curve, "odd": odd_ends}  # of the committed weights


# ---- the report ---------------------------------------------------------------------------------


def compared(first, second):
    """The cells of a comparison: score of A, of B, B - A, which is better."""
    middle, half = difference(first, second)
    verdict = "no difference shown" if abs(middle) <= half else "AB"[middle > 0]
    shares = [f"{sum(map(share, texts)) / len(texts):.3f}" for texts in (first, second)]
    return [*shares, f"{middle:+.3f} ± {half:.3f}", verdict]


def report(results):
    """All results as Markdown."""
    rows, runs = [], results["runs"]
    for c in COMPARISONS:
        pair, seeds = (c.first, c.second), list(map(str, range(c.seeds)))
        if all(seed in runs.get(name, {}) for name in pair for seed in seeds):
            for row in c.rows.split(", "):
                texts = [[runs[name][seed][row]["exact"] for seed in seeds] for name in pair]
                question = f"{c.question} (`{c.claim}`)"
                rows.append([*pair, *compared(*texts), row, question, c.seeds])
    head = ["A", "B", "score of A", "of B", "B - A", "better", "score", "question", "seeds"]
    parts = ["**By training**", table(head, rows)]
    if curve := results.get("curve"):
        n = len(curve["copies"]["0.0"]["exact"])
        rows = [
            [row, check, *(f"{share(at[check]):.3f}" for at in by_r.values())]
            for row, by_r in curve.items()
            for check in by_r["0.0"]
        ]
        parts.append(f"**The blend** (`curve`): stage 2, {n} cases a row.")
        parts.append(table(["", "", *(f"r = {r:g}" for r in RATIOS)], rows))
    if odd := results.get("odd"):
        n = len(next(text for ends in odd.values() for text in ends.values()))
        rows = [
            [what, ", ".join(f"{end} {share(text):.2f}" for end, text in ends.items())]
            for what, ends in odd.items()
        ]
        title = "**Out of the ordinary** (`odd`)"
        parts.append(f"{title}: stage 2, {n} cases a row; the rest is none of it.")
        parts.append(table(["asked", "how it ended"], rows))
    return "\n\n".join(parts) + "\n"


CLAIMS = (*EXTRAS, *dict.fromkeys(c.claim for c in COMPARISONS))


def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("claims", nargs="*", metavar="claim", help=f"of {', '.join(CLAIMS)}")
    parser.add_argument("--out", default="runs/claims", help="folder of runs, scores and pictures")
    args = parser.parse_args(arguments)
    if unknown := set(args.claims) - set(CLAIMS):
        raise UserError(f"unknown claim {unknown.pop()!r}: expected some of {', '.join(CLAIMS)}")
    chosen, out = args.claims or CLAIMS, Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results = {"runs": {}}
    for name, find in EXTRAS.items():
        file = out / f"{name}.json"
        if name in chosen and not file.is_file():
            write_json(file, find(DreamEngine.load(), out))
        if file.is_file():
            results[name] = read_json(file)
    for c in COMPARISONS:
        for name in (c.first, c.second) if c.claim in chosen else ():
            for seed in range(c.seeds):
                results["runs"].setdefault(name, {})[str(seed)] = run(name, seed, out)
    with reading(out, "results of earlier runs of claims"):
        text = report(results)
    write_json(out / "claims.json", results)
    write_text(out / "claims.md", text)
    if "curve" in results:
        write_png(out / "curve.png", draw_curve(results["curve"]))
    print(text)


if __name__ == "__main__":
    with one_line_errors():
        main()
