"""What the wire costs: a deployment of real processes beside one process, a slow link, and the codecs.

    python scripts/bench_wire.py                       # everything, about 40 minutes on 2 cores
    python scripts/bench_wire.py --parts a bytes --output out/bench/wire.md

(a) client, edge and cloud as processes over mutual TLS, one thread each, over `splitllm train` with as many threads as
there are cores: real tokens per second of GPT-2 small on E2E rows, pairs of runs back to back. (b) The same deployment
through a relay with 40 ms round trip and 200 Mbit/s on both hops, over the relay without delay; micro-batches in flight
and strictly one after another. (c) Bytes by codec, and the held-out loss of stories260K after three epochs of E2E with
each.
The exit status is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from bases import draw_gpt2_small
from pages import bullets, known_figures, machine, table, write_page

from splitllm.wire.codecs import codec, pack
from splitllm.wire.envelopes import request_values
from splitllm.wire.frames import Envelope, FrameType, frames_bytes
from splitllm.wire.issuing import issue
from splitllm.wire.message import Message

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "grpcio", "transformers", "peft")
ROLES = ("cloud", "edge", "client")
SKIPPED = 1  # steps of every run that are not counted: memory is still being taken
CODECS = ("none", "bf16", "fp16", "int8", "int4", "topk:0.25")
FORGETFUL = ", no feedback"  # of a codec whose errors are not carried on
LOSS_CODECS = ("none", "bf16", "fp16", "int8", "int4", f"int4{FORGETFUL}", "topk:0.25")
PARTS = ("a", "b", "bytes", "losses")
BARS = {"a": 0.90, "b": 0.85}
BYTE_BARS = {"int8": 1.05, "int4": 0.55}
LOSS_BARS = {"int8": 0.005, "int4": 0.015}
RTT_MS, MBIT = 40, 200
MOST_TRANSFER = 0.5  # seconds of transfer a second of computing, in (b)
LOSS_ROWS = 800  # that are trained on in (c), and as many are held out


@dataclass(frozen=True)
class Speed:
    """One way of running.

    Attributes:
        name: in the table.
        rates: real tokens per second, one entry a run.
        bytes_per_token: that crossed both hops in both directions.
    """

    name: str
    rates: list[float]
    bytes_per_token: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


class Pace(NamedTuple):
    """Of one run: real tokens per second, and bytes a token over all hops."""

    rate: float
    bytes_per_token: float


def ratio(one: Speed, other: Speed) -> float:
    """The median over pairs of runs."""
    return statistics.median(a / b for a, b in zip(one.rates, other.rates, strict=True))


def recipe_of(
    options: argparse.Namespace, base: Path, tokenizer: Path, cuts: Sequence[int], **train: Any
) -> dict[str, Any]:
    return {
        "model": {"base": str(base), "tokenizer": str(tokenizer)},
        "split": {"tiers": {"client": 1, "edge": 1, "cloud": 1}, "cuts": list(cuts), "labels": "cloud"},
        "lora": {"rank": 4, "alpha": 32},
        "data": {
            "source": str(options.data / "train.jsonl.gz"),
            "eval_fraction": 0.01,
            "limit": options.rows,
            "max_length": 128,
        },
        "train": {"batch_size": 8, "optimizer": {"lr": 2.0e-4}, "schedule": {"name": "constant"}, **train},
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def local_run(recipe: Mapping[str, Any], folder: Path) -> Pace:
    """`splitllm train`, after the steps that are not counted."""
    path = folder / "local.yaml"
    path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
    command = [sys.executable, "-m", "splitllm", "train", str(path), "--output-dir", str(folder / "local")]
    subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)
    return pace(folder / "local" / "metrics.jsonl")


def deployed_run(recipe: Mapping[str, Any], folder: Path, relay: Sequence[str] | None = None) -> Pace:
    """Three processes over mutual TLS, each hop through a relay where one is asked for."""
    issue(folder / "certs", ROLES)
    listen = {name: f"127.0.0.1:{free_port()}" for name in ("edge", "cloud")}
    with ExitStack() as stack:
        reached = listen if relay is None else {n: stack.enter_context(relayed(a, relay)) for n, a in listen.items()}
        wire = {"addresses": reached, "certificates": str(folder / "certs"), "memory_mib": 16_384}
        path = folder / "deployed.yaml"
        path.write_text(yaml.safe_dump({**recipe, "wire": wire}, sort_keys=False))
        running = [start(role, path, folder, listen.get(role)) for role in ROLES]
        try:
            wait_for(running, folder)
        finally:
            for process in running:
                process.kill()
    return pace(folder / "cloud" / "metrics.jsonl")


def wait_for(running: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    """Until all have ended; one that fails ends the benchmark."""
    while any(process.poll() is None for process in running):
        time.sleep(0.2)
        for role, process in zip(ROLES, running, strict=True):
            if process.poll():
                raise SystemExit(f"{role} failed:\n{(folder / f'{role}.log').read_text()[-2000:]}")


def start(role: str, recipe: Path, folder: Path, listen: str | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "splitllm", role, str(recipe), "--output-dir", str(folder / role)]
    if listen is not None:
        command += ["--listen", listen]
    with (folder / f"{role}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment())


@contextmanager
def relayed(address: str, arguments: Sequence[str]) -> Iterator[str]:
    """The address of a relay to `address`."""
    command = [
        sys.executable,
        str(ROOT / "scripts" / "relay.py"),
        "--listen",
        "127.0.0.1:0",
        "--to",
        address,
        *arguments,
    ]
    relay = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert relay.stdout is not None
        yield relay.stdout.readline().split()[-1]
    finally:
        relay.send_signal(signal.SIGTERM)
        relay.wait(10)


def pace(metrics: Path) -> Pace:
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    counted = [record for record in records if record["event"] == "train"][SKIPPED:]
    sums = {key: sum(record[key] for record in counted) for key in ("tokens", "seconds", "bytes_up", "bytes_down")}
    return Pace(sums["tokens"] / sums["seconds"], (sums["bytes_up"] + sums["bytes_down"]) / sums["tokens"])


def interleaved(options: argparse.Namespace, ways: Mapping[str, Any], title: str) -> list[Speed]:
    """Every way in turn, so that a machine that grows slower or faster does so for all."""
    found: dict[str, list[Pace]] = {name: [] for name in ways}
    for number in range(options.pairs):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory(prefix="bench-wire-") as folder:
                found[name].append(way(Path(folder)))
            round_of = f"({title}) round {number + 1} of {options.pairs}"
            print(f"{round_of}: {name}: {found[name][-1].rate:.1f} tokens/s", flush=True)
    return [Speed(name, [one.rate for one in runs], runs[0].bytes_per_token) for name, runs in found.items()]


def measure_speed(options: argparse.Namespace, base: Path) -> list[Speed]:
    cores = len(os.sched_getaffinity(0))
    common = {"steps": SKIPPED + options.steps, "accumulate": 8, "in_flight": 4}
    local = recipe_of(options, base, options.tokenizer, options.cuts, threads=cores, **common)
    deployed = recipe_of(options, base, options.tokenizer, options.cuts, threads=1, **common)
    ways = {"one process": lambda d: local_run(local, d), "deployment": lambda d: deployed_run(deployed, d)}
    return interleaved(options, ways, "a")


def measure_relay(options: argparse.Namespace, base: Path) -> list[Speed]:
    steps = SKIPPED + options.steps
    common = {"threads": 1, "steps": steps, "accumulate": 8}
    piped = recipe_of(options, base, options.tokenizer, options.cuts, in_flight=8, **common)
    alone = recipe_of(options, base, options.tokenizer, options.cuts, in_flight=1, **common)
    slow = ["--rtt-ms", str(RTT_MS), "--mbit", str(MBIT)]
    ways = {
        "no delay, 8 in flight": lambda d: deployed_run(piped, d, []),
        "40 ms and 200 Mbit/s, 8 in flight": lambda d: deployed_run(piped, d, slow),
        "40 ms and 200 Mbit/s, one after another": lambda d: deployed_run(alone, d, slow),
        "no delay, one after another": lambda d: deployed_run(alone, d, []),
    }
    return interleaved(options, ways, "b")


def transfer_share(speeds: Sequence[Speed]) -> float:
    """Seconds that the bytes of a token take on the slow link, over those that it takes to compute without delay."""
    alone = speeds[-1]
    return alone.bytes_per_token * 8 / (MBIT * 1e6) * alone.median


def measure_bytes() -> list[dict[str, Any]]:
    """A micro-batch of 8 rows as they are in E2E: 400 tokens, 196 of them labelled."""
    rows = []
    lengths = [44, 46, 48, 49, 51, 52, 54, 56]
    tokens, labels = sum(lengths), 196
    for width in (768, 2048):
        hidden_TD = torch.randn(tokens, width, generator=torch.Generator().manual_seed(width))
        small = {
            "positions_N": torch.arange(labels, dtype=torch.int32),
            "targets_N": torch.arange(labels, dtype=torch.int32),
        }
        for name in CODECS:
            coded = pack(hidden_TD, name)
            header: dict[str, Any] = {"lengths": lengths, "train": True, "input_gradient": True}
            if codec(name).feedback:
                header["rows"] = [12345 + row for row in range(len(lengths))]
            tensors = {"hidden_TD": hidden_TD, **small}
            message = Message("forward", "client-0", (100, 0, 3), header, tensors, 1_800_000_000_000)
            packed = {"hidden_TD": coded, **{key: pack(value, "none") for key, value in small.items()}}
            up = frames_bytes(Envelope(FrameType.REQUEST, 1000, request_values(message, [999]), packed))
            down = frames_bytes(
                Envelope(FrameType.REPLY, 1000, {"header": {"loss": 123.456789012345}}, {"gradient_TD": coded})
            )
            bar = BYTE_BARS.get(name)
            sizes = {"tensor": coded.nbytes / tokens, "up": up / tokens, "down": down / tokens}
            worst = max(sizes.values()) / width
            rows.append({"width": width, "codec": name, **sizes, "over_width": worst, "bar": bar})
    return rows


def measure_losses(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Three epochs: errors are carried on from the second."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in LOSS_CODECS}
    for seed in range(options.seeds):
        for name in LOSS_CODECS:
            with tempfile.TemporaryDirectory(prefix="bench-wire-") as folder:
                local_run(loss_recipe(options, seed, name), Path(folder))
                summary = json.loads((Path(folder) / "local" / "summary.json").read_text())
                summary["train_loss"] = training_loss(Path(folder) / "local" / "metrics.jsonl")
            keys = ("eval_loss_after", "unsplit_loss_after", "train_loss")
            found[name].append({key: summary[key] for key in keys})
            print(f"(c) seed {seed}, {name}: {found[name][-1]}", flush=True)
    return found


def loss_recipe(options: argparse.Namespace, seed: int, name: str) -> dict[str, Any]:
    train = {"steps": 3 * LOSS_ROWS // 8, "threads": options.threads, "verify_adapter": True}
    recipe = recipe_of(options, options.stories, options.stories, [1, 3], **train)
    recipe["train"]["optimizer"] = {"lr": 2.0e-3}
    recipe["data"] |= {"limit": 2 * LOSS_ROWS, "eval_fraction": 0.5}
    chosen, memory = name.removesuffix(FORGETFUL), 0 if name.endswith(FORGETFUL) else 256
    return recipe | {"seed": seed, "wire": {"up": chosen, "down": chosen, "feedback_mib": memory}}


def training_loss(metrics: Path, last: int = 20) -> float:
    """The mean of the last steps: what the codec does to the loss while it is at work."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return statistics.mean([record["loss"] for record in records if record["event"] == "train"][-last:])


