"""What was worked out for a configuration once is not worked out again in this process."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, update_wrapper
from typing import Concatenate, ParamSpec, TypeVar

from transformers import PreTrainedConfig

REMEMBERED = 4  # configurations whose keys are at hand

Key = tuple[type[PreTrainedConfig], str, object]
P = ParamSpec("P")
T = TypeVar("T")
OfConfig = Callable[Concatenate[PreTrainedConfig, P], T]

_recent: deque[tuple[type[PreTrainedConfig], dict[str, object], Key]] = deque(maxlen=REMEMBERED)
"""To write a configuration as JSON takes a hundred times as long as to compare it."""


def key_of(config: PreTrainedConfig) -> Key:
    """All that distinguishes a configuration, as it is now."""
    kind, settings = type(config), vars(config)
    for known, then, key in tuple(_recent):
        if known is kind and then == settings:
            return key
    key = kind, config.to_json_string(), getattr(config, "_attn_implementation", None)
    _recent.appendleft((kind, copy.deepcopy(settings), key))
    return key


@dataclass(frozen=True)
class _Keyed:
    key: Key
    config: PreTrainedConfig = field(compare=False)


def remembered(size: int) -> Callable[[OfConfig[P, T]], OfConfig[P, T]]:
    """As `lru_cache`, for functions of a configuration and of what can be hashed; nobody may change what they return.

    Args:
        size: results that are kept.
    """

    def decorate(function: OfConfig[P, T]) -> OfConfig[P, T]:
        @lru_cache(maxsize=size)
        def found(keyed: _Keyed, *args: P.args, **kwargs: P.kwargs) -> T:
            return function(keyed.config, *args, **kwargs)

        def asked(config: PreTrainedConfig, /, *args: P.args, **kwargs: P.kwargs) -> T:
            return found(_Keyed(key_of(config), config), *args, **kwargs)  # type: ignore[arg-type]

        return update_wrapper(asked, function)

    return decorate
