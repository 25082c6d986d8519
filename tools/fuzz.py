"""Run the programs on hostile inputs, in this process, and count how they end.

    python -m tools.fuzz --minutes 10 --out docs/results/fuzz.json
    python -m tools.fuzz --seed 0 --only 123    # repeat input 123 of seed 0, and print what it wrote

An input is one of COMMANDS with a fault in an option or in a file; it depends on the seed and its number
alone. It is accepted (exit code 0, or 1 of check_manifest) or refused (exit code 2, one printable line on
stderr). All else is a bug. "tracebacks": any other end or line. "hangs": no end within LIMIT seconds.
"wrong": accepted, but NaN was drawn, read or saved, or code in a file was run. Exit code 1 if there is one.
"""

import faulthandler
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from support.cli import Parser, number, one_line_errors, whole_number

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import sample
import train
import unialignment.sample as uni_sample
import unialignment.train as uni_train
from checkpoints import metadata
from dream_engine import MINI
from mini import evaluate
from support.files import require_writable, write_json
from tools import bench, check_manifest, convert, geneval, reconstruct, semgen

LIMIT, BUGS, ROOT = 50, ("tracebacks", "wrong", "hangs"), Path(__file__).parent.parent
# fmt: off
TEXTS = ("", " ", "\0", "\ud800", "\x1b[31m", "\n", "a" * 300, "<image>", "--", "%s{0}", "\u202e", "é")
NUMBERS = ("nan", "inf", "-1", "0", "1", "1e400", "-0.0", "0x10", "1_0", "٣", "9" * 400, "9" * 5000)
VALUES = (None, True, -1, 0, 0.5, 7, 10**9, 10**18, 10**400, math.nan, math.inf, [], {}, [[]], *TEXTS)
BYTES = (b"", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n", b"GGUF\3", b"%!PS\n", b"null",
         b"\xef\xbb\xbf", b"\xff\xfe{\0}\0", b"[" * 10**5, b"\xff" * 8, b"{}\n", b"cos\nmkdir\n(S'code was run'\ntR.")
NO_FILES = {"fifo": getattr(os, "mkfifo", os.mkdir), "dir": os.mkdir, "null": lambda x: os.symlink(os.devnull, x),
            "loop": lambda x: os.symlink(x, x)}  # name: function that makes it at a path
PLACES = (*NO_FILES, "a.jpg/x", "a" * 250 + ".png", "/proc/x.png", ".", "\ud800.png")
STEP = "--device cpu --steps 1 --size 16 "
DRAW, TRAIN = STEP + "--prompt ring ", STEP + "--batch 1 --sample-every 0 --save-every 1 --out run "
READ, STAGE2 = "--device cpu --steps 1 --image a.jpg ", "--checkpoint stage2.safetensors "
COMMANDS = [  # weight, function, arguments; the files that they name are those of `lay`
    *((2, program.parse, "") for program in (sample, uni_sample, uni_train)), (2, train.parse, "--stage 2"),
    *((1, tool.main, "none") for tool in (bench, evaluate, check_manifest, reconstruct)),
    (1, geneval.main, "--metadata none"), (1, semgen.main, "--bench none"), (1, evaluate.main, "VAE --num 6"),
    (3, sample.main, DRAW), (5, sample.main, READ + "--task edit --prompt red"), (2, uni_sample.main, DRAW),
    (9, sample.main, DRAW + STAGE2 + "--lmm qwen2-vl-mini"), (3, reconstruct.main, STEP + "."),
    (3, sample.main, DRAW + STAGE2 + "--sd3 sd3.5_mini.safetensors"),
    (9, uni_sample.main, DRAW + "--checkpoint unialignment"), (2, uni_sample.main, READ + "--task answer --prompt x"),
    (4, uni_sample.main, READ + "--checkpoint unialignment --task caption"),
    (2, uni_train.main, TRAIN + "--text-encoder t5-mini"), (1, uni_train.main, TRAIN + "--data manifest.jsonl"),
    (3, train.main, TRAIN + "--stage 2 --checkpoint stage1.safetensors"), (2, train.main, TRAIN + "--stage 1 --resume"),
    (1, train.main, TRAIN + "--stage 1 --buckets --data manifest.jsonl"), (9, check_manifest.main, "manifest.jsonl"),
    (1, geneval.main, STEP + "--num 1 --metadata records.jsonl"), (1, semgen.main, STEP + "--bench records.jsonl"),
    (5, convert.main, "journeydb records.jsonl --images . --out o.jsonl"),
    (1, convert.main, "cc12m a.tar --out o.jsonl"), (4, convert.main, "grit a.tar --out o.jsonl"),
]
RECORD = {"tag": "", "prompt": "a ring", "img_path": "a.jpg", "image_path": "a.jpg", "caption": "a dog here",
          "noun_chunks": [[0, 5, 0.1, 0.1, 0.8, 0.7, 0.9]]} | dict.fromkeys(semgen.GUIDANCE, "a ring")
