"""What benchmarks share: pages with a part that a script writes, the figures beside them, and the machine.

    about = machine("torch", "grpcio") | {"torch threads": "2"}
    lines = table(["codec", "#bytes"], [["int8", "1.03"], ["int4", "0.55"]], title="Bytes")
    write_page(output, "bench_x.py", [*lines, "", *bullets(about)], {"machine": about, "results": ...})

The page is the user's; what lies between its two marks is the script's, and so is the JSON of the same name beside it.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

END = "<!-- end -->"
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")


def machine(*packages: str) -> dict[str, str]:
    """What figures depend on, as it is now: processor, cores, memory, load, system, versions, date.

    Args:
        packages: whose versions matter; splitllm's is always told.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    known = [f"{key} {fields[key]}" for key in ("cpu family", "model", "stepping") if key in fields]
    flags = [flag for flag in FLAGS if flag in fields.get("flags", "").split()]
    return {
        "CPU": ", ".join([fields.get("model name", platform.processor()), *known]),
        "CPU flags of interest": ", ".join(flags) or "none",
        "cores and memory": f"{len(os.sched_getaffinity(0))} cores, {memory:.1f} GiB",
        "load average at the start": f"{os.getloadavg()[0]:.2f}",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in (*packages, "splitllm")),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def bullets(about: Mapping[str, str]) -> list[str]:
    """A line of Markdown for each entry."""
    return [f"- {key}: {value}" for key, value in about.items()]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> list[str]:
    """Lines of Markdown, under a title of the third level if there is one; columns beginning with # hold numbers."""
    rule = "|".join("---:" if name.startswith("#") else "---" for name in columns)
    head = " | ".join(name.removeprefix("#") for name in columns)
    above = ["", f"### {title}", ""] if title else []
    return [*above, f"| {head} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)]


def write_page(page: Path, script: str, lines: Iterable[str], figures: Mapping[str, Any]) -> None:
    """Put lines between the marks of a page, and the figures as JSON beside it.

    Args:
        page: Markdown; made, with its folder, if it is not there. What is not between the marks stays as it is; a page
            without them gets them at its end.
        script: file name of the one that writes, which is in the first mark.
        lines: of Markdown.
        figures: what JSON can carry.
    """
    begin = f"<!-- written by scripts/{script}: begin -->"
    page.parent.mkdir(parents=True, exist_ok=True)
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    before, found, rest = old.partition(begin)
    after = rest.partition(END)[2] if found else "\n"
    page.write_text("\n".join([before + begin, "", *lines, "", END + after]), encoding="utf-8")
    page.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def known_figures(page: Path) -> dict[str, Any]:
    """The figures beside a page, none if it has not been written yet."""
    file = page.with_suffix(".json")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found
