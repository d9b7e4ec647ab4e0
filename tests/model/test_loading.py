"""Reading checkpoints: hostile and torn files are named and refused, and only what is asked for is read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from splitllm import Shard
from splitllm.errors import CheckpointError
from splitllm.model.loading import Checkpoint, bare_name, load_config, quiet_transformers, read_index
from tests.families import VOCABULARY, checkpoint_folder

EMBEDDING = "model.embed_tokens.weight"
TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.arange(5), "c": torch.tensor(2.5, dtype=torch.bfloat16)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, for whatever weights a test writes into it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = (checkpoint_folder("llama") / "config.json").read_bytes()
    (folder / "config.json").write_bytes(config)
    return folder


def write(folder: Path, content: bytes) -> Path:
    file = folder / "model.safetensors"
    file.write_bytes(content)
    return file


def stored(tensors: dict[str, torch.Tensor], folder: Path) -> bytes:
    save_file(tensors, folder / "whole")
    return (folder / "whole").read_bytes()


def of_header(header: Any, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def copied(family: str, folder: Path, rename: Callable[[str], str] = str) -> Path:
    """A checkpoint with other names for its tensors."""
    source = checkpoint_folder(family)
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def check_refused_or_read(folder: Path, content: bytes) -> None:
    """Either a CheckpointError, or every tensor of floats holds exactly the bytes that its entry points at."""
    file = write(folder, content)
    try:
        entries = read_index(file)
    except CheckpointError:
        return
    checkpoint = Checkpoint(folder)
    for name, entry in entries.items():
        assert 8 <= entry.offset <= entry.offset + entry.nbytes <= len(content)
        if not entry.dtype.is_floating_point:
            with pytest.raises(CheckpointError, match=r"weights are floats"):
                checkpoint.read(name, entry.shape, entry.dtype)
            continue
        tensor = checkpoint.read(name, entry.shape, entry.dtype)
        assert tuple(tensor.shape) == entry.shape and tensor.dtype == entry.dtype
        raw = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
        assert raw == content[entry.offset : entry.offset + entry.nbytes]


@settings(max_examples=150)
@given(data=st.data())
def test_any_bytes_of_the_header_may_be_wrong(place: Path, data: st.DataObject) -> None:
    content = bytearray(stored(TENSORS, place))
    length = 8 + struct.unpack("<Q", content[:8])[0]
    for spot, byte in data.draw(st.lists(st.tuples(st.integers(0, length - 1), st.integers(0, 255)), min_size=1)):
        content[spot] = byte
    check_refused_or_read(place, bytes(content))


@settings(max_examples=40)
@given(keep=st.integers(0, 400))
def test_a_file_cut_short_is_refused(place: Path, keep: int) -> None:
    content = stored(TENSORS, place)
    if keep < len(content):
        with pytest.raises(CheckpointError, match=r"not a whole safetensors file|does not fit its file"):
            read_index(write(place, content[:keep]))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-70, 70) | st.floats() | st.sampled_from(["F32", "I64", "F8", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape"]), inner),
    max_leaves=5,
)
ROWS = st.fixed_dictionaries({}, optional={"dtype": ANYTHING, "shape": ANYTHING, "data_offsets": ANYTHING})


@settings(max_examples=200)
@given(header=ANYTHING | st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ANYTHING | ROWS))
def test_any_json_may_stand_where_the_header_belongs(place: Path, header: Any) -> None:
    check_refused_or_read(place, of_header(header))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a whole safetensors file"),
        (struct.pack("<Q", 2**63) + b"{}", "not a whole safetensors file"),
        (struct.pack("<Q", 0) + b"{}", "not a whole safetensors file"),
        (of_header(b"\xff\xfe{"), "is not JSON"),
        (of_header(b"[" * 100_000), "is not JSON"),
        (of_header([1, 2]), "no table of tensors"),
        (of_header({"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}), "dtype F8_E4M3"),
        (of_header({"a": 3}), "tensor a has dtype None"),
        (of_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}), "tensor a does not fit"),
        (of_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [60, 68]}}), "tensor a does not fit"),
        (of_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]}}), "tensor a does not fit"),
        (of_header({"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}), "tensor a does not fit"),
        (of_header({"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}), "tensor a does not fit"),
        (of_header({"a": {"dtype": "F32", "shape": [2**70], "data_offsets": [0, 4]}}), "tensor a does not fit"),
        (of_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}), "tensor a does not fit"),
    ],
)
def test_hostile_headers_are_refused_with_the_reason(place: Path, content: bytes, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read_index(write(place, content))


def test_missing_and_misshapen_tensors_are_listed_all_at_once(tmp_path: Path) -> None:
    folder = copied("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.1.self_attn.q_proj.weight"]
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(3, 5)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as raised:
        Shard.cut(Checkpoint(folder), 0, 2)
    lines = str(raised.value).splitlines()
    assert lines == [
        f"{folder}: tensor model.layers.0.mlp.up_proj.weight is missing",
        f"{folder}: tensor model.layers.1.self_attn.q_proj.weight is missing",
        f"{folder}: tensor model.layers.0.self_attn.k_proj.weight has shape [3, 5], the configuration wants [16, 32]",
    ]
    assert Shard.cut(Checkpoint(folder), 2, 4).start == 2  # others' tensors are not this shard's business


def test_a_long_list_of_missing_tensors_is_shortened(tmp_path: Path) -> None:
    folder = copied("llama", tmp_path)
    save_file({"lonely": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"and \d+ more like these"):
        Shard.cut(Checkpoint(folder), 1, 4)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(checkpoint_folder("qwen2"), dtype=torch.float64)
        model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def test_a_checkpoint_of_several_files_is_read_as_one(sharded: Path) -> None:
    parts = Shard.cut(Checkpoint(sharded), 1, 5), Shard.cut(Checkpoint(checkpoint_folder("qwen2")), 1, 5)
    for (name, tensor), (other, expected) in zip(*(part.named_parameters() for part in parts), strict=True):
        assert name == other and torch.equal(tensor, expected)


def test_a_file_that_the_index_names_but_is_missing_is_named(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    checkpoint = Checkpoint(sharded)
    with pytest.raises(CheckpointError, match=f"{gone.name} is named by the index but missing"):
        Shard.cut(checkpoint)


def test_only_the_files_that_hold_a_shards_tensors_are_asked_for(sharded: Path) -> None:
    holding = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in holding.items() if ".layers.1." in name}
    for file in set(holding.values()) - needed:
        (sharded / file).unlink()
    assert len(needed) < len(set(holding.values())), "the checkpoint must be cut finely enough to show it"
    Shard.cut(Checkpoint(sharded), 1, 2)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": ["x"]}}'])
def test_a_broken_index_is_refused(place: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes((place / "config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="not the index of a sharded checkpoint"):
        Checkpoint(tmp_path)


def test_a_folder_without_safetensors_or_configuration_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read a configuration"):
        load_config(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder"):
        load_config(tmp_path / "no such")
    (tmp_path / "config.json").write_bytes((place / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("family", "rename"),
    [
        ("gpt2", lambda name: name.removeprefix("transformer.")),  # as on the hub
        ("llama", lambda name: "language_model." + name),
        ("gemma3", lambda name: name.replace("model.", "model.language_model.", 1)),
        ("qwen2", lambda name: name.removeprefix("model.")),
    ],
)
def test_prefixes_of_checkpoints_do_not_matter(family: str, rename: Callable[[str], str], tmp_path: Path) -> None:
    other = Checkpoint(copied(family, tmp_path, rename))
    ids_BS = torch.arange(3, 15).reshape(2, 6)
    renamed, plain = Shard.cut(other), Shard.cut(Checkpoint(checkpoint_folder(family)))
    assert torch.equal(renamed(ids_BS), plain(ids_BS))


def test_bare_names_lose_only_leading_wrappers() -> None:
    assert bare_name("model.language_model.layers.0.mlp.model.weight") == "layers.0.mlp.model.weight"
    assert bare_name("transformer.h.1.ln_1.bias") == bare_name("h.1.ln_1.bias") == "h.1.ln_1.bias"
    assert bare_name("model") == "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("piece", [1, 100, 4 * 2**20])
def test_tensors_are_converted_piece_by_piece(
    dtype: torch.dtype, piece: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"table": torch.randn(9, 3, 5), "scalar": torch.tensor(1 / 3), "none": torch.zeros(0, 4)}
    write(place, stored(tensors, place))
    monkeypatch.setattr("splitllm.model.loading.PIECE_BYTES", piece)
    for name, tensor in tensors.items():
        assert torch.equal(Checkpoint(place).read(name, tensor.shape, dtype), tensor.to(dtype))


def test_the_digest_tells_names_shapes_dtypes_contents_and_configurations_apart(place: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((place / "config.json").read_bytes())

    def digest(tensors: dict[str, torch.Tensor]) -> str:
        write(tmp_path, stored(tensors, tmp_path))
        return Checkpoint(tmp_path).digest()

    a = torch.arange(12.0)
    variants = [
        {"a": a},
        {"b": a},
        {"a": a.reshape(3, 4)},
        {"a": a.view(torch.int32)},
        {"a": a + 1},
        {"a": a, "b": a.clone()},
    ]
    found = [digest(tensors) for tensors in variants]
    assert digest(variants[0]) == found[0]
    (tmp_path / "config.json").write_bytes((place / "config.json").read_bytes() + b" ")
    assert len({*found, digest(variants[0])}) == len(variants) + 1


def test_a_tensor_of_another_shape_is_not_read(place: Path) -> None:
    write(place, stored(TENSORS, place))
    with pytest.raises(CheckpointError, match=r"shape \[3, 4\], the configuration wants \[4, 3\]"):
        Checkpoint(place).read("a", (4, 3), torch.float32)
    with pytest.raises(CheckpointError, match="tensor z is missing"):
        Checkpoint(place).read("z", (4, 3), torch.float32)


LLAMA = checkpoint_folder("llama")
OPENED, TABLE_VD = Checkpoint(LLAMA), load_file(LLAMA / "model.safetensors")[EMBEDDING]


@given(ids=st.sets(st.integers(0, VOCABULARY - 1)), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_rows_are_those_of_the_table(ids: set[int], dtype: torch.dtype) -> None:
    ids_U = torch.tensor(sorted(ids), dtype=torch.int64)
    assert torch.equal(OPENED.rows(EMBEDDING, ids_U, dtype), TABLE_VD[ids_U].to(dtype))


def test_a_row_beyond_the_table_is_refused() -> None:
    with pytest.raises(CheckpointError, match=f"token id {VOCABULARY} is beyond the table of {VOCABULARY} rows"):
        OPENED.rows(EMBEDDING, torch.tensor([3, VOCABULARY]), torch.float64)
    with pytest.raises(CheckpointError, match="is beyond the table"):
        OPENED.rows(EMBEDDING, torch.tensor([-1, 3]), torch.float64)
    with pytest.raises(CheckpointError, match="tensor no such is missing"):
        OPENED.rows("no such", torch.tensor([3]), torch.float64)


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(copied("llama", tmp_path))
    assert checkpoint.find("lm_head.weight") is None
    assert checkpoint.find("model.embed_tokens.weight") is not None
    os.truncate(tmp_path / "model.safetensors", 20_000)
    with pytest.raises(CheckpointError, match="ends in the middle of a tensor"):
        Shard.cut(checkpoint)


class Reads:
    """Spies on `os.preadv`: which bytes of the file were read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spans: list[tuple[int, int]] = []
        inner = os.preadv

        def spy(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            count = inner(descriptor, buffers, offset)
            self.spans.append((offset, offset + count))
            return count

        monkeypatch.setattr(os, "preadv", spy)

    def take(self) -> list[tuple[int, int]]:
        spans, self.spans = sorted(self.spans), []
        return spans


OWNED = {  # what each shard of GPT-2 reads, by the beginnings of names
    (0, 2, False): ["transformer.wpe", "transformer.h.0.", "transformer.h.1."],
    (2, 4, False): ["transformer.h.2.", "transformer.h.3."],
    (5, 6, True): ["transformer.h.5.", "transformer.ln_f", "transformer.wte"],
    (0, 1, True): ["transformer.wpe", "transformer.h.0.", "transformer.ln_f", "transformer.wte"],
}


@pytest.mark.parametrize("part", OWNED)
def test_a_shard_reads_only_its_own_tensors(part: tuple[int, int, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint_folder("gpt2")
    checkpoint, entries = Checkpoint(folder), read_index(folder / "model.safetensors")
    reads = Reads(monkeypatch)
    shard = Shard.cut(checkpoint, part[0], part[1], head=part[2])
    owned = [entry for name, entry in entries.items() if name.startswith(tuple(OWNED[part]))]
    assert reads.take() == sorted((entry.offset, entry.offset + entry.nbytes) for entry in owned)
    assert sum(entry.nbytes for entry in owned) == sum(parameter.nbytes for parameter in shard.parameters())


def test_of_the_embedding_table_only_the_rows_of_the_batch_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint_folder("gpt2")
    shard = Shard.cut(Checkpoint(folder), 0, 1)
    table = read_index(folder / "model.safetensors")["transformer.wte.weight"]
    reads = Reads(monkeypatch)
    shard(torch.tensor([[7, 7, 9], [8, 30, 7]]))
    runs = [(7, 10), (30, 31)]  # neighbours at once, each row once
    assert reads.take() == [(table.offset + a * table.row_bytes, table.offset + b * table.row_bytes) for a, b in runs]


def test_a_resident_tied_table_is_used_instead_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Shard.cut(Checkpoint(checkpoint_folder("gpt2")), 0, 1, head=True)
    assert shard.embeddings is not None and shard.head is not None
    assert shard.embeddings.table is shard.head.output.weight
    reads = Reads(monkeypatch)
    from_table = shard(torch.tensor([[7, 9]]))
    assert reads.take() == []
    assert torch.equal(from_table, Shard.cut(Checkpoint(checkpoint_folder("gpt2")), 0, 1)(torch.tensor([[7, 9]])))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps to see what is mapped")
def test_nothing_is_mapped(tmp_path: Path) -> None:
    shard = Shard.cut(Checkpoint(copied("llama", tmp_path)))
    shard(torch.tensor([[7, 9]]))
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
