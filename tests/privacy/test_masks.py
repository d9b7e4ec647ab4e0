"""A mask is the key stream of ChaCha20, whatever the size, and comes off again."""

from __future__ import annotations

import numpy as np
import pytest

from splitllm.privacy.masks import add_mask, random_words, subtract_mask

KEY = bytes(range(32))
STREAM_OF_ZERO_KEY = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
"""RFC 8439, A.1, test vector 1."""


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
def test_the_mask_is_the_published_key_stream(dtype: str) -> None:
    words = np.zeros(32 // np.dtype(dtype).itemsize, np.dtype(dtype).newbyteorder("="))
    add_mask(words, bytes(32))
    assert words.astype(dtype).tobytes().hex() == STREAM_OF_ZERO_KEY


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("size", [0, 1, 32_767, 32_768, 65_536, 65_537, 200_001])
def test_what_is_added_comes_off(dtype: type[np.unsignedinteger], size: int) -> None:
    before = np.full(size, np.iinfo(dtype).max, dtype)
    words = before.copy()
    add_mask(words, KEY)
    assert size < 2 or (words != before).sum() > 0.99 * size
    subtract_mask(words, KEY)
    assert (words == before).all()


def test_longer_masks_begin_like_shorter_ones_and_do_not_repeat() -> None:
    words = random_words(KEY, 100_000)
    assert (random_words(KEY, 40_000) == words[:40_000]).all()
    assert len(np.unique(words)) == 100_000


def test_a_key_that_differs_in_one_bit_has_another_mask() -> None:
    other = bytes([KEY[0] ^ 1, *KEY[1:]])
    assert (random_words(KEY, 1000) != random_words(other, 1000)).all()
