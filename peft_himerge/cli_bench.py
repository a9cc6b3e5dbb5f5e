"""`himerge bench`: the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import ConfigError
from .files import write_text

__all__ = ["bench"]


def bench(
    out: Annotated[Path, typer.Option(help="Folder for cells and tables; a stopped run resumes.")],
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base model, a causal LM.")
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="Folder with one adapter folder per task.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with one folder of JSONL files per task.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option(help="Tasks to merge, as trec+thucnews; once per setting.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Only this contender (or: ablations); may be repeated."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Validation rows per task and score.")] = 48,
    test_rows: Annotated[int, typer.Option(min=1, help="Test rows per task.")] = 200,
    text_rows: Annotated[
        int | None,
        typer.Option(min=1, help="Test rows where text is generated; as --test-rows by default."),
    ] = None,
    budget: Annotated[int, typer.Option(min=2, help="Scores a method may spend.")] = 24,
    guide: Annotated[
        str,
        typer.Option(help="What methods choose by: smooth, probability, or measure (the table's)."),
    ] = "smooth",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 64,
    dtype: Annotated[
        str, typer.Option(help="Of the base: float32, or bfloat16 (faster where the CPU has it).")
    ] = "float32",
    seed: Annotated[
        int, typer.Option(help="Of validation rows, random masks and points tried.")
    ] = 0,
    quick: Annotated[bool, typer.Option(help="A first look: fewer rows and scores.")] = False,
) -> None:
    """Score Hi-Merging and every method of the registry on your adapters and tasks.

    Without --adapters, --data and --setting: on the demo's.
    """
    from .bench.own import run_own
    from .bench.run import Options, run_bench
    from .bench.table import render

    if quick:
        rows, test_rows, budget = min(rows, 16), min(test_rows, 32), min(budget, 8)
        text_rows = min(text_rows or test_rows, test_rows)
    options = Options(
        rows, test_rows, budget, guide, batch_size, max_new_tokens, dtype, seed, text_rows
    )
    if adapters is None and data is None and not setting:
        cells = run_own(out, contenders=method or (), options=options, base=base, say=typer.echo)
    elif base is None or adapters is None or data is None or not setting:
        raise ConfigError(
            "your own adapters and tasks need all of --base, --adapters, --data and --setting "
            "(e.g. --setting trec+thucnews); leave all out for the demo's."
        )
    else:
        cells = run_bench(
            base,
            adapters,
            data,
            out,
            settings=[name.split("+") for name in setting],
            contenders=method or (),
            options=options,
            say=typer.echo,
        )
    text = render(cells)
    write_text(out / "bench.md", text)
    typer.echo(f"\n{text}\n{out / 'bench.md'}")
