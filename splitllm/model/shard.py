"""A shard: the Hugging Face model itself, transparent where it holds nothing.

The whole model is built on the meta device, every part that another shard owns is replaced by a parameterless
`Passthrough`, only the owned tensors are read, and the model's own forward runs. Blocks keep their global index, so
masks, rotary tables, sliding windows and soft-caps stay those of the unsplit model.

Shape suffixes: B rows, S padded length, T real tokens of the batch, D hidden width, V vocabulary, U distinct token ids.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from splitllm.errors import CheckpointError
from splitllm.model.families import Layout, layout_of
from splitllm.model.gelu import make_lean
from splitllm.model.heads import Head
from splitllm.model.loading import Checkpoint
from splitllm.model.quantizing import quantize_blocks
from splitllm.model.randomness import EMBEDDINGS, DropoutKey, key_dropout
from splitllm.recipe import QuantizationRecipe


class Passthrough(nn.Module):
    """Stands for a module that another shard owns: hands its first argument on.

    Plain attributes of the module it replaces (such as `attention_type`) are kept, since forwards read them.
    """

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        plain = {name: value for name, value in vars(replaced).items() if isinstance(value, str | int | float)}
        self.__dict__.update({name: value for name, value in plain.items() if name != "training"})

    def forward(self, hidden_BSD: torch.Tensor, *_args: object, **_kwargs: object) -> torch.Tensor:
        """The input itself."""
        return hidden_BSD


class Entry(Passthrough):
    """In block 0's slot of a shard that starts higher: yields what came over the cut.

    Whatever the model did to its `inputs_embeds` before block 0 (scaling, position table, dropout) is thereby dropped.
    """

    hidden_BSD: torch.Tensor | None = None

    def forward(self, hidden_BSD: torch.Tensor, *_args: object, **_kwargs: object) -> torch.Tensor:
        """What came over the cut, [B, S, D]."""
        return hidden_BSD if self.hidden_BSD is None else self.hidden_BSD


class NoPositions(nn.Module):
    """Stands for a position table that another shard owns: adds nothing."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """A zero, whatever the positions."""
        return torch.zeros((), device=position_ids.device)


class Embeddings:
    """The frozen token embedding: the rows of a batch are read from the file; the table is never in memory.

    Attributes:
        table: the resident table, [V, D], where this role holds one anyway (a tied head); then it is used instead.
    """

    def __init__(self, module: nn.Module, name: str, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.module, self.name, self.checkpoint, self.dtype = module, name, checkpoint, dtype
        self.table: torch.Tensor | None = None
        module.padding_idx = None  # type: ignore[assignment]  # only steers gradients; the table is frozen

    def __call__(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Embed token ids.

        Returns:
            [B, S, D], scaled as the family scales them.

        Raises:
            CheckpointError: a token id is beyond the table.
        """
        if self.table is not None:
            return self._apply(self.table, ids_BS)
        ids_U, index_BS = torch.unique(ids_BS.cpu(), return_inverse=True)
        rows_UD = self.checkpoint.rows(self.name, ids_U, self.dtype).to(ids_BS.device)
        return self._apply(rows_UD, index_BS.to(ids_BS.device))

    def _apply(self, table_UD: torch.Tensor, ids_BS: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = torch.func.functional_call(self.module, {"weight": table_UD}, (ids_BS,))
        return hidden


class Shard(nn.Module):
    """Blocks `start` to `stop - 1` of a causal LM, with the embeddings if it starts at 0 and the head if it ends last.

    Attributes:
        model: the Hugging Face model, with a `Passthrough` wherever this shard owns nothing. LoRA goes in here.
        embeddings: the token embedding of a shard that starts at 0.
        head: final norm and head of a shard that ends last.
        key: what dropout masks are keyed by.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        start: int,
        stop: int,
        *,
        embeddings: Embeddings | None,
        head: Head | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.model, self.layout, self.start, self.stop = model, layout, start, stop
        self.embeddings, self.head = embeddings, head
        self.key = DropoutKey(seed)
        self._key_dropout()
        make_lean(model)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | Checkpoint,
        start: int = 0,
        stop: int | None = None,
        *,
        head: bool | None = None,
        dtype: torch.dtype | None = None,
        attention: str | None = None,
        revision: str | None = None,
        seed: int = 0,
        quantization: QuantizationRecipe | None = None,
    ) -> Shard:
        """Load one shard of a checkpoint, reading only its own tensors.

        Args:
            model: local folder, hub name, or an opened `Checkpoint`.
            start: first block; a shard that starts at 0 also embeds tokens.
            stop: block after the last one; None for the end of the model.
            head: whether final norm and head are held here; None for "if it ends the model". A client that computes the
                loss itself (the U-shape) holds them beside the first blocks.
            dtype: of the weights; None for the checkpoint's own.
            attention: transformers' `attn_implementation`; None for its default.
            revision: of a hub model.
            seed: keys the dropout masks.
            quantization: of the linear layers of its blocks, which are quantised while they are read; None for none.

        Returns:
            The shard, in evaluation mode, all its parameters frozen.

        Raises:
            FamilyError: the family cannot be cut exactly.
            CheckpointError: tensors are missing or misshapen, or the blocks do not exist.
        """
        from splitllm.model.proof import admit  # the proof itself cuts a twin with this class

        checkpoint = model if isinstance(model, Checkpoint) else Checkpoint(model, revision)
        admit(checkpoint.config, attention)
        return cls.cut(
            checkpoint,
            start,
            stop,
            head=head,
            dtype=dtype,
            attention=attention,
            seed=seed,
            quantization=quantization,
        )

    @classmethod
    def cut(
        cls,
        checkpoint: Checkpoint,
        start: int = 0,
        stop: int | None = None,
        *,
        head: bool | None = None,
        dtype: torch.dtype | None = None,
        attention: str | None = None,
        seed: int = 0,
        quantization: QuantizationRecipe | None = None,
        take: Callable[[nn.Module], None] | None = None,
    ) -> Shard:
        """As `from_pretrained`, for a family that has been admitted already; `take` gets each block once it is read."""
        config, layout = checkpoint.config, layout_of(checkpoint.config)
        blocks = config.num_hidden_layers
        stop = blocks if stop is None else stop
        if not 0 <= start <= stop <= blocks or (stop == 0 and start == 0):
            raise CheckpointError(
                f"blocks {start} to {stop} of {checkpoint.name}: the model has blocks 0 to {blocks - 1}"
            )
        embedding_name = f"{layout.base}.{layout.embeddings}.weight"
        dtype = dtype or config.dtype or checkpoint.dtype
        whole = meta_model(config, dtype, attention)
        embedding_module, norm, output = _parts(whole, layout)
        embeddings = Embeddings(embedding_module, embedding_name, checkpoint, dtype) if start == 0 else None
        top = Head(norm, output, config) if (stop == blocks if head is None else head) else None
        _hollow(whole, layout, start, stop)
        if quantization is not None:
            quantize_blocks(whole, f"{layout.base}.{layout.blocks}.", checkpoint, quantization)
        _load(whole, layout, checkpoint, dtype, take)
        if top is not None:
            top.load(checkpoint, f"{layout.base}.{layout.norm}", embedding_name, dtype)
            if embeddings is not None and config.tie_word_embeddings:
                embeddings.table = top.output.weight
        shard = cls(whole, layout, start, stop, embeddings=embeddings, head=top, seed=seed)
        return shard.requires_grad_(False).eval()

    def embed(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Token ids [B, S] to what the model takes as `inputs_embeds`, [B, S, D]."""
        assert self.embeddings is not None, "only a shard that starts at block 0 embeds tokens"
        return self.embeddings(ids_BS)

    def blocks(
        self,
        hidden_BSD: torch.Tensor,
        position_ids_BS: torch.Tensor | None = None,
        start: int | None = None,
        stop: int | None = None,
    ) -> torch.Tensor:
        """Run this shard's blocks, or some of them.

        Args:
            hidden_BSD: embedded tokens, or the activations that came over the cut, right-padded.
            position_ids_BS: restart at 0 with every document of a packed row; None otherwise.
            start: the first block that runs; None for this shard's first.
            stop: the block after the last that runs; None for this shard's.

        Returns:
            Activations after the last of these blocks, before the final norm, [B, S, D].
        """
        start, stop = self.start if start is None else start, self.stop if stop is None else stop
        if start == stop:
            return hidden_BSD
        with self._only(start, stop):
            return self._run(hidden_BSD, position_ids_BS)

    def _run(self, hidden_BSD: torch.Tensor, position_ids_BS: torch.Tensor | None) -> torch.Tensor:
        base: nn.Module = getattr(self.model, self.layout.base)
        entry = getattr(base, self.layout.blocks)[0]
        inputs_BSD = hidden_BSD
        if isinstance(entry, Entry):
            entry.hidden_BSD, inputs_BSD = hidden_BSD, hidden_BSD.detach()
        try:
            result = base(inputs_embeds=inputs_BSD, position_ids=position_ids_BS, use_cache=False)
        finally:
            if isinstance(entry, Entry):
                entry.hidden_BSD = None
        out_BSD: torch.Tensor = result.last_hidden_state
        return out_BSD

    @contextmanager
    def _only(self, start: int, stop: int) -> Iterator[None]:
        """Meanwhile the blocks of this shard outside `start` to `stop - 1` are transparent."""
        blocks = getattr(getattr(self.model, self.layout.base), self.layout.blocks)
        aside = {layer: blocks[layer] for layer in range(self.start, self.stop) if not start <= layer < stop}
        for layer, block in aside.items():
            blocks[layer] = Passthrough(block)
        try:
            yield
        finally:
            for layer, block in aside.items():
                blocks[layer] = block

    def forward(self, inputs: torch.Tensor, position_ids_BS: torch.Tensor | None = None) -> torch.Tensor:
        """Token ids [B, S] (a shard that starts at 0) or activations [B, S, D] to activations, or logits [B, S, V]."""
        hidden_BSD = self.embed(inputs) if self.embeddings is not None else inputs
        out_BSD = self.blocks(hidden_BSD, position_ids_BS)
        ends = self.head is not None and self.stop == self.model.config.num_hidden_layers
        return self.head.logits(out_BSD) if ends and self.head is not None else out_BSD

    def own_blocks(self) -> list[nn.Module]:
        """The blocks that it holds, bottom up."""
        blocks = getattr(getattr(self.model, self.layout.base), self.layout.blocks)
        return [blocks[layer] for layer in range(self.start, self.stop)]

    def replica(self) -> Shard:
        """Another role's copy: its own adapter, the same frozen tensors in memory."""
        frozen = {id(p): p for p in self.parameters() if not p.requires_grad}
        shared: dict[int, object] = {**frozen, id(self.model.config): self.model.config}
        if self.embeddings is not None:
            shared[id(self.embeddings)] = self.embeddings
        shared.update({id(buffer): buffer for buffer in self.buffers()})
        twin = copy.deepcopy(self, shared)
        for module in twin.model.modules():
            module._forward_pre_hooks.clear()
        twin._key_dropout()
        return twin

    def checkpoint_activations(self) -> None:
        """Keep only the blocks' inputs for the backward and run each block again there."""
        model, settings = self.model, {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.20 or so
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)

    def _key_dropout(self) -> None:
        base: nn.Module = getattr(self.model, self.layout.base)
        key_dropout(base, EMBEDDINGS, self.key)
        for layer in range(self.start, self.stop):
            key_dropout(getattr(base, self.layout.blocks)[layer], layer, self.key)


BUILDING = threading.RLock()
"""Held while a model is built or gets its adapter: transformers and PEFT patch torch meanwhile, for all threads."""


def meta_model(config: PreTrainedConfig, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """The whole model without its weights; buffers that no checkpoint holds (rotary frequencies) are real."""
    with BUILDING, init_empty_weights(include_buffers=False), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=attention
        )
    return model


def _parts(model: PreTrainedModel, layout: Layout) -> tuple[nn.Module, nn.Module, nn.Linear]:
    """Embedding, final norm and output projection."""
    base = getattr(model, layout.base)
    output = model.get_output_embeddings()
    assert isinstance(output, nn.Linear)
    return getattr(base, layout.embeddings), getattr(base, layout.norm), output


def _hollow(model: PreTrainedModel, layout: Layout, start: int, stop: int) -> None:
    """Replace what this shard does not hold inside the decoder; norm, head and embedding are called from outside it."""
    base = getattr(model, layout.base)
    blocks = getattr(base, layout.blocks)
    for layer in range(len(blocks)):
        if not start <= layer < stop:
            blocks[layer] = Entry(blocks[layer]) if layer == 0 else Passthrough(blocks[layer])
    for name in (layout.embeddings, layout.norm):
        setattr(base, name, Passthrough(getattr(base, name)))
    model.set_output_embeddings(Passthrough(model.get_output_embeddings()))
    if layout.positions and start > 0:
        setattr(base, layout.positions, NoPositions())


def _load(
    model: PreTrainedModel,
    layout: Layout,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    take: Callable[[nn.Module], None] | None,
) -> None:
    """Read every tensor that is still on the meta device, block by block where these are taken one by one."""
    checkpoint.require({name: tuple(p.shape) for name, p in model.named_parameters() if p.is_meta})
    if take is not None:
        for block in getattr(getattr(model, layout.base), layout.blocks):
            prefix = next(name for name, module in model.named_modules() if module is block)
            _read_into(block, f"{prefix}.", checkpoint, dtype)
            take(block)
    _read_into(model, "", checkpoint, dtype)


def _read_into(module: nn.Module, prefix: str, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    wanted = {name: tuple(p.shape) for name, p in module.named_parameters() if p.is_meta}
    state = {name: checkpoint.read(prefix + name, shape, dtype) for name, shape in wanted.items()}
    module.load_state_dict(state, strict=False, assign=True)
