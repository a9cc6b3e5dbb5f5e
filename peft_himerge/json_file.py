"""JSON files that others wrote: of bounded size, one object, and no key twice."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from .errors import ConfigError

__all__ = ["check_header", "parse_json", "read_object"]

_DEEPEST = 100
_MOST_BYTES = 1 << 24  # no adapter's config comes near 16 MB


def parse_json(text: str | bytes) -> Any:
    """Return the value that a JSON text says.

    Raises:
        ConfigError: it is no JSON in UTF-8, is nested too deeply, or has a key twice.
    """
    try:
        plain = text if isinstance(text, str) else text.decode("utf-8")
        found = json.loads(plain, object_pairs_hook=_table)
        _check_depth(found)
        return found
    except RecursionError:
        raise ConfigError("it is nested too deeply to be read") from None
    except ValueError as exc:  # of JSON, of UTF-8, or of a number with thousands of digits
        raise ConfigError(f"it is not valid JSON: {exc}") from exc


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > _DEEPEST:
            raise RecursionError
        inner = [v for v in level if isinstance(v, (dict, list))]
        level = [v for held in inner for v in (held.values() if isinstance(held, dict) else held)]
        depth += 1


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r:.80} is there twice")
            seen.add(key)
    return table


def check_header(path: Path) -> None:
    """Refuse a safetensors file whose header has a key twice; its readers take the last one.

    Raises:
        ConfigError: says which.
    """
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        parse_json(file.read(size))


def read_object(path: Path, most_bytes: int = _MOST_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: the file.
        most_bytes: a larger file is refused unread.

    Raises:
        ConfigError: there is no such file, it cannot be read, is too large, or holds no object of
            JSON; the text begins with the path.
    """
    where = repr(str(path))
    try:
        size = path.stat().st_size if path.is_file() else -1
        if size < 0:
            raise ConfigError(f"{where}: there is no such file.")
        if size > most_bytes:
            raise ConfigError(
                f"{where} has {size} bytes, more than the {most_bytes} that are read of such a "
                f"file. It is not what it should be: save it again."
            )
        found = parse_json(path.read_bytes())
    except ConfigError as exc:
        if str(exc).startswith(where):
            raise
        text = str(exc).removeprefix("it ")
        raise ConfigError(f"{where} {text}. Save it again.") from exc
    except (OSError, ValueError) as exc:  # ValueError: a path with a zero byte in it
        raise ConfigError(f"{where} cannot be read: {exc}.") from exc
    if not isinstance(found, dict):
        raise ConfigError(f"{where} holds no JSON object, but {type(found).__name__}.")
    return found
