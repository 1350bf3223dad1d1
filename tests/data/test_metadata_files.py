import json
import sys

import pytest

from library.config.dataset import SubsetConfig
from library.config.errors import ConfigError
from library.data.metadata_files import MetadataEntry, read_metadata
from library.io.places import write_bytes

KINDS = ("json", "jsonl", "csv", "parquet")


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def listed(folder, kind, rows, columns=("file_name", "caption", "tags")):
    """A file of this kind with these rows; None is left out."""
    path = folder / f"meta.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({name: list(cells) for name, cells in zip(columns, zip(*rows))}), path)
        return str(path)
    if kind == "csv":
        cells = [["" if cell is None else f'"{cell}"' for cell in row] for row in rows]
        return written(folder, path.name, "\n".join(",".join(row) for row in [columns, *cells]))
    tables = [{column: cell for column, cell in zip(columns, row) if cell is not None} for row in rows]
    if kind == "jsonl":
        return written(folder, path.name, "\n".join(map(json.dumps, tables)))
    return written(folder, path.name, json.dumps({table.pop(columns[0]): table for table in tables}))


def read(path, **settings):
    entries = read_metadata(path, SubsetConfig(image_dir="pictures", metadata_file=path, **settings))
    assert all(isinstance(entry, MetadataEntry) for entry in entries.values())
    return {name: entry.captions for name, entry in entries.items()}


def problems_of(path, **settings):
    with pytest.raises(ConfigError) as caught:
        read(path, **settings)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_captions_with_tags_at_their_ends(tmp_path, kind):
    rows = [
        ("b.jpg", "a cat", "1girl, solo"),
        ("sub/a.png", "ü 日本", None),
        ("c", None, "only tags"),
        ("d", None, None),
        ("e.jpg", " first \n\n second ", "tag"),
    ]
    path = listed(tmp_path, kind, rows)
    expected = {
        "b.jpg": ("a cat, 1girl, solo",),
        "sub/a.png": ("ü 日本",),
        "c": ("only tags",),
        "d": (),
        "e.jpg": ("first, tag",),
    }
    assert read(path) == expected
    assert list(read(path)) == list(expected)
    assert read(path, enable_wildcard=True) == {**expected, "e.jpg": ("first, tag", "second, tag")}
    assert read(path, caption_separator="|")["b.jpg"] == ("a cat| 1girl, solo",)
    assert read(path, caption_separator=", ")["b.jpg"] == ("a cat, 1girl, solo",)


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_several_captions_and_tags_as_lists(tmp_path, kind):
    path = listed(tmp_path, kind, [("a.jpg", ["one", "two\nthree", " "], ["x", "y"]), ("b.jpg", [], [])])
    assert read(path) == {"a.jpg": ("one, x, y",), "b.jpg": ()}
    assert read(path, enable_wildcard=True)["a.jpg"] == ("one, x, y", "two, x, y", "three, x, y")


def test_sizes_and_other_values_are_not_looked_at(tmp_path):
    path = written(tmp_path, "m.json", '{"a.jpg": {"image_size": [1, 2], "caption": "x", "score": {"a": 1}}}')
    assert read(path) == {"a.jpg": ("x",)}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("name", ["file_name", "filename", "image_path", "path"])
@pytest.mark.parametrize("caption", ["caption", "text", "prompt"])
def test_usual_columns_need_not_be_named(tmp_path, kind, name, caption):
    assert read(listed(tmp_path, kind, [("a.jpg", "x")], (name, caption))) == {"a.jpg": ("x",)}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_columns_may_be_named(tmp_path, kind):
    columns = ("path", "url", "caption", "description")
    path = listed(tmp_path, kind, [("wrong", "a.jpg", "wrong", "right")], columns)
    assert read(path) == {"wrong": ("wrong",)}
    assert read(path, filename_column="url", caption_column="description") == {"a.jpg": ("right",)}
    assert problems_of(path, filename_column="name") == [
        "no column for the picture (name); it has path, url, caption, description; correct filename_column"
    ]
    assert problems_of(path, caption_column="words") == [
        "no column for the caption (words); it has path, url, caption, description; correct caption_column"
    ]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_missing_columns_are_told_with_those_that_are_there(tmp_path, kind):
    assert problems_of(listed(tmp_path, kind, [("a.jpg", "x")], ("picture", "caption"))) == [
        "no column for the picture (file_name, filename, image_path or path); it has picture, caption; set "
        "filename_column"
    ]
    assert problems_of(listed(tmp_path, kind, [("a.jpg", "x")], ("path", "words"))) == [
        "no column for the caption (caption, text or prompt); it has path, words; set caption_column"
    ]
    assert read(listed(tmp_path, kind, [("a.jpg", "x")], ("path", "tags"))) == {"a.jpg": ("x",)}
    path = listed(tmp_path, kind, [("a.jpg", "x")], ("path", "tags"))
    assert read(path, caption_column="tags") == {"a.jpg": ("x",)}
    path = listed(tmp_path, kind, [("a.jpg", "x")], ("path", "words"))
    assert read(path, caption_strategy="textfile") == {"a.jpg": ()}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_of_any_delimiter_and_with_quotes(tmp_path, delimiter):
    rows = [
        ("file_name", "caption"),
        ("a.jpg", 'one, two; three\tand ""four""'),
        ("b.jpg", "over\r\nlines"),
        ("c.jpg", "last"),
    ]
    lines = [delimiter.join([row[0], f'"{row[1]}"']) for row in rows]
    path = written(tmp_path, "m.csv", "\ufeff\r\n" + "\r\n".join(lines) + "\r\n\r\n")
    captions = {"a.jpg": ('one, two; three\tand "four"',), "b.jpg": ("over", "lines"), "c.jpg": ("last",)}
    assert read(path, enable_wildcard=True) == captions


