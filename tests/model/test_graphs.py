"""What a graph keeps is known before it is built: compared with what a worker counts in a real forward on the CPU."""

from __future__ import annotations

import resource
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from weakref import WeakSet

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from splitllm.model import graphs
from splitllm.model.graphs import NOBODY, Work, bytes_by_block
from splitllm.model.joined import Rows
from splitllm.model.loading import Checkpoint, quiet_transformers
from splitllm.model.lora import adapter_parameters, add_lora, block_of, matched_modules
from splitllm.model.randomness import MicroBatchId
from splitllm.model.shard import Shard
from splitllm.model.tenants import Tenants
from splitllm.model.trainable import Trainable
from splitllm.recipe import LoraRecipe, OptimizerRecipe
from splitllm.roles.worker import Ask, Worker
from tests.families import CONFIGS, TARGETS, checkpoint_folder

LORA = LoraRecipe(rank=4, alpha=8, dropout=0.1)
KINDS = ["gpt2", "gemma", "gemma2", "gemma3", "llama", "qwen2"]
CPU = torch.device("cpu")


def work_in(family: str, start: int = 2, stop: int = 6) -> Work:
    modules = matched_modules(Checkpoint(checkpoint_folder(family)).config, TARGETS.get(family))
    return Work(LORA, tuple(modules), start, stop, rows=3, length=14, dtype=torch.float32)


def predicted(folder: Path, work: Work) -> int:
    return sum(bytes_by_block(Checkpoint(folder).config, work))


def measured(folder: Path, work: Work, lengths: tuple[int, ...] | None = None, clients: int = 1) -> int:
    """Per client, what the worker of a real shard counts; the rows are full unless lengths are given."""
    shard = Shard.cut(Checkpoint(folder), work.start, work.stop, dtype=work.dtype, attention=work.attention)
    config, lengths = shard.model.config, lengths or (work.length,) * work.rows
    add_lora(shard, work.lora, [name for name in work.modules if block_of(config, name) not in work.own], 0)
    tenants = Tenants(shard, work.modules, work.own, 0)
    own = {
        client: tenants.add(client, work.start, work.lora, torch.float32, CPU) for client in range(clients) if work.own
    }
    if work.checkpointing:
        shard.checkpoint_activations()
    worker = Worker(
        shard,
        Trainable(adapter_parameters(shard), OptimizerRecipe()),
        CPU,
        (lambda: torch.autocast("cpu", torch.bfloat16)) if work.mixed else nullcontext,
        {client: Trainable(parameters, OptimizerRecipe()) for client, parameters in own.items()},
    )
    below = any(block_of(config, name) < work.start for name in work.modules)
    positions = (torch.arange(max(lengths)) % 5).expand(len(lengths), -1) if work.packed else None
    worker.forward(
        [
            Ask(Rows(MicroBatchId(0, client, 0), lengths, work.start), _inputs(shard, lengths), positions, True, below)
            for client in range(clients)
        ]
    )
    return worker.peak()["activations of a batch"] // clients


def _inputs(shard: Shard, lengths: tuple[int, ...]) -> torch.Tensor:
    if shard.embeddings is not None:
        return torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    return torch.zeros(sum(lengths), shard.model.config.hidden_size, dtype=next(shard.model.parameters()).dtype)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", KINDS)
def test_it_is_what_a_worker_counts(family: str, dtype: torch.dtype, checkpointing: bool) -> None:
    work = replace(work_in(family), dtype=dtype, checkpointing=checkpointing)
    assert predicted(checkpoint_folder(family), work) == measured(checkpoint_folder(family), work) > 0


@pytest.mark.parametrize("family", [*(name for name in CONFIGS if name not in KINDS), "gpt2 with dropout"])
def test_it_is_so_in_every_family(family: str) -> None:
    work = work_in(family, 1, 4)
    assert predicted(checkpoint_folder(family), work) == measured(checkpoint_folder(family), work) > 0


