"""Mistakes end in one line, bugs in a traceback; files are whole or not there."""

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from support.cli import Parser, UserError, number, one_line_errors, reading, whole_number
from support.files import markdown_table, sheet, whole, write_png, write_text

ROOT = Path(__file__).parent.parent


def test_a_mistake_is_one_line_and_exit_code_two(capsys):
    for error in (
        UserError("two\nlines"),
        FileNotFoundError("a: no such file"),
        KeyboardInterrupt(),
    ):
        with pytest.raises(SystemExit) as end, one_line_errors():
            raise error
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, RuntimeError, AttributeError])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(error, match="planted"), one_line_errors():
        raise error("planted")


def test_a_bug_in_a_program_keeps_its_traceback():
    """Planted where all that is drawn passes through."""
    code = (
        "import flow, sample; flow.euler = lambda *a: int('planted'); from support.cli import *\n"
    )
    code += "with one_line_errors(): sample.main(['--prompt', 'a ring', '--steps', '1'])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert run.returncode == 1 and "Traceback" in run.stderr
    assert run.stderr.strip().endswith(
        "ValueError: invalid literal for int() with base 10: 'planted'"
    )


def test_reading_names_the_file_and_the_cause_and_keeps_it(monkeypatch):
    for error in (KeyError("width"), RecursionError("deep"), MemoryError(), OverflowError("big")):
        with (
            pytest.raises(
                UserError, match=f"a.json: expected a dog .{type(error).__name__}"
            ) as end,
            reading("a.json", "a dog"),
        ):
            raise error
        assert end.value.__cause__ is error
    with pytest.raises(UserError, match="^as it is$"), reading("a.json"):
        raise UserError("as it is")
    monkeypatch.setenv("DREAM_ENGINE_TRACEBACK", "1")
    with pytest.raises(UserError), one_line_errors(), reading("a.json"):
        raise KeyError("width")


@pytest.mark.parametrize("text", ["0", "11", "1.5", "x", "nan", "1e1", "10" * 20, ""])
def test_whole_numbers_out_of_range_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number from 1 to 10"):
        whole_number(1, 10)(text)
    assert whole_number(1, 10)("10") == 10


@pytest.mark.parametrize("text", ["0", "1.1", "nan", "inf", "x", "1e400"])
def test_numbers_out_of_range_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a number above 0 and at most 1"):
        number(0, 1, exclude_low=True)(text)
    assert number(0, 1)("0") == 0 and number(0, 1)("1") == 1


def test_options_are_not_abbreviated():
    parser = Parser()
    parser.add_argument("--steps")
    with pytest.raises(UserError, match="unrecognized arguments: --ste"):
        parser.parse_args(["--ste", "3"])


def test_a_file_is_whole_or_as_before(tmp_path):
    write_text(tmp_path / "a.txt", "before")
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "a.txt").read_text() == "before"
    write_png(tmp_path / "a.png", Image.new("RGB", (2, 2), "red"), {"prompt": "ü"})
    assert Image.open(tmp_path / "a.png").text == {"prompt": "ü"}
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.png", "a.txt"]


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    file = tmp_path / "a.bin"
    with whole(file) as first, whole(file) as second:
        assert first != second and first.suffix == second.suffix == ".bin"
        first.write_bytes(b"first" * 9)
        second.write_bytes(b"second")
    assert file.read_bytes() == b"first" * 9 and os.listdir(tmp_path) == ["a.bin"]


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    """Not even one of the very name that is written first, or of the file's own name."""
    (tmp_path / "precious").write_text("precious")
    monkeypatch.setattr(os, "urandom", lambda n: bytes(n))
    (tmp_path / f".{'00' * 8}.partial.txt").symlink_to("precious")
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "a.txt", "new")
    monkeypatch.undo()
    (tmp_path / "a.txt").symlink_to("precious")
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "a.txt").is_symlink() and (tmp_path / "a.txt").read_text() == "new"


def save_tensors(file):
    with whole(file) as partial:
        save_file({"x": torch.zeros(2)}, partial)


WRITERS = [
    save_tensors,
    partial(write_text, text=""),
    partial(write_png, image=Image.new("L", (1, 1))),
]


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@pytest.mark.parametrize("write", WRITERS, ids=["safetensors", "text", "png"])
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_permissions_of_new_files(write, umask, tmp_path):
    before = os.umask(umask)
    try:
        write(tmp_path / ("a" * 251 + ".end"))
    finally:
        os.umask(before)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize(
    "error, said",
    [
        (
            FileNotFoundError(2, "No such file or directory", "a.png"),
            "a.png: no such file or directory",
        ),
        (OSError(36, "File name too long", "b", None, "a"), "a: file name too long"),
        (OSError(28, "No space left on device"), "no space left on device"),
        (FileNotFoundError("a: expected\n a picture"), "a: expected a picture"),
        (ValueError("embedded null byte"), "embedded null byte"),
    ],
)
def test_an_error_of_the_system_is_one_line_without_its_number(error, said, capsys):
    with pytest.raises(SystemExit), one_line_errors():
        raise error
    assert capsys.readouterr().err == f"error: {said}\n"


def test_a_sheet_holds_every_picture_where_it_belongs():
    red, blue = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
    plain = sheet([[red, blue], [blue]], gap=0)
    assert plain.size == (8, 8) and plain.getpixel((5, 1)) == plain.getpixel((1, 5)) == (0, 0, 255)
    wide = sheet([([red], "a caption")], height=40)
    assert wide.height == 48 and wide.getpixel((20, 20)) == (255, 0, 0) and wide.width > 300


def test_a_table_is_markdown():
    assert markdown_table(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
