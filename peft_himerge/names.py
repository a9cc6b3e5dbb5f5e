"""Names a caller gives: the adapters to merge, and the one the merged adapter gets."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .errors import ConfigError

__all__ = ["check_adapter_names", "check_new_name"]


def check_adapter_names(adapters: Sequence[str]) -> list[str]:
    """Return the names of the adapters to merge.

    Raises:
        ConfigError: they are no list of names, there are none, or one is there twice.
    """
    listed = isinstance(adapters, Sequence) and not isinstance(adapters, str)
    if not listed or not all(isinstance(name, str) for name in adapters):
        raise ConfigError(f"adapters must be a list of adapter names, got {adapters!r}.")
    names = list(adapters)
    if not names:
        raise ConfigError("adapters is empty: name the adapters to merge.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"adapters names {twice[0]!r} more than once.")
    return names


def check_new_name(adapter_name: str, taken: Collection[str], remedy: str) -> None:
    """Refuse a name that the merged adapter cannot get.

    Args:
        adapter_name: the name.
        taken: names of the adapters that are there.
        remedy: what the caller can do if the name is taken.

    Raises:
        ConfigError: the name is empty, has a dot, or is taken.
    """
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ConfigError(
            f"adapter_name must be a non-empty name without dots, got {adapter_name!r}."
        )
    if adapter_name in taken:
        raise ConfigError(
            f"the model has an adapter {adapter_name!r} already. Choose another adapter_name, or "
            f"{remedy}."
        )
