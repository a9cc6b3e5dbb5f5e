"""Names a caller gives: the adapters to merge, and the one the merged adapter gets."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .errors import ConfigError

__all__ = ["check_adapter_names", "check_name", "check_new_name"]

_LONGEST = 200  # many file systems allow 255 bytes


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


def check_name(name: object, what: str) -> None:
    """Refuse a name that PEFT could not give an adapter, or would make a path of.

    Args:
        name: the name.
        what: what an error calls it.

    Raises:
        ConfigError: it is no text, is empty or too long, or has dots, slashes or control
            characters.
    """
    fine = isinstance(name, str) and 0 < len(name) <= _LONGEST and name.isprintable()
    if not fine or any(sign in str(name) for sign in "./\\"):
        raise ConfigError(
            f"{what} must be a non-empty name without dots, slashes and control characters, of at "
            f"most {_LONGEST} characters, got {name!r:.80}."
        )


def check_new_name(adapter_name: str, taken: Collection[str], remedy: str) -> None:
    """Refuse a name that the merged adapter cannot get.

    Args:
        adapter_name: the name.
        taken: names of the adapters that are there.
        remedy: what the caller can do if the name is taken.

    Raises:
        ConfigError: see `check_name`; or it is taken.
    """
    check_name(adapter_name, "adapter_name")
    if adapter_name in taken:
        raise ConfigError(
            f"the model has an adapter {adapter_name!r} already. Choose another adapter_name, or "
            f"{remedy}."
        )
