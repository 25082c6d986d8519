"""What README.md and docs/ say and show is what the programs wrote, and leads somewhere."""

import importlib
import json
import re
import shlex
from functools import reduce
from pathlib import Path

import pytest
from PIL import Image

import sample
from mini import claims, evaluate
from tools import bench
from unialignment import UniAlignment

ROOT = Path(__file__).parent.parent
DOCUMENTS = {f: f.read_text() for f in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
README, TUTORIAL, RESULTS = (
    DOCUMENTS[ROOT / name] for name in ("README.md", "docs/tutorial.md", "docs/results.md")
)
REPORTS = {"scores": evaluate.report, "claims": claims.report, "bench": bench.report}
REPORTS["alignment"] = claims.report
GENERATED = r"<!-- begin results/(\w+)\.md -->\n\n(.*?)\n\n<!-- end -->"
FENCED = r"^```\w*\n(.*?)^```"


def commands(text):
    """The words of every command in the fenced blocks of a document; comments are dropped."""
    for lines in re.findall(FENCED, text, re.MULTILINE | re.DOTALL):
        for line in lines.replace("\\\n", " ").splitlines():
            if re.match(r"(python|torchrun) ", line):
                yield shlex.split(line, comments=True)


def section(text, heading):
    return text[text.index(f"\n## {heading}\n") :].split("\n## ")[1]


def anchor(heading):
    """What GitHub calls a heading in links."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# ---- links, commands, functions -----------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_link_and_picture_leads_somewhere(document):
    text = DOCUMENTS[document]
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert len(links) > 5
    for link in links:
        if re.match(r"https?:", link):
            continue
        name, _, part = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        if part:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert part in map(anchor, headings), link


def test_every_document_can_be_reached_from_the_readme():
    for file in ROOT.glob("docs/*.md"):
        assert f"]({file.relative_to(ROOT)})" in README


def test_the_readme_lists_every_module_that_a_student_reads():
    for file in ROOT.glob("*.py"):
        assert f"]({file.name})" in README


def test_two_commands_start_and_the_readme_stays_short():
    assert len(re.findall(r"^python3 ", section(README, "Start"), re.MULTILINE)) == 2
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_commands_name_programs_and_options_that_exist(document):
    for words in commands(DOCUMENTS[document]):
        program = next((w for w in words if w.endswith(".py")), None)
        file = program or words[words.index("-m") + 1].replace(".", "/") + ".py"
        assert (ROOT / file).is_file(), file
        sources = "".join(f.read_text() for f in {ROOT / file, *(ROOT / file).parent.glob("*.py")})
        for option in words[words.index(program) if program else words.index("-m") + 1 :]:
            if option.startswith("--"):
                assert f'"{option}"' in sources, f"{file} {option}"


def exists(file, name):
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    return reduce(lambda x, part: getattr(x, part, None), name.split("."), module) is not None


def test_functions_that_the_documents_name_exist():
    rows = "\n".join(line for line in TUTORIAL.splitlines() if line.startswith("|"))
    cells = re.findall(r"`([\w/]+\.py)` ((?:`[\w.]+`(?:, )?)+)", rows)
    named = [(file, name) for file, names in cells for name in re.findall(r"`([\w.]+)`", names)]
    assert len(named) > 40
    for text in DOCUMENTS.values():  # "`train` of [train.py](train.py)"
        named += [(file, n) for n, file in re.findall(r"`(\w+)` (?:of|in)\s\[([\w/]+\.py)\]", text)]
    for file, name in named:
        assert exists(file, name), f"{file}: {name}"


# ---- pictures -----------------------------------------------------------------------------------


def test_pictures_were_drawn_by_the_commands_beside_them():
    sections = [("docs/", section(README, "Three more to try"))]
    sections += [("docs/", section(README, "One network that draws, edits, perceives and reads"))]
    sections += [("", section(RESULTS, "Gallery"))]
    for folder, text in sections:
        shown = set(re.findall(rf'src="{folder}(images/gallery/[^"]+)"', text))
        drawn = {}
        for words in commands(text):
            args = sample.parse(words[2:])
            if args.task in ("caption", "answer"):
                continue
            name = f"images/gallery/{Path(args.out).name}"
            drawn[name] = about = Image.open(ROOT / "docs" / name).text
            assert about["prompt"] == "".join(args.prompt) and about["seed"] == str(args.seed)
            settings = json.loads(about["settings"])
            for field in ("image", "task", "blend", "steps", "guidance", "size"):
                asked = getattr(args, field)
                if field not in ("guidance", "steps", "size") or asked is not None:  # else its own
                    assert settings[field] == asked, (name, field)
        assert len(drawn) == (3 if folder else 11) and drawn.keys() <= shown
        others = shown - drawn.keys() - {"images/gallery/generate.png"}
        for name in others:  # portraits, not drawn by the model
            assert Image.open(ROOT / "docs" / name).size == (16, 16)


def test_the_miniature_reads_what_the_documents_quote():
    engine, gallery = UniAlignment.load(device="cpu"), ROOT / "docs/images/gallery"
    images = [Image.open(gallery / f"{name}.png") for name in ("uni-edit", "generate")]
    (quoted,) = engine.answer(images[:1])
    (answer,) = engine.answer(images[:1], ["where is the ring?"])
    assert f'It read "{quoted}", and answered "{answer}".' in README
    (text,) = engine.answer(images[1:], steps=8)
    assert text.replace(",", " ,") in TUTORIAL


# ---- tables and what is said of them ------------------------------------------------------------


def test_generated_tables_are_those_of_the_committed_results():
    tables = dict(re.findall(GENERATED, RESULTS, re.DOTALL))
    assert tables.keys() == REPORTS.keys()
    for name, report in REPORTS.items():
        text = report(json.loads((ROOT / f"docs/results/{name}.json").read_text())).strip()
        assert text == (ROOT / f"docs/results/{name}.md").read_text().strip()
        assert text == tables[name]


def plain(text):
    return re.sub(r"[`*]", "", text).lower()


def read_tables(text):
    """Markdown tables as [(names, row)]; a row is {column: cell}.

    names: of its table, the bold title above it and what stands there in code; and the row's own code.
    """
    rows, names, columns = [], set(), None
    for line in text.splitlines():
        if title := re.match(r"\*\*(.+?)\*\*", line):
            names = {plain(title[1]), *re.findall(r"`(\w[\w-]*)`", line)}
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            columns = None
        elif columns is None:
            columns = [name or f"label {i}" for i, name in enumerate(cells)]
        elif set(cells[0]) != {"-"}:
            own = re.findall(r"\(`([\w-]+)`\)", line)
            rows.append((names | set(own), dict(zip(columns, cells))))
    return rows


def is_named(row, sentence):
    """Does the sentence name this row: one of A and B, and all other labels?"""

    def says(cell):
        return all(part in plain(sentence) for part in plain(cell).split(", "))

    labels = {k: v for k, v in row.items() if re.search("[a-z]", v) and "better" != k != "question"}
    pair = [labels.pop(k) for k in ("A", "B") if k in labels]
    return (not pair or any(map(says, pair))) and all(map(says, labels.values()))


def unfounded(text, tables):
    """The numbers of prose that do not stand in the rows that their sentence names.

    A paragraph names its tables, or some rows of one, by a bold title or in code; a sentence of it
    names the row.
    """
    faults, rows = [], read_tables(tables)
    for paragraph in re.split(r"\n(?=\n|- )", text):
        names = {plain(name) for name in re.findall(r"\*\*(.+?)\*\*", paragraph)}
        names |= set(re.findall(r"`([\w-]+)`", paragraph))
        about = [row for known, row in rows if known & names]
        for sentence in re.split(r"(?<=[.;])\s", re.sub(r"`[^`]*[=.][^`]*`", "", paragraph)):
            sentence = " ".join(sentence.split())
            for number in re.findall(r"(?<![\w.,-])\d+\.\d+(?![\d-])", sentence):
                said = (" ".join(row.values()) for row in about if is_named(row, sentence))
                if number not in re.findall(r"\d+\.\d+", " ".join(said)):
                    faults.append(f"{number} in: {sentence}")
    return faults


def prose():
    """results.md from the scores on, up to how it was made, without its tables and commands."""
    text = RESULTS[RESULTS.index("\n## Scores") : RESULTS.index("\n## From nothing")]
    tables = "\n\n".join(table for _, table in re.findall(GENERATED, text, re.DOTALL))
    for pattern in (GENERATED, FENCED):
        text = re.sub(pattern, "", text, flags=re.MULTILINE | re.DOTALL)
    return text, tables


def test_numbers_in_words_stand_in_the_rows_they_speak_of():
    text, tables = prose()
    assert len(re.findall(r"\d+\.\d\d+", text)) > 12
    assert unfounded(text, tables) == []


def test_a_wrong_number_would_be_found():
    tables = "**Speed** (`step`): a title\n\n|  | ms | ratio |\n| --- | --- | --- |\n"
    tables += "| theirs | 2.5 | 1.0 |\n| ours, plain | 2.0 | 0.8 |\n"
    assert unfounded("- A step (`step`): ours, when plain, takes 0.8.", tables) == []
    assert unfounded("- **Speed**: ours is plain (0.8), theirs 1.0.", tables) == []
    for wrong in ("ours, when plain, takes 0.9", "theirs takes 0.8", "ours takes 0.8"):
        assert len(unfounded(f"- A step (`step`): {wrong}.", tables)) == 1
    assert len(unfounded("- Another (`growth`): ours, when plain, takes 0.8.", tables)) == 1
