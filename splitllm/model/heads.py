"""The top of the model: final norm, output projection and the loss, computed only where there is a label.

Shape suffixes: N labelled positions of a micro-batch, C positions of one chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from splitllm.model.loading import Checkpoint

CHUNK_BYTES = 64 * 2**20  # of fp32 logits held at once


class Head(nn.Module):
    """Final norm and output projection, frozen; a tied projection is a copy of the embedding table.

    Attributes:
        norm: the family's own final norm.
        output: the projection to the vocabulary.
    """

    def __init__(self, norm: nn.Module, output: nn.Linear, config: PreTrainedConfig) -> None:
        super().__init__()
        self.norm, self.output = norm, output
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

    def loss(self, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy in nats (a scalar), at least in fp32; never more than one chunk of logits is held."""
        normed_ND = self.norm(hidden_ND)
        if self._fused_exact(normed_ND):
            return self._fused(normed_ND, targets_N)
        total: torch.Tensor = _ChunkedLoss.apply(normed_ND, targets_N, self)  # type: ignore[no-untyped-call]
        return total

    def _fused_exact(self, normed_ND: torch.Tensor) -> bool:
        """Whether torch's fused head and loss computes what this head does.

        It knows no soft-cap and no scale, and under autocast it would not cast.
        """
        plain = self.softcap is None and self.multiplier is None and self.divisor is None
        wide = normed_ND.dtype in (torch.float32, torch.float64) and normed_ND.dtype == self.output.weight.dtype
        return (
            plain
            and wide
            and hasattr(F, "linear_cross_entropy")
            and not torch.is_autocast_enabled(normed_ND.device.type)
        )

    def _fused(self, normed_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=self._chunk(normed_ND))
        total: torch.Tensor = F.linear_cross_entropy(
            normed_ND, self.output.weight, targets_N, linear_bias=self.output.bias, reduction="sum", options=options
        )
        return total

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


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy over chunks of positions; the gradient is taken chunk by chunk in the forward.

    The head is frozen, so the only gradient is that of the hidden states, and no logits outlive their chunk.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, normed_ND: torch.Tensor, targets_N: torch.Tensor, head: Head
    ) -> torch.Tensor:
        gradient_ND = torch.empty_like(normed_ND) if normed_ND.requires_grad else None
        wide = torch.promote_types(normed_ND.dtype, torch.float32)
        total = normed_ND.new_zeros((), dtype=wide)
        size = head._chunk(normed_ND)
        for start in range(0, normed_ND.shape[0], size):
            chunk = slice(start, start + size)
            with torch.enable_grad():
                hidden_CD = normed_ND[chunk].detach().requires_grad_(gradient_ND is not None)
                logits_CV = head._shape(head.output(hidden_CD))
            logarithms_CV = torch.log_softmax(logits_CV.detach(), dim=-1, dtype=wide)
            index_C1 = targets_N[chunk].unsqueeze(1)
            total -= logarithms_CV.gather(1, index_C1).sum()
            if gradient_ND is not None:  # of the logits: the probabilities, less 1 at the target
                gradient_CV = logarithms_CV.exp_()
                gradient_CV.scatter_add_(1, index_C1, torch.full_like(index_C1, -1, dtype=wide))
                gradient_ND[chunk] = torch.autograd.grad(logits_CV, hidden_CD, gradient_CV.to(logits_CV.dtype))[0]
        if gradient_ND is not None:
            ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient_ND * outputs[0].to(gradient_ND.dtype), None, None


def perplexity(loss: float) -> float:
    """Perplexity of a mean loss in nats, infinite where it would overflow."""
    return math.exp(loss) if loss < 700 else math.inf
