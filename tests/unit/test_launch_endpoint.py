"""Where machines meet: what an endpoint may be, and whose it is."""

from __future__ import annotations

import socket

import pytest

from vissl_like.config.schema import Distributed
from vissl_like.errors import ConfigError, DataError, Stopped
from vissl_like.launch.endings import (
    DEFECT,
    KILLED,
    LOST,
    MISTAKE,
    STOPPED,
    Ending,
    Interrupted,
    Killed,
    Lost,
    RunFailed,
)
from vissl_like.launch.endpoint import endpoint_of, interface_towards, is_first, is_writer


def options(endpoint: str, *, node_id: int = -1, num_nodes: int = 4) -> Distributed:
    return Distributed(NUM_NODES=num_nodes, ENDPOINT=endpoint, NODE_ID=node_id)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("10.0.0.1:29500", "10.0.0.1:29500"), ("gpu-1:1", "gpu-1:1"), ("[fd00::1]:29500", "[fd00::1]:29500")],
)
def test_an_endpoint_is_host_and_port(text: str, shown: str) -> None:
    assert str(endpoint_of(options(text))) == shown


@pytest.mark.parametrize("text", ["", "host", "host:", ":29500", "host:port", "host:99999", "[fd00::1"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"config.DISTRIBUTED.ENDPOINT=.*=HOST:PORT .* 10.0.0.1:29500"):
        endpoint_of(options(text))


def test_the_first_machine_is_the_one_with_the_address() -> None:
    assert not is_first(options("192.0.2.1:29500"))  # TEST-NET-1: nobody has it
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        mine = probe.getsockname()[0]
    assert is_first(options(f"{mine}:29500"))


def test_the_number_of_a_machine_decides_where_it_is_given() -> None:
    assert is_first(options("192.0.2.1:29500", node_id=0))
    assert not is_first(options("127.0.0.1:29500", node_id=1))
    with pytest.raises(ConfigError, match=r"NODE_ID=4: 4 machines have the numbers 0 to 3"):
        is_first(options("127.0.0.1:29500", node_id=4))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "0.0.0.0", "[::1]"])
def test_an_address_that_every_machine_has_is_no_place_to_meet(host: str) -> None:
    with pytest.raises(ConfigError, match=r"every machine calls itself so.*NODE_ID=0, 1"):
        is_first(options(f"{host}:29500"))


def test_a_name_that_is_not_known() -> None:
    with pytest.raises(ConfigError, match="'no-such-host.invalid' is not known on this machine"):
        is_first(options("no-such-host.invalid:29500"))


def test_one_machine_writes_without_asking_anybody() -> None:
    assert is_writer(options("", num_nodes=1))


def test_the_interface_towards_this_machine_itself() -> None:
    assert interface_towards("127.0.0.1") in (None, "lo", "lo0")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DataError("config.DATA: wrong."), MISTAKE),
        (Stopped("stopped by SIGTERM after step 3."), STOPPED),
        (Interrupted(15), STOPPED),
        (Killed("rank 1 was killed"), KILLED),
        (Lost("rank 0 lost the connection"), LOST),
        (RunFailed("ZeroDivisionError on rank 1"), DEFECT),
    ],
)
def test_an_ending_crosses_machines_as_the_error_that_it_was(error: Exception, kind: str) -> None:
    there = Ending.from_json(Ending.of(error).to_json())
    assert there.kind == kind
    assert str(there.exception) == str(error)
    assert there.exception.exit_code == error.exit_code  # type: ignore[attr-defined]
