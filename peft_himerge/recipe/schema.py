"""The recipe as a record: its keys, their types and their meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

__all__ = ["BASE", "HUB", "Budget", "Recipe", "TaskSpec", "Tracking"]

BASE = "base"
"""What tables call the base model."""

HUB = "hub:"
"""What a data set's name on the Hugging Face hub starts with; all else is a file or a folder."""

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, strict=True)]


class TaskSpec(BaseModel):
    """What to score. Keys that are not here are options of the eval function `kind`.

    Attributes:
        kind: an eval function of `peft_himerge.evals`, or "function" for one of your own.
        validation: rows that the merge is decided by: a file (.jsonl, .json, .csv, .tsv,
            .parquet), a folder with one file per split, or "hub:NAME". For "lm_eval_task" the name
            of a task; for "function" a name that `eval_fns` of the --eval file has.
        test: the same for the table at the end.
        metric: which of the metrics decides; the default is the smooth one.
        test_metric: which of them the table shows.
        columns: field of a row -> column of the file, where they are named differently.
        subset: configuration of a data set on the hub.
        max_rows: most validation rows to use.
        max_test_rows: most test rows to use.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: str
    validation: Text | None = None
    test: Text | None = None
    metric: Text | None = None
    test_metric: Text | None = None
    columns: dict[str, str] | None = None
    subset: Text | None = None
    max_rows: Count | None = None
    max_test_rows: Count | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Options of the eval function."""
        return dict(self.model_extra or {})


class Tracking(BaseModel):
    """Where the merge is told. `tracking: wandb` is short for `tracking: {to: wandb}`.

    Attributes:
        to: "none" or "wandb".
        project: W&B's project.
        entity: W&B's user or team.
        run: name of the run.
        mode: W&B's mode; None leaves it to the environment (WANDB_MODE).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    to: Literal["none", "wandb"] = "none"
    project: Text | None = None
    entity: Text | None = None
    run: Text | None = None
    mode: Literal["online", "offline", "disabled"] | None = None


class Budget(BaseModel):
    """What a merge may cost.

    Attributes:
        scores: the merge is refused, before anything is paid, if it may need more scores.
        seconds: the merge stops after the first score that ends later; the journal keeps what is
            known, and the next run goes on there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scores: Count | None = None
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


def _long_form(value: Any) -> Any:
    return {"to": value} if isinstance(value, str) else value


class Recipe(BaseModel):
    """One merge, from folders to a folder. Paths are read from the recipe's own folder.

    Attributes:
        base: folder of the base model; may be left out if nothing is to be scored.
        adapters: name -> folder, at least one.
        tasks: name -> what to score; a task named like an adapter is that adapter's own, any other
            guards the merge.
        method: "hi" (Hi-Merging), or a method of `list_methods()`.
        options: of the method; for "hi" those of `HiMergeConfig`, else its own and the keywords of
            `merge_adapters`.
        rank: rank of the merged adapter (`HiMergeConfig.rank`).
        out: folder to write.
        name: the merged adapter's name.
        merged: folder for a full checkpoint, base and merged delta; None writes none.
        journal: file that keeps scores, so that a killed merge goes on where it stopped.
        dtype: what the base model is loaded in.
        tracking: where the merge is told.
        budget: what it may cost.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: Text | None = None
    adapters: Annotated[dict[str, Text], Field(min_length=1)]
    tasks: dict[str, TaskSpec] = {}
    method: Text = "hi"
    options: dict[str, Any] = {}
    rank: Any = "auto"
    out: Text
    name: Text = "merged"
    merged: Text | None = None
    journal: Text | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    tracking: Annotated[Tracking, BeforeValidator(_long_form)] = Tracking()
    budget: Budget = Budget()

    _file: Path = PrivateAttr(default=Path("recipe.yaml"))

    @property
    def file(self) -> Path:
        """The file it was read from."""
        return self._file

    def place(self, path: str) -> Path:
        """Return a path of the recipe, read from the recipe's folder."""
        return self._file.parent / path

    @property
    def folders(self) -> dict[str, Path]:
        """Adapter -> folder."""
        return {name: self.place(folder) for name, folder in self.adapters.items()}

    @property
    def is_hi(self) -> bool:
        """True if the method is Hi-Merging."""
        return self.method == "hi"

    @property
    def is_scored(self) -> bool:
        """True if tasks decide the merge; without, Hi-Merging needs no base model."""
        return any(task.validation is not None for task in self.tasks.values())

    @property
    def guards(self) -> list[str]:
        """Names of the scored tasks that belong to no adapter."""
        return [n for n, t in self.tasks.items() if t.validation and n not in self.adapters]
