"""Flower as the engine of rounds between edges and cloud. The one file that imports flwr.

The edges' SuperNodes run `client`, which carries values between the long-living edge process and Flower; the cloud's
SuperLink runs `server`, which averages. One message is one round of one edge: down goes the outcome of the round
before, which is given to the edge, and up comes what the edge has trained when the next one is due.

Flower starts a process for every message to a client, so nothing here loads torch but what the server needs.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from safetensors.numpy import load, save

from splitllm.errors import AverageError, PeerError
from splitllm.federated.calling import Calling
from splitllm.federated.parcels import end, give, take

if TYPE_CHECKING:
    from splitllm.federated.pooling import Arrays, Offer, Pooling

ROUND = "train.round"
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 60.0
DUE_SECONDS = 7 * 86_400.0
"""Within which an edge's next round must be due."""

log = logging.getLogger("flwr")


def carry(message: Message, context: Context) -> Message:
    """Give the edge the outcome that came, and answer with what it has for the next round.

    Args:
        message: the outcome of a step, or none; and whether there will be another round.
        context: the configuration of its node has `edge`, the edge's name, `exchange`, the address of its `Exchange`,
            and may have `patience`, the seconds to wait for an edge that cannot be reached.

    Raises:
        PeerError: a key is missing, or the edge refused or cannot be reached.
    """
    edge, address = (_word(context.node_config, key) for key in ("edge", "exchange"))
    patience = float(context.node_config.get("patience", PATIENCE_SECONDS))
    about: dict[str, Any] = dict(message.content.config_records["about"])
    if "error" in about:
        end(address, about["error"], patience)
    elif "step" in about:
        give(address, about["step"], about["bfloat16"], save(_arrays(message)), patience)
    if about["last"]:
        return Message(_content({"edge": edge, "over": True}, {}), reply_to=message)
    offer = take(address, patience)
    arrays = load(offer.tensors) if offer.tensors else {}
    return Message(_content({"edge": edge, "over": False} | offer.values, arrays), reply_to=message)


def run(grid: Grid, context: Context) -> None:
    """Average what the edges offer, round by round, by the rules of their recipe, until they are through.

    Args:
        grid: the nodes; a round waits for as many edges as there are.
        context: the configuration of the run has `edges`, their number, and `rounds`, after how many to end; 0: when
            the edges are through.

    Raises:
        AverageError: what the edges offer does not fit together.
        PeerError: an edge fails again and again, or offers what cannot be read.
    """
    from splitllm.federated.pooling import Pooling  # loads torch

    edges, rounds = (_count(context.run_config, key, least) for key, least in (("edges", 1), ("rounds", 0)))
    asking = _Asking(grid, Calling(edges))
    try:
        done = _rounds(asking, Pooling(), rounds)
    except AverageError as error:
        log.error("the run ends: %s", error)
        asking.error = str(error)
        asking.ask(last=True)
        raise
    log.info("through: %d rounds of %d edges", done, edges)


def _rounds(asking: _Asking, pooling: Pooling, rounds: int) -> int:
    """All of them; how many there were."""
    done, through = 0, False
    while not through:
        began = time.monotonic()
        offers = asking.ask()
        step = asking.calling.agreed()
        if step is None:
            break
        waited, began = time.monotonic() - began, time.monotonic()
        asking.outcomes, told = pooling.outcomes(offers)
        done += step > 0
        took = time.monotonic() - began
        log.info("round %d after %d steps: %s; %.1f s for the edges, %.2f s here", done, step, told, waited, took)
        through = 0 < rounds <= done or all(offer.last for offer in offers.values())
    if through:
        asking.ask(last=True)
    return done


client = ClientApp()
client.train("round")(carry)
server = ServerApp()
server.main()(run)


