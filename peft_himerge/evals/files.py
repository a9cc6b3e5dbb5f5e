"""The user's own eval functions, from a Python file."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError

__all__ = ["load_evals"]


def load_evals(path: str | Path) -> Any:
    """Import the user's file and return its `eval_fns`; the only code that is run from a path.

    Args:
        path: a Python file that defines `eval_fns(tokenizer) -> {adapter name: function of the
            model}`, or `eval_fns` as such a dict.

    Returns:
        A function of the tokenizer that returns the dict.

    Raises:
        ConfigError: it is no file, or does not define that.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"--eval {str(path)!r} is not a file.")
    spec = importlib.util.spec_from_file_location("himerge_user_evals", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--eval {str(path)!r} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    build = getattr(module, "eval_fns", None)
    if isinstance(build, Mapping):
        return lambda _tokenizer: build
    if not callable(build):
        raise ConfigError(
            f"--eval {str(path)!r} defines no eval_fns(tokenizer) that returns "
            f"{{adapter name: function of the model}}."
        )
    return build
