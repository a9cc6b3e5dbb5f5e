"""Hi-Merging under the name "hi", next to the other methods.

`merge_adapters_hi` is its own door: the journal, listeners and the full result are there. Here the
same merge is reached by the call that reaches the others, and gives the same kind of result.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from peft import PeftModel

from .adapters import read_adapters
from .config import HiMergeConfig
from .errors import ConfigError
from .hi import merge_adapters_hi
from .merged import AdapterMerge
from .methods.registry import MethodInfo, register
from .methods.stack import Delta, Dense
from .overwrite import taking_over
from .result import MergeResult
from .scoring import EvalFn

__all__ = ["HI", "merge_by_hi"]

# Options of `HiMergeConfig` that `merge_adapters` itself takes.
_SHARED = ("rank", "metric")

HI = register(
    MethodInfo(
        name="hi",
        title="Hi-Merging",
        url="https://arxiv.org/abs/2506.12379",
        variant="ours; the authors' by variant='paper'",
        needs="scores",
        low_rank=False,
        elementwise=False,
        options=MappingProxyType(
            {n: f.default for n, f in HiMergeConfig.model_fields.items() if n not in _SHARED}
        ),
        function=merge_adapters_hi,
        summary=(inspect.getdoc(merge_adapters_hi) or "").partition("\n")[0],
    )
)


def merge_by_hi(
    model: PeftModel,
    names: Sequence[str],
    adapter_name: str,
    eval_fns: Mapping[str, EvalFn],
    options: Mapping[str, Any],
    *,
    weights: Mapping[str, float],
    unread: Mapping[str, tuple[Any, ...]],
) -> AdapterMerge:
    """Merge by `merge_adapters_hi`; the result's `hi` is what it gave.

    Args:
        model: the model.
        names: the adapters.
        adapter_name: name of the new adapter; one that has it is replaced.
        eval_fns: adapter -> function of the model.
        options: those of `HiMergeConfig`.
        weights: adapter -> the user's weight; must be 1.
        unread: argument -> (what it got, what leaves it alone, ...), for arguments of the caller
            that mean nothing here.

    Raises:
        ConfigError: an argument would not be read; nothing was touched. Further as
            `merge_adapters_hi`.
    """
    _refuse(weights, unread)
    config = HiMergeConfig(**options)
    read = read_adapters(model, names)
    with taking_over(model, adapter_name) as made:
        found = merge_adapters_hi(model, names, eval_fns, adapter_name=made, config=config)
    result = replace(found, adapter_name=adapter_name)
    return AdapterMerge(
        adapter_name=adapter_name,
        model=model,
        method=HI,
        weights=MappingProxyType(dict(weights)),
        options=MappingProxyType(config.model_dump()),
        space="full",
        seed=0,
        modules=result.modules,
        rank=result.rank,
        notes=(),
        fitted={
            "plan": result.plan.to_dict(),
            "scores": result.scores,
            "standard_errors": result.standard_errors,
            "scores_computed": result.scores_computed,
        },
        seconds=result.seconds,
        _deltas=lambda: _deltas(result),
        _sources={a.name: (a, a.version()) for a in read},
        _carried={},
        hi=result,
    )


def _refuse(weights: Mapping[str, float], unread: Mapping[str, tuple[Any, ...]]) -> None:
    for name, weight in weights.items():
        if weight != 1.0:
            raise ConfigError(
                f"Hi-Merging finds the scales itself, so weights must be 1.0, got {weight!r} for "
                f"adapter {name!r}. Leave weights at 1.0, or fix scale={{adapter: factor}} and "
                f"density in HiMergeConfig."
            )
    for name, (got, *neutral) in unread.items():
        if got not in neutral:
            raise ConfigError(
                f"Hi-Merging does not read {name}, got {got!r}. Leave it at {neutral[0]!r}, or "
                f"choose another method."
            )


def _deltas(result: MergeResult) -> Iterator[tuple[str, Delta]]:
    return ((record.module, Dense(result.delta(record.module))) for record in result.modules)
