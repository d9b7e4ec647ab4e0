"""Rows to examples: which tokens a row has and which of them are learned. One function a format, in `FORMATS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from splitllm.data.chat import chat
from splitllm.data.examples import Example
from splitllm.data.rows import Row, is_unicode, refuse
from splitllm.data.tokens import encode, opening
from splitllm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from splitllm.recipe import DataRecipe

Format = Callable[[Sequence[Row], Mapping[str, str], "Tokenizer"], list[tuple[list[int], list[int]]]]
"""(rows, renamed fields, tokenizer) -> for each row all its token ids and the indices of those that are learned."""

Cut = Callable[[Example, int, int], Example]
"""(example, max_length, how many tokens before the prompt stay) -> an example of at most max_length tokens."""


def to_examples(rows: Sequence[Row], data: DataRecipe, tokenizer: Tokenizer) -> tuple[list[Example | None], int]:
    """Tokenise rows.

    Args:
        rows: as read.
        data: the recipe's `format`, `fields`, `max_length` and `pack`.
        tokenizer: the model's.

    Returns:
        An example for each row, None where nothing is left to learn, and how many rows were too long and were cut at
        `max_length` (with `pack`: none, as long documents are split instead).

    Raises:
        DataError: a row lacks a field or is no chat (file and line); the tokenizer has no end token or no template.
    """
    _check_fields(data)
    if data.pack and data.format != "text":
        raise DataError(f"data.pack: only format text can be packed, not {data.format}; set data.pack=false")
    found = [_row(ids, learned) for ids, learned in FORMATS[data.format](rows, data.fields, tokenizer)]
    if data.pack:
        return [example if example and example.labels else None for example in found], 0
    cut = CUTS[data.format]
    kept = len(opening(tokenizer))
    too_long = sum(example is not None and len(example) > data.max_length for example in found)
    shortened = [example and cut(example, data.max_length, kept) for example in found]
    return [example if example and example.labels else None for example in shortened], too_long


def _check_fields(data: DataRecipe) -> None:
    known = FIELDS[data.format]
    problems = [
        f"data.fields.{name}: format {data.format} has no such field; rename one of {', '.join(known)}"
        for name in data.fields
        if name not in known
    ]
    if problems:
        refuse(problems)


def _row(ids: list[int], learned: Sequence[int]) -> Example | None:
    if not ids:
        return None
    targets = np.zeros(len(ids), dtype=np.bool_)
    targets[list(learned)] = True
    targets[0] = False
    return Example(np.array(ids, dtype=np.int32), targets)


def _texts(rows: Sequence[Row], name: str, fields: Mapping[str, str]) -> list[str]:
    """The field that plays the part `name`, in every row."""
    column = fields.get(name, name)
    texts, problems = [], []
    for row in rows:
        value = row.fields.get(column)
        if isinstance(value, str) and not is_unicode(value):
            problems.append(f"{row.where}: field {column!r} is not valid Unicode (a lone surrogate); correct the row")
        elif isinstance(value, str):
            texts.append(value)
        elif value is None:
            has = ", ".join(row.fields) or "nothing"
            problems.append(
                f"{row.where}: no field {column!r} (the row has: {has}); data.fields.{name} can name another"
            )
        else:
            problems.append(f"{row.where}: field {column!r} is a {type(value).__name__}, not text; put it in quotes")
    if problems:
        refuse(problems)
    return texts


def prompt_completion(
    rows: Sequence[Row], fields: Mapping[str, str], tokenizer: Tokenizer
) -> list[tuple[list[int], list[int]]]:
    """Prompt (with BOS if the tokenizer adds one), completion, end of sequence; the last two are learned.

    Prompt and completion are tokenised apart, so that the boundary is where inference puts it.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError(
            "model.tokenizer: it has no end-of-sequence token, which format prompt_completion puts after each "
            "completion; set eos_token in its tokenizer_config.json"
        )
    prompts = encode(tokenizer, _texts(rows, "prompt", fields))
    completions = encode(tokenizer, _texts(rows, "completion", fields))
    first = opening(tokenizer)
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = [*first, *prompt, *completion, end]
        found.append((ids, list(range(len(first) + len(prompt), len(ids)))))
    return found


def text(rows: Sequence[Row], fields: Mapping[str, str], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """The text as the tokenizer encodes it by default; all tokens but the first are learned."""
    encoded = encode(tokenizer, _texts(rows, "text", fields), specials=True)
    return [(ids, list(range(1, len(ids)))) for ids in encoded]


def cut_right(example: Example, max_length: int, _kept: int = 0) -> Example:
    """The first `max_length` tokens."""
    return Example(example.ids[:max_length].copy(), example.targets[:max_length].copy())


def cut_prompt(example: Example, max_length: int, kept: int) -> Example:
    """Shorten the prompt from the left, behind the first `kept` tokens (BOS) and never to nothing.

    Only what is still too long then is cut from the completion, at the right.
    """
    prompt = int(np.argmax(example.targets))
    surplus = len(example) - max_length
    removed = slice(kept, kept + max(0, min(surplus, prompt - max(kept, 1))))
    return cut_right(Example(np.delete(example.ids, removed), np.delete(example.targets, removed)), max_length)


FORMATS: dict[str, Format] = {"prompt_completion": prompt_completion, "chat": chat, "text": text}
FIELDS = {"prompt_completion": ("prompt", "completion"), "chat": ("messages",), "text": ("text",)}
CUTS: dict[str, Cut] = {"prompt_completion": cut_prompt, "chat": cut_right, "text": cut_right}
