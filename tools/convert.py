"""Make a manifest for training from a folder, or from JourneyDB, CC12M, UltraEdit or GRIT.

    python -m tools.convert journeydb train_anno_realease_repath.jsonl --images imgs --out j.jsonl
    python -m tools.convert cc12m shards/ --out cc12m.jsonl     # also grit; ultraedit: .parquet
    python -m tools.convert folder pictures/ --out pictures.jsonl

A folder holds pictures, each beside a .txt file with its caption: dog.jpg and dog.txt. Or it holds
Hugging Face's metadata.jsonl, whose lines name a picture ("file_name") and its caption ("text").
Shards are .tar files of img2dataset; GRIT needs --resize_mode keep_ratio: padding shifts the
boxes. Images in shards and .parquet files are copied byte for byte to a folder named after the
manifest. Faulty records are skipped and counted; tools.check_manifest finds damaged images.
"""

import json
import os
import tarfile
from contextlib import suppress
from functools import partial
from io import BytesIO
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from support.cli import Parser, UserError, one_line_errors, printable, reading

from PIL import Image
from tqdm import tqdm

from checkpoints import read_json
from data import parse_record
from prompts import upright_size
from support.files import find_file, read_lines, whole

COLUMNS = ["source_image", "edited_image", "edit_prompt"]  # of UltraEdit
IMAGES = dict.fromkeys((".jpg", ".jpeg", ".png", ".webp"), "image")
PARTS = {".txt": "txt", ".json": "json"} | IMAGES  # of a sample of img2dataset
LARGEST = 10**8  # bytes; larger files in a shard are skipped


def measure(file):
    """The suffix and the upright [width, height] of an image; UserError if it cannot be opened."""
    try:
        with Image.open(file, formats=("JPEG", "PNG", "WEBP")) as image:
            suffix = {"PNG": ".png", "WEBP": ".webp"}.get(image.format, ".jpg")
            return suffix, list(upright_size(image))
    except Exception:  # noqa: BLE001 - Pillow's decoders raise anything on damaged files
        raise UserError("expected a JPEG, PNG or WebP image") from None


def store(data, path):
    """Write the bytes of an image to path plus suffix unless they are there -> (file, size)."""
    if not isinstance(data, bytes):
        raise UserError("no image")
    suffix, size = measure(BytesIO(data))
    file = path.with_name(path.name + suffix)
    if not file.is_file() or file.read_bytes() != data:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as unfinished:
            unfinished.write_bytes(data)
    return file, size


def inside(folder, name):
    """The image of a name in a folder; UserError if it is not there, or outside of the folder."""
    with suppress(FileNotFoundError):
        file = Path(os.path.abspath(find_file(folder, name)))  # without ..; links stay links
        if file.is_relative_to(os.path.abspath(folder)):
            return file
    raise UserError(f"expected a JPEG, PNG or WebP image inside {folder}, got {name[:100]!r}")


# ---- readers: file -> (place in the file, record) of every record --------------------------------


def read_folder(place):
    """(folder, line) of every line of a metadata.jsonl; or (folder, file) of every image inside."""
    if place.is_file():
        yield from ((row, (place.parent, line)) for row, line in read_lines(place) if line.strip())
    else:
        files = sorted(f for f in place.rglob("*") if f.suffix.lower() in IMAGES and f.is_file())
        if not files:
            raise UserError(f"{place}: holds no JPEG, PNG or WebP image")
        yield from ((file.relative_to(place), (place, file)) for file in files)


def read_samples(file):
    """The samples of a shard, {"image": bytes, "txt": bytes, "json": bytes}."""
    with reading(file.name, "a .tar file"), tarfile.open(file, "r:") as archive:
        members = (member for member in archive if member.isreg() and member.size <= LARGEST)
        split = ((*os.path.splitext(member.name), member) for member in members)
        for key, parts in groupby(split, itemgetter(0)):
            yield key, {PARTS.get(x.lower()): archive.extractfile(m).read() for _, x, m in parts}


def read_rows(file):
    """The rows of a parquet file, {column: value} for COLUMNS."""
    with reading(file.name, "a parquet file, and pyarrow to read it (pip install pyarrow)"):
        import pyarrow.parquet as pq

        batches = pq.ParquetFile(file).iter_batches(batch_size=64, columns=COLUMNS)
        yield from enumerate(row for batch in batches for row in batch.to_pylist())


def read_all(read, files):
    """(place, FILE/NUMBER, record) of all records; the record of a damaged file is a UserError."""
    for file in files:
        try:
            for number, (place, record) in enumerate(read(file)):
                yield f"{file.name}:{str(place)[:100]}: ", f"{file.stem}/{number:09}", record
        except (UserError, OSError) as error:
            yield "", "", UserError(str(error))


# ---- converters: record, path for copies, --images -> line of the manifest -----------------------


def text_at(record, key):
    text = record.get(key)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{key!r} must hold text")
    return text


def convert_journeydb(line, _, images):
    record = read_json("record", line)
    prompt, file = text_at(record, "prompt"), inside(images, text_at(record, "img_path"))
    return {"task": "t2i", "prompt": prompt, "target": file, "size": measure(file)[1]}


def convert_folder(place, *_):
    folder, found = place
    if isinstance(found, bytes):
        record = read_json("record", found)
        file, prompt = inside(folder, text_at(record, "file_name")), text_at(record, "text")
    else:
        file, caption = found, found.with_suffix(".txt")
        if not caption.is_file():
            raise UserError(f"expected its caption in {caption.name}")
        with reading(caption.name, "a caption in UTF-8"), caption.open("rb") as stream:
            prompt = text_at({".txt": stream.read(LARGEST).decode("utf-8-sig").strip()}, ".txt")
    return {"task": "t2i", "prompt": prompt, "target": file, "size": measure(file)[1]}


