"""A configuration as a key: what was worked out for it once in a process is not worked out again."""

from __future__ import annotations

import copy
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

REMEMBERED = 4  # configurations whose keys are at hand


@dataclass(frozen=True)
class Key:
    """All that distinguishes a configuration.

    Attributes:
        described: its settings, as JSON.
        read: from settings to a configuration of its class.
    """

    described: str
    read: Callable[[dict[str, Any]], Any]

    def config(self) -> PreTrainedConfig:
        """A configuration of its own, as the one that this key was made of."""
        return self.read(json.loads(self.described))


def key_of(config: PreTrainedConfig) -> Key:
    """The key of a configuration as it is now; one that is changed has another."""
    kind, settings = type(config), vars(config)
    for known, then, key in tuple(_recent):
        if known is kind and then == settings:
            return key
    key = Key(config.to_json_string(), kind.from_dict)
    _recent.appendleft((kind, copy.deepcopy(settings), key))
    return key


_recent: deque[tuple[type[PreTrainedConfig], dict[str, Any], Key]] = deque(maxlen=REMEMBERED)
"""Writing the JSON takes a hundred times as long as comparing."""
