"""Codecs state their size, keep what they promise, and refuse bytes that cannot be theirs."""

from __future__ import annotations

import contextlib
import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitllm.errors import DivergedError, PeerError
from splitllm.wire import quantizers
from splitllm.wire.codecs import CODECS, DTYPES, Packed, codec, pack, unpack

NAMES = [*CODECS, "topk:0.05", "topk:0.5", "topk:1"]
LOSSY = [name for name in NAMES if name != "none"]
FLOATS = [dtype for dtype in DTYPES if dtype.is_floating_point]
WIDTHS = st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 128, 130, 193, 768]) | st.integers(1, 200)
EXPONENTS = st.floats(-30, 30) | st.just(0.0)

# The largest error of an element, as a share of the largest magnitude of its token. int4: a value like the peak, of the
# other sign, gets code 7 of 8 and half a step of dither, and the scale of its group has three bits of mantissa.
WORST = {"bf16": 2**-8, "fp16": 2**-10, "int8": 0.5 / 127 + 2**-8, "int4": 1 - 6.5 / 8 * (1 - 2**-4)}


def values_of(tokens: int, width: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def with_outliers(values: torch.Tensor, factor: float = 50.0) -> torch.Tensor:
    values = values.clone()
    values[:, [3, values.shape[1] // 2, -5]] *= factor
    return values


def in_range(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    most = torch.finfo(dtype).max
    return values.clamp(-most, most).to(dtype)


def error(values: torch.Tensor, name: str) -> float:
    return float((unpack(pack(values, name)) - values).norm() / values.norm())


@given(st.sampled_from(NAMES), st.integers(0, 9), WIDTHS, st.sampled_from(FLOATS), EXPONENTS, st.integers(0, 99))
def test_every_codec_is_as_long_as_it_says_finite_and_the_same_twice(
    name: str, tokens: int, width: int, dtype: torch.dtype, exponent: float, seed: int
) -> None:
    values = in_range(values_of(tokens, width, seed, 10**exponent), dtype)
    before = values.clone()
    packed = pack(values, name)
    assert packed.nbytes == packed.blob.numel() == codec(name).size(values.shape, dtype)
    assert packed.blob.dtype == torch.uint8 and packed.blob.dim() == 1
    decoded = unpack(packed)
    assert decoded.shape == values.shape and decoded.dtype == dtype
    assert torch.equal(pack(values.clone(), name).blob, packed.blob)
    assert torch.equal(values, before), "the sender goes on with its tensor"


@given(st.sampled_from(sorted(WORST)), st.integers(1, 6), WIDTHS, st.floats(-4, 4), st.integers(0, 99))
def test_no_element_is_further_off_than_a_step_of_its_token(
    name: str, tokens: int, width: int, exponent: float, seed: int
) -> None:
    values = values_of(tokens, width, seed, 10**exponent).float()
    off = (unpack(pack(values, name)) - values).abs().amax(1)
    assert bool((off <= WORST[name] * values.abs().amax(1) + 1e-7).all())


@given(st.integers(1, 6), WIDTHS, st.sampled_from(["0.05", "0.3", "1"]), st.integers(0, 99))
def test_topk_keeps_the_largest_entries_of_each_token_and_zeros_the_others(
    tokens: int, width: int, fraction: str, seed: int
) -> None:
    values = values_of(tokens, width, seed).bfloat16()  # what bf16 holds is kept exactly
    decoded = unpack(pack(values, f"topk:{fraction}"))
    kept = decoded != 0
    assert torch.equal(decoded[kept], values[kept])
    count = max(1, math.ceil(float(fraction) * width))
    assert kept.sum(1).tolist() == [count] * tokens
    if count < width:
        smallest = decoded.abs().masked_fill(~kept, math.inf).amin(1)
        assert bool((values.abs().masked_fill(kept, 0).amax(1) <= smallest).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (0, 5), (4, 0), (2, 3, 4)], ids=str)
def test_none_keeps_every_bit_of_every_dtype_and_shape_and_copies_nothing(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    values = (values_of(1, max(1, math.prod(shape))) * 100).to(dtype).flatten()[: math.prod(shape)].view(shape)
    packed = pack(values, "none")
    decoded = unpack(packed)
    assert torch.equal(decoded, values) and decoded.dtype == dtype and decoded.shape == values.shape
    if values.numel():
        assert decoded.data_ptr() == packed.blob.data_ptr() == values.data_ptr()


def test_none_travels_in_the_order_of_its_elements_whatever_its_strides() -> None:
    values = values_of(3, 4).t()
    assert torch.equal(unpack(pack(values, "none")), values)


def test_a_tensor_under_way_has_no_graph() -> None:
    values = values_of(2, 3).requires_grad_()
    assert all(not unpack(pack(values, name)).requires_grad for name in NAMES)


@pytest.mark.parametrize("name", LOSSY)
def test_zeros_stay_zeros(name: str) -> None:
    values = values_of(3, 70).float()
    values[1] = 0
    assert not unpack(pack(values, name))[1].any()
    assert not unpack(pack(torch.zeros(2, 70), name)).any()


@pytest.mark.parametrize(
    ("name", "share", "width"), [("int8", 1.05, 768), ("int8", 1.05, 2048), ("int4", 0.55, 768), ("int4", 0.55, 2048)]
)
def test_a_token_takes_no_more_bytes_than_promised(name: str, share: float, width: int) -> None:
    assert codec(name).size((64, width), torch.float32) <= share * width * 64


@pytest.mark.parametrize(
    ("name", "plain", "outliers"), [("bf16", 0.0018, 0.0018), ("int8", 0.008, 0.003), ("int4", 0.088, 0.028)]
)
def test_errors_stay_small_and_outlier_channels_do_not_make_them_larger(
    name: str, plain: float, outliers: float
) -> None:
    values = values_of(256, 768).float()
    assert error(values, name) <= plain
    assert error(with_outliers(values), name) <= outliers


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_outlier_channels_cost_the_others_nothing(name: str) -> None:
    values = values_of(64, 768).float()
    spoilt = with_outliers(values, 1e5)
    rest = [channel for channel in range(768) if bool((values[:, channel] == spoilt[:, channel]).all())]
    before, after = (unpack(pack(given, name)) - given for given in (values, spoilt))
    assert float(after[:, rest].norm()) <= 1.02 * float(before[:, rest].norm())


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_largest_values_of_a_dtype_saturate(name: str, dtype: torch.dtype) -> None:
    values = torch.full((2, 33), torch.finfo(dtype).max, dtype=dtype)
    values[1] *= -1
    decoded = unpack(pack(values, name))
    assert bool(decoded.isfinite().all())
    assert bool((decoded[0, decoded[0] != 0] > 0).all()) and bool((decoded[1, decoded[1] != 0] < 0).all())


def test_fp16_saturates_what_fp16_cannot_hold() -> None:
    decoded = unpack(pack(torch.tensor([[1e6, -1e6, 2.0]]), "fp16"))
    assert decoded.tolist() == [[65504.0, -65504.0, 2.0]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_sender_does_not_send_what_is_not_finite(name: str, value: float) -> None:
    values = values_of(4, 70)
    values[2, 5] = value
    with pytest.raises(DivergedError, match=r"^hidden_TD of client-0: a value is (nan|inf); lower"):
        pack(values, name, "hidden_TD of client-0")


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_any_bytes_of_the_right_number_are_a_finite_tensor_or_a_peers_mistake(name: str, data: st.DataObject) -> None:
    shape = (data.draw(st.integers(0, 4)), data.draw(st.integers(0, 40)))
    dtype = data.draw(st.sampled_from(FLOATS))
    size = codec(name).size(shape, dtype)
    blob = torch.frombuffer(bytearray(data.draw(st.binary(min_size=size, max_size=size)) or b"0"), dtype=torch.uint8)
    with contextlib.suppress(PeerError):
        decoded = unpack(Packed(name, dtype, shape, blob[:size]))
        assert bool(decoded.isfinite().all()) and tuple(decoded.shape) == shape and decoded.dtype == dtype


def test_a_peers_mistake_is_named_with_the_tensor_it_is_in() -> None:
    blob = torch.tensor([1.0, math.nan]).view(torch.uint8)
    with pytest.raises(PeerError, match=r"^rows_ND \(none, float32 \[2\]\): a value is nan$"):
        unpack(Packed("none", torch.float32, (2,), blob), "rows_ND")


@pytest.mark.parametrize("name", NAMES)
def test_a_blob_of_another_size_is_refused(name: str) -> None:
    packed = pack(values_of(4, 70).float(), name)
    for blob in (packed.blob[:-4], torch.cat([packed.blob, packed.blob[:4]]), packed.blob[:0]):
        with pytest.raises(PeerError, match=rf"{blob.numel()} bytes, but it takes {packed.nbytes}"):
            unpack(Packed(name, torch.float32, (4, 70), blob))


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("none", torch.float32, (-1, 3)),
        ("none", torch.float32, (0, 1 << 62, 1 << 62)),
        ("none", torch.complex64, (0,)),
        ("int8", torch.int64, (0, 3)),
        ("int8", torch.float32, (0,)),
        ("bf16", torch.bool, (0, 2)),
        ("lz4", torch.float32, (0,)),
    ],
)
def test_what_no_sender_could_mean_is_refused(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    with pytest.raises(PeerError):
        unpack(Packed(name, dtype, shape, torch.empty(0, dtype=torch.uint8)))


@pytest.mark.parametrize("name", ["int8", "int4", "topk:0.5"])
def test_channel_numbers_beyond_the_width_are_refused(name: str) -> None:
    packed = pack(values_of(4, 70).float(), name)
    blob = packed.blob.clone()
    blob[16 if name == "int8" else 0] = 200  # of 70 channels; before it int8 has four scales
    with pytest.raises(PeerError, match="channel numbers"):
        unpack(Packed(name, torch.float32, (4, 70), blob))


def test_a_bool_is_0_or_1() -> None:
    with pytest.raises(PeerError, match="a bool is 2"):
        unpack(Packed("none", torch.bool, (2,), torch.tensor([0, 2], dtype=torch.uint8)))


@pytest.mark.parametrize("name", ["topk:0.5", "int4", "int8"])
@pytest.mark.parametrize("width", [40_000, 65_536, 65_537])
def test_channel_numbers_reach_to_the_last_channel_of_wide_tensors(name: str, width: int) -> None:
    values = torch.zeros(1, width)
    values[0, -1] = 4.0
    assert unpack(pack(values, name))[0, -1] == 4.0


@pytest.mark.parametrize("name", ["", "topk", "topk:", "topk:0", "topk:0.0", "topk:1.5", "topk:-1", "topk:nan", "INT8"])
def test_an_unknown_codec_is_refused_with_the_names_of_all(name: str) -> None:
    with pytest.raises(PeerError, match=r"choose one of none, bf16, fp16, int8, int4, topk:FRACTION"):
        codec(name)


def test_integers_and_other_ranks_take_no_lossy_codec() -> None:
    for values in (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3), torch.zeros(1, 2, 3)):
        with pytest.raises(AssertionError, match="2-D floats"):
            pack(values, "int8")


def test_only_codecs_that_lose_much_carry_their_error_on() -> None:
    assert [name for name in NAMES if codec(name).feedback] == ["int4", "topk:0.05", "topk:0.5", "topk:1"]


def test_what_int4_loses_is_independent_of_the_values() -> None:
    values_TD = torch.full((2000, 32), 0.3)  # 2.4 of 8 steps: the nearest value would be 0.25
    values_TD[:, 0], values_TD[:, 1] = 10.0, 1.0  # the outlier channel, and the largest of the others
    lost_TD = 8 * (values_TD - unpack(pack(values_TD, "int4")))[:, 2:]
    assert lost_TD.abs().max() < 0.51  # half a step
    assert lost_TD.mean().abs() < 0.01
    assert (lost_TD.std() - 12**-0.5).abs() < 0.01


def noise_of(x: int) -> int:
    """As docs/wire.md has it, in integers of any size."""
    x = ((x ^ x >> 16) * 0x7FEB352D) % 2**32
    x = ((x ^ x >> 15) * 0x846CA68B) % 2**32
    return x ^ x >> 16


@given(st.integers(0, 2**32 - 1) | st.integers(2**32 - 50, 2**33), st.integers(1, 60))
def test_the_dither_is_the_documented_hash_of_numbers_beyond_32_bits_too(first: int, count: int) -> None:
    found = quantizers._hashed(np.arange(first, first + count, dtype=np.uint64))
    assert found.tolist() == [noise_of(x) for x in range(first, first + count)]


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_dither_of_a_tensor_is_that_of_its_places(tokens: int) -> None:
    """Over several blocks of the arithmetic."""
    scale_T = values_of(1, tokens)[0].bfloat16()
    noise_TGC = quantizers._dither(scale_T, torch.Size((tokens, 40, 32)))
    seed = zlib.crc32(scale_T.view(torch.uint8).numpy().tobytes())
    numbers = torch.tensor([noise_of(seed + place) for place in range(noise_TGC.numel())])
    assert torch.equal(noise_TGC.flatten(), numbers.float() * 2**-32 - 0.5)
