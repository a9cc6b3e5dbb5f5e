"""What report.json says, checked when read: the keys, their types and their meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from ..errors import ConfigError
from ..json_file import read_object
from ..layers import OUTSIDE, layer_of

__all__ = [
    "Conflict",
    "Contribution",
    "Method",
    "Pair",
    "Report",
    "Test",
    "parse_report",
    "read_report",
    "short_names",
]

FORMAT, METHOD_FORMAT = "peft_himerge.report/1", "peft_himerge.adapter_merge/1"
Format = Literal["peft_himerge.report/1", "peft_himerge.adapter_merge/1"]
_MOST_BYTES = 1 << 28


def _same_tasks(
    scores: dict[str, dict[str, float]],
) -> dict[str, dict[str, float]]:
    """Refuse a table of scores with gaps."""
    tasks = next(iter(scores.values()), {}).keys()
    for state, row in scores.items():
        if row.keys() != tasks:
            raise ValueError(f"the state {state!r:.80} has no score of every task")
    return scores


Scores = Annotated[dict[str, dict[str, float]], AfterValidator(_same_tasks)]


class _Facts(BaseModel):
    # Keys of later versions are no fault: an older page leaves them out.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Edit(_Facts):
    """Kept share of the entries, and the factor on them."""

    density: float
    scale: float


class Plan(_Facts):
    """The decision: model-wise edit per adapter, and layer -> adapter -> further edit."""

    fingerprint: str
    prune_scope: str
    adapters: dict[str, Edit]
    edits: dict[str, dict[str, Edit]]


class Method(_Facts):
    """What was done: its name in the registry, what the paper calls it, and whose reading it is."""

    name: str
    title: str
    url: str = ""
    variant: str = ""


_HI = Method(name="hi", title="Hi-Merging", url="https://arxiv.org/abs/2506.12379")


class Contribution(_Facts):
    """One (layer, task): c = alpha + beta, alone and merged; gamma = c_alone - c_merged."""

    layer: str
    task: str
    alpha_alone: float
    beta_alone: float
    alpha_merged: float
    beta_merged: float
    c_alone: float
    c_merged: float
    gamma: float
    c_alone_se: float | None = None
    c_merged_se: float | None = None
    gamma_se: float | None = None


class Conflict(_Facts):
    """One layer judged: its kind, what was done, and the scores before and after, if measured."""

    layer: str
    kind: Literal["severe", "partial", "mutual"]
    Gamma: float
    gammas: dict[str, float]
    done: str
    accepted: bool
    before: dict[str, float] = {}
    after: dict[str, float] = {}


class Trial(_Facts):
    """One density and scale of one adapter that the search scored."""

    adapter: str
    density: float
    scale: float
    value: float


class Module(_Facts):
    """One module's export: rank, relative error, and the Frobenius norm of the exact delta."""

    module: str
    rank: int
    relative_error: float
    norm: float | None = None


class Export(_Facts):
    """The exported adapter; `drop` is the mean score it lost, None if it was not scored."""

    rank: int
    relative_error: float
    drop: float | None = None
    modules: list[Module] = []


class Cost(_Facts):
    """Calls of eval functions, blocks run and answered from memory (None: not counted), seconds."""

    scores: int
    seconds: float
    blocks_run: int | None = None
    blocks_skipped: int | None = None


class Pair(_Facts):
    """Two adapters' source deltas in one layer; see `geometry.PairGeometry`."""

    adapters: tuple[str, str]
    cosine: float | None
    sign_agreement: float | None
    sign_agreement_se: float = 0.0
    entries: int = 0


class Layer(_Facts):
    """One layer: adapter -> Frobenius norm of its source delta, and the pairs of adapters."""

    layer: str
    norms: dict[str, float]
    pairs: list[Pair] = []


class Geometry(_Facts):
    """How the source deltas lie to each other, and module -> singular values of the export."""

    layers: list[Layer] = []
    singular_values: dict[str, list[float] | None] = {}


class Test(_Facts):
    """Scores of test data, on which nothing was decided: state -> task -> score, standard error.

    The states are "base", each adapter, and the merged adapter as it was exported.
    """

    __test__ = False  # pytest takes every class of that name for tests

    scores: Scores
    standard_errors: dict[str, dict[str, float | None]] = {}

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(next(iter(self.scores.values()), {}))

    @property
    def merged(self) -> str:
        """The state that is the merged adapter: the last one."""
        return list(self.scores)[-1]

    def share_kept(self, state: str, task: str) -> float | None:
        """As `Report.share_kept`, on test data."""
        return _share_kept(self.scores, state, task)


