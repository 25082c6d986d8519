"""Draw pictures from prompts of text and images.

    python sample.py --prompt "a red circle left of a blue star"
    python sample.py --prompt "<image> and a blue star" --image dog.png --blend 0.3
    python sample.py --task edit --image room.png --prompt "remove the chair"

Each <image> of the prompts is filled by the next --image.
"""

import argparse
import gc
import json
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from support.cli import Parser, UserError, number, one_line_errors, whole_number

gc.disable()  # imports leave hardly any garbage; looking for it takes a tenth of their time
with one_line_errors():  # these take seconds, in which someone may press Ctrl-C
    import torch
    from tqdm import tqdm

    from dream_engine import LMM, SD3, STAGE2, DreamEngine
    from prompts import TASKS, apply_task, interleave, read_image
    from support import fast
    from support.files import grid, write_png
gc.enable()


def size(text):
    """A side, or WIDTHxHEIGHT -> (width, height)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a side such as 1024, or 768x1024")
    if max(map(len, sides)) > 5:
        raise argparse.ArgumentTypeError(f"{text!r}: expected sides below 100000")
    return int(sides[0]), int(sides[-1])


def options():
    parser = Parser(description="Draw pictures from prompts of text and images.")
    add = parser.add_argument
    # fmt: off
    add("--prompt", action="append", default=[],
        help="text, each <image> in it stands for the next --image; several are drawn together")
    add("--image", action="append", default=[], help="an image file; may be given several times")
    tasks = "; ".join(f"{task}: {what}" for task, what in TASKS.items())
    add("--task", choices=TASKS, help=f"{tasks}. Default: t2i without images, objects with")
    add("--blend", type=number(0, 1), default=0.0, help="r: share of ViT features at images, 0 to 1")
    add("--steps", type=whole_number(1, 10**6), default=28, help="Euler steps")
    add("--guidance", type=number(-1000, 1000),
        help="classifier-free guidance; 1 is none; default: the checkpoint's own, or else 4.5")
    add("--seed", type=whole_number(0, 2**63 - 1), default=0,
        help="picture i is drawn from seed + i")
    add("--size", type=size, help="WIDTHxHEIGHT or one side, multiples of 16; default: the model's")
    add("--num", type=whole_number(1, 10_000), default=1, help="pictures of each prompt")
    add("--out", default="sample.png", help="PNG file to write; of several pictures also a grid")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="default: fp32 on CPU, else bf16")
    add("--low-memory", action="store_true",
        help="on the device only what every step needs: two thirds of SD3.5, nothing of the LMM")
    add("--compile", action="store_true", help="torch.compile; pays for many or large pictures")
    add("--sd3", default=SD3, help="SD3 / SD3.5: single file or diffusers folder")
    add("--lmm", default=LMM, help="Qwen2-VL: Hugging Face folder")
    add("--checkpoint", help="file of train.py, or folder of the published DreamEngine")
    add("--lora-scale", type=number(-100, 100), default=1.0,
        help="for a published checkpoint: 1 or 2")
    add("--positions", choices=("mrope", "arange"), default="mrope", help="of the LMM's tokens")
    # fmt: on
    return parser


def parse(arguments=None):
    args = options().parse_args(arguments)
    if args.checkpoint is None:
        if (args.sd3, args.lmm) != (SD3, LMM):
            raise UserError(
                "--checkpoint is missing: other models than the miniature need their own"
            )
        args.checkpoint = STAGE2
    return args


def read_prompts(args):
    """The interleaved prompts; tasks on one image need no placeholder for it."""
    images, prompts = [read_image(path) for path in args.image], []
    texts = args.prompt or [""]
    for i, text in enumerate(texts):
        if args.task in ("i2i", "edit") and images and "<image>" not in text:
            text = "<image>" + text
        count = len(images) if i + 1 == len(texts) else text.count("<image>")
        prompts.append(interleave(text, images[:count]))
        images = images[count:]
        apply_task(args.task, prompts[-1])  # refuses what does not fit before anything is loaded
    return prompts


def writable(file):
    """The path of a PNG that can be written there; its folder is made."""
    file = Path(file)
    if file.suffix.lower() != ".png":
        raise UserError(f"--out {file}: expected a file name that ends in .png")
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"--out {file}: cannot be written there")
    return file


def load(args):
    device, dtype = fast.usable_device(args.device), args.dtype and getattr(torch, args.dtype)
    if args.low_memory and dtype is None and device.type != "cpu":
        dtype = torch.bfloat16
    engine = DreamEngine.load(
        args.sd3, args.lmm, args.checkpoint, "cpu" if args.low_memory else device, dtype,
        lora_scale=args.lora_scale, mrope=args.positions == "mrope",
    )  # fmt: skip
    if args.low_memory:
        fast.save_memory(engine, device)
    if args.compile:
        fast.compile_blocks(engine.mmdit)
    return engine


def save(args, images, out):
    """Write each picture, its prompt, settings and seed inside, and a grid of several."""
    hidden = ("prompt", "seed", "out", "num")
    settings = {k: v for k, v in vars(args).items() if k not in hidden}
    for name, default in (("sd3", SD3), ("lmm", LMM), ("checkpoint", STAGE2)):
        if settings[name] == default:  # where the miniature lies is nobody's business
            del settings[name]
    settings = json.dumps(settings, default=str)
    texts = [text for text in args.prompt or [""] for _ in range(args.num)]
    files = (
        [out]
        if len(images) == 1
        else [out.with_stem(f"{out.stem}-{i}") for i in range(len(images))]
    )
    for i, (file, image, text) in enumerate(zip(files, images, texts)):
        write_png(file, image, {"prompt": text, "settings": settings, "seed": args.seed + i})
        print(file)
    if len(images) > 1:
        about = {"prompt": "\n".join(args.prompt), "settings": settings, "seed": args.seed}
        file = out.with_stem(f"{out.stem}-grid")
        write_png(file, grid(images), about)
        print(file)


def main(arguments=None):
    args = parse(arguments)
    prompts, out = read_prompts(args), writable(args.out)
    engine = load(args)
    args.guidance = engine.guidance if args.guidance is None else args.guidance
    with fast.compiling() if args.compile else nullcontext():
        images = engine.generate(
            [prompt for prompt in prompts for _ in range(args.num)],
            args.steps, args.guidance, args.blend, args.size,
            seed=args.seed, task=args.task, progress=partial(tqdm, desc="drawing", unit="step"),
        )  # fmt: skip
    save(args, images, out)


if __name__ == "__main__":
    with one_line_errors():
        main()
