"""Cases of a grid that only the long runs have (`make soak`)."""

from __future__ import annotations

from functools import partial

import pytest

soaked = partial(pytest.param, marks=pytest.mark.soak)
