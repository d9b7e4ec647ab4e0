"""Which keys must be equal on all machines of a run: every key of the recipe is on one side."""

import hashlib
import re
import tracemalloc
from pathlib import Path

import pytest
import yaml

from splitllm.recipe import changed_keys, dump_recipe, fingerprint, load_recipe, start_digest
from splitllm.recipe.digest import ADAPTER_FILE, LOCAL_KEYS
from splitllm.recipe.loading import leaves
from tests.recipe.conftest import MakeRecipe

COUNTED = {  # another value of every key that must be equal on all machines
    "seed": 1,
    "model.revision": "main",
    "model.dtype": "bfloat16",
    "model.attention": "eager",
    "model.random": {"n_layer": 12},
    "split.tiers": {"client": 6, "edge": 2, "cloud": 1},
    "split.cuts": [1, 4],
    "split.labels": "cloud",
    "split.client_cuts": {"client-1": 3},
    "model.dropout": 0.5,
    "lora.adapters": "per_client",
    "lora.clients": {"client-1": {"rank": 3}},
    "server.batching": "synchronous",
    "server.tokens": 64,
    "server.wait": 0.5,
    "server.starve": 5.0,
    "server.gradient_wait": 0.25,
    "server.park_after": 9.0,
    "rounds.participation.over": 2.0,
    "rounds.participation.deadline": 9.0,
    "rounds.buffer.size": 2,
    "rounds.buffer.discount": "hinge",
    "rounds.buffer.oldest": 3,
    "lora.rank": 4,
    "lora.alpha": 8,
    "lora.dropout": 0.5,
    "lora.targets": ["q_proj"],
    "lora.tiers": ["edge"],
    "lora.rslora": True,
    "lora.dora": True,
    "data.eval_fraction": 0.5,
    "data.format": "text",
    "data.partition.by": "own",
    "data.partition.field": "topic",
    "data.partition.alpha": 0.5,
    "data.max_length": 128,
    "data.pack": True,
    "train.steps": 100,
    "train.batch_size": 4,
    "train.accumulate": 2,
    "train.in_flight": 2,
    "train.optimizer.name": "sgd",
    "train.optimizer.lr": 0.5,
    "train.optimizer.betas": [0.5, 0.5],
    "train.optimizer.eps": 0.5,
    "train.optimizer.weight_decay": 0.5,
    "train.schedule.name": "cosine",
    "train.schedule.warmup_steps": 5,
    "train.clip_norm": None,
    "train.loss_weights": "tenant",
    "train.activation_checkpointing": True,
    "train.mixed_precision": "bf16",
    "train.full_tiers": ["cloud"],
    "train.processes": 2,
    "train.eval_every": 5,
    "server.memory_mib": 5,
    "server.step_tenants": 5,
    "server.step_tokens": 5,
    "rounds.edge_every": 5,
    "rounds.cloud_every": 10,
    "rounds.rule": "ffa",
    "rounds.weights": "equal",
    "rounds.moments": "reset",
    "rounds.prox": 0.5,
    "rounds.outer.name": "fedadam",
    "rounds.outer.lr": 0.5,
    "rounds.outer.betas": [0.5, 0.5],
    "rounds.outer.tau": 0.5,
    "rounds.trim": 0.25,
    "rounds.clip_update": 0.5,
    "rounds.reject_beyond": 9.0,
    "rounds.participation.policy": "poisson",
    "rounds.participation.share": 0.5,
    "rounds.participation.count": 1,
    "rounds.participation.minimum": 2,
    "rounds.secure.aggregate": True,
    "rounds.secure.threshold": 2,
    "rounds.secure.range": 4.0,
    "rounds.secure.bits": 64,
    "rounds.privacy.clip": 0.5,
    "rounds.privacy.noise": 0.5,
    "rounds.privacy.delta": 0.5,
    "wire.up": "int8",
    "wire.down": "topk:0.05",
    "quantization": {"edge": {"method": "nf4", "double": True, "compute_dtype": None}},
    "wire.feedback_mib": 0,
    "wire.absent": "drop",
    "wire.drop_after": 5.0,
}
LOCAL = {  # and of every key that may differ
    "model.base": "/other",
    "model.tokenizer": "/other",
    "lora.start_from": "/other",
    "data.source": "/other",
    "data.eval": "/other",
    "data.fields": {"prompt": "question"},
    "data.limit": 5,
    "train.threads": 2,
    "train.checkpoint_every": 5,
    "train.keep": 5,
    "train.log_every": 5,
    "train.trackers": ["tensorboard"],
    "train.verify_adapter": True,
    "wire.addresses": {"cloud": "h:1"},
    "wire.certificates": "/other",
    "wire.memory_mib": 5,
    "split.memory_mib": {"client": 850},
    "wire.keepalive": 5.0,
    "server.processes": 2,
    "server.quota.tokens_per_second": 5.0,
    "server.quota.bytes_per_second": 5.0,
    "rounds.exchange": "unix:/other",
    "server.zero.stage": 2,
    "server.zero.offload_optimizer": "cpu",
    "server.zero.offload_param": "cpu",
    "server.zero.nvme_path": "/other",
    "server.fsdp": True,
    "server.tenants": {"client-1": {"tokens_per_second": None, "bytes_per_second": None, "weight": 2.0}},
}
AT_THEIR_OWN_PACE = ["server.batching=continuous", "lora.adapters=common", "split.tiers={client: 4, edge: 1, cloud: 1}"]
ROUNDS = ["rounds.replicas=local", "rounds.cloud_every=5", "rounds.weights=equal"]
PACED = [*ROUNDS, "server.batching=continuous", "lora.adapters=common", "split.tiers={client: 4, edge: 2, cloud: 1}"]
TOGETHER = {  # what a key above cannot be without
    "data.partition.field": ["data.partition={by: field, field: kind}"],
    "data.partition.alpha": ["data.partition={by: dirichlet, field: topic, alpha: 1.0}"],
    "data.pack": ["data.format=text"],
    "lora.clients": ["lora.adapters=per_client"],
    **{f"rounds.{key}": ROUNDS for key in ("edge_every", "cloud_every", "rule", "moments", "prox", "trim")},
    "rounds.weights": ["rounds.replicas=local", "rounds.cloud_every=5"],
    **{f"rounds.{key}": ROUNDS for key in ("clip_update", "reject_beyond", "privacy.clip", "secure.aggregate")},
    **{f"rounds.outer.{key}": ROUNDS for key in ("name", "lr", "betas", "tau")},
    **{f"rounds.participation.{key}": ROUNDS for key in ("policy", "minimum")},
    "rounds.participation.share": [*ROUNDS, "rounds.participation.policy=random"],
    "rounds.participation.count": [*ROUNDS, "rounds.participation.policy=random"],
    **{f"rounds.secure.{key}": [*ROUNDS, "rounds.secure.aggregate=true"] for key in ("threshold", "range", "bits")},
    **{f"rounds.privacy.{key}": [*ROUNDS, "rounds.privacy.clip=1.0"] for key in ("noise", "delta")},
    "rounds.exchange": ["rounds.replicas=local", "rounds.cloud_every=5", "rounds.exchange=unix:/one"],
    "server.step_tenants": AT_THEIR_OWN_PACE,
    "server.step_tokens": AT_THEIR_OWN_PACE,
    "server.zero.offload_optimizer": ["server.zero.stage=2"],
    "server.zero.offload_param": ["server.zero.stage=3"],
    "server.zero.nvme_path": ["server.zero.stage=3", "server.zero.offload_param=nvme", "server.zero.nvme_path=/one"],
    "rounds.participation.over": [*PACED, "rounds.participation.policy=random"],
    "rounds.participation.deadline": PACED,
    "rounds.buffer.size": PACED,
    **{f"rounds.buffer.{key}": [*PACED, "rounds.buffer.size=1"] for key in ("discount", "oldest")},
}


