"""What the documents say and show is what the programs wrote, and every link leads somewhere."""

import argparse
import ast
import importlib
import json
import re
import shlex
import sys
from functools import reduce
from pathlib import Path

from support.cli import Parser, UserError

import pytest
from PIL import Image

from mini import claims, evaluate
from support.files import markdown_table
from tools import bench
from unialignment import UniAlignment

ROOT = Path(__file__).parent.parent
FILES = sorted(f for part in ("", "docs", "unialignment") for f in (ROOT / part).glob("*.md"))
DOCUMENTS = {str(file.relative_to(ROOT)): file.read_text() for file in FILES}
README, RESULTS = DOCUMENTS["README.md"], DOCUMENTS["docs/results.md"]
GALLERY = ROOT / "docs/images/gallery"
REPORTS = {"scores": evaluate.report, "claims": claims.report, "bench": bench.report}
REPORTS["alignment"] = claims.report
FOREIGN = ("venv", "pytest", "pip")  # modules of other people
FENCED = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)

SOURCES = sorted(
    f
    for part in (".", "support", "unialignment", "mini", "tools")
    for f in ROOT.glob(f"{part}/*.py")
)


def docstrings(file):
    """All docstrings of a module, as a document: their commands stand in lines of their own, or quoted."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    nodes = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kinds))
    text = "\n".join(filter(None, map(ast.get_docstring, nodes)))
    return f"```\n{text}\n```\n{text}"


PROGRAMS = {str(file.relative_to(ROOT)): docstrings(file) for file in SOURCES}

each_document = pytest.mark.parametrize("document", DOCUMENTS)


def commands(text):
    """(program, its arguments, the words) of every command in a document that starts a program of ours."""
    quoted = "".join(FENCED.findall(text)).replace("\\\n", " ").splitlines()
    quoted += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCED.sub("", text))]
    for line in quoted:
        for part in line.strip().split(" && "):
            if re.match(r"(\S*/)?(python3?|torchrun) ", part):
                words = shlex.split(part, comments=True)
                i = next(
                    i for i, w in enumerate(words) if w.endswith(".py") or words[i - 1] == "-m"
                )
                if words[i] not in FOREIGN:
                    program = words[i].removesuffix(".py").replace(".", "/") + ".py"
                    yield program, words[i + 1 :], words


def module_of(file):
    return importlib.import_module(file.removesuffix(".py").replace("/", "."))


def anchor(heading):
    """What GitHub calls a heading in links."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# ---- links, commands, functions -----------------------------------------------------------------


@each_document
def test_every_link_and_picture_leads_somewhere(document):
    text, file = DOCUMENTS[document], ROOT / document
    for link in re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', text):
        link = "".join(link)
        if re.match(r"https?:", link):
            continue
        name, _, part = link.partition("#")
        target = (file.parent / name).resolve() if name else file
        assert target.exists(), link
        if part:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert part in map(anchor, headings), link


def test_every_document_and_module_can_be_reached_from_the_readme():
    for name in [*DOCUMENTS, *(file.name for file in ROOT.glob("*.py"))]:
        assert f"]({name})" in README or name == "README.md", name


def test_two_commands_start_and_the_documents_stay_short():
    start = README.split("\n## Start\n")[1].split("\n## ")[0]
    assert len(re.findall(r"^python3 ", start, re.MULTILINE)) == 2
    assert len(README.splitlines()) <= 180
    assert len(RESULTS.splitlines()) <= 250


class ParsedError(Exception):
    """Raised by `parse_and_stop`."""


def parse_and_stop(parser, arguments=None):
    argparse.ArgumentParser.parse_args(parser, arguments)
    raise ParsedError


