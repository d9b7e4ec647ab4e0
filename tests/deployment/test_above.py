"""A welcome from the role above is checked before it is believed."""

from __future__ import annotations

import pytest

from splitllm.deployment.above import Told
from splitllm.errors import PeerError

WELCOME = {"shard": [0, 2], "batch_size": 4, "accumulate": 1, "in_flight": 3}


def test_a_welcome_that_says_nothing_of_use_is_one_line() -> None:
    assert Told.from_welcome({**WELCOME, "name": "edge"}, "edge", 4) == Told((0, 2), 4, 1, 3)
    wrong = [{**WELCOME, key: junk} for key in WELCOME for junk in (None, 0, -1, "2", [2], [3, 1], [0, 5], [0.0, 2])]
    for welcome in [{}, *wrong]:
        with pytest.raises(
            PeerError, match=r"^edge: its welcome names no blocks of the 4, or no sizes of batches: .*$"
        ):
            Told.from_welcome(welcome, "edge", 4)
