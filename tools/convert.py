"""Turn public datasets, in the files they are published in, into manifests for training.

    python -m tools.convert journeydb train_anno_realease_repath.jsonl --images imgs --out journeydb.jsonl
    python -m tools.convert cc12m shards/ --out cc12m.jsonl
    python -m tools.convert ultraedit data/*.parquet --out ultraedit.jsonl
    python -m tools.convert grit shards/ --out grit.jsonl

Shards are the .tar files of img2dataset; GRIT's boxes need its --resize_mode keep_ratio, for the
default pads. Images in shards and parquet files are copied, byte for byte, into a folder beside the
manifest that is named like it. Faulty records are skipped and counted; damage inside an image,
though, is only found by `python -m tools.check_manifest`.
"""

import json
import os
import re
import tarfile
from functools import partial
from io import BytesIO
from itertools import groupby
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data import LONGEST_LINE, parse_record
from prompts import upright_size
from support.cli import Parser, UserError, one_line_errors, reading
from support.files import whole

TEXTS = {"prompt": ("prompt",), "caption": ("Task2", "Caption")}  # JourneyDB's
COLUMNS = ["source_image", "edited_image", "edit_prompt"]  # UltraEdit's
PARTS = {"txt": "txt", "json": "json"} | dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image")
LARGEST = {"txt": 10**6, "json": 10**6, "image": 10**8}  # bytes
HEADER = 2**14  # bytes of a header in a .tar file
MEMBER = re.compile(r"(.*[/\\])?([^/\\.]*)\.?([^/\\]*)", re.DOTALL)  # folder, key, suffix


def measure(file):
    """The suffix and the upright [width, height] of an image; raises UserError if it is none."""
    try:
        with Image.open(file, formats=("JPEG", "PNG", "WEBP")) as image:
            suffix = {"PNG": ".png", "WEBP": ".webp"}.get(image.format, ".jpg")
            return suffix, list(upright_size(image))
    except Exception:  # noqa: BLE001 - Pillow's decoders raise anything on damaged files
        raise UserError("no usable JPEG, PNG or WebP image") from None


def store(data, path):
    """Write an image's bytes to path, a suffix added, unless they are there -> (file, size)."""
    if not data or not isinstance(data, bytes):
        raise UserError("no image")
    suffix, size = measure(BytesIO(data))
    file = path.with_name(path.name + suffix)
    if not file.is_file() or file.stat().st_size != len(data):
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as unfinished:
            unfinished.write_bytes(data)
    return file, size


# ---- readers: (place, record) one by one, or (place, UserError) for what cannot be read ---------


def read_lines(files):
    """The lines of JSONL files."""
    for file in files:
        with file.open("rb") as stream:
            number = 0
            while line := stream.readline(LONGEST_LINE):
                number, end = number + 1, line
                while len(end) == LONGEST_LINE and not end.endswith(b"\n"):
                    line, end = UserError("line too long"), stream.readline(LONGEST_LINE)
                yield f"{file.name}:{number}", line


class Headers:
    """The file that tarfile reads headers from: it refuses to read what is too long for one.

    A damaged or hostile header may ask for up to 2^64 bytes, and a file with holes has them.
    """

    def __init__(self, stream):
        self.stream, self.seek, self.tell = stream, stream.seek, stream.tell

    def read(self, size):
        if not 0 <= size <= HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.stream.read(size)


def read_members(file):
    """The regular files in a shard: ((folder, key), part or None, bytes or None if too large)."""
    last = -1
    with (
        reading(file.name, "a .tar file"),
        file.open("rb") as stream,
        tarfile.open(fileobj=Headers(stream), mode="r:") as archive,
    ):
        for member in archive:
            if member.size < 0 or member.offset <= last:  # that would never end
                raise tarfile.ReadError("negative size")
            last = member.offset
            if not member.isreg() or member.issparse():  # no links, no bombs
                continue
            *name, suffix = MEMBER.fullmatch(member.name).groups()
            part, data = PARTS.get(suffix.lower()), None
            if part and member.size <= LARGEST[part]:
                stream.seek(member.offset_data)
                data = stream.read(member.size)
                if len(data) < member.size:
                    raise tarfile.ReadError("cut off")
            yield name, part, data


def read_shards(files):
    """The samples of shards: "image", "txt" and "json" in bytes, and a "name" to write to safely."""
    for file in files:
        seen = set()
        try:
            for (_, key), members in groupby(read_members(file), lambda member: member[0]):
                sample = {part: data for _, part, data in members if part}
                if None in sample.values():
                    sample = UserError("too large")
                elif key in seen:
                    sample = UserError("a second sample")
                elif not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", key):
                    sample = UserError("unsafe name")
                else:
                    sample["name"] = f"{file.stem}/{key}"
                seen.add(key)
                yield f"{file.name}:{key}", sample
        except (UserError, OSError) as error:
            yield "", UserError(str(error))


