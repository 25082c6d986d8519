"""Score the miniature on its test sets, and write the scores and sample pictures to a folder.

    python -m mini.evaluate                # all scores, or only some rows: base edits
    python -m mini.evaluate guidance       # find the best guidance for --checkpoint and store it there;
                                           # a UniAlignment folder is also copied to weights/mini/

An exact detector judges every picture. A picture is right only if it shows exactly what the prompt
describes. No model was trained on the test cases; guidance is chosen on another random sample.
"""

import json
import random
import textwrap
import time
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from statistics import fmean

from support.cli import Parser, UserError, number, one_line_errors, whole_number

import torch
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import save_file
from transformers import AutoTokenizer, T5EncoderModel

from checkpoints import load_mmdit, load_vae, metadata, read_json, read_tensors
from dream_engine import LMM, SD3, STAGE1, STAGE2, DreamEngine
from lmm import load_lmm
from mini import cases, pretrain, unified, world
from mini.cases import CASES, HELD, PAIR_SETS, STREAM, bits, random_scenes, score, share
from mini.world import SEEN
from support import files
from unialignment.model import MINI, UniAlignment

GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.5)
STEPS = (1, 2, 4, 8, 14, 28)  # of Euler
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)  # r
UNI = "unialignment"
UNI_ALONE = ("segmentation", "composed", "words alone")  # Dream Engine is not trained on these
ALONE = "base, by time alone"  # without the pooled vector: only time modulates the blocks
CONTROLS = {"renders": "true pictures", "VAE": "reconstructions", "shuffled": "another case's drawing",
            "unedited": "unedited source"}  # name: column of the report  # fmt: skip
TABLES = {  # measure: title and columns in the report
    "variety": ("**Variety** (`variety`): 20 prompts of two pictures without places, 8 seeds each",
                ["r", "distinct scenes", "share of unclear pictures"]),
    "steps": ("**Euler steps** (`steps`): text to image", ["steps", "score", "seconds a picture"]),
    "reading": ("**Reading** (`reading`): captions of UniAlignment", ["", "exact", "F1 of objects"]),
    "questions": ("**Questions** (`questions`): answers of UniAlignment",
                  ["kind", "accuracy", "accuracy of the most frequent answer"]),
    "edges": ("**Edges** (`edges`): edge maps of UniAlignment", ["pictures", "F1 of bright pixels"]),
    "own": ("**UniAlignment's own drawings** (`own`): its captions of them",
            ["", "caption fits picture", "caption does not"]),
    "cost": ("**Cost** (`cost`): batches of 16",
             ["", "million parameters", "seconds a picture", "seconds a caption"]),
    "parts": ("**Training from scratch** (`parts`)", ["part", "minutes", "score"]),
}  # fmt: skip

# ---- rows of the score table --------------------------------------------------------------------


class Base:
    """The miniature SD3.5 with its own T5, with the interface of `DreamEngine.generate`."""

    def __init__(self, device=None):
        device = device or "cpu"
        mmdit, self.vae = load_mmdit(SD3, device), load_vae(SD3, device)
        t5 = T5EncoderModel.from_pretrained(pretrain.T5, dtype=torch.float32).eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(pretrain.T5)
        self.condition = pretrain.TextCondition(mmdit, t5, tokenizer)

    def generate(self, prompts, *, task=None, seed=0, steps=28, guidance=4.5, alone=False):
        """alone: see `pretrain.draw`."""
        texts = ["".join(prompt) for prompt in prompts]
        return pretrain.draw(self.vae, self.condition, texts, steps, guidance, seed, alone)


# A row is a generator function of the program's options: it yields (name, {group: {check: bits}}).
# The check "exact" is the score.


def score_drawing(args, name, engine, row, generate=None, **settings):
    """Score a test set of CASES with trained and with held-out pairs, and write sheets of both."""
    for suffix, pairs in PAIR_SETS.items():
        if suffix and row == "semgen":  # its edits have no held-out pairs
            return
        title, groups, tiles = name + suffix, {}, []
        sampled = CASES[row](args.num, STREAM, pairs)
        flat = list(chain(*sampled.values()))
        images = iter(cases.draw(generate or engine.generate, flat, title, **settings))
        for group, members in sampled.items():
            shown = list(islice(images, len(members)))
            exact = cases.judge(members, shown)
            groups[group] = {"exact": exact} | cases.controls(engine.vae, members, shown)
            tiles.append(list(map(tile, members[:8], shown, exact)))
        file = title.replace(", ", "-").replace(" ", "-")
        files.write_png(args.out / f"{file}.png", files.sheet(tiles))
        yield title, groups


