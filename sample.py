"""Draw pictures from prompts of text and images, or read pictures.

    python sample.py --prompt "a red circle left of a blue star"
    python sample.py --prompt "<image> and a blue star" --image dog.png --blend 0.3
    python sample.py --task edit --image room.png --prompt "remove the chair"
    python sample.py --task caption --image room.png       # the text goes to standard output
    python sample.py --task edit --engine unialignment --image room.png --prompt "Segment the image."

Each <image> of the prompts is filled by the next --image.
"""

import argparse
import gc
import json
import os
import re
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
    from support.files import grid, write_png
    from unialignment.model import MINI, UniAlignment
gc.enable()

UNI = "unialignment"
UNFIT = {  # options that mean nothing to an engine, or for what it does
    "dream-engine": ("negative", "order"),
    UNI: ("blend", "lmm", "lora_scale", "positions"),
    "reading": ("guidance", "negative", "size", "out", "compile"),
    "drawing": ("order",),
}


def size(text):
    """A side, or WIDTHxHEIGHT -> (width, height)."""
    if not re.fullmatch("[0-9]{1,5}(x[0-9]{1,5})?", text.lower()):
        expected = "expected a side such as 1024, or 768x1024; expected sides below 100000"
        raise argparse.ArgumentTypeError(f"{text!r}: {expected}")
    sides = text.lower().split("x")
    return int(sides[0]), int(sides[-1])


def options():
    parser = Parser(description="Draw pictures from text and images, or read pictures.")
    add = parser.add_argument
    # fmt: off
    add("--prompt", action="append", default=[],
        help="text, each <image> in it stands for the next --image; several are drawn together")
    add("--image", action="append", default=[], help="an image file; may be given several times")
    tasks = "; ".join(f"{task}: {what}" for task, what in (TASKS | READING).items())
    add("--engine", choices=("dream-engine", UNI), help="default: the second to read, else the first")
    add("--task", choices=TASKS | READING, help=f"{tasks}. Default: t2i without images, objects with")
    add("--blend", type=number(0, 1), default=0.0, help="r: share of ViT features at images, 0 to 1")
    add("--steps", type=whole_number(1, 10**6), help="of Euler, default: 28; or to read a text")
    add("--guidance", type=number(-1000, 1000),
        help="classifier-free guidance, 1 is none; default: the checkpoint's own")
    add("--negative", help="what guidance moves away from; default: UniAlignment's own")
    add("--order", choices=("sampled", "confident"), help="in which words are read")
    add("--seed", type=whole_number(0, 2**63 - 1), default=0, help="picture i is of seed + i")
    add("--size", type=size, help="WIDTHxHEIGHT or one side, multiples of 16; default: the model's")
    add("--num", type=whole_number(1, 10_000), default=1, help="pictures of each prompt")
    add("--out", default="sample.png", help="PNG file to write; of several pictures also a grid")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: fp32 on CPU, else bf16")
    add("--low-memory", action="store_true", help="on the device only what every step needs")
    add("--compile", action="store_true", help="torch.compile; pays for many or large pictures")
    add("--sd3", default=SD3, help="SD3 / SD3.5: single file or diffusers folder")
    add("--lmm", default=LMM, help="Qwen2-VL: Hugging Face folder")
    add("--checkpoint", help="of train.py, or folder of the published DreamEngine or UniAlignment")
    add("--lora-scale", type=number(-100, 100), default=1.0, help="of published weights: 1 or 2")
    add("--positions", choices=("mrope", "arange"), default="mrope", help="of the LMM's tokens")
    # fmt: on
    return parser