def read_rows(files):
    """The rows of parquet files: COLUMNS, and a "name".

    Raises UserError before the first if pyarrow is missing, or columns in any of the files.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("parquet files are read by pyarrow: pip install pyarrow") from None
    for file in files:
        with reading(file, "a parquet file"):
            columns = pq.read_schema(file).names
        if missing := [name for name in COLUMNS if name not in columns]:
            raise UserError(f"{file}: no column {missing[0]}, only {', '.join(columns)}")
    for file in files:
        try:
            with reading(file.name):
                batches = pq.ParquetFile(file).iter_batches(batch_size=64, columns=COLUMNS)
                rows = (row for batch in batches for row in batch.to_pylist())
                for number, row in enumerate(rows):
                    yield f"{file.name}:{number}", row | {"name": f"{file.stem}/{number:09}"}
        except (UserError, OSError) as error:
            yield "", UserError(str(error))


# ---- converters: a record to a line of the manifest; raise UserError if it is faulty ------------


def parse(data):
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise UserError("broken JSON") from None


def text_at(record, *keys):
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    if not isinstance(record, str) or not record.strip():
        raise UserError(f"no {' '.join(keys)}")
    return record


def convert_journeydb(line, args):
    record = parse(line)
    prompt, path = text_at(record, *TEXTS[args.text]), text_at(record, "img_path")
    folder = os.path.abspath(args.images)
    file = Path(os.path.abspath(Path(folder, path)))
    if not file.is_relative_to(folder) or not os.path.isfile(file):
        raise UserError(f"no image {path}")
    return {"task": "t2i", "prompt": prompt, "target": file, "size": measure(file)[1]}


def convert_cc12m(sample, args):
    try:
        text = sample.get("txt", b"").decode()
    except UnicodeDecodeError:
        raise UserError("txt is not UTF-8") from None
    prompt = text_at({"txt": text}, "txt")
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
    the highest score stays. Raises UserError if a chunk is broken or no box is left.
    """
    try:
        chunks = [
            (int(start), int(end), [round(1000 * min(max(x, 0), 1)) for x in (x1, y1, x2, y2)])
            for start, end, x1, y1, x2, y2, _ in sorted(chunks, key=lambda chunk: -chunk[6])
        ]
    except (ArithmeticError, LookupError, TypeError, ValueError):
        raise UserError("broken noun_chunks") from None
    spans = {}  # (start, end): boxes
    for start, end, (x1, y1, x2, y2) in chunks:
        if not 0 <= start < end <= len(caption):
            raise UserError(f"noun chunk from {start} to {end}, beyond the caption")
        is_free = all(end <= s or e <= start or (s, e) == (start, end) for s, e in spans)
        if is_free and x1 < x2 and y1 < y2:
            spans.setdefault((start, end), []).append([x1, y1, x2, y2])
    if not spans:
        raise UserError("no noun chunk with a box")
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
    """The files among paths, and those with the suffix in the folders; no two may share a name."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        files += (found := sorted(path.glob(f"*{suffix}")) if path.is_dir() else [path])
        if not found:
            raise UserError(f"{path}: no {suffix} file in this folder")
    if special := [file for file in files if not file.is_file()]:
        raise UserError(f"{special[0]}: not a regular file")
    if len({file.stem for file in files}) < len(files):  # so would their images' folders
        raise UserError("several files have the same name: convert them one by one")
    return files


def write_manifest(file, records, convert):
    """Write convert(record) for every record; print how many there are, and how many were faulty.

    Raises UserError if all are; then, and when interrupted, there is no manifest.
    """

    def relative(path):
        return Path(os.path.relpath(path, file.parent)).as_posix()

    written, skipped, reasons = 0, 0, ""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as unfinished, unfinished.open("wb") as stream:
        for place, record in tqdm(records, unit=" records"):
            try:
                if isinstance(record, UserError):
                    raise record
                line = json.dumps(convert(record), ensure_ascii=False, default=relative)
                parse_record(line)  # what training would refuse is faulty, too
            except UserError as error:
                skipped += 1
                reason = f"; {place} {error}" if place else f"; {error}"
                reasons += reason if skipped <= 3 else "; ..." * (skipped == 4)
            else:
                stream.write(line.encode() + b"\n")
                written += 1
        reasons = "".join(c if c.isprintable() else "?" for c in reasons)  # names from the files
        if not written:
            raise UserError(f"{file}: not written, no usable record{reasons}")
    print(f"{file}: {written} lines written, {skipped} records skipped{reasons}")


def main(arguments=None):
    parser = Parser(prog="python -m tools.convert", description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("files", nargs="+", help="its files, or a folder of them")
    parser.add_argument("--out", required=True, help="the manifest (.jsonl)")
    parser.add_argument("--images", help="journeydb: folder of the images")
    parser.add_argument("--text", choices=TEXTS, default="prompt", help="journeydb: which text")
    args = parser.parse_args(arguments)
    suffix, read, convert = DATASETS[args.dataset]
    files, out = find_files(args.files, suffix), Path(args.out)
    if out.suffix != ".jsonl" or out.is_dir():
        raise UserError(f"{out}: --out must be a file that ends in .jsonl")
    if out.exists() and any(map(out.samefile, files)):
        raise UserError(f"{out}: --out would overwrite the dataset")
    if args.dataset == "journeydb" and not (args.images and Path(args.images).is_dir()):
        raise UserError(f"--images must be the folder of the images, got {args.images}")
    args.folder = out.with_suffix("")
    write_manifest(out, read(files), partial(convert, args=args))


if __name__ == "__main__":
    with one_line_errors():
        main()
