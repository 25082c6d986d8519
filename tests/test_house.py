"""Who may import whom: a reader of the papers never has to open the laboratory."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = [
    *ROOT.glob("*.py"),
    *(
        f
        for room in ("support", "unialignment", "mini", "tools")
        for f in ROOT.glob(f"{room}/*.py")
    ),
]
NAMES = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in FILES}
LEAVES = {"flow", "unialignment.masked", "mmdit", "vae", "adapter"}


def imports(file):
    """(module of the house, is it imported at the top of the file) of every import."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from ((name, node in tree.body) for name in names if name in NAMES)


def test_nothing_above_looks_into_laboratory_or_tools():
    assert {"mini.world", "tools.bench", "support.fast", "train"} <= NAMES.keys()
    for name, file in NAMES.items():
        if name.startswith(("mini.", "tools.")):
            continue
        below = {(m, top) for m, top in imports(file) if m.startswith(("mini.", "tools."))}
        allowed = {("mini.world", False)} if name == "train" else set()
        assert below <= allowed, f"{name} imports {below}"


def test_the_leaves_import_nothing_of_the_house():
    assert {name: list(imports(NAMES[name])) for name in LEAVES} == {name: [] for name in LEAVES}


def test_modules_import_each_other_in_one_direction():
    graph, done = {name: {m for m, _ in imports(file)} for name, file in NAMES.items()}, set()
    while graph.keys() - done:
        free = {name for name, needs in graph.items() if name not in done and needs <= done}
        assert free, f"a circle among {sorted(graph.keys() - done)}"
        done |= free
