"""The whole decision of a merge as a frozen table of numbers.

A `MergePlan` says, for every adapter, how its whole delta is pruned and scaled (the model-wise
step), and, for every (layer, adapter), what is done to the result in that layer (the layer-wise
step). Every state the method ever scores is a plan, so caching, resuming and replaying are lookups
by `fingerprint`. This room knows no tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .errors import ConfigError, PlanError, suggest
from .files import write_text
from .json_file import parse_json, read_object

__all__ = ["DROP", "IDENTITY", "MOST_SCALE", "PRUNE_SCOPES", "Edit", "MergePlan"]

MOST_SCALE = 1e4  # of both steps together: what is larger is a mistake, and might overflow

PRUNE_SCOPES = ("model", "layer", "module")
_FORMAT = "peft_himerge.plan/1"
_MOST = sys.float_info.max


@dataclass(frozen=True, slots=True)
class Edit:
    """What is done to one adapter's delta: keep a share of its largest entries, then scale.

    Attributes:
        density: kept fraction of entries by magnitude, in [0, 1]; 0 keeps nothing, 1 everything.
        scale: factor on what was kept; any finite number.

    Raises:
        PlanError: `density` or `scale` is out of range.
    """

    density: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("density", "scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise PlanError(f"{name} must be a number, got {value!r}.")
            if abs(value) > _MOST:  # an int may be too large for a float
                raise PlanError(f"{name} must be a finite number, got {value!r:.80}.")
            object.__setattr__(self, name, float(value))
        if not 0.0 <= self.density <= 1.0:
            raise PlanError(f"density is the kept fraction and must be in [0, 1], got {self}.")
        if not math.isfinite(self.scale):
            raise PlanError(f"scale must be a finite number, got {self}.")

    @property
    def drops(self) -> bool:
        """True if nothing is left after this edit."""
        return self.density == 0.0 or self.scale == 0.0


IDENTITY = Edit(1.0, 1.0)
DROP = Edit(0.0, 0.0)


def _frozen(table: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType({key: table[key] for key in sorted(table)})


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A frozen merge: adapter -> model-wise `Edit`, and layer -> adapter -> layer-wise `Edit`.

    The merged delta of a module in layer l is the sum over adapters of
    ``scale_l * keep_l(scale * keep(delta))`` where `keep` follows ``adapters[m].density`` within
    `prune_scope`, and `keep_l` follows ``edits[l][m].density`` over the layer's entries.

    Attributes:
        adapters: the model-wise edit of every adapter (paper section "model-wise", DESIGN 1.1).
        edits: per layer label, the further edit of every adapter that has modules in that layer
            (DESIGN 1.4); `IDENTITY` where the layer was left alone, `DROP` where it was dropped.
        prune_scope: what the model-wise density counts over: "model" (the paper), "layer" or
            "module" (what mergekit does).
        sources: adapter -> digest of the factors the plan was made for; checked on replay.
        notes: free text values for readers (versions, origin); no effect on the merge.
    """

    adapters: Mapping[str, Edit]
    edits: Mapping[str, Mapping[str, Edit]]
    prune_scope: str = "model"
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prune_scope not in PRUNE_SCOPES:
            raise PlanError(
                f"prune_scope got {self.prune_scope!r}.{suggest(self.prune_scope, PRUNE_SCOPES)}"
            )
        for layer, row in self.edits.items():
            unknown = sorted(set(row) - set(self.adapters))
            if unknown:
                raise PlanError(
                    f"layer {layer!r} edits the adapter {unknown[0]!r}, which the plan does not "
                    f"have.{suggest(unknown[0], self.adapters)}"
                )
        object.__setattr__(self, "adapters", _frozen(self.adapters))
        rows = {layer: _frozen(row) for layer, row in self.edits.items()}
        object.__setattr__(self, "edits", _frozen(rows))
        object.__setattr__(self, "sources", _frozen(self.sources))
        object.__setattr__(self, "notes", _frozen(self.notes))

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __reduce__(self) -> tuple[Any, tuple[dict[str, Any]]]:
        return (MergePlan.from_dict, (self.to_dict(),))  # read-only mappings do not pickle

    @classmethod
    def base(cls) -> MergePlan:
        """Return the plan of the untouched base model: no adapter takes part."""
        return cls({}, {})

    @classmethod
    def model_wise(
        cls,
        layers: Mapping[str, Iterable[str]],
        edits: Mapping[str, Edit],
        *,
        prune_scope: str = "model",
        sources: Mapping[str, str] | None = None,
    ) -> MergePlan:
        """Return the initial merge (DESIGN 1.2): every layer left as the model-wise edit made it.

        Args:
            layers: layer label -> names of the adapters that have modules in that layer.
            edits: adapter -> its model-wise edit.
            prune_scope: see the class.
            sources: see the class.
        """
        rows = {
            label: {name: IDENTITY for name in names if name in edits}
            for label, names in layers.items()
        }
        return cls(dict(edits), rows, prune_scope, dict(sources or {}))

    def _each(self, keep: Any) -> MergePlan:
        rows = {
            layer: {name: edit if keep(layer, name) else DROP for name, edit in row.items()}
            for layer, row in self.edits.items()
        }
        return replace(self, edits=rows)

    def solo(self, adapter: str) -> MergePlan:
        """Return this plan with every other adapter dropped."""
        self._known(adapter, self.adapters, "adapter")
        return self._each(lambda _, name: name == adapter)

    def only(self, layer: str) -> MergePlan:
        """Return this plan on `layer` alone; every other layer is the base model's."""
        self._known(layer, self.edits, "layer")
        return self._each(lambda label, _: label == layer)

    def without(self, layer: str) -> MergePlan:
        """Return this plan with `layer` put back to the base model's."""
        self._known(layer, self.edits, "layer")
        return self._each(lambda label, _: label != layer)

    def with_edit(self, layer: str, adapter: str, edit: Edit) -> MergePlan:
        """Return this plan with another layer-wise edit of `adapter` in `layer`."""
        self._known(layer, self.edits, "layer")
        self._known(adapter, self.edits[layer], "adapter")
        rows = dict(self.edits)
        rows[layer] = {**self.edits[layer], adapter: edit}
        return replace(self, edits=rows)

    def with_edits(self, layer: str, edits: Mapping[str, Edit]) -> MergePlan:
        """Return this plan with other layer-wise edits of some adapters in `layer`."""
        plan = self
        for adapter, edit in edits.items():
            plan = plan.with_edit(layer, adapter, edit)
        return plan

    def with_adapter(self, adapter: str, edit: Edit) -> MergePlan:
        """Return this plan with another model-wise edit of `adapter`."""
        self._known(adapter, self.adapters, "adapter")
        return replace(self, adapters={**self.adapters, adapter: edit})

    @staticmethod
    def _known(name: str, table: Mapping[str, object], what: str) -> None:
        if name not in table:
            raise PlanError(f"the plan has no {what} {name!r}.{suggest(name, table)}")

    @property
    def pruned(self) -> bool:
        """True if any entry of any delta that takes part is pruned by magnitude."""
        return any(
            self.adapters[name].density < 1.0 or edit.density < 1.0 for _, name, edit in self.live()
        )

    def live(self) -> Iterable[tuple[str, str, Edit]]:
        """Yield (layer, adapter, layer-wise edit) for every delta that is not dropped."""
        for layer, row in self.edits.items():
            for name, edit in row.items():
                if not edit.drops and not self.adapters[name].drops:
                    yield layer, name, edit

    @property
    def fingerprint(self) -> str:
        """Digest of the model state this plan makes: equal states, equal fingerprints.

        It does not depend on the order of adapters or layers, on `sources` or `notes`, on how a
        scale is split over the two steps, or on `PYTHONHASHSEED`.
        """
        rows: dict[str, dict[str, list[float]]] = {}
        scope = ""  # it matters where the model-wise step prunes, and nowhere else
        for layer, name, edit in self.live():
            whole = self.adapters[name]
            rows.setdefault(layer, {})[name] = [
                whole.density,
                edit.density,
                whole.scale * edit.scale,
            ]
            if whole.density < 1.0:
                scope = self.prune_scope
        text = json.dumps({"rows": rows, "scope": scope}, separators=(",", ":"))  # rows are sorted
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""

        def row(edits: Mapping[str, Edit]) -> dict[str, Any]:
            return {name: {"density": e.density, "scale": e.scale} for name, e in edits.items()}

        return {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "prune_scope": self.prune_scope,
            "adapters": row(self.adapters),
            "edits": {layer: row(edits) for layer, edits in self.edits.items()},
            "sources": dict(self.sources),
            "notes": dict(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MergePlan:
        """Return the plan that `to_dict` wrote.

        Raises:
            PlanError: the format is unknown, a key is missing or not known, or the stored
                fingerprint is not that of the stored numbers (the file was edited or damaged).
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            got = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise PlanError(f"not a merge plan: format is {got!r}, expected {_FORMAT!r}.")
        known = {"format", "fingerprint", "prune_scope", "adapters", "edits", "sources", "notes"}
        for key in data:
            if key not in known:
                raise PlanError(f"unknown key {key!r} in the plan.{suggest(key, sorted(known))}")
        try:
            plan = cls(
                {name: Edit(**edit) for name, edit in data["adapters"].items()},
                {
                    layer: {name: Edit(**edit) for name, edit in row.items()}
                    for layer, row in data["edits"].items()
                },
                data["prune_scope"],
                dict(data.get("sources", {})),
                dict(data.get("notes", {})),
            )
            wrong = [
                v for v in (*plan.sources.values(), *plan.notes.values()) if type(v) is not str
            ]
            if wrong:
                raise TypeError(f"sources and notes hold texts, got {wrong[0]!r:.80}")
        except PlanError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as exc:
            raise PlanError(f"the plan is malformed: {type(exc).__name__}: {exc}.") from exc
        stored = data.get("fingerprint", plan.fingerprint)
        if stored != plan.fingerprint:
            raise PlanError(
                f"the plan's fingerprint is {stored!r} but its numbers give "
                f"{plan.fingerprint!r}: the file was changed by hand or damaged. Delete the "
                f"'fingerprint' line to accept the numbers as they are."
            )
        return plan

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the plan as JSON text, and write it to `path` if one is given."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        if path is not None:
            write_text(Path(path), text)
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> MergePlan:
        """Return the plan in the file `source`, or in the JSON text `source`.

        Raises:
            PlanError: there is no such file, or the text is not JSON or not a plan.
        """
        text = str(source)
        try:
            if text.lstrip().startswith("{"):
                data = parse_json(text)
            else:
                data = read_object(Path(source))
        except ConfigError as exc:
            raise PlanError(f"the plan is malformed: {exc}") from exc
        return cls.from_dict(data)
