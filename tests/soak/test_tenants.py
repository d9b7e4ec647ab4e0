"""Sixty-four clients whose speeds differ twenty-fold, on one server over gRPC, each at its own pace.

The server is the real process, over mutual TLS. The clients are connections of one process without torch
(`tenants.py`), which replays what a real client sent. Measured in turn with and without the slowest quarter of them.
`python -m pytest -s -m soak tests/soak/test_tenants.py`
"""

from __future__ import annotations

import asyncio
import json
import signal
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import GPT2Config

from splitllm.data.batching import BatchStream
from splitllm.model.loading import Checkpoint
from splitllm.preflight import prepare
from splitllm.recipe import Recipe, fingerprint, role_bounds
from splitllm.roles.assembly import Assembly, schedule_of
from splitllm.roles.client import Client
from splitllm.wire.coding import Coding
from splitllm.wire.envelopes import request_values
from splitllm.wire.frames import Envelope, FrameType, to_frames
from splitllm.wire.link import Traffic
from splitllm.wire.message import Message
from tests.processes import ROOT, free_port
from tests.soak.roles import Roles
from tests.soak.test_connections import scrape
from tests.tiny import save_base

WORDS = 1997
SPEEDS = 20.0
SLOWEST = 4  # one client in so many is called a straggler
VARIANTS = 6
STARVE = 1.0
LONGEST = "longest_wait_seconds"
BUSY, SLOWER = 0.90, 0.05


@dataclass(frozen=True)
class Setting:
    """A measurement.

    Attributes:
        clients: how many.
        phases: one after another: what all would ask for, of what the server is able to do; whether the stragglers
            take part; seconds.
        settle: seconds before each that are not measured.
        base: blocks and width of the model, rows of a micro-batch.
    """

    clients: int
    phases: tuple[tuple[float, bool, float], ...]
    settle: float
    base: tuple[int, int] = (6, 192)
    rows: int = 4


