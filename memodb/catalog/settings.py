"""The settings of a store, as they are kept: JSON that is believed only as far as it is looked at here."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

#: Bytes of the JSON text, characters of a name, factory or path in it.
_MOST_BYTES, _MOST_TEXT = 1 << 20, 1 << 16


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_TEXT


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 1 << 62


#: name -> (test, what is expected). Whether shape, dtype and options fit each other is for whoever uses them to say.
_KNOWN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "uid": (lambda v: isinstance(v, str) and 0 < len(v) <= 64, "a name of at most 64 characters"),
    "shape": (
        lambda v: isinstance(v, list) and len(v) <= 63 and all(_is_count(d) for d in v),
        "at most 63 integers of at least 1",
    ),
    "dtype": (lambda v: isinstance(v, str) and 0 < len(v) <= 64, "a name of at most 64 characters"),
    "key_dim": (lambda v: v is None or (_is_count(v) and v <= 1 << 16), "null, or an integer of 1 to 65536"),
    "backend": (_is_text, "a name"),
    "options": (lambda v: isinstance(v, dict), "an object"),
    "index": (_is_text, "a factory string"),
    "max_bytes": (lambda v: v is None or _is_count(v), "null, or an integer of at least 1"),
}


def parse_settings(text: bytes, known: int) -> tuple[Any, dict[str, Any]]:
    """Return (format version, settings); of another version than the `known` one nothing more is looked at.

    Raises
    ------
    ValueError
        If they are not what memodb writes.
    """
    if len(text) > _MOST_BYTES:
        raise ValueError(f"they take {len(text)} bytes, at most {_MOST_BYTES} are possible")
    try:
        settings = json.loads(text)
    except RecursionError as error:
        raise ValueError("they are nested too deeply") from error
    version = settings.get("format") if isinstance(settings, dict) else None
    if type(version) is not int:
        raise ValueError("they name no format")
    if version != known:
        return version, {}
    for name, (good, expected) in _KNOWN.items():
        if name not in settings:
            raise ValueError(f"{name!r} is missing")
        if not good(settings[name]):
            raise ValueError(f"{name} is {str(settings[name])[:60]!r}, expected {expected}")
    for name in ("copy_of", "copied_from"):
        source = settings.get(name)
        if source is None:
            continue
        if not (isinstance(source, dict) and all(_is_text(source.get(part)) for part in ("uid", "path", "asked"))):
            raise ValueError(f"{name} is {str(source)[:60]!r}, expected uid, path and arguments of a copy")
    return version, dict(settings)