WITH_ANOTHER = {"rounds.replicas"}  # counts too: it comes with `rounds.cloud_every`


def as_yaml(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)


def test_every_key_counts_or_may_differ(recipe_with):
    assert COUNTED.keys() | WITH_ANOTHER | LOCAL.keys() == dict(leaves(recipe_with())).keys()
    assert not COUNTED.keys() & LOCAL.keys()
    assert LOCAL.keys() == LOCAL_KEYS


def test_whether_there_are_other_sites_counts_and_where_they_are_met_does_not(recipe_with):
    alone = ["rounds.replicas=local", "rounds.cloud_every=5"]
    assert fingerprint(recipe_with(*alone)) != fingerprint(recipe_with(*alone, "rounds.exchange=unix:/one"))


@pytest.mark.parametrize(("key", "value"), [*COUNTED.items(), *LOCAL.items()])
def test_the_fingerprint_changes_with_the_keys_that_count(recipe_with, key, value):
    one = recipe_with(*TOGETHER.get(key, []))
    other = recipe_with(*TOGETHER.get(key, []), f"{key}={as_yaml(value)}")
    assert [line.split(": ")[0] for line in changed_keys(one, other)] == [key]
    assert (fingerprint(one) == fingerprint(other)) == (key in LOCAL)


def test_the_fingerprint_is_32_digits_and_blind_to_how_a_recipe_is_written(recipe_with, tmp_path):
    def of(*overrides: str) -> str:
        return fingerprint(recipe_with(*overrides))

    assert re.fullmatch("[0-9a-f]{32}", of())
    assert of() == of("train.clip_norm=1", "lora.dropout=0", "train.optimizer.lr=2e-4", "wire.drop_after=30")
    assert of("model.random={a: 1, b: {c: 2, d: 3}}") == of("model.random={b: {d: 3, c: 2}, a: 1}")
    assert of("split.tiers={a: 1, b: 1, c: 1}") != of("split.tiers={b: 1, a: 1, c: 1}")
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe_with()))
    assert fingerprint(load_recipe(copy)) == of()


def test_the_file_that_training_starts_from_is_never_in_memory_whole(recipe_with: MakeRecipe, tmp_path: Path) -> None:
    size = 8 << 20
    with (tmp_path / ADAPTER_FILE).open("wb") as file:
        file.truncate(size)
    started = recipe_with(f"lora.start_from={tmp_path}")
    tracemalloc.start()
    found, (_, peak) = start_digest(started), tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == hashlib.blake2b(bytes(size), digest_size=8).hexdigest()
    assert peak < size / 8
