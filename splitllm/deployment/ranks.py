"""The processes of a server beside its rank 0: no door, no journal; they compute what they are told."""

from __future__ import annotations

import logging

from splitllm.deployment.station import Station
from splitllm.model.shard import BUILDING
from splitllm.ranks.follower import LEADER, Follower

logger = logging.getLogger(__name__)


def follow(station: Station) -> None:
    """Compute shares of the batches of rank 0, until it has ended.

    Raises:
        RankError: rank 0 is gone.
    """
    assert station.peers is not None
    values, _ = station.peers.receive(LEADER)
    if values["order"] == "end":  # before anything was loaded
        return
    with BUILDING:
        worker = station.worker(None if values["shard"] is None else tuple(values["shard"]))
    logger.info("follows", extra={"fields": {"rank": station.peers.rank}})
    Follower(worker, station.peers).follow()
    logger.info("complete")
