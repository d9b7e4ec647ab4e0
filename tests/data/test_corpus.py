"""The whole room: from the recipe's data section to what each client trains on."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from splitllm.data import Corpus, Example, load_corpus
from splitllm.errors import DataError
from splitllm.recipe import DataRecipe

WORDS = ["a", "b", "c", "d", "e"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, rows: list[dict]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def rows_of(count: int, **more: object) -> list[dict]:
    """Row k has as many prompt words as k modulo 5, plus one, so that rows differ."""
    return [{"prompt": " ".join(WORDS[: k % 5 + 1]), "completion": WORDS[k % 5], **more} for k in range(count)]


def load(tokenizer, *, clients: int = 2, seed: int = 0, client: int | None = None, **keys: object) -> Corpus:
    return load_corpus(DataRecipe(**keys), tokenizer, clients=clients, batch_size=2, seed=seed, client=client)


def refused(tokenizer, **keys: object) -> str:
    with pytest.raises(DataError) as caught:
        load(tokenizer, **keys)
    return str(caught.value)


def all_ids(parts) -> list[list[int]]:
    return sorted(example.ids.tolist() for part in parts for example in part)


def test_a_fraction_is_held_out_by_the_seed(words):
    write("x.jsonl", [{"text": f"{'a ' * k}b"} for k in range(1, 21)])
    corpus = load(words, source="x.jsonl", format="text", eval_fraction=0.2)
    lengths = sorted(len(one) for parts in (corpus.train, corpus.eval) for part in parts for one in part)
    assert lengths == list(range(2, 22))
    assert [len(part) for part in corpus.eval] == [2, 2]
    again = load(words, source="x.jsonl", format="text", eval_fraction=0.2)
    assert all_ids(again.eval) == all_ids(corpus.eval)
    other = load(words, source="x.jsonl", format="text", eval_fraction=0.2, seed=1)
    assert all_ids(other.eval) != all_ids(corpus.eval)


@pytest.mark.parametrize("by", ["file", "field"])
def test_rows_that_are_held_out_stay_with_the_client_that_owns_them(words, by):
    write("0.jsonl", [{"text": f"{'a ' * k}b", "who": "x"} for k in range(1, 21)])
    write("1.jsonl", [{"text": f"{'b ' * k}a", "who": "y"} for k in range(1, 11)])
    partition = {"by": "file"} if by == "file" else {"by": "field", "field": "who"}
    corpus = load(words, source=["0.jsonl", "1.jsonl"], format="text", eval_fraction=0.2, partition=partition)
    first, second = (
        {int(one.ids[0]) for one in (*train, *held)} for train, held in zip(corpus.train, corpus.eval, strict=True)
    )
    assert len(first) == len(second) == 1 and first != second
    assert [(len(t), len(e)) for t, e in zip(corpus.train, corpus.eval, strict=True)] == [(16, 4), (8, 2)]


def test_eval_rows_are_dealt_round_robin(words):
    write("x.jsonl", rows_of(8))
    write("e.jsonl", [{"prompt": "a", "completion": word} for word in WORDS])
    corpus = load(words, source="x.jsonl", eval="e.jsonl")
    assert [[one.ids.tolist() for one in part] for part in corpus.eval] == [
        [[3, 3, 2], [3, 5, 2], [3, 7, 2]],
        [[3, 4, 2], [3, 6, 2]],
    ]
    assert sum(map(len, corpus.train)) == 8


def test_shares_say_what_each_client_has(words):
    write("x.jsonl", rows_of(3, kind="k1") + rows_of(2, kind="k2"))
    write("e.jsonl", rows_of(1))
    corpus = load(words, source="x.jsonl", eval="e.jsonl", partition={"by": "field", "field": "kind"})
    first, second = corpus.shares
    assert (first.client, first.examples, first.tokens, first.labels, first.groups) == ("client-0", 3, 12, 6, {"k1": 3})
    assert (second.client, second.examples, second.tokens, second.groups) == ("client-1", 2, 7, {"k2": 2})


def test_only_the_most_frequent_groups_are_shown(words):
    write("x.jsonl", [row for k in range(9) for row in rows_of(1 + (k == 8), kind=f"k{k}")])
    write("e.jsonl", rows_of(1))
    corpus = load(words, clients=1, source="x.jsonl", eval="e.jsonl", partition={"by": "field", "field": "kind"})
    assert corpus.shares[0].groups == {"k8": 2, "k0": 1, "k1": 1, "k2": 1, "k3": 1}


def test_limit_takes_the_first_training_rows(words):
    write("x.jsonl", rows_of(10))
    write("e.jsonl", rows_of(4))
    corpus = load(words, source="x.jsonl", eval="e.jsonl", limit=3)
    assert all_ids(corpus.train) == sorted([[3, 3, 2], [3, 4, 4, 2], [3, 4, 5, 5, 2]])
    assert sum(map(len, corpus.eval)) == 4


def test_a_file_a_client(words):
    write("one.jsonl", [{"text": "a b"}] * 2)
    write("two.jsonl", [{"text": "c d"}] * 3)
    write("e.jsonl", [{"text": "e e"}])
    keys = {"source": ["two.jsonl", "one.jsonl"], "eval": "e.jsonl", "format": "text", "partition": {"by": "file"}}
    corpus = load(words, **keys)
    assert [[one.ids.tolist() for one in part] for part in corpus.train] == [[[5, 6]] * 3, [[3, 4]] * 2]
    assert "2 with usable rows for 3 clients" in refused(words, clients=3, **keys)


PARTITIONS = [
    pytest.param({"by": "iid"}, id="iid"),
    pytest.param({"by": "dirichlet", "field": "kind", "alpha": 0.5}, id="dirichlet"),
    pytest.param({"by": "field", "field": "kind"}, id="field"),
    pytest.param({"by": "file"}, id="file"),
]


def identical(one: Sequence[Example], other: Sequence[Example]) -> bool:
    first, second = ([(e.ids.tolist(), e.targets.tolist(), e.starts) for e in part] for part in (one, other))
    return first == second


def three_files() -> list[str]:
    """Rows of several kinds and lengths; the second of each file has nothing to learn."""
    rows = [{"text": " ".join(WORDS[k % 5] for k in range(n % 7 + 2)), "kind": f"k{n % 4}"} for n in range(30)]
    return [write(f"{n}.jsonl", [rows[n], {"text": "a", "kind": "k0"}, *rows[n + 3 :: 3]]) for n in range(3)]


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("more", [{}, {"eval": "0.jsonl"}, {"pack": True}, {"limit": 25}], ids=str)
def test_one_client_loads_what_it_has_in_the_whole_corpus(words, partition, more):
    keys = {"source": three_files(), "format": "text", "max_length": 6, "eval_fraction": 0.3, "partition": partition}
    whole = load(words, clients=3, **{**keys, **more})
    for client in range(3):
        alone = load(words, clients=3, client=client, **{**keys, **more})
        for mine, everyones in ((alone.train, whole.train), (alone.eval, whole.eval)):
            assert [len(part) for part in mine] == [len(everyones[client]) * (n == client) for n in range(3)]
            assert identical(mine[client], everyones[client])
        assert alone.shares == (whole.shares[client],)
        assert (alone.dropped, alone.shortened) == (whole.dropped, whole.shortened)


@pytest.mark.parametrize("more", [{}, {"eval": "e.jsonl"}, {"pack": True}], ids=str)
def test_own_rows_are_the_loading_clients(words, more):
    keys = {"source": three_files()[0], "format": "text", "max_length": 6, "eval_fraction": 0.3, **more}
    write("e.jsonl", [{"text": "a b"}, {"text": "c d e"}])
    only = load(words, clients=1, **keys)
    for corpus, client in (
        (load(words, clients=4, client=2, partition={"by": "own"}, **keys), 2),
        (load(words, clients=1, client=0, partition={"by": "own"}, **keys), 0),
        (load(words, clients=1, partition={"by": "own"}, **keys), 0),
    ):
        assert identical(corpus.train[client], only.train[0])
        assert identical(corpus.eval[client], only.eval[0])
        assert sum(map(len, (*corpus.train, *corpus.eval))) == len(only.train[0]) + len(only.eval[0])
        assert [share.client for share in corpus.shares] == [f"client-{client}"]
        assert corpus.shares[0].tokens == only.shares[0].tokens


def test_own_rows_of_several_clients_are_refused_before_any_is_read(words):
    message = refused(words, clients=2, source="no.jsonl", partition={"by": "own"})
    assert message.startswith("data.partition.by: own needs one `splitllm client` per device")
    assert "\n" not in message


def test_the_builtin_source_by_group(words):
    corpus = load(words, clients=4, source="builtin:stdlib-docstrings", partition={"by": "field", "field": "group"})
    sizes = [share.examples for share in corpus.shares]
    assert min(sizes) > 0.8 * max(sizes)
    groups = [set(share.groups) for share in corpus.shares]
    assert all(not (mine & other) for mine in groups for other in groups if mine is not other)
    assert all(part for part in corpus.eval)


def test_packing_fills_rows_a_client(words):
    Path("x.txt").write_text("a b c\n\nd e\na b c d e\nc\n")
    Path("e.txt").write_text("a b\nc d\n")
    corpus = load(words, clients=1, source="x.txt", eval="e.txt", format="text", pack=True, max_length=4)
    assert [(one.ids.tolist(), one.starts) for one in corpus.train[0]] == [
        ([3, 4, 5], (0,)),
        ([6, 7], (0,)),
        ([3, 4, 5, 6], (0,)),
    ]
    assert [(one.ids.tolist(), one.starts) for one in corpus.eval[0]] == [([3, 4, 5, 6], (0, 2))]
    assert corpus.dropped == 2


def test_rows_with_nothing_to_learn_are_dropped_and_counted(words, caplog):
    Path("x.txt").write_text("a b\n\nc\nd e\n")
    Path("e.txt").write_text("a b c\n\n")
    with caplog.at_level(logging.INFO):
        corpus = load(words, source="x.txt", eval="e.txt", format="text", max_length=2)
    assert all_ids(corpus.train) == [[3, 4], [6, 7]]
    assert (corpus.dropped, corpus.shortened) == (3, 1)
    assert "3 rows have nothing to learn" in caplog.text
    assert "1 rows were cut" in caplog.text
    assert "client-1 has 1 examples" in caplog.text


@pytest.mark.parametrize("key", ["source", "eval"])
def test_all_rows_without_a_target_are_refused(words, key):
    Path("good.txt").write_text("a b\na b\n")
    Path("bad.txt").write_text("a\nb\n")
    message = refused(words, **{"source": "good.txt", "eval": "good.txt", "format": "text", key: "bad.txt"})
    assert message.startswith(f"data.{key}: none of its 2 rows has a token to learn")


def test_more_clients_than_usable_examples(words):
    Path("x.txt").write_text("a b\n\nc d\n")
    message = refused(words, clients=3, source="x.txt", eval="x.txt", format="text")
    assert "3 clients share 2 usable training rows" in message


def test_a_single_row_cannot_be_held_out_too(words):
    write("x.jsonl", rows_of(1))
    assert refused(words, clients=1, source="x.jsonl").startswith("data.eval_fraction: 0.05 of 1 rows leaves none")


def test_a_missing_eval_file_is_named_by_its_key(words):
    write("x.jsonl", rows_of(4))
    assert refused(words, source="x.jsonl", eval="no.jsonl").startswith("data.eval: there is no file no.jsonl")


def test_no_text_of_a_row_is_logged(words, caplog, capfd):
    rows = [{"prompt": f"secret{k}", "completion": f"private{k} x y z", "kind": "k"} for k in range(6)]
    write("x.jsonl", [*rows, {"prompt": "", "completion": "secret", "kind": "k"}])
    with caplog.at_level(logging.DEBUG):
        load(words, source="x.jsonl", max_length=3, partition={"by": "dirichlet", "field": "kind", "alpha": 1})
    written = caplog.text + "".join(capfd.readouterr())
    assert "rows were cut" in written
    assert "secret" not in written
    assert "private" not in written


def test_errors_show_no_text_of_a_row(words):
    write("x.jsonl", [{"prompt": "secret", "completion": ["secret"]}, {"prompt": "secret"}])
    Path("y.jsonl").write_text('{"prompt": "secret\n')
    assert "secret" not in refused(words, source="x.jsonl", eval="x.jsonl")
    assert "secret" not in refused(words, source="y.jsonl")


def test_tokenisation_leaves_the_environment_alone(words, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    write("x.jsonl", rows_of(4))
    load(words, source="x.jsonl")
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_importing_the_room_is_light():
    code = (
        "import sys, splitllm.data as d; d.load_corpus; print([m for m in ('torch', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_shakespeare_by_speaker(shared, make_tokenizer):
    """Naturally different clients: speeches become rows, and the speaker is the field."""
    speakers = json.loads((shared / "tinyshakespeare" / "by_speaker_min1000.json").read_text())
    write("x.jsonl", [{"text": text, "who": who} for who, texts in speakers.items() for text in texts])
    corpus = load(
        make_tokenizer(bos=True), clients=10, source="x.jsonl", format="text", partition={"by": "field", "field": "who"}
    )
    sizes = np.array([share.examples for share in corpus.shares])
    assert sizes.max() - sizes.min() <= 0.05 * sizes.max()
