"""Draw pictures from prompts that mix text and images.

    python sample.py --prompt "a red circle left of a blue star"
    python sample.py --prompt "<image> and a blue star" --image dog.png --blend 0.3
    python sample.py --task edit --image room.png --prompt "remove the chair"

Each <image> in the prompts stands for the next --image.
"""

import argparse
import json
import re
from functools import partial
from pathlib import Path

from support.cli import Parser, UserError, number, one_line_errors, whole_number

import torch
from tqdm import tqdm

from dream_engine import LMM, MINI, SD3, STAGE2, DreamEngine
from prompts import TASKS, apply_task, interleave, read_image
from support import fast
from support.files import grid, require_writable, write_png


def size(text):
    """A side, or WIDTHxHEIGHT -> (width, height)."""
    if not re.fullmatch("[0-9]{1,5}(x[0-9]{1,5})?", text.lower()):
        expected = "expected a side such as 1024, or 768x1024; expected sides below 100000"
        raise argparse.ArgumentTypeError(f"{text!r}: {expected}")
    sides = text.lower().split("x")
    return int(sides[0]), int(sides[-1])


def task(text):
    """The name of a task, for argparse."""
    if text in ("caption", "answer"):
        raise argparse.ArgumentTypeError(f"use python -m unialignment.sample --task {text}")
    return text


def add_options(parser):
    """Add the options that both systems' programs for drawing share."""
    add = parser.add_argument
    # fmt: off
    add("--prompt", action="append", default=[],
        help="text, in which each <image> stands for the next --image; several are drawn together")
    add("--image", action="append", default=[], help="an image file, repeatable")
    add("--guidance", type=number(-1000, 1000),
        help="classifier-free guidance, 1 is none; default: the checkpoint's own")
    add("--seed", type=whole_number(0, 2**63 - 1), default=0, help="picture i is drawn from seed + i")
    add("--size", type=size, help="WIDTHxHEIGHT or one side, multiples of 16; default: the model's")
    add("--num", type=whole_number(1, 10_000), default=1, help="pictures of each prompt")
    add("--out", default="sample.png", help="PNG file to write; several pictures also get a grid")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: fp32 on a CPU, else bf16")
    add("--low-memory", action="store_true", help="keep on the device only what every step needs")
    add("--compile", action="store_true", help="torch.compile; pays for many or large pictures")
    # fmt: on


def options():
    parser = Parser(description="Draw pictures from prompts that mix text and images.")
    add = parser.add_argument
    # fmt: off
    tasks = "; ".join(f"{task}: {what}" for task, what in TASKS.items())
    add("--task", type=task, choices=TASKS, help=f"{tasks}. Default: t2i without images, else objects")
    add("--blend", type=number(0, 1), default=0.0, help="r, share of the ViT's features at images, 0 to 1")
    add("--steps", type=whole_number(1, 10**6), default=28, help="Euler steps; default: 28")
    add_options(parser)
    add("--sd3", default=SD3, help="SD3 / SD3.5: single file or diffusers folder")
    add("--lmm", default=LMM, help="Qwen2-VL: Hugging Face folder")
    add("--checkpoint", help="file or run folder of train.py, or the published DreamEngine folder")
    add("--lora-scale", type=number(-100, 100), default=1.0, help="of published LoRA; default: 1")
    add("--positions", choices=("mrope", "arange"), default="mrope", help="of the LMM's tokens")
    # fmt: on
    return parser


def parse(arguments=None):
    args = options().parse_args(arguments)
    if args.checkpoint is None:
        if (args.sd3, args.lmm) != (SD3, LMM):
            raise UserError("--checkpoint is missing: only the miniature's models have a default")
        args.checkpoint = STAGE2
    return args


def read_prompts(args, implied):
    """Make interleaved prompts. implied: images go before a text that has no <image>."""
    images, prompts, texts = [read_image(path) for path in args.image], [], args.prompt or [""]
    for i, text in enumerate(texts, 1):
        if implied and images and "<image>" not in text:
            text = "<image>" * (len(images) if len(texts) == 1 else 1) + text
        count = len(images) if i == len(texts) else text.count("<image>")
        prompts.append(interleave(text, images[:count]))
        images = images[count:]
    return prompts


def output_files(out, count):
    """The files of so many pictures, of several with a grid; UserError unless all can be written."""
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: expected a file name that ends in .png")
    ends = [*(f"-{i}" for i in range(count)), "-grid"] if count > 1 else [""]
    files = [out.with_stem(out.stem + end) for end in ends]
    for file in files:
        require_writable(file, "--out")
    return files


def load(args, load_engine):
    """Load an engine with load_engine(device, dtype), and apply --low-memory and --compile."""
    dtype = args.dtype and getattr(torch, args.dtype)
    device, dtype = fast.device_and_dtype(args.device, dtype)
    engine = load_engine(device="cpu" if args.low_memory else device, dtype=dtype)
    if args.low_memory:
        fast.save_memory(engine, device)
    if args.compile:
        fast.compile_blocks(engine.mmdit)
    return engine


def draw(args, engine, prompts, files, **settings):
    """Draw --num pictures of each prompt and write them, with their settings inside."""
    settings |= {name: getattr(args, name) for name in ("steps", "guidance", "size", "seed")}
    prompts = [prompt for prompt in prompts for _ in range(args.num)]
    with fast.compiling():
        progress = partial(tqdm, desc="drawing", unit="step")
        images = engine.generate(prompts, **settings, progress=progress)
    save(args, images, files)


def save(args, images, files):
    """Write each picture with its prompt, settings and seed inside, and a grid of several."""
    about = {k: v for k, v in vars(args).items() if k not in ("prompt", "seed", "out", "num")}
    about = {k: v for k, v in about.items() if not Path(str(v)).is_relative_to(MINI)}
    about = json.dumps(about, default=str)
    texts = [text for text in args.prompt or [""] for _ in range(args.num)]
    pages = [(image, texts[i], args.seed + i) for i, image in enumerate(images)]
    if len(images) > 1:
        pages.append((grid(images), "\n".join(args.prompt), args.seed))
    for file, (image, text, seed) in zip(files, pages, strict=True):
        write_png(file, image, {"prompt": text, "settings": about, "seed": seed})
        print(file)


def main(arguments=None):
    args = parse(arguments)
    prompts = read_prompts(args, implied=args.task in ("i2i", "edit"))
    for prompt in prompts:
        apply_task(args.task, prompt)  # refuses what does not fit before anything is loaded
    files = output_files(args.out, len(prompts) * args.num)
    more = {"lora_scale": args.lora_scale, "mrope": args.positions == "mrope"}
    engine = load(args, partial(DreamEngine.load, args.sd3, args.lmm, args.checkpoint, **more))
    args.guidance = engine.guidance if args.guidance is None else args.guidance
    draw(args, engine, prompts, files, r=args.blend, task=args.task)


if __name__ == "__main__":
    with one_line_errors():
        main()
