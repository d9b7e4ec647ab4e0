"""Where rows come from: local files, the hub, or the built-in corpus. `datasets` is imported only when it is needed."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitllm.data.rows import Row, refuse
from splitllm.data.textfiles import csv_lines, json_rows, text_lines
from splitllm.errors import DataError

BUILTIN = "builtin:stdlib-docstrings"
KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text", ".parquet": "parquet"}
"""Ending of a file's name (before .gz, which only the text formats take) -> its kind."""


@dataclass(frozen=True)
class Source:
    """One file, hub split or built-in corpus.

    Attributes:
        name: as complaints call it.
        rows: its rows in their order.
        eval: held-out rows that it brings along (the built-in corpus only).
    """

    name: str
    rows: list[Row]
    eval: list[Row]


def read_sources(spec: str | Sequence[str], key: str) -> list[Source]:
    """Read what a recipe names, in the order named (the matches of a glob sorted).

    Args:
        spec: paths and globs (relative to the working directory), `hub:NAME[:split]` (default split: train) or
            `builtin:stdlib-docstrings`; one or several.
        key: the recipe's key, for complaints.

    Raises:
        DataError: something is missing (all such at once), empty, or malformed (file and line).
    """
    names: list[str] = []
    problems: list[str] = []
    for entry in [spec] if isinstance(spec, str) else spec:
        try:
            names += [entry] if entry.startswith(("hub:", "builtin:")) else _files(entry, key)
        except DataError as error:
            problems.append(str(error))
    problems += [
        f"{key}: {name} is named twice; name it once" for name in dict.fromkeys(names) if names.count(name) > 1
    ]
    if problems:
        refuse(problems)
    return [_read(name, key) for name in names]


def _files(entry: str, key: str) -> list[str]:
    """The files that a path or glob names."""
    path = Path(entry).expanduser()
    if path.is_dir():
        raise DataError(f"{key}: {entry} is a folder; name its files, such as {entry.rstrip('/')}/*.jsonl")
    found = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    files = [name for name in found if Path(name).is_file()]
    if not files:
        what = "no file matches" if glob.has_magic(entry) else "there is no file"
        raise DataError(f"{key}: {what} {entry} (seen from {Path.cwd()}); correct the path")
    for name in files:
        if _kind(name) is None:
            raise DataError(
                f"{key}: {name} has no known ending; use one of {', '.join(KINDS)}, or .gz after a text format"
            )
    return files


def _kind(name: str) -> str | None:
    lowered = name.lower()
    kind = KINDS.get(Path(lowered.removesuffix(".gz")).suffix)
    return None if lowered.endswith(".gz") and kind == "parquet" else kind


def _read(name: str, key: str) -> Source:
    if name.startswith("builtin:"):
        return _builtin(name, key)
    rows = _hub_rows(name, key) if name.startswith("hub:") else READERS[str(_kind(name))](name)
    if not rows:
        raise DataError(f"{key}: {name} holds no rows; give it some or leave it out")
    return Source(name, rows, [])


def _builtin(name: str, key: str) -> Source:
    from splitllm.data.stdlib import stdlib_docstrings

    if name != BUILTIN:
        raise DataError(f"{key}: there is no {name}; the built-in source is {BUILTIN}")
    found = stdlib_docstrings()
    rows = [Row(fields, name, number) for number, fields in enumerate(found.train, start=1)]
    return Source(
        name, rows, [Row(fields, f"{name}:eval", number) for number, fields in enumerate(found.eval, start=1)]
    )


def _csv_rows(path: str) -> list[Row]:
    """Every cell as text: neither 'None' nor '007' changes."""
    from datasets import Features, Value

    header, lines = csv_lines(path)
    text = Features({column: Value("string") for column in header})
    return _placed(path, lines, "csv", features=text, keep_default_na=False) if lines else []


def _text_rows(path: str) -> list[Row]:
    lines = text_lines(path)
    return _placed(path, lines, "text") if lines else []


def _placed(path: str, lines: list[int], kind: str, **options: Any) -> list[Row]:
    """What `datasets` reads from a text file, each row with its line."""
    rows = _local(path, kind, **options)
    if len(rows) != len(lines):
        raise DataError(f"{path}: {len(rows)} rows were read where the file holds {len(lines)}; check its quotes")
    return [Row(row, path, line) for row, line in zip(rows, lines, strict=True)]


def _parquet_rows(path: str) -> list[Row]:
    return [Row(row, path, number) for number, row in enumerate(_local(path, "parquet"), start=1)]


READERS = {"json": json_rows, "csv": _csv_rows, "text": _text_rows, "parquet": _parquet_rows}


def _local(path: str, kind: str, **options: Any) -> list[dict[str, object]]:
    """Read one local file with `datasets`; the network is not needed and its cache is thrown away."""
    import datasets

    try:
        with _silent(), tempfile.TemporaryDirectory(prefix="splitllm-") as cache:
            found = datasets.load_dataset(
                kind, data_files=glob.escape(path), split="train", cache_dir=cache, keep_in_memory=True, **options
            )
            rows: list[dict[str, object]] = found.to_list()
            return rows
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path}: not a {kind} file that datasets can read ({_reason(error)})") from None


def _hub_rows(name: str, key: str) -> list[Row]:
    """A split of a dataset on the hub (or of its cached copy, when offline)."""
    import datasets

    repository, _, split = name.removeprefix("hub:").partition(":")
    try:
        with _silent():
            rows = datasets.load_dataset(repository, split=split or "train").to_list()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        remedy = "check name and split (hub:NAME:SPLIT), the network and your login, or name local files"
        raise DataError(f"{key}: {name} could not be loaded ({_reason(error)}); {remedy}") from None
    return [Row(row, name, number) for number, row in enumerate(rows, start=1)]


def _reason(error: BaseException) -> str:
    """The last line of what a library says, shortened; the cause behind it if there is one."""
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return f"{type(cause).__name__}: {lines[-1][:160]}"


@contextmanager
def _silent() -> Iterator[None]:
    """No progress bars of `datasets` meanwhile; the setting is put back."""
    import datasets

    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()
