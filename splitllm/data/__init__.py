"""The data room: load rows, tokenise and mask them, deal them to clients, form micro-batches.

Names resolve lazily, so that `import splitllm.data` costs neither torch nor datasets.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from splitllm.data.batching import BatchStream, MicroBatch, collate, eval_batches
    from splitllm.data.corpus import ClientShare, Corpus, load_corpus
    from splitllm.data.examples import Example

_HOMES = {
    "BatchStream": "batching",
    "MicroBatch": "batching",
    "collate": "batching",
    "eval_batches": "batching",
    "ClientShare": "corpus",
    "Corpus": "corpus",
    "load_corpus": "corpus",
    "Example": "examples",
}

__all__ = [
    "BatchStream",
    "ClientShare",
    "Corpus",
    "Example",
    "MicroBatch",
    "collate",
    "eval_batches",
    "load_corpus",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
