"""Adapter folders of several clients, averaged into one that PEFT loads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import LoraConfig

from splitllm.errors import AverageError
from splitllm.federated.aggregate import RULES, Average, error_of
from splitllm.federated.export import of_one_rank
from splitllm.federated.factors import LowRank
from splitllm.federated.rounds import A, B
from splitllm.model.export import load_adapter, save_adapter

Adapter = dict[str, LowRank]
"""Module -> what the adapter adds to its weight."""


def average(
    folders: Sequence[Path], rule: str, output_dir: Path, weights: Sequence[float] | None = None
) -> dict[str, Any]:
    """Average PEFT adapters of one base into an ordinary PEFT adapter: of a rank as large as the rule needs.

    Args:
        folders: of the adapters, at least one.
        rule: a name in `RULES`.
        output_dir: receives the average; it must not exist.
        weights: of each adapter, such as its client's number of rows, above 0; equal ones by default.

    Returns:
        `rank` of the average, and its `error`: how far it is from the exact weighted sum of what the adapters add to
        the weights, over all weights (Frobenius norms, as a share of that sum's).

    Raises:
        AverageError: the adapters do not fit together, or not the rule.
        CheckpointError: a folder holds no LoRA adapter.
        OSError: the average cannot be written.
    """
    if output_dir.exists():
        raise AverageError(f"--output-dir: {output_dir} exists; give a new one")
    shares = _shares(folders, weights)
    loaded = [load_adapter(folder) for folder in folders]
    adapters = [_adapter(folder, *each) for folder, each in zip(folders, loaded, strict=True)]
    _check_alike(folders, [config for config, _ in loaded], adapters)
    averages = {name: _averaged(rule, name, [each[name] for each in adapters], shares) for name in adapters[0]}
    errors = [
        error_of(each, [adapter[name] for adapter in adapters], shares, _largest(adapters, name))
        for name, each in averages.items()
    ]
    whole = {name: each.of(_largest(adapters, name)) for name, each in averages.items()}
    tensors, config = of_one_rank(whole, loaded[0][0])
    save_adapter(output_dir, tensors, config)
    return {"rank": config.r, "error": fmean(errors)}


def _averaged(rule: str, name: str, adapters: Sequence[LowRank], shares: Sequence[float]) -> Average:
    try:
        return RULES[rule](adapters, shares)
    except AverageError as error:
        raise AverageError(f"{name}: {error}") from error


def _largest(adapters: Sequence[Adapter], name: str) -> int:
    """The client with the largest rank: where each has its own, it has the best."""
    return max(range(len(adapters)), key=lambda client: adapters[client][name].rank)


def _shares(folders: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    given = list(weights) if weights else [1.0] * len(folders)
    if len(given) != len(folders):
        raise AverageError(f"--weight: {len(given)} for {len(folders)} adapters; give one for each, in their order")
    for weight in given:
        if not (math.isfinite(weight) and weight > 0):
            raise AverageError(f"--weight: {weight:g} is not a weight; use numbers above 0")
    return [weight / math.fsum(given) for weight in given]


def _adapter(folder: Path, config: LoraConfig, tensors: Mapping[str, torch.Tensor]) -> Adapter:
    """By module; what is no plain LoRA is refused."""
    odd = sorted(name for name in tensors if not name.endswith((A, B)))
    if odd or config.use_dora or config.rank_pattern or config.alpha_pattern:
        what = odd[0] if odd else "DoRA, rank_pattern or alpha_pattern"
        raise AverageError(f"{folder}: holds {what}, and only plain LoRA and rsLoRA can be averaged")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AverageError(f"{folder}: {name} is not finite; leave this adapter out")
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    modules = [name.removesuffix(A) for name in tensors if name.endswith(A)]
    return {module: LowRank(tensors[module + A], tensors[module + B], scale) for module in modules}


def _check_alike(folders: Sequence[Path], configs: Sequence[LoraConfig], adapters: Sequence[Adapter]) -> None:
    first = {name: (each.a_RD.shape[1], each.b_OR.shape[0]) for name, each in adapters[0].items()}
    bases = [config.base_model_name_or_path for config in configs]
    for folder, base, adapter in zip(folders[1:], bases[1:], adapters[1:], strict=True):
        found = {name: (each.a_RD.shape[1], each.b_OR.shape[0]) for name, each in adapter.items()}
        if base != bases[0]:
            raise AverageError(
                f"{folder}: is of base {base}, and {folders[0]} of {bases[0]}; average those of one base"
            )
        if found != first:
            name = sorted(k for k in {*found, *first} if found.get(k) != first.get(k))[0]
            raise AverageError(f"{folder}: {name} is not as in {folders[0]}; average adapters of the same modules")
