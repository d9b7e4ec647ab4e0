"""Every row goes to exactly one client, nobody is left without, and the same seed deals the same way."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.data.partition import partition
from splitllm.data.rows import Row
from splitllm.errors import DataError
from splitllm.recipe import PartitionRecipe

BY = {
    "iid": PartitionRecipe(by="iid"),
    "dirichlet": PartitionRecipe(by="dirichlet", field="kind", alpha=0.3),
    "field": PartitionRecipe(by="field", field="kind"),
    "file": PartitionRecipe(by="file"),
    "own": PartitionRecipe(by="own"),
}


def rows_of(kinds: list[object], source: str = "x.jsonl") -> list[Row]:
    return [Row({"kind": kind}, source, line) for line, kind in enumerate(kinds, start=1)]


def refused(rows: list[Row], by: str, clients: int) -> str:
    with pytest.raises(DataError) as caught:
        partition(rows, BY[by], clients=clients, seed=0)
    return str(caught.value)


def check(dealt: list[list[int]], rows: int, clients: int) -> None:
    assert len(dealt) == clients
    assert all(dealt)
    assert sorted(number for part in dealt for number in part) == list(range(rows))
    assert all(part == sorted(part) for part in dealt)


@given(st.data(), st.integers(1, 8), st.integers(0, 2**63 - 1), st.sampled_from([0.001, 0.3, 1.0, 1000.0]))
def test_iid_and_dirichlet_cover_all_once(data, clients, seed, alpha):
    rows = rows_of(data.draw(st.lists(st.sampled_from("abc"), min_size=clients, max_size=60)))
    for recipe in (BY["iid"], PartitionRecipe(by="dirichlet", field="kind", alpha=alpha)):
        dealt = partition(rows, recipe, clients=clients, seed=seed)
        check(dealt, len(rows), clients)
        assert dealt == partition(rows, recipe, clients=clients, seed=seed)


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=80), st.data())
def test_field_keeps_values_whole(kinds, data):
    clients = data.draw(st.integers(1, len(set(kinds))))
    dealt = partition(rows_of(kinds), BY["field"], clients=clients, seed=0)
    check(dealt, len(kinds), clients)
    owners = Counter(kind for part in dealt for kind in {kinds[number] for number in part})
    assert set(owners.values()) == {1}


def test_iid_sizes_differ_by_at_most_one_and_seeds_differ():
    rows = rows_of(list(range(11)))
    dealt = partition(rows, BY["iid"], clients=3, seed=0)
    assert sorted(map(len, dealt)) == [3, 4, 4]
    assert dealt != partition(rows, BY["iid"], clients=3, seed=1)


def test_field_is_balanced_largest_value_first():
    kinds = ["a"] * 5 + ["b"] * 4 + ["c"] * 3 + ["d"] * 2
    dealt = partition(rows_of(kinds), BY["field"], clients=2, seed=0)
    assert [sorted({kinds[number] for number in part}) for part in dealt] == [["a", "d"], ["b", "c"]]


def test_a_small_alpha_skews_and_a_large_one_does_not():
    kinds = ["a", "b", "c", "d"] * 250

    def largest_share(alpha: float) -> float:
        recipe = PartitionRecipe(by="dirichlet", field="kind", alpha=alpha)
        dealt = partition(rows_of(kinds), recipe, clients=4, seed=0)
        return max(Counter(kinds[n] for n in part).most_common(1)[0][1] / len(part) for part in dealt)

    assert largest_share(0.05) > 0.8
    assert largest_share(1000.0) < 0.35


def test_a_file_a_client():
    rows = rows_of([1, 2], "b.jsonl") + rows_of([3], "a.jsonl") + rows_of([4, 5, 6], "c.jsonl")
    assert partition(rows, BY["file"], clients=3, seed=5) == [[0, 1], [2], [3, 4, 5]]
    assert "has 3 with usable rows for 2 clients" in refused(rows, "file", 2)


def test_own_rows_are_all_the_one_clients():
    assert partition(rows_of(["a", "b", "c"]), BY["own"], clients=1, seed=0) == [[0, 1, 2]]


def test_own_rows_cannot_be_dealt_to_several():
    assert refused(rows_of(["a", "b", "c"]), "own", 2) == (
        "data.partition.by: own needs one `splitllm client` per device; here every client's rows are dealt from "
        "data.source: use iid, dirichlet, field or file"
    )


@pytest.mark.parametrize("by", ["iid", "dirichlet", "field", "file"])
def test_more_clients_than_rows_is_refused_with_both_numbers(by):
    message = refused(rows_of(["a", "b", "c"]), by, 4)
    assert "4 clients" in message
    assert "3 usable training rows" in message


def test_fewer_values_than_clients_is_refused_with_both_numbers():
    assert "2 distinct values for 3 clients" in refused(rows_of(["a", "b", "a", "a"]), "field", 3)


@pytest.mark.parametrize("by", ["dirichlet", "field"])
def test_a_row_without_the_field_is_named(by):
    rows = [*rows_of(["a", "b"]), Row({"sort": "c"}, "y.jsonl", 9)]
    assert refused(rows, by, 2).startswith("y.jsonl:9: no field 'kind', named by data.partition.field")
    assert refused(rows_of(["a", ["b"]]), by, 2).startswith("x.jsonl:2: field 'kind' is a list")


def test_values_that_are_not_text_count_as_values():
    dealt = partition(rows_of([1, True, 1, 2.5, True, 2.5]), BY["field"], clients=3, seed=0)
    assert sorted(dealt) == [[0, 2], [1, 4], [3, 5]]
