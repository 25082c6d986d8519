"""Who may import whom: a reader of a paper needs its own files and the parts below them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("support", "unialignment", "mini", "tools")
FILES = [*ROOT.glob("*.py"), *(f for folder in FOLDERS for f in ROOT.glob(f"{folder}/*.py"))]
NAMES = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in FILES}
TOP = sorted(name for name in NAMES if "." not in name)
LEAVES = {"flow", "mmdit", "vae", "adapter", "unialignment.masked"}
# Folders that a module of a folder (or of the top level, "") may import from at the top of its file
ALLOWED = {"": {"support"}, "support": set(), "unialignment": {"support"}}


def imports(file):
    """(module of this project, is it imported at the top of the file?) of every import."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from ((name, node in tree.body) for name in names if name in NAMES)


def folder_of(name):
    return name.rpartition(".")[0]


def test_the_upper_folders_do_not_import_the_lower_ones():
    assert {"mini.world", "tools.bench", "support.fast", "unialignment.model"} <= NAMES.keys()
    for name, file in NAMES.items():
        folder = folder_of(name)
        if folder not in ALLOWED:
            continue
        for module, is_top in imports(file):
            if name in ("train", "unialignment.train") and (module, is_top) == (
                "mini.world",
                False,
            ):
                continue  # without --data, the examples are rendered
            allowed = ALLOWED[folder] | {"", folder} if folder != "support" else {"support", ""}
            assert folder_of(module) in allowed, f"{name} imports {module}"


def test_the_leaves_import_nothing_of_this_project():
    assert {name: list(imports(NAMES[name])) for name in LEAVES} == {name: [] for name in LEAVES}


def test_modules_import_each_other_in_one_direction():
    graph, done = {name: {m for m, _ in imports(file)} for name, file in NAMES.items()}, set()
    while graph.keys() - done:
        free = {name for name, needs in graph.items() if name not in done and needs <= done}
        assert free, f"a circle among {sorted(graph.keys() - done)}"
        done |= free


@pytest.mark.parametrize("name", [*TOP, *(n for n in NAMES if folder_of(n) == "support")])
def test_only_seams_name_the_second_system(name):
    """mmdit.py and checkpoints.py may say what a seam is for; two programs, where a command went."""
    lines = [
        line for line in NAMES[name].read_text().splitlines() if "unialignment" in line.lower()
    ]
    seams = {"mmdit": 3, "checkpoints": 1, "train": 1, "sample": 1}
    assert len(lines) <= seams.get(name, 0), lines


def test_the_top_level_draws_and_trains_without_the_second_system(tmp_path):
    program = f"""
import sys
sys.modules["unialignment"] = None  # an import of it raises ImportError
import {", ".join(TOP)}
sample.main(["--prompt", "a red circle", "--steps", "1", "--device", "cpu"])
options = ["--stage", "2", "--steps", "1", "--batch", "1", "--device", "cpu", "--out", "run"]
train.main([*options, "--sample-every", "0"])
"""
    command = [sys.executable, "-c", program]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "sample.png").is_file() and (tmp_path / "run/stage2.safetensors").is_file()
