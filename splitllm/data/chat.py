"""Conversations through the tokenizer's chat template; what the assistant says is learned, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from splitllm.data.rows import Row, is_unicode, refuse
from splitllm.data.tokens import encode
from splitllm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class _Rendered:
    """A conversation as text, and the texts that end just before and just after each assistant turn."""

    whole: str
    turns: list[tuple[str, str]]


def chat(rows: Sequence[Row], fields: Mapping[str, str], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """Render and tokenise conversations: each row's `messages` is a list of {role, content}.

    A turn begins after the template's generation prompt and ends with whatever the template puts after the answer.

    Returns:
        For each row all its token ids and the indices of those that are learned.

    Raises:
        DataError: the tokenizer has no chat template; a row is no conversation or the template refuses it or renders
            an earlier turn differently once a later one follows (file and line).
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "data.format: chat needs a tokenizer with a chat template, and model.tokenizer has none; name the "
            "tokenizer of an instruction-tuned model, or use format prompt_completion"
        )
    rendered, problems = [], []
    for row in rows:
        try:
            rendered.append(_render(row, _messages(row, fields.get("messages", "messages")), tokenizer))
        except DataError as error:
            problems.append(str(error))
    if problems:
        refuse(problems)
    return _encode(rendered, tokenizer)


def _messages(row: Row, column: str) -> list[dict[str, Any]]:
    """The messages of a row, checked; keys that a table reader filled with None are left out."""
    messages = row.fields.get(column)
    if not isinstance(messages, list) or not messages:
        has = ", ".join(row.fields) or "nothing"
        raise DataError(f"{row.where}: field {column!r} is not a list of messages (the row has: {has})")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f'{row.where}: message {number} is not {{"role": ..., "content": "text"}}')
        if not is_unicode(message["content"]):
            raise DataError(f"{row.where}: message {number} is not valid Unicode (a lone surrogate); correct the row")
        if message.get("role") not in ROLES:
            role = str(message.get("role"))[:40]
            raise DataError(f"{row.where}: message {number} has the unknown role {role!r}; use {', '.join(ROLES)}")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _render(row: Row, messages: list[dict[str, Any]], tokenizer: Tokenizer) -> _Rendered:
    from jinja2 import TemplateError

    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        turns = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
                turns.append((before, tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)))
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise DataError(f"{row.where}: the tokenizer's chat template refuses it ({error})") from None
    for before, after in turns:
        if not (whole.startswith(after) and after.startswith(before)):
            raise DataError(
                f"{row.where}: the tokenizer's chat template changes earlier text when a turn follows, so that the "
                "assistant's tokens cannot be told apart; use conversations of one answer, or another template"
            )
    return _Rendered(whole, turns)


def _encode(rendered: list[_Rendered], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    texts = [text for row in rendered for text in (row.whole, *(part for turn in row.turns for part in turn))]
    encoded = iter(encode(tokenizer, texts))
    found = []
    for row in rendered:
        ids = next(encoded)
        learned: list[int] = []
        for _ in row.turns:
            begin = _shared(ids, next(encoded))
            learned += range(begin, _shared(ids, next(encoded)))
        found.append((ids, learned))
    return found


def _shared(ids: list[int], beginning: list[int]) -> int:
    """How many tokens of `beginning` open `ids` too: all but, at most, a last one that merges with what follows."""
    for index, (mine, other) in enumerate(zip(ids, beginning, strict=False)):
        if mine != other:
            return index
    return min(len(ids), len(beginning))
