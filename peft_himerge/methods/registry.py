"""The merging methods by name: what each is, where it comes from, and the options it takes.

A method is registered by decorator and stays the plain function it is. Its keyword-only parameters
are its options; there is no other list of them. Most methods read the adapters alone and are of the
form ``f(stacks, *, options)``. One that needs scores, inputs or gradients is fitted first:
``f(stacks, evidence, *, options)`` looks at the data once and returns a `Fitted`, which is then run
like any other method, as often as its deltas are asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

from ..errors import ConfigError, suggest
from .stack import Result, Stack

__all__ = [
    "REQUIRED",
    "Fitted",
    "MethodInfo",
    "Needs",
    "describe",
    "get_method",
    "list_methods",
    "method",
    "register",
]

Needs = Literal["nothing", "scores", "inputs", "gradients"]
_F = TypeVar("_F", bound=Callable[..., Any])


class _Required:
    """Stands for an option's default where there is none."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()
# Keywords of `merge_adapters` itself: a method's option of that name could never be given.
_RESERVED = (
    "model",
    "adapters",
    "method",
    "weights",
    "adapter_name",
    "space",
    "rank",
    "pad_rank",
    "post",
    "modules_to_save",
    "strict_base",
    "overwrite",
    "seed",
    "eval_fns",
    "inputs",
    "metric",
)


@dataclass(frozen=True, slots=True)
class Fitted:
    """A method together with what it learned from data.

    Attributes:
        run: gives the merged deltas of the stacks it was fitted on; the same ones in every call.
        report: what was learned, as plain JSON values: coefficients, what was tried, scores.
    """

    run: Callable[[Sequence[Stack]], Result]
    report: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """What is known about one method without running it.

    Attributes:
        name: the name to pass as `method`.
        title: what the paper calls it.
        url: the paper.
        variant: whose reading of it this is: "authors", "peft", "mergekit", "ours", ...
        needs: what it needs from you beside the adapters: "nothing", "scores" (eval functions),
            "inputs" (unlabelled examples) or "gradients" (of a loss on them).
        reads_base: True if it reads the base model's weights too, so that it cannot run without a
            model, or on a quantised one.
        low_rank: True if the result is an exact product of thin factors, so that the exported
            adapter loses nothing.
        elementwise: True if it reads deltas entry by entry, so that it also runs in the spaces
            "knots" and "core".
        options: option -> its default; `REQUIRED` if it has none.
        function: the method itself.
        summary: first line of its docstring.
    """

    name: str
    title: str
    url: str
    variant: str
    needs: Needs
    low_rank: bool
    elementwise: bool
    options: Mapping[str, Any] = field(repr=False)
    function: Callable[..., Any] = field(repr=False, compare=False)
    summary: str = ""
    reads_base: bool = False

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options the method does not have, and the lack of one that it needs.

        Raises:
            ConfigError: with what is allowed.
        """
        for name in options:
            if name not in self.options:
                hint = suggest(name, self.options) if self.options else " It has none."
                raise ConfigError(f"method {self.name!r} has no option {name!r}.{hint}")
        for name, default in self.options.items():
            if default is REQUIRED and name not in options:
                raise ConfigError(f"method {self.name!r} needs the option {name!r}.")


_METHODS: dict[str, MethodInfo] = {}


def describe(
    function: Callable[..., Any],
    name: str,
    *,
    title: str = "",
    url: str = "",
    variant: str = "ours",
    needs: Needs = "nothing",
    low_rank: bool = False,
    elementwise: bool = False,
    reads_base: bool = False,
) -> MethodInfo:
    """Return the record of a function without registering it (a user's own method).

    Raises:
        ConfigError: `function` is not of the form ``f(stacks, *, options)``, or an option has the
            name of an argument of `merge_adapters`.
    """
    if needs not in get_args(Needs):
        raise ConfigError(f"needs got {needs!r}.{suggest(str(needs), get_args(Needs))}")
    read = ("stacks",) if needs == "nothing" else ("stacks", "evidence")
    parameters = list(inspect.signature(function).parameters.values())
    first, rest = parameters[: len(read)], parameters[len(read) :]
    odd = [p.name for p in rest if p.kind is not p.KEYWORD_ONLY]
    odd += [p.name for p in first if p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if odd or len(first) < len(read):
        what = f"; {odd[0]!r} does not fit." if odd else "."
        raise ConfigError(
            f"the method {name!r} must take {' and '.join(read)}, then keyword-only options: "
            f"f({', '.join(read)}, *, ...){what}"
        )
    taken = [p.name for p in rest if p.name in _RESERVED]
    if taken:
        raise ConfigError(
            f"the method {name!r} has an option {taken[0]!r}, which is an argument of "
            f"merge_adapters; give it another name."
        )
    options = {p.name: REQUIRED if p.default is p.empty else p.default for p in rest}
    summary = (inspect.getdoc(function) or "").partition("\n")[0]
    return MethodInfo(
        name=name,
        title=title or name,
        url=url,
        variant=variant,
        needs=needs,
        low_rank=low_rank,
        elementwise=elementwise,
        options=MappingProxyType(options),
        function=function,
        summary=summary,
        reads_base=reads_base,
    )


def method(
    name: str,
    *,
    title: str,
    url: str,
    variant: str,
    needs: Needs = "nothing",
    low_rank: bool = False,
    elementwise: bool = False,
    reads_base: bool = False,
) -> Callable[[_F], _F]:
    """Register the decorated function under `name`; it is returned untouched.

    Args:
        name: the name users pass; must be free.
        title: the paper's name of the method.
        url: the paper.
        variant: whose reading this is.
        needs: see `MethodInfo`.
        low_rank: see `MethodInfo`.
        elementwise: see `MethodInfo`.
        reads_base: see `MethodInfo`.

    Raises:
        ConfigError: the name is taken, or the function has positional options.
    """

    def decorate(function: _F) -> _F:
        register(
            describe(
                function,
                name,
                title=title,
                url=url,
                variant=variant,
                needs=needs,
                low_rank=low_rank,
                elementwise=elementwise,
                reads_base=reads_base,
            )
        )
        return function

    return decorate


def register(info: MethodInfo) -> MethodInfo:
    """Take a record into the registry and return it; for methods that have a door of their own.

    Raises:
        ConfigError: the name is taken.
    """
    if info.name in _METHODS:
        taken = _METHODS[info.name].function
        raise ConfigError(
            f"the method name {info.name!r} is taken by {taken.__module__}.{taken.__qualname__}."
        )
    _METHODS[info.name] = info
    return info


def get_method(name: str) -> MethodInfo:
    """Return the record of a registered method.

    Raises:
        ConfigError: there is no such method; the text has the nearest name and all names.
    """
    if name not in _METHODS:
        raise ConfigError(f"no merging method {name!r}.{suggest(str(name), sorted(_METHODS))}")
    return _METHODS[name]


def list_methods() -> tuple[MethodInfo, ...]:
    """Return the records of all methods, sorted by name."""
    return tuple(_METHODS[name] for name in sorted(_METHODS))
