"""Admission by proof: a small random twin of a family is cut and compared with itself unsplit.

The twin keeps every setting of the configuration but its sizes, is written as a checkpoint and read back through the
real loader. A family whose cut is not exact is refused by name, before real weights are touched.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from splitllm.checkpoint import writing
from splitllm.errors import FamilyError, SplitLLMError
from splitllm.model.families import layout_of
from splitllm.model.keyed import remembered
from splitllm.model.loading import Checkpoint, quiet_transformers
from splitllm.model.shard import Shard

TOLERANCE = 1e-9  # relative, fp64; a wrong cut errs by 1e-3 and more, rounding by 1e-15
PACKED_TOLERANCE = 1e-5  # some families take the softmax in fp32 whatever the dtype, and over another width here
VOCABULARY = 96
TOKENS = 12


def admit(config: PreTrainedConfig, attention: str | None = None, *, packed: bool = False) -> None:
    """Prove that this family comes out of the cut exactly as it went in.

    Args:
        config: of the text model.
        attention: transformers' `attn_implementation`.
        packed: prove also that a packed row equals its documents alone.

    Raises:
        FamilyError: it does not, or no twin can be built; the message names the family and the reason.
    """
    layout_of(config)
    reason = _verdict(config, attention, packed)
    if reason:
        raise FamilyError(f"model.base: {config.model_type} cannot be cut: {reason}")


@remembered(64)
def _verdict(config: PreTrainedConfig, attention: str | None, packed: bool) -> str | None:
    """Why the family is refused, or None."""
    state = torch.random.get_rng_state()
    try:
        with quiet_transformers():
            return _compare(twin_config(config), attention, packed)
    except SplitLLMError as error:
        return f"its twin does not load: {error}".replace("\n", "; ")
    except (
        StrictDataclassError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RuntimeError,
        ImportError,
    ) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        return f"no small twin of it could be built and run ({first})"
    finally:
        torch.random.set_rng_state(state)


def twin_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same configuration with few blocks, small widths and a small vocabulary."""
    twin = copy.deepcopy(config)
    _few_blocks(twin)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    twin.num_attention_heads = 4 if 1 < kv_heads < heads else 2
    twin.hidden_size = size * twin.num_attention_heads
    if getattr(config, "num_key_value_heads", None) is not None:
        twin.num_key_value_heads = min(kv_heads, 2)
    for name in ("intermediate_size", "n_inner"):
        if getattr(config, name, None):
            setattr(twin, name, 48)
    twin.vocab_size = VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(twin, name, 0)
    return twin


def _few_blocks(twin: PreTrainedConfig) -> None:
    """Keep four blocks, and at least one of every kind of layer."""
    kinds = getattr(twin, "layer_types", None)
    twin.num_hidden_layers = 4
    if kinds:
        distinct = list(dict.fromkeys(kinds))
        twin.layer_types = (distinct + kinds)[:4] if len(distinct) <= 4 else distinct
        twin.num_hidden_layers = len(twin.layer_types)


def _compare(config: PreTrainedConfig, attention: str | None, packed: bool) -> str | None:
    torch.manual_seed(0)
    whole: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, attn_implementation=attention
    )
    for parameter in whole.parameters():
        if parameter.dim() > 1:  # far from the tiny initial values, so that an error shows
            torch.nn.init.normal_(parameter, std=0.2)
    with tempfile.TemporaryDirectory() as folder:
        with writing(Path(folder)):
            _save(whole, Path(folder))
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation=attention)
        ids_BS = torch.randint(1, VOCABULARY, (2, TOKENS))
        reason = _cut_equals_whole(whole.eval(), Path(folder), ids_BS, attention)
        return reason or (_packed_equals_alone(whole, ids_BS) if packed else None)


def _save(whole: PreTrainedModel, folder: Path) -> None:
    """Not by `save_pretrained`, which imports DeepSpeed where that is installed, and writes on rank 0 only."""
    state, tied = whole.state_dict(), whole._tied_weights_keys or {}
    copies = {name for name, of in tied.items() if of in state and state[name].data_ptr() == state[of].data_ptr()}
    tensors = {name: tensor.contiguous() for name, tensor in state.items() if name not in copies}
    save_file(tensors, folder / SAFE_WEIGHTS_NAME, {"format": "pt"})
    whole.config.save_pretrained(folder)


def _cut_equals_whole(whole: PreTrainedModel, folder: Path, ids_BS: torch.Tensor, attention: str | None) -> str | None:
    checkpoint, layers = Checkpoint(folder), whole.config.num_hidden_layers
    options = {"dtype": torch.float64, "attention": attention}
    front, middle, top = (
        Shard.cut(checkpoint, start, stop, **options)  # type: ignore[arg-type]
        for start, stop in ((0, 1), (1, layers - 1), (layers - 1, layers))
    )
    blocks = getattr(getattr(whole, front.layout.base), front.layout.blocks)
    probe = [next(p for p in blocks[layer].parameters() if p.dim() > 1) for layer in range(layers)]
    logits_BSV = whole(input_ids=ids_BS, use_cache=False).logits
    targets = ids_BS[:, 1:].reshape(-1)
    loss = F.cross_entropy(logits_BSV[:, :-1].reshape(-1, VOCABULARY), targets, reduction="sum")
    wanted = torch.autograd.grad(loss, probe)

    names = {id(p): name for name, p in whole.named_parameters()}
    ours = [
        _owner(layer, layers, front, middle, top).model.get_parameter(names[id(p)]) for layer, p in enumerate(probe)
    ]
    for parameter in ours:
        parameter.requires_grad_(True)
    hidden_BSD = middle(front(ids_BS))
    assert top.head is not None
    last_BSD = top.blocks(hidden_BSD)
    split, _ = top.head.loss(last_BSD[:, :-1].reshape(-1, last_BSD.shape[-1]), targets)
    got = torch.autograd.grad(split, ours)
    errors = {
        "logits": _error(top.head.logits(last_BSD), logits_BSV),
        "loss": _error(split, loss),
        **{f"gradient of block {layer}": _error(a, b) for layer, (a, b) in enumerate(zip(got, wanted, strict=True))},
    }
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    listed = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
    return f"a cut twin differs from the unsplit one (relative errors: {listed})" if wrong else None


def _packed_equals_alone(whole: PreTrainedModel, ids_BS: torch.Tensor) -> str | None:
    length = ids_BS.shape[1]
    positions = torch.arange(length).repeat(ids_BS.shape[0]).unsqueeze(0)
    with torch.no_grad():
        alone = whole(input_ids=ids_BS, use_cache=False).logits
        packed = whole(input_ids=ids_BS.reshape(1, -1), position_ids=positions, use_cache=False).logits
    error = _error(packed.reshape(alone.shape), alone)
    return (
        None
        if error <= PACKED_TOLERANCE
        else f"packed rows differ from the rows alone by {error:.1e}: set data.pack=false"
    )


def _owner(layer: int, layers: int, front: Shard, middle: Shard, top: Shard) -> Shard:
    return front if layer == 0 else top if layer == layers - 1 else middle


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest wanted value."""
    got, wanted = got.detach(), wanted.detach()
    return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
