"""What the top writes of a run: metrics while it goes on, adapter and summary at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from splitllm.deployment.past import HELD
from splitllm.deployment.station import Station
from splitllm.errors import DivergedError
from splitllm.metrics import Metrics, replace_text
from splitllm.recipe import dump_recipe, what_leaves_in_a_deployment
from splitllm.roles.convening import Reports
from splitllm.roles.server import StepSums
from splitllm.roles.together import Tensors
from splitllm.running.outcome import RECIPE
from splitllm.running.places import ADAPTER
from splitllm.running.results import export, log_round, summary_of
from splitllm.running.state import Totals

logger = logging.getLogger(__name__)
MEMORY = {"rss_mib": "peak_rss_mib", "gpu_mib": "peak_gpu_mib"}
LOSSES = ("loss_before", "loss_after")


class Record:
    """The run as the top sees it.

    Args:
        station: of the top.
        metrics: writes `metrics.jsonl` and `summary.json`.

    Attributes:
        totals: sums over the run, as after the last committed step.
    """

    def __init__(self, station: Station, metrics: Metrics) -> None:
        self._station, self._metrics = station, metrics
        self.totals = Totals()
        self._since = time.perf_counter()
        directory = station.options.directory
        replace_text(directory / RECIPE, dump_recipe(station.recipe))

    def values(self) -> dict[str, Any]:
        """What the journal keeps; held-out losses are in the metrics."""
        return {name: value for name, value in asdict(self.totals).items() if name not in LOSSES}

    def put_back(self, values: Mapping[str, Any]) -> None:
        """Be as the journal tells."""
        self.totals = Totals(**values, **{name: getattr(self.totals, name) for name in LOSSES})

    def begun(self, step: int) -> bool:
        """A generation goes on from a step: what was written after it is dropped.

        Returns:
            Whether the evaluation of that step is written.
        """
        kept = self._metrics.truncate_to(step)
        self._since = time.perf_counter()
        evaluations = {record["step"]: record["loss"] for record in kept if record["event"] == "eval"}
        self.totals.loss_before = evaluations.get(0)
        self.totals.loss_after = evaluations.get(self._station.recipe.train.steps)
        return step in evaluations

    def stepped(self, step: int, sums: StepSums) -> None:
        """A step is about to be committed.

        Raises:
            DivergedError: its loss is not finite.
        """
        self._check(sums.losses, f"step {step + 1}: the loss")
        loss, labels, tokens = _added(sums.losses)
        seconds, self._since = time.perf_counter() - self._since, time.perf_counter()
        up = sum(crossed[0] for crossed in sums.crossed.values())
        down = sum(crossed[1] for crossed in sums.crossed.values())
        self.totals.add(int(tokens), seconds, up, down)
        train = self._station.recipe.train
        if (step + 1) % train.log_every and step + 1 < train.steps:
            return
        recent = self.totals.since_logged()
        rate = train.optimizer.lr * self._station.schedule(step)
        fields = {
            "step": step + 1,
            "loss": loss / labels if labels else 0.0,
            **recent,
            "lr": rate,
            "grad_norm": sums.norm,
        }
        self._metrics.log("train", **fields, clients=len(sums.losses))
        logger.info("step", extra={"fields": {**fields, "clients": len(sums.losses)}})

    def averaged(self, steps: int, reports: Reports) -> None:
        """A round was held after so many steps."""
        log_round(self._metrics, steps, reports)
        for report in reports:
            level = logging.WARNING if report["rejected"] else logging.INFO
            fields = {"server": report["role"], "tier": report["level"]}
            others = {key: value for key, value in report.items() if key not in ("role", "level")}
            logger.log(level, "round", extra={"fields": {"step": steps, **fields, **others}})

    def evaluated(self, step: int, losses: Mapping[int, Any]) -> None:
        """Every client has told its loss over its held-out rows.

        Raises:
            DivergedError: a loss is not finite, of clients that train together.
        """
        self._check(losses, f"step {step}: the evaluation loss")
        loss, labels, tokens = _added(losses)
        mean = loss / labels if labels else 0.0
        if step == 0:
            self.totals.loss_before = mean
        if step == self._station.recipe.train.steps:
            self.totals.loss_after = mean
        self._metrics.log("eval", step=step, loss=mean, tokens=int(tokens))
        logger.info("evaluation", extra={"fields": {"step": step, "loss": mean}})
        self._since = time.perf_counter()

    def _check(self, losses: Mapping[int, Any], what: str) -> None:
        """Where each client has its own adapter, one whose loss is not finite is only named."""
        spoiled = sorted(client for client, told in losses.items() if told[0] is None)
        if spoiled and self._station.recipe.lora.adapters != "per_client":
            raise DivergedError(f"{what} is not finite; lower the learning rate")
        if spoiled:
            logger.warning("not finite", extra={"fields": {"what": what, "clients": spoiled}})

    def finish(self, words: Mapping[str, Any], adapter: Tensors) -> None:
        """Every role has come to the end: write the adapter and the summary, unless that was done already."""
        directory = self._station.options.directory
        if (directory / ADAPTER).exists() and (directory / "summary.json").exists():
            return
        export(self._station.plan, directory, adapter)
        leaves = what_leaves_in_a_deployment(self._station.recipe)
        numbers = sum(tensor.numel() for tensor in adapter.values())
        self._metrics.write_summary(summary_of(self.totals, numbers, memory_of(words), leaves))
        logger.info("done", extra={"fields": {"adapter": str(directory / ADAPTER), "loss": self.totals.loss_after}})


def memory_of(words: Mapping[str, Any]) -> dict[str, Any]:
    """What every role says of its memory in its closing words, by their keys in the summary."""
    peaks = {key: {role: said[word] for role, said in words.items() if word in said} for word, key in MEMORY.items()}
    return {**peaks, "held_mib": {role: _held(said) for role, said in words.items()}}


def _held(said: Mapping[str, float]) -> dict[str, float]:
    return {word.removeprefix(HELD): value for word, value in said.items() if word.startswith(HELD)}


def _added(losses: Mapping[int, Any]) -> tuple[float, float, float]:
    """Loss, labels and tokens over all clients whose loss is finite, in the order of their numbers."""
    sums = [losses[client] for client in sorted(losses) if losses[client][0] is not None]
    return sum(s[0] for s in sums), sum(s[1] for s in sums), sum(s[2] for s in sums)
