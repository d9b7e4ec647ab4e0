"""What Prometheus can ask a server: requests, queue, batches, step time, bytes, children, and what tenants cost."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from splitllm.recipe import host_and_port
from splitllm.roles.account import Account
from splitllm.roles.occupancy import Occupancy
from splitllm.wire.message import Message
from splitllm.wire.sessions import Reception, Sessions

logger = logging.getLogger(__name__)
STEP_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


@dataclass(frozen=True)
class Metered(Reception):
    """A reception that keeps an account.

    Attributes:
        account: of its tenants.
        occupancy: of its device.
        tenants: number of a client -> its name.
    """

    account: Account
    occupancy: Occupancy
    tenants: Mapping[int, str]


class Observer:
    """Counts what passes through one server.

    Args:
        batch_size: rows of a full micro-batch.
        lanes: numbers of the clients, where each has steps of its own; none elsewhere.

    Attributes:
        registry: all metrics of this server; nothing else of this process is in it.
    """

    def __init__(self, batch_size: int, lanes: Collection[int] = ()) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._batch_size, self._by_lanes = batch_size, bool(lanes)
        self._opened: dict[int, tuple[int, float]] = {}
        self._done = dict.fromkeys(lanes or [0], 0)
        own = self.registry
        self._requests = Counter("splitllm_requests", "Requests accepted", ["kind"], registry=own)
        self._queue = Gauge("splitllm_requests_under_way", "Requests accepted and not yet answered", registry=own)
        self._fill = Gauge(
            "splitllm_batch_fill_ratio", "Rows of the last micro-batch over train.batch_size", registry=own
        )
        self._step = Gauge("splitllm_step", "Optimiser steps done (of lanes: at least)", registry=own)
        self._seconds = Histogram("splitllm_step_seconds", "Time of a step", buckets=STEP_SECONDS, registry=own)
        ProcessCollector(registry=self.registry)

    def watched(self, reception: Reception) -> Reception:
        """The same reception; what it answers is counted, and the account that it may keep can be asked for."""
        if isinstance(reception, Metered):
            self.registry.register(_Tenants(reception.account, reception.tenants))
            self.registry.register(_Device(reception.occupancy))

        async def answer(message: Message) -> Message:
            self._came(message)
            try:
                with self._queue.track_inprogress():
                    reply = await reception.answer(message)
            finally:
                self._requests.labels(message.kind).inc()
            self._answered(message)
            return reply

        return dataclasses.replace(reception, answer=answer)

    def serve(self, address: str | None, sessions: Sessions) -> Callable[[], None]:
        """Answer Prometheus, in a thread, until the returned function is called.

        Args:
            address: HOST:PORT, None for nowhere.
            sessions: of the server.

        Raises:
            OSError: the address cannot be listened on.
        """
        self.registry.register(_Children(sessions))
        if address is None:
            return lambda: None
        host, port = host_and_port(address)
        try:
            server, thread = start_http_server(port, host, self.registry)
        except OSError as error:
            raise OSError(
                error.errno, f"cannot listen ({error.strerror}); give another port, or none", f"--metrics {address}"
            ) from error
        logger.info("metrics", extra={"fields": {"address": f"http://{address}/metrics"}})

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop

    def _came(self, message: Message) -> None:
        lane = self._lane(message)
        if message.kind == "open" and message.step != self._opened.get(lane, (-1, 0.0))[0]:
            self._opened[lane] = (message.step, time.perf_counter())
        if message.kind == "forward":
            self._fill.set(len(message.header["lengths"]) / self._batch_size)

    def _answered(self, message: Message) -> None:
        """The first child that may step has the whole step behind it; the others come at the same moment."""
        step, since = self._opened.get(lane := self._lane(message), (-1, 0.0))
        if message.kind == "close" and message.step == step:
            self._seconds.observe(time.perf_counter() - since)
            self._done[lane] = step + 1
            self._step.set(min(self._done.values()))
            del self._opened[lane]

    def _lane(self, message: Message) -> int:
        """Where clients go at their own pace each has steps of its own; elsewhere all have the same."""
        return message.micro_batch[1] if self._by_lanes else 0


class _Children(Collector):
    """What the sessions count themselves; a child that was started again begins at 0, as Prometheus expects."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def collect(self) -> Iterator[Metric]:
        """Called from the thread that answers Prometheus: reads copies only."""
        refused = CounterMetricFamily("splitllm_refused_connections", "Connections refused", labels=["reason"])
        for reason, count in list(self._sessions.refused.items()):
            refused.add_metric([reason], count)
        up = CounterMetricFamily("splitllm_received_bytes", "Bytes received from a child", labels=["child"])
        down = CounterMetricFamily("splitllm_sent_bytes", "Bytes sent to a child", labels=["child"])
        sessions = list(self._sessions.by_name.values())
        for session in sessions:
            up.add_metric([session.name], session.bytes_up)
            down.add_metric([session.name], session.bytes_down)
        connected = sum(session.connection is not None for session in sessions)
        yield from (refused, up, down)
        yield GaugeMetricFamily("splitllm_children_connected", "Children connected now", value=connected)