CASES = {
    "tokens come in": {"start": 0, "stop": 3},
    "packed": {"packed": True},
    "autocast": {"mixed": True},
    "eager": {"attention": "eager"},
    "fp64": {"dtype": torch.float64},
    "one row": {"rows": 1},
    "one token": {"length": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_so_whatever_the_recipe_asks(case: str) -> None:
    work = replace(work_in("llama"), **CASES[case])
    assert predicted(checkpoint_folder("llama"), work) == measured(checkpoint_folder("llama"), work) > 0


class Saved:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_it_is_what_is_left_of_a_graph_that_drops_parts_of_itself() -> None:
    """DoRA detaches its norms: what they had saved is gone before the block is done, though a worker counts it."""
    folder, work = checkpoint_folder("llama"), replace(work_in("llama"), lora=LoraRecipe(rank=4, alpha=8, dora=True))
    shard = Shard.cut(Checkpoint(folder), work.start, work.stop, dtype=work.dtype)
    add_lora(shard, work.lora, work.modules, 0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in shard.parameters()}
    saved: WeakSet[Saved] = WeakSet()

    def keep(tensor: torch.Tensor) -> Saved:
        saved.add(handle := Saved(tensor))
        return handle

    hidden_BSD = torch.zeros(work.rows, work.length, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda handle: handle.tensor):
        out_BSD = shard.train().blocks(hidden_BSD)
    storages = [handle.tensor.untyped_storage() for handle in saved]
    left = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in weights}
    assert out_BSD.requires_grad
    assert predicted(folder, work) == sum(left.values())
    assert predicted(folder, work) < measured(folder, work)


@pytest.mark.parametrize("adapted", [{0}, {3}, {5}, {0, 4}, {3, 5}])
def test_it_is_so_where_only_some_blocks_train(adapted: set[int]) -> None:
    work, folder = work_in("llama", 2, 6), checkpoint_folder("llama")
    config = Checkpoint(folder).config
    some = replace(work, modules=tuple(name for name in work.modules if block_of(config, name) in adapted))
    assert predicted(folder, some) == measured(folder, some)
    assert [bool(kept) for kept in bytes_by_block(config, some)] == [
        any(trained <= layer for trained in adapted) for layer in range(2, 6)
    ]


def test_blocks_that_are_alike_are_run_once_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    config, work = Checkpoint(checkpoint_folder("llama")).config, replace(work_in("llama", 1, 3), length=13)
    kept = bytes_by_block(config, work)
    monkeypatch.setattr(graphs, "staged", lambda *_: pytest.fail("they are run again"))
    assert bytes_by_block(config, replace(work, start=3, stop=6)) == (*kept, kept[-1])
    with pytest.raises(pytest.fail.Exception):
        bytes_by_block(config, replace(work, start=0))  # where nothing trains below


def test_nothing_is_kept_where_nothing_trains() -> None:
    assert predicted(checkpoint_folder("llama"), replace(work_in("llama"), modules=())) == 0
    assert bytes_by_block(Checkpoint(checkpoint_folder("llama")).config, work_in("llama", 2, 2)) == ()


@pytest.mark.parametrize("own", [range(0, 4), range(2, 6)], ids=["some blocks", "all blocks"])
@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_adapters_of_their_own_keep_what_a_worker_counts(family: str, own: range) -> None:
    work, folder = replace(work_in(family), own=own), checkpoint_folder(family)
    assert predicted(folder, work) == pytest.approx(measured(folder, work, clients=2), rel=0.03)
    together = predicted(folder, replace(work, own=NOBODY))
    assert predicted(folder, work) == pytest.approx(together, rel=0.03)  # the stacks of adapters are not kept


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gemma3", "llama"])
def test_rows_that_are_not_full_keep_as_much_as_if_they_were(family: str) -> None:
    work, folder = work_in(family), checkpoint_folder(family)
    assert predicted(folder, work) == pytest.approx(measured(folder, work, lengths=(9, 14, 3)), rel=0.03)


@pytest.fixture(scope="module")
def gpt2_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of GPT-2 small, random."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    with quiet_transformers():
        config = transformers.GPT2Config(n_layer=2, vocab_size=64, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("dtype", "rows", "length"), [(torch.float32, 2, 32), (torch.bfloat16, 1, 70)])
def test_it_is_so_in_the_size_of_gpt2_small(gpt2_small: Path, dtype: torch.dtype, rows: int, length: int) -> None:
    modules = tuple(matched_modules(Checkpoint(gpt2_small).config, None))
    work = Work(LORA, modules, 0, 2, rows, length, dtype)
    assert predicted(gpt2_small, work) == measured(gpt2_small, work)


def test_predicting_takes_no_memory_and_draws_no_random_number() -> None:
    config = transformers.GemmaConfig(
        hidden_size=2048, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1
    )
    work = Work(LORA, tuple(matched_modules(config, None)), 1, 18, 8, 512, torch.bfloat16)
    state, before = torch.get_rng_state(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = sum(bytes_by_block(config, work))
    assert torch.equal(state, torch.get_rng_state())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < kept / 1024 / 100


def test_whoever_computes_meanwhile_gets_the_same_bits() -> None:
    folder, work = checkpoint_folder("gpt2 with dropout"), work_in("gpt2 with dropout", 0, 6)
    config = Checkpoint(folder).config
    shard = Shard.cut(Checkpoint(folder), 0, 6, dtype=torch.float32)
    add_lora(shard, LORA, work.modules, 0)
    shard.train().key.micro_batch = MicroBatchId(0, 0, 0)

    def compute() -> torch.Tensor:
        return shard.blocks(torch.ones(2, 9, 32)).detach()

    alone = compute()
    with ThreadPoolExecutor(1) as pool:
        prices = [pool.submit(bytes_by_block, config, replace(work, rows=rows)) for rows in range(1, 7)]
        beside = [compute() for _ in range(30)]
        assert all(sum(price.result()) > 0 for price in prices)
    assert all(torch.equal(alone, other) for other in beside)
