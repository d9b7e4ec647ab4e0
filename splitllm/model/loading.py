"""Reading a checkpoint piece by piece: only the tensors a shard owns, only the embedding rows a batch needs.

Tensors are read with `preadv` into memory of their own rather than mapped: a mapped table becomes resident as soon as
the page cache is warm, and what is mapped is counted against the device. Nothing here unpickles.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from splitllm.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
MAX_HEADER_BYTES = 100_000_000  # the limit the safetensors format itself sets
OPENING_BYTES = 4096  # of every tensor, for telling one checkpoint from another
PIECE_BYTES = 4 * 2**20  # of the stored dtype in memory at once where it is converted


@dataclass(frozen=True)
class Entry:
    """Where one stored tensor lies: file, first byte, shape and dtype."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row along the first dimension."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.dtype.itemsize * math.prod(self.shape)


def read_index(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, by name.

    Raises:
        CheckpointError: the file is cut short or its header is not one of safetensors.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{file}: not a whole safetensors file (header of {length} bytes in {size})")
        try:
            header = json.loads(handle.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: its safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its safetensors header is no table of tensors")
    header.pop("__metadata__", None)
    return {name: _entry(file, name, row, 8 + length, size) for name, row in header.items()}


def _entry(file: Path, name: str, row: object, base: int, size: int) -> Entry:
    fields = row if isinstance(row, dict) else {}
    dtype = DTYPES.get(str(fields.get("dtype")))
    if dtype is None:
        raise CheckpointError(f"{file}: tensor {name} has dtype {fields.get('dtype')}, which cannot be read here")
    shape, offsets = _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    if shape is not None and offsets is not None and len(offsets) == 2:
        entry = Entry(file, base + offsets[0], shape, dtype)
        if entry.nbytes == offsets[1] - offsets[0] and entry.offset + entry.nbytes <= size:
            return entry
    raise CheckpointError(f"{file}: tensor {name} does not fit its file: the download or copy is not whole")


def _sizes(value: object) -> tuple[int, ...] | None:
    """A list of sizes as JSON has it, or None if it is anything else."""
    if not isinstance(value, list) or not all(type(side) is int and side >= 0 for side in value):
        return None
    return tuple(value)


class Checkpoint:
    """A Hugging Face checkpoint, local or from the hub, opened but not loaded.

    Attributes:
        name: folder or hub name.
        config: the text model's configuration (`get_text_config` of a multimodal one).
    """

    def __init__(self, model: str | Path, revision: str | None = None) -> None:
        self.name, self._revision = str(model), revision
        self.config = load_config(model, revision)
        self._file_of = _weight_map(self.name, revision)
        self._stored_as = {bare_name(name): name for name in self._file_of}
        self._indexes: dict[str, dict[str, Entry]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """That of its first tensor, for configurations that name none.

        Raises:
            CheckpointError: it has no tensors.
        """
        first = next((entry for name in self._file_of if (entry := self.find(name))), None)
        if first is None:
            raise CheckpointError(f"{self.name}: its files hold no tensors")
        return first.dtype

    def find(self, name: str) -> Entry | None:
        """The stored tensor for a parameter of the text model, whatever prefix the checkpoint gives its names.

        A hub file is fetched when the first of its tensors is asked for.

        Raises:
            CheckpointError: the file that should hold it is missing or not whole.
        """
        stored = name if name in self._file_of else self._stored_as.get(bare_name(name))
        return None if stored is None else self._index(self._file_of[stored]).get(stored)

    def _index(self, file: str) -> dict[str, Entry]:
        if file not in self._indexes:
            path = _fetch(self.name, file, self._revision)
            if path is None:
                raise CheckpointError(f"{self.name}: {file} is named by the index but missing")
            self._indexes[file] = read_index(path)
        return self._indexes[file]

    def read(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """One tensor, in memory of its own, converted to `dtype`.

        Raises:
            CheckpointError: it is missing, or its shape is not `shape`.
        """
        entry = self.require({name: tuple(shape)})[name]
        rows = entry.shape[0] if entry.shape else 1
        if entry.dtype == dtype:
            return _read(entry, [(0, rows)]).reshape(entry.shape)
        return _read_as(entry, rows, dtype)

    def pieces(self, name: str, shape: Sequence[int], nbytes: int, multiple: int = 1) -> Iterator[torch.Tensor]:
        """One tensor as it is stored, some rows at a time.

        Args:
            name: of the parameter.
            shape: that it has to have.
            nbytes: of a piece, about.
            multiple: of which every piece but the last has its number of rows.

        Raises:
            CheckpointError: it is missing, or its shape is not `shape`.
        """
        entry = self.require({name: tuple(shape)})[name]
        step = max(1, nbytes // max(1, entry.row_bytes * multiple)) * multiple
        for start in range(0, entry.shape[0], step):
            yield _read(entry, [(start, min(start + step, entry.shape[0]))]).reshape(-1, *entry.shape[1:])

    def require(self, wanted: dict[str, tuple[int, ...]]) -> dict[str, Entry]:
        """The entries for `wanted` (name -> shape).

        Raises:
            CheckpointError: with one line for every tensor that is missing, misshapen or of integers.
        """
        found = {name: self.find(name) for name in wanted}
        missing = [f"{self.name}: tensor {name} is missing" for name, entry in found.items() if entry is None]
        misshapen = [
            f"{self.name}: tensor {name} has shape {list(entry.shape)}, the configuration wants {list(wanted[name])}"
            for name, entry in found.items()
            if entry is not None and entry.shape != tuple(wanted[name])
        ]
        whole = [
            f"{self.name}: tensor {name} holds {str(entry.dtype).removeprefix('torch.')}: weights are floats"
            for name, entry in found.items()
            if entry is not None and not entry.dtype.is_floating_point
        ]
        if missing or misshapen or whole:
            raise CheckpointError("\n".join(line for lines in (missing, misshapen, whole) for line in _shorten(lines)))
        return {name: entry for name, entry in found.items() if entry is not None}

    def digest(self) -> str:
        """Of its configuration and of its tensors' names, shapes, dtypes and first bytes, which are cheap to read.

        Of a checkpoint on the hub in several files the names stand for the tensors: nothing is fetched for this.

        Raises:
            CheckpointError: a file is not whole.
        """
        digest = blake2b(digest_size=16)
        config = _fetch(self.name, CONFIG_NAME, self._revision)
        digest.update(config.read_bytes() if config else b"")
        local = Path(self.name).is_dir()
        for name, file in sorted(self._file_of.items()):
            at_hand = file == SAFE_WEIGHTS_NAME or (local and (Path(self.name) / file).exists())
            entry = self._index(file).get(name) if at_hand else None
            digest.update(f"|{name}".encode())
            if entry is not None:
                digest.update(f"{entry.shape}{entry.dtype}".encode() + _opening(entry))
        return digest.hexdigest()

    def rows(self, name: str, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows `ids` (sorted, distinct) of a table, [len(ids), D], without touching the others."""
        entry = self.find(name)
        if entry is None:
            raise CheckpointError(f"{self.name}: tensor {name} is missing")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < entry.shape[0]:
            raise CheckpointError(
                f"{self.name}: token id {int(ids.max())} is beyond the table of {entry.shape[0]} rows: "
                "the tokenizer does not belong to this model"
            )
        return _read(entry, _runs(ids.tolist())).reshape(-1, *entry.shape[1:]).to(dtype)


def load_config(model: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """The text model's configuration.

    Raises:
        CheckpointError: the folder or hub name has no readable config.json.
    """
    if not Path(model).is_dir() and not HUB_NAME.fullmatch(str(model)):
        raise CheckpointError(f"model.base: there is no folder {model} (seen from {Path.cwd()}); correct the path")
    try:
        text: PreTrainedConfig = AutoConfig.from_pretrained(str(model), revision=revision).get_text_config(decoder=True)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"model.base: cannot read a configuration from {model}: {reason} "
            "(give a local folder with config.json, or a hub name that this machine can reach)"
        ) from error
    return text


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of transformers inside."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _fetch(model: str, file: str, revision: str | None) -> Path | None:
    """A checkpoint's file, from its folder or the hub; None if it has no such file."""
    path: str | None = cached_file(model, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return Path(path) if path else None


def _weight_map(model: str, revision: str | None) -> dict[str, str]:
    """Stored tensor -> the safetensors file that holds it."""
    single = _fetch(model, SAFE_WEIGHTS_NAME, revision)
    if single:
        return dict.fromkeys(read_index(single), SAFE_WEIGHTS_NAME)
    index = _fetch(model, SAFE_WEIGHTS_INDEX_NAME, revision)
    if not index:
        raise CheckpointError(f"model.base: {model} has no {SAFE_WEIGHTS_NAME} (weights must be safetensors)")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): Path(file).name for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not the index of a sharded checkpoint (it has no weight_map)") from error


def bare_name(name: str) -> str:
    """A tensor's name without the wrappers that checkpoints put before it (`model.language_model.`, `transformer.`)."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in {"model", "transformer", "language_model", "text_model"}:
        parts = parts[1:]
    return ".".join(parts)


def _runs(ids: Iterable[int]) -> list[tuple[int, int]]:
    """Sorted distinct rows as half-open runs, so that neighbours are read at once."""
    runs: list[tuple[int, int]] = []
    for row in ids:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return runs


def _read(entry: Entry, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The given runs of rows, one after another, as a flat tensor of the stored dtype."""
    row_bytes = entry.row_bytes if entry.shape else entry.nbytes
    flat = torch.empty(sum(stop - start for start, stop in runs) * row_bytes, dtype=torch.uint8)
    view, done = memoryview(flat.numpy().data), 0
    descriptor = os.open(entry.file, os.O_RDONLY)
    try:
        for start, stop in runs:
            position, end = entry.offset + start * row_bytes, done + (stop - start) * row_bytes
            while done < end:
                count = os.preadv(descriptor, [view[done : min(end, done + (1 << 30))]], position)
                if count <= 0:
                    raise CheckpointError(f"{entry.file}: ends in the middle of a tensor")
                done, position = done + count, position + count
    finally:
        os.close(descriptor)
    return flat.view(entry.dtype)


def _opening(entry: Entry) -> bytes:
    """The first bytes of a stored tensor."""
    with entry.file.open("rb") as handle:
        handle.seek(entry.offset)
        return handle.read(min(entry.nbytes, OPENING_BYTES))


def _read_as(entry: Entry, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """The whole tensor in another dtype, converted piece by piece: it is never in memory in both."""
    whole = torch.empty(entry.shape, dtype=dtype)
    flat, width = whole.view(-1), entry.row_bytes // entry.dtype.itemsize
    step = max(1, PIECE_BYTES // max(1, entry.row_bytes))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        flat[start * width : stop * width] = _read(entry, [(start, stop)])
    return whole


def _shorten(lines: list[str], most: int = 8) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"... and {len(lines) - most} more like these"]
