"""The command lines that draw and read: pictures, and one clear line for every mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sample
from checkpoints import metadata, read_tensors
from dream_engine import LMM, SD3, STAGE1
from support import fast
from support.cli import one_line_errors
from unialignment import sample as unialignment_sample

ROOT = Path(__file__).parent.parent
FAST = ["--steps", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save("dog.png")
    return tmp_path


def fails(main, arguments, capsys):
    """The one line that a program prints before it ends with exit code 2."""
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(SystemExit) as end, one_line_errors():
        main([str(a) for a in arguments])
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(said) == 1 and said[0].startswith("error: ")
    assert sorted(Path.cwd().rglob("*")) == before
    return said[0]


def test_a_prompt_becomes_a_picture_with_its_settings(capsys, engine):
    sample.main(["--prompt", "a red circle", "--seed", "5", "--out", "new/a.png", *FAST])
    assert capsys.readouterr().out.strip() == "new/a.png"
    image = Image.open("new/a.png")
    assert image.size == (48, 48) and image.mode == "RGB"
    assert image.text["prompt"] == "a red circle" and image.text["seed"] == "5"
    settings = json.loads(image.text["settings"])
    assert settings["steps"] == 2 and settings["guidance"] == engine.guidance
    assert os.listdir("new") == ["a.png"]


def test_several_pictures_and_their_grid(capsys):
    sample.main(["--prompt", "a red circle", "--num", "3", "--seed", "1", "--out", "a.png", *FAST])
    assert capsys.readouterr().out.split() == ["a-0.png", "a-1.png", "a-2.png", "a-grid.png"]
    sample.main(["--prompt", "a red circle", "--seed", "2", "--out", "b.png", *FAST])
    together, alone = (np.asarray(Image.open(f), int) for f in ("a-1.png", "b.png"))
    assert abs(together - alone).max() <= 1
    assert np.array_equal(np.asarray(Image.open("a-grid.png"))[:48, 48:], together)
    assert Image.open("a-1.png").text["seed"] == "2"


def test_prompts_of_several_lengths_are_drawn_together(capsys):
    Image.new("RGB", (30, 90), "blue").save("cat.png")
    prompts = ["<image> and <image>", "a red circle", "a ring above <image>"]
    options = [x for p in prompts for x in ("--prompt", p)]
    images = ["--image", "dog.png", "--image", "cat.png", "--image", "dog.png"]
    sample.main([*options, *images, "--out", "all.png", *FAST])
    sample.main(["--prompt", prompts[2], *images[:2], "--seed", "2", "--out", "last.png", *FAST])
    together, alone = (np.asarray(Image.open(f), int) for f in ("all-2.png", "last.png"))
    assert abs(together - alone).max() <= 1
    assert Image.open("all-1.png").text["prompt"] == "a red circle"
    capsys.readouterr()
    assert "1 <image> placeholders, but 2 images" in fails(
        sample.main, [*options[:5], "<image>", *images, "--image", "dog.png"], capsys
    )


DRAWING = [
    (["--prompt", "a <image> and <image>", "--image", "dog.png", "--image", "dog.png"], (48, 48)),
    (["--task", "edit", "--prompt", "make it red", "--image", "dog.png"], (48, 48)),
    (["--task", "edit", "--prompt", "<image> make it blue", "--image", "dog.png"], (48, 48)),
    (["--task", "i2i", "--image", "dog.png", "--blend", "1"], (48, 48)),
    (["--task", "combine", "--prompt", "a dog <image> it runs", "--image", "dog.png"], (48, 48)),
    (["--prompt", "a red circle", "--guidance", "1", "--size", "32x48"], (32, 48)),
    (["--prompt", "a <|image_pad|>", "--positions", "arange"], (48, 48)),
]


def test_every_task_draws_a_picture_of_its_own():
    drawn = set()
    for arguments, size in DRAWING:
        sample.main([*arguments, *FAST])
        image = Image.open("sample.png")
        assert image.mode == "RGB" and image.size == size
        drawn.add(image.tobytes())
    assert len(drawn) == len(DRAWING)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--prompt", ""], "empty prompt"),
        (["--prompt", "  "], "empty prompt"),
        ([], "empty prompt"),
        (["--prompt", "a <image>"], "1 <image> placeholders, but 0 images"),
        (["--prompt", "a", "--image", "dog.png"], "0 <image> placeholders, but 1 images"),
        (["--prompt", "a <image>", "--image", "cat.png"], "cat.png: no such image file"),
        (["--prompt", "a <image>", "--image", "."], "no such image file"),
        (["--prompt", "a", "--task", "draw"], "invalid choice: 'draw'"),
        (["--prompt", "a", "--task", "edit"], "task edit takes one image"),
        (["--prompt", "a", "--size", "50"], "nearest is 48"),
        (["--prompt", "a", "--size", "64x1000"], "up to 48"),
        (["--prompt", "a", "--size", "big"], "expected a side"),
        (["--prompt", "a", "--steps", "0"], "expected a whole number from 1"),
        (["--prompt", "a", "--steps", "x"], "--steps"),
        (["--prompt", "a", "--guidance", "nan"], "argument --guidance"),
        (["--prompt", "a", "--guidance", "inf"], "argument --guidance"),
        (["--prompt", "a", "--blend", "2"], "argument --blend: '2': expected a number from 0 to 1"),
        (["--prompt", "a", "--num", "0"], "argument --num: '0': expected a whole number from 1"),
        (["--prompt", "a", "--seed", "-1"], "argument --seed: '-1': expected a whole number"),
        (["--prompt", "a", "--device", "abacus"], "device abacus: not usable"),
        (["--prompt", "a", "--device", "meta"], "device meta: not usable"),
        (["--prompt", "a", "--out", "a.jpg"], "ends in .png"),
        (["--prompt", "a", "--out", "dog.png/a.png"], "dog.png"),
        (["--prompt", "a", "--sd3", "none.safetensors"], "--checkpoint is missing"),
        (["--prompt", "a", "--sd3", "x", "--checkpoint", STAGE1], "x: no such file"),
        (["--prompt", "a", "--lmm", "x", "--checkpoint", STAGE1], "x/config.json"),
        (["--prompt", "a", "--checkpoint", "x"], "x: no such file"),
        (["--prompt", "a", "--checkpoint", SD3], "expected a Dream Engine checkpoint"),
        (["--prompt", "a", "--sd3", STAGE1, "--checkpoint", STAGE1], "no SD3 or SD3.5"),
        (["--prompt", "a", "--sd3", LMM, "--checkpoint", STAGE1], "no SD3 or SD3.5"),
        (["--prompt", "a", "--surprise", "1"], "unrecognized arguments"),
        (["--prompt", "a", "--steps", "1" + "0" * 20], "expected a whole number from 1 to 1e+06"),
        (["--prompt", "a", "--num", "1" + "0" * 12], "expected a whole number from 1 to 10000"),
        (["--prompt", "a", "--size", "1" + "0" * 12], "expected sides below 100000"),
        (["--prompt", "a", "--device", "privateuseone"], "device privateuseone: not usable"),
        (["--prompt", "a ring " * 100_000], "the LMM reads 512 at most"),
        (["--prompt", "caf\udce9"], "half a letter"),
    ],
)
def test_mistakes_get_one_line(arguments, said, capsys):
    assert said in fails(sample.main, arguments, capsys)


@pytest.mark.parametrize(
    "name, content",
    [("empty.png", b""), ("text.png", b"hello"), ("cut.png", None), ("thin.png", None)],
)
def test_bad_images_get_one_line(name, content, capsys):
    if name == "cut.png":
        content = Path("dog.png").read_bytes()[:3000]
    if name == "thin.png":
        Image.new("RGB", (2010, 10)).save(name)
    else:
        Path(name).write_bytes(content)
    said = fails(sample.main, ["--prompt", "a <image>", "--image", name, *FAST], capsys)
    assert "200 times" in said if name == "thin.png" else name in said


def test_one_pixel_is_an_image():
    """It is read as a flat picture of that color."""
    drawn = []
    for size in ((1, 1), (32, 32)):
        Image.new("RGB", size, "red").save("dot.png")
        arguments = ["--prompt", "a <image>", "--image", "dot.png", *FAST]
        sample.main(arguments)
        drawn.append(Image.open("sample.png").tobytes())
    assert len(drawn[0]) == 48 * 48 * 3


@pytest.mark.parametrize(
    "kind, said",
    [
        ("truncated", "c.safetensors: expected a whole .safetensors file"),
        ("mistyped", "c.safetensors: does not fit: unknown adaptor.txt"),
        ("code", "c.safetensors: expected a whole .safetensors file"),
    ],
)
def test_bad_checkpoints_get_one_line(kind, said, capsys):
    if kind == "truncated":
        Path("c.safetensors").write_bytes(STAGE1.read_bytes()[:5000])
    elif kind == "mistyped":
        weights = read_tensors(STAGE1) | {"adaptor.txt": torch.zeros(2)}
        save_file(weights, "c.safetensors", metadata(STAGE1))
    else:
        Path("c.safetensors").write_text("print('hello')")
    arguments = ["--prompt", "a", "--checkpoint", "c.safetensors", *FAST]
    assert said in fails(sample.main, arguments, capsys)


# ---- UniAlignment -------------------------------------------------------------------------------


def test_unialignment_draws_and_edits(uni_folder, capsys):
    drawn = {}
    for name, arguments in {
        "drawn": ["--prompt", "a red circle", "--size", "48x32"],
        "edited": ["--prompt", "make it red", "--image", "dog.png"],
        "same": ["--prompt", "<image> make it red", "--image", "dog.png"],
        "else": ["--prompt", "make it red", "--image", "dog.png", "--negative", "a circle"],
        "composed": ["--prompt", "make a ring", *["--image", "dog.png"] * 3],
        "low": ["--prompt", "make it red", "--image", "dog.png", "--low-memory"],
    }.items():
        out = ["--checkpoint", str(uni_folder), *FAST, "--out", f"{name}.png"]
        unialignment_sample.main([*arguments, *out])
        drawn[name] = Image.open(f"{name}.png")
    assert drawn["drawn"].size == (48, 32) and drawn["composed"].size == (32, 32)
    assert drawn["edited"].tobytes() == drawn["same"].tobytes() == drawn["low"].tobytes()
    assert len({image.tobytes() for image in drawn.values()}) == 4
    settings = json.loads(drawn["edited"].text["settings"])
    assert (settings["steps"], settings["guidance"], settings["negative"]) == (2, 7.0, None)


def test_unialignment_reads(uni_folder, capsys):
    common = ["--checkpoint", str(uni_folder), "--image", "dog.png", *FAST]
    said = []
    for arguments in (
        ["--task", "caption"],
        ["--task", "caption", "--num", "2", "--order", "confident"],
        ["--task", "answer", "--prompt", "how many", "--prompt", "how many red"],
        ["--task", "caption"],
    ):
        unialignment_sample.main([*common, *arguments])
        said.append(capsys.readouterr().out.splitlines())
    assert [len(lines) for lines in said] == [1, 2, 2, 1] and said[0] == said[3]
    assert all(x.strip() for lines in said for x in lines)
    assert os.listdir() == ["dog.png"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--task", "caption"], "takes images and no prompt, but 0 images"),
        (["--task", "caption", "--image", "dog.png", "--prompt", "a"], "1 images and 1 prompts"),
        (["--task", "answer", "--image", "dog.png"], "a prompt for each, but 1 images and 0 prompts"),
        (["--task", "answer", "--image", "dog.png", "--prompt", "a " * 12], "leaves no room"),
        (["--task", "answer", "--image", "dog.png", "--prompt", " "], "empty question"),
        (["--task", "caption", "--image", "dog.png", "--out", "a.png"], "--out has no effect with --task caption"),
        (["--task", "caption", "--image", "dog.png", "--sd3", "x", "--checkpoint", "x"], "x: no such"),
        (["--task", "i2i", "--image", "dog.png"], "invalid choice: 'i2i'"),
        (["--prompt", "a", "--blend", "0.5"], "unrecognized arguments: --blend"),
        (["--prompt", "a", "--order", "confident"], "--order has no effect with --task draw"),
        (["--prompt", " "], "empty prompt"),
        ([], "empty prompt"),
        (["--prompt", "a <image>"], "1 <image> placeholders, but 0 images"),
        (["--prompt", "a", "--size", "40"], "multiples of 16 up to 384"),
        (["--prompt", "a", "--checkpoint", "dog.png"], "dog.png"),
        (["--prompt", "caf\udce9"], "half a letter"),
        (["--prompt", "a", "--negative", "caf\udce9"], "half a letter"),
        (["--task", "answer", "--image", "dog.png", "--prompt", "caf\udce9"], "half a letter"),
    ],
)  # fmt: skip
def test_mistakes_with_unialignment_get_one_line(arguments, said, uni_folder, capsys):
    main = unialignment_sample.main
    assert said in fails(main, ["--checkpoint", uni_folder, *FAST, *arguments], capsys)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--prompt", "a", "--negative", "b"], "unrecognized arguments: --negative b"),
        (["--task", "caption"], "use python -m unialignment.sample --task caption"),
        (["--task", "answer"], "use python -m unialignment.sample --task answer"),
    ],
)
def test_options_of_the_other_system_get_one_line(arguments, said, capsys):
    assert said in fails(sample.main, arguments, capsys)


@pytest.mark.parametrize("more, taken", [([], "x.png"), (["--num", "2"], "x-1.png")])
@pytest.mark.parametrize("program", [sample, unialignment_sample])
def test_a_name_that_is_a_folder_is_found_out_before_drawing(more, taken, program, capsys):
    Path(taken).mkdir()
    said = fails(
        program.main, ["--prompt", "a", "--out", "x.png", "--checkpoint", "none", *more], capsys
    )
    assert said == f"error: --out {taken}: cannot be written (is a folder)"


def test_a_missing_model_is_named_without_the_number_of_the_error(capsys):
    arguments = ["--prompt", "a", "--lmm", "gone", "--checkpoint", STAGE1, *FAST]
    assert fails(sample.main, arguments, capsys).endswith(
        "gone/config.json: no such file or directory"
    )


@pytest.mark.parametrize(
    "name, said",
    [
        ("a" * 252 + ".png", "file name too long"),
        ("\ud800.png", "surrogates not allowed"),
        ("a\0.png", "embedded null byte"),
        ("b\0/a.png", "embedded null byte"),
        ("/proc/a.png", "no such file or directory"),
        ("/proc/a/a.png", "no such file or directory"),
    ],
)
def test_names_that_cannot_be_written_are_found_out_before_drawing(name, said, capsys):
    if name.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("a system without /proc")
    arguments = ["--prompt", "a", "--out", name, "--checkpoint", "none"]
    line = fails(sample.main, arguments, capsys)
    assert line.startswith("error: --out ") and "cannot be written (" in line and said in line


def test_a_name_may_be_as_long_as_the_system_allows(capsys):
    for arguments, name in (([], "a" * 251), (["--num", "2"], "a" * 246)):
        sample.main(["--prompt", "a", "--out", f"{name}.png", *FAST, *arguments])
    expected = ["a" * 246 + end for end in ("-0.png", "-1.png", "-grid.png")]
    assert sorted(os.listdir()) == sorted([*expected, "a" * 251 + ".png", "dog.png"])
    capsys.readouterr()
    said = fails(sample.main, ["--prompt", "a", "--out", "a" * 247 + ".png", "--num", "2"], capsys)
    assert "-grid.png: cannot be written (file name too long)" in said


def test_an_unwritable_folder_gets_one_line(monkeypatch, capsys):
    def refuse(path, *_):  # root may write anywhere
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "open", refuse)
    said = fails(sample.main, ["--prompt", "a", "--out", "a.png"], capsys)
    assert said == "error: --out a.png: cannot be written (permission denied)"


def test_the_program_ends_with_one_line_and_code_two():
    run = subprocess.run(
        [sys.executable, ROOT / "sample.py", "--prompt", ""],
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: empty prompt") and run.stderr.count("\n") == 1


@pytest.mark.parametrize("module, line", [("torch._inductor.exc", True), ("builtins", False)])
def test_without_a_compiler_one_line_says_so(module, line, capsys):
    """A machine without a compiler is the user's to mend; any other fault of torch is a bug."""
    error = type("Failed", (RuntimeError,), {"__module__": module})("no such compiler: c++\nmore")
    with pytest.raises(SystemExit if line else RuntimeError), one_line_errors(), fast.compiling():
        raise error
    said = capsys.readouterr().err
    expected = (
        "error: torch.compile does not work here, leave --compile out (no such compiler: c++)"
    )
    assert said == (expected + "\n" if line else "")


