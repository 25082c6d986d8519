"""Score the miniature with the exact detector: a picture counts only if it is just what was asked.

    python evaluate.py            # all rows, 300 prompts each

The prompts come from streams that no training and no choice of weights has drawn from.
"""

import json
import random
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

import shapes
import weights
from cli import Parser, one_line_errors
from data import rendered_reference, training_example
from dream_engine import LMM, SD3, STAGE2, DreamEngine
from mmdit import load_mmdit
from pretrain import TEXT_ENCODER, TextEncoder, describe_images, draw, encode_text, grid
from prompts import to_images, to_tensor


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


def main():
    parser = Parser(description="Score the miniature, one line a row.")
    parser.add_argument(
        "rows", nargs="*", metavar="row", help=f"of {', '.join(ROWS)}; default: all"
    )
    parser.add_argument("--num", type=int, default=300, help="prompts a row")
    parser.add_argument("--checkpoint", default=STAGE2)
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--out", default="runs/evaluate", help="folder of scores and pictures")
    parser.add_argument("--device")
    args = parser.parse_args()
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


if __name__ == "__main__":
    with one_line_errors():
        main()
