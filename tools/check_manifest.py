"""Count the examples of a manifest, name its bad lines, and draw a contact sheet.

python -m tools.check_manifest edits.jsonl    # writes edits.check.png; exit code 1 if a line is bad
"""

import random
import sys

from support.cli import Parser, UserError, one_line_errors, printable

from tqdm import tqdm

from data import Manifest, training_example
from prompts import crop_to
from support.files import prompt_row, sheet, write_png

SIDE = 256  # pixels, to which the images are cropped
SHOWN = 6  # examples of each task on the contact sheet


def main(arguments=None):
    parser = Parser(prog="python -m tools.check_manifest", description=__doc__.splitlines()[0])
    parser.add_argument("manifest", help="a .jsonl file")
    manifest = Manifest(parser.parse_args(arguments).manifest)
    bad_lines, rows = dict(manifest.bad_lines), []
    for task, lines in manifest.by_task.items():
        shown, good, captions = lines[:: max(1, len(lines) // SHOWN)][:SHOWN], 0, 0
        for line in tqdm(lines, task, leave=False):
            try:
                record = manifest.record(line, task)
                if task == "answer":
                    words = [record["question"], record["answer"]]
                    example = task, words, crop_to(record["image"], SIDE, SIDE)
                else:
                    example = training_example(record, (SIDE, SIDE), random.Random(0))
            except (UserError, OSError) as error:
                bad_lines[line] = str(error)
            else:
                good, captions = good + 1, captions + ("caption" in record)
                rows += [prompt_row(*example)] if line in shown else []
        if good:
            with_caption = f", {captions} with the caption that UniAlignment needs"
            print(f"{task}: {good} examples{with_caption * (task == 'edit')}")
    for line in sorted(bad_lines)[:10]:
        print(printable(f"{manifest.name}:{line}: {bad_lines[line]}"))
    print(f"{len(bad_lines)} of {manifest.total} lines are bad")
    if rows:
        picture = manifest.file.with_suffix(".check.png")
        write_png(picture, sheet(rows, 128))
        print(picture)
    if bad_lines:
        sys.exit(1)


if __name__ == "__main__":
    with one_line_errors():
        main()
