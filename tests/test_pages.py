"""The pages that benchmarks write: their own part is replaced, and nothing else."""

from __future__ import annotations

from pathlib import Path

from scripts.pages import bullets, known_figures, machine, table, write_page

BEGIN, END = "<!-- written by scripts/bench_x.py: begin -->", "<!-- end -->"


def test_what_lies_between_the_marks_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nHow it is measured: {END}\n")
    for line in ("new", "newer"):
        write_page(page, "bench_x.py", [line], {"line": line})
        assert page.read_text() == f"# Title\n\n{BEGIN}\n\n{line}\n\n{END}\n\nHow it is measured: {END}\n"
        assert known_figures(page) == {"line": line}


def test_a_page_that_is_not_there_is_made_and_one_without_marks_keeps_its_text(tmp_path: Path) -> None:
    fresh, plain = tmp_path / "out" / "fresh.md", tmp_path / "plain.md"
    plain.write_text("# Title\n")
    assert known_figures(fresh) == {}
    for page, before in ((fresh, ""), (plain, "# Title\n")):
        write_page(page, "bench_x.py", ["one", "two"], {})
        assert page.read_text() == f"{before}{BEGIN}\n\none\ntwo\n\n{END}\n"


def test_tables_are_markdown_with_numbers_to_the_right() -> None:
    assert table(["codec", "#bytes"], [["int8", "1.03"]]) == ["| codec | bytes |", "|---|---:|", "| int8 | 1.03 |"]
    assert table(["a"], [], title="Sizes")[:3] == ["", "### Sizes", ""]


def test_the_machine_is_described_with_the_versions_that_matter() -> None:
    about = machine("torch")
    assert about["versions"].startswith("torch ") and ", splitllm " in about["versions"]
    assert "cores" in about["cores and memory"] and all(about.values())
    assert bullets({"CPU": "x", "date": "y"}) == ["- CPU: x", "- date: y"]
