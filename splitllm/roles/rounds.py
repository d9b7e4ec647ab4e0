"""What a role does in a round: what it has goes up, what all of them go on from comes down.

A round belongs to the step at whose end it is held: nobody has committed that step before it knows the outcome, so a
role that is lost in between brings all back to before the step, and the round is held again with it. Messages go up to
the top in every round; adapters only to the level that is due (`recipe/rounds.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from splitllm.errors import AverageError, DivergedError
from splitllm.federated.averager import NOT_FINITE, Averager
from splitllm.federated.rounds import ADAPTER, FROZEN, A, Arithmetic, Combined, Tensors, Update
from splitllm.privacy.fixedpoint import Words
from splitllm.recipe import Recipe, level_due, side_that_trains
from splitllm.roles.hidden import Hiding, summed
from splitllm.roles.holding import Holder
from splitllm.roles.outcomes import Outcome, largest
from splitllm.roles.participation import Participation
from splitllm.roles.worker import Worker
from splitllm.wire.message import Message

PART = "participation/"
Weights = dict[int, list[float]]
"""Client -> how much it counts at each level, lowest first."""


@dataclass
class Kept:
    """What a server keeps of rounds beside its adapter."""

    averager: Averager | None
    participation: Participation | None

    def state(self) -> Tensors:
        """All that a resumed run needs."""
        taking_part = self.participation.state() if self.participation is not None else {}
        averager = self.averager.state() if self.averager is not None else {}
        return averager | {PART + key: tensor for key, tensor in taking_part.items()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Be as a `state()` tells."""
        if self.averager is not None:
            self.averager.load({key: tensor for key, tensor in tensors.items() if not key.startswith(PART)})
        if self.participation is not None:
            self.participation.load({k.removeprefix(PART): t for k, t in tensors.items() if k.startswith(PART)})


