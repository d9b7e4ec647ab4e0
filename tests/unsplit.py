"""The reference: the whole model by transformers and PEFT alone, fed the micro-batches that the roles are fed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, get_scheduler

from splitllm.data.batching import BatchStream, MicroBatch
from splitllm.data.corpus import Corpus
from splitllm.model.loading import quiet_transformers
from splitllm.model.randomness import seed_of
from splitllm.recipe import Recipe

Tensors = dict[str, torch.Tensor]


def peft_key(name: str) -> str:
    """The name of a PeftModel's parameter in an adapter file."""
    bare = name.replace(".modules_to_save.default.", ".").replace(".default.weight", ".weight")
    return bare.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def bare(key: str) -> str:
    """A name in an adapter file without PEFT's prefix."""
    return key.removeprefix("base_model.model.")


def block_in(key: str) -> str:
    """The block, of a name in an adapter file."""
    return ".".join(bare(key).split(".")[:3])


class Masks(nn.Module):
    """Adapter dropout by a mask over the real tokens of the micro-batch, keyed by it and by the module's name."""

    def __init__(self, unsplit: Unsplit, name: str) -> None:
        super().__init__()
        self.of = lambda: (unsplit.recipe, unsplit._key, unsplit._lengths)
        self.name = name

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        recipe, key, lengths = self.of()
        if not self.training:
            return x_BSD
        generator = torch.Generator().manual_seed(seed_of("adapter dropout", recipe.seed, *key, self.name))
        kept_TD = torch.rand(sum(lengths), x_BSD.shape[2], generator=generator) >= recipe.lora.dropout
        kept_BSD = nn.utils.rnn.pad_sequence(torch.split(kept_TD, list(lengths)), batch_first=True)
        return x_BSD * kept_BSD / (1 - recipe.lora.dropout)


class Unsplit:
    """A PeftModel trained by a plain loop."""

    def __init__(self, recipe: Recipe, rows: Corpus, adapter: Tensors) -> None:
        self.recipe, lora = recipe, recipe.lora
        torch.manual_seed(99)
        with quiet_transformers():
            base = AutoModelForCausalLM.from_pretrained(recipe.model.base, dtype=getattr(torch, recipe.model.dtype))
        for parameter in base.parameters():
            parameter.data = parameter.data.clone()  # a mapped file is not aligned as fresh memory is: other rounding
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            use_rslora=lora.rslora,
            use_dora=lora.dora,
            target_modules=sorted({bare(key).split(".lora_")[0] for key in adapter if ".lora_" in key}),
            modules_to_save=sorted({".".join(bare(key).split(".")[:3]) for key in adapter if ".lora_" not in key})
            or None,
        )
        self.model: Any = get_peft_model(base, config)
        self.parameters = {peft_key(n): p for n, p in self.model.named_parameters() if p.requires_grad}
        assert set(self.parameters) == set(adapter)
        for name, parameter in self.parameters.items():
            parameter.data.copy_(adapter[name])
        train = recipe.train
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=train.optimizer.lr, weight_decay=train.optimizer.weight_decay
        )
        self.schedule = get_scheduler(
            train.schedule.name,
            self.optimizer,
            num_warmup_steps=train.schedule.warmup_steps,
            num_training_steps=train.steps,
        )
        self.streams = [BatchStream(part, train.batch_size, recipe.seed, c) for c, part in enumerate(rows.train)]
        self._key: tuple[int, int, int] = (0, 0, 0)
        self._key_dropout()

    def batches(self, step: int) -> Iterator[tuple[int, int, MicroBatch]]:
        """The micro-batches of a step, in the order of their ids."""
        for client, stream in enumerate(self.streams):
            for index in range(self.recipe.train.accumulate):
                yield client, index, stream.take(step * self.recipe.train.accumulate + index)

    def gradients(self, step: int) -> tuple[float, Tensors]:
        """Mean loss of a step and every clipped gradient."""
        self.optimizer.zero_grad()
        self.model.train()
        every = list(self.batches(step))
        labels = [sum(b.labels for c, _, b in every if c == client) for client in range(len(self.streams))]
        total = 0.0
        for client, index, batch in every:
            self._key = (step, client, index)
            loss = self.loss(batch)
            tenant = self.recipe.train.loss_weights == "tenant"
            weight = 1 / (len(labels) * labels[client]) if tenant else 1 / sum(labels)
            (loss * weight).backward()
            total += float(loss.detach())
        if self.recipe.train.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.train.clip_norm)
        return total / sum(labels), {name: p.grad.clone() for name, p in self.parameters.items()}

    def step(self, step: int) -> float:
        """One optimiser step; returns the mean loss."""
        loss, _ = self.gradients(step)
        self.optimizer.step()
        self.schedule.step()
        return loss

    def loss(self, batch: MicroBatch) -> torch.Tensor:
        """Summed cross-entropy of a micro-batch, from all logits."""
        self._lengths = batch.lengths
        inputs = {"input_ids": batch.ids_BS, "position_ids": batch.position_ids_BS, "use_cache": False}
        logits_BSV = self.model(**inputs).logits
        real_TV = torch.cat([row[:length] for row, length in zip(logits_BSV, batch.lengths, strict=True)])
        return F.cross_entropy(real_TV[batch.positions_N], batch.targets_N, reduction="sum")

    def _key_dropout(self) -> None:
        for name, module in self.model.base_model.model.named_modules():
            if isinstance(module, LoraLayer) and self.recipe.lora.dropout:
                module.lora_dropout["default"] = Masks(self, name)
        base = self.model.base_model.model
        decoder = getattr(base, base.base_model_prefix)
        blocks = decoder.h if hasattr(decoder, "h") else decoder.layers
        decoder.register_forward_pre_hook(lambda *_: self._reseed(-1))
        for layer, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, layer=layer: self._reseed(layer))

    def _reseed(self, layer: int) -> None:
        torch.manual_seed(seed_of("dropout", self.recipe.seed, *self._key, layer))
