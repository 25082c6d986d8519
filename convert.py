"""Turn public datasets, in the files they are published in, into manifests for training.

    python convert.py journeydb train_anno_realease_repath.jsonl --images imgs --out journeydb.jsonl
    python convert.py cc12m shards/ --out cc12m.jsonl
    python convert.py ultraedit data/*.parquet --out ultraedit.jsonl
    python convert.py grit shards/ --out grit.jsonl

Shards are the .tar files of img2dataset; GRIT's boxes need its --resize_mode keep_ratio, for the
default pads. Images in shards and parquet files are copied, byte for byte, into a folder beside the
manifest that is named like it. Faulty records are skipped and counted; damage inside an image,
though, is only found by `python data.py check`.
"""

import json
import os
import re
import tarfile
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from itertools import groupby
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from cli import Parser, one_line_errors
from prompts import upright_size

TEXTS = {"prompt": ("prompt",), "caption": ("Task2", "Caption")}  # JourneyDB's
COLUMNS = ["source_image", "edited_image", "edit_prompt"]  # UltraEdit's
PARTS = {"txt": "txt", "json": "json"} | dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image")
MEMBER = re.compile(r"(.*[/\\])?([^/\\.]*)\.?([^/\\]*)", re.DOTALL)  # folder, key, suffix


@contextmanager
def whole_file(file):
    """Open a file for writing bytes under a temporary name; it gets its own once it is whole."""
    unfinished = file.with_name(file.name + ".partial")
    try:
        with unfinished.open("wb") as stream:
            yield stream
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def measure(file):
    """The suffix and the upright [width, height] of an image; raises ValueError if it is none."""
    try:
        with Image.open(file, formats=("JPEG", "PNG", "WEBP")) as image:
            suffix = {"PNG": ".png", "WEBP": ".webp"}.get(image.format, ".jpg")
            return suffix, list(upright_size(image))
    except Exception:  # noqa: BLE001 - Pillow's decoders raise anything on damaged files
        raise ValueError("no usable JPEG, PNG or WebP image") from None


def store(data, path):
    """Write an image's bytes to path, a suffix added, unless they are there -> (file, size)."""
    if not data:
        raise ValueError("no image")
    suffix, size = measure(BytesIO(data))
    file = path.with_name(path.name + suffix)
    if not file.is_file() or file.stat().st_size != len(data):
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as stream:
            stream.write(data)
    return file, size


# ---- readers: (place, record) one by one, or (place, ValueError) for what cannot be read --------


def read_lines(files):
    """The lines of JSONL files."""
    for file in files:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                yield f"{file.name}:{number}", line


def read_shards(files):
    """The samples of shards: "image", "txt" and "json" in bytes, and a "name" to write to safely."""
    for file in files:
        seen = set()
        try:
            with tarfile.open(file, "r:") as archive:
                plain = (m for m in archive if m.isreg() and not m.issparse())  # no links, no bombs
                members = ((MEMBER.fullmatch(m.name), m) for m in plain)
                for (_, key), group in groupby(members, lambda pair: pair[0].group(1, 2)):
                    sample = {"name": f"{file.stem}/{key}"}
                    for name, member in group:
                        if part := PARTS.get(name[3].lower()):
                            sample[part] = archive.extractfile(member).read()
                    if key in seen or not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", key):
                        sample = ValueError("a second sample" if key in seen else "unsafe name")
                    seen.add(key)
                    yield f"{file.name}:{key}", sample
        except (tarfile.TarError, OSError, ValueError) as error:
            yield file.name, ValueError(f"not a .tar file, or damaged: {error}")


