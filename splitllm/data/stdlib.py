"""The built-in corpus: signature -> first sentence of the docstring, read from Python's own standard library.

Sources are parsed with `ast` and never imported, so nothing of what is read is executed. A row looks like

    prompt      # asyncio.queues
                async def Queue.put(self, item):
                    (three quotes)
    completion  Put an item into the queue.
    group       asyncio

Annotations are left out, as few modules have any. The prompt stops behind the opening quotes, so that prompt and
completion are tokenised alike joined or apart.

The packages in `HELD_OUT` are for evaluation. A target occurs at most once in all: boilerplate ("Return repr(self).")
would otherwise be learnt by heart, and a held-out target that is also trained on would measure nothing.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from splitllm.errors import DataError

HELD_OUT = frozenset({"argparse", "http", "statistics", "typing", "unittest"})
"""Top-level names for evaluation; each has been in every Python 3 and none is an optional part of a distribution."""

SKIPPED = frozenset(
    {"__pycache__", "distutils", "ensurepip", "idlelib", "lib-dynload", "lib2to3", "site-packages"}
    | {"test", "tests", "tkinter", "turtle.py", "turtledemo"}
)
"""Folders and files that are tests, not the standard library, or absent from many installations."""

LONGEST_PROMPT = 240
LONGEST_COMPLETION = 240

_Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?](?=\s+[^a-z\s])")


@dataclass(frozen=True)
class StdlibRows:
    """Rows of `prompt`, `completion` and `group`, in the order of module name and then of the source."""

    train: list[dict[str, str]]
    eval: list[dict[str, str]]


def stdlib_docstrings(root: Path | None = None) -> StdlibRows:
    """Harvest the standard library without importing any of it.

    Args:
        root: folder of the sources; default: the running Python's own.

    Raises:
        DataError: the folder holds no documented source (some minimal Pythons ship byte code only).
    """
    return _harvest(root or Path(sysconfig.get_path("stdlib")))


@lru_cache(maxsize=1)  # the same run may ask for its training and for its held-out rows
def _harvest(folder: Path) -> StdlibRows:
    rows = [row for path in _sources(folder) for row in _rows_of(path, path.relative_to(folder))]
    if not rows:
        raise DataError(f"{folder}: no documented Python source; use a Python that has its library's sources")
    held_out = _distinct([row for row in rows if row["group"] in HELD_OUT], set())
    known = {normalised(row["completion"]) for row in held_out}
    return StdlibRows(_distinct([row for row in rows if row["group"] not in HELD_OUT], known), held_out)


def first_sentence(docstring: str) -> str:
    """The first sentence of the first paragraph, on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n", 1)[0].split())
    end = _SENTENCE_END.search(paragraph)
    return paragraph[: end.end()] if end else paragraph


def normalised(sentence: str) -> str:
    """Lower-case words and digits only: what makes two targets the same."""
    return " ".join(re.findall(r"\w+", sentence.lower()))


def _distinct(rows: list[dict[str, str]], known: set[str]) -> list[dict[str, str]]:
    seen, kept = set(known), []
    for row in rows:
        key = normalised(row["completion"])
        if key not in seen:
            seen.add(key)
            kept.append(row)
    return kept


def _sources(folder: Path) -> Iterator[Path]:
    paths = (path.relative_to(folder) for path in folder.rglob("*.py"))
    for path in sorted(paths, key=lambda path: path.parts):
        if not SKIPPED.intersection(path.parts):
            yield folder / path


def _rows_of(path: Path, inside: Path) -> Iterator[dict[str, str]]:
    parts = [*inside.parts[:-1], inside.stem]
    module = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
    for prompt, docstring in signatures(path.read_bytes()):
        sentence = first_sentence(docstring)
        prompt = f"# {module}\n{prompt}"
        if len(prompt) <= LONGEST_PROMPT and 12 <= len(sentence) <= LONGEST_COMPLETION and " " in sentence:
            yield {"prompt": prompt, "completion": sentence, "group": parts[0]}


def signatures(source: bytes) -> Iterator[tuple[str, str]]:
    """Every documented function, method and class as (signature with opening quotes, docstring); none if unparsable."""
    if b'"""' not in source and b"'''" not in source:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for owner, node in _documented(tree, ""):
        docstring = ast.get_docstring(node)
        if docstring:
            yield _signature(owner, node), docstring


def _documented(node: ast.AST, owner: str) -> Iterator[tuple[str, _Documented]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner, child
        elif isinstance(child, ast.ClassDef):
            yield owner, child
            yield from _documented(child, f"{owner}{child.name}.")
        elif isinstance(child, ast.If | ast.Try):
            yield from _documented(child, owner)


def _signature(owner: str, node: _Documented) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        head = f"class {owner}{node.name}({bases}):" if bases else f"class {owner}{node.name}:"
    else:
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        head = f"{word} {owner}{node.name}({ast.unparse(node.args)}):"
    return f'{head}\n    """'
