"""Records the frames in this folder: `python -m tests.wire.corpus.record`. One of each kind that a client sends."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import yaml

from splitllm.preflight import prepare
from splitllm.recipe import Recipe, load_recipe
from splitllm.wire.coding import Coding
from splitllm.wire.envelopes import request_values
from splitllm.wire.frames import VERSION, Envelope, FrameType, to_frames
from splitllm.wire.message import Message
from tests.roles.tree import TickLoop, Tree
from tests.tiny import save_base, write_rows

CODECS = ("none", "int8", "int4", "topk:0.1")


def write_two_tier_recipe(folder: Path, steps: int, drop_after: float = 5.0) -> Path:
    """Two clients and a cloud; who is away for five seconds is left out."""
    content = {
        "seed": 3,
        "model": {"base": str(save_base(folder / "base"))},
        "split": {"tiers": {"client": 2, "cloud": 1}, "cuts": [2], "labels": "client"},
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
        "data": {"source": str(write_rows(folder / "rows.jsonl")), "max_length": 24, "eval_fraction": 0.1},
        "train": {"steps": steps, "batch_size": 2, "accumulate": 1, "optimizer": {"lr": 0.01}, "threads": 1},
        "wire": {"absent": "drop", "drop_after": drop_after},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def run_in_process(recipe: Recipe, absent: tuple[str, ...] = ()) -> Tree:
    """The same run without processes; its messages are in `seen`."""
    plan = prepare(recipe)
    with asyncio.Runner(loop_factory=TickLoop) as runner:

        async def run() -> Tree:
            tree = Tree(recipe, plan.corpus, patience=recipe.wire.drop_after)
            await tree.run(absent=absent, most=10_000_000)
            return tree

        return runner.run(run())


def recorded(messages: list[Message]) -> dict[str, bytes]:
    """Frames by name: of every kind one, those with activations with several codecs."""
    hello = {"name": "client-1", "recipe": "0" * 32, "model": "0" * 32, "protocol": VERSION, "incarnation": "0" * 16}
    found = {"hello": to_frames(Envelope(FrameType.HELLO, 0, hello))}
    for number, message in enumerate(messages, 1):
        train = message.kind == "backward" or message.header.get("train") is True
        name = message.kind if train or message.kind != "forward" else "evaluation"
        for codec in CODECS if train else CODECS[:1]:
            packed = Coding(up=codec).pack_request(message)
            label = f"{name}-{codec.replace(':', '')}" if train else name
            frames = to_frames(Envelope(FrameType.REQUEST, number, request_values(message, [number - 1]), packed))
            found.setdefault(label, frames)
    found["goodbye"] = to_frames(Envelope(FrameType.GOODBYE, 0))
    return {name: frames[0] for name, frames in found.items() if len(frames) == 1}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(write_two_tier_recipe(Path(folder), steps=2), ())
        tree = run_in_process(recipe)
    messages = [message for message, _ in tree.seen if message.sender == "client-1"]
    state = tree.pasts["client-1"].state()
    messages.append(Message("share", "client-1", (0, 0, 0), {}, state, messages[-1].generation))
    for name, frame in recorded(messages).items():
        (Path(__file__).parent / f"{name}.bin").write_bytes(frame)


if __name__ == "__main__":
    main()
