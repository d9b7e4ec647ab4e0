"""Broken frames before sessions, assembler and what the recipe allows, without sockets: refused, or answered."""

from __future__ import annotations

import asyncio
import logging
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from splitllm.deployment.bounds import allowed, limits
from splitllm.preflight import prepare
from splitllm.recipe import load_recipe
from splitllm.roles.checks import Allowed
from splitllm.wire.assembling import Limits
from splitllm.wire.coding import Coding
from splitllm.wire.sessions import Reception, Sessions
from splitllm.wire.stream import Disconnected, Refused
from tests.wire.corpus.record import write_two_tier_recipe
from tests.wire.mutations import changed, corpus, mutated
from tests.wire.serving import admit, echo

FRAMES = 40
ENDS = (Refused, Disconnected)


class Frames:
    """A stream on which a peer says these frames and nothing more."""

    def __init__(self, frames: list[bytes]) -> None:
        self.frames, self.answers = frames[::-1], list[bytes]()

    async def read(self) -> bytes | None:
        await asyncio.sleep(0)
        return self.frames.pop() if self.frames else None

    async def write(self, frame: bytes) -> None:
        await asyncio.sleep(0)
        self.answers.append(frame)


@cache
def bounds() -> tuple[Allowed, Limits]:
    with TemporaryDirectory() as folder:
        plan = prepare(load_recipe(write_two_tier_recipe(Path(folder), steps=50), ()), data=False)
        return allowed(plan, "cloud"), limits(plan)


@cache
def recorded() -> dict[str, bytes]:
    frames = corpus()
    return {**frames, "hello": changed(frames["hello"], recipe="right", model="right")}


def some_frames(rng: Random) -> list[bytes]:
    """Mostly a right hello, then right frames in any order, with broken ones between them."""
    frames, names = recorded(), list(recorded())
    found = [frames["hello"]] if rng.random() < 0.9 else mutated(rng, frames["hello"])
    for number in range(rng.choice((1, 2, 5, 30))):
        frame = frames[rng.choice(names)]
        if rng.random() < 0.5 and frame not in (frames["hello"], frames["goodbye"]):
            frame = changed(frame, number + 1, received=[number])
        found += mutated(rng, frame) if rng.random() < 0.3 else [frame]
    return found


async def assert_only_refusals(seed: int, frames: int) -> int:
    """Streams of one child, one after another or at once; how many were refused."""
    rng, fatal = Random(seed), list[BaseException]()
    check, most = bounds()
    sessions = Sessions(
        Reception(
            admit=admit,
            answer=echo,
            check=check.check,
            room=lambda name: 3,
            coding=Coding,
            limits=most,
            back=lambda name: None,
            away=lambda name: None,
            left=lambda name: None,
            fatal=fatal.append,
        )
    )
    refused = 0
    while frames > 0:
        streams = [Frames(some_frames(rng)) for _ in range(rng.choice((1, 1, 1, 3)))]
        frames -= sum(len(stream.frames) for stream in streams)
        ends = await asyncio.wait_for(
            asyncio.gather(*(sessions.serve(stream, "client-1") for stream in streams), return_exceptions=True), 10
        )
        for end in ends:
            assert end is None or isinstance(end, ENDS), repr(end)
            assert not isinstance(end, Refused) or end.reason != "internal", end
            refused += isinstance(end, Refused)
        for session in sessions.by_name.values():
            assert len(session.answers) <= session.most and session.connection is None
    assert fatal == []
    return refused


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def _no_error_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


@pytest.mark.parametrize("count", [60, pytest.param(2_500, marks=pytest.mark.soak)])
def test_broken_frames_are_refused_and_nothing_else_happens(count: int) -> None:
    @examples(count)
    @example(0)
    @given(st.integers(0, 1 << 64))
    def fuzz(seed: int) -> None:
        asyncio.run(assert_only_refusals(seed, FRAMES))

    fuzz()
