"""Which tensors are coded, in which direction, and whose error is carried on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from splitllm.errors import DivergedError, PeerError
from splitllm.wire.codecs import pack, unpack
from splitllm.wire.coding import Coding, unpack_all
from splitllm.wire.message import Message

WIDTH = 32


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def forward(step: int = 0, *, index: int = 0, client: int = 1, **header: Any) -> Message:
    """Rows 7 and 4 of a client, of 3 and 2 tokens, with labels at one and two of them."""
    tensors = {
        "hidden_TD": random(5, WIDTH),
        "positions_N": torch.tensor([2, 3, 4], dtype=torch.int32),
        "targets_N": torch.tensor([8, 9, 10], dtype=torch.int32),
    }
    header = {"train": True, "input_gradient": True, "lengths": [3, 2], "rows": [7, 4], **header}
    return Message("forward", f"client-{client}", (step, client, index), header, tensors)


def carrying(hidden_TD: torch.Tensor, *, index: int = 0) -> Message:
    message = forward(index=index)
    return replace(message, tensors={**message.tensors, "hidden_TD": hidden_TD})


def reply(request: Message, **tensors: torch.Tensor) -> Message:
    return Message(request.kind, "cloud", request.micro_batch, {"loss": 1.0}, tensors)


def test_each_tensor_gets_the_codec_of_its_direction_and_all_others_none() -> None:
    coding, request = Coding("int8", "bf16"), forward()
    up = coding.pack_request(request)
    assert {name: packed.codec for name, packed in up.items()} == {
        "hidden_TD": "int8",
        "positions_N": "none",
        "targets_N": "none",
    }
    gradient = Message("backward", "client-1", (0, 1, 0), tensors={"gradient_ND": random(3, WIDTH)})
    assert coding.pack_request(gradient)["gradient_ND"].codec == "int8"
    down = coding.pack_reply(request, reply(request, gradient_TD=random(5, WIDTH), rows_ND=random(3, WIDTH)))
    assert {packed.codec for packed in down.values()} == {"bf16"}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("codec", ["none", "bf16", "int8", "int4", "topk:0.05"])
def test_sizes_are_those_of_what_is_packed(codec: str, train: bool) -> None:
    coding, request = Coding(codec, codec), forward(train=train)
    assert coding.request_bytes(request) == sum(one.nbytes for one in coding.pack_request(request).values())
    answer = reply(request, gradient_TD=random(5, WIDTH))
    assert coding.reply_bytes(request, answer) == sum(one.nbytes for one in coding.pack_reply(request, answer).values())


@pytest.mark.parametrize("kind", ["open", "close", "share", "finish"])
def test_adapters_and_sums_of_gradients_are_never_coded(kind: Any) -> None:
    coding, tensors = Coding("int4", "int4"), {"model.q_proj.lora_A.weight": random(4, WIDTH)}
    message = Message(kind, "client-1", (0, 1, 0), tensors=tensors)
    for packed in (coding.pack_request(message), coding.pack_reply(message, message)):
        assert torch.equal(unpack_all(packed)["model.q_proj.lora_A.weight"], tensors["model.q_proj.lora_A.weight"])


def gradient(coding: Coding, request: Message) -> bytes:
    """A reply whose gradient is what the request carries."""
    answer = reply(request, gradient_TD=request.tensors["hidden_TD"])
    return coding.pack_reply(request, answer)["gradient_TD"].blob.numpy().tobytes()


def plain(tensor: torch.Tensor, codec: str = "int4") -> bytes:
    return pack(tensor, codec).blob.numpy().tobytes()


def test_training_carries_the_error_of_a_row_on_and_a_step_run_again_does_not() -> None:
    coding = Coding("none", "int4")
    sent = [gradient(coding, forward(step)) for step in (0, 1, 1, 2)]
    assert sent[0] == plain(forward().tensors["hidden_TD"])
    assert sent[1] == sent[2] and len(set(sent)) == 3


def test_activations_carry_nothing_on() -> None:
    coding = Coding("int4", "int4")
    for step in range(3):
        request = forward(step)
        down = coding.pack_reply(request, reply(request, rows_ND=request.tensors["hidden_TD"]))
        for packed in (coding.pack_request(request)["hidden_TD"], down["rows_ND"]):
            assert packed.blob.numpy().tobytes() == plain(request.tensors["hidden_TD"])


def test_rows_of_another_client_have_errors_of_their_own() -> None:
    coding = Coding("none", "int4")
    gradient(coding, forward(0, client=1))
    assert gradient(coding, forward(1, client=2)) == plain(forward().tensors["hidden_TD"])


def test_without_rows_the_codec_works_without_feedback() -> None:
    coding = Coding("none", "int4")
    for step in range(3):
        request = forward(step)
        request = replace(request, header={key: value for key, value in request.header.items() if key != "rows"})
        assert gradient(coding, request) == plain(request.tensors["hidden_TD"])


def test_an_evaluation_travels_as_it_is() -> None:
    coding, request = Coding("int4", "int4"), forward(-1, train=False)
    answer = reply(request, rows_ND=random(3, WIDTH))
    assert torch.equal(unpack(coding.pack_request(request)["hidden_TD"]), request.tensors["hidden_TD"])
    assert torch.equal(unpack(coding.pack_reply(request, answer)["rows_ND"]), answer.tensors["rows_ND"])


def test_an_evaluation_between_two_steps_changes_nothing() -> None:
    with_one, without = Coding("int4", "int4"), Coding("int4", "int4")
    for coding in (with_one, without):
        gradient(coding, forward(0))
    evaluation = forward(-1, train=False)
    gradient(with_one, evaluation)
    with_one.pack_reply(evaluation, reply(evaluation, rows_ND=random(3, WIDTH)))
    assert gradient(with_one, forward(1)) == gradient(without, forward(1))


def test_a_codec_that_loses_little_carries_nothing_on() -> None:
    coding = Coding("none", "int8")
    assert gradient(coding, forward(0)) == gradient(coding, forward(1))


def test_gradients_of_labelled_positions_belong_to_the_rows_of_their_forward() -> None:
    """Rows come in the other order in the next step: each must meet its own error."""
    coding, codec = Coding("topk:0.25"), "topk:0.25"
    gradient = random(3, WIDTH, seed=1)
    coding.pack_request(forward(0))
    first = coding.pack_request(Message("backward", "client-1", (0, 1, 0), tensors={"gradient_ND": gradient}))
    assert first["gradient_ND"].blob.numpy().tobytes() == plain(gradient, codec)
    error = (gradient - unpack(first["gradient_ND"])).bfloat16()
    swapped = replace(
        forward(1, rows=[4, 7], lengths=[2, 3]),
        tensors={"hidden_TD": random(5, WIDTH), "positions_N": torch.tensor([0, 1, 4])},
    )
    coding.pack_request(swapped)
    order = torch.tensor([1, 2, 0])
    second = coding.pack_request(Message("backward", "client-1", (1, 1, 0), tensors={"gradient_ND": gradient[order]}))
    assert second["gradient_ND"].blob.numpy().tobytes() == plain(gradient[order] + error[order], codec)


def test_the_answering_end_knows_the_rows_from_the_request_until_the_backward_is_answered() -> None:
    coding, gradient = Coding("none", "int4"), random(5, WIDTH, seed=2)
    sent = []
    for step in range(2):
        request = forward(step)
        coding.pack_reply(request, reply(request, rows_ND=random(3, WIDTH)))
        backward = Message("backward", "client-1", request.micro_batch, tensors={"gradient_ND": random(3, WIDTH)})
        packed = coding.pack_reply(backward, reply(backward, gradient_TD=gradient))
        sent.append(packed["gradient_TD"].blob.numpy().tobytes())
        assert not coding._rows
    assert sent[0] == plain(gradient) != sent[1]


def test_micro_batches_that_never_went_backward_are_forgotten_with_their_step() -> None:
    coding = Coding("none", "int4")
    for step in range(5):
        for index in range(3):
            gradient(coding, forward(step, index=index))
        assert {micro_batch[0] for micro_batch in coding._rows} == {step} and len(coding._rows) == 3


def test_a_row_twice_in_a_step_leaves_the_same_error_whichever_micro_batch_is_first() -> None:
    one, other = Coding("none", "int4"), Coding("none", "int4")
    batches = [carrying(random(5, WIDTH, seed=index), index=index) for index in range(2)]
    for coding, order in ((one, batches), (other, batches[::-1])):
        for batch in order:
            gradient(coding, batch)
    assert gradient(one, forward(1)) == gradient(other, forward(1))


@pytest.mark.parametrize(
    ("header", "positions"),
    [
        ({"rows": [7]}, [2]),
        ({"lengths": [3, 3]}, [2]),
        ({"lengths": None}, [2]),
        ({"rows": ["7", []]}, [2]),
        ({"rows": 7}, [2]),
        ({"lengths": [6, -1]}, [2]),
        ({}, [5]),
        ({}, [-1]),
        ({}, [4, 0]),
        ({}, [[0], [1]]),
    ],
)
def test_rows_that_do_not_fit_the_tensors_are_refused(header: dict[str, Any], positions: list[Any]) -> None:
    message = forward(**header)
    message = replace(message, tensors={**message.tensors, "positions_N": torch.tensor(positions)})
    with pytest.raises(PeerError, match=r"micro-batch \(0, 1, 0\) of client-1: "):
        Coding("none", "int4").note_request(message)


def test_a_gradient_for_other_positions_than_the_forwards_is_refused() -> None:
    coding = Coding("int4")
    coding.pack_request(forward())
    with pytest.raises(PeerError, match="gradient_ND of client-1 has 2 rows, not the 3"):
        coding.pack_request(Message("backward", "client-1", (0, 1, 0), tensors={"gradient_ND": random(2, WIDTH)}))


def test_a_value_that_is_not_finite_is_named_with_tensor_and_sender() -> None:
    message = carrying(torch.full((5, WIDTH), torch.nan))
    for codec in ("none", "int4"):
        with pytest.raises(DivergedError, match="hidden_TD of client-1: a value is nan"):
            Coding(codec).pack_request(message)


def test_what_cannot_be_unpacked_is_named() -> None:
    packed = Coding("int8").pack_request(forward())
    packed["hidden_TD"] = replace(packed["hidden_TD"], blob=packed["hidden_TD"].blob[:-1])
    with pytest.raises(PeerError, match="hidden_TD"):
        unpack_all(packed)


def test_an_unknown_codec_is_refused_at_once() -> None:
    with pytest.raises(PeerError, match="unknown 'int3'"):
        Coding("none", "int3")
