"""The built-in corpus: what it holds, what it holds out, and that harvesting executes nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from splitllm.data import stdlib
from splitllm.data.stdlib import HELD_OUT, StdlibRows, first_sentence, normalised, stdlib_docstrings
from splitllm.errors import DataError


@pytest.fixture(scope="module")
def rows() -> StdlibRows:
    return stdlib_docstrings()


def plant(root: Path, name: str, source: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")


def test_size_and_share_of_the_held_out_rows(rows: StdlibRows) -> None:
    assert 3_500 <= len(rows.train) + len(rows.eval) <= 8_000
    assert 0.06 <= len(rows.eval) / (len(rows.train) + len(rows.eval)) <= 0.12


def test_no_target_occurs_twice(rows: StdlibRows) -> None:
    targets = Counter(normalised(row["completion"]) for row in [*rows.train, *rows.eval])
    assert [target for target, times in targets.items() if times > 1] == []


def test_held_out_packages_are_only_in_eval(rows: StdlibRows) -> None:
    assert {row["group"] for row in rows.eval} == HELD_OUT
    groups = Counter(row["group"] for row in rows.train)
    assert not HELD_OUT & set(groups)
    assert len(groups) > 100
    assert groups["asyncio"] > 200 and groups["email"] > 150


def test_known_rows(rows: StdlibRows) -> None:
    by_prompt = {row["prompt"]: row for row in [*rows.train, *rows.eval]}
    put = by_prompt['# asyncio.queues\nasync def Queue.put(self, item):\n    """']
    assert put == put | {"completion": "Put an item into the queue.", "group": "asyncio"}
    mean = by_prompt['# statistics\ndef mean(data):\n    """']
    assert mean["completion"] == "Return the sample arithmetic mean of data." and mean in rows.eval


@pytest.mark.system
def test_rows_are_the_same_each_time(rows: StdlibRows) -> None:
    stdlib._harvest.cache_clear()
    assert stdlib_docstrings() == rows


def test_nothing_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    bomb = f'open({str(mark)!r}, "w").close()\nraise SystemExit("imported")\n'
    plant(tmp_path, "bomb/__init__.py", bomb + 'def f(x=print("now")):\n    """Do a harmless thing."""\n')
    plant(
        tmp_path,
        "bomb/inner.py",
        bomb + 'class A:\n    async def g(self, *x: int, y: str = "a"):\n        """Wait for it. Then go."""\n',
    )
    rows = stdlib_docstrings(tmp_path)
    assert not mark.exists()
    assert rows.eval == []
    assert rows.train == [
        {"prompt": '# bomb\ndef f(x=print(\'now\')):\n    """', "completion": "Do a harmless thing.", "group": "bomb"},
        {
            "prompt": '# bomb.inner\nasync def A.g(self, *x, y=\'a\'):\n    """',
            "completion": "Wait for it.",
            "group": "bomb",
        },
    ]


def test_tests_third_party_and_broken_files_are_left_out(tmp_path: Path) -> None:
    documented = 'def f():\n    """{}"""\n'
    plant(tmp_path, "kept.py", documented.format("The only row."))
    plant(tmp_path, "site-packages/torch.py", documented.format("A third party."))
    plant(tmp_path, "kept_too/test/a.py", documented.format("Some test code."))
    plant(tmp_path, "broken.py", documented.format("Does not parse.") + "print 'hello'\n")
    plant(tmp_path, "null.py", documented.format("Has a null byte.") + "\0")
    assert [row["completion"] for row in stdlib_docstrings(tmp_path).train] == ["The only row."]


def test_a_held_out_target_is_taken_from_train(tmp_path: Path) -> None:
    same = 'def f():\n    """Return the thing\n    itself."""\n'
    plant(tmp_path, "aaa.py", same + 'def g():\n    """Another thing."""\n')
    plant(tmp_path, "http/client.py", same.replace("itself.", "ITSELF!"))
    rows = stdlib_docstrings(tmp_path)
    assert [row["completion"] for row in rows.train] == ["Another thing."]
    assert [row["completion"] for row in rows.eval] == ["Return the thing ITSELF!"]


def test_no_sources_is_said(tmp_path: Path) -> None:
    plant(tmp_path, "empty.py", "x = 1\n")
    with pytest.raises(DataError, match="no documented Python source"):
        stdlib_docstrings(tmp_path)


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("One line", "One line"),
        ("Split over\n    two lines.  And more.", "Split over two lines."),
        ("A number, e.g. Pi, is kept. Next.", "A number, e.g. Pi, is kept."),
        ("Version 3.11 is new. See.", "Version 3.11 is new."),
        ("Heading without a stop\n\nBody of it.", "Heading without a stop"),
    ],
)
def test_first_sentence(docstring: str, expected: str) -> None:
    assert first_sentence(docstring) == expected
