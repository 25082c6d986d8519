"""Test the papers' claims and open questions by many short trainings of the miniature.

    python -m mini.claims                  # all of them, or only some: adapter rank

A claim compares two runs, each trained with one, three or five seeds and scored on cases of that seed.
Runs are stored in --out/NAME-SEED, so that an interrupted command continues where it stopped.
"""

import shutil
import subprocess
import sys
from collections import namedtuple
from functools import partial
from itertools import chain
from pathlib import Path

from support.cli import Parser, UserError, one_line_errors, reading

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from checkpoints import read_json
from dream_engine import LMM, SD3, DreamEngine
from mini import unified, world
from mini.cases import bits, difference, draw, judge, random_scenes, sample, score, share
from support.files import markdown_table, write_json, write_text
from unialignment import UniAlignment

# Trainings to compare. program: the module that trains. runs: {name: flags}; a key of STARTS among
# the flags stands for a path. score(folder, rows, seed) -> {row: verdicts} of a trained run.
Study = namedtuple("Study", "title program runs comparisons score")
# Is run `second` (B) better than run `first` (A)? rows: test sets, separated by commas.
Comparison = namedtuple("Comparison", "claim question first second rows seeds", defaults=[3])

# ---- Dream Engine -------------------------------------------------------------------------------

ALIGN = "--stage 1 --steps 1000 --batch 16"
TUNE = "--stage 2 --steps 500 --batch 16"
RUNS = {
    "both": ALIGN,
    "t2i alone": f"{ALIGN} --tasks t2i=1",
    "t2i alone, 3000 steps": f"{ALIGN} --tasks t2i=1 --steps 3000",
    "i2i alone": f"{ALIGN} --tasks i2i=1",
    "r = 0": f"{ALIGN} --blend 0",
    "1 layer": f"{ALIGN} --layers 1",
    "2 layers of 128": f"{ALIGN} --mlp-dim 128",
    "3 layers of 128": f"{ALIGN} --mlp-dim 128 --layers 3",
    "3 layers of 512": f"{ALIGN} --layers 3",
    "random LMM": f"{ALIGN} --lmm RANDOM-LMM",
    "LoRA of rank 16": TUNE,
    "LoRA of rank 4": f"{TUNE} --rank 4",
    "LoRA of rank 1": f"{TUNE} --rank 1",
    "adapter alone": f"{TUNE} --rank 0",
    "LoRA on the LMM": f"{TUNE} --lmm-lora",
    "stage 2 at r = 0": f"{TUNE} --blend 0",
    "both, then stage 2": f"{TUNE} --checkpoint BOTH",
    "stage 2 from scratch": f"{TUNE} --steps 1500 --checkpoint none",
}
STAGE1_ROWS, STAGE2_ROWS = "t2i, copies", "edits, objects, copies, t2i"
COMPARISONS = [Comparison(*fields) for fields in (
    ("joint", "Does training on copying help text to image?", "t2i alone", "both", "t2i", 5),
    ("joint", "Does training on text to image help copying?", "i2i alone", "both", "copies"),
    ("joint", "Is copying zero-shot?", "t2i alone, 3000 steps", "both", "copies, t2i"),
    ("blend", "Is random r better than r = 0?", "r = 0", "both", "t2i, copies, copies at r = 1"),
    ("blend", "Is random r better than r = 0 in stage 2?", "stage 2 at r = 0", "LoRA of rank 16",
     "edits, objects, mixing, edits at r = 1, objects at r = 1"),
    ("adapter", "Are two layers better than one?", "1 layer", "both", STAGE1_ROWS),
    ("adapter", "Are three layers better than two?", "both", "3 layers of 512", STAGE1_ROWS),
    ("adapter", "512 hidden units or 128?", "2 layers of 128", "both", STAGE1_ROWS),
    ("adapter", "512 or 128, with three layers?", "3 layers of 128", "3 layers of 512", STAGE1_ROWS),
    ("lmm", "Does a trained LMM help?", "random LMM", "both", STAGE1_ROWS),
    ("rank", "Is LoRA better than the adapter alone?", "adapter alone", "LoRA of rank 16", STAGE2_ROWS),
    ("rank", "Rank 16 or 4?", "LoRA of rank 4", "LoRA of rank 16", STAGE2_ROWS),
    ("rank", "Rank 4 or 1?", "LoRA of rank 1", "LoRA of rank 4", STAGE2_ROWS),
    ("stages", "Is stage 2 better after stage 1 than from scratch?", "stage 2 from scratch",
     "both, then stage 2", STAGE2_ROWS),
    ("lmm-lora", "Does LoRA on the LMM help, too?", "LoRA of rank 16", "LoRA on the LMM", STAGE2_ROWS),
)]  # fmt: skip
CASES = {"t2i": 120, "copies": 100, "edits": 100, "objects": 100, "mixing": 60}  # for each seed
GUIDANCE = 2.0  # checkpoints of short trainings store none


