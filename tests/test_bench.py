"""The speed benchmark: equal results, timing in turns, ratios, reports and the command line."""

import json
import re
import shlex
from pathlib import Path

from support.cli import one_line_errors

import pytest
import torch

from mmdit import MMDiTConfig
from tools import bench

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


def test_implementations_agree_and_a_difference_is_an_error():
    config = MMDiTConfig(3, 64, 32, 16, positions=8, dual=(0,))
    models = bench.build_models(config)
    inputs = bench.inputs_of(config, 36, 7, 2, CPU)
    draw = bench.samplers(models, inputs, steps=3)
    assert {"ours", "ours, plain forward"} <= draw.keys()
    assert bench.largest_difference([function() for function in draw.values()]) < 1e-5
    before = draw["ours"]()
    with torch.no_grad():
        models["ours"].final_layer.linear.bias += 0.1
    changed = draw["ours"]()
    for other in (changed, changed * float("nan")):
        with pytest.raises(ValueError, match="expected relative differences"):
            bench.largest_difference([before, before, other])


def test_implementations_are_timed_in_turns():
    order = []
    times = bench.time_in_turns({x: lambda x=x: order.append(x) for x in "ab"}, 3)
    assert "".join(order) == "baabbaab"
    assert [len(t) for t in times.values()] == [3, 3]


def test_ratios_are_medians_over_the_rounds():
    a, b = bench.rows_of({"a": [0.001, 0.002, 0.009], "b": [0.002, 0.004, 0.003]}, "ms", "b")
    assert a == {"": "a", "ms": 2.0, "of b": 0.5} and b["of b"] == 1.0
    assert bench.rows_of({"a": [0.5]}, "ms", "b", 2) == [{"": "a", "ms": 250.0, "of b": None}]
    assert bench.rows_of({"a": [0.5]}, "ms", "a", label="x") == [{"": "a", "ms": 500.0, "of x": 1}]


@pytest.fixture
def untimed(monkeypatch):
    """Let every function run once and take one second; compile nothing."""

    def equal(functions, rounds):
        for run in functions.values():
            run()
        return {name: [1.0] for name in functions}

    monkeypatch.setattr(bench, "time_in_turns", equal)
    monkeypatch.setattr(bench, "compile_blocks", lambda model: None)


def test_parts_compare_implementations_that_agree(untimed):
    found = bench.request(CPU, steps=2)
    assert found["largest difference of 255"] <= 1
    assert found["rows"][-1] == {"": "ours", "ms": 1000.0, "of the official way": 1.0}
    step = bench.sampling("tiny", bench.MINIATURE, (4, 4), 2, 1, device=CPU)
    report = bench.report({"step": step})
    assert "| ours, compiled |" in report and "tokens: [4, 4]" in report


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A bench.json of an earlier run; the part "step" of a new run returns one row at once."""
    monkeypatch.setitem(bench.PARTS, "step", lambda device: {"rows": [{"": "ours", "ms": 1.0}]})
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"mid": {"about": "", "rows": [{"": "x"}]}}))
    return file


def test_results_are_added_to_an_earlier_run(file):
    bench.main(["step", "--out", ".", "--device", "cpu"])
    assert json.loads(file.read_text()).keys() == {"mid", "step"}
    assert "| ours | 1 |" in file.with_suffix(".md").read_text()


def test_quoted_commands_parse():
    documents = [file.read_text() for file in (ROOT / "README.md", *ROOT.glob("docs/*.md"))]
    for text in (bench.__doc__, "\n".join(documents)):
        lines = re.findall(r"python -m tools\.bench([^`\n]*)", text)
        parsed = [bench.parse(shlex.split(line, comments=True)) for line in lines]
        assert parsed and parsed[0].parts == ["step", "mid", "request"]
    assert bench.parse(["request", "step"]).parts == ["request", "step"]


@pytest.mark.parametrize(
    "arguments, content, message",
    [
        ("everything", "{}", "part 'everything': expected one of step, mid, request"),
        ("step large", "{}", "part 'large': expected one of step, mid, request"),
        ("step", "{", "bench.json: expected a JSON object"),
        ("step", '{"mid": {"about": "", "rows": []}}', "bench.json: expected the results of an"),
    ],
)
def test_a_user_error_is_one_line(arguments, content, message, file, capsys):
    file.write_text(content)
    with pytest.raises(SystemExit), one_line_errors():
        bench.main([*arguments.split(), "--out", "."])
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused_before_measuring(file, monkeypatch, capsys):
    monkeypatch.setitem(bench.PARTS, "step", lambda device: pytest.fail("measured"))
    with pytest.raises(SystemExit), one_line_errors():
        bench.main(["step", "--device", "cpu", "--out", "bench.json"])
    assert "--out bench.json/bench.json: cannot be written (" in capsys.readouterr().err
