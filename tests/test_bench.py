"""The benchmark: contestants take turns, are noticed where they disagree, and their ratios are right."""

import json

import pytest
import torch

from mmdit import MMDiTConfig
from support.cli import one_line_errors
from tools import bench

CPU = torch.device("cpu")


def test_contestants_agree_and_are_noticed_where_they_do_not():
    config = MMDiTConfig(3, 64, 32, 16, positions=8, dual=(0,))
    models = bench.contestants(config)
    inputs = bench.inputs_of(config, 36, 7, 2, CPU)
    draw = bench.samplers(models, inputs, steps=3)
    assert {"ours", "ours, plain forward"} <= draw.keys()
    assert bench.difference([function() for function in draw.values()]) < 1e-5
    before = draw["ours"]()
    with torch.no_grad():
        models["ours"].final_layer.linear.bias += 0.1
    changed = draw["ours"]()
    for other in (changed, changed * float("nan")):
        with pytest.raises(ValueError, match="disagree"):
            bench.difference([before, before, other])


def test_contestants_take_turns():
    order = []
    times = bench.race({x: lambda x=x: order.append(x) for x in "ab"}, 3)
    assert "".join(order) == "baabbaab"
    assert [len(t) for t in times.values()] == [3, 3]


def test_ratios_are_those_of_the_rounds():
    a, b = bench.rows_of({"a": [0.001, 0.002, 0.009], "b": [0.002, 0.004, 0.003]}, "ms", "b")
    assert a == {"": "a", "ms": 2.0, "of b": 0.5} and b["of b"] == 1.0
    assert bench.rows_of({"a": [0.5]}, "ms", "b", 2) == [{"": "a", "ms": 250.0, "of b": None}]


@pytest.fixture
def untimed(monkeypatch):
    """Contestants run once and are all equally fast, and nothing is compiled."""

    def equal(functions, rounds):
        for run in functions.values():
            run()
        return {name: [1.0] for name in functions}

    monkeypatch.setattr(bench, "race", equal)
    monkeypatch.setattr(bench, "compile_blocks", lambda model: None)


def test_parts_compare_equal_contestants(untimed):
    found = bench.request(CPU, steps=2)
    assert found["largest difference of 255"] <= 1
    assert found["rows"][-1] == {"": "ours", "ms": 1000.0, "of the official way": 1.0}
    step = bench.sampling("tiny", bench.MINIATURE, (4, 4), 2, 1, device=CPU)
    report = bench.report({"step": step})
    assert "| ours, compiled |" in report and "tokens: [4, 4]" in report


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Where results go, with those of an earlier run; a new run finds one row at once."""
    monkeypatch.setitem(bench.PARTS, "step", lambda device: {"rows": [{"": "ours", "ms": 1.0}]})
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"mid": {"about": "", "rows": [{"": "x"}]}}))
    return file


def test_results_are_added_to_those_of_earlier_runs(file):
    bench.main(["step", "--out", ".", "--device", "cpu"])
    assert json.loads(file.read_text()).keys() == {"mid", "step"}
    assert "| ours | 1 |" in file.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    "arguments, content, message",
    [
        ("everything", "{}", "invalid choice: 'everything'"),
        ("large", "{}", "invalid choice: 'large'"),
        ("step", "{", "bench.json: expected a JSON object"),
        ("step", '{"mid": {"about": "", "rows": []}}', "bench.json: expected the results of an"),
    ],
)
def test_mistakes_get_one_line(arguments, content, message, file, capsys):
    file.write_text(content)
    with pytest.raises(SystemExit), one_line_errors():
        bench.main([*arguments.split(), "--out", "."])
    assert message in capsys.readouterr().err
