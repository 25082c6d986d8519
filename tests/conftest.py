"""Golden answers of the reference implementations, and checkpoints in the published layouts."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import GOLDEN, tensors
from unialignment_folder import publish

from dream_engine import DreamEngine

torch.set_num_threads(1)  # test processes run side by side


def pytest_addoption(parser):
    parser.addoption("--device", default="pretend", help="where test_device.py runs: cuda, ...")


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def answers():
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="session")
def names():
    return json.loads((GOLDEN / "golden.json").read_text())


@pytest.fixture(scope="session")
def engine():
    """The miniature; tests must not change it."""
    return DreamEngine.load(device="cpu")


@pytest.fixture(scope="session")
def uni_folder(tmp_path_factory, names):
    """A tiny random UniAlignment in the published layout; tests must not change it."""
    return publish(tmp_path_factory.mktemp("pipelines") / "uni", names["vae/16/diffusers"])


@pytest.fixture
def write(tmp_path, names):
    """write(key, prefix="", shards=0, name=...): a checkpoint of golden names -> its path."""

    def write(key, prefix="", shards=0, name="model.safetensors"):
        weights = {prefix + k: v for k, v in tensors(names[key]).items()}
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not shards:
            save_file(weights, path)
            return path
        index = {}
        for i in range(shards):
            file = f"{path.stem}-{i + 1:05}-of-{shards:05}.safetensors"
            part = dict(list(weights.items())[i::shards])
            save_file(part, path.parent / file)
            index |= dict.fromkeys(part, file)
        index_file = path.parent / f"{path.name}.index.json"
        index_file.write_text(json.dumps({"weight_map": index}))
        return path.parent

    return write