def test_csv_mistakes_have_lines(tmp_path):
    head = 'file_name,caption\na.jpg,"x\ny"\n\n'
    cells = "line 5: expected 2 cells as in the header, got {}; put text with ',' in it into quotes \"...\""
    for rest, expected in {
        "b.jpg,one, two": cells.format(3),
        "b.jpg": cells.format(1),
        'b.jpg,"no end\n\n': "line 6: not valid CSV: unexpected end of data",
        'b.jpg,"a" b': "line 5: not valid CSV: ',' expected after '\"'",
        ",nothing": "line 5: names no picture",
        "a.jpg,again": "line 5: a.jpg stands in line 2 already; keep one of the two",
    }.items():
        assert problems_of(written(tmp_path, "m.csv", head + rest)) == [expected]
        later = expected.replace("line 6", "line 8").replace("line 5", "line 7").replace("line 2", "line 4")
        assert problems_of(written(tmp_path, "m.csv", "\n\n" + head + rest)) == [later]
    assert problems_of(written(tmp_path, "m.csv", "")) == [
        "no column for the picture (file_name, filename, image_path or path); it has none; set filename_column"
    ]
    assert read(written(tmp_path, "m.csv", "file_name,caption\n")) == {}


def test_jsonl_mistakes_have_lines(tmp_path):
    good = '{"file_name": "a.jpg", "caption": "x"}'
    for rest, expected in {
        "{": "line 3: not valid JSON: Expecting property name enclosed in double quotes (column 2)",
        "[1]": "line 3: expected a table with file_name and caption, got [1]",
        '{"caption": "x"}': "line 3: names no picture",
        '{"path": 5, "caption": "x"}': "line 3: no name of a picture, but 5",
        '{"path": "b", "caption": 5}': "line 3: the caption must be a text or a list of texts, got 5",
        '{"path": "b", "caption": ["x", 5]}': "line 3: the caption must be a text or a list of texts, got ['x', 5]",
        '{"path": "b", "tags": {"x": 1}}': "line 3: tags must be a text or a list of texts, got {'x': 1}",
        good: "line 3: a.jpg stands in line 1 already; keep one of the two",
    }.items():
        assert problems_of(written(tmp_path, "m.jsonl", f"{good}\n\n{rest}\n")) == [expected]
    assert problems_of(written(tmp_path, "m.jsonl", f"{good}\n{good}\n{{}}\n")) == [
        "line 2: a.jpg stands in line 1 already; keep one of the two",
        "line 3: names no picture",
    ]
    lines = problems_of(written(tmp_path, "m.jsonl", f"{good}\n" * 31))
    assert len(lines) == 21 and lines[-1] == "10 more mistakes"


def test_json_mistakes_have_lines_or_names(tmp_path):
    for content, expected in {
        '{\n"a": {"caption": }\n}': "line 2: not valid JSON: Expecting value",
        '[{"caption": "x"}]': 'expected {"picture": {"caption": "..."}, ...}, got list',
        '{"a": "x"}': 'a: expected {"caption": "..."}, got \'x\'',
        '{"a": {"caption": 5}}': "a: the caption must be a text or a list of texts, got 5",
        '{"": {"caption": "x"}}': '"": names no picture',
        '{"a": {}, "b": {}, "a": {}}': "a stands twice in one table; keep one of the two",
        '{"a": {"caption": "x", "caption": "y"}}': "caption stands twice in one table; keep one of the two",
    }.items():
        assert problems_of(written(tmp_path, "m.json", content)) == [expected]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_text_that_is_not_utf8_has_a_line(tmp_path, kind):
    path = listed(tmp_path, kind, [("a.jpg", "x"), ("b.jpg", "caf?")], ("file_name", "caption"))
    data = (tmp_path / f"meta.{kind}").read_bytes()
    written(tmp_path, f"meta.{kind}", data.replace(b"?", b"\xe9"))
    line = {"json": 1, "jsonl": 2, "csv": 3}[kind]
    assert problems_of(path) == [f"line {line}: byte {data.index(b'?') + 1} is not UTF-8; save the file as UTF-8"]


def test_parquet_mistakes_have_rows(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    rows = [("a.jpg", "x"), ("b.jpg", "y"), ("a.jpg", "z"), (None, "w")]
    path = listed(tmp_path, "parquet", rows, ("file_name", "caption"))
    assert problems_of(path) == [
        "row 3: a.jpg stands in row 1 already; keep one of the two",
        "row 4: names no picture",
    ]
    path = listed(tmp_path, "parquet", [("a.jpg", 5)], ("file_name", "caption"))
    assert problems_of(path) == ["row 1: the caption must be a text or a list of texts, got 5"]
    (line,) = problems_of(written(tmp_path, "m.parquet", b"not parquet at all"))
    assert line.startswith("not a parquet file that can be read: ")
    data = bytearray((tmp_path / "meta.parquet").read_bytes())
    data[4:40] = bytes(36)
    (line,) = problems_of(written(tmp_path, "m.parquet", bytes(data)))
    assert line.startswith("not a parquet file that can be read: ")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert problems_of(path) == ["parquet files need the package pyarrow; pip install pyarrow"]


def test_files_that_cannot_be_read_and_files_elsewhere(tmp_path):
    assert problems_of(str(tmp_path / "gone.csv")) == ["can't be read (No such file or directory)"]
    url = f"memory://{tmp_path.name}/meta.jsonl"
    assert problems_of(url) == ["can't be read (no such file)"]
    write_bytes(url, b'{"path": "a.jpg", "text": "x"}')
    assert read(url) == {"a.jpg": ("x",)}
