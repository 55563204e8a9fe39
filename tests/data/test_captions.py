"""Caption tables: all the ways in which people write them, and broken lines, which cost nothing but themselves."""

import json
from pathlib import Path

import pytest

from paris_jax.data.sources import captions
from paris_jax.data.sources.clip import Dropped
from paris_jax.errors import UserError


def read(path: Path, text: str | bytes, video_column: str = "", caption_column: str = "") -> list:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    rows = captions.read_table(path, video_column, caption_column)
    return [(row.id, row.reason) if isinstance(row, Dropped) else row[:2] for row in rows]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.csv", "file,caption\na.mp4,x\n"),
        ("captions.csv", "\ufefffile,caption\r\na.mp4,x\r\n"),
        ("captions.csv", "file,caption\ra.mp4,x\r"),
        ("captions.csv", "FILE;Caption\na.mp4;x"),
        ("captions.tsv", "path\ttext\na.mp4\tx\n"),
        ("captions.csv", "video\tprompt\na.mp4\tx\n"),
        ("captions.csv", "file_name|text\na.mp4|x\n"),
        ("meta.csv", "path,text,num_frames,fps\na.mp4,x,51,24\n"),  # Open-Sora
        ("captions.csv", 'file,caption\n\n"a.mp4","x"\n'),
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": "x"}\n\n'),
        ("metadata.jsonl", '\ufeff{"video": {"path": "a.mp4", "bytes": null}, "prompt": "x"}\r\n'),
    ],
)
def test_usual_tables_are_read_as_they_are(tmp_path, name, text):
    assert read(tmp_path / name, text) == [("a.mp4", "x")]


@pytest.mark.parametrize(
    "caption",
    [
        "café, at night",
        "tab\there",
        'she said "go"',
        "two\nlines",
        "a line\u2028separator and \u0085 next line",
        '5" screen',
        "x" * 200_000,
        "🎬 视频 \u202e",
    ],
)
def test_every_character_of_a_caption_survives(tmp_path, caption):
    quoted = caption.replace('"', '""')
    assert read(tmp_path / "captions.csv", f'file,caption\na.mp4,"{quoted}"\nb.mp4,y\n') == [
        ("a.mp4", caption),
        ("b.mp4", "y"),
    ]
    line = json.dumps({"file": "a.mp4", "caption": caption}, ensure_ascii=False)
    assert read(tmp_path / "captions.jsonl", line + "\n" + line) == [("a.mp4", caption)] * 2


def test_quotes_inside_of_fields_are_characters(tmp_path):
    rows = read(tmp_path / "captions.csv", 'file,caption\na.mp4,a 5" screen\nb.mp4,"y"\n')
    assert rows == [("a.mp4", 'a 5" screen'), ("b.mp4", "y")]


@pytest.mark.parametrize("after", ["b.mp4,y\nc.mp4,z\n", 'b.mp4,y\nc.mp4,"z"\n', 'b.mp4,"y"\nc.mp4,z\n'])
def test_an_unclosed_quote_costs_its_line_only(tmp_path, after):
    rows = read(tmp_path / "captions.csv", 'file,caption\na.mp4,"x\n' + after)
    assert rows == [("captions.csv, line 2", "cannot be read"), ("b.mp4", "y"), ("c.mp4", "z")]


def test_broken_lines_are_dropped_by_place(tmp_path):
    rows = read(tmp_path / "captions.csv", "file,caption\na.mp4,x, and more\n,y\nb.mp4\nc.mp4,z\n")
    assert rows == [
        ("captions.csv, line 2", "cannot be read"),
        ("captions.csv, line 3", "names no file"),
        ("b.mp4", ""),
        ("c.mp4", "z"),
    ]
    rows = read(tmp_path / "captions.jsonl", '{\n["a.mp4"]\n{"file": "b.mp4", "caption": "y"}\n{"caption": "z"}\n')
    assert [row[0] for row in rows] == [
        *("captions.jsonl, line 1", "captions.jsonl, line 2", "b.mp4", "captions.jsonl, line 4")
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,caption\na.mp4,café\n".encode("latin-1"), r"captions\.csv is not UTF-8 \(byte 22"),
        ("file,caption\na.mp4,x\n".encode("utf-16"), r"\(it begins as UTF-16\); save it as UTF-8"),
        (b"name,said\na.mp4,x\n", r"has the columns 'name', 'said': none of file, path"),
        (b"", "is empty"),
    ],
)
def test_a_table_that_is_wrong_as_a_whole_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path / "captions.csv", text)


def test_columns_may_be_named(tmp_path):
    text = "id,said,caption\na.mp4,x,y\n"
    assert read(tmp_path / "captions.csv", text, "id", "said") == [("a.mp4", "x")]
    with pytest.raises(UserError, match=r"data\.caption_column='text' is not there"):
        read(tmp_path / "captions.csv", text, "id", "text")


def test_parquet_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"video_path": ["a.mp4", None], "text": ["x", "y"]}), tmp_path / "c.parquet")
    rows = list(captions.read_table(tmp_path / "c.parquet", "", ""))
    assert rows[0] == ("a.mp4", "x", "c.parquet, line 1")
    assert isinstance(rows[1], Dropped) and rows[1].reason == "names no file"
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        list(captions.read_table(tmp_path / "broken.parquet", "", ""))


def test_two_lists_are_a_table(tmp_path):
    (tmp_path / "videos.txt").write_text("a.mp4\nb.mp4\n")
    (tmp_path / "prompts.txt").write_text("x\ny\n")
    assert [row[:2] for row in captions.read_lists(tmp_path) if not isinstance(row, Dropped)] == [
        ("a.mp4", "x"),
        ("b.mp4", "y"),
    ]
    (tmp_path / "prompts.txt").write_text("x\n")
    with pytest.raises(UserError, match=r"2 lines and .* 1"):
        list(captions.read_lists(tmp_path))
