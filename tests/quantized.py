"""What quantised weights stand for, worked out from bitsandbytes' whole-tensor functions in fp64."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from splitllm.model.loading import quiet_transformers
from tests.families import checkpoint_folder

METHODS: dict[str, dict[str, Any]] = {
    "nf4": {"method": "nf4"},
    "nf4 double": {"method": "nf4", "double": True},
    "int8": {"method": "int8"},
}


def stands_for(weight_OD: torch.Tensor, method: str) -> torch.Tensor:
    """The numbers in fp64 that a weight [O, D] of any dtype becomes."""
    if method == "int8":
        codes_OD, scales_O, _ = functional.int8_vectorwise_quant(weight_OD.to(torch.float16))
        return codes_OD.double() * scales_O.double()[:, None] / 127
    double = method == "nf4 double"
    packed, state = functional.quantize_4bit(
        weight_OD.float(), blocksize=64, quant_type="nf4", compress_statistics=double
    )
    scales = state.absmax.double()
    if double:
        outer = state.state2.absmax.double()[torch.arange(len(scales)) // 256]
        scales = state.state2.code.double()[state.absmax.long()] * outer + state.offset.double()
    table, pairs = functional.get_4bit_type("nf4", "cpu").double(), packed.reshape(-1).long()
    numbers = table[torch.stack([pairs >> 4, pairs & 15], 1).reshape(-1)][: weight_OD.numel()]
    return (numbers * scales[torch.arange(weight_OD.numel()) // 64]).reshape(weight_OD.shape)


@cache
def dequantized_folder(family: str, methods: tuple[str | None, ...]) -> Path:
    """The tiny base of a family with the numbers that quantised weights stand for, stored in fp64.

    Args:
        family: as in `tests.families`.
        methods: of each block, a key of `METHODS` or None.
    """
    source, folder = checkpoint_folder(family), Path(tempfile.mkdtemp(prefix=f"{family}-rounded-"))
    shutil.copytree(source, folder, dirs_exist_ok=True)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    tensors = load_file(folder / "model.safetensors")
    for name, module in model.named_modules():
        parts = name.split(".")
        if not isinstance(module, torch.nn.Linear | Conv1D) or len(parts) < 4:
            continue
        method = methods[int(parts[2])]
        if method is not None:
            key, turned = f"{name}.weight", isinstance(module, Conv1D)
            assert key in tensors, key
            weight = tensors[key].t().contiguous() if turned else tensors[key]
            rounded = stands_for(weight, method)
            tensors[key] = (rounded.t() if turned else rounded).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float64"
    return folder
