"""What a merge by a method of the registry gives back."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from torch import Tensor

from . import card, checkpoint, export, files
from .combine import Combiner
from .errors import AdapterError, ConfigError, suggest
from .factors import Adapter
from .methods.registry import MethodInfo
from .methods.stack import Delta
from .outputs import owning, publishing, told
from .result import MergeResult, ModuleError
from .spool import waiting

__all__ = ["AdapterMerge"]


@dataclass(frozen=True, eq=False)
class AdapterMerge:
    """A finished merge by a method of the registry.

    Attributes:
        adapter_name: name of the merged adapter in `model`; frozen, and not active.
        model: the model it was added to.
        method: what was done.
        weights: adapter -> weight, in the user's order.
        options: the method's options, defaults included.
        space: where it was done.
        seed: what random masks were drawn from.
        modules: per module, the rank and the error of the adapter against the exact result.
        rank: the adapter's rank.
        notes: what had to be done differently (an SVD that did not converge); usually empty.
        fitted: what the method learned from data (`Fitted.report`); {} if it needed none.
        hi: for the method "hi", what `merge_adapters_hi` found; otherwise None.
        seconds: wall time.
    """

    adapter_name: str
    model: PeftModel
    method: MethodInfo
    weights: Mapping[str, float]
    options: Mapping[str, Any]
    space: str
    seed: int
    modules: tuple[ModuleError, ...]
    rank: int
    notes: tuple[str, ...]
    fitted: Mapping[str, Any]
    seconds: float
    _deltas: Callable[[], Iterator[tuple[str, Delta]]] = field(repr=False)
    _sources: Mapping[str, tuple[Adapter, int]] = field(repr=False)
    _carried: Mapping[str, Any] = field(repr=False)
    hi: MergeResult | None = field(default=None, repr=False)

    @property
    def export_error(self) -> float:
        """Relative Frobenius error of the adapter over all modules together."""
        whole = sum(m.norm**2 for m in self.modules)
        lost = sum((m.error * m.norm) ** 2 for m in self.modules)
        return float((lost / whole) ** 0.5) if whole else 0.0

    def delta(self, module: str) -> Tensor:
        """Return the exact merged delta of one module, (out, in), which the adapter approximates.

        The method runs again for it: free for sums, as long as the merge for the others.

        Raises:
            AdapterError: no adapter changes that module, or a source's weights have changed since.
        """
        self._check_sources()
        for found, delta in self._deltas():
            if found == module:
                return delta.dense()
        raise AdapterError(
            f"no module {module!r}.{suggest(module, [m.module for m in self.modules])}"
        )

    def _check_sources(self) -> None:
        for name, (adapter, version) in self._sources.items():
            if adapter.version() != version:
                raise AdapterError(
                    f"the weights of adapter {name!r} changed since the merge. Merge again, or "
                    f"keep a copy of the adapter."
                )

    def save(self, folder: str | Path, *, sources: Mapping[str, str | Path] | None = None) -> Path:
        """Write the merged adapter in PEFT's layout, report.json and the model card README.md.

        Args:
            folder: created if it is not there; files of these names are replaced, all or none.
            sources: adapter -> folder it was loaded from, as far as you like: licences that their
                model cards name go into ours.

        Returns:
            The folder. Load it with ``PeftModel.from_pretrained(base, folder)``.

        Raises:
            ConfigError: `sources` names another adapter.
            OutputError: the folder is in use or cannot be written; it is as it was.
        """
        licences = card.licences_of(sources, self._sources)
        facts = self.to_dict()
        text = json.dumps(facts, indent=2, ensure_ascii=False, default=str)
        base = self.model.peft_config[self.adapter_name].base_model_name_or_path
        with publishing(folder) as new:
            files.write_text(new / "report.json", text + "\n")
            files.write_text(new / "README.md", card.render_card(facts, base, licences))
            export.write_adapter(self.model, self.adapter_name, new)
        return Path(folder)

    def save_merged(self, base: str | Path, folder: str | Path) -> Path:
        """Write base + exact merged delta as a full checkpoint, streamed from the folder `base`.

        The method runs once more. Deltas that are no product of thin factors wait on disk, beside
        the checkpoint, for their turn.

        Raises:
            ConfigError: the adapter also holds what is no delta (saved modules, trained tokens,
                biases), or `base` is no plain checkpoint.
            AdapterError: a source's weights have changed since the merge.
            PlanError: `base` is not the adapters' base.
        """
        self._check_sources()
        if self._carried:
            raise ConfigError(
                f"the merged adapter also holds {', '.join(self._carried)}, which are no deltas of "
                f"base weights. Use model.merge_and_unload() for them."
            )
        combiner = Combiner([adapter for adapter, _ in self._sources.values()])
        with owning(folder), told(Path(folder)), tempfile.TemporaryFile(dir=folder) as spool:
            blocks = waiting(self._deltas, spool)
            return checkpoint.save_checkpoint(base, combiner, blocks, folder)

    def to_dict(self) -> dict[str, Any]:
        """Return the merge as plain JSON values; the content of report.json."""
        return {
            "format": "peft_himerge.adapter_merge/1",
            "adapter_name": self.adapter_name,
            "method": {
                "name": self.method.name,
                "title": self.method.title,
                "url": self.method.url,
                "variant": self.method.variant,
            },
            "weights": dict(self.weights),
            "options": dict(self.options),
            "space": self.space,
            "seed": self.seed,
            "sources": {name: adapter.digest() for name, (adapter, _) in self._sources.items()},
            "export": {
                "rank": self.rank,
                "relative_error": self.export_error,
                "modules": [
                    {"module": m.module, "rank": m.rank, "relative_error": m.error}
                    for m in self.modules
                ],
            },
            "notes": list(self.notes),
            "fitted": dict(self.fitted),
            "seconds": self.seconds,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "peft": peft.__version__,
            },
        }
