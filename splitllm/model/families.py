"""Which decoder families can be cut, and where their parts sit.

A family is a row: the names of its embeddings, blocks and final norm. Families that declare `base_model_pp_plan` need
no row. Being in the table is not enough: `splitllm.model.proof` cuts a small random twin and compares before real
weights are touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig

from splitllm.errors import FamilyError


@dataclass(frozen=True)
class Layout:
    """Names of a decoder's parts inside its base model.

    Attributes:
        base: attribute of the causal-LM class that holds the decoder.
        embeddings: the token embedding.
        blocks: the list of transformer blocks.
        norm: the final norm.
        positions: a learned position table, if there is one.
    """

    base: str
    embeddings: str
    blocks: str
    norm: str
    positions: str | None = None


STANDARD = Layout("model", "embed_tokens", "layers", "norm")

FAMILIES: dict[str, Layout] = {
    "gpt2": Layout("transformer", "wte", "h", "ln_f", positions="wpe"),
    "gemma": STANDARD,
    "gemma2": STANDARD,
    "gemma3_text": STANDARD,
    "llama": STANDARD,
    "qwen2": STANDARD,
    "qwen3": STANDARD,
    "mistral": STANDARD,
    "phi3": STANDARD,
    "olmo2": STANDARD,
}

REFUSALS: tuple[tuple[Callable[[PreTrainedConfig], object], str], ...] = (
    (lambda c: c.is_encoder_decoder, "it is an encoder-decoder, and only decoders are cut"),
    (
        lambda c: getattr(c, "num_kv_shared_layers", 0),
        "its upper blocks reuse the keys and values of lower ones, which a cut would part",
    ),
    (
        lambda c: getattr(c, "hidden_size_per_layer_input", 0),
        "it feeds per-layer embeddings of the tokens to every block, so tokens would have to follow the activations",
    ),
    (
        lambda c: getattr(c, "quantization_config", None),
        "its checkpoint is quantised, and only plain weights are read",
    ),
    (
        lambda c: getattr(c, "num_local_experts", 0) or getattr(c, "num_experts", 0),
        "it is a mixture of experts, whose stored tensors are fused on loading, which the shard loader does not do",
    ),
)

DROPOUTS = (
    *("attn_pdrop", "embd_pdrop", "resid_pdrop"),
    *("attention_dropout", "embedding_dropout", "hidden_dropout", "residual_dropout"),
)
"""The settings of all families that are dropout rates of the decoder."""


def dropouts(config: PreTrainedConfig) -> dict[str, float]:
    """The base model's own dropout rates, by setting; those that are not 0."""
    return {name: float(rate) for name in DROPOUTS if (rate := getattr(config, name, None))}


def set_dropouts(config: PreTrainedConfig, rate: float) -> None:
    """Give the base model this dropout rate, wherever it has one."""
    for name in DROPOUTS:
        if getattr(config, name, None) is not None:
            setattr(config, name, rate)


def layout_of_family(family: str) -> Layout:
    """Where the parts of a model sit, of a family that can be cut, by its `model_type`."""
    return FAMILIES.get(family, STANDARD)


def layout_of(config: PreTrainedConfig) -> Layout:
    """Where the parts of this configuration's model sit.

    Raises:
        FamilyError: the family is known to be uncuttable, or declares no standard layout.
    """
    family = config.model_type
    for applies, reason in REFUSALS:
        if applies(config):
            raise FamilyError(f"model.base: {family} cannot be cut: {reason}")
    plan = getattr(config, "base_model_pp_plan", None) or {}
    if family in FAMILIES or {"embed_tokens", "layers", "norm"} <= set(plan):
        return layout_of_family(family)
    raise FamilyError(
        f"model.base: {family} cannot be cut: it declares no pipeline plan and has no row in the table of families "
        f"({', '.join(sorted(FAMILIES))}); docs/add_a_family.md says how to add one"
    )
