"""Matrices in parts: where these lie, what is whole when, and what is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from splitllm.engines.folders import LOCK, PREFIX, Folder
from splitllm.engines.places import places_of
from splitllm.engines.zero import Partitioned, library
from splitllm.errors import RecipeError, SplitLLMError
from splitllm.model.loading import Checkpoint
from splitllm.model.shard import Shard
from splitllm.recipe import ZeroRecipe
from tests.families import checkpoint_folder
from tests.processes import ROOT
from tests.tiny import WORDS, save_base

CPU = torch.device("cpu")
ON_HOST = ZeroRecipe(stage=3, offload_param="cpu")


def whole_matrices(shard: Shard) -> list[str]:
    named = [(name, p) for name, p in shard.model.named_parameters() if hasattr(p, "ds_tensor")]
    return [name for name, parameter in named if parameter.numel()]


def cut(family: str = "llama") -> tuple[Shard, Shard, Partitioned]:
    """A shard in parts, a replica of it, and what puts them together."""
    partitioned = Partitioned(ON_HOST, 48 * 32, CPU)
    base = Shard.cut(Checkpoint(checkpoint_folder(family)), 1, 5, dtype=torch.float32, take=partitioned.take)
    shards = base.replica(), base.replica()
    for shard in shards:
        partitioned.attach(shard)
    return *shards, partitioned


def hidden() -> torch.Tensor:
    return torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_a_shard_is_read_block_by_block_and_no_more_than_one_module_is_whole() -> None:
    read: list[int] = []
    partitioned = Partitioned(ON_HOST, 48 * 32, CPU)

    def take(block: nn.Module) -> None:
        read.append(sum(p.numel() for p in block.parameters() if not p.is_meta))
        partitioned.take(block)

    shard = Shard.cut(Checkpoint(checkpoint_folder("llama")), 1, 5, dtype=torch.float32, take=take)
    assert len([size for size in read if size]) == 4 and whole_matrices(shard) == []
    partitioned.attach(shard)
    out = shard.blocks(hidden())
    assert len(whole_matrices(shard)) == 1, "the last module that computed"
    out.sum().backward()
    assert len(whole_matrices(shard)) == 1
    partitioned.release()
    assert whole_matrices(shard) == []


def test_graphs_hold_no_weights() -> None:
    """A graph that kept its matrices alive would make partitioning them pointless."""
    shard, _, _ = cut("gpt2")
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        shard.blocks(hidden())
    assert 4 * 32 * 96 not in kept.values(), "c_attn"


def test_replicas_share_the_parts_and_their_graphs_may_be_open_at_once() -> None:
    one, other, _ = cut()
    plain = Shard.cut(Checkpoint(checkpoint_folder("llama")), 1, 5, dtype=torch.float32)
    inputs = [hidden() for _ in range(3)]
    outputs = [shard.blocks(each) for shard, each in zip((one, other, plain), inputs, strict=True)]
    for output in outputs:
        output.square().sum().backward()
    assert all(torch.equal(output, outputs[-1]) for output in outputs)
    gradients = [each.grad for each in inputs]
    assert all(g is not None and torch.equal(g, gradients[-1]) for g in gradients if gradients[-1] is not None)
    parts = [{id(p) for p in shard.parameters() if hasattr(p, "ds_tensor")} for shard in (one, other)]
    assert parts[0] == parts[1] != set()


def test_weights_are_counted_where_they_lie() -> None:
    shard, _, _ = cut()
    assert places_of(shard.parameters()).device == sum(
        p.ds_tensor.nbytes if hasattr(p, "ds_tensor") else p.nbytes for p in shard.parameters()
    )


def test_a_folder_goes_with_its_process_or_with_the_next(tmp_path: Path) -> None:
    mine = Folder(str(tmp_path))
    script = f"import os; from splitllm.engines.folders import Folder; f = Folder({str(tmp_path)!r}); "
    for end, left in (("pass", 1), ("os.kill(os.getpid(), 9)", 2)):
        subprocess.run([sys.executable, "-c", script + end], cwd=ROOT, timeout=60, check=False)
        assert len(list(tmp_path.glob(f"{PREFIX}*/{LOCK}"))) == left
    other = Folder(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {mine.path.name, other.path.name}
    mine.remove()
    other.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"server\.zero\.nvme_path: .*nowhere is no folder that can be written to"):
        Folder(str(tmp_path / "nowhere"))


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(RecipeError, match=r"server\.zero: .*pip install 'splitllm\[deepspeed\]'"):
        library(ON_HOST, CPU)


def files_work() -> bool:
    try:
        library(ZeroRecipe(stage=3, offload_param="nvme", nvme_path="unused"), CPU)
    except SplitLLMError:
        return False
    return True


@pytest.mark.system
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_in_files_are_not_in_memory_and_compute_the_same(dtype: str, tmp_path: Path) -> None:
    if not files_work():
        pytest.skip("needs libaio: install the package libaio-dev")
    (tmp_path / "files").mkdir()
    sizes = {"num_hidden_layers": 6, "hidden_size": 1024, "intermediate_size": 2816, "vocab_size": WORDS + 3}
    save_base(tmp_path / "base", LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8))
    command = [sys.executable, "-m", "tests.engines.files", str(tmp_path), dtype]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    sys.stdout.write(done.stdout)
    assert list((tmp_path / "files").iterdir()) == []
