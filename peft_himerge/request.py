"""A merge that was checked and not yet run: names, weights, stacks, options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from peft import PeftModel
from torch import Tensor

from .adapters import common_base, lora_layers, plain_weight, read_adapters
from .carried import FIELDS, Carried, carried_of
from .errors import AdapterError, ConfigError, suggest
from .factors import Adapter, as_matrix
from .layers import layer_of
from .lowrank import LowRank, Rank
from .methods.depth import Lines
from .methods.registry import Fitted, MethodInfo
from .methods.spaces import Space, in_space
from .methods.stack import Delta, Stack
from .names import check_adapter_names, check_new_name

__all__ = [
    "Request",
    "check_evidence",
    "check_names",
    "check_pad",
    "check_post",
    "check_present",
    "check_rank",
    "check_weights",
    "prepare",
]


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A merge that was checked and not yet run: everything it reads, nothing it writes.

    Attributes:
        info: the method.
        options: its options.
        stacks: what it reads, sorted by module.
        adapters: the sources, sorted by name.
        weights: adapter -> weight, in the user's order.
        carried: what the new adapter takes over beside its factors.
        space: where the method runs.
        rank: what the adapter's rank may be; see `merge_adapters`.
        post: scales the layers of the result, if given.
        finish: last change to each module's factors, if given.
        least_rank: pad the adapter with zeros up to this rank.
        seed: the user's seed.
        fitted: what the method learned from data; None until `fit`, and for methods that need none.
    """

    info: MethodInfo
    options: Mapping[str, Any]
    stacks: tuple[Stack, ...]
    adapters: tuple[Adapter, ...]
    weights: Mapping[str, float]
    carried: Carried
    space: Space
    rank: Rank
    post: Lines | None = None
    finish: Callable[[LowRank], LowRank] | None = None
    least_rank: int = 1
    seed: int = 0
    fitted: Fitted | None = None

    def fit(self, evidence: Any) -> Request:
        """Return the request with its method fitted to `evidence`."""
        return replace(self, fitted=self.info.function(self.stacks, evidence, **self.options))

    def deltas(self) -> Iterator[tuple[str, Delta]]:
        """Run the method, before `post`."""
        if self.fitted is not None:
            return self.fitted.run(self.stacks)
        return in_space(partial(self.info.function, **self.options), self.stacks, self.space)


def prepare(
    model: PeftModel,
    info: MethodInfo,
    weights: Mapping[str, float],
    *,
    options: Mapping[str, Any],
    policy: str,
    space: str = "full",
    rank: Rank = "auto",
    post: Lines | None = None,
    finish: Callable[[LowRank], LowRank] | None = None,
    strict_base: bool = True,
    least_rank: int = 1,
    seed: int = 0,
) -> Request:
    """Read and check everything a merge needs; the model is only read."""
    info.check(options)
    if space != "full" and not info.elementwise:
        raise ConfigError(
            f"method {info.name!r} does not work entry by entry, so space={space!r} would change "
            f"nothing or break it. Use space='full'."
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"seed must be a whole number, got {seed!r}.")
    carried_over = carried_of(model, list(weights), list(weights.values()), policy)
    least_rank = _rank_for_experts(info, carried_over, rank, least_rank)
    read = read_adapters(model, sorted(weights), carried=FIELDS)
    if strict_base:
        _check_base(read)
    else:
        read = [replace(a, base=read[0].base) for a in read]
    stacks = tuple(stacks_of(model, read, weights, seed))
    _check_base_is_read(info, stacks)
    defaults = {k: v for k, v in info.options.items() if k not in options}
    return Request(
        info=info,
        options=MappingProxyType({**defaults, **options}),
        stacks=stacks,
        adapters=tuple(read),
        weights=MappingProxyType(dict(weights)),
        carried=carried_over,
        space=space,  # type: ignore[arg-type]
        rank=rank,
        post=post,
        finish=finish,
        least_rank=least_rank,
        seed=seed,
    )


def _rank_for_experts(info: MethodInfo, carried: Carried, rank: Rank, least: int) -> int:
    """Return the least rank that holds the factors of fused experts, which are only summed."""
    if not carried.rank:
        return least
    if info.name != "cat":
        raise ConfigError(
            f"method {info.name!r} does not work on bare parameters (target_parameters): their "
            f"factors can only be summed. Use method='cat'."
        )
    if not isinstance(rank, str) and rank < carried.rank:
        raise ConfigError(
            f"bare parameters (target_parameters) are summed exactly, which takes the rank "
            f"{carried.rank}; got rank {rank}. Ask for that rank, or use combination_type='cat'."
        )
    return max(least, carried.rank)


def stacks_of(
    model: PeftModel, adapters: Sequence[Adapter], weights: Mapping[str, float], seed: int
) -> Iterator[Stack]:
    """Yield one stack per module that some adapter changes, sorted by module."""
    layers = lora_layers(model)
    names = tuple(a.name for a in adapters)
    for module in sorted({m for a in adapters for m in a.factors}):
        factors = tuple(a.factors.get(module) for a in adapters)
        kind = next(f.kind for f in factors if f is not None)
        base = layers[module].get_base_layer()

        def weight(base: Any = base, kind: Any = kind) -> Tensor:
            return as_matrix(base.weight.detach(), kind)

        yield Stack(
            module=module,
            layer=layer_of(module),
            names=names,
            factors=factors,
            weights=tuple(weights[n] for n in names),
            base=weight if plain_weight(base) else None,
            seed=seed,
        )


