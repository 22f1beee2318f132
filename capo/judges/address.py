"""Where a judge lives, and the key to it."""

from __future__ import annotations

import asyncio
import ipaddress
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from capo.judges import JudgeError

# Where clouds keep credentials, besides the link-local addresses.
_METADATA = {ipaddress.ip_address("fd00:ec2::254"), ipaddress.ip_address("100.100.100.200")}


def check_url(url: str, allow_http: bool = False) -> str:
    """The address of a server, without a slash at its end. What its name is looked up to is for `Lookup` to check.

    Raises:
        ValueError: no http(s) address, one with a user or a query, one where no judge lives (`no_judge_at`), or plain http
            to another machine without ``allow_http``. The address is not shown if it may hold a secret.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("url must have no user, password, query or fragment; name the key's variable in api_key_env")
    try:
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"url must be an http or https address such as http://localhost:8000/v1, got {url!r:.100}")
    try:
        loopback = _address(host).is_loopback
    except ValueError:
        loopback = host == "localhost" or host.endswith(".localhost")
    else:
        if kind := no_judge_at(host):
            raise ValueError(f"url: {host} is a {kind} address; no judge lives there")
    if parts.scheme == "http" and not loopback and not allow_http:
        raise ValueError(f"url: plain http to {host}: use https, or allow_http where the network can be trusted")
    return url.rstrip("/")


def no_judge_at(address: str) -> str | None:
    """What kind of address this is, if it is one where no judge lives: link-local, metadata, multicast, unspecified.

    Raises:
        ValueError: it is no IP address.
    """
    where = _address(address)
    kinds = {
        "link-local": where.is_link_local,
        "metadata": where in _METADATA,
        "multicast": where.is_multicast,
        "unspecified": where.is_unspecified,
    }
    return next((kind for kind, applies in kinds.items() if applies), None)


def _address(written: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(written)
    return getattr(address, "ipv4_mapped", None) or address


class Lookup(asyncio.SelectorEventLoop):
    """An event loop that refuses what a name may not be looked up to.

    It connects to the very addresses that were checked: a name that stands for another machine a moment later (DNS
    rebinding) is checked again, with each connection. In between nothing is pinned: with https the certificate says who
    answers, and without it a name of another machine is used only where ``allow_http`` trusts the network.

    Args:
        loopback_only: nothing but addresses of this machine, as ``localhost`` has to stand for.
    """

    def __init__(self, loopback_only: bool) -> None:
        super().__init__()
        self._loopback_only = loopback_only

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> Any:
        """As of the base class; raises JudgeError if there is an address where no judge lives."""
        found = await super().getaddrinfo(host, port, **options)
        for *_, place in found:
            kind = no_judge_at(str(place[0]))
            if kind is None and self._loopback_only and not _address(str(place[0])).is_loopback:
                kind = "foreign"
            if kind is not None:
                raise JudgeError(f"{host!r:.100} was looked up to {place[0]}, a {kind} address; no judge lives there")
        return found


def read_key(env: str | None, file: str | Path | None) -> str | None:
    """The API key from an environment variable or a file; None if neither is named.

    Raises:
        ValueError: both are named, there is no such thing, or it holds no key. The key is not shown.
    """
    if env is not None and file is not None:
        raise ValueError("api_key_env and api_key_file: name one of them")
    if env is not None:
        key = os.environ.get(env, "").strip()
        where = f"environment variable {env}"
    elif file is not None:
        try:
            key = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"api_key_file: cannot read {file}: {type(error).__name__}") from None
        where = f"file {file}"
    else:
        return None
    if not key:
        raise ValueError(f"no API key: {where} is not set or empty")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(f"{where} holds no API key: it has characters that no key has")
    return key
