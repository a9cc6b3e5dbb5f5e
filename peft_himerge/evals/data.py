"""Rows for eval functions from files or the Hugging Face hub, through `datasets`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import ConfigError, MissingExtraError, suggest
from .base import EvalRowError, at_least_one
from .rows import ClassificationRow, GenerationRow, MultipleChoiceRow, PairRow, TokenRow

__all__ = ["ROW_KINDS", "load_rows"]

ROW_KINDS: Mapping[str, type] = MappingProxyType(
    {
        "multiple_choice": MultipleChoiceRow,
        "generation": GenerationRow,
        "likelihood": GenerationRow,
        "perplexity": str,
        "sequence_classification": ClassificationRow,
        "token_classification": TokenRow,
        "embedding_similarity": PairRow,
    }
)
"""Name of an eval function -> the rows it takes."""

_BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_HUB = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?")
_BARE = re.compile(rb"\s*(null|true|false|-?\d[\d.eE+-]*)\s*")
_LISTS = ("choices", "options", "references", "words", "labels")


def load_rows(
    source: str | Path,
    kind: str,
    *,
    split: str = "validation",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    subset: str | None = None,
) -> list[Any]:
    """Read rows for an eval function.

    Args:
        source: A file (.jsonl, .json, .csv, .tsv, .parquet), a folder with one file per split
            (`validation.jsonl` and so on), or, if there is neither, the name of a data set on the
            hub; only then the network is asked.
        kind: The eval function they are for (`ROW_KINDS`). Columns are named like the fields of its
            row; "perplexity" reads the column "text". Other columns are left aside.
        split: Which split of a folder or of a data set on the hub; a file is one split.
        columns: Field -> column, where they are named differently, e.g. {"references": "target"}.
        limit: Read only the first so many rows.
        subset: Configuration of a data set on the hub.

    Returns:
        The rows, of type `ROW_KINDS[kind]`. Lists in a CSV cell are written as JSON.

    Raises:
        ConfigError: `kind` or a field in `columns` is not known, there is no such file or split,
            or the data set cannot be loaded.
        EvalRowError: A row does not fit; the text names the file, the row (from 1) and the column.
        MissingExtraError: `datasets` is not installed.
    """
    if kind not in ROW_KINDS:
        raise ConfigError(f"rows of kind {kind!r} are not known.{suggest(str(kind), ROW_KINDS)}")
    at_least_one(limit=limit)
    required = _fields(ROW_KINDS[kind])
    names = {field: field for field in required} | dict(columns or {})
    for field in columns or {}:
        if field not in required:
            raise ConfigError(
                f"columns: rows for {kind} have no field {field!r}.{suggest(field, required)}"
            )
    place, builder, options = _place(source, split, subset)
    rows = []
    for number, record in enumerate(_records(place, builder, options), 1):
        rows.append(_row(kind, record, names, f"{place}, row {number}", builder == "csv"))
        if len(rows) == limit:
            break
    if not rows:
        raise EvalRowError(f"{place} has no rows")
    return rows


def _fields(row: type) -> dict[str, bool]:
    """Return field -> whether it must be there."""
    if row is str:
        return {"text": True}
    missing = dataclasses.MISSING
    return {f.name: f.default is missing for f in dataclasses.fields(row)}


def _place(source: str | Path, split: str, subset: str | None) -> tuple[str, str, dict[str, Any]]:
    """Return (what to call it, the builder, further arguments)."""
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _BUILDERS)
        found = [file for file in files if file.stem == split]
        if len(found) != 1:
            raise ConfigError(
                f"the folder {str(path)!r} must hold one file for the split {split!r}, found "
                f"{len(found)}. Its data files: {[file.name for file in files]}."
            )
        path = found[0]
    if path.is_file():
        if path.suffix not in _BUILDERS:
            kinds = ", ".join(_BUILDERS)
            raise ConfigError(
                f"{str(path)!r}: files of this kind cannot be read. Allowed: {kinds}."
            )
        options: dict[str, Any] = {"path_or_paths": str(path), "streaming": True}
        if _BUILDERS[path.suffix] == "csv":
            options["keep_default_na"] = False  # a cell that says "None" or "NA" is a text
            options["sep"] = "\t" if path.suffix == ".tsv" else ","
        elif _BUILDERS[path.suffix] == "json":
            _check_lines(path)
        return str(path), _BUILDERS[path.suffix], options
    if isinstance(source, Path) or path.suffix in _BUILDERS or not _HUB.fullmatch(source):
        raise ConfigError(f"there is no file or folder {str(source)!r}.")
    return source, source, {"split": split, "name": subset}


def _check_lines(path: Path) -> None:
    """Refuse a JSON file with a bare null or number for a row, over which pyarrow ends the process.

    Raises:
        EvalRowError: names the line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if len(line) < 80 and _BARE.fullmatch(line):
                raise EvalRowError(
                    f"{path}, line {number}: expected a row, {{...}}, got {line.strip().decode()}"
                )