class Report(_Facts):
    """The content of report.json.

    Attributes:
        adapter_name: name of the merged adapter.
        method: what was done.
        plan: the decision; None for methods other than Hi-Merging.
        weights: adapter -> the user's weight; {} for Hi-Merging, which has none.
        space: where a method ran: "full", "knots" or "core"; None for Hi-Merging.
        seed: what its random masks were drawn from; None for Hi-Merging.
        notes: what had to be done differently; usually empty.
        fitted: what a method learned from data; {} if it needed none.
        scores: state -> task -> score.
        standard_errors: state -> task -> standard error, None without per-example scores.
        test: scores of test data, if a recipe gave some.
        metrics: state -> task -> metric -> value, what else the eval functions returned.
        contributions: one record per (layer, task).
        conflicts: one record per layer, in the order they were treated.
        search: what was tried.
        export: rank and errors of the exported adapter.
        cost: what it took.
        options: the options of the merge; {} if it had none.
        geometry: norms, cosines, signs and singular values; None in reports of earlier versions.
        versions: of Python and the libraries.
    """

    format: Format
    adapter_name: str
    method: Method = _HI
    plan: Plan | None = None
    weights: dict[str, float] = {}
    space: str | None = None
    seed: int | None = None
    notes: list[str] = []
    fitted: dict[str, Any] = {}
    scores: Scores = {}
    standard_errors: dict[str, dict[str, float | None]] = {}
    test: Test | None = None
    metrics: dict[str, dict[str, dict[str, float | None]]] = {}
    contributions: list[Contribution] = []
    conflicts: list[Conflict] = []
    search: list[Trial] = []
    export: Export
    cost: Cost
    options: dict[str, Any] = {}
    geometry: Geometry | None = None
    versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _whole(self) -> Report:
        if self.format == FORMAT and self.plan is None:
            raise ValueError("the plan is missing")
        if self.format == METHOD_FORMAT and not self.weights:
            raise ValueError("the adapters' weights are missing")
        return self

    @property
    def edits(self) -> dict[str, Edit]:
        """Adapter -> model-wise edit; {} without a plan."""
        return self.plan.adapters if self.plan is not None else {}

    @property
    def adapters(self) -> list[str]:
        """Names of the merged adapters."""
        return list(self.edits or self.weights)

    @property
    def tasks(self) -> list[str]:
        """Names of all tasks that were scored."""
        return list(next(iter(self.scores.values()), {}))

    @property
    def layers(self) -> list[str]:
        """Labels of the layers in the model's order."""
        if self.geometry is not None and self.geometry.layers:
            return [layer.layer for layer in self.geometry.layers]
        found = dict.fromkeys(row.layer for row in self.contributions)
        found.update(dict.fromkeys(layer_of(m.module) for m in self.export.modules))
        found.update(dict.fromkeys(self.plan.edits if self.plan is not None else ()))
        return sorted(found, key=_place)

    def share_kept(self, state: str, task: str) -> float | None:
        """Return which share of what an adapter wins alone on its task is left in a state.

        None for a task without adapter, or if its adapter alone is not better than the base.
        """
        return _share_kept(self.scores, state, task)


def _share_kept(scores: Mapping[str, Mapping[str, float]], state: str, task: str) -> float | None:
    if not {task, state, "base"} <= scores.keys():
        return None
    base, alone = scores["base"][task], scores[task][task]
    return (scores[state][task] - base) / (alone - base) if alone > base else None


def _place(label: str) -> tuple[bool, str, int, str]:
    head, _, number = label.rpartition(".")
    digits = number.lstrip("0") if number.isdigit() else ""
    return (label == OUTSIDE, head, len(digits), digits)


def parse_report(facts: Mapping[str, Any], where: str = "the report") -> Report:
    """Return the report that these JSON values hold.

    Args:
        facts: the content of report.json.
        where: what an error text calls it.

    Raises:
        ConfigError: they are not a report of a merge; the text names the first faults.
    """
    kind = facts.get("format") if isinstance(facts, Mapping) else None
    if kind not in (FORMAT, METHOD_FORMAT):
        raise ConfigError(
            f"{where} is no report of a merge: format is {kind!r}, not {FORMAT!r} or "
            f"{METHOD_FORMAT!r}."
        )
    try:
        return Report.model_validate(facts)
    except ValidationError as exc:
        faults = [
            ": ".join(filter(None, [".".join(map(str, error["loc"])), error["msg"]]))
            for error in exc.errors()[:3]
        ]
        raise ConfigError(f"{where} is damaged: {'; '.join(faults)}.") from None


def read_report(folder: str | Path) -> Report:
    """Read report.json of a folder that a merge was saved to (or the file itself).

    Raises:
        ConfigError: there is no such file, or it is no report.
    """
    path = Path(folder)
    path = path / "report.json" if path.is_dir() else path
    try:
        facts = read_object(path, _MOST_BYTES)
    except (OSError, ConfigError) as exc:
        raise ConfigError(
            f"cannot read the report of {str(folder)!r}: {exc} Give a folder that himerge merge "
            f"or result.save(folder) wrote."
        ) from exc
    return parse_report(facts, f"{str(path)!r}")


def short_names(labels: Sequence[str]) -> dict[str, str]:
    """Return label -> the label without the dotted head that all labels of blocks share."""
    heads = {label.rpartition(".")[0] for label in labels if label != OUTSIDE}
    if len(heads) != 1:
        return {label: label for label in labels}
    (head,) = heads
    return {label: label.removeprefix(f"{head}.") if head else label for label in labels}
