"""Caption tables: csv, tsv, jsonl and parquet with the usual names of columns, and lists of lines.

A table of another encoding or without the columns is refused; a broken line of a table is dropped, and the lines after
it are read.
"""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from paris_jax.data.sources.clip import Dropped
from paris_jax.errors import UserError, first_line

# In order of preference: ours, Open-Sora's (path, text), diffusers' and Hugging Face's (file_name, video, prompt).
FILE_COLUMNS = ("file", "path", "video", "video_path", "file_name")
CAPTION_COLUMNS = ("caption", "text", "prompt")
STEMS = ("captions", "metadata")
ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
LISTS = ("videos.txt", "prompts.txt")  # line i of the one is the caption of the file in line i of the other
DELIMITERS = (",", "\t", ";", "|")
MOST_LINES = 1000  # of a quoted field; one that is longer was never closed

Row = tuple[int, dict[str, Any] | str]  # line number, and its columns or its fault


def find_tables(root: Path, named: str) -> list[Path]:
    """The caption tables of a folder: the one that the config names, or all that have a usual name."""
    if named:
        path = root / named  # an absolute path stays as it is
        if not path.is_file():
            raise UserError(f"data.captions={named}: {path} is not a file; give the caption table, or leave it empty")
        return [path]
    return [root / (stem + ending) for stem in STEMS for ending in ENDINGS if (root / (stem + ending)).is_file()]


def read_table(path: Path, video_column: str, caption_column: str) -> Iterator[tuple[str, str, str] | Dropped]:
    """Yields (file, caption, position) of each line of a table, and dropped lines.

    Args:
      path: csv, tsv, jsonl or parquet; any other ending is read as csv.
      video_column, caption_column: names of columns; "" for the usual ones.

    Raises:
      UserError: the table cannot be read as text, or lacks a column.
    """
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
    rows = readers.get(path.suffix.lower(), _csv)(path)
    columns: tuple[str, str] | None = None
    for number, row in rows:
        place = f"{path.name}, line {number}"
        if isinstance(row, str):
            yield Dropped(place, "list", "cannot be read", row)
            continue
        if columns is None:
            columns = _columns(path, list(row), video_column, caption_column)
        file, caption = _value(row.get(columns[0])), _value(row.get(columns[1]))
        if not file:
            yield Dropped(place, "list", "names no file")
        else:
            yield file, caption, place


def _value(value: Any) -> str:
    if isinstance(value, dict):  # a video of Hugging Face's datasets
        value = value.get("path")
    return value if isinstance(value, str) else ""


def _columns(path: Path, names: list[str], video_column: str, caption_column: str) -> tuple[str, str]:
    found = []
    for wanted, usual, field in (
        (video_column, FILE_COLUMNS, "data.video_column"),
        (caption_column, CAPTION_COLUMNS, "data.caption_column"),
    ):
        lower = {str(name).strip().lower(): name for name in reversed(names)}
        match = [lower[name.lower()] for name in ((wanted,) if wanted else usual) if name.lower() in lower]
        if not match:
            what = f"{field}={wanted!r} is not there" if wanted else f"none of {', '.join(usual)} is there"
            listed = ", ".join(map(repr, names[:10]))
            raise UserError(f"{path} has the columns {listed}: {what}; name the column with {field}")
        found.append(match[0])
    return found[0], found[1]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without its mark; raises UserError for another encoding."""
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is not UTF-8 (it begins as UTF-16); save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8") from error


def read_lists(root: Path) -> Iterator[tuple[str, str, str] | Dropped]:
    """The pairs of lines of videos.txt and prompts.txt, as trainers of diffusers have them."""
    paths = [root / name for name in LISTS]
    if not all(path.is_file() for path in paths):
        return
    files, captions = (re.split(r"\r\n|\n|\r", read_text(path).rstrip("\r\n")) for path in paths)
    if len(files) != len(captions):
        raise UserError(
            f"{paths[0]} has {len(files)} lines and {paths[1]} {len(captions)}; make them as long, line by line"
        )
    for number, (file, caption) in enumerate(zip(files, captions, strict=True), 1):
        if file.strip():
            yield file.strip(), caption, f"{LISTS[0]}, line {number}"


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_text(path).split("\n"), 1):  # JSON may hold all other ends of lines
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            yield number, f"is not JSON: {first_line(error)}"
            continue
        yield number, (row if isinstance(row, dict) else "is not a JSON object")


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow; pip install pyarrow, or save the table as csv") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(4096):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as parquet ({first_line(error)}); write it again") from error


def _csv(path: Path) -> Iterator[Row]:
    lines = io.StringIO(read_text(path), newline="").readlines()  # keeps U+2028, which is no end of a line
    if not lines:
        raise UserError(f"{path} is empty; write a line of columns, such as file,caption, and a line for each video")
    csv.field_size_limit(1 << 30)  # of all readers of this process; the default refuses captions of 131,072 letters
    delimiter = _delimiter(path, lines[0])
    header = [name.strip() for name in next(csv.reader([lines[0]], delimiter=delimiter))]
    start = 1
    while start < len(lines):
        if not lines[start].strip():
            start += 1
            continue
        fields, end = _record(lines, start, delimiter)
        if isinstance(fields, list) and len(fields) > len(header):
            fields = (
                f"has {len(fields)} columns where the first line has {len(header)}; quote fields with {delimiter!r}"
            )
        row = dict(zip(header, fields)) if isinstance(fields, list) else fields
        yield start + 1, row
        start = end


def _delimiter(path: Path, header: str) -> str:
    """The delimiter that splits the first line into most columns; of a .tsv file the tab."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    return max(DELIMITERS, key=lambda d: (header.count(d), -DELIMITERS.index(d)))


def _record(lines: list[str], start: int, delimiter: str) -> tuple[list[str] | str, int]:
    """The fields of the record that starts at a line, or its fault, and the line after it."""
    opens = re.search(rf'(^|{re.escape(delimiter)})"', lines[start])
    if not opens:  # quotes inside of a field are characters
        return next(csv.reader([lines[start]], delimiter=delimiter, quoting=csv.QUOTE_NONE)), start + 1
    quotes, end = 0, start
    while end < min(len(lines), start + MOST_LINES):
        quotes, end = quotes + lines[end].count('"'), end + 1
        if quotes % 2 == 0:
            try:
                return next(csv.reader(lines[start:end], delimiter=delimiter, strict=True)), end
            except csv.Error as error:
                return f"has a quote that does not close ({error})", start + 1
    return "has a quote that does not close", start + 1
