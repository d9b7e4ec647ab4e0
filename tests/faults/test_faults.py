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
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from splitllm.recipe import load_recipe, role_names, tier_of
from splitllm.train import train
from tests.faults.deployment import Deployment, counted, deployed
from tests.processes import ADAPTER
from tests.tiny import write_recipe

STEPS = 120
COMMON = (f"train.steps={STEPS}", "train.eval_every=30", "wire.keepalive=0.25")
TREES = {
    "2-1-1": ("split.tiers={client: 2, edge: 1, cloud: 1}",),
    "4-2-1": ("split.tiers={client: 4, edge: 2, cloud: 1}", "split.labels=cloud"),
}
SEEDS = [int(seed) for seed in os.environ.get("FAULTS_SEEDS", ",".join(map(str, range(32)))).split(",")]
MOMENTS = {"after": 0.3, "step": 0.2, "commit": 0.2, "end": 0.3}
"""When a fault happens, and how often of all that are drawn.

after: soon after the fault before, while roles start and the run is being recovered; step: anywhere in a step;
commit: as the role writes its journal; end: when the last step is done and the run is being completed.
"""
DELAYS = {"after": 2.0, "step": 0.3, "commit": 0.0, "end": 0.1}
MARGIN = 10  # steps before the end after which nothing waits any more
SUMMED = ("train_tokens", "eval_loss_before", "eval_loss_after", "trainable_parameters")
HEADER = """
| seed | tree | faults: kind, roles (what they did), when | steps rerun | seconds | adapter equal | steps counted |
|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        kind: kill, pause, or a command of the relay (cut, drop, refuse).
        roles: to whom; of the relay, the server before which it stands.
        moment: one of `MOMENTS`.
        step: that the top has logged before it happens.
        delay: seconds after that moment.
        seconds: that it lasts.
    """

    kind: str
    roles: tuple[str, ...]
    moment: str
    step: int
    delay: float
    seconds: float


