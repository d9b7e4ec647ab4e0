"""One role, by its name."""

from __future__ import annotations

import gc
import logging
from pathlib import Path

from splitllm.recipe import Recipe, tier_of

logger = logging.getLogger(__name__)


def run_role(
    recipe: Recipe,
    name: str,
    directory: Path,
    *,
    listen: str | None = None,
    metrics: str | None = None,
    insecure: bool = False,
) -> None:
    """Run one role of a recipe until the run is complete.

    Args:
        recipe: the run; the same for all its roles.
        name: of the role.
        directory: receives its journal and, at the top, what the run leaves.
        listen: HOST:PORT of a server where it is not that of `wire.addresses`.
        metrics: HOST:PORT for Prometheus, or None.
        insecure: allow plain TCP beyond this machine.

    Raises:
        SplitLLMError: as `serve` and `attend`.
    """
    logger.info("starts", extra={"fields": {"folder": str(directory)}})
    from splitllm.deployment.client import attend  # torch and all: seconds, and nobody should wonder
    from splitllm.deployment.server import serve
    from splitllm.deployment.station import Options

    gc.freeze()  # what imports leave is never garbage, and half a million objects that every collection would look at
    options = Options(name, directory, listen, metrics, insecure)
    (attend if tier_of(recipe, name)[0] == 0 else serve)(recipe, options)
