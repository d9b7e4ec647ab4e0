"""What is remembered of a configuration: by its settings as they are, and not by the object."""

from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedConfig

from splitllm.model.keyed import key_of, remembered
from tests.families import CONFIGS


def test_configurations_alike_have_one_key_and_a_changed_one_has_another() -> None:
    config, other = copy.deepcopy(CONFIGS["gemma3"]()), CONFIGS["gemma3"]()
    key = key_of(config)
    assert key_of(other) == key != key_of(CONFIGS["gemma2"]())
    config.num_hidden_layers = 3
    assert key_of(config) != key
    config.num_hidden_layers = other.num_hidden_layers
    assert key_of(config) == key
    config.layer_types[0] = "full_attention"  # in place
    assert key_of(config) != key == key_of(other)


def test_a_result_is_worked_out_once_for_each_configuration_and_argument() -> None:
    asked: list[tuple[int, int]] = []

    @remembered(8)
    def times(config: PreTrainedConfig, factor: int) -> int:
        asked.append((config.num_hidden_layers, factor))
        return config.num_hidden_layers * factor

    deep, shallow = CONFIGS["llama"](), CONFIGS["llama"]()
    shallow.num_hidden_layers = 2
    for _ in range(2):
        assert [times(each, factor) for each in (deep, shallow, CONFIGS["llama"]()) for factor in (1, 2)] == [
            *(6, 12),
            *(2, 4),
            *(6, 12),
        ]
    assert asked == [(6, 1), (6, 2), (2, 1), (2, 2)]


def test_what_fails_is_tried_again() -> None:
    asked = []

    @remembered(8)
    def fails(config: PreTrainedConfig) -> None:
        asked.append(config)
        raise ValueError("no shape")

    for _ in range(2):
        with pytest.raises(ValueError, match="no shape"):
            fails(CONFIGS["llama"]())
    assert len(asked) == 2