@dataclass(frozen=True)
class Reference:
    """The undisturbed run.

    Attributes:
        recipe: path.
        adapter: bytes of the file.
        lines: of its metrics.
        summary: of the run.
    """

    recipe: Path
    adapter: bytes
    lines: list[tuple[object, ...]]
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def reference(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """Tree -> the run of `splitllm train` in one process."""
    folder = tmp_path_factory.mktemp("reference")
    made: dict[str, Reference] = {}

    def of(tree: str) -> Reference:
        if tree not in made:
            summary = train(load_recipe(recipe, [*COMMON, *TREES[tree]]), folder / tree)
            adapter = (folder / tree / ADAPTER).read_bytes()
            made[tree] = Reference(recipe, adapter, counted(folder / tree), summary)
        return made[tree]

    return of


def drawn(seed: int, names: list[str]) -> list[Fault]:
    """The faults of a run, in order."""
    draw = random.Random(seed)
    clients, servers = [n for n in names if n.startswith("client")], [n for n in names if not n.startswith("client")]
    some = draw.sample(names, draw.choice((1, draw.randint(2, len(names)))))
    kills = [(draw.choice(clients),), (draw.choice(servers[:-1]),), (servers[-1],), tuple(some)]
    wanted = [("kill", roles, draw.choice((0.0, 3.0)) * draw.random()) for roles in kills]
    wanted.append(("pause", (draw.choice(names),), draw.uniform(0.1, 4.0)))
    wanted.append((draw.choice(("cut", "refuse", "drop")), (draw.choice(servers),), draw.uniform(0.1, 4.0)))
    moments = draw.choices(list(MOMENTS), list(MOMENTS.values()), k=len(wanted))
    for index in range(3):  # a role of every tier dies while it lives
        moments[index] = draw.choice(("step", "commit")) if moments[index] == "end" else moments[index]
    order = sorted(range(len(wanted)), key=lambda index: (moments[index] == "end", draw.random()))
    steps = sorted(draw.randint(1, STEPS - MARGIN) for _ in wanted)
    faults = []
    for index, step in zip(order, steps, strict=True):
        kind, roles, seconds = wanted[index]
        moment = moments[index]
        due = {"after": 0, "end": STEPS}.get(moment, step)
        faults.append(Fault(kind, roles, moment, due, DELAYS[moment] * draw.random(), seconds))
    return faults


def inflict(deployment: Deployment, fault: Fault) -> str:
    """Let a fault happen in its moment, and end; returns what happened."""
    deployment.until_step(fault.step)
    if fault.moment == "commit":
        deployment.until_commit(fault.roles[0])
    latest = STEPS + 1 if fault.moment == "end" else STEPS - MARGIN
    deployment.sleep_until_step(latest, fault.delay)
    if fault.kind == "kill":
        deployment.kill(*fault.roles)
    elif fault.kind == "pause":
        deployment.pause(*fault.roles)
    else:
        deployment.relays[fault.roles[0]].tell("drop" if fault.kind == "drop" else f"{fault.kind} {fault.seconds}")
    step, lasts = deployment.step(), "" if fault.kind == "drop" else f" for {fault.seconds:.1f} s"
    doing = " + ".join(f"{name} ({deployment.doing(name)})" for name in fault.roles)
    if fault.kind in ("kill", "pause"):
        time.sleep(fault.seconds)
        (deployment.start if fault.kind == "kill" else deployment.resume)(*fault.roles)
    return f"{fault.kind} {doing} {fault.moment}, step {step}{lasts}"


def assert_undisturbed(deployment: Deployment, reference: Reference) -> None:
    """Nothing is lost, doubled or different."""
    assert deployment.lines() == reference.lines
    assert deployment.adapter() == reference.adapter
    found, wanted = deployment.summary(), reference.summary
    assert [found[key] for key in SUMMED] == [wanted[key] for key in SUMMED]
    last = [STEPS - 1, STEPS]
    assert deployment.journaled() == dict.fromkeys(deployment.names, last)
    assert deployment.applied() == {name: {STEPS} for name in deployment.names}
    for name in deployment.names:
        assert_no_step_is_left_out_or_twice_in_a_generation(deployment.events(name))


def assert_no_step_is_left_out_or_twice_in_a_generation(events: list[dict[str, Any]]) -> None:
    step = None
    for event in events:
        if event["event"] in ("joined", "generation begins"):
            step = event["step"]
        elif event["event"] == "step":
            assert step is not None and event["step"] == step + 1, event
            step = event["step"]


def one_run(folder: Path, reference: Reference, tree: str, faults: list[Fault]) -> list[object]:
    """A run with faults; returns the cells of its line of the table, after seed and tree."""
    started = time.monotonic()
    with deployed(reference.recipe, folder, *COMMON, *TREES[tree]) as deployment:
        deployment.start()
        happened = [inflict(deployment, fault) for fault in faults]
        ends = deployment.finish()
        assert ends == dict.fromkeys(deployment.names, 0), deployment.tails()
        assert_undisturbed(deployment, reference)
        assert {tier_of(deployment.recipe, name)[0] for name in deployment.killed} == {0, 1, 2}
        equal = "yes" if deployment.adapter() == reference.adapter else "no"
        rerun = len(deployment.said(deployment.top, "step")) - STEPS
        steps = sum(event == "train" for event, *_ in deployment.lines())
        return ["; ".join(happened), rerun, round(time.monotonic() - started), equal, steps]


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
        deployment.relays["cloud"].tell("cut 4")  # longer than both ends stay silent
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


@pytest.mark.system
@pytest.mark.parametrize("tree", TREES)
def test_a_run_that_diverges_ends_everywhere_in_one_line(tree: str, recipe: Path, tmp_path: Path) -> None:
    wild = ("train.optimizer.lr=1e30", "train.eval_every=null")
    with deployed(recipe, tmp_path / "run", *COMMON, *TREES[tree], *wild) as deployment:
        deployment.start()
        assert deployment.finish() == dict.fromkeys(deployment.names, 1), deployment.tails()
        for name in deployment.names:
            said = deployment.complaints(name)
            assert said.count("\n") == 1 and said.endswith("lower the learning rate\n"), (name, said)


@pytest.mark.soak
def test_stopped_roles_go_on_and_those_lost_at_the_end_hear_of_it(
    reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    undisturbed = reference("2-1-1")
    with deployed(undisturbed.recipe, tmp_path / "run", *COMMON, *TREES["2-1-1"]) as deployment:
        deployment.start()
        for count, name in enumerate(("client-0", "edge", "cloud"), start=1):
            deployment.until_step(20 * count)
            deployment.running[name].signal(signal.SIGTERM)
            assert deployment.exit_of(name) == 1
            said = deployment.complaints(name)
            assert "start it again" in said and said.count("\n") == 1
            deployment.start(name)
        deployment.until_step(80)
        deployment.pause("cloud")  # so that the run goes on until then
        refusals = (("client-1", 2, "another process uses this folder for client-1"), ("x", 1, "runs once"))
        for directory, status, reason in refusals:
            second = deployment.spawn("client-1", directory=directory)
            deployment.until(lambda second=second: second.status is not None, "a refusal")  # type: ignore[misc]
            assert second.status == status, deployment.tails()
            assert reason in deployment.complaints(directory)
        deployment.resume("cloud")
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
        deployment.until(lambda: foreign.status is not None, "a refusal")
        assert foreign.status == 2
        assert "holds the journal of another run (recipe " in deployment.complaints("cloud")
        deployment.start()
        assert deployment.finish() == dict.fromkeys(deployment.names, 0)
        assert_undisturbed(deployment, undisturbed)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["client-0", "edge", "cloud"])
def test_a_role_that_cannot_write_its_journal_ends_in_a_line_and_the_run_goes_on_later(
    name: str, reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    undisturbed = reference("2-1-1")
    with deployed(undisturbed.recipe, tmp_path / "run", *COMMON, *TREES["2-1-1"]) as deployment:
        deployment.start()
        deployment.until_step(20)
        journal = deployment.folder / name / "journal"
        journal.rename(journal.with_name("away"))
        above = deployment.names[deployment.names.index(name) + 1 :]
        ended = ["client-0"] if name == "client-0" else [other for other in deployment.names if other not in above]
        for other in ended:
            assert deployment.exit_of(other) == 1
            assert deployment.complaints(other).count("\n") == 1, deployment.complaints(other)
        assert str(journal) in deployment.complaints(name)
        shutil.rmtree(journal, ignore_errors=True)
        journal.with_name("away").rename(journal)
        deployment.start(*ended)
        assert deployment.finish() == dict.fromkeys(deployment.names, 0)
        assert_undisturbed(deployment, undisturbed)


@pytest.mark.soak
def test_who_is_lost_at_the_end_and_back_after_the_cloud_has_left_needs_it_once_more(
    reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    undisturbed = reference("2-1-1")
    with deployed(undisturbed.recipe, tmp_path / "run", *COMMON, *TREES["2-1-1"]) as deployment:
        deployment.start()
        deployment.until(lambda: bool(deployment.said("cloud", "done")), "the adapter", every=0.0)
        deployment.kill("edge")
        assert deployment.exit_of("cloud") == 0
        assert deployment.adapter() == undisturbed.adapter
        assert any("never said goodbye" in event["event"] for event in deployment.events("cloud"))
        deployment.start("edge")
        deployment.until(lambda: deployment.said("edge", "uplink")[-1]["state"] != "connected", "that nobody is there")
        deployment.start("cloud")
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
    recipe: Path,
    reference: Callable[[str], Reference],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    pytestconfig: pytest.Config,
) -> None:
    tree = list(TREES)[seed % 4 == 3]
    roles = role_names(load_recipe(recipe, TREES[tree]))
    faults = drawn(seed, [name for tier in roles.values() for name in tier])
    cells = [seed, tree, *one_run(tmp_path / "run", reference(tree), tree, faults)]
    with capsys.disabled():
        reporter = pytestconfig.pluginmanager.get_plugin("terminalreporter")
        assert reporter is not None
        reporter.ensure_newline()
        for line in [HEADER] * (seed == SEEDS[0]) + [f"| {' | '.join(map(str, cells))} |"]:
            reporter.write_line(line)
