"""Whether two machines mean the same run: a digest of what must be equal on all of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from splitllm.recipe.loading import leaves

if TYPE_CHECKING:
    from splitllm.recipe.schema import Recipe

ADAPTER_FILE = "adapter_model.safetensors"
LOCAL_KEYS = frozenset(
    {
        *("model.base", "model.tokenizer", "lora.start_from"),
        *("data.source", "data.eval", "data.fields", "data.limit"),
        "split.memory_mib",
        *("train.threads", "train.checkpoint_every", "train.keep", "train.log_every", "train.trackers"),
        *("train.verify_adapter", "wire.addresses", "wire.certificates", "wire.memory_mib", "wire.keepalive"),
        "server.processes",
        *("server.quota.tokens_per_second", "server.quota.bytes_per_second", "server.tenants"),
        *(
            "server.zero.stage",
            "server.zero.offload_optimizer",
            "server.zero.offload_param",
            "server.zero.nvme_path",
            "server.fsdp",
        ),
        "rounds.exchange",
    }
)
"""Paths, names of fields, limits of a machine and what it writes down: these may differ between machines."""


def fingerprint(recipe: Recipe) -> str:
    """A digest of a recipe, 32 hex digits: equal where the same run is computed, whatever `LOCAL_KEYS` hold."""
    counted = {key: value for key, value in leaves(recipe) if key not in LOCAL_KEYS}
    counted["rounds.exchange"] = recipe.rounds.exchange is not None  # where that is counts as little as other places
    counted["split.tiers"] = list(recipe.split.tiers.items())  # their order counts, that of other mappings does not
    return hashlib.blake2b(json.dumps(counted, sort_keys=True).encode(), digest_size=16).hexdigest()


def start_digest(recipe: Recipe) -> str:
    """What training starts from: `new`, or a digest of the adapter in `lora.start_from`, 16 hex digits.

    Raises:
        OSError: that cannot be read.
    """
    if recipe.lora.start_from is None:
        return "new"
    with (Path(recipe.lora.start_from) / ADAPTER_FILE).open("rb") as file:  # as large as blocks that train in full
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
