"""Random numbers are a function of what they are for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from splitllm import Shard
from splitllm.model.loading import Checkpoint
from splitllm.model.lora import add_lora, matched_modules
from splitllm.model.randomness import DropoutKey, MicroBatchId, key_dropout, seed_of
from splitllm.recipe import LoraRecipe
from tests.families import checkpoint_folder

FIRST, SECOND = MicroBatchId(0, 0, 0), MicroBatchId(0, 1, 0)


@pytest.mark.parametrize(
    ("key", "seed"),
    [
        (("dropout", 0, 0, 0, 0, -1), 3160006091980463334),
        (("dropout", 3, 17, 2, 1, 11), 6386435152796489158),
        (("lora_A", 0, "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"), 5428440226547506693),
        ((), 8238016292129134938),
    ],
)
def test_seeds_are_the_same_on_every_machine_and_version(key: tuple[int | str, ...], seed: int) -> None:
    assert seed_of(*key) == seed


KEYS = st.lists(
    st.integers() | st.text(st.characters(codec="utf-8", exclude_characters="\x1f"), min_size=1), min_size=1
).map(tuple)


@given(KEYS, KEYS)
def test_seeds_are_63_bits_and_differ_with_the_key(key: tuple[int | str, ...], other: tuple[int | str, ...]) -> None:
    assert 0 <= seed_of(*key) < 2**63
    assert (seed_of(*key) == seed_of(*other)) == (list(map(str, key)) == list(map(str, other)))


def test_micro_batches_are_ordered_by_step_client_and_number() -> None:
    ids = [MicroBatchId(1, 0, 0), MicroBatchId(0, 1, 0), MicroBatchId(0, 0, 2), MicroBatchId(0, 0, 10)]
    assert sorted(ids) == [ids[2], ids[3], ids[1], ids[0]]


def masks(key: DropoutKey, micro_batch: MicroBatchId | None, *, layer: int = 0, train: bool = True) -> torch.Tensor:
    module = nn.Dropout(0.5).train(train)
    key_dropout(module, layer, key)
    key.micro_batch = micro_batch
    out: torch.Tensor = module(torch.ones(64))
    return out


def test_a_mask_is_keyed_by_seed_micro_batch_and_layer() -> None:
    first = masks(DropoutKey(5), FIRST)
    torch.rand(7)
    assert torch.equal(masks(DropoutKey(5), FIRST), first)
    others = [masks(DropoutKey(6), FIRST), masks(DropoutKey(5), SECOND), masks(DropoutKey(5), FIRST, layer=1)]
    assert not any(torch.equal(other, first) for other in others)


def test_without_training_or_a_micro_batch_the_generator_is_left_alone() -> None:
    for micro_batch, train in [(None, True), (FIRST, False)]:
        torch.manual_seed(1)
        before = torch.random.get_rng_state()
        module = nn.Identity().train(train)
        key = DropoutKey(5, micro_batch)
        key_dropout(module, 0, key)
        module(torch.ones(3))
        assert torch.equal(torch.random.get_rng_state(), before)


def dropping() -> Shard:
    checkpoint = Checkpoint(checkpoint_folder("llama"))
    shard = Shard.cut(checkpoint, 0, 2)
    lora = LoraRecipe(rank=4, alpha=8, dropout=0.4)
    add_lora(shard, lora, matched_modules(checkpoint.config, None), 0)
    for name, parameter in shard.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return shard.train()


def gradients(shard: Shard, order: list[MicroBatchId]) -> dict[MicroBatchId, list[torch.Tensor]]:
    """Gradients of every micro-batch, all forwards first and then all backwards in the reverse order."""
    trained = [parameter for parameter in shard.parameters() if parameter.requires_grad]
    outputs = {}
    for micro_batch in order:
        shard.key.micro_batch = micro_batch
        outputs[micro_batch] = shard(torch.arange(3, 13).reshape(2, 5)).square().sum()
    found = {}
    for micro_batch in reversed(order):
        shard.key.micro_batch = micro_batch
        found[micro_batch] = list(torch.autograd.grad(outputs[micro_batch], trained))
    return found


@pytest.mark.parametrize("recompute", [False, True])
def test_the_order_of_micro_batches_changes_no_gradient(recompute: bool) -> None:
    shard = dropping()
    wanted = gradients(shard, [FIRST, SECOND])
    if recompute:
        shard.checkpoint_activations()
    found = gradients(shard, [SECOND, FIRST])
    for micro_batch, tensors in wanted.items():
        assert all(torch.equal(a, b) for a, b in zip(found[micro_batch], tensors, strict=True))
    assert not torch.equal(wanted[FIRST][0], wanted[SECOND][0])  # same tokens, other masks
