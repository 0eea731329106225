"""Where a zarr array may lie: checks of URLs and of the options for the clients that reach them. Imports no zarr."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from memodb.errors import BackendUnavailableError, InvalidOptionError

#: scheme -> (the package through which fsspec reaches it, what to install)
_REMOTE = {
    "s3": ("s3fs", "pip install 'memodb[s3]'"),
    "gs": ("gcsfs", "pip install gcsfs"),
    "gcs": ("gcsfs", "pip install gcsfs"),
    "az": ("adlfs", "pip install adlfs"),
    "abfs": ("adlfs", "pip install adlfs"),
    "abfss": ("adlfs", "pip install adlfs"),
}
_KINDS = 'a directory, "file:///directory", "memory://name", or ' + ", ".join(f'"{s}://..."' for s in _REMOTE)
CLIENTS = ("auto", "fsspec", "obstore")
#: Names under which clients take what must not be written down.
_SECRET = re.compile(
    r"secret|token|passw|pwd|credential|signature$|(^|_)(key|sig)$|(^|_)sas(_|$)|(access|account|api|private|session|sse)_?key"
    r"|connection_string|bearer|authorization|cookie",
    re.IGNORECASE,
)

#: A URL with user information, or with a query, where signatures stand.
_CREDENTIALS = re.compile(r"://[^/?#]*@|://[^#]*\?")


@dataclass(frozen=True)
class Target:
    """Where an array lies.

    Parameters
    ----------
    kind
        "local", "zip", "memory" or "remote".
    where
        A path, the name of a memory store, or the URL.
    """

    kind: str
    where: str

    def __str__(self) -> str:
        return f"memory://{self.where}" if self.kind == "memory" else self.where


def parse_url(url: str) -> Target:
    """Return what a URL, or the path of a directory, points at.

    Raises
    ------
    InvalidOptionError
        If it cannot be used, or carries a secret.
    """
    if "://" not in url:
        if not url:
            raise InvalidOptionError(f"url is empty: expected {_KINDS}")
        return Target("local", os.path.abspath(url))
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InvalidOptionError(f"url {url!r} cannot be read ({error}): expected {_KINDS}") from error
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise InvalidOptionError(
            f"url {parts.scheme}://{parts.hostname or ''}{parts.path} has a user name, a query or a fragment, which "
            "would be written down with the store: give the bare URL, and credentials by the environment"
        )
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise InvalidOptionError(f"url {url!r}: a file URL has three slashes and an absolute path")
        return Target("local", os.path.abspath(unquote(parts.path)))
    if parts.scheme == "memory" and (name := (parts.netloc + parts.path).strip("/")):
        return Target("memory", name)
    if parts.scheme in _REMOTE and parts.netloc:
        return Target("remote", url.rstrip("/"))
    raise InvalidOptionError(f"url {url!r} cannot be used: expected {_KINDS}")


def choose_client(target: Target, client: str) -> str:
    """Return "fsspec" or "obstore", whichever `client` asks for; of "auto" the first that is installed.

    Raises
    ------
    BackendUnavailableError
        If it is not installed; the message tells what to install.
    """
    driver, install = _REMOTE[urlsplit(target.where).scheme]
    there = {
        "fsspec": importlib.util.find_spec("fsspec") and importlib.util.find_spec(driver),
        "obstore": importlib.util.find_spec("obstore"),
    }
    wanted = ("fsspec", "obstore") if client == "auto" else (client,)
    for name in wanted:
        if there[name]:
            return name
    if client == "obstore":
        raise BackendUnavailableError(f"{target} by client='obstore' needs the package obstore: pip install obstore")
    raise BackendUnavailableError(f"{target} needs the package {driver}: {install}")


def parse_storage_options(given: Any, target: Target | None) -> dict[str, Any]:
    """Return the options for the client as a dict; from the command line they come as JSON.

    Raises
    ------
    InvalidOptionError
        If they are no JSON object, hold a secret, or there is no client that would take them.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise InvalidOptionError(f"storage_options are no JSON object: {error}") from error
    if given is None:
        return {}
    try:
        options = json.loads(json.dumps(given)) if isinstance(given, Mapping) else None
    except (TypeError, ValueError) as error:
        raise InvalidOptionError(f"storage_options are kept with the store as JSON, and cannot be: {error}") from error
    if not isinstance(options, dict):
        raise InvalidOptionError(f"storage_options={given!r}: expected a dict, or a JSON object as text")
    if options and (target is None or target.kind != "remote"):
        raise InvalidOptionError("storage_options are for a url on another machine; leave them out here")
    for name in _names(options):
        if _SECRET.search(name):
            raise InvalidOptionError(
                f"storage_options[{name!r}] looks like a secret, and would be written down with the store: give it by "
                "the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, "
                "AZURE_STORAGE_CONNECTION_STRING ...) or by the provider's credential file"
            )
    for name, text in _texts(options):
        if _CREDENTIALS.search(text):
            raise InvalidOptionError(
                f"storage_options[{name!r}] is a URL with a user name, a password or a query, which would be written "
                "down with the store: give the bare URL, and credentials by the environment"
            )
    return options


def _texts(options: Any, name: str = "") -> list[tuple[str, str]]:
    """Return (name, text) of all strings in a nested JSON value."""
    if isinstance(options, dict):
        return [found for key, value in options.items() for found in _texts(value, key)]
    if isinstance(options, list):
        return [found for value in options for found in _texts(value, name)]
    return [(name, options)] if isinstance(options, str) else []


def _names(options: Any) -> list[str]:
    """Return the names in a nested JSON value."""
    if isinstance(options, dict):
        return [*options, *(name for value in options.values() for name in _names(value))]
    if isinstance(options, list):
        return [name for value in options for name in _names(value)]
    return []


def fsspec_options(target: Target, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` in the words of the fsspec driver: ``region`` and ``anon`` mean the same everywhere."""
    found = dict(options)
    scheme = urlsplit(target.where).scheme
    if scheme == "s3" and (region := found.pop("region", None)) is not None:
        found["client_kwargs"] = {**found.get("client_kwargs", {}), "region_name": region}
    if scheme in ("gs", "gcs") and found.pop("anon", False):
        found["token"] = "anon"
    # A listing remembered would hide what another process wrote or removed; an instance shared with the program (or
    # with the process that this one was forked from) would be closed under it.
    return {"use_listings_cache": False, "skip_instance_cache": True, **found}


def obstore_options(target: Target, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` in the words of obstore: ``endpoint_url``, ``region`` and ``anon`` mean the same everywhere."""
    from datetime import timedelta

    found = dict(options)
    if found.pop("anon", False):
        found["skip_signature"] = True
    endpoint = found.pop("endpoint_url", None)
    if endpoint is not None:
        found["endpoint"] = endpoint
    client = found.setdefault("client_options", {})
    if str(found.get("endpoint", "")).startswith("http://"):
        client.setdefault("allow_http", True)
    # obstore's own default is to try for three minutes before it says that a server is not there.
    found.setdefault("retry_config", {"max_retries": 4, "retry_timeout": timedelta(seconds=20)})
    return found