def convert_cc12m(sample, path, _):
    if "txt" not in sample and "json" in sample:
        prompt = text_at(read_json("json", sample["json"]), "caption")
    else:
        with reading("txt", "UTF-8"):
            prompt = text_at({"txt": sample.get("txt", b"").decode()}, "txt")
    file, size = store(sample.get("image"), path)
    return {"task": "t2i", "prompt": prompt, "target": file, "size": size}


def convert_ultraedit(row, path, _):
    line = {"task": "edit", "instruction": text_at(row, "edit_prompt")}
    for name, column in zip(("source", "target"), COLUMNS):
        image = (row.get(column) or {}).get("bytes")
        line[name], line["size"] = store(image, Path(f"{path}-{name}"))
    return line


def convert_grit(sample, path, _):
    record = read_json("json", sample.get("json", b""))
    segments = split_caption(text_at(record, "caption"), record.get("noun_chunks"))
    file, size = store(sample.get("image"), path)
    return {"task": "objects", "target": file, "segments": segments, "size": size}


def split_caption(caption, chunks):
    """Cut a caption at its noun chunks -> [[text, [[x1, y1, x2, y2], ...]], ...], in thousandths.

    chunks: [[start, end, x1, y1, x2, y2, score], ...] with x and y from 0 to 1. Of texts that
    overlap, the one with the highest score stays. UserError if a chunk is malformed or no box left.
    """
    spans = {}  # (start, end): boxes
    with reading("'noun_chunks'", "a list of [start, end, x1, y1, x2, y2, score]"):
        for *span, x1, y1, x2, y2, _ in sorted(chunks, key=lambda chunk: -chunk[6]):
            start, end = map(int, span)
            box = x1, y1, x2, y2 = [round(1000 * min(max(x, 0), 1)) for x in (x1, y1, x2, y2)]
            if not 0 <= start < end <= len(caption):
                raise UserError(f"noun chunk {start} to {end} must lie inside the caption")
            is_free = all(end <= s or e <= start or (s, e) == (start, end) for s, e in spans)
            if is_free and x1 < x2 and y1 < y2:
                spans.setdefault((start, end), []).append(box)
    if not spans:
        raise UserError("no noun chunk has a box")
    segments, done = [], 0
    for (start, end), boxes in sorted(spans.items()):
        segments += [[caption[done:start], []], [caption[start:end], boxes]]
        done = end
    return [segment for segment in [*segments, [caption[done:], []]] if segment[0]]


DATASETS = {
    "journeydb": (".jsonl", partial(read_lines, longest=-1), convert_journeydb),
    "cc12m": (".tar", read_samples, convert_cc12m),
    "ultraedit": (".parquet", read_rows, convert_ultraedit),
    "grit": (".tar", read_samples, convert_grit),
    "folder": (None, read_folder, convert_folder),
}


def find_files(paths, suffix):
    """The files among paths, and those with the suffix in folders; UserError if names clash.

    Without a suffix: the files metadata.jsonl in each folder, or if there is none, the folder.
    """
    files = []
    for path in map(Path, paths):
        if not suffix and not path.is_dir():
            raise UserError(f"{path}: expected a folder of images")
        if not suffix:
            files += sorted(path.rglob("metadata.jsonl")) or [path]
            continue
        found = sorted(path.glob(f"*{suffix}")) if path.is_dir() else [path]
        if not found or not all(map(Path.is_file, found)):
            raise UserError(f"{path}: expected a {suffix} file or a folder of {suffix} files")
        files += found
    if suffix and len({f.stem for f in files}) < len(files):  # folders of images would clash
        raise UserError("several files have the same name; convert them one at a time")
    return files


def write_manifest(file, records, convert):
    """Write convert(record) for every record, and print the counts of good and faulty records.

    Raises UserError if no record is good. In that case, or if interrupted, no file is written.
    """

    def relative(path):
        return Path(os.path.relpath(path, file.parent)).as_posix()

    written, faults, folder = 0, [], file.with_suffix("")
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as unfinished, unfinished.open("w", encoding="utf-8") as stream:
        for place, name, record in tqdm(records, unit=" records"):
            try:
                if isinstance(record, UserError):
                    raise record
                line = convert(record, folder / name)
                line = json.dumps(line, ensure_ascii=False, default=relative)
                parse_record(line)  # a line that training would reject is faulty, too
                written += stream.write(line + "\n") > 0
            except UserError as error:
                faults.append(f"{place}{error}")
        reasons = printable("; ".join(["", *faults[:3], *["..."][: len(faults) // 4]]))
        if not written:
            raise UserError(f"{file}: not written, as no record is good{reasons}")
    print(f"{file}: {written} lines written, {len(faults)} records skipped{reasons}")


def main(arguments=None):
    parser = Parser(prog="python -m tools.convert", description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("files", nargs="+", help="files of the dataset, or folders")
    parser.add_argument("--out", required=True, help="manifest to write (.jsonl)")
    parser.add_argument("--images", help="folder of the images (journeydb only)")
    args = parser.parse_args(arguments)
    suffix, read, convert = DATASETS[args.dataset]
    files, out = find_files(args.files, suffix), Path(args.out)
    if out.suffix != ".jsonl" or out.is_dir():
        raise UserError(f"--out {out}: expected a file name that ends in .jsonl")
    if out.exists() and any(map(out.samefile, files)):
        raise UserError(f"--out {out}: would overwrite the dataset; choose another name")
    if args.dataset == "journeydb" and not (args.images and Path(args.images).is_dir()):
        raise UserError(f"--images: expected the folder of the images, got {args.images}")
    write_manifest(out, read_all(read, files), lambda *record: convert(*record, args.images))


if __name__ == "__main__":
    with one_line_errors():
        main()
