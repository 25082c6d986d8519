"""The paper's claims and open questions, answered by many short trainings of the miniature.

    python evaluate.py claims                # all of them, or only some: claims adapter rank

RUNS says what is trained, COMPARISONS what is asked of it. Each run is trained with three seeds or
five, scored on cases of that seed, and kept in --out/NAME-SEED, so that an interrupted command goes
on where it was.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

import shapes
import weights
from cli import Parser
from data import example_row, sheet
from dream_engine import LMM, SD3, STAGE1, STAGE2, DreamEngine
from logbook import plot
from mmdit import load_mmdit
from pretrain import TEXT_ENCODER, TextEncoder, encode_text
from pretrain import draw as draw_texts
from scores import CASES, STREAM, difference, draw, judge, odd_cases, share

GUIDANCE = 2.0  # at which the miniature draws best

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


@dataclass(frozen=True)
class Comparison:
    """Is the second run, B, better than the first, A?"""

    claim: str
    question: str
    first: str
    second: str
    rows: tuple[str, ...]
    seeds: int = 3


STAGE2_ROWS = ("edits", "objects", "copies", "t2i")
COMPARISONS = (
    Comparison("joint", "Does copying help text -> image?", "t2i alone", "both", ("t2i",), 5),
    Comparison("joint", "Does text -> image help copying?", "i2i alone", "both", ("copies",)),
    Comparison("joint", "Is copying zero-shot?", "t2i alone, 3000 steps", "both", ("copies", "t2i")),
    Comparison("blend", "Is r at random better than r = 0?", "r = 0", "both",
               ("t2i", "copies", "copies at r = 1")),
    Comparison("blend", "The same in stage 2", "stage 2 at r = 0", "LoRA of rank 16",
               ("edits", "objects", "mixing", "edits at r = 1", "objects at r = 1")),
    Comparison("adapter", "Are two layers better than one?", "1 layer", "both", ("t2i", "copies")),
    Comparison("adapter", "Are three better than two?", "both", "3 layers of 512", ("t2i", "copies")),
    Comparison("adapter", "512 hidden units or 128?", "2 layers of 128", "both", ("t2i", "copies")),
    Comparison("adapter", "The same with three layers", "3 layers of 128", "3 layers of 512",
               ("t2i", "copies")),
    Comparison("lmm", "Does it matter what the LMM has learnt?", "random LMM", "both",
               ("t2i", "copies")),
    Comparison("rank", "LoRA, or the adapter alone?", "adapter alone", "LoRA of rank 16", STAGE2_ROWS),
    Comparison("rank", "Rank 16 or 4?", "LoRA of rank 4", "LoRA of rank 16", STAGE2_ROWS),
    Comparison("rank", "Rank 4 or 1?", "LoRA of rank 1", "LoRA of rank 4", STAGE2_ROWS),
    Comparison("stages", "Stage 2 from stage 1, or all in one?", "stage 2 from scratch",
               "both, then stage 2", STAGE2_ROWS),
    Comparison("lmm-lora", "LoRA on the LMM, too?", "LoRA of rank 16", "LoRA on the LMM", STAGE2_ROWS),
)  # fmt: skip


def run(name, seed, out):
    """Train and score a run, or what is missing of that -> {row: {check: bits}}."""
    folder = out / f"{name.replace(' ', '-')}-{seed}"
    result = folder / "scores.json"
    if result.is_file():
        return json.loads(result.read_text())
    flags = RUNS[name].format(out=out, seed=seed).split()
    stage = int(flags[1])
    lmm = flags[flags.index("--lmm") + 1] if "--lmm" in flags else LMM
    if not Path(lmm, "config.json").is_file():
        random_lmm(lmm, seed)
    if BOTH in RUNS[name]:
        run("both", seed, out)
    command = [sys.executable, Path(__file__).with_name("train.py"), *flags]
    command += ["--seed", str(seed), "--out", folder, "--resume", "--keep", "1"]
    if code := subprocess.run([*command, "--sample-every", "0"], check=False).returncode:
        raise ValueError(f"{name}, seed {seed}: its training ended with code {code}")
    engine = DreamEngine.load(SD3, lmm, folder)
    scores = {}
    for r in (0.0, 1.0) if name in AT_R1 else (0.0,):
        for row, n in ROWS[stage].items():
            if r and row == "t2i":  # without pictures nothing is blended
                continue
            at = f"{row} at r = 1" if r else row
            scores[at] = score(engine.generate, row, n, f"claims {seed}", f"{name}, {at}", r=r)
    write(result, json.dumps(scores, indent=1) + "\n")
    shutil.rmtree(folder / "checkpoints")  # what is learnt lies beside it
    return scores


def score(generate, row, n, seed, what="", guidance=GUIDANCE, **settings):
    """{check: bits} of n cases of a row; settings as of `DreamEngine.generate`."""
    cases = [case for group in CASES[row](n, seed).values() for case in group]
    return judge(cases, draw(generate, cases, what, guidance=guidance, **settings))


def random_lmm(folder, seed):
    """An LMM as the miniature's, which has learnt nothing."""
    torch.manual_seed(seed)
    Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(LMM)).save_pretrained(folder)
    for file in LMM.iterdir():
        if file.suffix != ".safetensors" and not Path(folder, file.name).exists():
            shutil.copy(file, folder)