def test_control_c_leaves_nothing_behind(folder):
    command = [sys.executable, ROOT / "sample.py", "--prompt", "a red circle", "--steps", "100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        for line in iter(lambda: run.stderr.read(40), ""):
            if "drawing" in line:
                break
        run.send_signal(signal.SIGINT)
        said = run.stderr.read()
        assert run.wait() == 2
    assert (
        said.strip()
        .splitlines()[-1]
        .endswith("error: interrupted; files already written are whole")
    )
    assert os.listdir(folder) == ["dog.png"]


PROGRAMS = [
    ["sample.py"],
    ["train.py"],
    *(["-m", f"unialignment.{name}"] for name in ("sample", "train")),
    *(["-m", f"mini.{name}"] for name in ("evaluate", "pretrain", "claims")),
    *(["-m", f"tools.{name}"] for name in ("bench", "convert", "geneval", "semgen")),
    *(["-m", f"tools.{name}"] for name in ("reconstruct", "check_manifest")),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_control_c_while_a_program_imports_is_one_line(program):
    command = [sys.executable, "-X", "importtime", *program]  # names each module on stderr
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as run:
        next(line for line in run.stderr if "numpy" in line or "torch." in line)
        run.send_signal(signal.SIGINT)
        start = time.monotonic()
        said = [line for line in run.stderr if not line.startswith("import time:")]
        assert run.wait() == 2 and time.monotonic() - start < 2
    assert said == ["error: interrupted; files already written are whole\n"]


def test_an_import_changes_nothing_for_other_programs():
    code = "import gc, signal, sys; before = signal.getsignal(signal.SIGINT), sys.excepthook; "
    code += "import dream_engine, sample, train, unialignment.sample; "
    code += "assert before == (signal.getsignal(signal.SIGINT), sys.excepthook) and gc.isenabled()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
