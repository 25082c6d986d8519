"""Score the miniature with the exact detector: a picture counts only if it is just what was asked.

    python -m mini.evaluate                # the whole report card; or some rows of it: base edits
    python -m mini.evaluate guidance       # find the guidance at which --checkpoint draws best; store it
                                           # of a folder of UniAlignment: and the folder in weights/mini/

Cases are of the reserved eighth that no training met, from a stream that nothing was chosen on.
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

import torch
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import save_file
from transformers import AutoTokenizer, T5EncoderModel

from checkpoints import load_mmdit, load_vae, metadata, read_json, read_tensors
from dream_engine import LMM, SD3, STAGE1, STAGE2, DreamEngine
from lmm import load_lmm
from mini import cases, pretrain, unified, world
from mini.cases import CASES, STREAM, bits, copies_of, interval, score, share
from mini.unified import GROUPS, random_scenes
from mini.world import SEEN
from support.cli import Parser, UserError, number, one_line_errors, whole_number
from support.files import (
    markdown_table,
    prompt_row,
    sheet,
    whole,
    write_json,
    write_png,
    write_text,
)
from unialignment.model import MINI, UniAlignment

GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.5)
STEPS = (1, 2, 4, 8, 14, 28)  # of Euler
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)  # r
HELD = ", held-out pairs"
UNI = "unialignment"
UNI_ALONE = ("segmentation", "composed", "words alone")  # rows that Dream Engine has not learnt
ALONE = "base, by time alone"
CONTROLS = {"renders": "true pictures", "VAE": "their VAE copies", "shuffled": "other case's",
            "unedited": "unedited"}  # name: column of the report  # fmt: skip

# ---- what is scored -----------------------------------------------------------------------------


class Base:
    """The miniature SD3.5 with its own T5, drawing as `DreamEngine.generate` does."""

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


# A row is a function of the program's options: it yields (name, {group: {check: bits}}).


def drawn(args, name, engine, row, **settings):
    """A row of CASES, of the pairs that training draws and of the held-out ones; and sheets."""
    for suffix, pairs in list(GROUPS.items())[: 1 if row == "semgen" else 2]:
        groups, tiles, asked, title = {}, [], CASES[row](args.num, STREAM, pairs), name + suffix
        images = iter(cases.draw(engine.generate, chain(*asked.values()), title, **settings))
        for group, members in asked.items():
            shown = list(islice(images, len(members)))
            groups[group] = cases.judge(members, shown) | cases.controls(engine.vae, members, shown)
            tiles.append(list(map(tile, members[:8], shown, groups[group]["exact"])))
        file = title.replace(", ", "-").replace(" ", "-")
        write_png(args.out / f"{file}.png", sheet(tiles))
        yield title, groups


def copied(args):
    vae = load_vae(SD3)
    for suffix, pairs in GROUPS.items():
        scenes = random_scenes(f"vae{suffix}", args.num, pairs)
        copies = copies_of(vae, list(map(world.render, scenes)))
        right = bits(world.detect(copy) == scene for copy, scene in zip(copies, scenes))
        yield f"VAE{suffix}", {"VAE": {"exact": right}}


def captioned(args):
    lmm = load_lmm(LMM)
    for suffix, pairs in GROUPS.items():
        scenes = random_scenes(f"captions{suffix}", args.num, pairs)
        texts = unified.lmm_captions(lmm, map(world.render, scenes))
        right = bits(text == world.describe(scene) for text, scene in zip(texts, scenes))
        yield f"captions{suffix}", {"captions": {"exact": right}}


def drawn_by_base(args):
    base = Base(args.device)
    guidance = args.guidance or best_guidance(base.generate, ["t2i"], 120)
    for name, alone in (("base", False), (ALONE, True)):
        yield from drawn(args, name, base, "t2i", guidance=guidance, alone=alone)


def drawn_by_engine(args, row, name=None, checkpoint=None):
    engine = DreamEngine.load(SD3, LMM, checkpoint or args.checkpoint, args.device)
    yield from drawn(args, name or row, engine, row, guidance=args.guidance, r=args.blend)


def drawn_by_unialignment(args, row):
    engine = unified.load(args)
    yield from drawn(
        args, f"UniAlignment, {row}", unified.Artist(engine), row, guidance=args.guidance
    )


ROWS = {"vae": copied, "captions": captioned, "base": drawn_by_base}
ROWS["stage1"] = partial(drawn_by_engine, row="t2i", name="stage 1", checkpoint=STAGE1)
ROWS |= {row: partial(drawn_by_engine, row=row) for row in CASES if row not in UNI_ALONE}
for row in ("t2i", "edits", "semgen", *UNI_ALONE):
    ROWS[f"{UNI}-{row}"] = partial(drawn_by_unialignment, row=row)


def tile(case, image, right):
    """What went in and what came out, framed in red where it is wrong, above the words of the prompt."""
    (*inputs, _), text = prompt_row(case.task, case.prompt, image)
    framed = ImageOps.expand(image, 2, "white" if right == "1" else "red")
    row = sheet([[*inputs, framed]], height=128 if not inputs else 80)
    page = Image.new("RGB", (max(row.width, 150), row.height + 52), "white")
    page.paste(row, (0, 0))
    words = textwrap.fill(text.partition(": ")[2], page.width // 6)
    ImageDraw.Draw(page).text((4, row.height), words, "black", font_size=10)
    return page


# ---- what is measured besides -------------------------------------------------------------------


def variety(args, prompts=20, seeds=8):
    """{r: [distinct readings of `seeds` pictures of an open prompt, share of unclear pictures]}."""
    engine = DreamEngine.load(SD3, LMM, args.checkpoint, args.device)
    rng = random.Random(f"variety {STREAM}")
    pairs, result = [rng.sample(SEEN, 2) for _ in range(prompts)], {}
    asked = [[cases.picture(a), " and ", cases.picture(b)] for a, b in pairs]
    for r in RATIOS:
        drawn = (engine.generate([prompt] * seeds, task="objects", r=r) for prompt in asked)
        scenes = [list(map(world.detect, images)) for images in drawn]
        distinct = fmean(len(set(found) - {None}) for found in scenes)
        result[str(r)] = [distinct, fmean(found.count(None) for found in scenes) / seeds]
    return result


def by_steps(args):
    """{Euler steps: [share of text -> image that is right, seconds a picture]}."""
    engine, result = DreamEngine.load(SD3, LMM, args.checkpoint, args.device), {}
    for steps in STEPS:
        start, what = time.perf_counter(), f"{steps} steps"
        exact = score(engine.generate, "t2i", args.num, STREAM, what, steps=steps)["exact"]
        result[str(steps)] = [share(exact), round((time.perf_counter() - start) / len(exact), 4)]
    return result


MEASURES = {"variety": variety, "steps": by_steps, **unified.MEASURES}


# ---- guidance -----------------------------------------------------------------------------------


def best_guidance(generate, rows, n):
    """The guidance at which n cases of each row, of a stream of their own, are drawn best."""
    means = {}
    for guidance in GUIDANCES:
        what, settings = f"guidance {guidance:g}", {"guidance": guidance}
        found = [score(generate, row, n, "guidance", f"{row}, {what}", **settings) for row in rows]
        means[guidance] = fmean(share(checks["exact"]) for checks in found)
    print(markdown_table(["guidance", "score"], [[f"{g:g}", f"{m:.3f}"] for g, m in means.items()]))
    return max(means, key=means.get)


def store_guidance(file, n, device=None):
    """Find it for a checkpoint, and write it there: the default of sample.py."""
    if file.is_dir():
        engine = UniAlignment.load(file, device=device)
        guidance = best_guidance(unified.Artist(engine).generate, ("t2i", "edits"), n)
        engine.sampling = replace(engine.sampling, guidance=guidance)
        engine.half().save(MINI / "transformer")
        return engine.save_frozen(MINI)
    engine = DreamEngine.load(SD3, LMM, file, device)
    config = read_json(file, metadata(file)["config"])
    rows = ("t2i", "copies") if config.get("stage") == 1 else ("t2i", "copies", "edits", "objects")
    config["guidance"] = best_guidance(engine.generate, rows, n)
    tensors = {name: tensor.clone() for name, tensor in read_tensors(file).items()}
    with whole(file) as partial_file:
        save_file(tensors, partial_file, {"config": json.dumps(config)})


# ---- the report ---------------------------------------------------------------------------------


def line(name, checks, ratio=""):
    low, high = interval(checks["exact"])
    cells = [f"{share(checks['exact']):.3f}", f"{low:.3f} - {high:.3f}", ratio]
    cells += [f"{share(checks[control]):.3f}" if control in checks else "" for control in CONTROLS]
    return [name, len(checks["exact"]), *cells]


def totals(rows):
    """{row: {check: bits}}, all groups of a row together."""

    def joined(groups):
        return {name: "".join(group[name] for group in groups) for name in groups[0]}

    return {row: joined(list(groups.values())) for row, groups in rows.items()}


def report(scores):
    """Scores as Markdown tables."""
    total, lines = totals(scores["rows"]), []
    for row, groups in scores["rows"].items():
        beside = row.removesuffix(HELD) if row.endswith(HELD) else "base"
        ratio = ""
        if row.endswith(HELD) or row in ("stage 1", "t2i", "UniAlignment, t2i", ALONE):
            whole_share = share(total[beside]["exact"]) if beside in total else 0
            ratio = f"{share(total[row]['exact']) / whole_share:.2f}" if whole_share else ""
        lines.append(line(f"**{row}**", total[row], ratio))
        lines += [line(name, part) for name, part in groups.items() if len(groups) > 1]
    parts = ["**Right pictures** (`card`)"]
    parts += [markdown_table(["", "n", "score", "95 %", "ratio", *CONTROLS.values()], lines)]
    settings = [f"{k} {v}" for k, v in scores["settings"].items()]
    parts.append(f"({', '.join(settings)})")
    for name, title, columns in (
        ("variety", "**Variety** (`variety`): two pictures, their places left open, 8 seeds each",
         ["r", "distinct readings", "share unclear"]),
        ("steps", "**Euler steps** (`steps`): text -> image", ["steps", "score", "seconds a picture"]),
        ("reading", "**Reading** (`reading`): captions", ["", "exact", "F1 of objects"]),
        ("questions", "**Questions** (`questions`)", ["kind", "right", "most frequent answer"]),
        ("edges", "**Edges** (`edges`)", ["pictures", "F1"]),
        ("own", "**Its own drawings** (`own`)", ["", "caption fits picture", "does not"]),
        ("cost", "**Cost** (`cost`), 16 at a time",
         ["", "million parameters", "seconds a picture", "seconds a caption"]),
        ("parts", "**From nothing** (`parts`)", ["part", "minutes", "score"]),
    ):  # fmt: skip
        rows = [
            [key, *("" if x is None else f"{x:.3g}" for x in values)]
            for key, values in scores.get(name, {}).items()
        ]
        parts += [title, markdown_table(columns, rows)] if rows else []
    return "\n\n".join(parts) + "\n"


def parts_of(run, total):
    """{part: [minutes, score or None]} of a folder of speedrun.sh; what was resumed adds up."""
    rows = {"vae": ["VAE"], "decoder": ["VAE"], "lmm": ["captions"], "base": ["base"],
            "stage1": ["stage 1"], "stage2": ["t2i", "copies", "edits", "objects"],
            UNI: ["UniAlignment, t2i", "UniAlignment, edits"]}  # fmt: skip
    result = {}
    for text in Path(run, "minutes.txt").read_text().splitlines():
        name, minutes = text.split()
        shares = [share(total[row]["exact"]) for row in rows.get(name, []) if row in total]
        if name == "t5":  # has no picture of its own: the share of masked words that it knows
            last = Path(run, "t5.jsonl").read_text().splitlines()[-1]
            shares = [json.loads(last)["masked"]]
        earlier = result.get(name, [0])[0]
        result[name] = [earlier + float(minutes), sum(shares) / len(shares) if shares else None]
    return result | {"sum, two at a time": [sum(minutes for minutes, _ in result.values()), None]}


def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    expected = ", ".join((*ROWS, *MEASURES))
    add = parser.add_argument
    add("rows", nargs="*", metavar="row", help=f"of {expected}; default: all; or: guidance")
    add("--num", type=whole_number(6, 10_000), default=300, help="cases a row")
    add("--checkpoint", default=STAGE2, type=Path)
    add("--unialignment", default=MINI, type=Path, help="its folder")
    add("--guidance", type=number(-1000, 1000), help="default: each checkpoint's own")
    add("--blend", type=number(0, 1), default=0.0, help="r")
    add("--out", default="runs/evaluate", type=Path, help="folder of scores and pictures")
    add("--run", help="folder of speedrun.sh, whose minutes stand in the report")
    add("--device")
    args = parser.parse_args(arguments)
    if args.rows == ["guidance"]:
        return store_guidance(args.checkpoint, args.num, args.device)
    if unknown := set(args.rows) - {*ROWS, *MEASURES}:
        raise UserError(f"unknown row {unknown.pop()!r}: expected some of {expected}, or guidance")
    if args.run and not Path(args.run, "minutes.txt").is_file():
        raise UserError(f"--run {args.run}: expected a folder of speedrun.sh, with its minutes.txt")
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
    write_json(args.out / "scores.json", scores)
    write_text(args.out / "scores.md", text)
    print(text)


if __name__ == "__main__":
    with one_line_errors():
        main()
