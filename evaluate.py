"""Score the miniature with the exact detector: a picture counts only if it is just what was asked.

    python evaluate.py            # all rows, 300 prompts each

The prompts come from streams that no training and no choice of weights has drawn from. For any
weights, on their own kind of pictures:

    python evaluate.py geneval --metadata evaluation_metadata.jsonl --out pictures
    python evaluate.py geneval-summary results.jsonl
    python evaluate.py reconstruct photographs --blend 0.5
"""

import json
import os
import random
import sys
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

import sample
import shapes
import weights
from cli import Parser, one_line_errors
from data import rendered_reference, sheet, training_example
from dream_engine import LMM, SD3, STAGE2, DreamEngine
from mmdit import load_mmdit
from pretrain import TEXT_ENCODER, TextEncoder, describe_images, draw, encode_text, grid
from prompts import crop_to, read_image, to_images, to_tensor


def scenes(n, stream, held_out=False):
    rng = random.Random(f"closing {stream}")
    kinds = (*shapes.TASKS, "scene")
    return [shapes.sample_scene(kinds[i % 7], rng, held_out) for i in range(n)]


def batches(items, size=50):
    return [items[i : i + size] for i in tqdm(range(0, len(items), size), leave=False)]


def share(flags):
    flags = list(flags)
    return sum(flags) / len(flags)


