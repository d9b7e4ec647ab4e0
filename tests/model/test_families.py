"""Which families are admitted, and with what words the others are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from splitllm import Shard
from splitllm.errors import FamilyError
from splitllm.model import families, proof, shard
from splitllm.model.proof import admit, twin_config
from tests.families import CONFIGS, GEMMA, MIXED, SIZES

REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "encoder-decoder": (transformers.T5Config(), "t5 cannot be cut: it is an encoder-decoder"),
    "shared keys": (
        transformers.Gemma3nTextConfig(),
        "gemma3n_text cannot be cut: its upper blocks reuse the keys and values of lower ones",
    ),
    "per-layer inputs": (
        transformers.Gemma3nTextConfig(num_kv_shared_layers=0),
        "gemma3n_text cannot be cut: it feeds per-layer embeddings",
    ),
    "experts": (transformers.MixtralConfig(), "mixtral cannot be cut: it is a mixture of experts"),
    "experts under another name": (transformers.Qwen3MoeConfig(), "it is a mixture of experts"),
    "recurrent": (transformers.MambaConfig(), "mamba cannot be cut: it declares no pipeline plan"),
    "no plan": (transformers.OPTConfig(), r"opt .* has no row in the table of families \(gemma, .*add_a_family"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_is_refused_with_the_reason(case: str) -> None:
    config, reason = REFUSED[case]
    with pytest.raises(FamilyError, match=reason):
        admit(config)


def test_the_refusal_comes_before_any_weight_is_read(tmp_path: Any) -> None:
    transformers.MixtralConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes([2, *[0] * 7]) + b"{}")
    with pytest.raises(FamilyError, match="mixture of experts"):
        Shard.from_pretrained(tmp_path, 0, 1)


def rotary(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **values}


LLAMA3 = rotary("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
LONGROPE = rotary(
    "longrope",
    short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[2.0, 3.0, 4.0, 5.0],
    original_max_position_embeddings=8,
    factor=8.0,
)
PLAIN = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 4}
SETTINGS: dict[str, PreTrainedConfig] = {
    "sliding window": transformers.MistralConfig(**SIZES, sliding_window=3),
    "some sliding blocks": transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=2
    ),
    "sliding and full with two bases": transformers.Gemma3TextConfig(
        **GEMMA,
        layer_types=MIXED,
        rope_parameters={
            "sliding_attention": rotary("default"),
            "full_attention": rotary("linear", rope_theta=1e6, factor=8.0),
        },
    ),
    "llama 3 rope": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "linear rope": transformers.LlamaConfig(**SIZES, rope_parameters=rotary("linear", factor=2.0)),
    "longrope": transformers.Phi3Config(**SIZES, original_max_position_embeddings=8, rope_parameters=LONGROPE),
    "biases": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "multi-head": transformers.LlamaConfig(**PLAIN),
    "multi-query": transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 1}),
    "grouped": transformers.LlamaConfig(**{**SIZES, "num_attention_heads": 8, "num_key_value_heads": 2}),
    "wide heads": transformers.Qwen3Config(**SIZES, head_dim=32),
    "untied": transformers.Qwen2Config(**SIZES, tie_word_embeddings=False),
    "scaled by layer": transformers.GPT2Config(
        n_layer=6, n_embd=32, n_head=4, n_positions=64, scale_attn_by_inverse_layer_idx=True
    ),
    "dropout": transformers.GPT2Config(n_layer=6, n_embd=32, n_head=4, n_positions=64),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_are_kept_and_admitted(case: str) -> None:
    config = SETTINGS[case]
    admit(config, packed=True)
    twin = twin_config(config)
    sizes = {"num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"}
    sizes |= {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "layer_types", "n_inner"}
    sizes |= {"n_layer", "n_embd", "n_head"}
    before, after = config.to_dict(), twin.to_dict()
    assert {key for key in before if before[key] != after[key]} <= sizes
    assert set(getattr(twin, "layer_types", None) or []) == set(getattr(config, "layer_types", None) or [])


@pytest.mark.parametrize("family", CONFIGS)
def test_every_supported_family_is_admitted_packed_too(family: str) -> None:
    assert proof._verdict(CONFIGS[family](), None, True) is None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_kinds_of_attention_are_admitted(attention: str) -> None:
    assert proof._verdict(CONFIGS["gemma3"](), attention, False) is None


@pytest.mark.parametrize("family", ["granite", "cohere"])
def test_families_without_a_row_come_in_by_their_plan(family: str) -> None:
    assert family not in families.FAMILIES
    assert families.layout_of(CONFIGS[family]()) == families.STANDARD


def test_the_proof_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    assert proof._verdict.__wrapped__(CONFIGS["gpt2"](), None, False) is None
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(FamilyError):
        admit(SETTINGS["dropout"], "no such attention")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_proof_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    admit(CONFIGS["gpt2"]())
    monkeypatch.setattr(proof, "_compare", lambda *_: pytest.fail("the twin was cut again"))
    admit(CONFIGS["gpt2"]())


# Families that are broken on purpose.


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was proved before is proved again, and not remembered."""
    monkeypatch.setattr(proof, "_verdict", proof._verdict.__wrapped__)


