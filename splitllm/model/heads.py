"""The top of the model: final norm, output projection and the loss, computed only where there is a label.

Shape suffixes: N labelled positions of a micro-batch, C positions of one chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from splitllm.model.loading import Checkpoint

CHUNK_BYTES = 64 * 2**20  # of fp32 logits held at once


def logits_bytes(config: PreTrainedConfig, positions: int, dtype: torch.dtype) -> int:
    """What the loss of so many positions holds at once: of one chunk the logits, their logarithms and its gradient.

    Args:
        config: of the whole text model.
        positions: with a label, of one micro-batch.
        dtype: of the weights.
    """
    vocabulary, wide = int(config.vocab_size), max(4, dtype.itemsize)
    limit = max(1, CHUNK_BYTES // (vocabulary * wide))
    rows = math.ceil(positions / math.ceil(positions / limit)) if positions else 0
    in_half = dtype.itemsize < wide
    return rows * vocabulary * (2 * dtype.itemsize + 2 * wide if in_half else 2 * wide)


class Head(nn.Module):
    """Final norm and output projection, frozen; a tied projection is a copy of the embedding table.

    Attributes:
        norm: the family's own final norm.
        output: the projection to the vocabulary.
    """

    def __init__(self, norm: nn.Module, output: nn.Linear, config: PreTrainedConfig) -> None:
        super().__init__()
        self.norm, self.output = norm, output
        self.scratch = Scratch()
        self.tied = bool(config.tie_word_embeddings)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.multiplier: float | None = getattr(config, "logit_scale", None)  # Cohere
        self.divisor: float | None = getattr(config, "logits_scaling", None)  # Granite

    def load(self, checkpoint: Checkpoint, norm_name: str, embedding_name: str, dtype: torch.dtype) -> None:
        """Read its tensors.

        Raises:
            CheckpointError: one is missing or misshapen.
        """
        names = {f"norm.{key}": f"{norm_name}.{key}" for key, _ in self.norm.named_parameters()}
        names["output.weight"] = embedding_name if self.tied else "lm_head.weight"
        if self.output.bias is not None:
            names["output.bias"] = "lm_head.bias"
        shapes = {stored: tuple(self.get_parameter(key).shape) for key, stored in names.items()}
        checkpoint.require(shapes)
        state = {key: checkpoint.read(stored, shapes[stored], dtype) for key, stored in names.items()}
        self.load_state_dict(state, assign=True)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Activations [..., D] after the last block to logits [..., V]."""
        return self._shape(self.output(self.norm(hidden)))

    def loss(
        self, hidden_ND: torch.Tensor, targets_N: torch.Tensor, weight: float | torch.Tensor = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy at labelled positions; never more than one chunk of logits is held.

        Args:
            hidden_ND: activations after the last block.
            targets_N: the token ids to be predicted.
            weight: of one nat; for each position [N], where they differ.

        Returns:
            The weighted sum, to go backward from, and the nats of each position [N], detached; both at least fp32.
        """
        normed_ND = self.norm(hidden_ND)
        wide = torch.promote_types(normed_ND.dtype, torch.float32)
        weight_N = torch.as_tensor(weight, dtype=wide, device=normed_ND.device).expand(targets_N.shape[0])
        weighted, nats_N = _ChunkedLoss.apply(normed_ND, targets_N, self, weight_N)  # type: ignore[no-untyped-call]
        return weighted, nats_N

    def is_plain(self, normed_ND: torch.Tensor) -> bool:
        """Whether logits are the bare product, in full precision, on a CPU."""
        bare = self.output.bias is None and self.softcap is None and self.multiplier is None and self.divisor is None
        dtype, device = normed_ND.dtype, normed_ND.device.type
        full = dtype in (torch.float32, torch.float64) and dtype == self.output.weight.dtype
        return bare and full and device == "cpu" and not torch.is_autocast_enabled(device)

    def _chunk(self, normed_ND: torch.Tensor) -> int:
        """Positions whose logits are held at once: chunks of even size, as each of them reads the whole weight."""
        positions = normed_ND.shape[0]
        limit = max(1, CHUNK_BYTES // (self.output.weight.shape[0] * max(4, normed_ND.element_size())))
        chunks = math.ceil(positions / limit)
        return math.ceil(positions / chunks) if chunks else 1

    def _shape(self, logits: torch.Tensor) -> torch.Tensor:
        if self.multiplier is not None:
            logits = logits * self.multiplier
        if self.divisor is not None:
            logits = logits / self.divisor
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


class Scratch:
    """Memory for one chunk of logits and of their logarithms, kept between chunks: fresh memory costs page faults.

    Replicas share it, as only one of them computes at a time.
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def __deepcopy__(self, _memo: object) -> Scratch:
        """Itself."""
        return self

    def matrix(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory [rows, columns], the same for the same name."""
        flat = self._flat.get((name, dtype))
        if flat is None or flat.numel() < rows * columns:
            flat = self._flat[name, dtype] = torch.empty(rows * columns, dtype=dtype)
        return flat[: rows * columns].view(rows, columns)


class _ChunkedLoss(torch.autograd.Function):
    """Weighted and plain cross-entropy over chunks of positions; the gradient is taken chunk by chunk in the forward.

    The head is frozen, so the only gradient is that of the hidden states, and no logits outlive their chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, normed_ND: torch.Tensor, targets_N: torch.Tensor, head: Head, weight_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gradient_ND = torch.empty_like(normed_ND) if normed_ND.requires_grad else None
        nats_N = torch.empty_like(weight_N, memory_format=torch.contiguous_format)
        chunk_loss = _plain_chunk if head.is_plain(normed_ND) else _any_chunk
        size = head._chunk(normed_ND)
        for start in range(0, normed_ND.shape[0], size):
            chunk = slice(start, start + size)
            out_CD = None if gradient_ND is None else gradient_ND[chunk]
            nats_N[chunk] = chunk_loss(head, normed_ND[chunk], targets_N[chunk], weight_N[chunk], out_CD)
        if gradient_ND is not None:
            ctx.save_for_backward(gradient_ND)
        ctx.mark_non_differentiable(nats_N)
        return (nats_N * weight_N).sum(), nats_N

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * outputs[0].to(gradient_ND.dtype), None, None, None


def _any_chunk(
    head: Head, hidden_CD: torch.Tensor, targets_C: torch.Tensor, weight_C: torch.Tensor, out_CD: torch.Tensor | None
) -> torch.Tensor:
    """Nats of a chunk's positions by autograd; the gradient of their weighted sum goes to `out_CD`."""
    with torch.enable_grad():
        leaf_CD = hidden_CD.detach().requires_grad_(out_CD is not None)
        nats_C = _nats(head._shape(head.output(leaf_CD)), targets_C)
    if out_CD is not None:
        out_CD.copy_(torch.autograd.grad(nats_C, leaf_CD, weight_C.to(nats_C.dtype))[0])
    return nats_C.detach()


def _plain_chunk(
    head: Head, hidden_CD: torch.Tensor, targets_C: torch.Tensor, weight_C: torch.Tensor, out_CD: torch.Tensor | None
) -> torch.Tensor:
    """As `_any_chunk`, by the kernels that autograd would call, to the bit, but in memory that is used again."""
    matrix_VD, kernels = head.output.weight, torch.ops.aten
    size = hidden_CD.shape[0], matrix_VD.shape[0], matrix_VD.dtype
    logits_CV = torch.mm(hidden_CD, matrix_VD.t(), out=head.scratch.matrix("logits", *size))
    logarithms_CV = kernels._log_softmax.out(logits_CV, 1, False, out=head.scratch.matrix("logarithms", *size))
    index_C1 = targets_C.unsqueeze(1)
    nats_C: torch.Tensor = -logarithms_CV.gather(1, index_C1).squeeze(1)
    if out_CD is not None:
        upward_CV = logits_CV.zero_().scatter_(1, index_C1, -weight_C.unsqueeze(1).to(size[2]))
        kernels._log_softmax_backward_data.out(upward_CV, logarithms_CV, 1, size[2], out=logarithms_CV)
        torch.mm(logarithms_CV, matrix_VD, out=out_CD)
    return nats_C


def _nats(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
    """Cross-entropy by the very kernels that the unsplit model would use, half precision by a cheaper way."""
    if logits_CV.dtype in (torch.float32, torch.float64):
        return F.cross_entropy(logits_CV, targets_C, reduction="none")
    nats_C: torch.Tensor = _HalfPrecisionLoss.apply(logits_CV, targets_C)  # type: ignore[no-untyped-call]
    return nats_C


class _HalfPrecisionLoss(torch.autograd.Function):
    """Cross-entropy in fp32 of half-precision logits, whose gradient is made in place of the probabilities."""

    @staticmethod
    def forward(ctx: Any, logits_CV: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        logarithms_CV = torch.log_softmax(logits_CV, dim=-1, dtype=torch.float32)
        index_C1 = targets_C.unsqueeze(1)
        nats_C = -logarithms_CV.gather(1, index_C1).squeeze(1)
        ctx.save_for_backward(logarithms_CV, index_C1)
        ctx.dtype = logits_CV.dtype
        return nats_C

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        logarithms_CV, index_C1 = ctx.saved_tensors
        gradient_CV = logarithms_CV.exp_()  # the probabilities, less 1 at the target; nobody else reads them
        gradient_CV.scatter_add_(1, index_C1, torch.full_like(index_C1, -1, dtype=torch.float32))
        return (gradient_CV * outputs[0].unsqueeze(1)).to(ctx.dtype), None