def read_rows(files):
    """The rows of parquet files: COLUMNS, and a "name".

    Raises ValueError before the first if pyarrow is missing, or columns in any of the files.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError("parquet files are read by pyarrow: pip install pyarrow") from None
    for file in files:
        try:
            columns = pq.read_schema(file).names
        except (pa.ArrowException, OSError, ValueError):
            raise ValueError(f"{file}: not a parquet file") from None
        if missing := [name for name in COLUMNS if name not in columns]:
            raise ValueError(f"{file}: no column {missing[0]}, only {', '.join(columns)}")
    for file in files:
        try:
            batches = pq.ParquetFile(file).iter_batches(batch_size=64, columns=COLUMNS)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows):
                yield f"{file.name}:{number}", row | {"name": f"{file.stem}/{number:09}"}
        except (pa.ArrowException, OSError, ValueError) as error:
            yield file.name, ValueError(f"damaged: {error}")


# ---- converters: a record to a line of the manifest; raise ValueError if it is faulty -----------


def parse(data):
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("broken JSON") from None


def text_at(record, *keys):
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    if not isinstance(record, str) or not record.strip():
        raise ValueError(f"no {' '.join(keys)}")
    return record


def convert_journeydb(line, args):
    record = parse(line)
    prompt, path = text_at(record, *TEXTS[args.text]), text_at(record, "img_path")
    folder = os.path.abspath(args.images)
    file = Path(os.path.abspath(Path(folder, path)))
    if not file.is_relative_to(folder) or not os.path.isfile(file):
        raise ValueError(f"no image {path}")
    return {"task": "t2i", "prompt": prompt, "target": file, "size": measure(file)[1]}


def convert_cc12m(sample, args):
    prompt = text_at({"txt": sample.get("txt", b"").decode()}, "txt")
    file, size = store(sample.get("image"), args.folder / sample["name"])
    return {"task": "t2i", "prompt": prompt, "target": file, "size": size}


def convert_ultraedit(row, args):
    instruction = text_at(row, "edit_prompt")
    images = (row[name] if isinstance(row[name], dict) else {} for name in COLUMNS[:2])
    before, after = (image.get("bytes") for image in images)
    source, _ = store(before, args.folder / f"{row['name']}-source")
    target, size = store(after, args.folder / f"{row['name']}-target")
    line = {"task": "edit", "source": source, "instruction": instruction}
    return line | {"target": target, "size": size}


def convert_grit(sample, args):
    record = parse(sample.get("json", b""))
    segments = split_caption(text_at(record, "caption"), record.get("noun_chunks"))
    file, size = store(sample.get("image"), args.folder / sample["name"])
    return {"task": "objects", "target": file, "segments": segments, "size": size}


def split_caption(caption, chunks):
    """Cut a caption at its noun chunks -> [[text, [[x1, y1, x2, y2], ...]], ...], in thousandths.

    chunks: [start, end, x1, y1, x2, y2, score], edges from 0 to 1. Of chunks whose texts overlap
    the highest score stays. Raises ValueError if a chunk is broken or no box is left.
    """
    try:
        chunks = [
            (int(start), int(end), [round(1000 * min(max(x, 0), 1)) for x in (x1, y1, x2, y2)])
            for start, end, x1, y1, x2, y2, _ in sorted(chunks, key=lambda chunk: -chunk[6])
        ]
    except (ArithmeticError, LookupError, TypeError, ValueError):
        raise ValueError("broken noun_chunks") from None
    spans = {}  # (start, end): boxes
    for start, end, (x1, y1, x2, y2) in chunks:
        if not 0 <= start < end <= len(caption):
            raise ValueError(f"noun chunk from {start} to {end}, beyond the caption")
        free = all(end <= s or e <= start or (s, e) == (start, end) for s, e in spans)
        if free and x1 < x2 and y1 < y2:
            spans.setdefault((start, end), []).append([x1, y1, x2, y2])
    if not spans:
        raise ValueError("no noun chunk with a box")
    segments, done = [], 0
    for (start, end), boxes in sorted(spans.items()):
        segments += [[caption[done:start], []], [caption[start:end], boxes]]
        done = end
    return [segment for segment in [*segments, [caption[done:], []]] if segment[0]]


# ---- the program --------------------------------------------------------------------------------

DATASETS = {
    "journeydb": (".jsonl", read_lines, convert_journeydb),
    "cc12m": (".tar", read_shards, convert_cc12m),
    "ultraedit": (".parquet", read_rows, convert_ultraedit),
    "grit": (".tar", read_shards, convert_grit),
}


def find_files(paths, suffix):
    """Files as given, and those with the suffix in given folders; no two may have one name."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        files += (found := sorted(path.glob(f"*{suffix}")) if path.is_dir() else [path])
        if not found:
            raise ValueError(f"{path}: no {suffix} file in this folder")
    if len({file.stem for file in files}) < len(files):  # so would their images' folders
        raise ValueError("several files have the same name: convert them one by one")
    return files


def write_manifest(file, records, convert):
    """Write convert(record) for every record; print how many there are, and how many were faulty.

    Raises ValueError if all are; then, and when interrupted, there is no manifest.
    """

    def relative(path):
        return Path(os.path.relpath(path, file.parent)).as_posix()

    written, skipped, told = 0, 0, ""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as stream:
        for place, record in tqdm(records, unit=" records"):
            try:
                if isinstance(record, ValueError):
                    raise record
                line = json.dumps(convert(record), ensure_ascii=False, default=relative)
                stream.write(line.encode() + b"\n")
                written += 1
            except ValueError as error:
                skipped += 1
                told += f"; {place} {error}" if skipped <= 3 else "; ..." * (skipped == 4)
        told = "".join(c if c.isprintable() else "?" for c in told)  # names from the files
        if not written:
            raise ValueError(f"{file}: not written, no usable record{told}")
    print(f"{file}: {written} lines written, {skipped} records skipped{told}")


def main(argv=None):
    parser = Parser(description="Turn a public dataset into a manifest for training.")
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("files", nargs="+", help="its files, or a folder of them")
    parser.add_argument("--out", required=True, help="the manifest (.jsonl)")
    parser.add_argument("--images", help="journeydb: folder of the images")
    parser.add_argument("--text", choices=TEXTS, default="prompt", help="journeydb: which text")
    args = parser.parse_args(argv)
    suffix, read, convert = DATASETS[args.dataset]
    files, out = find_files(args.files, suffix), Path(args.out)
    if out.suffix != ".jsonl" or out.is_dir():
        raise ValueError(f"{out}: --out must be a file that ends in .jsonl")
    if out.exists() and any(map(out.samefile, files)):
        raise ValueError(f"{out}: --out would overwrite the dataset")
    if args.dataset == "journeydb" and not (args.images and Path(args.images).is_dir()):
        raise ValueError(f"--images must be the folder of the images, got {args.images}")
    args.folder = out.with_suffix("")
    write_manifest(out, read(files), partial(convert, args=args))


if __name__ == "__main__":
    with one_line_errors():
        main()
