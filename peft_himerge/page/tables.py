"""The same numbers as tables: header and rows of text, for eyes, printers and screen readers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .charts import state_label
from .deltas import merged_norms, pair_name
from .facts import Conflict, Report, Test, short_names

__all__ = [
    "Cell",
    "Table",
    "effect",
    "mean",
    "plain",
    "settings",
    "signed",
    "tables_of",
    "with_error",
]


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell: text, a second and smaller line, and the kind of conflict it is coloured by."""

    text: str
    note: str = ""
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """One table; the first `heads` columns are words, the others numbers.

    Attributes:
        title: what it holds.
        header: one text per column.
        rows: cells, as many per row as the header has.
        heads: number of leading columns that are words.
        folded: shown on a click only: a long one.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    heads: int = 1
    folded: bool = False


def table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[Cell | str]],
    *,
    heads: int = 1,
    folded: bool = False,
) -> Table:
    """Return a table; plain texts become cells."""
    cells = tuple(tuple(c if isinstance(c, Cell) else Cell(c) for c in row) for row in rows)
    return Table(title, tuple(header), cells, heads, folded)


def with_error(value: float | None, se: float | None = None, shape: str = ".3f") -> str:
    """Return a number and, if there is one, its standard error."""
    if value is None:
        return "–"
    return format(value, shape) + (f" ± {se:.3f}" if se else "")


def signed(value: float | None) -> str:
    """Return a difference with its sign."""
    return "–" if value is None else f"{value:+.3f}"


def tables_of(report: Report) -> dict[str, Table]:
    """Return the tables of one report by name; those without rows are left out."""
    made = {
        "test": _test(report),
        "scores": _scores(report),
        "metrics": _metrics(report),
        "edits": _edits(report),
        "weights": _weights(report),
        "fitted": _fitted(report),
        "tried": _tried(report),
        "contributions": _contributions(report),
        "conflicts": _conflicts(report),
        "search": _search(report),
        "layers": _layers(report),
        "pairs": _pairs(report),
        "modules": _modules(report),
        "options": _options(report),
    }
    return {name: made_table for name, made_table in made.items() if made_table.rows}


def mean(values: Sequence[float]) -> float | None:
    """Return the mean; None of nothing."""
    return sum(values) / len(values) if values else None


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _scores(report: Report) -> Table:
    return _score_table("Scores", report, report)


def _test(report: Report) -> Table:
    return _score_table("Test scores", report, report.test or Test(scores={}))


def _score_table(title: str, report: Report, held: Report | Test) -> Table:
    rows = []
    for state, scored in held.scores.items():
        shares = {task: held.share_kept(state, task) for task in held.tasks}
        # What is tested is the adapter as it was written, whatever its name.
        tested = isinstance(held, Test) and state == held.merged
        cells = [Cell(state_label(report, "exported" if tested else state))]
        for task in held.tasks:
            se = held.standard_errors.get(state, {}).get(task)
            share = shares[task]
            note = "" if share is None else f"{share:.0%} kept"
            cells.append(Cell(with_error(scored[task], se), note))
        known = [share for share in shares.values() if share is not None]
        cells += [Cell(with_error(mean(list(scored.values())))), Cell(_percent(mean(known)))]
        rows.append(cells)
    return table(title, ["state", *held.tasks, "mean", "share kept"], rows)


def _metrics(report: Report) -> Table:
    names = [
        (task, metric)
        for task, metrics in next(iter(report.metrics.values()), {}).items()
        for metric in metrics
    ]
    rows = [
        [
            state_label(report, state),
            *(with_error(of.get(task, {}).get(metric)) for task, metric in names),
        ]
        for state, of in report.metrics.items()
        if names
    ]
    header = ["state", *(f"{task}: {metric}" for task, metric in names)]
    return table("Everything the eval functions returned", header, rows, folded=True)


def _edits(report: Report) -> Table:
    rows = [[name, f"{e.density:g}", f"{e.scale:g}"] for name, e in report.edits.items()]
    return table("Model-wise step", ["adapter", "density", "scale"], rows)


def _weights(report: Report) -> Table:
    rows = [[name, f"{weight:g}"] for name, weight in report.weights.items()]
    return table("Weights", ["adapter", "weight"], rows)


# What a method that looks at scores tried: told in a table of its own.
_TRIED = ("tried", "front")


def _fitted(report: Report) -> Table:
    told = {key: value for key, value in report.fitted.items() if key not in (*_TRIED, "scores")}
    rows = [[name, value] for name, value in _flat(told)]
    return table("What was learned", ["", "value"], rows, folded=True)


def _flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield what nested records hold, name by name; of a long list its ends."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}: {key}" if name else str(key))
    elif isinstance(value, list) and len(value) > _LONGEST:
        yield name, f"{plain(value[0])} … {plain(value[-1])} ({len(value)})"
    elif value != []:
        yield name, plain(value)


_LONGEST = 6  # entries of a list that are shown
_FEW = 10  # rows of options that need no folding


def _tried(report: Report) -> Table:
    tried: list[Any] = next((report.fitted[key] for key in _TRIED if key in report.fitted), [])
    rows: list[list[str]] = []
    for one in sorted(tried, key=lambda one: -one["objective"]):
        told = [plain(v) for k, v in one.items() if k not in ("objective", "scores")]
        scores = [with_error(found["value"], found["se"]) for found in one["scores"].values()]
        rows.append(["; ".join(filter(None, told)), f"{one['objective']:.4f}", *scores])
    tasks = list(tried[0]["scores"]) if tried else []
    return table("Tried, best first", ["what", "objective", *tasks], rows, folded=True)


def _contributions(report: Report) -> Table:
    short = short_names(report.layers)
    place = {label: index for index, label in enumerate(report.layers)}
    found = sorted(report.contributions, key=lambda row: place.get(row.layer, 0))
    rows = [
        [
            short.get(row.layer, row.layer),
            row.task,
            with_error(row.c_alone, row.c_alone_se, "+.3f"),
            with_error(row.c_merged, row.c_merged_se, "+.3f"),
            with_error(row.gamma, row.gamma_se, "+.3f"),
            *(signed(getattr(row, f"{name}")) for name in _PARTS),
        ]
        for row in found
    ]
    header = ["layer", "task", "c alone", "c merged", "gamma"]
    header += [name.replace("_", " ") for name in _PARTS]
    return table("Contributions", header, rows, heads=2, folded=True)


_PARTS = ("alpha_alone", "beta_alone", "alpha_merged", "beta_merged")


def effect(conflict: Conflict) -> float | None:
    """Return by how much the mean score rose with what was done; None if it was not measured."""
    before, after = mean(list(conflict.before.values())), mean(list(conflict.after.values()))
    return None if before is None or after is None else after - before


def _conflicts(report: Report) -> Table:
    short = short_names(report.layers)
    tasks = list(dict.fromkeys(task for c in report.conflicts for task in c.gammas))
    rows: list[list[Cell | str]] = [
        [
            short.get(c.layer, c.layer),
            Cell(c.kind, kind=c.kind),
            c.done,
            f"{c.Gamma:+.3f}",
            *(signed(c.gammas.get(task)) for task in tasks),
            signed(effect(c)),
        ]
        for c in sorted(report.conflicts, key=lambda c: -abs(c.Gamma))
    ]
    header = ["layer", "kind", "done", "Gamma", *(f"gamma {t}" for t in tasks), "change of mean"]
    return table("Layers by |Gamma|", header, rows, heads=3)


def _search(report: Report) -> Table:
    chosen = {(name, e.density, e.scale) for name, e in report.edits.items()}
    rows = [
        [
            t.adapter,
            "chosen" if (t.adapter, t.density, t.scale) in chosen else "",
            f"{t.density:g}",
            f"{t.scale:g}",
            f"{t.value:.4f}",
        ]
        for t in sorted(report.search, key=lambda t: (t.adapter, -t.value))
    ]
    header = ["adapter", "", "density", "scale", "score"]
    return table("Tried, best first", header, rows, heads=2, folded=True)


def _layers(report: Report) -> Table:
    layers = report.geometry.layers if report.geometry is not None else []
    short = short_names([layer.layer for layer in layers])
    merged = merged_norms(report)
    rows = [
        [
            short[layer.layer],
            *(with_error(layer.norms.get(name), shape=".4g") for name in report.adapters),
            with_error(merged.get(layer.layer), shape=".4g"),
        ]
        for layer in layers
    ]
    header = ["layer", *report.adapters, "merged"]
    return table("Frobenius norm of the deltas", header, rows, folded=True)


def _pairs(report: Report) -> Table:
    layers = report.geometry.layers if report.geometry is not None else []
    short = short_names([layer.layer for layer in layers])
    rows = [
        [
            short[layer.layer],
            pair_name(pair),
            signed(pair.cosine),
            with_error(pair.sign_agreement, pair.sign_agreement_se, ".4f"),
            f"{pair.entries:,}",
        ]
        for layer in layers
        for pair in layer.pairs
    ]
    header = ["layer", "adapters", "cosine", "equal signs", "entries compared"]
    return table("Cosine and signs", header, rows, heads=2, folded=True)


def _modules(report: Report) -> Table:
    found = report.geometry.singular_values if report.geometry is not None else {}
    rows: list[list[str]] = []
    for m in report.export.modules:
        values = found.get(m.module) or []
        first = f"{values[0]:.3g} … {values[-1]:.3g}" if values else "–"
        norm = with_error(m.norm, shape=".4g")
        rows.append([m.module, f"{m.relative_error:.2e}", str(m.rank), norm, first])
    header = ["module", "relative error", "rank", "norm", "singular values"]
    return table("Export of every module", header, rows, folded=True)


def _options(report: Report) -> Table:
    rows = [[name, plain(value)] for name, value in settings(report).items()]
    return table("Options", ["option", "value"], rows, heads=2, folded=len(rows) > _FEW)


def settings(report: Report) -> dict[str, Any]:
    """Return the options of a merge, and where a method of the registry ran."""
    where = {"space": report.space, "seed": report.seed}
    return {**report.options, **{key: v for key, v in where.items() if v is not None}}


def plain(value: object) -> str:
    """Return an option's value in words."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(plain(inner) for inner in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