class OddConfig(LlamaConfig):
    """A decoder whose own loop scales between blocks by `rescale`, and which does not know packed rows."""

    model_type = "odd_llama"
    rescale: float = 1.0


class OddModel(LlamaModel):
    config_class = OddConfig

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        hidden_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(hidden_BSD.shape[1]).unsqueeze(0)
        rotation = self.rotary_emb(hidden_BSD, position_ids)
        for layer in self.layers:
            hidden_BSD = layer(hidden_BSD, position_embeddings=rotation) * self.config.rescale
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_BSD))


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.model = OddModel(config)
        self.post_init()


AutoConfig.register("odd_llama", OddConfig, exist_ok=True)
AutoModelForCausalLM.register(OddConfig, OddForCausalLM, exist_ok=True)


def test_a_family_that_computes_between_its_blocks_is_refused_with_the_errors() -> None:
    with pytest.raises(FamilyError, match="odd_llama cannot be cut: a cut twin differs") as raised:
        admit(OddConfig(**SIZES, rescale=1.5))
    assert all(name in str(raised.value) for name in ("logits by", "loss by", "gradient of block 0 by"))


def test_a_family_that_mixes_the_documents_of_a_row_is_refused_only_for_packing() -> None:
    config = OddConfig(**SIZES)
    admit(config)
    with pytest.raises(FamilyError, match=r"packed rows differ from the rows alone by .*: set data\.pack=false"):
        admit(config, packed=True)


def test_a_shard_that_repeats_what_comes_before_block_0_is_refused(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(self: shard.Entry, hidden_BSD: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        assert self.hidden_BSD is not None
        return self.hidden_BSD + (hidden_BSD - self.hidden_BSD.detach())

    monkeypatch.setattr(shard.Entry, "forward", leaky)
    with pytest.raises(FamilyError, match="granite cannot be cut: a cut twin differs"):
        admit(CONFIGS["granite"]())  # scales its embeddings
    monkeypatch.setitem(families.FAMILIES, "gpt2", replace(families.FAMILIES["gpt2"], positions=None))
    with pytest.raises(FamilyError, match="gpt2 cannot be cut: a cut twin differs"):
        admit(CONFIGS["gpt2"]())  # adds positions


def test_a_row_that_names_no_part_is_refused(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.FAMILIES, "llama", replace(families.STANDARD, blocks="stages"))
    with pytest.raises(FamilyError, match=r"llama cannot be cut: no small twin .*stages"):
        admit(CONFIGS["llama"]())


def test_a_family_whose_twin_does_not_load_is_refused(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitllm.model.loading.Checkpoint.find", lambda _self, _name: None)
    with pytest.raises(FamilyError, match=r"its twin does not load: .* is missing; "):
        admit(CONFIGS["llama"]())