def _records(place: str, builder: str, options: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError as exc:
        raise MissingExtraError(
            "reading rows needs datasets: pip install 'peft-himerge[evals]'."
        ) from exc
    try:
        try:
            if "path_or_paths" in options:
                # load_dataset("json", ...) does the same, and tells a server of every call.
                found = getattr(datasets.Dataset, f"from_{builder}")(**options)
            else:
                found = datasets.load_dataset(builder, **options)
        except StopIteration:  # what it makes of a file without rows
            return
        yield from found
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as exc:
        reason = str(exc) or type(exc).__name__
        cause = f" ({exc.__cause__})" if exc.__cause__ is not None else ""
        raise ConfigError(f"{place}: could not be read: {reason}{cause}") from exc


def _row(
    kind: str, record: Mapping[str, Any], names: Mapping[str, str], where: str, csv: bool
) -> Any:
    row = ROW_KINDS[kind]
    values = {}
    for field, required in _fields(row).items():
        column = names[field]
        value = record.get(column)
        if value is None or (csv and value == "" and not required):
            if required or (column != field and column not in record):
                raise EvalRowError(_absent(where, field, column, record))
            continue
        values[field] = _value(value, field, f"{where}, column {column!r}", csv)
    if row is str:
        return values["text"]
    try:
        return row(**values)
    except EvalRowError as exc:
        used = ", ".join(repr(names[field]) for field in values)
        raise EvalRowError(f"{where}, columns {used}: {exc}") from exc


def _absent(where: str, field: str, column: str, record: Mapping[str, Any]) -> str:
    if column in record:
        return f"{where}: the column {column!r} is empty"
    return (
        f"{where}: there is no column {column!r}. Columns: {', '.join(map(str, record))}. Say "
        f"which one it is with columns={{{field!r}: ...}}."
    )


def _value(value: Any, field: str, where: str, csv: bool) -> Any:
    """Return a cell as the field's type."""
    if field in _LISTS:
        return _items(value, field, where, csv)
    wanted: tuple[type, ...] = {"answer": (int,), "label": (int, str), "score": (int, float)}.get(
        field, (str,)
    )
    if isinstance(value, bool) or not isinstance(value, wanted):
        kinds = " or ".join(kind.__name__ for kind in wanted)
        raise EvalRowError(f"{where}: expected {kinds}, got {type(value).__name__} {value!r:.80}")
    return value


def _items(value: Any, field: str, where: str, csv: bool) -> Any:
    if csv and isinstance(value, str) and (field != "references" or value.startswith("[")):
        try:
            value = json.loads(value)
        except ValueError as exc:
            raise EvalRowError(f"{where}: expected a list as JSON, got {value!r:.80}") from exc
    if field == "references" and isinstance(value, str):
        return (value,)
    wanted = (int, str) if field == "labels" else (str,)
    good = isinstance(value, (list, tuple)) and all(
        isinstance(item, wanted) and not isinstance(item, bool) for item in value
    )
    if not good:
        kinds = " or ".join(kind.__name__ for kind in wanted)
        raise EvalRowError(f"{where}: expected a list of {kinds}, got {value!r:.80}")
    return tuple(value)