LINES = {"records.jsonl": [json.dumps(RECORD)], "a.tar": [json.dumps(RECORD)], "manifest.jsonl": re.findall("{.*}", data.__doc__)}
PICTURES = (("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("I;16", "PNG"), ("RGBA", "WEBP"), ("F", "TIFF"))
# fmt: on


def lay(name, rng):
    """Lay the valid files that a word of a command stands for in the current folder."""
    if name == "--resume":
        end(train.main, ["--stage", "1", *TRAIN.split()])
    elif name in LINES:
        Path(name.replace(".tar", ".json")).write_text("\n".join(LINES[name]))
    elif name != "." and (MINI / name).exists():
        (shutil.copytree if (MINI / name).is_dir() else shutil.copy)(MINI / name, name)
    for file in ("a.jpg", "b.jpg") if name in (*LINES, ".", "a.jpg") else ():
        mode, kind = rng.choice(PICTURES)
        Image.linear_gradient("L").resize((24, 16)).convert(mode).save(file, kind)


def damage(file, rng):
    """Put a fault into a file, or something in its place that is not a file -> the kind of fault."""
    content, kind = file.read_bytes(), file.suffix if rng.random() < 0.7 else ""
    if kind == ".safetensors":
        damage_tensors(file, rng)
        return "tensors"
    if kind in (".json", ".jsonl"):
        value = list(map(json.loads, content.splitlines() if kind == ".jsonl" else [content]))
        damage_json(value, rng)
        file.write_text("\n".join(map(json.dumps, value)))
        return "JSON values"
    a, b = sorted(rng.choices(range(len(content) + 1), k=2))
    start, noise = rng.choice(BYTES), rng.randbytes(min(b - a, 9))
    changed = [content[:a] + noise + content[a + len(noise) :]] * 3
    cut = content[:a], content[:a] + content[b:], content[:b] + content[a:], start, start + content
    file.unlink()
    other = rng.choice((*changed, *cut, *NO_FILES))
    NO_FILES.get(other, lambda path: path.write_bytes(other))(file)
    return "bytes"


def damage_json(value, rng):
    """Replace, drop or rename one entry, at any depth."""
    while True:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if not (isinstance(value[key], dict | list) and value[key]) or rng.random() < 0.1:
            break
        value = value[key]
    how, old, value[key] = rng.random(), value[key], rng.choice(VALUES)
    if how < 0.2:
        del value[key]
    if how < 0.1 and isinstance(value, dict):
        value[rng.choice(TEXTS)] = old


def damage_tensors(file, rng):
    """Change, rename or drop a tensor; in a folder, perhaps store all as a pickle or as shards."""
    tensors, about, how = load_file(file), metadata(file), rng.randrange(10)
    x = tensors.pop(name := rng.choice(sorted(tensors)))
    one, value = x.clone(), rng.choice((math.nan, math.inf))
    one.view(-1)[rng.randrange(x.numel())] = value
    other = getattr(torch, rng.choice(["float64", "float8_e4m3fn", "int8", "bool", "complex64"]))
    changed = one, one, x * value, x[:0], x[None], x.flatten(), x.to(other)
    names = f"module.{name}", f"{name}.weight_scale", rng.choice(TEXTS).replace("\ud800", "?")
    more = {name: rng.choice(changed)} if how % 3 else rng.choice([{}, *({k: x} for k in names)])
    if how > 1 or file.parent == Path():
        return save_file(tensors | more, file, about)
    file.unlink()
    if how == 0:
        tensors[name] = rng.choice((x, None, x.to_sparse(), [x], x.to("meta")))
        return torch.save(rng.choice((tensors, {"state_dict": tensors})), file.with_suffix(".bin"))
    index = dict.fromkeys(tensors, "1.safetensors") | {name: "2.safetensors"}
    save_file(tensors, file.with_name("1.safetensors"))
    save_file({name: x}, file.with_name("2.safetensors"))
    damage_json(index, rng)
    return Path(f"{file}.index.json").write_text(json.dumps({"weight_map": index}))


def build(rng):
    """Lay the files of a command, one with a fault -> the kind of fault, function, arguments."""
    _, function, line = rng.choices(COMMANDS, [weight for weight, *_ in COMMANDS])[0]
    arguments, kind = line.split(), "options"
    for name in arguments:
        lay(name, rng)
    files = sorted(file for file in Path().rglob("*") if file.is_file())
    if files and rng.random() < 0.8:
        kind = damage(rng.choice(files), rng)
    else:
        for place, make in NO_FILES.items():
            make(place)
        flags = re.findall("--[a-z0-9-]+", end(function, ["--help"])[1])
        values = (rng.choice(rng.choice((TEXTS, PLACES, NUMBERS))) for _ in range(2))
        arguments += [f"{rng.choice(flags)}={value}" for value in values][: rng.choice((1, 1, 2))]
    if "a.tar" in arguments:
        shutil.make_archive("a", "tar")
    return kind, function, arguments


class Hang(BaseException):
    """Raised after LIMIT seconds."""


def ring(*_):
    raise Hang


def end(function, arguments):
    """Run function(arguments) -> how it ends ("accepted", "refused" or one of BUGS), what it wrote."""
    out, err, finite, code = io.StringIO(), io.StringIO(), [], 0
    alarm = getattr(signal, "setitimer", lambda *_: None)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, ring)
    watch = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, x: finite.append(not torch.is_tensor(x) or x.isfinite().all())
    )
    try:
        faulthandler.dump_traceback_later(LIMIT + 9, exit=True, file=sys.__stderr__)  # hangs in C
        alarm(0, LIMIT, 1)
        with redirect_stdout(out), redirect_stderr(err), one_line_errors():
            function(arguments)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is counted
        return "hangs" if isinstance(error, Hang) else "tracebacks", traceback.format_exc()
    finally:
        alarm(0, 0)
        faulthandler.cancel_dump_traceback_later()
        watch.remove()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # train.py has set its own
    written, lines = out.getvalue() + err.getvalue(), err.getvalue().split("\n")
    lines = [line for line in lines if line and "\r" not in line and line[:8] != "skipped "]
    if lines and lines[-1].startswith("error: interrupted"):
        raise KeyboardInterrupt
    is_clean = re.sub("[\r\n]", "", written).isprintable() and (code != 2 or len(lines) == 1)
    if code not in (0, 1 if function == check_manifest.main else 0, 2) or not is_clean:
        return "tracebacks", f"exit code {code}: {written}"
    for file in Path().glob("run/*.safetensors") if code == 0 else ():
        finite += [x.isfinite().all() for x in load_file(file).values()]
    if Path("code was run").exists() or (code != 2 and not all(finite)):
        return "wrong", written
    return "refused" if code == 2 else "accepted", written


