"""From the recipe's `data` section to every client's examples: read, tokenise, hold out, deal, pack."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from splitllm.data.examples import Example
from splitllm.data.formats import to_examples
from splitllm.data.packing import pack
from splitllm.data.partition import check_owner, field_values, partition
from splitllm.data.rows import Row
from splitllm.data.sources import Source, read_sources
from splitllm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from splitllm.recipe import DataRecipe

logger = logging.getLogger(__name__)

HOLD_OUT_KEY = 0x5EED2
"""Sets this use of the recipe's seed apart from the others."""
GROUPS_SHOWN = 5


@dataclass(frozen=True)
class ClientShare:
    """What a client trains on.

    Attributes:
        client: its name, `client-0` and so on.
        examples: rows (packed rows where `data.pack`).
        tokens: real tokens.
        labels: tokens that are learned.
        groups: its most frequent values of the partition's field -> rows; empty without a field.
    """

    client: str
    examples: int
    tokens: int
    labels: int
    groups: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Corpus:
    """Every client's examples.

    Attributes:
        train: a tuple a client, none empty (loaded for one client: the others').
        eval: a tuple a client: its own rows set aside or, where `data.eval` names rows, those dealt in turn (some may
            be empty where there are few).
        shares: what each client trains on (loaded for one client: that client only).
        dropped: rows left out because nothing in them is learned.
        shortened: rows cut at `data.max_length`.
    """

    train: tuple[tuple[Example, ...], ...]
    eval: tuple[tuple[Example, ...], ...]
    shares: tuple[ClientShare, ...]
    dropped: int = 0
    shortened: int = 0


def load_corpus(
    data: DataRecipe, tokenizer: Tokenizer, *, clients: int, batch_size: int, seed: int, client: int | None = None
) -> Corpus:
    """Read, tokenise and deal out what the recipe names: the same for the same recipe, seed and files.

    One client's examples are those it has in the whole corpus. Whoever has nothing to learn is known only once all rows
    are tokenised, and both the deal and the rows set aside depend on it; so all are tokenised for one client as well.
    Where rows are dealt by `own`, all that is read is that client's.

    Args:
        data: the recipe's `data` section.
        tokenizer: the model's.
        clients: how many share the rows.
        batch_size: `train.batch_size`; clients with fewer examples are logged.
        seed: the recipe's.
        client: load this client's examples only; None: every client's.

    Raises:
        DataError: a file is missing, malformed (file and line) or empty; nothing is left to learn or to evaluate; there
            are more clients than examples, values or files; several clients' `own` rows are asked for in one place.
    """
    alone = data.partition.by == "own" and client is not None
    sharing = 1 if alone else clients
    check_owner(data.partition, sharing)
    rows, brought = _read(data)
    rows, examples, dropped, shortened = _usable(rows, data, tokenizer, "data.source")
    dealt = partition(rows, data.partition, clients=sharing, seed=seed)
    if brought is None:
        dealt, kept_back = _hold_out(dealt, data.eval_fraction, seed)
        evaluation = [[examples[number] for number in part] for part in kept_back]
    else:
        _, held_out, eval_dropped, eval_shortened = _usable(brought, data, tokenizer, "data.eval")
        evaluation = [held_out[number::sharing] for number in range(sharing)]
        dropped, shortened = dropped + eval_dropped, shortened + eval_shortened
    parts = [(0 if alone else n) if client in (None, n) else None for n in range(clients)]
    train = _finished([[examples[number] for number in part] for part in dealt], parts, data)
    groups = _groups(rows, dealt, data)
    corpus = Corpus(
        train=train,
        eval=_finished(evaluation, parts, data),
        shares=tuple(_share(n, train[n], groups[part]) for n, part in enumerate(parts) if part is not None),
        dropped=dropped,
        shortened=shortened,
    )
    _log(corpus, batch_size, data.max_length)
    return corpus