def score_vae(args):
    vae = load_vae(SD3)
    for suffix, pairs in PAIR_SETS.items():
        scenes = random_scenes(f"vae{suffix}", args.num, pairs)
        images = cases.reconstruct(vae, list(map(world.render, scenes)))
        right = bits(world.detect(image) == scene for image, scene in zip(images, scenes))
        yield f"VAE{suffix}", {"VAE": {"exact": right}}


def score_captions(args):
    lmm = load_lmm(LMM)
    for suffix, pairs in PAIR_SETS.items():
        scenes = random_scenes(f"captions{suffix}", args.num, pairs)
        texts = unified.lmm_captions(lmm, map(world.render, scenes))
        right = bits(text == world.describe(scene) for text, scene in zip(texts, scenes))
        yield f"captions{suffix}", {"captions": {"exact": right}}


def score_base(args):
    base = Base(args.device)
    guidance = args.guidance or best_guidance(base.generate, ["t2i"], 120)
    for name, alone in (("base", False), (ALONE, True)):
        yield from score_drawing(args, name, base, "t2i", guidance=guidance, alone=alone)


def score_dream_engine(args, row, name=None, checkpoint=None):
    engine = DreamEngine.load(SD3, LMM, checkpoint or args.checkpoint, args.device)
    settings = {"guidance": args.guidance, "r": args.blend}
    yield from score_drawing(args, name or row, engine, row, **settings)


def score_unialignment(args, row):
    engine = unified.load(args)
    settings = {"generate": unified.without_task(engine.generate), "guidance": args.guidance}
    yield from score_drawing(args, f"UniAlignment, {row}", engine, row, **settings)


ROWS = {"vae": score_vae, "captions": score_captions, "base": score_base}
ROWS["stage1"] = partial(score_dream_engine, row="t2i", name="stage 1", checkpoint=STAGE1)
ROWS |= {row: partial(score_dream_engine, row=row) for row in CASES if row not in UNI_ALONE}
for row in ("t2i", "edits", "semgen", *UNI_ALONE):
    ROWS[f"{UNI}-{row}"] = partial(score_unialignment, row=row)


