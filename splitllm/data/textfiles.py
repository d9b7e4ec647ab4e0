"""Text files line by line: JSON rows exactly as written, and checks that name the line of what is wrong.

JSON is not read through `datasets`: its reader gives no line numbers, fills absent keys with None, and takes a column
of texts that look like dates for dates, so that the text comes back rewritten.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from splitllm.data.rows import Row, refuse
from splitllm.errors import DataError


def read_text(path: str) -> str:
    """A UTF-8 text file, unpacked if its name ends in .gz; line ends stay as they are.

    Raises:
        DataError: it cannot be read or unpacked, or a line is not UTF-8.
    """
    try:
        raw = Path(path).read_bytes()
        raw = gzip.decompress(raw) if path.endswith(".gz") else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); check the file") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(raw[: error.start + 1].splitlines())
        raise DataError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None


def json_rows(path: str) -> list[Row]:
    """The objects of a JSON array, or of a file with one object a line (blank lines are skipped).

    Raises:
        DataError: a row is not JSON or not an object; its line is named.
    """
    text = read_text(path)
    found = _array_values(text) if text.lstrip().startswith("[") else _line_values(text)
    rows, problems = [], []
    for line, value in found:
        if isinstance(value, dict):
            rows.append(Row(value, path, line))
        else:
            problems.append(f"{path}:{line}: {value if isinstance(value, _Malformed) else _not_an_object(value)}")
    if problems:
        refuse(problems)
    return rows


class _Malformed(str):
    """A complaint in the place of a row."""


def _not_an_object(value: object) -> str:
    return f'a {type(value).__name__}, not an object; write each row as {{"field": "text"}}'


def _malformed(error: ValueError | RecursionError) -> _Malformed:
    if isinstance(error, json.JSONDecodeError):
        return _Malformed(f"not JSON ({error.msg} at column {error.colno}); correct or remove the row")
    reason = "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
    return _Malformed(f"cannot be read ({reason}); correct or remove the row")


def _line_values(text: str) -> Iterator[tuple[int, object]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                yield line, json.loads(content)
            except (ValueError, RecursionError) as error:
                yield line, _malformed(error)


def _array_values(text: str) -> Iterator[tuple[int, object]]:
    """The elements of one JSON array with the line that each begins on; ends at the first malformed one."""
    decoder = json.JSONDecoder()
    position = _skip(text, text.index("[") + 1)
    line, counted = 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            place = error.pos if isinstance(error, json.JSONDecodeError) else position
            yield line + text.count("\n", counted, place), _malformed(error)
            return
        yield line, value
        position = _skip(text, position)
        if text[position : position + 1] not in (",", "]"):
            yield line + text.count("\n", counted, position), _Malformed("a comma or ] is missing after this row")
            return
        position = _skip(text, position + 1) if text[position] == "," else position
    end = _skip(text, position + 1)
    if end < len(text):
        yield line + text.count("\n", counted, end), _Malformed("text follows the array's ]; one array a file")


def _skip(text: str, position: int) -> int:
    """The next position that is not white space."""
    while text[position : position + 1].isspace():
        position += 1
    return position


def csv_lines(path: str) -> tuple[list[str], list[int]]:
    """The columns of a CSV file and the line on which each row begins.

    Raises:
        DataError: no header, a column twice, or a row that has not as many fields as the header.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    header = next(reader, [])
    if not header or len(set(header)) < len(header):
        raise DataError(f"{path}:1: the header must name every column, each once")
    lines, problems, line = [], [], reader.line_num + 1
    try:
        for record in reader:
            if record:
                lines.append(line)
            if record and len(record) != len(header):
                problems.append(
                    f"{path}:{line}: {len(record)} fields under {len(header)} columns; quote commas in text"
                )
            line = reader.line_num + 1
    except csv.Error as error:
        problems.append(f"{path}:{line}: not CSV ({error})")
    if problems:
        refuse(problems)
    return header, lines


def text_lines(path: str) -> list[int]:
    """The line numbers of a text file, all of them: a line is a row."""
    return list(range(1, len(read_text(path).encode().splitlines()) + 1))
