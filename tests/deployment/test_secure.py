"""Plain TCP stays on its machine, whatever the address is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitllm.deployment.secure import check_secure
from splitllm.errors import RecipeError
from splitllm.wire.certificates import load_credentials
from splitllm.wire.issuing import issue


@pytest.mark.parametrize("address", ["127.0.0.1:7100", "127.8.9.1:1", "localhost:7100", "[::1]:7100", "127.0.0.1:0"])
def test_plain_tcp_is_allowed_on_this_machine(address: str) -> None:
    check_secure(address, None, insecure=False)


@pytest.mark.parametrize(
    "address", ["0.0.0.0:7100", "10.0.0.1:7100", "[::]:7100", "[::12]:7100", "localhost.example.org:1", "127.org:7"]
)
def test_plain_tcp_beyond_it_needs_to_be_asked_for(address: str, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"^wire\.certificates: missing, but .* is beyond this machine; .*--insecure$"
    ):
        check_secure(address, None, insecure=False)
    check_secure(address, None, insecure=True)
    issue(tmp_path, ["edge"])
    check_secure(address, load_credentials(tmp_path, "edge"), insecure=False)


@pytest.mark.parametrize("address", ["7100", "localhost", ":7100", "127.0.0.1:", "127.0.0.1:99999", ""])
def test_what_is_no_address_is_refused_in_one_line(address: str) -> None:
    with pytest.raises(RecipeError, match=r"^--listen: .* is not HOST:PORT; give --listen [^\n]*$"):
        check_secure(address, None, insecure=False)