def _finished(
    dealt: Sequence[Sequence[Example]], parts: Sequence[int | None], data: DataRecipe
) -> tuple[tuple[Example, ...], ...]:
    """Every client's part, packed where the recipe says so; nothing for a client whose number of a part is None."""
    found = [dealt[part] if part is not None else () for part in parts]
    return tuple(tuple(pack(part, data.max_length) if data.pack else part) for part in found)


def _read(data: DataRecipe) -> tuple[list[Row], list[Row] | None]:
    """The rows to be dealt, and those for evaluation that are named or that a source brings along, if any are."""
    sources = read_sources(data.source, "data.source")
    rows = [row for source in sources for row in source.rows]
    if data.eval is not None:
        return rows[: data.limit], [
            row for source in read_sources(data.eval, "data.eval") for row in _eval_rows(source)
        ]
    return rows[: data.limit], [row for source in sources for row in source.eval] or None


def _eval_rows(source: Source) -> list[Row]:
    return source.eval or source.rows


def _hold_out(dealt: list[list[int]], fraction: float, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Each client sets aside a fraction of its own rows, so that no row moves; in all, at least one is set aside."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, HOLD_OUT_KEY))))
    counts = [min(round(fraction * len(part)), len(part) - 1) for part in dealt]
    if not any(counts):
        largest = max(range(len(dealt)), key=lambda client: len(dealt[client]))
        counts[largest] = min(1, len(dealt[largest]) - 1)
    if not any(counts):
        raise DataError(
            f"data.eval_fraction: {fraction} of {sum(map(len, dealt))} rows leaves none to train on; name data.eval or "
            "add rows"
        )
    chosen = [set(rng.permutation(part)[:count].tolist()) for part, count in zip(dealt, counts, strict=True)]
    pairs = list(zip(dealt, chosen, strict=True))
    return [[n for n in part if n not in aside] for part, aside in pairs], [sorted(aside) for aside in chosen]


def _usable(
    rows: list[Row], data: DataRecipe, tokenizer: Tokenizer, key: str
) -> tuple[list[Row], list[Example], int, int]:
    """The rows that have something to learn, their examples, how many were dropped and how many shortened."""
    found, shortened = to_examples(rows, data, tokenizer)
    pairs = [(row, example) for row, example in zip(rows, found, strict=True) if example is not None]
    if not pairs:
        raise DataError(
            f"{key}: none of its {len(rows)} rows has a token to learn as format {data.format} with data.max_length "
            f"{data.max_length}; check data.format, data.fields and data.max_length"
        )
    kept, examples = zip(*pairs, strict=True)
    return list(kept), list(examples), len(rows) - len(pairs), shortened


def _groups(rows: Sequence[Row], dealt: list[list[int]], data: DataRecipe) -> list[dict[str, int]]:
    if data.partition.by not in ("field", "dirichlet"):
        return [{} for _ in dealt]
    values = field_values(rows, data.partition.field or "")
    counts = [Counter(values[number][:40] for number in part) for part in dealt]
    return [dict(sorted(count.items(), key=lambda item: (-item[1], item[0]))[:GROUPS_SHOWN]) for count in counts]


def _share(client: int, examples: Sequence[Example], groups: dict[str, int]) -> ClientShare:
    return ClientShare(
        client=f"client-{client}",
        examples=len(examples),
        tokens=sum(len(example) for example in examples),
        labels=sum(example.labels for example in examples),
        groups=groups,
    )


def _log(corpus: Corpus, batch_size: int, max_length: int) -> None:
    """Numbers only: no text of a row is ever logged."""
    if corpus.dropped:
        logger.warning("%d rows have nothing to learn and were left out", corpus.dropped)
    if corpus.shortened:
        logger.warning("%d rows were cut at data.max_length=%d tokens", corpus.shortened, max_length)
    for share in corpus.shares:
        if share.examples < batch_size:
            logger.info("%s has %d examples, fewer than train.batch_size=%d", share.client, share.examples, batch_size)