def check_names(
    model: Any, adapters: Sequence[str], adapter_name: str, *, overwrite: bool
) -> list[str]:
    """Return the adapters' names.

    Raises:
        ConfigError: there are none, one is named twice, or the new name can't be taken.
    """
    names = check_adapter_names(adapters)
    known = getattr(model, "peft_config", {})
    remedy = "pass overwrite=True to replace it"
    check_new_name(adapter_name, () if overwrite else known, remedy)
    check_present(model, names)
    return names


def check_present(model: Any, names: Sequence[str]) -> None:
    """Refuse names of adapters that the model does not hold.

    Raises:
        AdapterError: one is not there.
    """
    known = getattr(model, "peft_config", {})
    for name in names:
        if known and name not in known:
            raise AdapterError(f"Adapter {name} does not exist.{suggest(name, known)}")


def check_weights(
    names: Sequence[str], weights: Sequence[float] | Mapping[str, float] | None
) -> dict[str, float]:
    """Return adapter -> weight, in the order of `names`.

    Raises:
        ConfigError: not one finite number per adapter.
    """
    if weights is None:
        return dict.fromkeys(names, 1.0)
    if isinstance(weights, Mapping):
        for name in weights:
            if name not in names:
                raise ConfigError(f"weights names {name!r}.{suggest(str(name), names)}")
        missing = [name for name in names if name not in weights]
        if missing:
            raise ConfigError(f"weights has no value for adapter {missing[0]!r}.")
        pairs = [(name, weights[name]) for name in names]
    else:
        values = list(weights)
        if len(values) != len(names):
            raise ConfigError(
                f"got {len(values)} weights for {len(names)} adapters: give one per adapter, in "
                f"the order {', '.join(names)}."
            )
        pairs = list(zip(names, values, strict=True))
    return {name: _weight(name, value) for name, value in pairs}


def _weight(name: str, value: Any) -> float:
    try:
        number = float("nan") if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if number - number != 0.0:  # NaN or infinity
        raise ConfigError(f"the weight of adapter {name!r} must be a finite number, got {value!r}.")
    return number


def check_evidence(info: MethodInfo, **given: Mapping[str, Any] | None) -> None:
    """Check that what the method needs beside the adapters was given, and nothing else.

    Args:
        info: the method.
        **given: `eval_fns` and `inputs` as the user gave them, None if not.

    Raises:
        ConfigError: something is missing, empty, or would not be read.
    """
    needed = {"scores": "eval_fns", "inputs": "inputs", "gradients": "inputs"}.get(info.needs)
    for name, value in given.items():
        if name == needed and not value:
            raise ConfigError(
                f"method {info.name!r} needs {info.needs}: pass {name}, a dict with one entry per "
                f"adapter; got {value!r}."
            )
        if name != needed and value is not None:
            raise ConfigError(
                f"method {info.name!r} needs {info.needs}, so {name} would not be read. Leave it "
                f"out, or choose a method that needs it (list_methods())."
            )


def check_rank(rank: Any) -> Rank:
    """Return `rank` if it is one; see `merge_adapters`."""
    if isinstance(rank, str):
        fine = rank in ("auto", "exact")
    elif isinstance(rank, int):
        fine = not isinstance(rank, bool) and 1 <= rank < 1 << 31
    else:
        fine = isinstance(rank, float) and 0.0 < rank < 1.0
    if not fine:
        raise ConfigError(
            f"rank must be a whole number >= 1, a share of the energy between 0 and 1, 'exact' or "
            f"'auto', got {rank!r}."
        )
    return rank  # type: ignore[no-any-return]


def check_pad(pad_rank: Any) -> int:
    """Return `pad_rank` if it is a rank."""
    if isinstance(pad_rank, bool) or not isinstance(pad_rank, int) or pad_rank < 1:
        raise ConfigError(f"pad_rank must be a whole number >= 1, got {pad_rank!r}.")
    return pad_rank


def check_post(post: Any) -> Lines | None:
    """Return the post-scaler that `post` names."""
    if post is None or isinstance(post, Lines):
        return post
    if post != "lines":
        raise ConfigError(f"post must be None, 'lines' or a Lines(...), got {post!r}.")
    return Lines()


def _check_base_is_read(info: MethodInfo, stacks: Sequence[Stack]) -> None:
    odd = [stack.module for stack in stacks if stack.base is None]
    if info.reads_base and odd:
        raise ConfigError(
            f"method {info.name!r} reads the base model's weights, and that of module {odd[0]!r} "
            f"cannot be read: it is quantised or offloaded. Load the model in full precision, or "
            f"choose a method that does not (reads_base is False in list_methods())."
        )


def _check_base(adapters: Sequence[Adapter]) -> None:
    common_base(adapters)
    named = {a.name: a.settings.get("revision") for a in adapters if a.settings.get("revision")}
    if len(set(named.values())) > 1:
        raise AdapterError(
            f"the adapters were trained on different revisions of the base model: {named}. Pass "
            f"strict_base=False if they are the same weights."
        )
