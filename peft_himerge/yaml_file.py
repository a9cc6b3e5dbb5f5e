"""YAML files of users: safe, and a key that is there twice is refused."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError

__all__ = ["parse_yaml", "read_yaml"]

_MOST_CHARACTERS = 1 << 18
_MOST_VALUES = 100_000
_DEEPEST = 100
_MERGE = "tag:yaml.org,2002:merge"  # the key <<


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which builds plain values only; of two equal keys it takes the last."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for place, _ in node.value:
        if place.tag == _MERGE:
            continue
        key = loader.construct_object(place)
        if not isinstance(key, Hashable):
            text = f"a key must be a name or a number, got {type(key).__name__}"
            raise yaml.constructor.ConstructorError(None, None, text, place.start_mark)
        if key in seen:
            text = f"the key {key!r:.80} is there twice"
            raise yaml.constructor.ConstructorError(None, None, text, place.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _check_size(root: yaml.Node) -> None:
    """Refuse what aliases (*name) make endless, or too large to be written out."""
    sizes: dict[int, int] = {}
    above: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if id(node) in above or depth > _DEEPEST:
            raise RecursionError
        if id(node) not in sizes:
            above.add(id(node))
            held = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [
                part for item in held for part in (item if isinstance(item, tuple) else [item])
            ]
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in parts)
            above.discard(id(node))
        return sizes[id(node)]

    if size(root, 0) > _MOST_VALUES:
        raise ConfigError(
            f"this stands for more than {_MOST_VALUES} values, because aliases repeat others. "
            f"Write out what is meant."
        )


def parse_yaml(text: str) -> Any:
    """Return the value that a text of YAML says; nothing in it is executed.

    Raises:
        ConfigError: it is no valid YAML, has a key twice, or asks for an object of Python.
    """
    if len(text) > _MOST_CHARACTERS:
        raise ConfigError(
            f"this has {len(text)} characters; at most {_MOST_CHARACTERS} are read. Data belongs "
            f"into files of its own."
        )
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError("this is nested too deeply to be read.") from None
    except (yaml.YAMLError, ValueError) as exc:  # ValueError: a date or a number that is none
        raise ConfigError(f"this is no valid YAML: {exc}.") from exc


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """Return the table in a YAML file.

    Raises:
        ConfigError: there is no such file, it is no valid YAML, or no table of keys.
    """
    file = Path(path)
    try:
        if not file.is_file():
            raise ConfigError("there is no such file.")
        with file.open(encoding="utf-8") as opened:
            text = opened.read(_MOST_CHARACTERS + 1)
    except UnicodeDecodeError as exc:
        raise ConfigError(f"this is no text in UTF-8: {exc}.") from exc
    except OSError as exc:
        raise ConfigError(f"this cannot be read: {exc}.") from exc
    data = parse_yaml(text)
    if not isinstance(data, dict):
        raise ConfigError(f"expected a table of keys, 'key: value', got {data!r:.80}.")
    return data
