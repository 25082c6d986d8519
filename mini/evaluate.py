"""Score the miniature with the exact detector: a picture counts only if it is just what was asked.

python -m mini.evaluate            # 300 cases a row; also: evaluate scores, evaluate t2i copies
python -m mini.evaluate claims     # train, score and compare: the paper's claims and questions
"""

import sys
from itertools import chain, islice
from pathlib import Path

import torch
from tqdm import tqdm

from dream_engine import LMM, SD3, STAGE2, DreamEngine
from mini import claims, world
from mini.cases import CASES, STREAM, bits, controls, draw, interval, judge, share
from mini.pretrain import describe_images
from support.cli import Parser, UserError, number, one_line_errors, whole_number
from support.files import sheet, table, write_json, write_png, write_text

ROWS = (*CASES, "captions")
CONTROLS = {  # name: column of the report
    "renders": "true pictures",
    "VAE": "their VAE copies",
    "shuffled": "other case's",
    "unedited": "unedited",
}


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
                if row != "t2i":  # there a prompt has many right pictures
                    lines.append([case.source or world.render(case.target) for case in cases[:10]])
                lines.append(images[:10])
            file = out / f"{name.replace(', ', '-').replace(' ', '-')}.png"
            write_png(file, sheet(lines, height=128))
            yield name, groups


@torch.no_grad()
def score_captions(engine, n):
    """How many pictures the LMM describes without a mistake."""
    scenes, captions = [case.target for case in CASES["copies"](n, STREAM)["copy"]], []
    for i in tqdm(range(0, n, 50), "captions", leave=False):
        captions += describe_images(engine.lmm, [world.render(s) for s in scenes[i : i + 50]])
    right = bits(text == world.describe(s) for text, s in zip(captions, scenes))
    return {"caption": {"exact": right}}


def report(scores):
    """Scores as a Markdown table."""
    rows = []
    for row, groups in scores["rows"].items():
        checks = next(iter(groups.values()))
        total = {name: "".join(group[name] for group in groups.values()) for name in checks}
        parts = groups if len(groups) > 1 else {}
        rows += [line(name, part) for name, part in {f"**{row}**": total, **parts}.items()]
    settings = ", ".join(f"{k} {v}" for k, v in scores["settings"].items())
    return f"{table(['', 'n', 'score', '95 %', *CONTROLS.values()], rows)}\n\n({settings})\n"


def line(name, checks):
    low, high = interval(checks["exact"])
    score = [f"{share(checks['exact']):.3f}", f"{low:.3f} - {high:.3f}"]
    score += [f"{share(checks[name]):.3f}" if name in checks else "" for name in CONTROLS]
    return [name, len(checks["exact"]), *score]


# ---- the command line ---------------------------------------------------------------------------


def add_options(parser):
    add = parser.add_argument
    add("rows", nargs="*", metavar="row", help=f"of {', '.join(ROWS)}; default: all")
    add("--num", type=whole_number(6, 10_000), default=300, help="cases a row")
    add("--checkpoint", default=STAGE2)
    add("--guidance", type=number(-1000, 1000), default=4.5)
    add("--blend", type=number(0, 1), default=0.0, help="r")
    add("--out", default="runs/evaluate", help="folder of scores.json, scores.md and pictures")
    add("--device")


def score(args):
    """Score the miniature."""
    if unknown := set(args.rows) - set(ROWS):
        raise UserError(f"unknown row {unknown.pop()!r}: expected some of {', '.join(ROWS)}")
    out, rows = Path(args.out), args.rows or ROWS
    out.mkdir(parents=True, exist_ok=True)
    engine = DreamEngine.load(SD3, LMM, args.checkpoint, args.device)
    engine.check(28, args.guidance, args.blend, world.SIZE, world.SIZE)
    results, drawn = {}, [row for row in rows if row in CASES]
    settings = {"guidance": args.guidance, "r": args.blend}
    for name, groups in score_rows(engine, drawn, args.num, out, **settings):
        results[name] = groups
        exact = "".join(group["exact"] for group in groups.values())
        print(f"{name:24} {share(exact):.3f}", flush=True)
    if "captions" in rows:
        results["captions"] = score_captions(engine, args.num)
    settings = {"checkpoint": Path(args.checkpoint).name, **settings}
    settings |= {"steps": 28, "cases and noise from seed": STREAM}
    scores = {"settings": settings, "rows": results}
    write_json(out / "scores.json", scores)
    write_text(out / "scores.md", report(scores))
    print(report(scores))


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = Parser(prog="python -m mini.evaluate", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(title="commands, scores if none is named", metavar="command")
    for name, module_options, run, what in (
        ("scores", add_options, score, "score pictures and captions, by default 300 of each kind"),
        ("claims", claims.add_options, claims.main, "train, score and compare for each claim"),
    ):
        command = commands.add_parser(name, description=f"{what.capitalize()}.", help=what)
        module_options(command)
        command.set_defaults(run=run)
    if not arguments or arguments[0] not in (*commands.choices, "-h", "--help"):
        arguments = ["scores", *arguments]
    args = parser.parse_args(arguments)
    args.run(args)


if __name__ == "__main__":
    with one_line_errors():
        main()
