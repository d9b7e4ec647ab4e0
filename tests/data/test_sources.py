"""Reading files: every kind, every row with its place, and complaints that name file and line."""

import gzip
import json
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.data.sources import KINDS, Source, read_sources
from splitllm.data.textfiles import json_rows
from splitllm.errors import DataError

ROWS = [{"prompt": "2020-01-01", "completion": "None"}, {"prompt": "x, y", "completion": "007"}]
JSONL = '{"prompt": "2020-01-01", "completion": "None"}\n\n{"prompt": "x, y", "completion": "007"}\n'
JSON = '[\n {"prompt": "2020-01-01",\n  "completion": "None"},\n {"prompt": "x, y", "completion": "007"}\n]\n'
CSV = 'prompt,completion\n2020-01-01,None\n\n"x, y",007\n'


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, content: str | bytes) -> str:
    raw = content.encode() if isinstance(content, str) else content
    Path(name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return name


def read(name: str) -> Source:
    (source,) = read_sources(name, "data.source")
    return source


def refused(spec: str | list[str]) -> str:
    with pytest.raises(DataError) as caught:
        read_sources(spec, "data.source")
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("r.jsonl", JSONL, [1, 3]),
        ("r.jsonl.gz", JSONL, [1, 3]),
        ("r.json", JSON, [2, 4]),
        ("lines.json", JSONL, [1, 3]),
        ("r.JSON.gz", JSON, [2, 4]),
        ("r.csv", CSV, [2, 4]),
        ("r.csv.gz", CSV, [2, 4]),
        ("odd [name]*.csv", CSV, [2, 4]),
        ("bom.csv", "\ufeff" + CSV, [2, 4]),
        ("bom.jsonl", "\ufeff" + JSONL, [1, 3]),
    ],
)
def test_rows_come_back_as_written_with_their_lines(name, content, lines):
    source = read(write(name, content))
    assert [row.fields for row in source.rows] == ROWS
    assert [row.where for row in source.rows] == [f"{name}:{line}" for line in lines]
    assert source.eval == []


@given(st.lists(st.dictionaries(st.text(), st.one_of(st.text(), st.integers(), st.lists(st.none()))), max_size=6))
def test_json_arrays_and_lines_read_alike(rows):
    with tempfile.TemporaryDirectory() as folder:
        flat, nested = Path(folder) / "flat.json", Path(folder) / "nested.json"
        flat.write_text("\n".join(json.dumps(row) for row in rows))
        nested.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
        assert [row.fields for row in json_rows(str(flat))] == rows
        found = json_rows(str(nested))
        lines = nested.read_text(encoding="utf-8").split("\n")
    assert [row.fields for row in found] == rows
    assert all(lines[row.line - 1].startswith(" {") for row in found)


def test_text_gives_a_row_a_line():
    source = read(write("t.txt", "one\r\n\ntwo\u2028three\nfour"))
    assert [row.fields["text"] for row in source.rows] == ["one", "", "two\u2028three", "four"]
    assert [row.line for row in source.rows] == [1, 2, 3, 4]


def test_csv_cells_may_hold_line_ends():
    source = read(write("r.csv", 'text,n\n"one\ntwo",1\nthree,2\n'))
    assert [(row.fields["text"], row.line) for row in source.rows] == [("one\ntwo", 2), ("three", 4)]


def test_parquet_rows():
    from datasets import Dataset

    Dataset.from_list(ROWS).to_parquet("r.parquet")
    source = read("r.parquet")
    assert [row.fields for row in source.rows] == ROWS
    assert [row.where for row in source.rows] == ["r.parquet:1", "r.parquet:2"]


def test_every_kind_is_read_above():
    assert set(KINDS.values()) == {"json", "csv", "text", "parquet"}


def test_globs_are_sorted_and_lists_keep_their_order():
    for name in ("b.jsonl", "a.jsonl", "z.jsonl"):
        write(name, JSONL)
    assert [source.name for source in read_sources(["z.jsonl", "[ab].jsonl"], "k")] == ["z.jsonl", "a.jsonl", "b.jsonl"]


def test_json_does_not_need_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(read(write("r.jsonl", JSONL)).rows) == 2


