"""Rounds one after another, as a server drives them: clients drop out, come and go, are slow, and it is restarted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import pytest

from splitllm.policy.history import History, Report, from_json, recorded, to_json
from splitllm.policy.participation import POLICIES, Rules, TooFew, select
from splitllm.policy.rounds import Closed, Round, Void, Waiting, arrive, begin, decide, leave
from splitllm.policy.sampling import Draw

SLOW = "client-0"
FIVE = [f"client-{number}" for number in range(5)]
SECONDS = {f"client-{number}": 20.0 if number == 0 else 1.0 + number / 10 for number in range(10)}


@dataclass
class Server:
    """A clock that jumps. A client drops out of a round with a probability of `drops`, half-way to its end."""

    rules: Rules
    drops: float
    world: Random
    now: float = 0.0
    history: History = field(default_factory=History)

    def round(self, number: int, present: list[str]) -> Iterator[tuple[Round, Closed | Void]]:
        """Every attempt at a round, until one is closed."""
        for attempt in range(100):
            asked = select(self.rules, present, Draw(5, number, attempt), self.history)
            if isinstance(asked, TooFew):
                assert asked.redraw
                continue
            this, end = self._attempt(begin(self.rules, asked, Draw(5, number, attempt), self.now))
            yield this, end
            if isinstance(end, Closed):
                took = {client: Report(1.0, SECONDS[client]) for client in end.members}
                history = recorded(self.history, number, took, end.missing, self.now - this.began)
                self.history = from_json(json.loads(json.dumps(to_json(history))))
                return

    def _attempt(self, this: Round) -> tuple[Round, Closed | Void]:
        drops = {client: self.world.random() < self.drops for client in this.asked}
        events = sorted((self.now + SECONDS[client] / (2 if drops[client] else 1), client) for client in this.asked)
        decision = decide(this, self.now)
        while isinstance(decision, Waiting):
            assert self.now < decision.until
            at, client = events.pop(0) if events else (math.inf, "")
            self.now = min(at, decision.until)
            if at < decision.until:
                this = leave(this, [client]) if drops[client] else arrive(this, client, this.key, at)[0]
            decision = decide(this, self.now)
        return this, decision


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_with_drop_outs_and_a_slow_client_every_round_closes_in_time(policy: str) -> None:
    rules = Rules(policy, share=0.5, over=1.3, minimum=2, deadline=6.0)
    server = Server(rules, 0.2, Random(1))
    members: set[str] = set()
    for number in range(1, 101):
        attempts = list(server.round(number, list(SECONDS)))
        assert all(this.key == (number, this.key[1]) for this, _ in attempts)
        assert all(isinstance(end, Void) for _, end in attempts[:-1])
        last = attempts[-1][1]
        assert isinstance(last, Closed) and len(last.members) >= 2
        members |= set(last.members)
    assert members == set(SECONDS) - {SLOW}  # 20 s are more than the 6 s of the deadline
    assert server.now <= 110 * 6.0


@pytest.mark.parametrize("policy", ["random", "oort"])
def test_asking_more_than_are_wanted_saves_waiting_for_the_slow_one(policy: str) -> None:
    def seconds(over: float) -> float:
        server = Server(Rules(policy, count=4, over=over), 0.0, Random(1))
        for number in range(1, 51):
            assert all(isinstance(end, Closed) for _, end in server.round(number, list(SECONDS)))
        return server.now

    assert seconds(1.0) > 2 * seconds(1.3)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_server_that_is_restarted_decides_the_same_again(policy: str) -> None:
    def run(restart: bool) -> list[tuple[Round, Closed | Void]]:
        server, found = Server(Rules(policy, 0.5, over=1.3, minimum=3, deadline=6.0), 0.4, Random(2)), []
        for number in range(1, 31):
            found += server.round(number, list(SECONDS))
            if restart:
                server = Server(server.rules, server.drops, server.world, server.now, server.history)
        return found

    assert run(restart=True) == run(restart=False)
    assert policy == "all" or any(isinstance(end, Void) for _, end in run(restart=False))


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_who_joins_is_asked_from_the_next_round_on_and_who_leaves_is_not(policy: str) -> None:
    server = Server(Rules(policy, share=1.0), 0.0, Random(3))
    asked = [set(this.asked) for number in (1, 2) for this, _ in server.round(number, FIVE[:4])]
    asked += [set(this.asked) for this, _ in server.round(3, FIVE[1:])]
    assert asked == [set(FIVE[:4]), set(FIVE[:4]), set(FIVE[1:])]
