"""Where a judge lives, and the key to it."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from urllib.parse import urlsplit


def check_url(url: str, allow_http: bool = False) -> str:
    """The address of a server, without a slash at its end.

    The host is looked up by the system for each connection; who controls its name controls where requests go.

    Raises:
        ValueError: no http(s) address, one with a user or a query, a link-local one (where clouds keep credentials), or
            plain http to another machine without ``allow_http``. The address is not shown if it may hold a secret.
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
        address = ipaddress.ip_address(host)
    except ValueError:
        loopback = host == "localhost" or host.endswith(".localhost")
    else:
        loopback = address.is_loopback
        if address.is_link_local or address.is_multicast:
            raise ValueError(f"url: {host} is a link-local address; no judge lives there")
    if parts.scheme == "http" and not loopback and not allow_http:
        raise ValueError(f"url: plain http to {host}: use https, or allow_http where the network can be trusted")
    return url.rstrip("/")


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
