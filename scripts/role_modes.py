"""Ways to run roles of a model of Gemma-2B's shapes, for `bench_roles.py`: what each says beside a common recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "recipes/quickstart-base"
LENGTH = 128
TABLE, SMALL_TABLE = 256_000, 2_048
"""Rows of Gemma's, and of the tokenizer's: of an edge's modes the cloud and its head are as small as can be."""
HEAD = 256
STEPS, EDGE_STEPS = 4, 3
"""The first warms up."""


@dataclass(frozen=True)
class Shape:
    """Of the model.

    Attributes:
        blocks: of the edge; the client and the cloud have one each.
        width: of the hidden states; the inner one is eight times that.
    """

    blocks: int = 18
    width: int = 2048

    def config(self, table: int) -> dict[str, Any]:
        """Gemma's, with so many rows of the embedding table."""
        return {
            "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "vocab_size": table,
            "hidden_size": self.width, "intermediate_size": 8 * self.width, "num_attention_heads": self.width // HEAD,
            "num_key_value_heads": 1, "head_dim": HEAD, "tie_word_embeddings": True, "bos_token_id": 2,
            "eos_token_id": 1, "pad_token_id": 0, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
        }  # fmt: skip


@dataclass(frozen=True)
class Mode:
    """A way to run it.

    Attributes:
        overrides: of the recipe.
        edge: whether there is one.
        environment: of all its processes.
        at_edge: overrides of the edge alone; `FOLDER` is one for its files.
        processes: of the edge, under `accelerate launch`.
        rows: of a micro-batch.
    """

    overrides: tuple[str, ...] = ()
    edge: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    at_edge: tuple[str, ...] = ()
    processes: int = 1
    rows: int = 1

    @property
    def table(self) -> int:
        """Rows of the embedding table."""
        return SMALL_TABLE if self.edge else TABLE

    def threads(self, role: str) -> int:
        """Of torch in each process: client, edge and cloud take turns, the ranks of an edge do not."""
        return max(1, 2 // self.processes) if role == "edge" else 1


ZERO_3_CPU = "server.zero={stage: 3, offload_param: cpu}"
ZERO_3_NVME = "server.zero={stage: 3, offload_param: nvme, nvme_path: FOLDER}"
FSDP2 = "server.fsdp=true"
MODES = {
    "client": Mode(("split.memory_mib={client: 850}",), edge=False, environment={"PYTHONPROFILEIMPORTTIME": "1"}),
    "client without a limit": Mode(edge=False),
    "plain": Mode(),
    "activation checkpointing": Mode(("train.activation_checkpointing=true",)),
    "int8": Mode(("quantization={edge: int8}",)),
    "nf4": Mode(("quantization={edge: nf4}",)),
    "ZeRO-1 cpu": Mode(at_edge=("server.zero={stage: 1, offload_optimizer: cpu}",)),
    "ZeRO-2 cpu": Mode(at_edge=("server.zero={stage: 2, offload_optimizer: cpu}",)),
    "ZeRO-3 cpu": Mode(at_edge=(ZERO_3_CPU,)),
    "ZeRO-3 nvme": Mode(at_edge=(ZERO_3_NVME,)),
    "FSDP2": Mode(at_edge=(FSDP2,)),
    "two rows": Mode(rows=2),
    "2 x plain": Mode(processes=2, rows=2),
    "2 x ZeRO-3 cpu": Mode(at_edge=(ZERO_3_CPU,), processes=2, rows=2),
    "2 x FSDP2": Mode(at_edge=(FSDP2,), processes=2, rows=2),
}
"""A mode is a row of the table; the first two are about the client."""


def recipe_of(mode: Mode, shape: Shape, base: Path, rows: Path, address: dict[str, int]) -> str:
    """One client with rows of 128 tokens, LoRA of rank 8 on every linear layer."""
    tiers, cuts = (
        ("{client: 1, edge: 1, cloud: 1}", [1, 1 + shape.blocks]) if mode.edge else ("{client: 1, cloud: 1}", [1])
    )
    places = ", ".join(f"{name}: '127.0.0.1:{port}'" for name, port in address.items())
    steps = EDGE_STEPS if mode.edge else STEPS
    return f"""\
model: {{base: {base}, tokenizer: {TOKENIZER}, dtype: bfloat16}}
split: {{tiers: {tiers}, cuts: {cuts}, labels: cloud}}
lora: {{rank: 8, alpha: 16, targets: all-linear}}
data: {{source: {rows}, format: text, max_length: {LENGTH}, eval_fraction: 0.1}}
train: {{steps: {steps}, batch_size: {mode.rows}, schedule: {{name: constant}}}}
wire: {{addresses: {{{places}}}}}
"""