def parse(arguments=None):
    parser = options()
    args = parser.parse_args(arguments)
    work = "reading" if args.task in READING else "drawing"
    args.engine = args.engine or (UNI if work == "reading" else "dream-engine")
    for what in (args.engine, work):
        for name in UNFIT[what]:
            if getattr(args, name) != parser.get_default(name):
                raise UserError(f"--{name.replace('_', '-')} has no effect with {what}")
    if args.engine == UNI:
        if args.task in ("i2i", "combine", "objects"):
            raise UserError(f"UniAlignment knows no task {args.task}: t2i, edit, caption, answer")
        args.sd3, args.checkpoint = args.sd3 if args.sd3 != SD3 else None, args.checkpoint or MINI
        return args
    if work == "reading":
        raise UserError(f"task {args.task} needs --engine unialignment: Dream Engine reads nothing")
    args.steps = args.steps or 28
    if args.checkpoint is None:
        if (args.sd3, args.lmm) != (SD3, LMM):
            raise UserError("--checkpoint is missing: other models than the mini need their own")
        args.checkpoint = STAGE2
    return args


def read_prompts(args):
    """The interleaved prompts; tasks on one image need no placeholder for it."""
    images, prompts = [read_image(path) for path in args.image], []
    texts, uni = args.prompt or [""], args.engine == UNI
    for i, text in enumerate(texts):
        if (uni or args.task in ("i2i", "edit")) and images and "<image>" not in text:
            text = "<image>" * (len(images) if uni and len(texts) == 1 else 1) + text
        count = len(images) if i + 1 == len(texts) else text.count("<image>")
        prompts.append(interleave(text, images[:count]))
        images = images[count:]
        if args.task or not uni:  # refuses what does not fit before anything is loaded
            apply_task(args.task, prompts[-1])
    return prompts


def read_questions(args):
    """Images to read and a question about each, or None, --num times; one image may have many questions."""
    images, questions = [read_image(path) for path in args.image], args.prompt
    if len(images) == 1:
        images *= max(1, len(questions))
    if not images or len(questions) != len(images) * (args.task == "answer"):
        counts = f"{len(images)} images and {len(questions)} prompts were given"
        takes = {"caption": "images and no prompt", "answer": "an image and a prompt for each"}
        raise UserError(f"task {args.task} takes {takes[args.task]}, but {counts}")
    images, questions = ([x for x in many for _ in range(args.num)] for many in (images, questions))
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
    dtype = args.dtype and getattr(torch, args.dtype)
    device, dtype = fast.device_and_dtype(args.device, dtype)
    first = "cpu" if args.low_memory else device
    if args.engine == UNI:
        engine = UniAlignment.load(args.checkpoint, args.sd3, first, dtype)
    else:
        options = {"lora_scale": args.lora_scale, "mrope": args.positions == "mrope"}
        engine = DreamEngine.load(args.sd3, args.lmm, args.checkpoint, first, dtype, **options)
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
    pages = [(f"-{i}", image, texts[i], args.seed + i) for i, image in enumerate(images)]
    if len(images) > 1:
        pages.append(("-grid", grid(images), "\n".join(args.prompt), args.seed))
    for name, image, text, seed in pages:
        file = out if len(pages) == 1 else out.with_stem(f"{out.stem}{name}")
        write_png(file, image, {"prompt": text, "settings": settings, "seed": seed})
        print(file)


def main(arguments=None):
    args = parse(arguments)
    if args.task in READING:
        images, questions = read_questions(args)
        texts = load(args).answer(images, questions, args.steps, args.order, seed=args.seed)
        print(*(" ".join(text.split()) for text in texts), sep="\n")
        return
    prompts, out = read_prompts(args), writable(args.out)
    prompts = [prompt for prompt in prompts for _ in range(args.num)]
    engine = load(args)
    args.guidance = engine.guidance if args.guidance is None else args.guidance
    if args.engine == UNI:
        args.steps = args.steps or engine.sampling.steps
        options = {"negative": args.negative}
    else:
        options = {"r": args.blend, "task": args.task}
    options |= {name: getattr(args, name) for name in ("steps", "guidance", "size", "seed")}
    with fast.compiling():
        bar = partial(tqdm, desc="drawing", unit="step")
        save(args, engine.generate(prompts, **options, progress=bar), out)


if __name__ == "__main__":
    with one_line_errors():
        main()
