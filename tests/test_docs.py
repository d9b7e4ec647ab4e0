"""What the documents say of commands, keys, defaults, files and links is so."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

from splitllm.cli import app
from splitllm.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
COMMANDS = typer.main.get_command(app)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_of(text: str) -> Iterator[str]:
    """Lines of fenced (not Python) and indented code, with `\\` continuations joined, and inline code."""
    blocks = [body for language, body in FENCE.findall(text) if language not in ("python", "yaml")]
    prose = FENCE.sub("", text)
    blocks.append("\n".join(line for line in prose.splitlines() if line.startswith("    ")))
    for block in blocks:
        yield from block.replace("\\\n", " ").splitlines()
    yield from INLINE.findall(prose)


def commands_of(text: str) -> Iterator[list[str]]:
    """The words after `splitllm` in every command."""
    for line in code_of(text):
        if not re.search(r"(^|[\s/])splitllm \S", line):
            continue
        words = shlex.split(line, comments=True)
        for place, word in enumerate(words):
            if word.rpartition("/")[2] == "splitllm" and words[place + 1 :]:
                yield words[place + 1 :]
                break


COMMANDS_SHOWN = [
    pytest.param(words, id=f"{name_of(page)}: {' '.join(words)[:60]}")
    for page in PAGES
    for words in commands_of(page.read_text(encoding="utf-8"))
]


def test_no_placeholder_is_left() -> None:
    assert "SPEED_TABLE" not in (ROOT / "README.md").read_text()


def test_the_documents_show_commands() -> None:
    assert {shown.values[0][0] for shown in COMMANDS_SHOWN} >= {"train", "validate", "merge"}


@pytest.mark.parametrize("words", COMMANDS_SHOWN)
def test_every_command_shown_parses_and_its_recipe_loads(words: list[str]) -> None:
    name, *rest = words
    if name.startswith("--"):
        assert any(name in option.opts for option in COMMANDS.params)
        return
    command = COMMANDS.commands[name]  # type: ignore[attr-defined]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= options
    if not rest or "..." in rest:  # named in a sentence, or with something left out
        return
    given = command.make_context(name, rest).params
    if "recipe" in given:
        load_recipe(ROOT / given["recipe"], given["overrides"] or ())


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of the recipe with its default; `...` where it is required."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        elif field.is_required():
            yield f"{prefix}{name}", ...
        else:
            default = field.get_default(call_default_factory=True)
            yield f"{prefix}{name}", list(default) if isinstance(default, tuple) else default


def test_the_page_on_recipes_lists_every_key_with_its_default() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z_.]+)` \| (?:`(.+?)`|(required)) \| \S", text, re.MULTILINE)
    listed = {key: ... if required else yaml.safe_load(default) for key, default, required in rows}
    assert len(listed) == len(rows)
    assert listed == dict(leaves(Recipe))


SMALLEST: dict[str, Any] = {
    "model": {"base": "-"},
    "split": {"tiers": {"client": 4, "edge": 2, "cloud": 1}, "cuts": [2, 4], "labels": "client"},
    "data": {"source": "-"},
}
EXAMPLES = [
    pytest.param(body, id=f"{name_of(page)}: {' '.join(body.split())[:60]}")
    for page in PAGES
    for language, body in FENCE.findall(page.read_text(encoding="utf-8"))
    if language == "yaml"
]


@pytest.mark.parametrize("body", EXAMPLES)
def test_every_piece_of_a_recipe_shown_is_one(body: str) -> None:
    shown = yaml.safe_load(body)
    assert shown, "an example shows at least one key"
    assert set(shown) <= set(Recipe.model_validate({**SMALLEST, **shown}).model_dump())


def test_the_house_lists_every_room_and_file() -> None:
    listing = re.findall(r"[\w/]+", (ROOT / "docs" / "house.md").read_text(encoding="utf-8").split("## The rooms")[1])
    package = ROOT / "splitllm"
    files = {path for path in package.rglob("*.py") if path.stem not in ("__init__", "__main__")}
    missing = {path.relative_to(package) for path in files if path.stem not in listing}
    assert not missing
    rooms = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    assert rooms <= set(listing)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    local = [target for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in target]
    missing = [target for target in local if not (page.parent / target).exists()]
    if "Not measured yet" in text:  # the benchmark that writes this page writes its figures beside it
        missing = [target for target in missing if not target.endswith(".json")]
    assert missing == []
