"""What each layer's delta contributes to each task, alone and after merging (DESIGN 1.3).

For task m, a state X in {adapter m alone, all merged G} and layer l:

    alpha = E_m(W0 + Delta_X) - E_m(W0 + Delta_X without layer l)      pruning impact
    beta  = E_m(W0 + Delta_X on layer l only) - E_m(W0)                addition impact
    c     = alpha + beta
    gamma = c_alone - c_merged          > 0: merging weakened what this layer does for task m

Source: Hi-Merging (arXiv 2506.12379), contribution analysis. This room only subtracts scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .errors import MissingExtraError
from .plan import MergePlan
from .scoring import Difference, Score, difference

if TYPE_CHECKING:
    import pandas

__all__ = ["Contribution", "Contributions", "Lookup", "measure", "states"]

Lookup = Callable[[str, MergePlan], Score]


@dataclass(frozen=True, slots=True)
class Contribution:
    """One layer's contribution to one task; `*_se` are paired standard errors or None."""

    layer: str
    task: str
    alpha_alone: float
    beta_alone: float
    alpha_merged: float
    beta_merged: float
    c_alone: float
    c_merged: float
    gamma: float
    alpha_alone_se: float | None = None
    beta_alone_se: float | None = None
    alpha_merged_se: float | None = None
    beta_merged_se: float | None = None
    c_alone_se: float | None = None
    c_merged_se: float | None = None
    gamma_se: float | None = None


@dataclass(frozen=True, slots=True)
class Contributions(Sequence[Contribution]):
    """One record per (layer, task), layer by layer."""

    rows: tuple[Contribution, ...] = ()

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Contribution]:
        return iter(self.rows)

    def of(self, layer: str) -> tuple[Contribution, ...]:
        """Return the rows of one layer, one per task."""
        return tuple(row for row in self.rows if row.layer == layer)

    def to_records(self) -> list[dict[str, Any]]:
        """Return the rows as plain dicts."""
        return [asdict(row) for row in self.rows]

    def to_pandas(self) -> pandas.DataFrame:
        """Return the rows as a `pandas.DataFrame`, one column per field."""
        try:
            import pandas as pd
        except ImportError as exc:
            raise MissingExtraError(
                "to_pandas() needs pandas: pip install 'peft-himerge[pandas]', or use to_records()."
            ) from exc
        return pd.DataFrame(self.to_records())


def states(task: str, plan: MergePlan, layers: Sequence[str]) -> list[tuple[str, MergePlan]]:
    """Return every (task, state) whose score `measure` looks up for one task: 4L + 3 of them.

    They come grouped by the state they share most work with (base, alone, merged).
    """
    alone = plan.solo(task)
    wanted = [MergePlan.base()]
    wanted += [state.only(layer) for layer in layers for state in (alone, plan)]
    for state in (alone, plan):
        wanted += [state, *(state.without(layer) for layer in reversed(layers))]
    return [(task, state) for state in wanted]


def measure(
    score: Lookup,
    task: str,
    layer: str,
    plan: MergePlan,
    *,
    edited: MergePlan | None = None,
) -> Contribution:
    """Return the contribution of `layer` to `task`.

    Args:
        score: looks up the score of a task in a state.
        task: the task, which has the name of its adapter.
        layer: label of the layer.
        plan: the model-wise plan G; `plan.solo(task)` is the state "alone".
        edited: with `reanalyze="each"`, the plan with the edits made so far: its alpha is
            measured in place of G's. The layer itself is not edited yet, so beta is G's.
    """
    base = score(task, MergePlan.base())

    def impact(whole: MergePlan) -> tuple[tuple[list[Score], list[Score]], ...]:
        pruning = ([score(task, whole)], [score(task, whole.without(layer))])
        addition = ([score(task, whole.only(layer))], [base])
        return pruning, addition

    (p_alone, a_alone), (p_merged, a_merged) = impact(plan.solo(task)), impact(edited or plan)
    c_alone = (p_alone[0] + a_alone[0], p_alone[1] + a_alone[1])
    c_merged = (p_merged[0] + a_merged[0], p_merged[1] + a_merged[1])
    found: dict[str, Difference] = {
        "alpha_alone": difference(*p_alone),
        "beta_alone": difference(*a_alone),
        "alpha_merged": difference(*p_merged),
        "beta_merged": difference(*a_merged),
        "c_alone": difference(*c_alone),
        "c_merged": difference(*c_merged),
        "gamma": difference(c_alone[0] + c_merged[1], c_alone[1] + c_merged[0]),
    }
    fields: dict[str, Any] = {name: d.value for name, d in found.items()}
    fields |= {f"{name}_se": d.se for name, d in found.items()}
    return Contribution(layer, task, **fields)