@pytest.mark.parametrize("document", DOCUMENTS | PROGRAMS)
def test_commands_are_understood_by_their_programs(document, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no earlier run lies in runs/
    for program, arguments, words in commands((DOCUMENTS | PROGRAMS)[document]):
        assert (ROOT / program).is_file(), program
        module = module_of(program)
        if arguments[-1:] == ["..."] and not arguments[-2].startswith("--"):
            del arguments[-1]
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "8")) if words[0] == "torchrun" else ():
            monkeypatch.setenv(name, value)
        try:
            if "--help" in arguments:
                pass
            elif hasattr(module, "parse"):
                module.parse(arguments)
            else:
                with monkeypatch.context() as patch, pytest.raises(ParsedError):
                    patch.setattr(Parser, "parse_args", parse_and_stop)
                    patch.setattr(sys, "argv", [program, *arguments])
                    module.main()
        except UserError as error:
            pytest.fail(f"{shlex.join(words)}: {error}")
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_every_program_shows_its_command():
    """What can be started, and says so: its docstring has a command that the test above has parsed."""
    for name, text in PROGRAMS.items():
        if '__name__ == "__main__"' in (ROOT / name).read_text():
            assert name in {program for program, _, _ in commands(text)}, name


def test_functions_that_the_documents_name_exist():
    named = []
    for document in ("docs/paper.md", "unialignment/README.md"):
        rows = "\n".join(re.findall(r"^\|.*", DOCUMENTS[document], re.MULTILINE))
        cells = re.findall(r"`([\w/]+\.py)` ((?:`[\w.]+`(?:, )?)+)", rows)
        assert len(cells) > 20, document
        named += [
            (file, name) for file, names in cells for name in re.findall(r"`([\w.]+)`", names)
        ]
    for text in DOCUMENTS.values():  # "`portrait` of [mini/world.py](../mini/world.py)"
        named += [(file, n) for n, file in re.findall(r"`(\w+)` (?:of|in)\s\[([\w/]+\.py)\]", text)]
    for file, name in named:
        found = reduce(lambda x, part: getattr(x, part, None), name.split("."), module_of(file))
        assert found is not None, f"{file}: {name}"


# ---- pictures -----------------------------------------------------------------------------------

SETTINGS = {
    "sample.py": ("image", "task", "blend", "steps", "guidance", "size"),
    "unialignment/sample.py": ("image", "steps", "guidance", "size", "negative"),
}


def drawn_in(document):
    """The pictures of the gallery that a document's commands draw, each checked against its PNG."""
    for program, arguments, _ in commands(DOCUMENTS[document]):
        if program not in SETTINGS or "--help" in arguments:
            continue
        args = module_of(program).parse(arguments)
        name = Path(args.out).name
        if args.task in ("caption", "answer") or not (GALLERY / name).is_file():
            continue
        about = Image.open(GALLERY / name).text
        assert about["prompt"] == "".join(args.prompt) and about["seed"] == str(args.seed)
        settings = json.loads(about["settings"])
        for field in SETTINGS[program]:
            wanted = getattr(args, field)
            if field not in ("guidance", "steps", "size") or wanted is not None:
                assert settings[field] == wanted, (name, field)
        assert f'images/gallery/{name}"' in DOCUMENTS[document], f"{name} is drawn, but not shown"
        yield name


def test_pictures_were_drawn_by_the_commands_beside_them():
    drawn = {document: set(drawn_in(document)) for document in DOCUMENTS}
    portraits = {f.name for f in GALLERY.glob("*.png") if Image.open(f).size == (16, 16)}
    assert drawn["docs/results.md"] == {f.name for f in GALLERY.glob("*.png")} - portraits
    assert len(drawn["README.md"]) >= 3 and len(drawn["unialignment/README.md"]) == 3


def test_the_miniature_reads_what_the_documents_quote():
    engine = UniAlignment.load(device="cpu")
    images = [Image.open(GALLERY / f"{name}.png") for name in ("uni-edit", "generate")]
    (quoted,) = engine.answer(images[:1])
    (answer,) = engine.answer(images[:1], ["where is the ring?"])
    prose = " ".join(" ".join(DOCUMENTS.values()).split())
    assert f'It read "{quoted}", and answered "{answer}".' in prose
    (text,) = engine.answer(images[1:], steps=8)
    assert text.replace(",", " ,") in DOCUMENTS["docs/tutorial.md"]