def write_recipe(folder: Path, setting: Setting) -> Path:
    """Two tiers, the labels with the server, adapters of their own, everybody at its own pace."""
    layers, width = setting.base
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=4, n_positions=64, vocab_size=WORDS + 3, bos_token_id=1, eos_token_id=2
    )
    content = {
        "seed": 3,
        "model": {"base": str(save_base(folder / "base", config, words=WORDS)), "dropout": 0},
        "split": {"tiers": {"client": setting.clients, "edge": 1}, "cuts": [1], "labels": "cloud"},
        "lora": {"rank": 8, "alpha": 16, "targets": ["c_attn"], "adapters": "per_client"},
        "data": {"source": str(_rows(folder / "rows.jsonl", 60 * setting.clients)), "max_length": 48},
        "train": {"steps": 1_000_000, "batch_size": setting.rows, "optimizer": {"lr": 1e-4}, "threads": 1},
        "server": {"batching": "continuous", "tokens": 512, "starve": STARVE},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def _rows(path: Path, count: int) -> Path:
    """Of 16 to 40 words."""
    rows = []
    for number in range(count):
        words = [f"w{(number * 31 + place * 7) % WORDS}" for place in range(16 + number * 5 % 25)]
        rows.append({"prompt": " ".join(words[:-8]), "completion": " ".join(words[-8:])})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Recording:
    """A way up that answers as a server would, and remembers what it was asked."""

    def __init__(self) -> None:
        self.traffic, self.asked = Traffic(), list[Message]()

    async def request(self, message: Message) -> Message:
        self.asked.append(message)
        header: Mapping[str, Any] = {"loss": 7.0}
        tensors = {}
        if message.kind == "open":
            header = {"weights": dict.fromkeys(message.header["labels"], 0.01)}
        elif message.kind == "forward":
            tensors = {"gradient_TD": torch.full_like(message.tensors["hidden_TD"], 1e-4)}
        else:
            header = {"norm": 1.0, "factor": 1.0, "own": dict.fromkeys(message.header["own"], 1.0)}
        return replace(message, sender="edge", header=header, tensors=tensors)


def recorded(recipe: Recipe) -> list[Message]:
    """What a client asked in its first steps."""
    plan, base = prepare(recipe), Checkpoint(recipe.model.base)
    schedule = schedule_of(recipe.train.schedule, recipe.train.steps)
    bounds = role_bounds(recipe, base.config.num_hidden_layers)
    assembly = Assembly(recipe, plan.corpus, base, plan.modules, bounds, schedule)
    worker, link = assembly.worker(0, 0), Recording()
    stream = BatchStream(plan.corpus.train[0], recipe.train.batch_size, recipe.seed, 0)
    client = Client(
        "client-0", 0, worker, link, stream, [], whole=False, summed=(), accumulate=1, in_flight=1, schedule=schedule
    )

    async def run() -> None:
        for step in range(VARIANTS):
            await client.step(step)

    asyncio.run(run())
    return link.asked


def write_recordings(recipe: Recipe, folder: Path, names: Iterable[str]) -> None:
    """The same activations for every client, with its number, a file for each request."""
    asked = recorded(recipe)
    packed = [Coding().pack_request(message) for message in asked]
    asked.append(Message("evaluated", "client-0", (0, 0, 0), {"losses": {0: [0.0, 0, 0]}}))
    packed.append({})
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for message, tensors in zip(asked, packed, strict=True):
            own = replace(message, sender=name, header=_of_client(message.header, number, name))
            frames = to_frames(Envelope(FrameType.REQUEST, 1, request_values(own, []), tensors))
            assert len(frames) == 1, message.kind
            place = "" if message.kind == "evaluated" else f"-{message.step}"
            (folder / name / f"{message.kind}{place}.bin").write_bytes(frames[0])


def _of_client(header: Mapping[str, Any], number: int, name: str) -> dict[str, Any]:
    renamed = {0: number, "client-0": name}
    return {
        key: {renamed[k]: v for k, v in value.items()} if isinstance(value, dict) and value else value
        for key, value in header.items()
    }


@dataclass(frozen=True)
class Phase:
    """What was seen of one.

    Attributes:
        load: what all would ask for, of what the server is able to do.
        everybody: whether the stragglers took part.
        seconds: that it took.
        think: client -> seconds between answer and request.
        before, after: what the server told at its ends.
    """

    load: float
    everybody: bool
    seconds: float
    think: dict[str, float]
    before: dict[str, dict[str, float]]
    after: dict[str, dict[str, float]]

    def grown(self, name: str, label: str = "") -> float:
        """By how much a counter of the server grew."""
        return self.after.get(name, {}).get(label, 0.0) - self.before.get(name, {}).get(label, 0.0)

    @property
    def spent(self) -> dict[str, float]:
        """Seconds of the device by "busy,waiting" and so on."""
        name = "splitllm_device_seconds_total"
        return {label: self.grown(name, label) for label in self.after[name]}

    @property
    def busy(self) -> float:
        """Share of the time in which work waited."""
        spent = self.spent
        busy, idle = spent.get("busy,waiting", 0.0), spent.get("idle,waiting", 0.0)
        return busy / (busy + idle)


@dataclass(frozen=True)
class Outcome:
    """All that was seen.

    Attributes:
        phases: in their order.
        names: of the clients, the fastest first.
        stragglers: the slowest.
        waits: client -> (phase, seconds from a forward's departure to its answer).
        told: by the clients at the end.
        last: by the server at the end.
    """

    phases: list[Phase]
    names: tuple[str, ...]
    stragglers: frozenset[str]
    waits: dict[str, list[tuple[int, float]]]
    told: dict[str, Any]
    last: dict[str, dict[str, float]]

    @property
    def bound(self) -> float:
        """Of the policy for activations: every client has at most one request under way, and gradients never wait."""
        return STARVE + len(self.names) * self.last["splitllm_batch_longest_seconds"][""]

    @property
    def busy(self) -> float:
        """Share of the time in which work waited, over all phases."""
        states = ("busy,waiting", "idle,waiting")
        busy, idle = (sum(phase.spent.get(state, 0.0) for phase in self.phases) for state in states)
        return busy / (busy + idle)

    @property
    def longest(self) -> float:
        """Seconds that a micro-batch waited for the device at most, whosever it was."""
        return max(self.last[f"splitllm_tenant_{LONGEST}"].values())

    def steps(self, names: Iterable[str], phase: int) -> int:
        """Answers to these clients in a phase."""
        return sum(number == phase for name in names for number, _ in self.waits[name])

    def rate(self, *, everybody: bool) -> list[float]:
        """Steps a second of those who are no stragglers, in each phase of a kind in which there is time for all."""
        others, phases = set(self.names) - self.stragglers, enumerate(self.phases)
        found = [(n, phase) for n, phase in phases if phase.everybody == everybody and phase.load < 1]
        return [self.steps(others, n) / phase.seconds for n, phase in found]

    @property
    def kept(self) -> list[float]:
        """Of the others' throughput, how much is left beside the stragglers: each phase over its neighbours without."""
        with_all, without = self.rate(everybody=True), self.rate(everybody=False)
        pairs = zip(without, with_all, with_all[1:], strict=False)
        return [(one + other) / 2 / alone for alone, one, other in pairs]


async def measure(setting: Setting, roles: Roles, recordings: Path) -> Outcome:
    """The whole run, from the start of the server."""
    names = [name for name in roles.names if name != "edge"]
    speeds = {name: SPEEDS ** (-place / (len(names) - 1)) for place, name in enumerate(names)}
    stragglers = names[-(len(names) // SLOWEST) :]
    config = {
        "address": f"127.0.0.1:{roles.port['edge']}",
        "server": "edge",
        "certificates": str(roles.folder / "certificates"),
        "recorded": str(recordings),
        "clients": names,
        "speeds": speeds,
        "stragglers": stragglers,
        "hello": {"recipe": fingerprint(roles.recipe), "model": Checkpoint(roles.recipe.model.base).digest()},
        "batch_size": roles.recipe.train.batch_size,
        "phases": setting.phases,
        "settle": setting.settle,
    }
    path, metrics = roles.folder / "tenants.json", free_port()
    path.write_text(json.dumps(config), encoding="utf-8")
    roles.start("edge", "--metrics", f"127.0.0.1:{metrics}")
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "tests.soak.tenants", str(path))
    load = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=pipe, stdout=pipe, limit=1 << 24)
    phases, begun = list[Phase](), {}
    try:
        assert load.stdout is not None
        while line := await load.stdout.readline():
            said, seen = json.loads(line), await asyncio.to_thread(scrape, metrics)
            if "begins" in said:
                begun = said | {"seen": seen}
            elif "ends" in said:
                share, everybody, _ = setting.phases[said["ends"]]
                phases.append(Phase(share, everybody, said["seconds"], begun["think"], begun["seen"], seen))
            else:
                waits = {name: [tuple(wait) for wait in said["waits"].get(name, [])] for name in names}
                return Outcome(phases, tuple(names), frozenset(stragglers), waits, said, seen)
        raise AssertionError(f"the load ended before its time\n{roles.tails()}")
    finally:
        load.kill()
        await load.wait()


def shown(outcome: Outcome) -> str:
    """The figures, as tables."""
    lines = [
        "| load | clients | steps/s of the others | device busy while work waits | busy of all | computing | batches "
        "| micro-batches each |",
        "|---|---|---|---|---|---|---|---|",
        *(_phase_line(outcome, number) for number in range(len(outcome.phases))),
        "",
        "| client | thinks, s | steps | answer, s: median | longest | waited for the device, s: mean | longest |",
        "|---|---|---|---|---|---|---|",
    ]
    names = outcome.names
    lines += [_client_line(outcome, names[round(place * (len(names) - 1) / 7)]) for place in range(8)]
    longest = outcome.last["splitllm_batch_longest_seconds"][""]
    lines += [
        "",
        f"device busy while work waits, over all phases: {outcome.busy:.1%}",
        f"longest wait {outcome.longest:.2f} s, bound {outcome.bound:.1f} s, longest batch {longest:.3f} s",
        f"the others' throughput beside the stragglers, over that without: {[round(kept, 3) for kept in outcome.kept]}",
    ]
    return "\n".join(lines)


def _phase_line(outcome: Outcome, number: int) -> str:
    phase, others = outcome.phases[number], set(outcome.names) - outcome.stragglers
    spent, batches = phase.spent, phase.grown("splitllm_batches_total")
    busy = sum(seconds for label, seconds in spent.items() if label.startswith("busy"))
    computing = sum(phase.grown("splitllm_tenant_device_seconds_total", name) for name in outcome.names)
    cells = [
        f"{phase.load:g}",
        "all" if phase.everybody else "without the slowest",
        f"{outcome.steps(others, number) / phase.seconds:.2f}",
        f"{phase.busy:.1%}",
        f"{busy / sum(spent.values()):.1%}",
        f"{computing / sum(spent.values()):.1%}",
        f"{batches:.0f}",
        f"{phase.grown('splitllm_batch_micro_batches_total') / max(1.0, batches):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _client_line(outcome: Outcome, name: str) -> str:
    answers, steps = [seconds for _, seconds in outcome.waits[name]] or [0.0], outcome.told["steps"][name]
    waited, longest = (outcome.last[f"splitllm_tenant_{what}"][name] for what in ("wait_seconds_total", LONGEST))
    cells = [
        f"{outcome.phases[-1].think[name]:.2f}",
        f"{steps}",
        f"{statistics.median(answers):.2f}",
        f"{max(answers):.2f}",
    ]
    return f"| {' | '.join([name, *cells, f'{waited / max(1, steps):.2f}', f'{longest:.2f}'])} |"


def run(setting: Setting, folder: Path) -> Outcome:
    """Record, measure, stop."""
    path = write_recipe(folder, setting)
    roles = Roles(path, folder / "run")
    write_recordings(roles.recipe, folder / "recorded", [name for name in roles.names if name != "edge"])
    try:
        outcome = asyncio.run(measure(setting, roles, folder / "recorded"))
        roles.running["edge"].send_signal(signal.SIGTERM)
        roles.running["edge"].wait(60)
        return outcome
    finally:
        roles.close()


def assert_nobody_was_lost(outcome: Outcome) -> None:
    """Every request had its answer, nobody had to join again."""
    told = outcome.told
    assert told["joins"] == dict.fromkeys(outcome.names, 1)
    assert told["sent"] == told["answered"] and not told["modules"]
    assert outcome.last["splitllm_children_connected"][""] == len(outcome.names)
    assert outcome.last.get("splitllm_refused_connections_total", {}) == {}


def assert_the_device_works_and_nobody_starves(outcome: Outcome) -> None:
    """Busy while work waits, over all phases together; all waits under the bound, those of the slowest client too."""
    assert_nobody_was_lost(outcome)
    assert outcome.busy >= BUSY
    assert min(phase.busy for phase in outcome.phases if phase.load > 1) >= BUSY
    assert 0 < outcome.last[f"splitllm_tenant_{LONGEST}"][outcome.names[-1]] <= outcome.longest < outcome.bound


@pytest.mark.soak
def test_64_clients_at_their_own_pace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phases = ((3.0, True, 25.0), *((0.8, everybody, 25.0) for everybody in (True, False, True, False, True)))
    outcome = run(Setting(64, phases, settle=4.0), tmp_path)
    with capsys.disabled():
        sys.stdout.write(f"\n{shown(outcome)}\n")
    assert_the_device_works_and_nobody_starves(outcome)
    assert statistics.median(outcome.kept) >= 1 - SLOWER


@pytest.mark.system
def test_12_clients_at_their_own_pace(tmp_path: Path) -> None:
    outcome = run(Setting(12, ((3.0, True, 5.0), (0.8, False, 3.0)), settle=1.0), tmp_path)
    assert_the_device_works_and_nobody_starves(outcome)
    assert outcome.phases[1].grown("splitllm_batches_total") > 0