# ---- what is asked of the committed weights -----------------------------------------------------


def against_base(n=600):
    """Text -> image by the base's own text encoder, by stage 1 and by stage 2: {model: bits}."""
    one, two = DreamEngine.load(checkpoint=STAGE1), DreamEngine.load(checkpoint=STAGE2)
    with torch.device("meta"):
        encoder = TextEncoder(len(one.tokenizer))
    weights.fill(encoder, weights.read(TEXT_ENCODER), TEXT_ENCODER, one.device, torch.float32)
    base = load_mmdit(SD3, one.device)

    def by_base(prompts, task, guidance, seed):
        texts = ["".join(prompt) for prompt in prompts]
        condition_of = lambda texts: encode_text(base, encoder, one.tokenizer, texts)
        return draw_texts(base, one.vae, condition_of, texts, guidance=guidance, seed=seed)

    models = {"base": by_base, "stage 1": one.generate, "stage 2": two.generate}
    result = {}
    for guidance in (2.0, 4.5):
        for name, generate in models.items():
            at = f"{name}, guidance {guidance:g}"
            result[at] = score(generate, "t2i", n, STREAM, at, guidance)["exact"]
    return result


RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)


def blend_curve(engine, n=200):
    """{row: {r: {check: bits}}}, all of the same cases."""
    return {
        row: {
            str(r): score(engine.generate, row, n, STREAM, f"{row}, r = {r}", r=r) for r in RATIOS
        }
        for row in ("copies", "edits", "objects", "mixing")
    }


