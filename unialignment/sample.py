"""Draw, edit, segment and read pictures with UniAlignment.

python -m unialignment.sample --prompt "a blue square above a green ring"
python -m unialignment.sample --image room.png --prompt "make the wall blue"
python -m unialignment.sample --image room.png --prompt "Segment the image."
python -m unialignment.sample --task caption --image room.png     # the text goes to standard output
python -m unialignment.sample --task answer --image room.png --prompt "how many chairs are there?"
"""

import sys
from functools import partial

if not __package__:
    sys.exit("error: start this program as python -m unialignment.sample")

from support.cli import Parser, UserError, one_line_errors, whole_number

from prompts import check_text, read_image
from sample import add_options, draw, load, output_files, read_prompts
from unialignment.model import MINI, UniAlignment

TASKS = {
    "draw": "draw the prompt from the images, if any",
    "caption": "say what each image shows",
    "answer": "answer the prompt, a question about the image",
}
DRAWING, READING = ("guidance", "negative", "size", "out", "compile"), ("order",)  # options


def options():
    parser = Parser(prog="python -m unialignment.sample", description=__doc__.splitlines()[0])
    add = parser.add_argument
    # fmt: off
    tasks = "; ".join(f"{task}: {what}" for task, what in TASKS.items())
    add("--task", choices=TASKS, default="draw", help=f"{tasks}. Default: draw")
    add("--steps", type=whole_number(1, 10**6), help="Euler steps, or steps to fill a text; default: the checkpoint's own")
    add("--negative", help="prompt that guidance moves away from; default: the checkpoint's own")
    add("--order", choices=("sampled", "confident"), help="in which a text is filled; default: the checkpoint's own")
    add_options(parser)
    add("--checkpoint", default=MINI, help="pipeline folder of UniAlignment, published or of training")
    add("--sd3", help="diffusers folder of SD3-medium, for the parts that --checkpoint lacks")
    # fmt: on
    return parser


def parse(arguments=None):
    parser = options()
    args = parser.parse_args(arguments)
    for name in READING if args.task == "draw" else DRAWING:
        if getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name} has no effect with --task {args.task}")
    check_text("".join([*args.prompt, args.negative or ""]))
    return args


def read_questions(args):
    """The images to read and their questions, if any. A single image may have many questions."""
    images, questions = [read_image(path) for path in args.image], args.prompt
    if len(images) == 1:
        images *= max(1, len(questions))
    if not images or len(questions) != len(images) * (args.task == "answer"):
        counts = f"{len(images)} images and {len(questions)} prompts were given"
        takes = {"caption": "images and no prompt", "answer": "an image and a prompt for each"}
        raise UserError(f"task {args.task} takes {takes[args.task]}, but {counts}")
    return [[x for x in many for _ in range(args.num)] for many in (images, questions)]


def main(arguments=None):
    args = parse(arguments)
    load_engine = partial(UniAlignment.load, args.checkpoint, args.sd3)
    if args.task != "draw":
        inputs = read_questions(args)
        texts = load(args, load_engine).answer(*inputs, args.steps, args.order, seed=args.seed)
        print(*(" ".join(text.split()) for text in texts), sep="\n")
        return
    if not all(text.strip() for text in args.prompt or [""]):
        raise UserError("empty prompt: UniAlignment needs a text to draw")
    prompts = read_prompts(args, implied=True)
    files = output_files(args.out, len(prompts) * args.num)
    engine = load(args, load_engine)
    args.guidance = engine.guidance if args.guidance is None else args.guidance
    args.steps = args.steps or engine.sampling.steps
    draw(args, engine, prompts, files, negative=args.negative)


if __name__ == "__main__":
    with one_line_errors():
        main()
