"""Split equals unsplit: every family, cut, number of tiers and place of the labels, against transformers and PEFT."""

from __future__ import annotations

import asyncio
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from splitllm import Shard
from splitllm.model.loading import quiet_transformers
from splitllm.model.trainable import Trainable
from splitllm.recipe import Recipe
from splitllm.roles.assembly import Roles
from tests.families import CONFIGS, LAYERS, checkpoint_folder, corpus, recipe, roles_of
from tests.grids import cases, fast_if, in_turn
from tests.unsplit import Unsplit

CUTS: list[list[int]] = [
    [],
    [1], [2], [4], [6],
    [1, 2], [2, 4], [1, 5], [3, 6],
    [1, 2, 3, 4], [1, 2, 4, 5], [2, 3, 4, 6], [1, 3, 4, 5],
]  # fmt: skip
FAMILIES, LABELS = list(CONFIGS), ["client", "cloud"]
Tensors = dict[str, torch.Tensor]


def adapter_of(roles: Roles) -> Tensors:
    state = {name.removeprefix("adapter/"): t for name, t in roles.state().items() if name.startswith("adapter/")}
    return {name: tensor.clone() for name, tensor in state.items()}


def one_step(roles: Roles, step: int = 0) -> float:
    async def together() -> float:
        reports = await asyncio.gather(*(client.step(step) for client in roles.clients))
        return sum(r.loss for r in reports) / sum(r.labels for r in reports)

    return asyncio.run(together())