def score_drawing(folder, rows, seed):
    """Score Dream Engine on rows: test sets of `mini.cases`, drawn at r = 0 or "at r = 1"."""
    lmm = folder / "lmm"
    engine, scores = DreamEngine.load(SD3, lmm if lmm.is_dir() else LMM, folder), {}
    for row in rows:
        kind, _, r = row.partition(" at r = ")
        cases = kind, CASES[kind], f"claims {seed}", f"{folder.name}, {row}"
        scores[row] = score(engine.generate, *cases, guidance=GUIDANCE, r=float(r or 0))
    return scores


def both(folder, seed):
    """Train the run "both" with the same seed, and return its folder, to start from."""
    run(DREAM_ENGINE, "both", seed, folder.parent)
    return folder.with_name(f"both-{seed}")


def random_lmm(folder, seed):
    """Write the miniature's LMM with random weights, and return its folder."""
    torch.manual_seed(seed)
    shutil.copytree(LMM, folder / "lmm", dirs_exist_ok=True)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(LMM))
    model.save_pretrained(folder / "lmm")
    return folder / "lmm"


DREAM_ENGINE = Study("What helps Dream Engine?", "train", RUNS, COMPARISONS, score_drawing)

# ---- UniAlignment -------------------------------------------------------------------------------

UNI = "--tasks t2i=1,edit=1.5,answer=0.8 --null 0.05 --loss velocity --warmup 50"
CONTINUE = f"{UNI} --checkpoint START --steps 500 --batch 16 --decay 0.6 --lr 1e-3"
UNI_RUNS = {
    "start": f"{UNI} --steps 800 --batch 32 --decay 0.01 --lr 1.2e-3 --weights text=0.5,csa=0,isa=0",
    "neither": f"{CONTINUE} --weights text=0.5,csa=0,isa=0",
    "CSA": f"{CONTINUE} --weights text=0.5,isa=0",
    "ISA": f"{CONTINUE} --weights text=0.5,csa=0",
    "CSA and ISA": f"{CONTINUE} --weights text=0.5",
    "text x 0.2": CONTINUE,
    "text x 1": f"{CONTINUE} --weights text=1",
    "drawing alone": f"{CONTINUE} --weights text=0,csa=0,isa=0",
    "reading alone": f"{CONTINUE} --weights velocity=0,text=0.5,csa=0,isa=0",
    "ISA of states": f"{CONTINUE} --weights text=0.5,csa=0 --lmm-states",
    "ISA of a random LMM": f"{CONTINUE} --weights text=0.5,csa=0 --lmm RANDOM-LMM",
}
ALL = "t2i, edits, segmentation, captions, agreement"
UNI_COMPARISONS = [Comparison(*fields) for fields in (
    ("align", "Do both alignment losses help?", "neither", "CSA and ISA", ALL, 3),
    ("csa", "Does CSA alone help?", "neither", "CSA", ALL, 1),
    ("isa", "Does ISA alone help?", "neither", "ISA", ALL, 1),
    ("cost", "Does reading harm drawing?", "drawing alone", "neither", "t2i, edits, segmentation", 1),
    ("cost", "Does drawing harm reading?", "reading alone", "neither", "captions", 1),
    ("text", "Weight of the text loss: 0.2 or 0.5?", "text x 0.2", "CSA and ISA", ALL, 1),
    ("text", "Weight of the text loss: 0.5 or 1?", "CSA and ISA", "text x 1", ALL, 1),
    ("teacher", "ISA with the LMM's embeddings or its states?", "ISA", "ISA of states", ALL, 1),
    ("teacher", "Does ISA need a trained LMM?", "ISA of a random LMM", "ISA", ALL, 1),
)]  # fmt: skip


