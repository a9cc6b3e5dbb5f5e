"""YAML files of users: safe, and a key that is there twice is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError

__all__ = ["parse_yaml", "read_yaml"]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which builds plain values only; of two equal keys it takes the last."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key, (place, _) in zip(keys, node.value, strict=True):
        if keys.count(key) > 1:
            text = f"the key {key!r} is there twice"
            raise yaml.constructor.ConstructorError(None, None, text, place.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str) -> Any:
    """Return the value that a text of YAML says; nothing in it is executed.

    Raises:
        ConfigError: it is no valid YAML, has a key twice, or asks for an object of Python.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as exc:
        raise ConfigError(f"this is no valid YAML: {exc}.") from exc


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """Return the table in a YAML file.

    Raises:
        ConfigError: there is no such file, it is no valid YAML, or no table of keys.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError("there is no such file.")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"this is no text in UTF-8: {exc}.") from exc
    data = parse_yaml(text)
    if not isinstance(data, dict):
        raise ConfigError(f"expected a table of keys, 'key: value', got {data!r:.80}.")
    return data
