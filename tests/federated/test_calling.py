"""Whom an engine of rounds asks: every edge once a round, whatever becomes of the nodes before them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.errors import AverageError, PeerError
from splitllm.federated.calling import AGAIN_SECONDS, FAILURES, Calling


def test_all_nodes_are_asked_once_and_the_round_is_of_one_step() -> None:
    calling = Calling(2)
    assert calling.due([12, 11], 0.0) == [11, 12] and calling.due([11, 12], 0.0) == []
    assert calling.answered(12, "edge-1", 5) is None and not calling.complete
    assert calling.answered(11, "edge-0", 5) is None and calling.complete
    assert calling.agreed() == 5
    assert calling.due([11, 12], 0.0) == [11, 12]


def test_an_edge_that_was_restarted_gets_the_last_outcome_again() -> None:
    calling = Calling(1)
    calling.due([1], 0.0)
    calling.answered(1, "edge-0", 5)
    calling.agreed()
    assert calling.due([1], 0.0) == [1]
    assert "once more" in (calling.answered(1, "edge-0", 5) or "")
    assert not calling.complete and calling.due([1], 0.0) == [1]


def test_a_node_that_takes_the_place_of_another_is_that_edge() -> None:
    calling = Calling(2)
    calling.due([1, 2], 0.0)
    calling.answered(1, "edge-0", 5)
    calling.answered(2, "edge-1", 5)
    calling.agreed()
    calling.due([1, 2], 0.0)
    calling.failed(1, "is gone", 0.0)
    assert calling.due([2, 3], 0.0) == [3]
    assert calling.answered(3, "edge-0", 6) is None
    assert calling.names == {2: "edge-1", 3: "edge-0"}


def test_two_nodes_of_one_name_end_the_run() -> None:
    calling = Calling(2)
    calling.due([1, 2], 0.0)
    calling.answered(1, "edge-0", 5)
    with pytest.raises(AverageError, match=r"nodes 2 and 1 are both edge-0; give each SuperNode the name of its edge"):
        calling.answered(2, "edge-0", 5)


def test_edges_at_different_steps_end_the_run() -> None:
    for others, said in ((6, "edge-0: 5, edge-1: 6"), (None, "edge-0: 5, edge-1: the end")):
        calling = Calling(2)
        calling.due([1, 2], 0.0)
        calling.answered(1, "edge-0", 5)
        calling.answered(2, "edge-1", others)
        with pytest.raises(AverageError, match=said):
            calling.agreed()


def test_all_edges_through_is_the_end() -> None:
    calling = Calling(2)
    calling.due([1, 2], 0.0)
    calling.answered(1, "edge-0", None)
    calling.answered(2, "edge-1", None)
    assert calling.complete and calling.agreed() is None


def test_one_edge_more_takes_no_part() -> None:
    calling = Calling(1)
    calling.due([1, 2], 0.0)
    calling.answered(1, "edge-0", 5)
    assert "takes no part" in (calling.answered(2, "edge-1", 5) or "")
    assert calling.agreed() == 5 and calling.due([1, 2], 0.0) == [1]


def test_who_failed_is_asked_again_after_a_while() -> None:
    calling = Calling(1)
    calling.due([1], 10.0)
    assert "node 1 failed and is asked again: no door" in calling.failed(1, "no door", 10.0)
    assert calling.due([1], 10.0 + AGAIN_SECONDS / 2) == []
    assert calling.due([1], 10.0 + AGAIN_SECONDS) == [1]


def test_who_always_fails_is_left_alone_and_an_edge_that_always_fails_ends_the_run() -> None:
    stranger, known = Calling(2), Calling(2)
    known.due([1], 0.0)
    known.answered(1, "edge-0", 5)
    known.answers.clear()
    for now in range(FAILURES - 1):
        for calling in (stranger, known):
            assert calling.due([1], 2.0 * now) == [1]
            calling.failed(1, "no", 2.0 * now)
    assert "left alone" in stranger.failed(1, "no", 90.0) and stranger.due([1], 99.0) == []
    with pytest.raises(PeerError, match=r"edge-0 has failed 10 times in a row: no"):
        known.failed(1, "no", 90.0)


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["answer", "fail", "restart"])), max_size=60))
def test_every_round_has_each_edge_once_whatever_happens(events: list[tuple[int, str]]) -> None:
    calling, nodes, now, step, offered = Calling(3), [0, 1, 2], 0.0, 1, [1, 1, 1]
    asked: set[int] = set()
    for edge, event in [*events, *[(edge, "answer") for edge in (0, 1, 2)]]:
        now += 2 * AGAIN_SECONDS
        asked |= set(calling.due(nodes, now))
        node = nodes[edge]
        if node not in asked:
            continue
        asked.discard(node)
        if event == "answer":
            calling.answered(node, f"edge-{edge}", offered[edge])
        elif event == "fail":
            calling.failed(node, "for a test", now) if calling._failures.get(node, 0) < FAILURES - 2 else None
            asked |= {node} & calling._asked
        else:
            calling.failed(node, "is gone", now)
            nodes[edge] = max(nodes) + 1
        if calling.complete:
            assert set(calling.answers) == {"edge-0", "edge-1", "edge-2"}
            assert calling.agreed() == step
            step += 1
            offered = [step] * 3