def score_all(folder, _, seed):
    """Score UniAlignment on the rows of ALL. agreement: captions of its own drawings are right."""
    engine, stream = UniAlignment.load(folder), f"claims {seed}"
    generate = partial(unified.without_task(engine.generate), guidance=GUIDANCE, steps=14)
    scores = {row: score(generate, row, 100, stream, row) for row in ("edits", "segmentation")}
    cases = sample("t2i", CASES["t2i"], stream)
    images, scenes = draw(generate, cases), random_scenes(stream, 100)
    scores["t2i"] = judge(cases, images)
    for row, shown in (("agreement", images), ("captions", list(map(world.render, scenes)))):
        scores[row] = bits(unified.captions_are_right(engine, shown))
    return scores


def start(folder, _):
    """Train the run "start" with seed 0, and return its folder; all other runs continue it."""
    run(UNIALIGNMENT, "start", 0, folder.parent)
    return folder.with_name("start-0")


UNIALIGNMENT = Study(
    "Does alignment help?", "unialignment.train", UNI_RUNS, UNI_COMPARISONS, score_all
)
STARTS = {"BOTH": both, "RANDOM-LMM": random_lmm, "START": start}  # functions that make a folder
STUDIES = (DREAM_ENGINE, UNIALIGNMENT)

# ---- running and comparing ----------------------------------------------------------------------


def run(study, name, seed, out):
    """Train and score a run, unless its scores are stored already -> {row: {"exact": verdicts}}."""
    folder = out / f"{name.replace(' ', '-')}-{seed}"
    result = folder / "scores.json"
    if not result.is_file():
        flags = study.runs[name].split()
        flags = [str(STARTS[f](folder, seed)) if f in STARTS else f for f in flags]
        command = [sys.executable, "-m", study.program, *flags, "--out", str(folder)]
        command += ["--seed", str(seed), "--resume", "--keep", "1", "--sample-every", "0"]
        if code := subprocess.run(command, check=False).returncode:
            raise UserError(f"{name}, seed {seed}: its training ended with code {code}")
        rows = [c.rows.split(", ") for c in study.comparisons if name in (c.first, c.second)]
        scores = study.score(folder, dict.fromkeys(chain(*rows)), seed) if rows else {}
        write_json(result, {row: {"exact": verdicts} for row, verdicts in scores.items()})
        shutil.rmtree(folder / "checkpoints")  # the final weights are in folder itself
    return read_json(result)


def compared(first, second):
    """The cells of a comparison: score of A, score of B, B - A with its interval, which is better."""
    middle, half = difference(first, second)
    verdict = "no difference shown" if abs(middle) <= half else "AB"[middle > 0]
    shares = [f"{sum(map(share, runs)) / len(runs):.3f}" for runs in (first, second)]
    return [*shares, f"{middle:+.3f} ± {half:.3f}", verdict]


def report(results):
    """Format all results as Markdown tables."""
    runs, parts = results["runs"], []
    for study in STUDIES:
        rows = []
        for c in study.comparisons:
            pair, seeds = (c.first, c.second), list(map(str, range(c.seeds)))
            if all(seed in runs.get(name, {}) for name in pair for seed in seeds):
                for row in c.rows.split(", "):
                    exact = [[runs[name][seed][row]["exact"] for seed in seeds] for name in pair]
                    question = f"{c.question} (`{c.claim}`)"
                    rows.append([*pair, *compared(*exact), row, question, c.seeds])
        head = (
            "A",
            "B",
            "score of A",
            "score of B",
            "B - A",
            "better",
            "test set",
            "question",
            "seeds",
        )
        parts += [f"**{study.title}**", markdown_table(head, rows)] if rows else []
    return "\n\n".join(parts) + "\n"


def main(arguments=None):
    comparisons = [(study, c) for study in STUDIES for c in study.comparisons]
    names = ", ".join(dict.fromkeys(c.claim for _, c in comparisons))
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("claims", nargs="*", metavar="claim", help=f"of {names}; default: all")
    parser.add_argument("--out", default="runs/claims", help="folder for runs and scores")
    args = parser.parse_args(arguments)
    if unknown := set(args.claims) - set(names.split(", ")):
        raise UserError(f"unknown claim {unknown.pop()!r}: expected some of {names}")
    out, results = Path(args.out), {"runs": {}}
    out.mkdir(parents=True, exist_ok=True)
    for study, c in comparisons:
        if args.claims and c.claim not in args.claims:
            continue
        for name in (c.first, c.second):
            found = {str(seed): run(study, name, seed, out) for seed in range(c.seeds)}
            results["runs"].setdefault(name, {}).update(found)
    with reading(out, "scores of earlier runs of this program"):
        text = report(results)
    write_json(out / "claims.json", results)
    write_text(out / "claims.md", text)
    print(text)


if __name__ == "__main__":
    with one_line_errors():
        main()
