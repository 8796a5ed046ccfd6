"""Where several machines meet: the address of DISTRIBUTED.ENDPOINT, and whether it is this machine's. Free of torch."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from vissl_like.config.schema import Distributed
from vissl_like.errors import ConfigError

_KEY = "config.DISTRIBUTED.ENDPOINT"
#: ioctl of Linux that asks for the IPv4 address of an interface.
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Endpoint:
    """Host (name or address) and port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def endpoint_of(options: Distributed) -> Endpoint:
    """The endpoint of several machines. Raises ConfigError if it is missing or no host:port, or NODE_ID is too large."""
    if options.NODE_ID >= options.NUM_NODES:
        raise ConfigError(
            f"config.DISTRIBUTED.NODE_ID={options.NODE_ID}: {options.NUM_NODES} machines have the numbers 0 to "
            f"{options.NUM_NODES - 1}. It is needed only where the first machine does not own the endpoint's address."
        )
    host, port = None, None
    with contextlib.suppress(ValueError):
        parts = urlsplit(f"//{options.ENDPOINT}")
        host, port = parts.hostname, parts.port
    if not host or not port:
        raise ConfigError(
            f"{_KEY}={options.ENDPOINT!r}: config.DISTRIBUTED.NUM_NODES={options.NUM_NODES} machines need a place to meet. "
            f"Set {_KEY}=HOST:PORT on all of them: the address of one of them and a free port, for example "
            "10.0.0.1:29500."
        )
    return Endpoint(host, port)


def is_first(options: Distributed) -> bool:
    """Whether this machine is the first one: NODE_ID 0, or the one that has the endpoint's address.

    Asked by binding a socket, since names of hosts may be shared or unknown. The first one serves the store, composes,
    and writes the run folder.
    """
    endpoint = endpoint_of(options)
    if options.NODE_ID >= 0:
        return options.NODE_ID == 0
    addresses = addresses_of(endpoint)
    if _names_every_machine(endpoint.host):
        raise ConfigError(
            f"{_KEY}={options.ENDPOINT!r}: every machine calls itself so. Use an address by which the others reach the "
            "first machine, or, with all launchers on one machine, config.DISTRIBUTED.NODE_ID=0, 1, ..."
        )
    return any(_is_mine(family, address) for family, address in addresses)


def is_writer(options: Distributed) -> bool:
    """Whether this machine writes run folders: the only one, or the first."""
    return options.NUM_NODES == 1 or is_first(options)


def addresses_of(endpoint: Endpoint) -> list[tuple[int, str]]:
    """(family, address) of an endpoint's host. Raises ConfigError if its name is not known here."""
    try:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"{_KEY}='{endpoint}': {endpoint.host!r} is not known on this machine ({error}).") from error
    return [(int(family), str(address[0])) for family, _, _, _, address in found]


def _names_every_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _is_mine(family: int, address: str) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def address_towards(address: str) -> str:
    """The address that this machine has on the way to another one; nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return str(probe.getsockname()[0])


def interface_towards(address: str) -> str | None:
    """The network interface on the way to another machine; None where that cannot be found out."""
    with contextlib.suppress(OSError):
        mine = address_towards(address)
        for _, name in socket.if_nameindex():
            if mine in _addresses_of_interface(name):
                return name
    return None


def _addresses_of_interface(name: str) -> set[str]:
    found = set()
    with contextlib.suppress(OSError, ImportError):
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        found.add(socket.inet_ntoa(answer[20:24]))
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
            digits, *_, interface = line.split()
            if interface == name:
                found.add(str(ipaddress.IPv6Address(bytes.fromhex(digits))))
    return found