def score_tasks(draw_texts, n, file):
    """Score of each of the six tasks, n / 6 prompts each; a sheet of the first ten to file."""
    scores, rows = {}, []
    for task, prompts in shapes.benchmark(n // 6, seed="closing").items():
        images = draw_texts([p.text for p in prompts])
        scores[task] = share(shapes.matches(p, shapes.detect(i)) for p, i in zip(prompts, images))
        rows.append(images[:10])
    grid(rows, file)
    return {"mean": share(scores.values()), **scores}


@torch.no_grad()
def score_vae(engine, n, _):
    """Scenes that the VAE gives back exactly; the second figure: scenes of held-out pairs."""
    result = {}
    for name, held_out in (("mean", False), ("held-out pairs", True)):
        wanted, right = scenes(n, "vae", held_out), []
        for part in batches(wanted):
            images = to_tensor([shapes.render(s) for s in part]).to(engine.device)
            copies = to_images(engine.vae.decode(engine.vae.encode(images)))
            right += [shapes.detect(image) == s for image, s in zip(copies, part)]
        result[name] = share(right)
    return result


@torch.no_grad()
def score_captions(engine, n, _):
    """Pictures that the LMM describes without a mistake."""
    lmm = Qwen2VLForConditionalGeneration.from_pretrained(LMM, dtype=torch.float32)
    lmm = lmm.to(engine.device).eval()
    right = []
    for part in batches(scenes(n, "captions")):
        said = describe_images(lmm, engine, [shapes.render(s) for s in part])
        right += [text == shapes.describe(s) for text, s in zip(said, part)]
    return {"mean": share(right)}


def score_base(engine, n, out):
    """The six tasks by the miniature SD3.5 with its own text encoder."""
    tokenizer = AutoTokenizer.from_pretrained(LMM)
    with torch.device("meta"):
        encoder = TextEncoder(len(tokenizer))
    weights.fill(encoder, weights.read(TEXT_ENCODER), TEXT_ENCODER, engine.device, torch.float32)
    base = load_mmdit(SD3, engine.device)  # the engine's own has learnt LoRA

    def condition_of(texts):
        return encode_text(base, encoder, tokenizer, texts)

    return score_tasks(
        lambda texts: draw(base, engine.vae, condition_of, texts), n, out / "base.png"
    )


def score_t2i(engine, n, out):
    """The six tasks through LMM and adapter."""
    return score_tasks(
        lambda texts: engine.generate([[text] for text in texts]), n, out / "t2i.png"
    )


def score_copies(engine, n, out):
    """Pictures copied, by r: exactly, and as a set of objects."""
    wanted, result, rows = scenes(n, "copies"), {}, []
    originals = [shapes.render(s) for s in wanted]
    rows.append(originals[:10])
    for r in (0.0, 0.5, 1.0):
        images = []
        for part in batches(originals):
            images += engine.generate([[image] for image in part], task="i2i", r=r)
        read = [shapes.detect(image) for image in images]
        result[f"exact, r={r}"] = share(a == b for a, b in zip(read, wanted))
        result[f"objects, r={r}"] = share(kinds(a) == kinds(b) for a, b in zip(read, wanted))
        rows.append(images[:10])
    grid(rows, out / "copies.png")
    return result


def kinds(scene):
    return scene and sorted((o.color, o.shape) for o in scene.objects)


def score_edits(engine, n, out):
    """Edits that give exactly the scene asked for: by kind, n / 5 each."""
    rng, result, rows = random.Random("closing edits"), {}, []
    for kind in shapes.EDITS:
        edits, images = [shapes.sample_edit(kind, rng) for _ in range(n // 5)], []
        for part in batches(edits):
            prompts = [[shapes.render(edit.source), edit.text] for edit in part]
            images += engine.generate(prompts, task="edit")
        result[kind] = share(shapes.detect(i) == e.target for i, e in zip(images, edits))
        rows += [[shapes.render(e.source) for e in edits[:10]], images[:10]]
    grid(rows, out / "edits.png")
    return {"mean": share(result.values()), **result}


def score_objects(engine, n, out):
    """Scenes told in words and pictures of their objects, in both templates that do so."""
    rng, right, rows = random.Random("closing objects"), {"objects": [], "combine": []}, []
    for part in batches([shapes.sample_reference(rng) for _ in range(n)]):
        asked = [(told, training_example(rendered_reference(told), (64, 64), rng)) for told in part]
        for task, found in right.items():
            mine = [(told, example) for told, example in asked if example[0] == task]
            if not mine:
                continue
            images = engine.generate([prompt for _, (_, prompt, _) in mine], task=task)
            found += [shapes.matches(t.prompt, shapes.detect(i)) for (t, _), i in zip(mine, images)]
            rows += [[target for _, (_, _, target) in mine[:10]], images[:10]]
    grid(rows[:4], out / "objects.png")
    return {"mean": share(right["objects"] + right["combine"])} | {
        f"as {task}": share(found) for task, found in right.items()
    }


ROWS = {
    "vae": score_vae,
    "captions": score_captions,
    "base": score_base,
    "t2i": score_t2i,
    "copies": score_copies,
    "edits": score_edits,
    "objects": score_objects,
}


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
        print(f"{tag:16} {share(flags):.4f}   n = {len(flags)}")
    print(f"{'mean':16} {share(map(share, by_tag.values())):.4f}")


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


COMMANDS = {"geneval": geneval, "geneval-summary": geneval_summary, "reconstruct": reconstruct}


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    parser = Parser(description="Score the miniature, one line a row.")
    parser.add_argument(
        "rows", nargs="*", metavar="row", help=f"of {', '.join(ROWS)}; default: all"
    )
    parser.add_argument("--num", type=int, default=300, help="prompts a row")
    parser.add_argument("--checkpoint", default=STAGE2)
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--out", default="runs/evaluate", help="folder of scores and pictures")
    parser.add_argument("--device")
    args = parser.parse_args(arguments)
    if unknown := set(args.rows) - set(ROWS):
        raise ValueError(f"unknown row {unknown.pop()!r}: expected some of {', '.join(ROWS)}")
    if args.num < 6:
        raise ValueError(f"--num must be at least 6, got {args.num}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    engine = DreamEngine.load(SD3, LMM, args.checkpoint, args.device)
    engine.generate = partial(engine.generate, guidance=args.guidance)
    results = {}
    for row in args.rows or ROWS:
        results[row] = ROWS[row](engine, args.num, out)
        print(f"{row:9}", ", ".join(f"{k} {v:.3f}" for k, v in results[row].items()), flush=True)
    Path(out, "scores.json").write_text(json.dumps(results, indent=2) + "\n")
    return None


if __name__ == "__main__":
    with one_line_errors():
        main()
