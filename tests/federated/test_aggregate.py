"""Every rule of averaging against its closed form, multiplied out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitllm.errors import AverageError
from splitllm.federated.aggregate import RULES, error_of
from splitllm.federated.factors import LowRank, norm, stacked, truncated

WIDE, NARROW = 12, 9
EXACT = ("fedex", "flora", "ffa", "rolora")
DTYPES = {torch.float32: 1e-6, torch.float64: 1e-13}


def adapters(
    seed: int, ranks: Sequence[int], *, same: str = "", scale: float = 2.0, dtype: torch.dtype = torch.float64
) -> list[LowRank]:
    """Drawn; `same` names those of A and B that all have alike."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    found = [LowRank(drawn(rank, WIDE), drawn(NARROW, rank), scale) for rank in ranks]
    first = found[0]
    return [
        LowRank(first.a_RD if "A" in same else e.a_RD, first.b_OR if "B" in same else e.b_OR, e.scale) for e in found
    ]


def exact(parts: Sequence[LowRank], weights: Sequence[float]) -> torch.Tensor:
    return sum(
        (w * p.scale * p.b_OR.double() @ p.a_RD.double() for p, w in zip(parts, weights, strict=True)),
        start=torch.zeros(()),
    )


def shares(seed: int, count: int) -> list[float]:
    weights = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return (weights / weights.sum()).tolist()


@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 4), st.sampled_from(EXACT), st.sampled_from(list(DTYPES)))
def test_exact_rules_are(seed: int, clients: int, rank: int, rule: str, dtype: torch.dtype) -> None:
    same = {"ffa": "A", "rolora": "AB"[seed % 2]}.get(rule, "")
    parts, weights = adapters(seed, [rank] * clients, same=same, dtype=dtype), shares(seed, clients)
    wanted, average = exact(parts, weights), RULES[rule](parts, weights)
    for client in range(clients):
        error = float((average.of(client).product().double() - wanted).abs().max() / wanted.abs().max())
        assert error <= DTYPES[dtype]
    assert error_of(average, parts, weights) <= DTYPES[dtype]


@given(st.integers(0, 999), st.integers(2, 5), st.integers(1, 4))
def test_the_error_of_fedavg_is_what_it_is_said_to_be(seed: int, clients: int, rank: int) -> None:
    parts, weights = adapters(seed, [rank] * clients), shares(seed, clients)
    a_RD = sum(w * p.a_RD for p, w in zip(parts, weights, strict=True))
    b_OR = sum(w * p.b_OR for p, w in zip(parts, weights, strict=True))
    average, wanted = RULES["fedavg"](parts, weights), exact(parts, weights)
    product = parts[0].scale * b_OR @ a_RD
    torch.testing.assert_close(average.of(0).product(), product, rtol=1e-12, atol=1e-12)
    error = float((product - wanted).norm() / wanted.norm())
    assert error_of(average, parts, weights) == pytest.approx(error, rel=1e-9) and error > 0


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"flora"}))
def test_of_equal_adapters_the_average_is_that_adapter(rule: str) -> None:
    parts = adapters(3, [2] * 4, same="AB")
    average = RULES[rule](parts, [0.1, 0.2, 0.3, 0.4])
    torch.testing.assert_close(average.of(1).product(), parts[0].product(), rtol=1e-12, atol=1e-12)
    if rule not in ("flexlora", "hetlora"):
        assert average.adapters is not None and torch.equal(average.adapters[2].a_RD, parts[0].a_RD)


@given(st.integers(0, 999), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_flora_and_flexlora_take_any_ranks_and_scales(seed: int, ranks: list[int]) -> None:
    parts = [LowRank(p.a_RD, p.b_OR, 0.5 + i) for i, p in enumerate(adapters(seed, ranks))]
    weights = shares(seed, len(ranks))
    wanted = exact(parts, weights)
    torch.testing.assert_close(RULES["flora"](parts, weights).of(0).product(), wanted, rtol=1e-11, atol=1e-11)
    left, values, right = torch.linalg.svd(wanted)
    average = RULES["flexlora"](parts, weights)
    for client, rank in enumerate(ranks):
        best = left[:, :rank] * values[:rank] @ right[:rank]
        mine = average.adapters[client] if average.adapters is not None else None
        assert mine is not None and mine.rank == rank and mine.scale == parts[client].scale
        torch.testing.assert_close(mine.product(), best, rtol=1e-9, atol=1e-9)


def test_hetlora_pads_with_zeros_and_gives_each_its_own_rank_back() -> None:
    parts, weights = adapters(5, [1, 3, 2]), [0.5, 0.25, 0.25]
    a_RD = torch.zeros(3, WIDE, dtype=torch.float64)
    b_OR = torch.zeros(NARROW, 3, dtype=torch.float64)
    for part, weight in zip(parts, weights, strict=True):
        a_RD[: part.rank] += weight * part.a_RD
        b_OR[:, : part.rank] += weight * part.b_OR * part.scale
    average = RULES["hetlora"](parts, weights)
    for client, part in enumerate(parts):
        torch.testing.assert_close(average.of(client).product(), b_OR[:, : part.rank] @ a_RD[: part.rank])


@pytest.mark.parametrize(
    ("rule", "parts", "said"),
    [
        ("fedavg", adapters(0, [1, 2]), r"fedavg needs one rank, and there are \[1, 2\]; use flora, flexlora or"),
        ("fedex", [*adapters(0, [2]), *adapters(1, [2], scale=3.0)], r"needs one scale .* there are \[2.0, 3.0\]"),
        ("ffa", adapters(0, [2, 2]), "ffa needs the same A everywhere, which did not train; use fedex or flora"),
        ("ffa", adapters(0, [2, 2], same="B"), "ffa needs the same A"),
        ("rolora", adapters(0, [2, 2]), "rolora needs the same A or the same B everywhere"),
    ],
)
def test_what_a_rule_cannot_average_is_refused(rule: str, parts: list[LowRank], said: str) -> None:
    with pytest.raises(AverageError, match=said):
        RULES[rule](parts, [0.5, 0.5])


def test_nobody_counts_twice_and_the_last_is_not_lost() -> None:
    parts = [LowRank(torch.eye(4)[i : i + 1], torch.eye(4)[:, i : i + 1], 1.0) for i in range(4)]
    weights = [0.1, 0.2, 0.3, 0.4]
    for rule in ("fedex", "flora"):
        torch.testing.assert_close(RULES[rule](parts, weights).of(0).product(), torch.diag(torch.tensor(weights)))


@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 9))
def test_factors_are_measured_and_cut_without_being_multiplied_out(seed: int, rank: int, kept: int) -> None:
    part = stacked(adapters(seed, [rank, 2]), [0.3, -0.7])
    product = part.product()
    assert norm(part) == pytest.approx(float(product.norm()), rel=1e-10)
    left, values, right = torch.linalg.svd(product)
    small = truncated(part, kept, scale=4.0)
    assert small.rank == kept and small.scale == 4.0
    best = left[:, :kept] * values[:kept] @ right[:kept]
    torch.testing.assert_close(small.product(), best, rtol=1e-9, atol=1e-9)
