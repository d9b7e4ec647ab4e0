"""A real server and a real client that trains, while another peer with a right certificate sends what nobody should.

The recipe has two clients and leaves out who is away (`wire.absent: drop`): client-0 trains, and the attacker holds
client-1's certificate, now and then client-0's own. The relay before client-0 holds it back so that its steps are
spread over the whole attack. `FUZZ_FRAMES=20000` chooses how long the long version is.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from scripts.relay import Relay
from splitllm.deployment.bounds import allowed, limits
from splitllm.model.loading import Checkpoint
from splitllm.preflight import prepare
from splitllm.recipe import fingerprint
from tests.processes import ADAPTER
from tests.soak.hostile import Attack
from tests.soak.roles import Roles
from tests.soak.watch import Watch, watching
from tests.wire.corpus.record import run_in_process, write_two_tier_recipe
from tests.wire.serving import relayed

LONG = int(os.environ.get("FUZZ_FRAMES", "100000"))
MEMORY_GROWTH = 0.05
AFTER_WARM_UP, AT_THE_END = (0.1, 0.2), (0.9, 1.0)
SPARE_DESCRIPTORS = 4
DURING = 0.95  # of the steps are made during the attack, the others after it


@dataclass
class Outcome:
    """What happened."""

    attack: Attack
    watch: Watch
    marks: dict[int, int]
    seconds: float

    def __str__(self) -> str:
        attack = self.attack
        return (
            f"{attack.judged} frames judged of {attack.sent} sent in {self.seconds:.0f} s\n"
            f"ends of streams: {dict(attack.told)}; beside them: {dict(attack.opened)}\n"
            f"steps of the healthy client at each tenth: {list(self.marks.values())}\n{self.watch.table()}"
        )


def attack_on(roles: Roles, seed: int) -> Attack:
    recipe = roles.recipe
    plan = prepare(recipe, data=False)
    certificates = {name: roles.credentials(name) for name in ("client-0", "client-1")}
    hello = {"recipe": fingerprint(recipe), "model": Checkpoint(recipe.model.base).digest()}
    return Attack(roles.port["cloud"], certificates, hello, allowed(plan, "cloud"), limits(plan), seed)


async def spread(roles: Roles, attack: Attack, frames: int, relay: Relay, marks: dict[int, int]) -> None:
    """Hold the healthy client back while it is ahead of the attack, and mark the steps at each tenth."""
    while True:
        progress, step = attack.judged / frames, roles.step()
        marks.setdefault(int(10 * progress), step)
        if step / roles.recipe.train.steps > DURING * progress and not attack.joining:
            relay.cut(0.1)
        await asyncio.sleep(0.05)


async def join_now_and_then(roles: Roles, attack: Attack, frames: int, joins: int) -> None:
    """Of those who join, some kept the first state only, some those that all have, some more than there are."""
    rng = Random(3)
    for number in range(joins):
        while attack.judged < frames * (number + 0.5) / joins:
            await asyncio.sleep(0.05)
        recent = roles.step()
        kept = rng.choice(([0], [recent], [max(0, recent - 1), recent, recent + 1]))
        generation = [event["generation"] for event in roles.events("client-0") if event["event"] == "joined"][-1]
        states = [(min(step, roles.recipe.train.steps), str(generation) if step else "new") for step in kept]
        await attack.join_and_misbehave(number, states)
        assert await attack.healthy()


async def run_under_attack(roles: Roles, frames: int, joins: int) -> Outcome:
    """Both processes from start to end, and the attack between."""
    roles.start("cloud")
    async with relayed(roles.port["cloud"]) as relay:
        roles.via["cloud"] = relay.listen[1]
        roles.start("client-0")
        await roles.until(lambda: roles.step() >= 1, "the first step")
        attack, marks, started = attack_on(roles, 7), dict[int, int](), time.monotonic()
        with watching(roles.running["cloud"].pid, lambda: attack.judged / frames) as watch:
            holding = asyncio.create_task(spread(roles, attack, frames, relay, marks))
            async with asyncio.TaskGroup() as group:
                group.create_task(attack.until(frames))
                group.create_task(join_now_and_then(roles, attack, frames, joins))
            seconds = time.monotonic() - started
            await asyncio.sleep(2.5)  # what was left half open is closed
            assert await attack.healthy(), roles.tails()
        holding.cancel()
        assert await roles.ends("client-0") == {"client-0": 0}, roles.tails()
    await attack.say_goodbye()
    assert await roles.ends("cloud") == {"cloud": 0}, roles.tails()
    return Outcome(attack, watch, marks, seconds)


def assert_trained_undisturbed(roles: Roles) -> None:
    """Every step once, and the adapter of a run in which client-1 never was."""
    undisturbed = run_in_process(roles.recipe, absent=("client-1",))
    assert [record["step"] for record in roles.steps()] == list(range(1, roles.recipe.train.steps + 1))
    found = load_file(roles.folder / "cloud" / ADAPTER)
    assert found.keys() == undisturbed.adapter.keys()
    assert all(torch.equal(found[name], undisturbed.adapter[name]) for name in found)


def assert_logged_once_each(roles: Roles, attack: Attack) -> Counter[str]:
    """One line for each refusal, no error, and not a word on standard error; refusals by reason."""
    lines = [event for event in roles.events("cloud") if event["event"] == "refused"]
    told = Counter({status[9:]: n for status, n in attack.told.items() if status.startswith("refused: ")})
    logged = Counter(line["reason"] for line in lines)
    unheard = (
        attack.opened["odd calls"] + attack.opened["below gRPC"]
    )  # of these the attacker does not wait for the end
    assert sum(told.values()) <= sum(logged.values()) <= sum(told.values()) + unheard, (logged, told)
    assert "internal" not in logged
    assert all(line["text"].isprintable() and len(line["text"]) <= 600 for line in lines)
    assert [event for event in roles.events("cloud") if event["level"] == "error"] == []
    native = [line for line in roles.complaints("cloud").splitlines() if "Handshake failed" not in line]
    assert native == [] and roles.complaints("client-0") == ""
    return logged


@pytest.mark.parametrize(
    ("frames", "steps", "joins", "drop_after"),
    [
        pytest.param(1500, 60, 2, 0.5, marks=pytest.mark.system),
        pytest.param(LONG, max(60, LONG // 100), max(2, LONG // 4000), 5.0, marks=pytest.mark.soak),
    ],
)
def test_broken_frames_do_not_disturb_a_client_that_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], frames: int, steps: int, joins: int, drop_after: float
) -> None:
    roles = Roles(write_two_tier_recipe(tmp_path, steps, drop_after), tmp_path / "run")
    try:
        outcome = asyncio.run(run_under_attack(roles, frames, joins))
    finally:
        roles.close()
    first, last = (outcome.watch.rss_between(*part) for part in (AFTER_WARM_UP, AT_THE_END))
    with capsys.disabled():
        sys.stdout.write(f"\n{outcome}\nresident: {first:.1f} MiB after the warm-up, {last:.1f} MiB at the end\n")
    marks = list(outcome.marks.values())
    assert marks == sorted(marks) and len(set(marks)) > len(marks) / 2, "it trained on throughout"
    assert outcome.attack.hung == []
    logged = assert_logged_once_each(roles, outcome.attack)
    with capsys.disabled():
        sys.stdout.write(f"refused, by the server's log: {dict(logged)}\n")
    assert_trained_undisturbed(roles)
    assert last <= first * (1 + MEMORY_GROWTH)
    samples = outcome.watch.samples
    assert samples[-1].descriptors <= samples[0].descriptors + SPARE_DESCRIPTORS
