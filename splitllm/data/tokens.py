"""Many texts to token ids, quickly, on one thread, and the same whether a text comes once or often."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

CHUNK = 2048
_SWITCH = "TOKENIZERS_PARALLELISM"


def encode(tokenizer: Tokenizer, texts: Sequence[str], *, specials: bool = False) -> list[list[int]]:
    """Token ids of each text, never truncated; equal texts are tokenised once and share their list.

    Args:
        tokenizer: a transformers tokenizer.
        texts: any number.
        specials: add what the tokenizer puts round a text (such as BOS).
    """
    unique = list(dict.fromkeys(texts))
    known: dict[str, list[int]] = {}
    with _one_thread():
        for start in range(0, len(unique), CHUNK):
            chunk = unique[start : start + CHUNK]
            found = tokenizer(chunk, add_special_tokens=specials, return_attention_mask=False, verbose=False)
            known.update(zip(chunk, found["input_ids"], strict=True))
    return [known[text] for text in texts]


def opening(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text: [BOS], or nothing."""
    with_specials = encode(tokenizer, ["a"], specials=True)[0]
    bare = encode(tokenizer, ["a"])[0]
    for start in range(len(with_specials) - len(bare) + 1):
        if with_specials[start : start + len(bare)] == bare:
            return with_specials[:start]
    return []


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tokenise on this thread unless the user set it otherwise: a pool of threads spins against other processes'."""
    if _SWITCH in os.environ:
        yield
        return
    os.environ[_SWITCH] = "false"
    try:
        yield
    finally:
        del os.environ[_SWITCH]
