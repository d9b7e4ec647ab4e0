"""What a server's children may send, by the recipe: looked at before anything is computed with it.

Suffixes: B rows, S padded length, T real tokens, N labelled positions, D hidden width.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from splitllm.errors import PeerError
from splitllm.roles.hidden import PHASES
from splitllm.roles.round_checks import FLOATS, MOST_EXAMPLES, RoundBounds, are_reports, are_weights
from splitllm.roles.together import ADAPTER_SLOT, LARGEST_NORM, SLOTS, is_loss, is_number
from splitllm.wire.message import Message

MOST_KEPT = 16  # states that a role may say it kept
LONGEST_ORIGIN = 40  # characters
LONGEST_WORDS = 300  # characters


@dataclass(frozen=True)
class Child:
    """What one child speaks for.

    Attributes:
        clients: the numbers of the clients whose branch goes through it -> their names.
        roles: itself and all below it -> with whom they can exchange their states: their tiers, or nobody else.
        summed: adapter tensors held there whose gradients are summed over roles -> shape.
        normed: names of the others that are trained together.
        own: client -> how many tensors of its own adapter are held there.
        adapter: what is held there of the adapter -> shape; a client's own tensors behind `tenant/CLIENT/`, but with
            rounds, after which all have the same.
        averaged: those that rounds average, by their names in an adapter file -> shape.
    """

    clients: Mapping[int, str]
    roles: Mapping[str, str]
    summed: Mapping[str, torch.Size]
    normed: frozenset[str]
    own: Mapping[int, int]
    adapter: Mapping[str, torch.Size]
    averaged: Mapping[str, torch.Size] = field(default_factory=dict)

    @property
    def tiers(self) -> set[str]:
        """Its own and those below."""
        return set(self.roles.values())


@dataclass(frozen=True)
class Allowed:
    """The bounds that a recipe sets to its messages.

    Attributes:
        children: by name.
        steps: of the run.
        accumulate: micro-batches of a client in a step.
        rows: of a micro-batch, at most.
        length: of a row, at most.
        width: D.
        vocabulary: token ids are below it.
        targets: whether the labels go up.
        packed: whether rows may carry position ids.
        double: whether values may be of fp64.
        tiers: those who can exchange their states -> their adapter tensors that are trained together -> shape.
        rounds: what is allowed in them; None: there are none.
    """

    children: Mapping[str, Child]
    steps: int
    accumulate: int
    rows: int
    length: int
    width: int
    vocabulary: int
    targets: bool
    packed: bool
    double: bool
    tiers: Mapping[str, Mapping[str, torch.Size]]
    rounds: RoundBounds | None = None

    def check(self, message: Message) -> None:
        """Look at a request.

        Raises:
            PeerError: the recipe does not allow it; says what is wrong.
        """
        step, client, index = message.micro_batch
        child = self.children[message.sender]
        if message.kind in ("forward", "backward"):
            train = message.kind == "backward" or message.header.get("train") is True
            _need(client in child.clients, message, f"client {client}, which does not belong to it")
            _need(step < self.steps and (step >= 0) == train, message, f"step {step} of {self.steps}")
            _need(index >= 0 and (not train or index < self.accumulate), message, f"micro-batch {index}")
        else:
            last = self.steps - 1 if message.kind in ("open", "close") else self.steps
            _need(0 <= step <= last, message, f"step {step} of {self.steps}")
        wide = [name for name, tensor in message.tensors.items() if tensor.dtype == torch.float64]
        _need(self.double or not wide, message, f"{_short(wide)} of fp64, which the recipe has not")
        _need(message.kind in _WITH_TENSORS or not message.tensors, message, "tensors, where none are due")
        _CHECKS[message.kind](self, child, message)


def _join(allowed: Allowed, child: Child, message: Message) -> None:
    standings = _mapping(message, "standings")
    for role, standing in standings.items():
        _need(role in child.roles, message, f"a standing of {role[:80]!r}, which is not below it")
        _need(isinstance(standing, list) and len(standing) == 2, message, "a standing that is no pair")
        tier, states = standing
        _need(tier == child.roles[role], message, f"another tier for {role}")
        fits = isinstance(states, list) and 1 <= len(states) <= MOST_KEPT
        _need(fits, message, "a standing without a list of states")
        _need(all(_is_state(state, allowed.steps) for state in states), message, "a standing with what is no state")
    aside = not standings  # nobody is left below it
    _need(aside or message.sender in standings, message, "no standing of its own")
    _need(aside or any(name in standings for name in child.clients.values()), message, "no standing of a client")


def _share(allowed: Allowed, child: Child, message: Message) -> None:
    """States of whole tiers below, or none; whose are due, the generation tells (`parts.py`)."""
    stepped = any(not name.startswith(f"{ADAPTER_SLOT}/") for name in message.tensors)
    slots = SLOTS if stepped else {ADAPTER_SLOT: True}
    due: dict[str, torch.Size] = {}
    for shapes in (allowed.tiers[tier].items() for tier in child.tiers):
        states = {f"{slot}/{n}": shape if like else torch.Size() for slot, like in slots.items() for n, shape in shapes}
        if not states.keys().isdisjoint(message.tensors):
            due |= states
    _need(
        set(message.tensors) == set(due),
        message,
        f"states {_short(message.tensors)}, which are not those of whole tiers below it",
    )
    for name, shape in due.items():
        _floats(message, name, shape)


def _open(allowed: Allowed, child: Child, message: Message) -> None:
    labels = _mapping(message, "labels")
    _need(bool(labels), message, "no label counts")
    for client, counts in labels.items():
        _need(_is_client(client, child), message, f"label counts of client {client[:20]!r}, which is not below it")
        least = 0 if allowed.rounds is not None and allowed.rounds.level > 1 else 1  # who takes no part has none
        fits = isinstance(counts, list) and least <= len(counts) <= allowed.accumulate
        _need(fits, message, f"label counts that are no list of at most {allowed.accumulate}")
        most = allowed.rows * allowed.length
        _need(all(_whole(count, 0, most) for count in counts), message, "label counts beyond its rows")


def _forward(allowed: Allowed, _child: Child, message: Message) -> None:
    header, tensors = message.header, message.tensors
    _need(all(isinstance(header.get(key), bool) for key in ("train", "input_gradient")), message, "no train flag")
    lengths = header.get("lengths")
    _need(isinstance(lengths, list) and 1 <= len(lengths) <= allowed.rows, message, f"not 1 to {allowed.rows} rows")
    assert isinstance(lengths, list)
    _need(all(_whole(n, 1, allowed.length) for n in lengths), message, f"rows not of 1 to {allowed.length} tokens")
    wanted = {"hidden_TD", "positions_N"} | ({"targets_N"} if allowed.targets else set())
    allowed_names = wanted | ({"position_ids_BS"} if allowed.packed else set())
    _need(wanted <= set(tensors) <= allowed_names, message, f"tensors {_short(tensors)}; {sorted(wanted)} are due")
    tokens = sum(lengths)
    _floats(message, "hidden_TD", (tokens, allowed.width))
    count = tensors["positions_N"].shape[0] if tensors["positions_N"].dim() == 1 else 0
    _need(count <= tokens, message, "more labelled positions than tokens")
    _integers(message, "positions_N", (count,), tokens)
    if allowed.targets:
        _integers(message, "targets_N", (count,), allowed.vocabulary)
    if "position_ids_BS" in tensors:
        _integers(message, "position_ids_BS", (len(lengths), max(lengths)), allowed.length)
    if "rows" in header:
        rows = header["rows"]
        fits = isinstance(rows, list) and len(rows) == len(lengths) and all(_whole(row, 0, 1 << 40) for row in rows)
        _need(fits, message, "row numbers that are not one for each row")


def _backward(allowed: Allowed, _child: Child, message: Message) -> None:
    _need(not allowed.targets, message, "a gradient, but the loss is not computed there")
    _need(set(message.tensors) == {"gradient_ND"}, message, f"tensors {_short(message.tensors)}; gradient_ND is due")
    shape = tuple(message.tensors["gradient_ND"].shape)
    _need(len(shape) == 2 and shape[0] <= allowed.rows * allowed.length, message, f"a gradient of {list(shape)}")
    _floats(message, "gradient_ND", (shape[0], allowed.width))


def _close(allowed: Allowed, child: Child, message: Message) -> None:
    norms, own = _mapping(message, "norms"), _mapping(message, "own")
    idle = allowed.rounds is not None and allowed.rounds.lanes and not norms  # who takes no part has no gradients
    _need(idle or set(norms) == child.normed, message, "not the norms that are due")
    _need(all(map(_is_norm, norms.values())), message, "squared norms that are none")
    for client, each in own.items():
        _need(_is_client(client, child), message, f"norms of client {client[:20]!r}, which is not below it")
        counts = {child.own.get(int(client)), 0 if allowed.rounds is not None else None}
        fits = isinstance(each, list) and len(each) in counts and all(map(_is_norm, each))
        _need(fits, message, f"not the norms that are due of client {client}")
    _need(set(message.tensors) == set(child.summed), message, "not the gradients that are due")
    for name, shape in child.summed.items():
        _floats(message, name, shape)
    _losses(child, message)
    due = {client for client in message.header["losses"] if int(client) in child.own}
    _need(set(own) == due, message, f"norms of clients {sorted(own)}, where {sorted(due)} are due")
    crossed = _mapping(message, "bytes")
    _need(set(crossed) <= set(child.roles), message, "bytes of roles that are not below it")
    pairs = all(isinstance(p, list) and len(p) == 2 and all(_whole(n, 0, 1 << 53) for n in p) for p in crossed.values())
    _need(pairs, message, "bytes that are no pairs of numbers")


def _round(allowed: Allowed, child: Child, message: Message) -> None:
    bounds = allowed.rounds
    _need(bounds is not None and bounds.due(message.step) > 0, message, f"step {message.step}, where no round is due")
    assert bounds is not None
    for client, each in _mapping(message, bounds.counted).items():
        _need(_is_client(client, child), message, f"{bounds.counted} of client {client[:20]!r}, which is not below it")
        fits = _whole(each, 1, MOST_EXAMPLES) if bounds.level == 1 else are_weights(each, bounds.levels)
        _need(fits, message, f"{bounds.counted} of client {client} that are none")
    _need(are_reports(message.header.get("reports", [])), message, "reports that are none")
    if bounds.level == 1 and message.header.get("spoiled") is True and not message.tensors:
        return
    if bounds.lanes and bounds.level > 1:
        _need(not message.tensors, message, "tensors, where only weights are due")
        return
    fault = bounds.value_fault(message.step, message.tensors, child.averaged)
    _need(fault is None, message, str(fault))


def _merge(allowed: Allowed, child: Child, message: Message) -> None:
    bounds = allowed.rounds
    due = bounds is not None and bounds.lanes and 1 < bounds.level <= bounds.due(message.step)
    _need(due, message, f"step {message.step}, where no round is due")
    assert bounds is not None
    for client, count in _mapping(message, "weights").items():
        _need(_is_client(client, child), message, f"weights of client {client[:20]!r}, which is not below it")
        _need(are_weights([count], 1), message, f"weights of client {client} that are none")
    _need(_whole(message.header.get("version"), 0, 1 << 53), message, "no version")
    fault = bounds.value_fault(message.step, message.tensors, child.averaged)
    _need(fault is None, message, str(fault))


def _secure(allowed: Allowed, child: Child, message: Message) -> None:
    bounds = allowed.rounds
    due = bounds is not None and bounds.words is not None and bounds.due(message.step) > 0
    _need(due, message, f"step {message.step}, where nothing is masked")
    assert bounds is not None
    _need(message.header.get("phase") in PHASES, message, "no phase")
    _mapping(message, "said")
    masked = message.header["phase"] == "masked"
    _need(set(message.tensors) == ({"words"} if masked else set()), message, "words in another phase than theirs")
    fault = bounds.value_fault(message.step, message.tensors, child.averaged)
    _need(fault is None, message, str(fault))


def _evaluated(_allowed: Allowed, child: Child, message: Message) -> None:
    _losses(child, message)


def _finish(allowed: Allowed, child: Child, message: Message) -> None:
    words = _mapping(message, "roles")
    _need(set(words) <= set(child.roles), message, "closing words of roles that are not below it")
    for said in words.values():
        fits = isinstance(said, dict) and len(said) <= 16 and all(is_number(value) for value in said.values())
        _need(fits, message, "closing words that are no numbers")
    if allowed.rounds is not None:
        fault = allowed.rounds.adapter_fault(message.tensors, child.adapter)
        _need(fault is None, message, str(fault))
        return
    _need(set(message.tensors) == set(child.adapter), message, "not the adapter that is held there")
    for name, shape in child.adapter.items():
        _floats(message, name, shape)


def _diverged(_allowed: Allowed, _child: Child, message: Message) -> None:
    what = message.header.get("what")
    fits = isinstance(what, str) and 1 <= len(what) <= LONGEST_WORDS and what.isprintable()
    _need(fits, message, "words that are no line")


_WITH_TENSORS = frozenset({"share", "forward", "backward", "close", "secure", "round", "merge", "finish"})
_CHECKS: dict[str, Callable[[Allowed, Child, Message], None]] = {
    "join": _join,
    "share": _share,
    "open": _open,
    "forward": _forward,
    "backward": _backward,
    "close": _close,
    "secure": _secure,
    "round": _round,
    "merge": _merge,
    "evaluated": _evaluated,
    "finish": _finish,
    "diverged": _diverged,
}


def _losses(child: Child, message: Message) -> None:
    losses = _mapping(message, "losses")
    for client, sums in losses.items():
        _need(_is_client(client, child), message, f"losses of client {client[:20]!r}, which is not below it")
        _need(isinstance(sums, list) and len(sums) == 3, message, "losses that are not loss, labels and tokens")
        loss, *counts = sums
        _need(is_loss(loss), message, "a loss that is no number")
        _need(all(_whole(count, 0, 1 << 53) for count in counts), message, "labels or tokens that are no counts")


def _mapping(message: Message, key: str) -> Mapping[str, Any]:
    value = message.header.get(key)
    _need(isinstance(value, dict), message, f"no {key}")
    assert isinstance(value, dict)
    return value


def _is_client(text: str, child: Child) -> bool:
    return text.isdecimal() and len(text) < 10 and str(int(text)) == text and int(text) in child.clients


def _floats(message: Message, name: str, shape: Iterable[int]) -> None:
    found = message.tensors[name]
    fits = found.dtype in FLOATS and list(found.shape) == list(shape)
    _need(fits, message, f"{name} of {found.dtype} {list(found.shape)}; floats of {list(shape)} are due")


def _integers(message: Message, name: str, shape: tuple[int, ...], below: int) -> None:
    found = message.tensors[name]
    fits = found.dtype == torch.int32 and tuple(found.shape) == shape
    _need(fits, message, f"{name} of {found.dtype} {list(found.shape)}; int32 of {list(shape)} are due")
    low, high = (int(end) for end in torch.aminmax(found)) if found.numel() else (0, -1)
    _need(low >= 0 and high < below, message, f"{name} beyond 0 to {below - 1}")


def _whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_norm(value: Any) -> bool:
    return value is None or (is_number(value) and 0 <= value <= LARGEST_NORM)


def _is_state(value: Any, last: int) -> bool:
    """Whether it is steps done, and their origin."""
    if not isinstance(value, list) or len(value) != 2 or not _whole(value[0], 0, last):
        return False
    return isinstance(value[1], str) and value[1].isprintable() and 1 <= len(value[1]) <= LONGEST_ORIGIN


def _short(names: Iterable[str]) -> str:
    return reprlib.repr(sorted(names))


def _need(fits: bool, message: Message, found: str) -> None:
    if not fits:
        raise PeerError(f"{message.sender} sent {message.kind} with {found}")
