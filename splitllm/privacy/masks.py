"""Random words from a 32-byte key, by the cipher ChaCha20: who has not the key cannot tell them from uniform ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from splitllm.privacy.fixedpoint import Words

KEY_BYTES = 32
_PIECE = 1 << 18
_ZEROS = bytes(_PIECE)


def add_mask(words: Words, key: bytes) -> None:
    """Add the mask of a key, in place and modulo the words' power of two.

    Args:
        words: contiguous, one-dimensional.
        key: 32 random bytes that mask nothing else but what this mask is taken off from again.
    """
    for start, piece in _pieces(key, words.size, words.dtype):
        words[start : start + piece.size] += piece


def subtract_mask(words: Words, key: bytes) -> None:
    """Take off what `add_mask` adds."""
    for start, piece in _pieces(key, words.size, words.dtype):
        words[start : start + piece.size] -= piece


def random_words(key: bytes, size: int) -> npt.NDArray[np.uint64]:
    """So many words of 64 bits."""
    words = np.zeros(size, np.uint64)
    add_mask(words, key)
    return words


def _pieces(key: bytes, size: int, dtype: np.dtype[np.unsignedinteger]) -> Iterator[tuple[int, Words]]:
    """The mask in pieces that stay in the processor's cache; each is overwritten by the next."""
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    buffer = bytearray(_PIECE)
    each = _PIECE // dtype.itemsize
    for start in range(0, size, each):
        stream.update_into(_ZEROS, buffer)
        yield start, np.frombuffer(buffer, dtype.newbyteorder("<"))[: size - start]
