"""What rounds have made of an adapter, as an ordinary PEFT adapter."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from peft import LoraConfig

from splitllm.federated.factors import LowRank, padded, stacked
from splitllm.federated.rounds import FROZEN, A, B, Tensors, modules_in


def of_one_rank(whole: Mapping[str, LowRank], config: LoraConfig) -> tuple[Tensors, LoraConfig]:
    """Products as the tensors of an adapter file, all of the largest rank and of scale 1, with their configuration."""
    rank = max(each.rank for each in whole.values())
    tensors: Tensors = {}
    for module, each in whole.items():
        part = padded(each, rank)
        tensors |= {module + A: part.a_RD, module + B: part.b_OR * part.scale}
    config = copy.deepcopy(config)
    config.r = config.lora_alpha = rank
    config.use_rslora = False
    return tensors, config


def folded(tensors: Mapping[str, torch.Tensor], config: LoraConfig, *, scaled: bool) -> tuple[Tensors, LoraConfig]:
    """An adapter with what was frozen beside it.

    Args:
        tensors: by their names in an adapter file, and `frozen/NAME` of A and B of what was frozen.
        config: PEFT's, of the adapter alone.
        scaled: B is multiplied by its scale already, and ranks may differ.

    Returns:
        Tensors and configuration of one adapter of both; where nothing was frozen and nothing is scaled, the same.
    """
    trained = {name: tensor for name, tensor in tensors.items() if not name.startswith(FROZEN)}
    if len(trained) == len(tensors) and not scaled:
        return dict(trained), config
    own = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    whole: dict[str, LowRank] = {}
    for module in modules_in(trained):
        part = LowRank(trained[module + A], trained[module + B], 1.0 if scaled else own)
        if FROZEN + module + A in tensors:
            part = stacked([part, LowRank(tensors[FROZEN + module + A], tensors[FROZEN + module + B])], [1.0, 1.0])
        whole[module] = part
    return of_one_rank(whole, config)
