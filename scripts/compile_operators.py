"""Compile what DeepSpeed needs to hold weights in files, so that no test waits for it; `make operators`."""

from __future__ import annotations

import time

import torch

from splitllm.engines.zero import library
from splitllm.errors import RecipeError
from splitllm.recipe import ZeroRecipe


def main() -> None:
    """Compile into TORCH_EXTENSIONS_DIR; what was compiled before is left as it is."""
    started = time.monotonic()
    try:
        library(ZeroRecipe(stage=3, offload_param="nvme", nvme_path="unused"), torch.device("cpu"))
    except RecipeError as error:
        print(f"nothing is compiled: {error}")
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    AsyncIOBuilder().load(verbose=False)
    print(f"operators for files are there after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