class _Asking:
    """Asks the edges, and brings them their outcomes.

    Attributes:
        error: why the rounds cannot go on; None: they do.
        outcomes: edge -> its arrays of the last round, and which are views of bfloat16. They are kept: an edge that was
            restarted needs them again.
    """

    def __init__(self, grid: Grid, calling: Calling) -> None:
        self.calling = calling
        self.error: str | None = None
        self.outcomes: dict[str, tuple[Arrays, list[str]]] = {}
        self._grid = grid

    def ask(self, *, last: bool = False) -> dict[str, Offer]:
        """What all edges offer for the next round; with `last` they only get what is theirs."""
        offers: dict[str, Offer] = {}
        asked: dict[str, int] = {}
        while not self.calling.complete:
            due = self.calling.due(list(self._grid.get_node_ids()), time.monotonic())
            asked |= self._sent([self._question(node, last) for node in due], due)
            for reply in self._grid.pull_messages(list(asked)) if asked else ():
                self._take_in(asked.pop(reply.metadata.reply_to_message_id), reply, offers)
            time.sleep(POLL_SECONDS)
        return offers

    def _sent(self, questions: list[Message], nodes: list[int]) -> dict[str, int]:
        """Message -> the node that has been sent it."""
        numbers: list[str | None] = list(self._grid.push_messages(questions)) if questions else []
        if len(numbers) < len(nodes):
            raise PeerError("the SuperLink takes no outcome of this size; lower the rank, or average with fedavg")
        for node in [node for number, node in zip(numbers, nodes, strict=True) if number is None]:
            log.warning(self.calling.failed(node, "the SuperLink did not take its message", time.monotonic()))
        return {number: node for number, node in zip(numbers, nodes, strict=True) if number is not None}

    def _question(self, node: int, last: bool) -> Message:
        edge = self.calling.names.get(node)
        values: dict[str, Any] = {"last": last and edge is not None}
        arrays: Arrays = {}
        if self.error is not None:
            values |= {"error": self.error}
        elif edge in self.outcomes:
            arrays, bfloat16 = self.outcomes[edge]
            values |= {"step": self.calling.step, "bfloat16": bfloat16}
        content, group = _content(values, arrays), str(self.calling.step)
        return Message(content, node, ROUND, ttl=DUE_SECONDS, group_id=group)

    def _take_in(self, node: int, reply: Message, offers: dict[str, Offer]) -> None:
        if reply.has_error():
            log.warning(self.calling.failed(node, str(reply.error.reason), time.monotonic()))
            return
        about: dict[str, Any] = dict(reply.content.config_records["about"])
        edge, step = about["edge"], None if about["over"] else about["step"]
        ignored = self.calling.answered(node, edge, step)
        if ignored is not None:
            log.info(ignored)
        elif step is not None:
            offers[edge] = _offer(about, _arrays(reply))


def _offer(about: Mapping[str, Any], arrays: Arrays) -> Offer:
    from splitllm.federated.pooling import Offer  # loads torch

    return Offer(
        about["step"], float(about["weight"]), about["last"], about["rules"], arrays, bfloat16=about["bfloat16"]
    )


def _word(config: Mapping[str, Any], key: str) -> str:
    found = config.get(key)
    if not isinstance(found, str) or not found:
        raise PeerError(f"{key} is {found!r}; start flower-supernode with --node-config '... {key}=\"...\"'")
    return found


def _count(config: Mapping[str, Any], key: str, least: int) -> int:
    found = config.get(key)
    if not isinstance(found, int) or found < least:
        raise AverageError(f"{key} is {found!r}; give a whole number of at least {least}: --run-config '{key}=...'")
    return found


def _content(about: Mapping[str, Any], arrays: Arrays) -> RecordDict:
    """One array for each dtype, end to end: Flower takes several requests for every array."""
    table: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, array in arrays.items():
        table.setdefault(str(array.dtype), []).append((name, array.shape))
    whole = {kind: np.concatenate([arrays[name].ravel() for name, _ in names]) for kind, names in table.items()}
    tensors = ArrayRecord({kind: Array(array) for kind, array in whole.items()})
    return RecordDict({"about": ConfigRecord({**about, "table": json.dumps(table)}), "tensors": tensors})


def _arrays(message: Message) -> dict[str, np.ndarray[Any, Any]]:
    """What `_content` was given.

    Raises:
        PeerError: the message holds something else.
    """
    found: dict[str, np.ndarray[Any, Any]] = {}
    try:
        for kind, names in json.loads(message.content.config_records["about"]["table"]).items():
            whole = message.content.array_records["tensors"][kind].numpy()
            parts = np.split(whole, np.cumsum([math.prod(shape) for _, shape in names])[:-1])
            found |= {name: part.reshape(shape) for (name, shape), part in zip(names, parts, strict=True)}
    except (KeyError, TypeError, ValueError) as error:
        raise PeerError(f"a message of a round cannot be read ({error}); use the same splitllm everywhere") from error
    return found
