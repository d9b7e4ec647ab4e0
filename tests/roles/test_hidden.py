"""Rounds in which the server sees sums alone: they are what they would be without, and nothing else crosses."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from splitllm.errors import PeerError, RecipeError
from splitllm.privacy.dp import epsilon
from splitllm.recipe import load_recipe
from splitllm.wire.link import LocalLink
from splitllm.wire.message import Message
from tests.grids import cases, each_fast
from tests.roles.test_rounds import LOCAL, TREES, Seen, apart, rounds_in, run, takes_part
from tests.roles.test_rounds import folder as folder
from tests.roles.test_rounds import seen as seen

EVERY = [LOCAL, "rounds.cloud_every=2", "rounds.weights=equal"]
MASKED = "rounds.secure={aggregate: true}"
TREE = {**TREES, "three tiers": [*TREES["three tiers"], "rounds.edge_every=1"]}


@pytest.fixture
def crossed(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """Everything that clients send of rounds, as it was."""
    found, request = list[Message](), LocalLink.request

    async def spy(self: LocalLink, message: Message) -> Message:
        if message.kind in ("secure", "round") and message.sender.startswith("client"):
            found.append(replace(message, tensors={n: t.clone() for n, t in message.tensors.items()}))
        return await request(self, message)

    monkeypatch.setattr(LocalLink, "request", spy)
    return found


@pytest.mark.parametrize(
    ("tree", "rule"),
    cases(
        product(["whole", "two tiers", "three tiers"], ["fedavg", "ffa", "rolora"]),
        lambda *case: case in [("two tiers", "rolora"), ("three tiers", "fedavg")],
    ),
)
def test_with_masks_the_average_is_the_same_to_the_grid_of_the_words(
    folder: Path, tmp_path: Path, tree: str, rule: str
) -> None:
    common = [*TREE[tree], *EVERY, f"rounds.rule={rule}"]
    plain = run(folder, tmp_path, *common, name="plain")
    masked = run(folder, tmp_path, *common, "rounds.secure={aggregate: true, bits: 64}", name="masked")
    assert apart(plain, masked) < 1e-6
    assert all(report["error"] is None for report in rounds_in(tmp_path / "masked") if report["level"] == 1)


def test_no_adapter_of_a_client_crosses_and_masked_words_tell_nothing(
    folder: Path, tmp_path: Path, crossed: list[Message]
) -> None:
    for name in ("one", "two"):
        run(folder, tmp_path, *TREE["two tiers"], *EVERY, MASKED, name=name)
    assert {name for message in crossed for name in message.tensors} == {"words"}
    words = [message.tensors["words"] for message in crossed if message.tensors]
    assert len(words) == 2 * 2 * 3
    first, second = words[:6], words[6:]
    for one, other in zip(first, second, strict=True):
        assert int((one == other).sum()) < 20, "the same run, and other words"
    every = np.concatenate([each.numpy().view(np.uint8) for each in words])
    counts = np.bincount(every, minlength=256)
    chi_square = float(((counts - every.size / 256) ** 2 / (every.size / 256)).sum())
    assert chi_square < 255 + 7 * math.sqrt(2 * 255)


def test_only_those_who_are_asked_add_anything(
    folder: Path, tmp_path: Path, seen: Seen, crossed: list[Message]
) -> None:
    some = "rounds.participation={policy: random, count: 2}"
    common = [*TREE["two tiers"], *EVERY, some, "train.batch_size=1"]
    masked = run(folder, tmp_path, *common, MASKED, name="masked")
    adding = {(m.step, m.sender) for m in crossed if "words" in m.tensors}
    by_step = takes_part(seen)
    assert adding == {(step + 1, f"client-{client}") for step in (1, 3) for client in by_step[step]}
    plain = run(folder, tmp_path, *common, name="plain")
    assert apart(plain, masked) < 1e-5


@pytest.mark.system
def test_with_changes_clipped_to_no_effect_and_no_noise_it_is_the_mean(folder: Path, tmp_path: Path) -> None:
    common = [*TREE["three tiers"], *EVERY]
    plain = run(folder, tmp_path, *common, name="plain")
    for masks in (MASKED, "rounds.secure={aggregate: false}"):
        private = run(folder, tmp_path, *common, masks, "rounds.privacy={clip: 100.0}", name=f"private {masks[-6:-1]}")
        assert apart(plain, private) < 1e-4, "the grid of 32 bits with a range of 100"


def test_no_client_moves_the_average_by_more_than_its_clipped_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [*TREE["two tiers"], *EVERY, "train.steps=2", "rounds.privacy={clip: 0.001}"]
    still = ["train.steps=1", "train.optimizer.lr=1e-30", "train.schedule={name: constant}"]
    start = run(folder, tmp_path, *TREES["two tiers"], *still, name="start")
    private = run(folder, tmp_path, *common)
    moved = [float((private[n] - start[n]).double().norm()) for n in private if ".h.0." in n or ".h.1." in n]
    assert 0 < math.hypot(*moved) <= 0.001 + 1e-6


def test_words_of_more_than_a_clipped_change_are_left_out_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [*TREE["two tiers"], *EVERY, "train.steps=2", "rounds.privacy={clip: 0.001}"]
    request = LocalLink.request

    async def loud(self: LocalLink, message: Message) -> Message:
        if message.kind == "round" and message.sender == "client-1":
            words = message.tensors["words"]
            message = replace(message, tensors={"words": torch.full_like(words, int(words.abs().max()))})
        return await request(self, message)

    still = ["train.steps=1", "train.optimizer.lr=1e-30", "train.schedule={name: constant}"]
    start = run(folder, tmp_path, *TREES["two tiers"], *still, name="start")
    monkeypatch.setattr(LocalLink, "request", loud)
    private = run(folder, tmp_path, *common)
    moved = [float((private[n] - start[n]).double().norm()) for n in private if ".h.0." in n or ".h.1." in n]
    assert 0 < math.hypot(*moved) <= 0.001 * 2 / 3 + 1e-6
    (report,) = rounds_in(tmp_path / "run")
    assert list(report["rejected"]) == ["client-1"] and report["updates"] == 2
    assert "where rounds.privacy.clip is 0.001" in report["rejected"]["client-1"]
    assert "cloud left client-1 out of its average" in capsys.readouterr().out
    void = run(folder, tmp_path, *common, "rounds.participation={minimum: 3}", name="void")
    assert rounds_in(tmp_path / "void")[0]["void"] == "2 usable updates, where rounds.participation.minimum is 3"
    assert apart({n: t for n, t in void.items() if ".h.0." in n}, {n: start[n] for n in void if ".h.0." in n}) < 1e-20


def test_noise_is_never_the_same_and_its_price_is_told(folder: Path, tmp_path: Path) -> None:
    noisy = [*TREE["two tiers"], *EVERY, MASKED, "rounds.privacy={clip: 0.5, noise: 2.0, delta: 0.001}"]
    one, two = (run(folder, tmp_path, *noisy, name=name) for name in ("one", "two"))
    assert apart(one, two) > 1e-3
    told = [report["epsilon"] for report in rounds_in(tmp_path / "one")]
    assert told == pytest.approx([epsilon(2.0, 1.0, rounds, 0.001) for rounds in (1, 2)])


def test_sampling_does_not_make_the_price_less(folder: Path, tmp_path: Path) -> None:
    some = "rounds.participation={policy: poisson, share: 0.5}"
    run(folder, tmp_path, *TREES["two tiers"], *EVERY, some, "rounds.privacy={clip: 0.5, noise: 2.0, delta: 0.001}")
    (last,) = [report["epsilon"] for report in rounds_in(tmp_path / "run")][-1:]
    assert last == pytest.approx(epsilon(2.0, 1.0, 2, 0.001))


def test_values_that_are_not_finite_add_no_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from splitllm.roles.rounds import Rounds

    words = Rounds.words

    def spoiled(self: Rounds, value: dict[str, torch.Tensor]) -> np.ndarray:
        if self.name == "client-1":
            value = {name: torch.full_like(tensor, math.nan) for name, tensor in value.items()}
        return words(self, value)

    monkeypatch.setattr(Rounds, "words", spoiled)
    adapter = run(folder, tmp_path, *TREE["two tiers"], *EVERY, MASKED)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in adapter.values())
    assert "adds no change to this round" in caplog.text


@pytest.mark.parametrize("where", each_fast("words", slow=["more", "said", "other"]))
def test_who_breaks_the_protocol_is_refused_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    request = LocalLink.request

    async def wrong(self: LocalLink, message: Message) -> Message:
        if message.sender == "client-1" and message.kind == "secure":
            said = message.header["said"]
            if where in ("words", "more") and message.tensors:
                words = message.tensors["words"]
                changed = words[:-1] if where == "words" else torch.cat([words, words])
                message = replace(message, tensors={"words": changed})
            elif where == "said":
                message = replace(message, header={**message.header, "said": {"nothing": 1}})
            elif where == "other":
                message = replace(message, header={**message.header, "said": {**said, "member": "client-0"}})
        return await request(self, message)

    monkeypatch.setattr(LocalLink, "request", wrong)
    with pytest.raises(PeerError):
        run(folder, tmp_path, *TREE["two tiers"], *EVERY, MASKED)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([MASKED, "rounds.rule=fedex"], "needs products of B and A"),
        ([MASKED, "rounds.rule=flexlora"], "needs products of B and A"),
        ([MASKED, "rounds.rule=median"], "which orders"),
        ([MASKED, "rounds.weights=tokens"], "use weights: equal"),
        ([MASKED, "rounds.moments=average"], "use moments: keep or reset"),
        ([MASKED, "rounds.reject_beyond=3.0"], "looks at each update"),
        ([MASKED, "lora.adapters=per_client"], "all clients sum the same tensors"),
        ([MASKED, "rounds.participation={policy: poisson, share: 0.5}"], "use random"),
        (["rounds.secure={aggregate: true, threshold: 1}"], "is not more than half of 3"),
        (["rounds.secure={threshold: 2}"], "need rounds.secure.aggregate: true"),
        (["rounds.privacy={noise: 1.0}"], "needs rounds.privacy.clip"),
        ([MASKED, "split.tiers={client: 1, cloud: 1}"], "one is its own sum"),
    ],
)
def test_what_a_sum_cannot_give_is_refused_with_the_reason(folder: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(folder / "recipe.yaml", [*TREE["two tiers"], *EVERY, *overrides])
    assert words in str(refused.value)
