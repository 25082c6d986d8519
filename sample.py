"""Draw pictures from prompts of text and images.

    python sample.py --prompt "a red circle left of a blue star"
    python sample.py --prompt "<image> and a blue star" --image dog.png --blend 0.3
    python sample.py --task edit --image room.png --prompt "remove the chair"

Each <image> of the prompts is filled by the next --image.
"""

import argparse
import gc
import json
import math
import os
from functools import partial
from pathlib import Path

from cli import Parser, one_line_errors

gc.disable()  # imports leave hardly any garbage; looking for it takes a tenth of their time
with one_line_errors():  # these take seconds, in which someone may press Ctrl-C
    import torch
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    from tqdm import tqdm

    from dream_engine import LMM, SD3, STAGE2, DreamEngine
    from prompts import TASKS, apply_task, interleave, read_image
gc.enable()


def size(text):
    """A side, or WIDTHxHEIGHT -> (width, height)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a side such as 1024, or 768x1024")
    return int(sides[0]), int(sides[-1])


def parse(arguments=None):
    parser = Parser(description="Draw pictures from prompts of text and images.")
    add = parser.add_argument
    add(
        "--prompt",
        action="append",
        default=[],
        help="text, each <image> in it stands for the next --image; several are drawn together",
    )
    add("--image", action="append", default=[], help="an image file; may be given several times")
    tasks = "; ".join(f"{task}: {what}" for task, what in TASKS.items())
    add("--task", choices=TASKS, help=f"{tasks}. Default: t2i without images, objects with")
    add("--blend", type=float, default=0.0, help="r: share of ViT features at images, 0 to 1")
    add("--steps", type=int, default=28, help="Euler steps")
    add("--guidance", type=float, default=4.5, help="classifier-free guidance; 1 is none")
    add("--null-guidance", type=float, default=1.0,
        help="of what the null prompt still holds, the picture of an edit; 1.5 may help edits")  # fmt: skip
    add("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"),
        help="the noise levels t that are guided; at others the prompt alone is at work, in half the time")  # fmt: skip
    add("--seed", type=int, default=0, help="picture i is drawn from seed + i")
    add("--size", type=size, help="WIDTHxHEIGHT or one side, multiples of 16; default: the model's")
    add("--num", type=int, default=1, help="pictures of each prompt")
    add("--out", default="sample.png", help="PNG file to write; of several pictures also a grid")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: fp32 on CPU, else bf16",
    )
    add("--low-memory", action="store_true",
        help="on the device only what every step needs: two thirds of SD3.5, nothing of the LMM")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile; pays for many or large pictures")
    add("--sd3", default=SD3, help="SD3 / SD3.5: single file or diffusers folder")
    add("--lmm", default=LMM, help="Qwen2-VL: Hugging Face folder")
    add("--checkpoint", help="file of train.py, or folder of the published DreamEngine")
    add("--lora-scale", type=float, default=1.0, help="for a published checkpoint: 1 or 2")
    add("--positions", choices=("mrope", "arange"), default="mrope", help="of the LMM's tokens")
    args = parser.parse_args(arguments)
    if args.num < 1:
        raise ValueError(f"--num must be at least 1, got {args.num}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be between 0 and 2**63 - 1, got {args.seed}")
    if args.checkpoint is None:
        if (args.sd3, args.lmm) != (SD3, LMM):
            raise ValueError(
                "--checkpoint is missing: other models than the miniature need their own"
            )
        args.checkpoint = STAGE2
    return args


def read_prompts(args):
    """The interleaved prompts; tasks on one image need no placeholder for it."""
    images, prompts = [read_image(path) for path in args.image], []
    texts = args.prompt or [""]
    for text in texts:
        if args.task in ("i2i", "edit") and images and "<image>" not in text:
            text = "<image>" + text
        count = text.count("<image>")
        is_last = len(prompts) + 1 == len(texts)
        mine, images = (images, []) if is_last else (images[:count], images[count:])
        prompts.append(interleave(text, mine))
        apply_task(args.task, prompts[-1])  # refuses what does not fit before anything is loaded
    return prompts


def writable(file):
    """The path of a PNG that can be written there; its folder is made."""
    file = Path(file)
    if file.suffix.lower() != ".png":
        raise ValueError(f"--out {file}: expected a file name that ends in .png")
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise PermissionError(f"--out {file}: cannot be written there")
    return file


def save(image, file, facts):
    """Write a PNG whose text holds facts, whole or not at all -> its path."""
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, str(value))
    unfinished = file.with_name(f".{file.name}.partial")
    image.save(unfinished, "PNG", pnginfo=info)
    os.replace(unfinished, file)
    return file


def grid(images):
    """One picture of all images, row by row, about as wide as high."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "gray")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def main(arguments=None):
    args = parse(arguments)
    prompts, out = read_prompts(args), writable(args.out)
    engine = DreamEngine.load(
        args.sd3,
        args.lmm,
        args.checkpoint,
        args.device,
        args.dtype and getattr(torch, args.dtype),
        args.lora_scale,
        mrope=args.positions == "mrope",
        low_memory=args.low_memory,
        compile=args.compile,
    )
    images = engine.generate(
        [prompt for prompt in prompts for _ in range(args.num)],
        args.steps,
        args.guidance,
        args.blend,
        args.size,
        args.seed,
        args.task,
        partial(tqdm, desc="drawing", unit="step"),
        args.null_guidance,
        args.guidance_interval,
    )
    hidden = ("prompt", "seed", "out", "num")
    settings = json.dumps({k: v for k, v in vars(args).items() if k not in hidden}, default=str)
    texts = [text for text in args.prompt or [""] for _ in range(args.num)]
    for i, (image, text) in enumerate(zip(images, texts)):
        file = out if len(images) == 1 else out.with_stem(f"{out.stem}-{i}")
        print(save(image, file, {"prompt": text, "settings": settings, "seed": args.seed + i}))
    if len(images) > 1:
        facts = {"prompt": "\n".join(args.prompt), "settings": settings, "seed": args.seed}
        print(save(grid(images), out.with_stem(f"{out.stem}-grid"), facts))


if __name__ == "__main__":
    with one_line_errors():
        main()