def test_progress_bars_are_left_as_they_were():
    import datasets

    before = datasets.are_progress_bars_disabled()
    read(write("t.txt", "one\n"))
    assert datasets.are_progress_bars_disabled() == before


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("r.jsonl", '{"a": 1}\n{"a": \n', "r.jsonl:2: not JSON (Expecting value at column 7)"),
        ("r.jsonl.gz", '{"a": 1}\n\n[1]\n', "r.jsonl.gz:3: a list, not an object"),
        ("r.json", '[\n{"a": 1},\n\n{"a" 2}]', "r.json:4: not JSON"),
        ("r.json", '[{"a": 1}\n{"a": 2}]', "r.json:2: a comma or ] is missing"),
        ("r.json", '[{"a": 1},\n', "r.json:2: not JSON"),
        ("r.json", '[{"a": 1}', "r.json:1: a comma or ] is missing"),
        ("r.json", "[\n3]", "r.json:2: a int, not an object"),
        ("r.json", '[{"a": 1}]\n[{"a": 2}]', "r.json:2: text follows the array's ]"),
        ("r.jsonl", '{"a": 1}\n{"a": ' + "1" * 5000 + "}", "r.jsonl:2: cannot be read (a number has too many digits)"),
        ("r.jsonl", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "r.jsonl:1: cannot be read (nested too deeply)"),
        ("r.csv", "a,b\n1,2\n\n3\n", "r.csv:4: 1 fields under 2 columns"),
        ("r.csv.gz", 'a,b\n"1\n1",2\n3,4,5\n', "r.csv.gz:4: 3 fields under 2 columns"),
        ("r.csv", "a,a\n1,2\n", "r.csv:1: the header must name every column"),
        ("r.txt", b"one\ntwo\n\xff\n", "r.txt:3: not UTF-8"),
        ("r.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "r.jsonl:2: not UTF-8"),
        ("r.parquet", "no parquet", "r.parquet: not a parquet file"),
    ],
)
def test_malformed_files_name_the_line(name, content, expected):
    assert refused(write(name, content)).startswith(expected)


def test_several_malformed_rows_are_told_at_once():
    message = refused(write("r.jsonl", '{"a": 1}\nx\n{}\ny\n'))
    assert [line.split(": ")[0] for line in message.splitlines()] == ["r.jsonl:2", "r.jsonl:4"]


@pytest.mark.parametrize("name", ["e.jsonl", "e.json", "e.txt", "e.jsonl.gz"])
def test_empty_files_are_refused(name):
    assert refused(write(name, "")) == f"data.source: {name} holds no rows; give it some or leave it out"


def test_a_csv_file_without_rows_or_header_is_refused():
    assert "e.csv holds no rows" in refused(write("e.csv", "a,b\n"))
    assert "e.csv:1: the header" in refused(write("e.csv", ""))


def test_a_broken_gzip_is_refused():
    Path("r.jsonl.gz").write_bytes(b"not gzip")
    assert refused("r.jsonl.gz").startswith("r.jsonl.gz: cannot be read")
    Path("r.jsonl.gz").write_bytes(gzip.compress(JSONL.encode())[:-12])
    assert refused("r.jsonl.gz").startswith("r.jsonl.gz: cannot be read")


def test_missing_files_are_told_all_at_once():
    Path("folder").mkdir()
    write("r.xml", "<a/>")
    write("r.parquet.gz", "x")
    lines = refused(["no.jsonl", "no*.csv", "folder", "r.xml", "r.parquet.gz"]).splitlines()
    assert lines[0].startswith("data.source: there is no file no.jsonl")
    assert lines[1].startswith("data.source: no file matches no*.csv")
    assert lines[2].startswith("data.source: folder is a folder")
    assert lines[3].startswith("data.source: r.xml has no known ending")
    assert lines[4].startswith("data.source: r.parquet.gz has no known ending")


def test_a_file_named_twice_is_refused():
    write("r.jsonl", JSONL)
    assert "r.jsonl is named twice" in refused(["r.jsonl", "*.jsonl"])


def test_hub_names(monkeypatch):
    import datasets

    asked = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [row.fields for row in read("hub:someone/rows").rows] == ROWS
    assert read("hub:someone/rows:validation").rows[1].where == "hub:someone/rows:validation:2"
    assert asked == [("someone/rows", "train"), ("someone/rows", "validation")]


def test_a_hub_name_that_cannot_be_loaded_is_refused():
    assert refused("hub:nobody/nothing").startswith("data.source: hub:nobody/nothing could not be loaded")


def test_unknown_builtin_is_refused():
    assert "builtin:stdlib-docstrings" in refused("builtin:shakespeare")


def test_the_builtin_source_brings_its_own_held_out_rows():
    source = read("builtin:stdlib-docstrings")
    assert len(source.rows) > 1000
    assert len(source.eval) > 50
    assert {*source.rows[0].fields} == {"prompt", "completion", "group"}
    assert source.rows[1].where == "builtin:stdlib-docstrings:2"