def fuzz(seed, numbers, deadline=math.inf, show=False):
    """Run inputs until a time -> {kind of fault: {how it ended: inputs}}, {cause of a bug: a line}."""
    counts, causes, home = {}, {}, Path.cwd()
    for n in numbers:
        if time.monotonic() > deadline:
            break
        print(f"\rseed {seed}, input {n} ", end="", file=sys.stderr, flush=True)
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            os.chdir(folder)
            try:
                kind, function, arguments = build(random.Random(f"{seed} {n}"))
                how, written = end(function, arguments)
            finally:
                os.chdir(home)
        counts.setdefault(kind, Counter())[how] += 1
        place = re.findall(rf'File "{ROOT}/(?!tools/fuzz)(.*), in', written)[-1:]
        line = f"{how}: --seed {seed} --only {n} ({function.__module__} {arguments}, {kind}): "
        line += f"{place} {written if show else written[-200:]}"
        if show or (how in BUGS and causes.setdefault((how, function, *place), line) == line):
            print(re.sub("[^\n -~]", lambda c: ascii(c[0])[1:-1], line), flush=True)
    return counts, causes


def main(arguments=None):
    parser = Parser(prog="python -m tools.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=number(0, 10_000), default=10)
    parser.add_argument("--seed", type=whole_number(0), default=0)
    parser.add_argument("--only", type=whole_number(0), help="the number of one input")
    parser.add_argument("--out", default="runs/fuzz.json", help="file for the counts")
    args = parser.parse_args(arguments)
    require_writable(args.out, "--out")
    is_one, deadline = args.only is not None, time.monotonic() + 60 * args.minutes
    counts, causes = fuzz(args.seed, [args.only] if is_one else count(), deadline, show=is_one)
    if not is_one:
        total = sum(counts.values(), Counter())
        results = {how: total[how] for how in ("accepted", "refused", *BUGS)}
        about = {"seed": args.seed, "inputs": total.total()}
        write_json(args.out, about | results | {"kinds": counts})
    sys.exit(bool(causes))


if __name__ == "__main__":
    with one_line_errors():
        main()
