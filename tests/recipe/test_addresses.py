"""What is HOST:PORT, and what is not."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.errors import RecipeError
from splitllm.recipe import host_and_port


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("localhost:7000", "localhost", 7000),
        ("edge_1.example-x.org:1", "edge_1.example-x.org", 1),
        ("127.0.0.1:65535", "127.0.0.1", 65535),
        ("[2001:DB8::1]:80", "2001:DB8::1", 80),
        ("[::]:7000", "::", 7000),
    ],
)
def test_an_address_is_host_and_port(recipe_with, address: str, host: str, port: int) -> None:
    assert host_and_port(address) == (host, port)
    assert recipe_with(f'wire.addresses.cloud="{address}"').wire.addresses == {"cloud": address}


@pytest.mark.parametrize(
    "address",
    [
        *("h", "h:", ":7000", "h:0", "h:65536", "h:07000", "h:-1", "h:7000x", "h:\u0667", "h: 7000", " h:1", "h:1\n"),
        *("::1:7000", "[::1]", "[h]:7000", "[::1:7000", "[127.0.0.1]:1", "[fe80::1%]:1", "127.0.0:1", "256.0.0.1:1"),
        *(
            "a b:1",
            "a..b:1",
            "-a:1",
            "a-:1",
            "http://h:1",
            "h/x:1",
            "h:1:2",
            f"{'a' * 64}:1",
            f"{'a.' * 127}a:1",
            "é:1",
        ),
    ],
)
def test_what_is_no_address_is_refused(recipe_with, address: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        host_and_port(address)
    with pytest.raises(RecipeError, match=r"^wire\.addresses\.cloud: .* is not allowed; use HOST:PORT") as caught:
        recipe_with(f"wire.addresses.cloud={json.dumps(address)}")
    assert len(caught.value.problems) == 1


@given(st.text(max_size=30) | st.from_regex(r"[\[\]a0-9:.%-]{1,20}:[0-9]{1,6}"))
def test_any_text_is_an_address_or_refused_by_a_value_error(text: str) -> None:
    with suppress(ValueError):
        host, port = host_and_port(text)
        assert host and 1 <= port <= 65535 and text.endswith(f":{port}")