def loss_rows(losses: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Mean over seeds, and how far above that without a codec: held out, and in the last steps of training."""
    rows: list[dict[str, Any]] = []
    for name, seeds in losses.items():
        row: dict[str, Any] = {"codec": name, "bar": LOSS_BARS.get(name)}
        for key in ("eval_loss_after", "train_loss"):
            pairs = [(seed[key], plain[key]) for seed, plain in zip(seeds, losses["none"], strict=True)]
            row[key] = statistics.mean(value for value, _ in pairs)
            row[f"{key}_over"] = statistics.mean(value / plain - 1 for value, plain in pairs)
            row[f"{key}_worst"] = max(value / plain - 1 for value, plain in pairs)
        rows.append(row)
    return rows


def speed_table(title: str, speeds: Sequence[Speed]) -> list[str]:
    rows = []
    for speed in speeds:
        pairs = ", ".join(f"{a / b:.3f}" for a, b in zip(speed.rates, speeds[0].rates, strict=True))
        rows.append([speed.name, f"{speed.median:.1f}", f"{ratio(speed, speeds[0]):.3f}", pairs])
    return table(["", "#real tokens/s, median", "#over the first, median of rounds", "rounds"], rows, title)


def transfer_lines(speeds: Sequence[Speed]) -> list[str]:
    words = f"{speeds[-1].bytes_per_token:.0f} bytes a token cross the two hops, which takes"
    return ["", f"{words} {transfer_share(speeds):.2f} of the time that computing it takes."]


def bytes_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    sizes = ["#activations or gradient", "#whole request up", "#whole reply down", "#the most, over the width"]
    cells = []
    for r in rows:
        bytes_ = [f"{r[key]:.1f}" for key in ("tensor", "up", "down")]
        cells.append([str(r["width"]), r["codec"], *bytes_, f"{r['over_width']:.3f}", str(r["bar"] or "")])
    return table(["#width", "codec", *sizes, "#bar"], cells, "(c) bytes a real token")


def loss_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    held = ["#held-out loss", "#over none, mean", "#worst seed"]
    last = ["#loss of the last 20 steps", "#over none, mean"]
    cells = []
    for r in rows:
        held_out = [
            f"{r['eval_loss_after']:.4f}",
            *(f"{r[f'eval_loss_after_{key}']:+.2%}" for key in ("over", "worst")),
        ]
        bar = "" if r["bar"] is None else f"{r['bar']:.1%}"
        cells.append([r["codec"], *held_out, bar, f"{r['train_loss']:.4f}", f"{r['train_loss_over']:+.2%}"])
    return table(["codec, both ways", *held, "#bar", *last], cells, "(c) loss of stories260K after fine-tuning")


TITLES = {
    "a": "(a) one process or three",
    "b": "(b) a slow link",
}


def page(found: Mapping[str, Any]) -> list[str]:
    lines = bullets(found["machine"])
    for key, title in TITLES.items():
        if key in found:
            speeds = [Speed(**speed) for speed in found[key]]
            lines += speed_table(title, speeds)
            lines += transfer_lines(speeds) if key.startswith("b") else []
    if "bytes" in found:
        lines += bytes_table(found["bytes"])
    if "losses" in found:
        lines += loss_table(found["losses"])
    return lines


def missed(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for key in TITLES:
        if key in found:
            speeds = [Speed(**speed) for speed in found[key]]
            value, bar = ratio(speeds[1], speeds[0]), BARS[key[0]]
            lines += [f"({key}): {value:.3f}, the bar is {bar}"] if value < bar else []
            if key.startswith("b") and (share := transfer_share(speeds)) > MOST_TRANSFER:
                lines.append(f"({key}): transfer takes {share:.2f} of the time of computing, above {MOST_TRANSFER}")
    for r in found.get("bytes", ()):
        if r["bar"] and r["over_width"] > r["bar"]:
            lines.append(f"(c) {r['codec']} at {r['width']}: {r['over_width']:.3f} of the width, the bar is {r['bar']}")
    for r in found.get("losses", ()):
        if r["bar"] and r["eval_loss_after_over"] > r["bar"]:
            lines.append(f"(c) {r['codec']}: loss {r['eval_loss_after_over']:+.2%}, the bar is {r['bar']:.1%}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = ROOT.parent / "shared" / "data"
    parser.add_argument("--data", type=Path, default=shared / "e2e", help="folder with train.jsonl.gz of E2E")
    parser.add_argument("--tokenizer", type=Path, default=shared / "gpt2-tokenizer", help="GPT-2's, with config.json")
    parser.add_argument("--stories", type=Path, default=shared / "stories260K", help="folder with stories260K")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a run")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--cuts", type=int, nargs=2, default=[4, 10])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the runs that are not timed")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out/bench/wire.md"),
        help="its marked part is replaced; JSON goes beside it",
    )
    options = parser.parse_args()
    found = {**known_figures(options.output), "machine": machine(*PACKAGES)}
    with tempfile.TemporaryDirectory(prefix="bench-wire-base-") as folder:
        base = draw_gpt2_small(options.tokenizer, Path(folder)) if {"a", "b"} & set(options.parts) else Path(folder)
        parts: dict[str, tuple[str, Callable[[], Any]]] = {
            "a": ("a", lambda: [asdict(speed) for speed in measure_speed(options, base)]),
            "b": ("b", lambda: [asdict(speed) for speed in measure_relay(options, base)]),
            "bytes": ("bytes", measure_bytes),
            "losses": ("losses", lambda: loss_rows(measure_losses(options))),
        }
        for part in options.parts:
            key, measure = parts[part]
            found[key] = measure()
            write_page(options.output, "bench_wire.py", page(found), found)
    print("\n".join(page(found)))
    for line in (lines := missed(found)):
        print(f"missed: {line}", file=sys.stderr)
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
