"""What the top writes of a run whose clients go at their own pace: of each its lines and its adapter, and a summary."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from splitllm.deployment.past import COMMON_STEPS
from splitllm.deployment.record import memory_of
from splitllm.deployment.station import Station
from splitllm.errors import DivergedError
from splitllm.metrics import Metrics, replace_text
from splitllm.model.lora import adapter_shapes
from splitllm.model.trainable import Tensors
from splitllm.recipe import client_names, dump_recipe, goes_by_rounds, lora_of, what_leaves_in_a_deployment
from splitllm.roles.convening import Reports
from splitllm.roles.server import StepSums
from splitllm.running.outcome import RECIPE
from splitllm.running.places import ADAPTER
from splitllm.running.results import export_of, log_round, renew, summary_of
from splitllm.running.state import Totals

logger = logging.getLogger(__name__)


class Board:
    """The run as the top sees it.

    Args:
        station: of the top.
        metrics: writes `metrics.jsonl` and `summary.json`.
    """

    def __init__(self, station: Station, metrics: Metrics) -> None:
        self.station, self.metrics = station, metrics
        self._over, self._finished, self._told = set[int](), set[int](), set[tuple[str, int]]()
        names = client_names(station.recipe)
        self.records = {client: LaneRecord(self, client, name) for client, name in enumerate(names)}
        replace_text(station.options.directory / RECIPE, dump_recipe(station.recipe))
        for record in self.records.values():
            record.begun(station.recipe.train.steps)

    def over(self, client: int) -> None:
        """A client has diverged: it will have no adapter."""
        self._over.add(client)
        self.done()

    def has_ended(self, client: int) -> None:
        """A client has come to its end, and its adapter is written."""
        self._finished.add(client)

    def averaged(self, steps: int, reports: Reports) -> None:
        """This server has averaged what others brought."""
        log_round(self.metrics, steps, reports)

    def told(self, steps: int, reports: Reports) -> None:
        """Servers further down have averaged; each lane that was there may tell so."""
        new = [report for report in reports if (report["role"], steps) not in self._told]
        self._told |= {(report["role"], steps) for report in new}
        log_round(self.metrics, steps, new)

    def logged(self, records: Sequence[Mapping[str, Any]]) -> None:
        """What the metrics of a run that goes on tell of its rounds."""
        self._told |= {(each["role"], each["step"]) for each in records if each["event"] == "round"}

    def done(self) -> None:
        """When every client has its adapter, or has diverged: write the summary, unless that was done already."""
        directory, recipe = self.station.options.directory, self.station.recipe
        here = sorted(self._finished)
        if not here or not self._over.issuperset(self.records.keys() - here) or (directory / "summary.json").exists():
            return
        if not goes_by_rounds(recipe):
            renew(self.station.plan, directory, here)
        records = [self.records[client] for client in here]
        totals = Totals()
        for record in records:
            mine = record.totals
            totals.add(mine.tokens, mine.seconds, mine.bytes_up, mine.bytes_down)
        totals.seconds = max(record.totals.seconds for record in records)
        totals.loss_before, totals.loss_after = (_mean(records, step) for step in (0, recipe.train.steps))
        words = {role: said for record in records for role, said in record.words.items()}
        numbers = sum(self._numbers(client) for client in (here[:1] if goes_by_rounds(recipe) else here))
        summary = summary_of(totals, numbers, memory_of(words), what_leaves_in_a_deployment(recipe))
        self.metrics.write_summary(
            summary | {"clients": {each.name: each.said() for each in records}} | _common(records)
        )
        logger.info("done", extra={"fields": {"adapters": str(directory / ADAPTER), "loss": totals.loss_after}})

    def _numbers(self, client: int) -> int:
        """In the adapter of one client."""
        plan = self.station.plan
        shapes = adapter_shapes(plan.config, lora_of(plan.recipe, client), plan.modules)
        return sum(shape.numel() for shape in shapes.values())


@dataclass
class LaneRecord:
    """One client's lane as the top sees it.

    Attributes:
        totals: sums over its steps; seconds are those that its steps took.
        evaluations: step -> held-out loss and labels.
        words: closing words of the roles of this lane.
    """

    board: Board
    client: int
    name: str
    totals: Totals = field(default_factory=Totals)
    evaluations: dict[int, tuple[float, int]] = field(default_factory=dict)
    words: dict[str, Any] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)

    def said(self) -> dict[str, Any]:
        """What the summary tells of it."""
        before, after = (self.evaluations.get(step) for step in (0, self.board.station.recipe.train.steps))
        return {
            "eval_loss_before": before and before[0],
            "eval_loss_after": after and after[0],
            "train_tokens": self.totals.tokens,
        }

    def values(self) -> dict[str, Any]:
        """What the journal keeps."""
        return {name: value for name, value in asdict(self.totals).items() if not name.startswith("loss")}

    def put_back(self, values: Mapping[str, Any]) -> None:
        """Be as the journal tells."""
        self.totals = Totals(**values)

    def begun(self, step: int) -> bool:
        """A generation of this lane goes on from a step: what was written of it after that is dropped.

        Returns:
            Whether the evaluation of that step is written.
        """
        kept = self.board.metrics.truncate_to(step, client=self.name)
        self.board.logged(kept)
        mine = [record for record in kept if record["event"] == "eval" and record.get("client") == self.name]
        self.evaluations = {record["step"]: (record["loss"], record["labels"]) for record in mine if record["loss"]}
        self._since = time.perf_counter()
        return any(record["step"] == step for record in mine)

    def averaged(self, steps: int, reports: Reports) -> None:
        """What servers tell of rounds in which this client was."""
        self.board.told(steps, reports)

    def stepped(self, step: int, sums: StepSums) -> None:
        """A step is about to be committed; one whose gradients are not finite changes nothing, and is said."""
        ((loss, labels, tokens),) = sums.losses.values()
        seconds, self._since = time.perf_counter() - self._since, time.perf_counter()
        up, down = (sum(crossed[way] for crossed in sums.crossed.values()) for way in (0, 1))
        self.totals.add(int(tokens), seconds, up, down)
        if loss is None:
            fields: dict[str, Any] = {"client": self.name, "step": step + 1}
            logger.warning("its loss is not finite: no step for this client", extra={"fields": fields})
        train = self.board.station.recipe.train
        if (step + 1) % train.log_every and step + 1 < train.steps:
            return
        fields = {
            "client": self.name,
            "step": step + 1,
            "loss": loss / labels if loss is not None and labels else None,
            **self.totals.since_logged(),
            "lr": train.optimizer.lr * self.board.station.schedule(step),
            "grad_norm": sums.norm,
        }
        self.board.metrics.log("train", **fields)
        logger.info("step", extra={"fields": fields})

    def evaluated(self, step: int, losses: Mapping[int, Sequence[Any]]) -> None:
        """The client has told its loss over its held-out rows.

        Raises:
            DivergedError: it is not finite.
        """
        ((loss, labels, tokens),) = losses.values()
        if loss is None:
            raise DivergedError(f"{self.name}, step {step}: the evaluation loss is not finite; lower the learning rate")
        mean = loss / labels if labels else 0.0
        self.evaluations[step] = mean, labels
        self.board.metrics.log("eval", client=self.name, step=step, loss=mean, labels=int(labels), tokens=int(tokens))
        logger.info("evaluation", extra={"fields": {"client": self.name, "step": step, "loss": mean}})
        self._since = time.perf_counter()

    def finish(self, words: Mapping[str, Any], adapter: Tensors) -> None:
        """This lane has come to its end: write the client's adapter; with the last of them the summary."""
        self.words = dict(words)
        shared = goes_by_rounds(self.board.station.recipe)
        directory = self.board.station.options.directory
        export_of(self.board.station.plan, directory, adapter, 0 if shared else self.client)
        self.board.has_ended(self.client)
        self.board.done()


def _common(records: Sequence[LaneRecord]) -> dict[str, Any]:
    """How often every server has stepped what clients train in common; nothing where there is none."""
    steps: dict[str, int] = {}
    for role, said in (pair for record in records for pair in record.words.items()):
        if COMMON_STEPS in said:
            steps[role] = max(steps.get(role, 0), int(said[COMMON_STEPS]))
    return {COMMON_STEPS: steps} if steps else {}


def _mean(records: Sequence[LaneRecord], step: int) -> float | None:
    found = [record.evaluations[step] for record in records if step in record.evaluations]
    labels = sum(count for _, count in found)
    return sum(loss * count for loss, count in found) / labels if labels else None
