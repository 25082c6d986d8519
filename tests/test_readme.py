"""What the README says and shows is what the programs wrote."""

import json
import re
import shlex
from pathlib import Path

from PIL import Image

import bench
import claims
import evaluate
import sample

ROOT = Path(claims.__file__).parent
README = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_committed_results():
    reports = {"scores": evaluate.report, "claims": claims.report, "bench": bench.report}
    for name, report in reports.items():
        results = json.loads((ROOT / "results" / f"{name}.json").read_text())
        assert report(results) == (ROOT / "results" / f"{name}.md").read_text()
        assert report(results).strip() in README


def test_numbers_in_words_are_those_of_the_tables():
    words = README[README.index("## Scores") : README.index("### Any weights")]
    tables = ""
    for name in ("scores", "claims"):
        table = (ROOT / "results" / f"{name}.md").read_text()
        words, tables = words.replace(table.strip(), ""), tables + table
    said, known = (set(re.findall(r"\b[01]\.\d\d+\b", text)) for text in (words, tables))
    assert said and said <= known


def test_pictures_of_the_gallery_were_drawn_by_the_commands_below_them():
    gallery = README[README.index("## Gallery") : README.index("## The way of the data")]
    commands = re.findall(r"^python sample\.py (.*)$", gallery, re.MULTILINE)
    drawn = {args.out: args for args in (sample.parse(shlex.split(c)) for c in commands)}
    for file in set(re.findall(r'src="(gallery/[^"]+)"', gallery)) - drawn.keys():
        assert Image.open(ROOT / file).size == (16, 16)  # a portrait, not drawn by the model
    for file, args in drawn.items():
        about = Image.open(ROOT / file).text
        settings = json.loads(about["settings"])
        assert about["prompt"] == "".join(args.prompt) and about["seed"] == str(args.seed)
        names = ("image", "task", "blend", "steps", "guidance", "size")
        assert {n: settings[n] for n in names} == {n: getattr(args, n) for n in names}
        assert file in gallery


def test_every_picture_and_file_it_names_is_there():
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    assert len(links) > 20
    for link in links:
        assert (ROOT / link).exists(), link
