"""Fine-tune a transformer split over client, edge and cloud; the text stays, a PEFT adapter comes out.

Importing this package is light: torch is loaded when one of its names is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitllm.model.shard import Shard
    from splitllm.recipe import load_recipe
    from splitllm.train import train

__version__ = "0.1.0"
__all__ = ["Shard", "__version__", "load_recipe", "train"]

_HOMES = {"Shard": "splitllm.model.shard", "load_recipe": "splitllm.recipe", "train": "splitllm.train"}


class _Package(ModuleType):
    """This package, in which `train` stays the function: importing the module of that name would overwrite it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