@dataclass
class Rounds:
    """One role's part.

    Attributes:
        recipe: intervals, rule and weights are read.
        name: of the role.
        level: 0 of clients, 1 of those right above them.
        worker: what it trains; None for a mere coordinator.
        arithmetic: of the rule.
        averager: of a role that averages.
        scale: client, or None for what a role trains for all -> scale of its products.
        block: adapter tensor -> global index of its block.
        blocks: those that are averaged, since more than one adapter is trained for them.
        entries: client -> the first block that it runs here.
        groups: level below -> the clients of each group that averages there.
        names: of the clients, by number.
        stops: role right below -> the block after the last that it holds.
        participation: of a server right above clients.
        hiding: how clients and the server right above them hide what each sends; None: they do not.
    """

    recipe: Recipe
    name: str
    level: int
    worker: Worker | None
    arithmetic: Arithmetic
    averager: Averager | None
    scale: Callable[[int | None], float]
    block: Callable[[str], int]
    blocks: frozenset[int]
    entries: Mapping[int, int] = field(default_factory=dict)
    groups: Mapping[int, Sequence[Sequence[int]]] = field(default_factory=dict)
    names: Sequence[str] = ()
    stops: Mapping[str, int] = field(default_factory=dict)
    participation: Participation | None = None
    hiding: Hiding | None = None

    def due(self, steps: int) -> int:
        """The highest level that averages after so many steps, or 0."""
        return level_due(self.recipe, steps)

    def begin(self, step: int) -> None:
        """Before a step: which matrices train in it."""
        if self.worker is None:
            return
        side = side_that_trains(self.recipe, step)
        lent = [] if self.worker.common is None else [self.worker.trainable]
        for trainable in [*lent, *(holder.trainable for holder in self._holders())]:
            trainable.train_only(side)

    def value(self, due: int) -> Tensors:
        """What a client sends up."""
        return largest(self.values(due))

    def values(self, due: int) -> list[Tensors]:
        """Of all that is trained here."""
        return [self._value(holder, due) for holder in self._holders()]

    def uncounted(self, messages: Sequence[Message]) -> Tensors:
        """What goes up where nothing was averaged, so that the outcome of others comes down: it counts nothing."""
        steps = messages[0].step
        below = [m.tensors for m in messages] if self.hiding is None else [self.summed_tensors(steps)]
        return largest([*below, *self.values(self.due(steps))])

    def updates(
        self, children: Iterable[tuple[str, Sequence[int], Tensors]], weights: Weights, due: int
    ) -> list[Update]:
        """What a server averages: what its children sent, and what it trains itself.

        Args:
            children: of each the name, the clients below it, and its value.
            weights: of all clients below.
            due: the highest level that averages.
        """
        now = {client: each[self.level - 1] for client, each in weights.items()}
        found = [Update(name, math.fsum(now[c] for c in clients), value) for name, clients, value in children]
        for holder in self._holders():
            value = self._value(holder, due)
            if holder.client is not None:
                found.append(Update(holder.sender, now.get(holder.client, 0.0), value))
            else:
                found += self._by_weight(holder.sender, value, now)
        return [update for update in found if update.weight > 0 and update.tensors]

    def words(self, value: Tensors) -> Words:
        """What a client adds to a sum instead of its value."""
        assert self.hiding is not None and self.worker is not None
        anchor = {ADAPTER + name: tensor for name, tensor in self.worker.trainable.anchor().items()}
        return self.hiding.words_of(value, anchor, self.name)

    def summed_tensors(self, steps: int) -> Tensors:
        """What clients add up in a round, as it was handed out last."""
        return self.handed(steps, min(self.stops.values()))

    def handed(self, steps: int, stop: int) -> Tensors:
        """What was handed out last of that which a round after so many steps averages below block `stop`."""
        assert self.averager is not None
        side, given = side_that_trains(self.recipe, steps - 1), self.averager.given().items()
        found = {key: tensor for key, tensor in given if self._is_below(key.partition("/")[2], stop)}
        return {key: tensor for key, tensor in found.items() if side is None or f".lora_{side}." in key}

    def sum_of(self, messages: Sequence[Message]) -> Words:
        """Of words that are not masked."""
        assert self.hiding is not None
        size = sum(tensor.numel() for tensor in self.summed_tensors(messages[0].step).values())
        return summed(messages, self.hiding.fixed.dtype, size)

    def _is_below(self, name: str, stop: int) -> bool:
        return self.block(name) in self.blocks and self.block(name) < stop

    def take(self, value: Mapping[str, torch.Tensor], due: int, steps: int) -> None:
        """Go on from the outcome."""
        for holder in self._holders():
            self._renew(holder, value, due, steps)
        if self.averager is not None:
            self.averager.handed_out(value)

    def weights_in(self, messages: Sequence[Message]) -> Weights:
        """What every client below counts: worked out right above clients, told further up."""
        if self.participation is not None:
            found = self.participation.weights(self.examples_in(messages))
            return self._of_asked(found, messages[0].step) if self.hiding is not None else found
        return {int(c): list(each) for message in messages for c, each in message.header["weights"].items()}

    def _of_asked(self, weights: Weights, steps: int) -> Weights:
        """In a sum counts who adds to it: all that are asked now, whoever trained before a round that was void."""
        assert self.participation is not None
        asked = self.participation.asked(steps - 1)
        return {client: [float(client in asked), *each[1:]] for client, each in weights.items()}

    def of_used(self, weights: Weights, messages: Sequence[Message], outcome: Outcome) -> Weights:
        """What clients count further up: who is not in the average of this server counts nothing there."""
        if outcome.void or outcome.combined is None:
            return {client: [0.0] * len(each) for client, each in weights.items()}
        unused = {c for m in messages if m.sender in outcome.rejected for c in self.clients_in(m)}
        unused |= {client for client in weights if self.names[client] in outcome.rejected}
        return {client: [0.0] * len(each) if client in unused else each for client, each in weights.items()}

    def examples_in(self, messages: Sequence[Message]) -> dict[int, int]:
        """Rows of each client, as it says."""
        return {int(c): int(rows) for message in messages for c, rows in message.header["examples"].items()}

    def clients_in(self, message: Message) -> list[int]:
        """Those below a child."""
        return [int(c) for c in message.header["examples" if self.level == 1 else "weights"]]

    def settled(self, value: Tensors) -> Tensors:
        """What is handed out for the average of the level that is due: at the top, where its optimizer steps to."""
        return value if self.averager is None else self.averager.settle(value)

    def report(self, outcome: Outcome) -> dict[str, Any]:
        """What is told of an average."""
        value = {} if outcome.combined is None else outcome.combined.value
        error = 0.0 if outcome.combined is None else outcome.combined.error
        ranks = [t.shape[0] for name, t in value.items() if name.startswith(FROZEN) and name.endswith(A)]
        return {
            "role": self.name,
            "level": self.level,
            "updates": outcome.updates,
            "error": error if self.hiding is None else None,
            "frozen_rank": max(ranks, default=0),
            "rejected": dict(outcome.rejected),
            "void": outcome.void,
            "epsilon": outcome.epsilon,
        }

    def concerns(self, name: str, child: str) -> bool:
        """Whether a tensor of an outcome is of a block that a child or somebody below it holds."""
        return self.block(name.partition("/")[2]) < self.stops[child]

    def _usable(self, weights: Weights, rejected: Mapping[str, str]) -> int:
        """Clients that took part and were not left out."""
        took_part = [client for client, each in weights.items() if each[self.level - 1] > 0]
        return sum(self.names[client] not in rejected for client in took_part)

    def is_void(self, usable: int) -> str | None:
        """Why a round right above clients does not count, if so many updates are too few; None: it does."""
        least = self.recipe.rounds.participation.minimum if self.level == 1 else 1
        if usable >= least:
            return None
        return f"{usable} usable updates, where rounds.participation.minimum is {least}"

    def adapter(self) -> Tensors:
        """What is trained here by its names in an adapter file, and `frozen/NAME`; under rules of any rank scaled.

        Of what more than one holds here, the largest: after a round of all it is the best. Of a client that hides
        what it trains it is what the last round gave it, should one after that have been void.
        """
        hidden = self.hiding is not None and self.level == 0
        found = [(h.trainable.anchor() if hidden else h.adapter(), h.scale) for h in self._holders()]
        held = [self.arithmetic.sent(tensors, scale) for tensors, scale in found]
        tensors = {name.removeprefix(ADAPTER): t for name, t in largest(held).items()}
        frozen = self.worker.frozen if self.worker is not None else None
        return tensors | (frozen.whole() if frozen is not None else {})

    def scaled(self, tensors: Tensors) -> Tensors:
        """What several clients train in common, as `adapter` has the rest."""
        return {n.removeprefix(ADAPTER): t for n, t in self.arithmetic.sent(tensors, self.scale(None)).items()}

    def average_groups(self, weights: Weights, due: int) -> None:
        """A round of a lower level: what is trained here for its clients is averaged group by group."""
        own = {holder.client: holder for holder in self._holders() if holder.client is not None}
        for group in self.groups.get(due, ()):
            members = [own[client] for client in group if client in own]
            updates = [
                Update(h.sender, weights[h.client][due - 1], self._value(h, due))
                for h in members
                if h.client is not None
            ]
            usable = [update for update in updates if update.weight > 0 and update.tensors]
            if usable:
                combined, _ = self._combined(usable)
                for holder in members:
                    self._renew(holder, combined.value, due, 0)

    def average(
        self,
        children: Iterable[tuple[str, Sequence[int], Tensors]],
        weights: Weights,
        due: int,
        spoiled: Collection[str] = (),
    ) -> Outcome:
        """What stands for all that a server has to average; the arguments are those of `updates`.

        Args:
            children: as there.
            weights: as there.
            due: as there.
            spoiled: children that say that what they have is not finite.

        Raises:
            DivergedError: nothing of what came is finite.
        """
        unusable = dict.fromkeys(spoiled, NOT_FINITE)
        updates = [each for each in self.updates(children, weights, due) if each.sender not in unusable]
        if not updates and unusable:
            raise DivergedError(
                f"nothing is left to average ({', '.join(unusable)}: not finite); lower the learning rate"
            )
        if not updates:
            return Outcome(None, {}, 0, "nobody took part")
        combined, rejected = self._combined(updates)
        left, rejected = {update.sender for update in updates} - rejected.keys(), unusable | rejected
        return Outcome(combined, rejected, len(left), self.is_void(self._usable(weights, rejected)))

    def _combined(self, updates: Sequence[Update]) -> tuple[Combined, dict[str, str]]:
        assert self.averager is not None
        try:
            return self.averager.combine(updates)
        except AverageError as error:
            raise DivergedError(str(error)) from error

    def average_hidden(self, words: Words, weights: Weights, due: int, steps: int) -> Outcome:
        """The same of the sum of what clients have added."""
        assert self.hiding is not None and self.participation is not None
        members = [client for client, each in weights.items() if each[self.level - 1] > 0]
        value = self.hiding.mean(words, len(members), self.summed_tensors(steps))
        made = self.average([("the clients' sum", members, value)], weights, due)
        spent = self.hiding.spent(self.participation.rounds_held + 1)
        return replace(made, updates=len(members), epsilon=spent)

    def _holders(self) -> list[Holder]:
        """What is trained here."""
        if self.worker is None:
            return []
        together, frozen, own = self.worker.trainable, self.worker.frozen, self.worker.own.items()
        by_itself = together.parameters and self.worker.common is None  # else it is a copy
        mine = [Holder(self.name, together, self.scale(None), None, frozen)] if by_itself else []
        beside = frozen if self.level == 0 else None  # of a server's clients nothing is frozen
        return mine + [Holder(self.names[c], each, self.scale(c), c, beside) for c, each in own]

    def _value(self, holder: Holder, due: int) -> Tensors:
        """What it trains that others have, too, as a value."""
        averaged = [name for name in holder.trainable.parameters if self.block(name) in self.blocks]
        return holder.value(self.arithmetic, averaged, due, moments=self.recipe.rounds.moments == "average")

    def _renew(self, holder: Holder, value: Mapping[str, torch.Tensor], due: int, steps: int) -> None:
        anew, reset = (self.recipe.seed, f" after {steps}"), self.recipe.rounds.moments == "reset"
        holder.renew(self.arithmetic, value, due, anew, reset=reset)

    def _by_weight(self, sender: str, value: Tensors, now: Mapping[int, float]) -> list[Update]:
        """A server's own adapter: each block counts as much as the clients that it serves."""
        groups: dict[float, Tensors] = {}
        for key, tensor in value.items():
            block = self.block(key.partition("/")[2])
            served = math.fsum(w for client, w in now.items() if self.entries.get(client, 0) <= block)
            groups.setdefault(served, {})[key] = tensor
        return [Update(sender, weight, tensors) for weight, tensors in groups.items()]
