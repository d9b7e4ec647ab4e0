"""The processes of a server beside its rank 0: no door, no journal; they compute what they are told."""

from __future__ import annotations

import logging

from splitllm.deployment.station import Station
from splitllm.errors import RunInterrupted
from splitllm.model.shard import BUILDING
from splitllm.ranks.follower import LEADER, Follower
from splitllm.ranks.peers import Peers
from splitllm.recipe import spreads_weights
from splitllm.running.interrupt import StopSignal

logger = logging.getLogger(__name__)


def follow(station: Station) -> None:
    """Compute shares of the batches of rank 0, until it has ended: it is rank 0 that heeds Ctrl-C and SIGTERM.

    Raises:
        RankError: rank 0 is gone, or this rank could not compute what all compute in step.
        RunInterrupted: this process was asked to stop, too.
    """
    assert station.peers is not None
    with StopSignal() as stop:
        _follow(station, station.peers)
    if stop.asked:
        raise RunInterrupted("stopped; start it again with the same command to go on where the run is")


def _follow(station: Station, peers: Peers) -> None:
    values, _ = peers.receive(LEADER)
    if values["order"] == "end":  # before anything was loaded
        return
    with BUILDING:
        worker = station.rank_worker(peers, None if values["shard"] is None else tuple(values["shard"]))
    logger.info("follows", extra={"fields": {"rank": peers.rank}})
    Follower(worker, peers, in_step=spreads_weights(station.recipe)).follow()
    logger.info("complete")
