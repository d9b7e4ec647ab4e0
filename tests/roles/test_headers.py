"""Headers are plain values: a run whose headers all go through JSON is the same run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from splitllm.wire.link import LocalLink
from splitllm.wire.message import Message
from tests.families import corpus, recipe, roles_of
from tests.test_exactness import adapter_of, one_step


@pytest.mark.parametrize("labels", ["client", "cloud"])
def test_headers_survive_json(labels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe("llama", [2, 4], labels)
    plain = roles_of(wanted, corpus(2))
    losses = [one_step(plain, step) for step in range(2)]
    inner = LocalLink.request

    async def through_json(self: LocalLink, message: Message) -> Message:
        reply = await inner(self, replace(message, header=json.loads(json.dumps(message.header))))
        return replace(reply, header=json.loads(json.dumps(reply.header)))

    monkeypatch.setattr(LocalLink, "request", through_json)
    remote = roles_of(wanted, corpus(2))
    assert [one_step(remote, step) for step in range(2)] == losses
    adapter = adapter_of(plain)
    assert all(torch.equal(tensor, adapter[name]) for name, tensor in adapter_of(remote).items())
