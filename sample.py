"""Draw pictures from prompts of text and images, or read pictures.

    python sample.py --prompt "a red circle left of a blue star"
    python sample.py --prompt "<image> and a blue star" --image dog.png --blend 0.3
    python sample.py --task edit --image room.png --prompt "remove the chair"
    python sample.py --task caption --image room.png
    python sample.py --task answer --image room.png --prompt "how many chairs are there?"

Dream Engine draws unless --engine says unialignment; what is read, UniAlignment prints. Each <image> of the prompts is filled by the next --image.
"""

import argparse
import gc
import json
import math
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
    from prompts import READING, TASKS, apply_task, interleave, read_image
    from support import fast
    from support.files import sheet, write_png
    from unialignment import MINI, UniAlignment
gc.enable()

ENGINES = ("dream-engine", "unialignment")
UNFIT = {  # options of one engine, and of drawing, that mean nothing to the other
    "dream-engine": ("negative", "order"),
    "unialignment": ("blend", "lmm", "lora_scale", "positions"),
    "reading": ("guidance", "negative", "size", "out", "compile"),
    "drawing": ("order",),
}


def size(text):
    """A side, or WIDTHxHEIGHT -> (width, height)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a side such as 1024, or 768x1024")
    if max(map(len, sides)) > 5:
        raise argparse.ArgumentTypeError(f"{text!r}: expected sides below 100000")
    return int(sides[0]), int(sides[-1])


def options():
    parser = Parser(description="Draw pictures from prompts of text and images, or read pictures.")
    add = parser.add_argument
    add(
        "--prompt",
        action="append",
        default=[],
        help="text, each <image> in it stands for the next --image; several are drawn together",
    )
    add("--image", action="append", default=[], help="an image file; may be given several times")
    known = TASKS | READING
    tasks = "; ".join(f"{task}: {what}" for task, what in known.items())
    add("--task", choices=known, help=f"{tasks}. Default: t2i without images, objects with")
    add("--engine", choices=ENGINES, help="default: dream-engine to draw, unialignment to read")
    add(
        "--blend", type=number(0, 1), default=0.0, help="r: share of ViT features at images, 0 to 1"
    )
    add("--steps", type=whole_number(1, 10**6), help="of Euler, default: 28; or to fill in a text")
    add(
        "--guidance",
        type=number(-1000, 1000),
        help="classifier-free guidance, 1 is none; default: 4.5, or UniAlignment's own",
    )
    add("--negative", help="what guidance moves away from; default: UniAlignment's own")
    add("--order", choices=("sampled", "confident"), help="of the words that are read")
    add(
        "--seed",
        type=whole_number(0, 2**63 - 1),
        default=0,
        help="picture i is drawn from seed + i",
    )
    add("--size", type=size, help="WIDTHxHEIGHT or one side, multiples of 16; default: the model's")
    add("--num", type=whole_number(1, 10_000), default=1, help="pictures of each prompt")
    add("--out", default="sample.png", help="PNG file to write; of several pictures also a grid")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: fp32 on CPU, else bf16",
    )
    add(
        "--low-memory",
        action="store_true",
        help="on the device only what every step needs: two thirds of SD3.5, nothing of the LMM",
    )
    add("--compile", action="store_true", help="torch.compile; pays for many or large pictures")
    add("--sd3", default=SD3, help="SD3 / SD3.5: single file or diffusers folder")
    add("--lmm", default=LMM, help="Qwen2-VL: Hugging Face folder")
    add("--checkpoint", help="of train.py, or folder of the published DreamEngine or UniAlignment")
    add(
        "--lora-scale",
        type=number(-100, 100),
        default=1.0,
        help="for a published checkpoint: 1 or 2",
    )
    add("--positions", choices=("mrope", "arange"), default="mrope", help="of the LMM's tokens")
    return parser  # fmt: skip


def parse(arguments=None):
    parser = options()
    args = parser.parse_args(arguments)
    work = "reading" if args.task in READING else "drawing"
    args.engine = args.engine or ENGINES[work == "reading"]
    for what in (args.engine, work):
        for name in UNFIT[what]:
            if getattr(args, name) != parser.get_default(name):
                raise UserError(f"--{name.replace('_', '-')} has no effect with {what}")
    if args.engine == "unialignment":
        args.sd3 = None if args.sd3 == SD3 else args.sd3
        args.checkpoint = args.checkpoint or MINI
        if args.task in ("i2i", "objects"):
            raise UserError(f"UniAlignment knows no task {args.task}: t2i, edit, combine or none")
        return args
    if work == "reading":
        raise UserError(f"task {args.task} needs --engine unialignment: Dream Engine reads nothing")
    args.steps, args.guidance = args.steps or 28, 4.5 if args.guidance is None else args.guidance
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
    texts, uni = args.prompt or [""], args.engine == "unialignment"
    for i, text in enumerate(texts):
        if (uni or args.task in ("i2i", "edit")) and images and "<image>" not in text:
            text = "<image>" * (len(images) if uni and len(texts) == 1 else 1) + text
        count = len(images) if i + 1 == len(texts) else text.count("<image>")
        prompts.append(interleave(text, images[:count]))
        images = images[count:]
        # Refuses what does not fit before anything is loaded
        apply_task("objects" if uni and count and args.task != "edit" else args.task, prompts[-1])
    return prompts


def read_questions(args):
    """The images to read and a question about each, or None; one image may have many questions."""
    images, questions = [read_image(path) for path in args.image], args.prompt
    if not images:
        raise UserError(f"task {args.task} needs an --image")
    if args.task == "caption" and questions:
        raise UserError("task caption takes no --prompt; task answer does")
    if args.task == "answer":
        images = images * len(questions) if len(images) == 1 < len(questions) else images
        if not questions or len(images) != len(questions):
            counts = f"{len(questions)} prompts for {len(images)} images"
            raise UserError(f"task answer takes a --prompt for each image, but there are {counts}")
    return images, questions or None


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
    first = "cpu" if args.low_memory else device
    if args.engine == "unialignment":
        engine = UniAlignment.load(args.checkpoint, args.sd3, first, dtype)
    else:
        engine = DreamEngine.load(
            args.sd3, args.lmm, args.checkpoint, first, dtype,
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
    miniature = (SD3, LMM, STAGE2, MINI)  # where it lies is nobody's business
    settings = {k: v for k, v in vars(args).items() if k not in hidden and v not in miniature}
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
        columns = math.ceil(math.sqrt(len(images)))
        rows = [images[i : i + columns] for i in range(0, len(images), columns)]
        about = {"prompt": "\n".join(args.prompt), "settings": settings, "seed": args.seed}
        file = out.with_stem(f"{out.stem}-grid")
        write_png(file, sheet(rows, gap=0), about)
        print(file)


def read(args):
    """Print what is read in each picture, a line for each of --num tries."""
    images, questions = read_questions(args)
    images = [image for image in images for _ in range(args.num)]
    questions = questions and [question for question in questions for _ in range(args.num)]
    engine = load(args)
    texts = engine.answer(images, questions, args.steps, args.order, seed=args.seed)
    print(*(" ".join(text.split()) for text in texts), sep="\n")


def main(arguments=None):
    args = parse(arguments)
    if args.task in READING:
        return read(args)
    prompts, out = read_prompts(args), writable(args.out)
    engine = load(args)
    bar = partial(tqdm, desc="drawing", unit="step")
    prompts = [prompt for prompt in prompts for _ in range(args.num)]
    settings = {"size": args.size, "seed": args.seed, "progress": bar}
    if args.engine == "unialignment":
        args.steps = args.steps or engine.sampling.steps
        args.guidance = engine.sampling.guidance if args.guidance is None else args.guidance
        settings["negative"] = args.negative
    else:
        settings |= {"r": args.blend, "task": args.task}
    with fast.compiling() if args.compile else nullcontext():
        images = engine.generate(prompts, steps=args.steps, guidance=args.guidance, **settings)
    return save(args, images, out)


if __name__ == "__main__":
    with one_line_errors():
        main()
