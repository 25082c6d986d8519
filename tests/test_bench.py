"""The benchmark: it counts right, notices contestants that disagree, and runs at every size."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import mmdit
from cli import one_line_errors
from vae import VAEConfig

CPU = torch.device("cpu")
TINY = {
    "mmdit": mmdit.MMDiTConfig(2, 64, 32, 16, positions=8),
    "lmm": {
        "text_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 1000,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3],
            },
        },
        "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32},
    },
    "vae": VAEConfig(16, 16),
    "size": 64,
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("dual", [(), (0, 1)])
def test_flops_are_those_that_torch_counts(dual):
    config = mmdit.MMDiTConfig(3, 64, 32, 16, positions=8, dual=dual)
    model = mmdit.MMDiT(config)
    latent, txt, vec = bench.inputs_of(config, 36, 7, CPU)
    (prepared,) = model.prepare([0.5], vec, torch.ones(2, 7, dtype=torch.bool), 6, 6)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(latent, 0.5, txt, vec, prepared=prepared)
    assert bench.flops(config, 2, 36, 7) == counter.get_total_flops()


def test_contestants_that_disagree_are_told():
    a = torch.randn(100)
    assert bench.same(a, a * (1 + 1e-6)) < 1e-5
    for b in (a * 1.01, a * float("nan")):
        with pytest.raises(ValueError, match="disagree"):
            bench.same(a, b)


def test_contestants_take_turns():
    order = []
    times = bench.race({x: lambda x=x: order.append(x) for x in "ab"}, 3)
    assert "".join(order) == "baabbaab"
    assert [len(t) for t in times.values()] == [3, 3]
    assert bench.ratio({"a": [1, 2, 9], "b": [2, 4, 3]}, "a", "b") == 0.5


def test_memory_is_that_of_the_tensors():
    def needed():
        a = torch.zeros(1000, 1000)
        b = a + 1
        del a
        return (b + 1).sum()

    assert bench.peak(CPU, needed) == pytest.approx(8e-3, rel=0.01)


def test_full_size_runs_at_a_tiny_size(monkeypatch):
    monkeypatch.setattr(mmdit.MMDiT, "compile_blocks", lambda self: None)
    found = bench.full(CPU, TINY, rounds=1)
    plain, lean = found["full request"]["rows"]
    assert found["full request"]["largest difference of 255"] == 0
    assert plain["of it MM-DiT, GB"] == lean["of it MM-DiT, GB"]  # on a CPU all lies there
    assert all(row["steps a second"] > 0 for row in found["full training"]["rows"])
    report = bench.report(found)
    assert "| low memory |" in report and "**full step**" in report


def test_results_are_added_to_those_there_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.PARTS, "step", lambda device: {"rows": [{"": "ours", "ms": 1.0}]})
    monkeypatch.setattr(bench.PARTS["step"], "__doc__", "A step.", raising=False)
    (tmp_path / "bench.json").write_text(json.dumps({"mid": {"about": "", "rows": [{"": "x"}]}}))
    bench.main(["step", "--out", str(tmp_path), "--device", "cpu"])
    assert json.loads((tmp_path / "bench.json").read_text()).keys() == {"mid", "step"}
    assert "| ours | 1 |" in (tmp_path / "bench.md").read_text()
    for arguments, said in (
        (["everything"], "unknown part 'everything'"),
        (["step", "--full"], "name no parts with it"),
        (["--full", "--device", "cpu"], "--full needs a GPU"),
    ):
        with pytest.raises(SystemExit), one_line_errors():
            bench.main(arguments)
        assert said in capsys.readouterr().err
