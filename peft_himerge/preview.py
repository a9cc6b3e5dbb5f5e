"""What a merge from folders will cost, without loading a weight of the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn

from .blocks import find_blocks
from .combine import Combiner
from .config import HiMergeConfig
from .cost import Cost, estimate
from .errors import AdapterError, ConfigError
from .factors import Adapter
from .folders import auto_class, check_base, read_folder
from .layers import OUTSIDE

__all__ = ["Preview", "preview"]


@dataclass(frozen=True, slots=True)
class Preview:
    """A merge that was not made.

    Attributes:
        cost: what it would cost at most.
        blocks: number of transformer blocks of the base model; of those that some adapter changes,
            if no base model was given.
        layers: number of layers that contribution analysis would judge.
        zero: adapters without effect, whose tasks are guards.
    """

    cost: Cost
    blocks: int
    layers: int
    zero: tuple[str, ...]


def preview(
    base: str | Path | None,
    adapters: Mapping[str, str | Path],
    config: HiMergeConfig,
    guards: Sequence[str] = (),
    *,
    bodies: bool = False,
) -> Preview:
    """Return what `merge_adapters_hi` would cost for adapters in folders.

    Args:
        base: folder of the base model, of which only config.json is read; None counts the adapted
            blocks alone.
        adapters: adapter name -> its folder.
        config: the options of the merge.
        guards: names of further tasks.
        bodies: pass over saved modules, as `load_peft_model` does.

    Raises:
        ConfigError: `base` is no folder of a model, or an option names other adapters.
        AdapterError: an adapter cannot be read, or does not fit the base model.
    """
    config.check_names(list(adapters), [*adapters, *guards])
    read = [read_folder(name, folder, body=bodies) for name, folder in adapters.items()]
    combiner = Combiner(read)
    order = [layer.label for layer in combiner.in_order()]
    if base is not None:
        order = _all_blocks(_skeleton(Path(base), read), combiner, order)
    zero = tuple(adapter.name for adapter in read if adapter.is_zero)
    own = [name for name in adapters if name not in zero]
    cost = estimate(combiner.table(), own, [*zero, *guards], config, order=order)
    return Preview(cost, sum(label != OUTSIDE for label in order), len(combiner.layers), zero)


def _skeleton(base: Path, adapters: Sequence[Adapter]) -> nn.Module:
    """Return the base model's modules without weights, of the class it is loaded with."""
    check_base(base)
    try:
        settings = transformers.AutoConfig.from_pretrained(base)
    except (OSError, ValueError, KeyError) as exc:
        text = f"config.json of the base {str(base)!r} cannot be read: {exc}"
        raise ConfigError(text) from exc
    kinds = {a.name: str(a.settings["task_type"]) for a in adapters if a.settings["task_type"]}
    named = [getattr(transformers, name, None) for name in settings.architectures or ()]
    auto = auto_class(kinds) if kinds else None
    with torch.device("meta"):
        if auto is not None:
            try:
                model: nn.Module = auto.from_config(settings)
            except ValueError as exc:  # what transformers says of a config without that class
                raise ConfigError(f"the base {str(base)!r}: {str(exc).splitlines()[0]}") from exc
        elif named and named[0] is not None:
            model = named[0](settings)
        else:
            model = transformers.AutoModelForCausalLM.from_config(settings)
    return model


def _all_blocks(model: nn.Module, combiner: Combiner, order: Sequence[str]) -> list[str]:
    """Return the labels of all blocks, adapted or not, and "outside" where it is run."""
    there = {name for name, _ in model.named_modules()}
    missing = [module for module in combiner.modules if module not in there]
    if missing:
        raise AdapterError(
            f"the base model has no module {missing[0]!r}, which an adapter changes: it was "
            f"trained on another base model."
        )
    blocks = list(find_blocks(model, order)) or [label for label in order if label != OUTSIDE]
    if OUTSIDE not in order:
        return blocks
    return [OUTSIDE, *blocks] if order[0] == OUTSIDE else [*blocks, OUTSIDE]