class _Tenants(Collector):
    """The account of a server, which starts anew with its process."""

    def __init__(self, account: Account, names: Mapping[int, str]) -> None:
        self._account, self._names = account, names

    def collect(self) -> Iterator[Metric]:
        """Called from the thread that answers Prometheus: reads copies only."""
        account = self._account
        tokens = CounterMetricFamily("splitllm_tenant_tokens", "Real tokens of a client", labels=["tenant"])
        seconds = CounterMetricFamily("splitllm_tenant_device_seconds", "Of the device", labels=["tenant"])
        waits = CounterMetricFamily("splitllm_tenant_wait_seconds", "Waited for the device", labels=["tenant"])
        longest = GaugeMetricFamily("splitllm_tenant_longest_wait_seconds", "The longest", labels=["tenant"])
        moved = CounterMetricFamily("splitllm_tenant_bytes", "Of its tensors, as coded", labels=["tenant", "direction"])
        for client, name in self._names.items():
            tokens.add_metric([name], account.tokens.get(client, 0))
            seconds.add_metric([name], account.seconds.get(client, 0.0))
            waited, most = account.waits.get(client, (0.0, 0.0))
            waits.add_metric([name], waited)
            longest.add_metric([name], most)
            moved.add_metric([name, "up"], account.up.get(client, 0))
            moved.add_metric([name, "down"], account.down.get(client, 0))
        yield from (tokens, seconds, waits, longest, moved)
        yield from self._batches()

    def _batches(self) -> Iterator[Metric]:
        account, (size, padding) = self._account, self._account.last
        positions = CounterMetricFamily("splitllm_batch_positions", "Positions of all batches", labels=["kind"])
        positions.add_metric(["padding"], account.padding)
        positions.add_metric(["token"], account.positions - account.padding)
        yield positions
        yield GaugeMetricFamily("splitllm_batch_longest_seconds", "Of one batch", value=account.longest)
        yield CounterMetricFamily("splitllm_batches", "Batches that the device ran", value=account.batches)
        yield CounterMetricFamily("splitllm_batch_micro_batches", "In all batches", value=account.micro_batches)
        yield GaugeMetricFamily("splitllm_batch_size", "Micro-batches of the last batch", value=size)
        yield GaugeMetricFamily("splitllm_batch_padding_ratio", "Padding in the last batch's positions", value=padding)


class _Device(Collector):
    """How the time of a server's device is spent since its process began to compute."""

    def __init__(self, occupancy: Occupancy) -> None:
        self._occupancy = occupancy

    def collect(self) -> Iterator[Metric]:
        """Called from the thread that answers Prometheus."""
        spent = CounterMetricFamily("splitllm_device_seconds", "By what it did", labels=["device", "work"])
        for (busy, waiting), seconds in self._occupancy.seconds().items():
            spent.add_metric(["busy" if busy else "idle", "waiting" if waiting else "none"], seconds)
        yield spent
