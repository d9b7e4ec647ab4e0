"""Roles killed, paused and cut off at random moments: the run ends as if nothing had happened, bit for bit.

A run is drawn from its seed. Every client, edge and cloud is killed at least once; `FAULTS_SEEDS=3,17` chooses others.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from splitllm.recipe import load_recipe
from splitllm.train import train
from tests.faults.deployment import ADAPTER, Deployment, counted, deployed
from tests.tiny import write_recipe

STEPS = 120
COMMON = (f"train.steps={STEPS}", "train.eval_every=30", "wire.keepalive=1.0")
TREES = {
    "2-1-1": ("split.tiers={client: 2, edge: 1, cloud: 1}",),
    "4-2-1": ("split.tiers={client: 4, edge: 2, cloud: 1}", "split.labels=cloud"),
}
SEEDS = [int(seed) for seed in os.environ.get("FAULTS_SEEDS", ",".join(map(str, range(32)))).split(",")]
START_SECONDS = 8.0
HEADER = """\
| seed | tree | faults: kind, role, step + delay | steps rerun | seconds | adapter equal | steps counted |
|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        kind: kill, pause, or a command of the relay (cut, drop, refuse).
        roles: to whom; of the relay, the server before which it stands.
        step: that is logged at the top before it happens.
        delay: seconds after that.
        seconds: that it lasts.
    """

    kind: str
    roles: tuple[str, ...]
    step: int
    delay: float
    seconds: float

    def __str__(self) -> str:
        lasts = "" if self.kind == "drop" else f" for {self.seconds:.1f} s"
        return f"{self.kind} {'+'.join(self.roles)} at {self.step}+{self.delay:.2f} s{lasts}"


@dataclass(frozen=True)
class Reference:
    """The undisturbed run.

    Attributes:
        recipe: path.
        adapter: bytes of the file.
        lines: of its metrics.
        tokens: trained on.
    """

    recipe: Path
    adapter: bytes
    lines: list[tuple[object, ...]]
    tokens: int


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """Tree -> the run of `splitllm train` in one process."""
    folder = tmp_path_factory.mktemp("reference")
    path = write_recipe(folder)
    made: dict[str, Reference] = {}

    def of(tree: str) -> Reference:
        if tree not in made:
            summary = train(load_recipe(path, [*COMMON, *TREES[tree]]), folder / tree)
            adapter = (folder / tree / ADAPTER).read_bytes()
            made[tree] = Reference(path, adapter, counted(folder / tree), summary["train_tokens"])
        return made[tree]

    return of


def drawn(seed: int, names: list[str]) -> list[Fault]:
    """The faults of a run, in order: half of them while the one before is being recovered from."""
    draw = random.Random(seed)
    clients, servers = [n for n in names if n.startswith("client")], [n for n in names if not n.startswith("client")]
    edges = servers[:-1]
    wanted: list[tuple[str, tuple[str, ...], float]] = [
        ("kill", (draw.choice(clients),), draw.choice((0.0, 3.0)) * draw.random()),
        ("kill", (draw.choice(edges),), draw.choice((0.0, 3.0)) * draw.random()),
        ("kill", (servers[-1],), draw.choice((0.0, 3.0)) * draw.random()),
        ("pause", (draw.choice(names),), draw.uniform(0.1, 4.0)),
        (draw.choice(("cut", "refuse", "drop")), (draw.choice(servers),), draw.uniform(0.1, 4.0)),
    ]
    if draw.random() < 0.3:
        wanted.append(("kill", tuple(draw.sample(names, draw.randint(2, len(names)))), 2.0 * draw.random()))
    draw.shuffle(wanted)
    faults, step = [], 0
    for kind, roles, seconds in wanted:
        soon = draw.random() < 0.5
        step = step if soon else draw.randint(step, STEPS - 2)
        faults.append(Fault(kind, roles, step, START_SECONDS * draw.random() if soon else 0.2 * draw.random(), seconds))
    return faults


def inflict(deployment: Deployment, fault: Fault) -> None:
    """Let a fault happen in its moment, and end."""
    deployment.until_step(fault.step)
    time.sleep(fault.delay)
    if fault.kind in ("kill", "pause"):
        fault = Fault(fault.kind, tuple(n for n in fault.roles if n in deployment.running), 0, 0, fault.seconds)
    if fault.kind == "kill":
        deployment.kill(*fault.roles)
        time.sleep(fault.seconds)
        deployment.start(*fault.roles)
    elif fault.kind == "pause":
        deployment.pause(*fault.roles)
        time.sleep(fault.seconds)
        deployment.resume(*fault.roles)
    else:
        deployment.relays[fault.roles[0]].tell("drop" if fault.kind == "drop" else f"{fault.kind} {fault.seconds}")


def assert_undisturbed(deployment: Deployment, reference: Reference) -> None:
    """Nothing is lost, doubled or different."""
    assert deployment.lines() == reference.lines
    assert deployment.adapter() == reference.adapter
    assert deployment.summary()["train_tokens"] == reference.tokens
    last = [STEPS - 1, STEPS]
    assert deployment.journaled() == dict.fromkeys(deployment.names, last)


def one_run(folder: Path, reference: Reference, tree: str, faults: list[Fault]) -> list[object]:
    """A run with faults; returns the last cells of its line of the table."""
    started = time.monotonic()
    with deployed(reference.recipe, folder, *COMMON, *TREES[tree]) as deployment:
        deployment.start()
        for fault in faults:
            inflict(deployment, fault)
        ends = deployment.finish()
        assert ends == dict.fromkeys(deployment.names, 0), deployment.tails()
        assert_undisturbed(deployment, reference)
        equal = "yes" if deployment.adapter() == reference.adapter else "no"
        rerun = len(deployment.said(deployment.top, "step")) - STEPS
        steps = sum(event == "train" for event, *_ in deployment.lines())
        return [rerun, round(time.monotonic() - started), equal, steps]


@pytest.mark.system
def test_each_kind_of_fault_in_its_moment(reference: Callable[[str], Reference], tmp_path: Path) -> None:
    undisturbed = reference("2-1-1")
    with deployed(undisturbed.recipe, tmp_path / "run", *COMMON, *TREES["2-1-1"]) as deployment:
        deployment.start()
        deployment.until(lambda: bool(deployment.said("edge", "listening")), "the edge to listen")
        deployment.kill("edge")  # nothing is committed yet
        deployment.start("edge")
        deployment.until_step(20)
        ahead = kill_cloud_before_edge_commits(deployment)
        deployment.start("cloud")
        deployment.until_step(ahead + 20)
        deployment.kill("client-0", "edge", "cloud")
        deployment.start("cloud", "client-0", "edge")
        deployment.until_step(ahead + 40)
        deployment.relays["cloud"].tell("cut 3")  # longer than both keepalives
        deployment.until_step(ahead + 50)
        deployment.pause("client-1")
        time.sleep(3)
        deployment.resume("client-1")
        assert deployment.finish() == dict.fromkeys(deployment.names, 0)
        assert_undisturbed(deployment, undisturbed)
        assert len(deployment.said("cloud", "step")) > STEPS, "the step that only the cloud had committed is run again"
        assert ahead - 1 in {event["step"] for event in deployment.said("client-1", "joined")}


def kill_cloud_before_edge_commits(deployment: Deployment) -> int:
    """Kill the cloud when it has committed a step, and lose its answer to the edge; returns the step."""
    journal, relay = deployment.folder / "cloud" / "journal", deployment.relays["cloud"]
    for _ in range(30):
        before = deployment.committed("cloud")
        deployment.until(
            lambda before=before: any(journal.glob(".*.writing")) or deployment.committed("cloud") > before,  # type: ignore[misc]
            "a commit",
        )
        relay.process.send_signal(signal.SIGSTOP)
        time.sleep(0.3)  # whatever passed the relay before is dealt with
        if deployment.committed("cloud") == deployment.committed("edge") + 1:
            deployment.kill("cloud")
            relay.renew()
            return deployment.committed("cloud")
        relay.process.send_signal(signal.SIGCONT)
    raise AssertionError("the answer always arrived")


@pytest.mark.soak
def test_stopped_roles_go_on_and_those_lost_at_the_end_hear_of_it(
    reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    undisturbed = reference("2-1-1")
    with deployed(undisturbed.recipe, tmp_path / "run", *COMMON, *TREES["2-1-1"]) as deployment:
        deployment.start()
        for count, name in enumerate(("client-0", "edge", "cloud"), start=1):
            deployment.until_step(20 * count)
            deployment.running[name].process.send_signal(signal.SIGTERM)
            assert deployment.exit_of(name) == 1
            said = deployment.complaints(name)
            assert "start it again" in said and said.count("\n") == 1
            deployment.start(name)
        deployment.until_step(80)
        for directory, status, reason in (("client-1", 2, "another process runs client-1 here"), ("x", 1, "runs once")):
            second = deployment.spawn("client-1", directory=directory)
            deployment.until(lambda second=second: second.process.poll() is not None, "a refusal")  # type: ignore[misc]
            second.end()
            assert second.process.returncode == status, deployment.tails()
            assert reason in deployment.complaints(directory)
        deployment.until(lambda: bool(deployment.said("cloud", "done")), "the adapter")
        deployment.kill("edge", "client-1")
        deployment.start("edge", "client-1")
        assert deployment.finish() == dict.fromkeys(deployment.names, 0)
        assert_undisturbed(deployment, undisturbed)
        deployment.start()  # once more, all of them
        assert deployment.finish() == dict.fromkeys(deployment.names, 0)
        assert_undisturbed(deployment, undisturbed)


@pytest.mark.soak
def test_lost_journals_are_replaced_by_those_of_the_tier_or_missed(
    reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    undisturbed = reference("2-1-1")
    with deployed(undisturbed.recipe, tmp_path / "run", *COMMON, *TREES["2-1-1"]) as deployment:
        deployment.start()
        deployment.until_step(20)
        deployment.kill("client-1")
        shutil.rmtree(deployment.folder / "client-1")
        deployment.start("client-1")
        deployment.until_step(40)
        deployment.kill("cloud")
        journal = deployment.folder / "cloud" / "journal"
        journal.rename(journal.with_name("away"))
        deployment.start("cloud")
        ends = deployment.finish()
        assert ends == {"client-0": 1, "client-1": 1, "edge": 1, "cloud": 2}, deployment.tails()
        for name in deployment.names:
            assert "there is no step whose state every tier still has" in deployment.complaints(name)
            assert deployment.complaints(name).count("\n") == 1
        shutil.rmtree(journal)
        journal.with_name("away").rename(journal)
        foreign = deployment.spawn("cloud", more=("seed=4",))
        deployment.until(lambda: foreign.process.poll() is not None, "a refusal")
        foreign.end()
        assert foreign.process.returncode == 2
        assert "holds the journal of another run (recipe " in deployment.complaints("cloud")
        deployment.start()
        assert deployment.finish() == dict.fromkeys(deployment.names, 0)
        assert_undisturbed(deployment, undisturbed)


@pytest.mark.soak
def test_one_who_stays_away_is_left_out_and_rejoins_where_the_run_is(
    reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    drop = ("wire.absent=drop", "wire.drop_after=2", "train.steps=300")
    with deployed(reference("2-1-1").recipe, tmp_path / "run", *COMMON, *TREES["2-1-1"], *drop) as deployment:
        deployment.start()
        both = [2]
        deployment.until(lambda: [e["clients"] for e in deployment.said("cloud", "step")[-1:]] == both, "both")
        deployment.until_step(deployment.step() + 20)
        deployment.kill("client-1")
        gone = deployment.step()
        deployment.until_step(gone + 40)
        assert deployment.said("cloud", "step")[-1]["clients"] == 1
        deployment.start("client-1")
        assert deployment.finish() == dict.fromkeys(deployment.names, 0)
        steps = [line[1] for line in deployment.lines() if line[0] == "train"]
        assert steps == list(range(1, 301))
        joined = deployment.said("client-1", "joined")[-1]["step"]
        assert gone < joined < 300
        files = [deployment.folder / name / "journal" / "step-300.safetensors" for name in ("client-0", "client-1")]
        one, other = (load_file(file) for file in files)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.soak
@pytest.mark.parametrize("seed", SEEDS)
def test_random_faults_change_nothing(
    seed: int,
    reference: Callable[[str], Reference],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    tree = list(TREES)[seed % 4 == 3]
    with deployed(reference(tree).recipe, tmp_path / "names", *COMMON, *TREES[tree]) as deployment:
        faults = drawn(seed, deployment.names)
    row = one_run(tmp_path / "run", reference(tree), tree, faults)
    cells = [seed, tree, "; ".join(map(str, faults)), *row]
    with capsys.disabled():
        writer = request.config.get_terminal_writer()
        if seed == SEEDS[0]:
            writer.line(f"\n{HEADER}")
        writer.line(f"| {' | '.join(map(str, cells))} |")