# ---- tables -------------------------------------------------------------------------------------


def results(name):
    return json.loads((ROOT / f"docs/results/{name}.json").read_text())


def tables(text):
    """Every Markdown table in a text, a list of rows of cells; the first row is its head."""
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()]
        yield [rows[0], *rows[2:]]


def labelled(table):
    """{label: row}: a label is the bold row above, and the cells of the row that hold words."""
    part, result = "", {}
    for row in table[1:]:
        part = row[0] if row[0].startswith("**") else part
        words = (cell for cell in row if re.search("[a-z]", cell) and "difference" not in cell)
        result[part, *words] = row
    return result


def shortened(whole, shown):
    """The tables `shown` with new contents: the same rows and the first columns of a table of `whole`.

    It is the first table of `whole` that has all these rows.
    """
    result = []
    for table in tables(shown):
        wanted, columns = labelled(table), len(table[0])
        known = [[row[:columns] for row in other] for other in tables(whole)]
        fitting = [other for other in known if wanted.keys() <= labelled(other).keys()]
        assert fitting, f"no generated table has all rows of {list(wanted)}"
        rows = labelled(fitting[0])
        result.append(markdown_table(fitting[0][0], [rows[label] for label in wanted]))
    return "\n\n".join(result)


def generated(text):
    """A document whose marked tables are made again from docs/results/*.json."""

    def rows(match):
        begin, name, shown, end = match.groups()
        return begin + shortened(REPORTS[name](results(name)), shown) + end

    def scores(match):
        return match[1] + evaluate.readme_table(results("scores")).strip() + match[3]

    def robustness(match):
        fuzz, kills = results("fuzz"), results("kills")
        counts = {k: x for k, x in fuzz.items() if k not in ("seed", "kinds")}
        rows = [[name, *map(str, row.values())] for name, row in kills.items()]
        both = markdown_table(list(counts), [counts.values()]), ["training", *kills["stage 1"]]
        return match[1] + both[0] + "\n\n" + markdown_table(both[1], rows) + match[3]

    end = r"(.*?)(\n+<!-- end -->)"
    text = re.sub(rf"(?s)(<!-- begin rows of results/(\w+)\.md -->\n+){end}", rows, text)
    text = re.sub(rf"(?s)(<!-- begin robustness -->\n+){end}", robustness, text)
    return re.sub(rf"(?s)(<!-- begin scores -->\n+){end}", scores, text)


def test_whole_tables_are_those_of_the_committed_results():
    for name, report in REPORTS.items():
        text = report(results(name)).strip()
        assert text == (ROOT / f"docs/results/{name}.md").read_text().strip()


@pytest.mark.parametrize("document", ("README.md", "docs/results.md"))
def test_tables_in_the_documents_are_generated(document):
    text = DOCUMENTS[document]
    assert text.count("<!-- begin ") == text.count("<!-- end -->") >= 1
    assert generated(text) == text, "python -m tests.test_docs writes the tables anew"


def test_the_results_show_rows_of_every_whole_table():
    assert set(re.findall(r"begin rows of results/(\w+)\.md", RESULTS)) == REPORTS.keys()


def test_a_changed_number_would_be_found():
    whole = "| | n | score |\n|---|---|---|\n| **a** | 1 | 0.5 |\n| b | 2 | 0.7 |\n| **c** | 3 | 0.9 |\n"
    head, rows = "|  | n |\n| --- | --- |\n", "| **a** | 1 |\n| b | 2 |"
    assert shortened(whole, head + rows) == head + rows
    assert shortened(whole, head + rows.replace("2", "4")) == head + rows
    with pytest.raises(AssertionError, match="no generated table"):
        shortened(whole, head + "| **c** | 3 |\n| b | 2 |")


if __name__ == "__main__":
    for document in ("README.md", "docs/results.md"):
        (ROOT / document).write_text(generated(DOCUMENTS[document]))