def tile(case, image, right):
    """Show a case: its inputs, the drawing, with a red frame if wrong, and the prompt below."""
    (*inputs, _), text = files.prompt_row(case.task, case.prompt, image)
    framed = ImageOps.expand(image, 2, "white" if right == "1" else "red")
    row = files.sheet([[*inputs, framed]], height=128 if not inputs else 80)
    page = Image.new("RGB", (max(row.width, 150), row.height + 52), "white")
    page.paste(row, (0, 0))
    words = textwrap.fill(text.partition(": ")[2], page.width // 6)
    ImageDraw.Draw(page).text((4, row.height), words, "black", font_size=10)
    return page


# ---- further measures ---------------------------------------------------------------------------


def variety(args, prompts=20, seeds=8):
    """{r: [distinct scenes among the `seeds` drawings of a prompt, share of unclear drawings]}."""
    engine = DreamEngine.load(SD3, LMM, args.checkpoint, args.device)
    rng, result = random.Random(f"variety {STREAM}"), {}
    pairs = [rng.sample(SEEN, 2) for _ in range(prompts)]
    open_prompts = [[cases.picture(a), " and ", cases.picture(b)] for a, b in pairs]
    for r in RATIOS:
        drawn = (engine.generate([p] * seeds, task="objects", r=r) for p in open_prompts)
        scenes = [list(map(world.detect, images)) for images in drawn]
        distinct = fmean(len(set(found) - {None}) for found in scenes)
        result[str(r)] = [distinct, fmean(found.count(None) for found in scenes) / seeds]
    return result


def by_steps(args):
    """{Euler steps: [text-to-image score, seconds a picture]}."""
    engine, result = DreamEngine.load(SD3, LMM, args.checkpoint, args.device), {}
    for steps in STEPS:
        start, title = time.perf_counter(), f"{steps} steps"
        exact = score(engine.generate, "t2i", args.num, STREAM, title, steps=steps)
        result[str(steps)] = [share(exact), round((time.perf_counter() - start) / len(exact), 4)]
    return result


MEASURES = {"variety": variety, "steps": by_steps, **unified.MEASURES}


# ---- guidance -----------------------------------------------------------------------------------


def best_guidance(generate, rows, n):
    """Find the guidance with the best mean score over rows, on n cases each, drawn separately."""
    means = {}
    for guidance in GUIDANCES:
        what, settings = f"guidance {guidance:g}", {"guidance": guidance}
        found = [score(generate, row, n, "guidance", f"{row}, {what}", **settings) for row in rows]
        means[guidance] = fmean(map(share, found))
    print(
        files.markdown_table(
            ["guidance", "score"], [[f"{g:g}", f"{m:.3f}"] for g, m in means.items()]
        )
    )
    return max(means, key=means.get)


def store_guidance(file, n, device=None):
    """Find the best guidance of a checkpoint, and write it there as the default for drawing."""
    if file.is_dir():
        engine = UniAlignment.load(file, device=device)
        guidance = best_guidance(unified.without_task(engine.generate), ("t2i", "edits"), n)
        engine.sampling = replace(engine.sampling, guidance=guidance)
        engine.half().save(MINI / "transformer")
        return engine.save_frozen(MINI)
    engine = DreamEngine.load(SD3, LMM, file, device)
    config = read_json(file, metadata(file)["config"])
    rows = ("t2i", "copies") if config.get("stage") == 1 else ("t2i", "copies", "edits", "objects")
    config["guidance"] = best_guidance(engine.generate, rows, n)
    tensors = {name: tensor.clone() for name, tensor in read_tensors(file).items()}
    with files.whole(file) as partial_file:
        save_file(tensors, partial_file, {"config": json.dumps(config)})


# ---- the report ---------------------------------------------------------------------------------


def line(name, checks, ratio=""):
    low, high = cases.interval(checks["exact"])
    cells = [f"{share(checks['exact']):.3f}", f"{low:.3f} - {high:.3f}", ratio]
    cells += [f"{share(checks[control]):.3f}" if control in checks else "" for control in CONTROLS]
    return [name, len(checks["exact"]), *cells]


def totals(rows):
    """{row: {check: bits}}: the groups of each row joined."""

    def joined(groups):
        return {check: "".join(group[check] for group in groups) for check in groups[0]}

    return {row: joined(list(groups.values())) for row, groups in rows.items()}


def ratio(row, total):
    """A score divided by that of the row with trained pairs, or of the base; "" if neither fits."""
    of_base = row in ("stage 1", "t2i", "UniAlignment, t2i", ALONE)
    reference = row.removesuffix(HELD) if row.endswith(HELD) else "base" if of_base else None
    beside = share(total[reference]["exact"]) if reference in total else 0
    return f"{share(total[row]['exact']) / beside:.2f}" if beside else ""


def report(scores):
    """Format scores as Markdown tables."""
    total, lines = totals(scores["rows"]), []
    for row, groups in scores["rows"].items():
        lines.append(line(f"**{row}**", total[row], ratio(row, total)))
        lines += [line(name, part) for name, part in groups.items() if len(groups) > 1]
    columns = ["", "cases", "score", "95 % interval", "ratio", *CONTROLS.values()]
    settings = ", ".join(f"{k} {v}" for k, v in scores["settings"].items())
    parts = ["**Scores** (`scores`): the share of right pictures"]
    parts += [files.markdown_table(columns, lines), f"({settings})"]
    for measure, (title, columns) in TABLES.items():
        rows = [
            [key, *("" if x is None else f"{x:.3g}" for x in values)]
            for key, values in scores.get(measure, {}).items()
        ]
        parts += [title, files.markdown_table(columns, rows)] if rows else []
    return "\n\n".join(parts) + "\n"


README_ROWS = {  # name in the README: row of the scores
    "Dream Engine: text to image": "t2i",
    "Dream Engine: text to image, prompts that count": "counting",
    "Dream Engine: copies": "copies",
    "Dream Engine: edits": "edits",
    "Dream Engine: images of objects among words": "objects",
    "Dream Engine: images of objects, held-out pairs": f"objects{HELD}",
    "Dream Engine: mixtures of two images": "mixing",
    "UniAlignment: text to image": "UniAlignment, t2i",
    "UniAlignment: edits": "UniAlignment, edits",
    "UniAlignment: segmentation": "UniAlignment, segmentation",
}


def readme_table(scores):
    """The README's table of scores.json: what is scored, on how many unseen cases, the score."""
    total = totals(scores["rows"]) | {"counting": scores["rows"]["t2i"]["counting"]}
    scored = {name: total[row]["exact"] for name, row in README_ROWS.items()}
    lines = [[name, len(exact), share(exact)] for name, exact in scored.items()]
    n, questions = len(total["copies"]["exact"]), scores["questions"]
    answers = (len(questions) - 1) * (n // 3)  # see `unified.questions`; one entry is the mean
    lines.append(["UniAlignment: captions, word for word", n, scores["reading"]["captions"][0]])
    lines.append(["UniAlignment: answers to questions", answers, questions["mean"][0]])
    head = ["what is scored", "unseen cases", "score"]
    return files.markdown_table(head, [[name, n, f"{score:.3f}"] for name, n, score in lines])


def parts_of(run, total):
    """{part: [minutes, score or None]} of a folder of speedrun.sh; minutes of resumed parts add up."""
    rows = {"vae": ["VAE"], "decoder": ["VAE"], "lmm": ["captions"], "base": ["base"],
            "stage1": ["stage 1"], "stage2": ["t2i", "copies", "edits", "objects"],
            UNI: ["UniAlignment, t2i", "UniAlignment, edits"]}  # fmt: skip
    result = {}
    for name, minutes in map(str.split, Path(run, "minutes.txt").read_text().splitlines()):
        shares = [share(total[row]["exact"]) for row in rows.get(name, []) if row in total]
        if name == "t5":  # draws nothing: its score is the accuracy on masked words
            last = Path(run, "t5.jsonl").read_text().splitlines()[-1]
            shares = [json.loads(last)["masked"]]
        earlier = result.get(name, [0])[0]
        result[name] = [earlier + float(minutes), sum(shares) / len(shares) if shares else None]
    return result | {"sum, two at a time": [sum(minutes for minutes, _ in result.values()), None]}


def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    expected = ", ".join((*ROWS, *MEASURES))
    add = parser.add_argument
    add("rows", nargs="*", metavar="row", help=f"some of {expected}; default: all. Or: guidance")
    add("--num", type=whole_number(6, 10_000), default=300, help="cases a row; default: 300")
    add("--checkpoint", default=STAGE2, type=Path, help="of Dream Engine; default: stage 2")
    add("--unialignment", default=MINI, type=Path, help="folder; default: the miniature's")
    add("--guidance", type=number(-1000, 1000), help="default: each checkpoint's own")
    add("--blend", type=number(0, 1), default=0.0, help="weight r of the ViT features; default: 0")
    add("--out", default="runs/evaluate", type=Path, help="folder for scores and pictures")
    add("--run", help="folder of speedrun.sh; the report will show its training times")
    add("--device", help="cpu, cuda, ...")
    args = parser.parse_args(arguments)
    if args.rows == ["guidance"]:
        return store_guidance(args.checkpoint, args.num, args.device)
    if unknown := set(args.rows) - {*ROWS, *MEASURES}:
        raise UserError(f"unknown row {unknown.pop()!r}: expected some of {expected}, or guidance")
    if args.run and not Path(args.run, "minutes.txt").is_file():
        raise UserError(f"--run {args.run}: expected a folder of speedrun.sh, with a minutes.txt")
    DreamEngine.load(SD3, LMM, args.checkpoint, args.device)  # fails now, not after minutes
    unified.load(args)
    args.out.mkdir(parents=True, exist_ok=True)
    guidance = "each checkpoint's own" if args.guidance is None else args.guidance
    settings = {"checkpoint": args.checkpoint.name, "guidance": guidance, "r": args.blend}
    scores = {"settings": settings | {"steps": 28, "cases and noise from seed": STREAM}, "rows": {}}
    for name in args.rows or (*ROWS, *MEASURES):
        if name in MEASURES:
            scores[name] = MEASURES[name](args)
            continue
        for row, groups in ROWS[name](args):
            scores["rows"][row] = groups
            exact = "".join(group["exact"] for group in groups.values())
            print(f"{row:30} {share(exact):.3f}", flush=True)
    if args.run:
        scores["parts"] = parts_of(args.run, totals(scores["rows"]))
    text = report(scores)
    files.write_json(args.out / "scores.json", scores)
    files.write_text(args.out / "scores.md", text)
    print(text)


if __name__ == "__main__":
    with one_line_errors():
        main()