def draw_curve(curve):
    """Each row as a plot over r: the exact score, what was kept, what was followed."""
    page = Image.new("RGB", (1000, 600), "white")
    for i, (row, by_r) in enumerate(curve.items()):
        names = [name for name in ("exact", "kept", "followed") if name in by_r["0.0"]]
        lines = {name: [share(at[name]) for at in by_r.values()] for name in names}
        panel = plot(lines, f"{row}: r = 0 to 1, score from 0 to 1", (0, 1), 500, 300)
        page.paste(panel, (500 * (i % 2), 300 * (i // 2)))
    return page


def two_guidances(engine, n=200):
    """{row: {guidance: [bits without, bits with guidance of the null prompt, too]}}."""
    result = {}
    for row in ("edits", "objects"):
        for g in (2.0, 4.5):
            at = f"{row}, guidance {g:g}"
            result[at] = [
                score(engine.generate, row, n, STREAM, at, g, null_guidance=s)["exact"]
                for s in (1.0, 1.5)
            ]
    return result


def odd_ends(engine, out, n=50):
    """{what: {end: bits}}, and a sheet of pictures."""
    result, rows = {}, []
    for what, cases in odd_cases(n).items():
        images = draw(engine.generate, cases, what, guidance=GUIDANCE)
        result[what] = judge(cases, images)
        rows.append(example_row(what, cases[0].prompt, images[0]))
    sheet(rows, 96, 70).save(out / "odd.png")
    return result


# ---- what comes of it ---------------------------------------------------------------------------


EXTRAS = {  # of the committed weights
    "base": lambda out: against_base(),
    "curve": lambda out: blend_curve(DreamEngine.load()),
    "guidance": lambda out: two_guidances(DreamEngine.load()),
    "odd": lambda out: odd_ends(DreamEngine.load(), out),
}


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


COMPARED = ("A", "B", "score of A", "of B", "B - A", "better")


def verdict(middle, half):
    if abs(middle) <= half:
        return "no difference shown"
    return "B" if middle > 0 else "A"


def compared(first, second):
    middle, half = difference(first, second)
    shares = [f"{sum(map(share, texts)) / len(texts):.3f}" for texts in (first, second)]
    return [*shares, f"{middle:+.3f} ± {half:.3f}", verdict(middle, half)]


def report(results):
    """All results as Markdown, as the README shows them."""
    parts = []
    if base := results.get("base"):
        n = len(next(iter(base.values()))) // len(shapes.TASKS)
        rows = [
            [model, f"**{share(text):.3f}**"]
            + [f"{share(text[i : i + n]):.2f}" for i in range(0, len(text), n)]
            for model, text in base.items()
        ]
        parts.append(f"**Against the base**: text -> image, {n} prompts a task.")
        parts.append(table(["", "mean", *shapes.TASKS], rows))
        rows = [
            [a, b, *compared([base[f"{a}, guidance {g}"]], [base[f"{b}, guidance {g}"]]), g]
            for a, b in (("base", "stage 1"), ("stage 1", "stage 2"))
            for g in ("2", "4.5")
        ]
        parts.append(table([*COMPARED, "guidance"], rows))
    rows = []
    for c in COMPARISONS:
        pair, seeds = (c.first, c.second), range(c.seeds)
        scored = [[results["runs"].get(name, {}).get(str(s)) for s in seeds] for name in pair]
        if None in scored[0] + scored[1]:
            continue
        for row in c.rows:
            texts = [[of_seed[row]["exact"] for of_seed in runs] for runs in scored]
            rows.append([*pair, *compared(*texts), row, f"{c.question} (`{c.claim}`)", c.seeds])
    parts.append("**By training**")
    parts.append(table([*COMPARED, "score", "question", "seeds"], rows))
    if curve := results.get("curve"):
        rows = [
            [row, check, *(f"{share(at[check]):.3f}" for at in by_r.values())]
            for row, by_r in curve.items()
            for check in by_r["0.0"]
        ]
        n = len(curve["copies"]["0.0"]["exact"])
        parts.append(f"**The blend** (`curve`): stage 2 at guidance {GUIDANCE:g}, {n} cases a row.")
        parts.append(table(["", "", *(f"r = {r:g}" for r in RATIOS)], rows))
    if guided := results.get("guidance"):
        rows = [[at, *compared([first], [second])] for at, (first, second) in guided.items()]
        n = len(guided["edits, guidance 2"][0])
        about = "of what the null prompt still holds: A 1, B 1.5"
        parts.append(f"**A second guidance** (`guidance`), {about}; stage 2, {n} cases a row.")
        parts.append(table(["", *COMPARED[2:]], rows))
    if odd := results.get("odd"):
        rows = [
            [what, ", ".join(f"{end} {share(text):.2f}" for end, text in ends.items())]
            for what, ends in odd.items()
        ]
        n = len(next(iter(next(iter(odd.values())).values())))
        parts.append(
            f"**Out of the ordinary** (`odd`): stage 2, {n} cases a row; the rest is none of it."
        )
        parts.append(table(["asked", "how it ended"], rows))
    return "\n\n".join(parts) + "\n"


def write(file, text):
    partial = file.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, file)


def main(arguments):
    claims = [*EXTRAS, *dict.fromkeys(c.claim for c in COMPARISONS)]
    parser = Parser(prog="evaluate.py claims", description="Train, score and compare.")
    parser.add_argument("claims", nargs="*", metavar="claim", help=f"of {', '.join(claims)}")
    parser.add_argument("--out", default="runs/claims", help="folder of runs, scores and pictures")
    args = parser.parse_args(arguments)
    if unknown := set(args.claims) - set(claims):
        raise ValueError(f"unknown claim {unknown.pop()!r}: expected some of {', '.join(claims)}")
    asked, out = args.claims or claims, Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results = {"runs": {}}
    for name, find in EXTRAS.items():
        file = out / f"{name}.json"
        if name in asked and not file.is_file():
            write(file, json.dumps(find(out), indent=1) + "\n")
        if file.is_file():
            results[name] = json.loads(file.read_text())
    for c in COMPARISONS:
        for name in (c.first, c.second) if c.claim in asked else ():
            for seed in range(c.seeds):
                results["runs"].setdefault(name, {})[str(seed)] = run(name, seed, out)
    write(out / "claims.json", json.dumps(results, indent=1) + "\n")
    write(out / "claims.md", report(results))
    if "curve" in results:
        draw_curve(results["curve"]).save(out / "curve.png")
    print(report(results))