def gradients(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> tuple[float, Tensors]:
    """Loss of step 0 and the clipped gradients that every role would step with; replicas must agree to the bit."""
    seen: dict[str, list[torch.Tensor]] = {}

    def note(self: Trainable, gradients: Tensors, factor: float, _rate: float) -> None:
        for name in self.parameters:
            seen.setdefault(name, []).append(gradients[name] * factor)

    with monkeypatch.context() as patch:
        patch.setattr(Trainable, "apply", note)
        loss = one_step(roles)
    assert all(torch.equal(first, other) for first, *others in seen.values() for other in others)
    return loss, {name: found[0] for name, found in seen.items()}


def with_moved_b(roles: Roles) -> Tensors:
    """B starts at zero, which hides A's gradient: move it, alike on all replicas."""
    adapter = adapter_of(roles)
    for number, name in enumerate(sorted(adapter)):
        if ".lora_B." in name:
            generator = torch.Generator().manual_seed(number)
            adapter[name] = torch.randn(adapter[name].shape, generator=generator).to(adapter[name].dtype) * 0.2
    roles.load({f"adapter/{name}": tensor for name, tensor in adapter.items()})
    return adapter


@cache
def _reference(family: str, dtype: str) -> tuple[Tensors, float, Tensors]:
    """The unsplit model's adapter, loss and gradients: the same for every cut and place of the labels."""
    wanted, rows = recipe(family, [], dtype=dtype), corpus(2)
    adapter = with_moved_b(roles_of(wanted, rows))
    return adapter, *Unsplit(wanted, rows, adapter).gradients(0)


def compare(wanted: Recipe, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = corpus(2)
    roles = roles_of(wanted, rows)
    expected = Unsplit(wanted, rows, with_moved_b(roles)).gradients(0)
    check(gradients(roles, monkeypatch), expected, tolerance)


def check(found: tuple[float, Tensors], wanted: tuple[float, Tensors], tolerance: float) -> None:
    (loss, got), (expected_loss, expected) = found, wanted
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert set(got) == set(expected)
    assert max(float(tensor.abs().max()) for tensor in expected.values()) > 1e-4
    for name, tensor in expected.items():
        error = float((got[name] - tensor).abs().max() / tensor.abs().max())
        assert error <= tolerance, f"{name} is off by {error:.1e}"


def grid() -> list[Any]:
    """Every family and every cut in fp64 with the labels in both places, in a quarter of the cells, and in fp32 in an
    eighth; the rest of fp64 is `system`, that of fp32 `soak`.
    """
    found = []
    for (row, family), (column, cuts), (place, labels) in product(*map(enumerate, (CONFIGS, CUTS, LABELS))):
        name, turn = f"{family}-{'-'.join(map(str, cuts)) or 'whole'}-{labels}", (row + column + 2 * place) % 8
        exact, rough = fast_if(turn % 4 == 0), fast_if(turn == 2, "soak")
        found.append(pytest.param(family, cuts, labels, "float64", 1e-12, id=f"fp64-{name}", marks=exact))
        found.append(pytest.param(family, cuts, labels, "float32", 1e-6, id=f"fp32-{name}", marks=rough))
    return found


@pytest.mark.parametrize(("family", "cuts", "labels", "dtype", "tolerance"), grid())
def test_loss_and_every_gradient_equal_the_unsplit_model(
    family: str, cuts: list[int], labels: str, dtype: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, *expected = _reference(family, dtype)
    roles = roles_of(recipe(family, cuts, labels, dtype=dtype), corpus(2))
    started = with_moved_b(roles)
    assert all(torch.equal(started[name], tensor) for name, tensor in adapter.items())
    check(gradients(roles, monkeypatch), (expected[0], expected[1]), tolerance)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("cuts", [[], [3], [2, 4], [1, 2, 4, 5]], ids=lambda cuts: "-".join(map(str, cuts)) or "whole")
def test_dropout_of_the_base_itself_draws_the_masks_of_the_unsplit_model(
    cuts: list[int], labels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = merged({"lora": {"dropout": 0.3}, "train": {"in_flight": 2}})
    compare(recipe("gpt2 with dropout", cuts, labels, **changes), 1e-12, monkeypatch)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "llama"])
def test_bf16_weights_with_fp32_adapters_follow_the_unsplit_model(family: str) -> None:
    wanted, rows = recipe(family, [2, 4], "client", dtype="bfloat16"), corpus(2)
    roles = roles_of(wanted, rows)
    unsplit = Unsplit(wanted, rows, adapter_of(roles))
    assert {tensor.dtype for tensor in adapter_of(roles).values()} == {torch.float32}
    for step in range(3):
        assert one_step(roles, step) == pytest.approx(unsplit.step(step), rel=5e-3)


VARIANTS: dict[str, dict[str, Any]] = {
    "in flight": {"train": {"in_flight": 2, "accumulate": 3}},
    "dropout": {"lora": {"dropout": 0.3}},
    "dropout in flight": {"lora": {"dropout": 0.3}, "train": {"in_flight": 2}},
    "recomputed": {"lora": {"dropout": 0.3}, "train": {"in_flight": 2, "activation_checkpointing": True}},
    "no clipping": {"train": {"clip_norm": None}},
    "tenant weights": {"train": {"loss_weights": "tenant"}},
    "rslora": {"lora": {"rslora": True}},
    "dora": {"lora": {"dora": True}},
    "all linear": {"lora": {"targets": "all-linear"}},
    "edge only": {"lora": {"tiers": ["edge"]}},
    "client only": {"lora": {"tiers": ["client"]}},
    "cloud only": {"lora": {"tiers": ["cloud"]}},
}


THREE = ["gpt2", "gemma3", "llama"]


def one_place_in_turn(family: str, variant: str, labels: str) -> bool:
    """Every variant once, and every family in both places."""
    place, number = LABELS.index(labels), list(VARIANTS).index(variant)
    return (number + THREE.index(family)) % 3 == 0 and in_turn(number, number // 2, place)


@pytest.mark.parametrize(("family", "variant", "labels"), cases(product(THREE, VARIANTS, LABELS), one_place_in_turn))
def test_every_variant_equals_the_unsplit_model(
    family: str, variant: str, labels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(recipe(family, [2, 4], labels, **merged(VARIANTS[variant])), 1e-12, monkeypatch)


def merged(changes: dict[str, Any]) -> dict[str, Any]:
    """The variant's changes over the settings that every recipe of these tests has."""
    train = {"steps": 5, "batch_size": 3, "accumulate": 2, "clip_norm": 0.5, "optimizer": {"lr": 1e-2}}
    lora = {"rank": 4, "alpha": 8}
    return {"train": {**train, **changes.get("train", {})}, "lora": {**lora, **changes.get("lora", {})}}


@pytest.mark.parametrize(
    ("family", "labels"),
    cases(product(CONFIGS, LABELS), lambda family, labels: FAMILIES.index(family) % 4 == 2 * LABELS.index(labels)),
)
def test_the_adapter_after_five_steps_equals_the_unsplit_one(family: str, labels: str) -> None:
    wanted, rows = recipe(family, [2, 4], labels), corpus(2)
    roles = roles_of(wanted, rows)
    unsplit = Unsplit(wanted, rows, adapter_of(roles))
    for step in range(5):
        assert one_step(roles, step) == pytest.approx(unsplit.step(step), rel=1e-11)
    for name, tensor in adapter_of(roles).items():
        torch.testing.assert_close(tensor, unsplit.parameters[name].detach(), rtol=0, atol=1e-11)


AT = [[1, 2], [2, 4], [1, 5], [3, 4]]


@pytest.mark.parametrize(
    ("family", "cuts"),
    cases(product(CONFIGS, AT), lambda family, cuts: in_turn(FAMILIES.index(family), AT.index(cuts))),
)
def test_shards_called_one_after_another_equal_the_unsplit_model_bit_for_bit(family: str, cuts: list[int]) -> None:
    folder = checkpoint_folder(family)
    with quiet_transformers():
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    for parameter in whole.parameters():
        parameter.data = parameter.data.clone()  # a mapped file is not aligned as fresh memory is
    bounds = zip([0, *cuts], [*cuts, None], strict=True)
    front, middle, head = (Shard.from_pretrained(folder, start, stop) for start, stop in bounds)
    ids_BS = torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(1))
    for shard in (front, middle, head):
        shard.model.requires_grad_(True)
    logits_BSV = head(middle(front(ids_BS)))
    expected_BSV = whole(input_ids=ids_BS, use_cache=False).logits
    assert torch.equal(logits_BSV, expected_BSV)
    logits_BSV.square().mean().backward()
    expected_BSV.square().mean().backward()
    theirs = dict(whole.named_parameters())
    names = [(name, p) for shard in (front, middle, head) for name, p in shard.model.named_parameters()]
    assert len(names) == len(theirs) - (1 if whole.config.tie_word_embeddings else 2) - norm_tensors(whole)
    for name, parameter in names:
        assert torch.equal(parameter.grad, theirs[name].grad), name


def norm_tensors(whole: Any) -> int:
    decoder = getattr(whole, whole.base_model_prefix)
    return len(list((decoder.ln_f if hasattr(decoder, "ln_f") else decoder.norm).parameters()))


def test_the_cuts_of_these_tests_are_real() -> None:
    assert all(cut <= LAYERS for cuts in CUTS for cut in cuts)
    assert {len(cuts) + 1 for cuts in CUTS} == {1, 2, 3, 5}
