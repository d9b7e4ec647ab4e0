"""What crosses a role's links, in bytes that it holds at once: micro-batches, the end of a step, the end of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig

from splitllm.model.lora import block_of
from splitllm.model.memory import adapter_bytes, dtype_of, full_bytes, hidden_bytes
from splitllm.policy.admission import MIB
from splitllm.recipe import Recipe, children_of, clients_below, holders, parent_of, role_bounds, tier_of
from splitllm.roles.under_way import at_once
from splitllm.wire.codecs import codec

FEEDBACK_ITEM = 2  # bytes of a number that error feedback remembers, twice


@dataclass(frozen=True, eq=False)
class Messages:
    """Of every role of a recipe.

    Attributes:
        recipe: as it was resolved.
        config: of the whole text model.
        modules: global names of the modules that LoRA adapts.
        rows: client -> of a micro-batch, as its server takes them.
        trained: role -> bytes of what it trains.
    """

    recipe: Recipe
    config: PreTrainedConfig
    modules: tuple[str, ...]
    rows: Callable[[int], int]
    trained: Callable[[str], int]

    def of(self, name: str) -> int:
        """What a role holds of them at most, and what codecs carry on; nothing crosses where there is one tier."""
        if len(self.recipe.split.tiers) == 1:
            return 0
        return max(self._micro_batches(name), self._sums(name), self._last_words(name)) + self.feedback(name)

    def feedback(self, name: str) -> int:
        """What codecs carry on from step to step: of all rows of the run, as far as there is memory for it."""
        wire, train, tiers = self.recipe.wire, self.recipe.train, len(self.recipe.split.tiers)
        ends = (codec(wire.up).feedback and self._is_below(name)) + (codec(wire.down).feedback and self._serves(name))
        if not ends or tiers == 1:
            return 0
        tokens = train.steps * train.accumulate * train.batch_size * self.recipe.data.max_length
        clients = len(clients_below(self.recipe, name))
        every = 2 * FEEDBACK_ITEM * tokens * int(self.config.hidden_size) * clients * ends
        return min(wire.feedback_mib * MIB, every)

    def _is_below(self, name: str) -> bool:
        return parent_of(self.recipe, name) is not None

    def _serves(self, name: str) -> bool:
        return tier_of(self.recipe, name)[0] > 0

    def _micro_batches(self, name: str) -> int:
        """Questions and answers: as they are, as bytes, and as frames; answers are kept until they have arrived."""
        wire, above, serves = self.recipe.wire, self._is_below(name), self._serves(name)
        under_way, found = at_once(self.recipe, self.config, self.modules, name), 0
        for client in clients_below(self.recipe, name):
            tokens = self.rows(client) * self.recipe.data.max_length
            shape, dtype = (tokens, int(self.config.hidden_size)), dtype_of(self.recipe)
            hidden, labels = hidden_bytes(self.recipe, self.config, self.rows(client)), 3 * 4 * tokens
            up, down = codec(wire.up).size(shape, dtype) + labels, codec(wire.down).size(shape, dtype)
            asked = (2 * up + down + hidden) * above
            served = (up + hidden + labels + 2 * down) * serves
            found += under_way * (asked + served) + 2 * down * serves
        return found

    def _sums(self, name: str) -> int:
        """Gradients that are summed over roles at the end of a step: what comes, the sum, and what goes up."""
        come = sum(3 * self._handed_up(child, self._summed) for child in children_of(self.recipe, name))
        return come + self._summed(name) + 3 * self._handed_up(name, self._summed) * self._is_below(name)

    def _last_words(self, name: str) -> int:
        """What trains goes up when the run ends: what comes, as bytes and as tensors, and what goes up."""
        come = sum(2 * self._handed_up(child, self.trained) for child in children_of(self.recipe, name))
        return come + 2 * self._handed_up(name, self.trained) * self._is_below(name)

    def _handed_up(self, name: str, own: Callable[[str], int]) -> int:
        """Of a role and of one of each kind below it."""
        children = children_of(self.recipe, name)
        return own(name) + max((self._handed_up(child, own) for child in children), default=0)

    def _summed(self, name: str) -> int:
        """Of what a role trains, that which other roles train as well."""
        counts = holders(self.recipe, self.config.num_hidden_layers)
        start, stop = role_bounds(self.recipe, self.config.num_hidden_layers)[name]
        modules = [module for module in self.modules if counts[block_of(self.config, module)] > 1]
        full = full_bytes(self.recipe, self.config, start, stop) if max(counts[start:stop], default=0) > 1 else 0
        return adapter_bytes(self.config, self.recipe.lora, modules, start, stop, dtype_of(self.recipe)) + full
