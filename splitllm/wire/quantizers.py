"""The arithmetic of the lossy codecs: a [T, D] tensor of floats to parts, and parts back to the tensor.

A codec is three functions: which parts there are (dtypes and shapes, from T and D alone), encode and decode. Parts lie
in the blob one after another, the widest dtype first, so that each is a view of it. Suffixes: T tokens, D channels, M
outlier channels, K kept entries a token, G groups of 32 channels, C channels of a group.
"""

from __future__ import annotations

import math
import zlib
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from splitllm.errors import PeerError

Part = tuple[torch.dtype, tuple[int, ...]]
GROUP = 32
_BLOCK = 1 << 15
_INT8_SHARE, _INT4_SHARE = 128, 256  # one outlier channel among so many
_SCALE = torch.finfo(torch.float8_e4m3fn).max
_BOTH_HALVES = 65280.0  # the largest value that bf16 and fp16 both hold
_LARGEST = torch.finfo(torch.float32).max


def narrow(values: Tensor, to: torch.dtype) -> Tensor:
    """Values as `to`, saturated where its range, or that of their own dtype when they return, ends."""
    most = _BOTH_HALVES if {values.dtype, to} == {torch.bfloat16, torch.float16} else torch.finfo(to).max
    return values.clamp(-most, most).to(to)


# int8: a token's values over its largest magnitude, but for the outlier channels, which travel in bf16.


def int8_parts(tokens: int, width: int) -> list[Part]:
    """Scale of each token, outlier channels, their values, codes."""
    return [(torch.float32, (tokens,)), *_outlier_parts(tokens, width, _INT8_SHARE), (torch.int8, (tokens, width))]


def int8_encode(values_TD: Tensor) -> list[Tensor]:
    """Round to the nearest of 255 values a token."""
    rest_TD, ids_M, kept_TM = _without_outliers(values_TD, _INT8_SHARE)
    most = _most(values_TD.dtype) / 127 * (1 - 2**-20)
    scale_T1 = (rest_TD.abs().amax(1, keepdim=True) / 127).clamp_(max=most)
    codes_TD = _codes(rest_TD, scale_T1, -127, 127).to(torch.int8)
    return [scale_T1, ids_M, kept_TM, codes_TD]


def int8_decode(parts: list[Tensor], width: int) -> Tensor:
    """Codes times scales, outlier channels put back."""
    scale_T, ids_M, kept_TM, codes_TD = parts
    return _with_outliers(codes_TD.float().mul_(scale_T.unsqueeze(1)), ids_M, kept_TM, width)


# int4: like int8 by groups, the scale of a group being eight bits times that of its token. The scale has the sign
# that puts the group's largest magnitude at code -8, so all 16 codes are used. Rounding is dithered: noise of half a
# step at most is added before and, since both ends know it, subtracted after, so what is lost does not depend on the
# values (Schuchman 1964). Nearest rounding to so few values has a pattern, which the adapter would learn.


