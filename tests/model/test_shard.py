"""What a shard holds, shares and refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from splitllm import Shard
from splitllm.errors import CheckpointError
from splitllm.model.loading import Checkpoint
from splitllm.model.lora import adapter_parameters, add_lora, matched_modules
from splitllm.model.randomness import MicroBatchId
from splitllm.model.shard import Passthrough
from splitllm.recipe import LoraRecipe
from tests.families import CONFIGS, checkpoint_folder

IDS_BS = torch.arange(3, 17).reshape(2, 7)


def cut(family: str, start: int = 0, stop: int | None = None, **options: bool) -> Shard:
    return Shard.cut(Checkpoint(checkpoint_folder(family)), start, stop, **options)


def with_lora(family: str, start: int, stop: int, dropout: float = 0.0, **options: bool) -> Shard:
    shard = cut(family, start, stop, **options)
    modules = matched_modules(CONFIGS[family](), None)
    add_lora(shard, LoraRecipe(rank=4, alpha=8, dropout=dropout), modules, 0)
    for name, parameter in adapter_parameters(shard).items():
        if ".lora_B." in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return shard


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 7), (4, 3), (0, 0), (7, 7)])
def test_blocks_that_do_not_exist_are_refused(start: int, stop: int) -> None:
    with pytest.raises(CheckpointError, match=f"blocks {start} to {stop} of .*: the model has blocks 0 to 5"):
        cut("gpt2", start, stop)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("start", "stop"), [(0, 2), (2, 4), (4, 6), (6, 6)])
def test_a_shard_holds_its_own_blocks_and_nothing_else(family: str, start: int, stop: int) -> None:
    shard = cut(family, start, stop)
    blocks = getattr(getattr(shard.model, shard.layout.base), shard.layout.blocks)
    for layer, block in enumerate(blocks):
        assert isinstance(block, Passthrough) != (start <= layer < stop)
    own = {name for name, _ in shard.model.named_parameters()}
    positions = "transformer.wpe.weight" if family == "gpt2" and start == 0 else None
    for name in own - {positions}:
        assert start <= int(name.split(".")[2]) < stop
    assert (positions in own) == (positions is not None)
    assert (shard.embeddings is not None) == (start == 0) and (shard.head is not None) == (stop == 6)
    assert not any(tensor.is_meta for tensor in [*shard.parameters(), *shard.buffers()])
    assert not any(parameter.requires_grad for parameter in shard.parameters()) and not shard.training


def test_the_head_may_lie_beside_the_first_blocks_or_nowhere() -> None:
    assert cut("gpt2", 0, 2, head=True).head is not None
    assert cut("gpt2", 4, 6, head=False).head is None
    hidden_BSD = cut("gpt2", 4, 6, head=False)(torch.zeros(1, 3, 32, dtype=torch.float64))
    assert hidden_BSD.shape == (1, 3, 32)
    assert cut("gpt2", 0, 2, head=True)(IDS_BS).shape == (2, 7, 32)  # activations: it does not end the model


def test_a_shard_without_blocks_hands_on_what_it_gets() -> None:
    hidden_BSD = torch.randn(1, 3, 32, dtype=torch.float64)
    assert cut("llama", 6, 6).blocks(hidden_BSD) is hidden_BSD


def test_weights_keep_the_checkpoints_dtype_unless_told() -> None:
    checkpoint = Checkpoint(checkpoint_folder("llama"))
    assert {p.dtype for p in Shard.cut(checkpoint, 0, 1).parameters()} == {torch.float64}
    half = Shard.cut(checkpoint, 0, 1, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(IDS_BS).dtype == torch.bfloat16


def test_a_token_beyond_the_table_is_refused() -> None:
    with pytest.raises(CheckpointError, match="the tokenizer does not belong to this model"):
        cut("llama", 0, 1)(torch.tensor([[3, 61]]))


def test_no_token_id_is_special_to_the_embedding() -> None:
    checkpoint = Checkpoint(checkpoint_folder("llama"))
    plain = Shard.cut(checkpoint, 0, 1).embed(torch.tensor([[3, 60]]))
    checkpoint.config.pad_token_id = 60  # beyond the two rows that are read
    assert torch.equal(Shard.cut(checkpoint, 0, 1).embed(torch.tensor([[3, 60]])), plain)


def test_the_configuration_of_the_caller_is_left_as_it_was() -> None:
    checkpoint = Checkpoint(checkpoint_folder("gemma3"))
    before, attention = checkpoint.config.to_dict(), checkpoint.config._attn_implementation
    Shard.cut(checkpoint, 1, 3, dtype=torch.bfloat16, attention="eager")
    assert checkpoint.config.to_dict() == before
    assert checkpoint.config._attn_implementation == attention != "eager"
    assert before == AutoConfig.from_pretrained(checkpoint_folder("gemma3")).to_dict()


def test_packed_positions_reach_the_blocks() -> None:
    shard = cut("llama", 0, 2)
    packed_BS = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    out_BSD = shard(IDS_BS[:1], packed_BS)
    alone_BSD = shard(IDS_BS[:1, 3:])
    torch.testing.assert_close(out_BSD[:, 3:], alone_BSD, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(shard(IDS_BS[:1])[:, 3:], alone_BSD, rtol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_a_replica_shares_what_is_frozen_and_nothing_that_trains(family: str) -> None:
    shard = with_lora(family, 0, 3, head=True)
    twin = shard.replica()
    ours, theirs = dict(shard.named_parameters()), dict(twin.named_parameters())
    assert list(ours) == list(theirs)
    for name, parameter in ours.items():
        assert (theirs[name].data_ptr() == parameter.data_ptr()) != parameter.requires_grad
        assert torch.equal(theirs[name], parameter) and theirs[name].requires_grad == parameter.requires_grad
    buffers = dict(twin.named_buffers())
    assert all(buffers[name].data_ptr() == buffer.data_ptr() for name, buffer in shard.named_buffers())
    assert twin.embeddings is shard.embeddings and twin.key is not shard.key
    before = shard(IDS_BS)
    for parameter in adapter_parameters(twin).values():
        parameter.data.zero_()
    assert torch.equal(shard(IDS_BS), before) and not torch.equal(twin(IDS_BS), before)


def test_replicas_draw_equal_masks_each_by_its_own_key() -> None:
    shard = with_lora("gpt2", 0, 3, dropout=0.5).train()
    twin = shard.replica()
    shard.key.micro_batch, twin.key.micro_batch = MicroBatchId(0, 0, 0), MicroBatchId(0, 1, 0)
    first, other = shard(IDS_BS), twin(IDS_BS)
    assert not torch.equal(first, other)
    twin.key.micro_batch = MicroBatchId(0, 0, 0)
    assert torch.equal(twin(IDS_BS), first)
    assert torch.equal(shard(IDS_BS), first)


def test_from_pretrained_takes_a_folder_and_gives_the_whole_model() -> None:
    folder = checkpoint_folder("qwen3")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    for parameter in whole.parameters():
        parameter.data = parameter.data.clone()  # a mapped file is not aligned as fresh memory is
    shard = Shard.from_pretrained(str(folder))
    assert (shard.start, shard.stop) == (0, 6)
    assert torch.equal(shard(IDS_BS), whole(IDS_BS).logits)
