"""The benchmark: it counts right, notices contestants that disagree, and runs at every size."""

import json

import pytest
import torch

from mmdit import MMDiT, MMDiTConfig
from support.cli import one_line_errors
from tools import bench
from tools.contestants import contestants, inputs_of, samplers
from vae import VAEConfig

CPU = torch.device("cpu")
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
TINY = MMDiTConfig(2, 64, 32, 16, positions=8), VAEConfig(16, 16), {
    "text_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 1000,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": ROPE,
    },
    "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32},
}  # fmt: skip


@torch.no_grad()
def test_flops_are_those_of_the_equations():
    D, image, text, patch = 64, 36, 7, 16 * 4
    counted = bench.flops(MMDiT(TINY[0]), *inputs_of(TINY[0], image, text, 2, CPU))
    first = 24 * (image + text) * D**2 + 4 * (image + text) ** 2 * D
    last = (24 * image + 6 * text) * D**2 + 4 * image * (image + text) * D  # text: keys and values
    assert counted == 2 * (first + last + 4 * image * D * patch)


def test_contestants_agree_and_are_noticed_where_they_do_not():
    config = MMDiTConfig(3, 64, 32, 16, positions=8, dual=(0,))
    models = contestants(config)
    inputs = inputs_of(config, 36, 7, 2, CPU)
    draw = samplers(models, inputs, steps=3)
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


def test_memory_is_that_of_the_tensors():
    def needed():
        a = torch.zeros(1000, 1000)
        b = a + 1
        del a
        return (b + 1).sum()

    assert bench.peak(CPU, needed) == pytest.approx(8e-3, rel=0.01)


@pytest.fixture
def untimed(monkeypatch):
    """Contestants run once and are all equally fast, and nothing is compiled."""

    def equal(functions, rounds):
        for run in functions.values():
            run()
        return {name: [1.0] for name in functions}

    monkeypatch.setattr(bench, "race", equal)
    monkeypatch.setattr(bench, "compile_blocks", lambda model: None)
    monkeypatch.setattr(bench, "SIZES", [(16, 4), (64, 8)])
    monkeypatch.setattr(bench, "LARGE", TINY)


def test_parts_compare_equal_contestants(untimed):
    found = bench.request(CPU, steps=2)
    assert found["largest difference of 255"] <= 1
    assert found["rows"][-1] == {"": "ours", "ms": 1000.0, "of the official way": 1.0}
    found = bench.training(CPU, size=2)
    ours = {row[""] for row in found["rows"] if "ours" in row[""]}
    assert ours == {"stage 1, ours", "stage 2, ours"}
    assert found["largest relative difference of losses"] <= 1e-4
    first, second = bench.growth(CPU)["rows"]
    assert first["image tokens"] == 16 and second["text tokens"] == 8
    assert 0 < first["MB"] < second["MB"]


def test_full_size_runs_at_a_tiny_size(untimed):
    plain, lean = (found := bench.full_request(CPU))["rows"]
    assert found["largest difference of 255"] == 0 and min(plain["GB"], lean["GB"]) > 0
    names = [row[""] for row in bench.full_training(CPU)["rows"]]
    assert names == ["stage 1, 8 of 64 x 64", "stage 2, 8 of 64 x 64"]
    step = bench.sampling("tiny", TINY[0], (16, 4), 2, 1, torch.bfloat16, device=CPU)
    report = bench.report({"full step": step})
    assert "| ours, compiled |" in report and "dtype: torch.bfloat16" in report


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
        ("everything", "{}", "unknown part 'everything'"),
        ("step --full", "{}", "name no parts with it"),
        ("--full --device cpu", "{}", "--full needs a GPU"),
        ("step", "{", "bench.json: expected a JSON object"),
        ("step", '{"mid": {"about": "", "rows": []}}', "bench.json: expected the results of an"),
    ],
)
def test_mistakes_get_one_line(arguments, content, message, file, capsys):
    file.write_text(content)
    with pytest.raises(SystemExit), one_line_errors():
        bench.main([*arguments.split(), "--out", "."])
    assert message in capsys.readouterr().err