def int4_parts(tokens: int, width: int) -> list[Part]:
    """Outlier channels, their values, scale of each token, scales of its groups, codes (the even channel below)."""
    groups, pairs = -(-width // GROUP), -(-width // 2)
    scales: list[Part] = [(torch.bfloat16, (tokens,)), (torch.float8_e4m3fn, (tokens, groups))]
    return [*_outlier_parts(tokens, width, _INT4_SHARE), *scales, (torch.uint8, (tokens, pairs))]


def int4_encode(values_TD: Tensor) -> list[Tensor]:
    """Round to the nearest of 16 values a group."""
    tokens, width = values_TD.shape
    rest_TD, ids_M, kept_TM = _without_outliers(values_TD, _INT4_SHARE)
    rest_TGC = pad(rest_TD, (0, -width % GROUP)).view(tokens, -1, GROUP)
    high_TG1, low_TG1 = rest_TGC.amax(2, keepdim=True), rest_TGC.amin(2, keepdim=True)
    peak_TG1 = torch.where(high_TG1 >= -low_TG1, high_TG1, low_TG1)
    most = _most(values_TD.dtype) / (8.5 * _SCALE) * (1 - 2**-7)
    scale_T = (peak_TG1.abs().amax((1, 2)) / (8 * _SCALE)).clamp_(max=most).bfloat16()
    token_T11 = scale_T.float().view(-1, 1, 1)
    share_TG1 = (_over(peak_TG1, token_T11) / -8).clamp_(-_SCALE, _SCALE).to(torch.float8_e4m3fn)
    steps_TGC = _over(rest_TGC, share_TG1.float() * token_T11)
    codes_TGC = steps_TGC.add_(_dither(scale_T, rest_TGC.shape)).round_().clamp_(-8, 7)
    codes_TD = codes_TGC.add_(8).to(torch.uint8).view(tokens, -1)[:, : width + width % 2]
    return [ids_M, kept_TM, scale_T, share_TG1, codes_TD[:, ::2] | codes_TD[:, 1::2] << 4]


def int4_decode(parts: list[Tensor], width: int) -> Tensor:
    """Codes times scales, outlier channels put back."""
    ids_M, kept_TM, scale_T, share_TG, pairs = parts
    tokens = len(pairs)
    codes_TD = torch.stack([pairs & 15, pairs >> 4], dim=2).view(tokens, -1)
    codes_TGC = pad(codes_TD, (0, share_TG.shape[1] * GROUP - codes_TD.shape[1])).view(tokens, -1, GROUP)
    scale_TG1 = (share_TG.float() * scale_T.float().unsqueeze(1)).unsqueeze(2)
    values_TGC = codes_TGC.float().sub_(8).sub_(_dither(scale_T, codes_TGC.shape)).mul_(scale_TG1)
    return _with_outliers(values_TGC.view(tokens, -1)[:, :width], ids_M, kept_TM, width)


def _dither(scale_T: Tensor, shape: torch.Size) -> Tensor:
    """Noise from -1/2 to 1/2 that is a function of the tokens' scales and of the place: 32-bit integers, hashed."""
    seed = zlib.crc32(scale_T.view(torch.uint8).numpy().data)
    noise = np.empty(shape.numel(), dtype=np.float32)
    for start in range(0, len(noise), _BLOCK):  # in the cache, some 20 times faster than all at once
        part = noise[start : start + _BLOCK]
        part[:] = _hashed(np.arange(seed + start, seed + start + len(part), dtype=np.uint64))
        part *= np.float32(2**-32)
        part -= np.float32(0.5)
    return torch.from_numpy(noise).view(shape)


def _hashed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """lowbias32 of github.com/skeeto/hash-prospector, of numbers of which the first shift sees more than 32 bits."""
    found = (numbers ^ numbers >> np.uint64(16)).astype(np.uint32)
    found *= np.uint32(0x7FEB352D)
    found ^= found >> np.uint32(15)
    found *= np.uint32(0x846CA68B)
    found ^= found >> np.uint32(16)
    return found


# topk: the entries of largest magnitude of each token; the others are zero.


def topk_parts(tokens: int, width: int, fraction: Fraction) -> list[Part]:
    """Channels of the kept entries, their values."""
    kept = min(width, max(1, math.ceil(fraction * width)))
    return [(_id_dtype(width), (tokens, kept)), (torch.bfloat16, (tokens, kept))]


def topk_encode(values_TD: Tensor, fraction: Fraction) -> list[Tensor]:
    """Keep `fraction` of each token's entries."""
    tokens, width = values_TD.shape
    (dtype, (_, kept)), _ = topk_parts(tokens, width, fraction)
    ids_TK = values_TD.abs().topk(kept, dim=1, sorted=False).indices
    return [ids_TK.to(dtype), narrow(values_TD.gather(1, ids_TK), torch.bfloat16)]


def topk_decode(parts: list[Tensor], width: int) -> Tensor:
    """Zeros with the kept entries in their places."""
    ids_TK, kept_TK = parts
    ids_TK = _ids(ids_TK, width)
    return torch.zeros(len(ids_TK), width).scatter_(1, ids_TK, kept_TK.float())


# What they share.


def half_encode(values_TD: Tensor, to: torch.dtype) -> list[Tensor]:
    """Round to a half precision, saturating."""
    return [narrow(values_TD, to)]


def _outlier_parts(tokens: int, width: int, share: int) -> list[Part]:
    count = -(-width // share)
    return [(_id_dtype(width), (count,)), (torch.bfloat16, (tokens, count))]


def _without_outliers(values_TD: Tensor, share: int) -> tuple[Tensor, Tensor, Tensor]:
    """The values in fp32 with the channels of largest magnitude zeroed, those channels, and their values."""
    width = values_TD.shape[1]
    peaks_D = values_TD.abs().amax(0)
    (dtype, (count,)), _ = _outlier_parts(1, width, share)
    ids_M = peaks_D.sort(descending=True, stable=True).indices[:count].sort().values
    kept_TM = narrow(values_TD[:, ids_M], torch.bfloat16)
    rest_TD = values_TD.clamp(-_LARGEST, _LARGEST) if values_TD.dtype == torch.float64 else values_TD
    rest_TD = rest_TD.to(torch.float32, copy=True)
    rest_TD[:, ids_M] = 0
    return rest_TD, ids_M.to(dtype), kept_TM


def _with_outliers(rest_TD: Tensor, ids_M: Tensor, kept_TM: Tensor, width: int) -> Tensor:
    rest_TD[:, _ids(ids_M, width)] = kept_TM.float()
    return rest_TD


def _codes(values: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return _over(values, scale).round_().clamp_(low, high)


def _over(values: Tensor, scale: Tensor) -> Tensor:
    """Values over their scales, zero where the scale is zero."""
    return values / scale.masked_fill(scale == 0, math.inf)


def _most(dtype: torch.dtype) -> float:
    """The largest value that fp32 arithmetic can hand back in this dtype."""
    return min(torch.finfo(dtype).max, _LARGEST)


def _id_dtype(width: int) -> torch.dtype:
    """Of channel numbers; two bytes hold the unsigned ones below 65,536."""
    return torch.int16 if width <= 1 << 16 else torch.int32


def _ids(stored: Tensor, width: int) -> Tensor:
    """Channel numbers as stored, checked to be channels."""
    ids = stored.long()
    if stored.dtype == torch.int16:
        ids &= 0xFFFF
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < width:
        raise PeerError(f"channel numbers {int(ids.min())} to {int(ids.max())} of a tensor {width} wide")
    return ids
