"""Every cell of the matrix: merged, saved and read by a fresh process, or refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from matrix import bases, reload, setups, table, truth
from matrix.cells import MERGED, WAYS, Cell, Refused, cells
from paper import paper
from snapshot import moved, snapshot
from torch import Tensor

from peft_himerge import (
    HiMergeConfig,
    HiMergeError,
    add_weighted_adapter,
    merge_adapters_hi,
    merge_folders,
)

WEIGHTS = {"zh": 0.7, "en": -0.4}
# Largest error that a forward in this dtype may have, as a share of the largest output.
TOLERANCE = {"float32": 2e-5, "float16": 5e-3, "bfloat16": 4e-2, "quantised": 4e-2}
Eval = Callable[[Any], Tensor]


def eval_fns(base: str, dtype: torch.dtype) -> dict[str, Eval]:
    """Cheap and smooth: minus the squared distance of the outputs to random targets."""

    def score(name: str) -> Eval:
        batch = bases.inputs(base, name, dtype)

        def fn(model: Any) -> Tensor:
            said = bases.outputs(model, batch)
            target = torch.randn(said.shape, generator=bases.drawn(name), dtype=torch.float64)
            return -(said - target).pow(2).flatten(1).mean(1)

        return fn

    return {name: score(name) for name in WEIGHTS}


def by_drop_in(made: setups.Made, cell: Cell, folder: Path) -> oracle.Deltas:
    result = add_weighted_adapter(
        made.model,
        list(WEIGHTS),
        list(WEIGHTS.values()),
        "made",
        combination_type="linear",
        svd_rank=cell.rank,
        modules_to_save=cell.policy,
    )
    result.save(folder)
    return truth.weighted_sum(made.table(), WEIGHTS)


def by_hi(made: setups.Made, cell: Cell, folder: Path) -> oracle.Deltas:
    # The paper's rule, as "joint" drops adapters that are no good at their task, random ones too.
    config = paper(density=0.6, scale=0.9, rank="exact", max_export_drop=None)
    fns = eval_fns(cell.base, made.dtype)
    result = merge_adapters_hi(made.model, list(WEIGHTS), fns, adapter_name="made", config=config)
    result.save(folder, page=False)
    return truth.of_plan(made.table(), result.plan)


def by_folders(made: setups.Made, cell: Cell, folder: Path) -> oracle.Deltas:
    sources = {name: folder.parent / name for name in WEIGHTS}
    if made.filed is None:
        made.model.save_pretrained(
            folder.parent, selected_adapters=list(WEIGHTS), save_embedding_layers=False
        )
    config = HiMergeConfig(density=0.6, scale=0.9, rank="exact")
    plan = merge_folders(sources, folder, config=config).plan
    return truth.of_plan(made.filed or made.table(), plan)


def check_factors(got: oracle.Deltas, want: oracle.Deltas, precision: str) -> None:
    """The merged factors multiply out to the dense deltas, to the precision they are stored in."""
    limit = 2e-2 if precision == "bfloat16" else 1e-5
    for module, delta in want.items():
        size = float(delta.norm())
        lost = float((got.get(module, torch.zeros_like(delta)) - delta).norm())
        assert lost <= limit * size, f"{module}: {lost / size}"


MERGERS = dict(zip(WAYS, (by_drop_in, by_hi, by_folders), strict=True))


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Callable[[dict[str, Any]], dict[str, Tensor]]]:
    """A process that never merged anything, and reads one saved folder after the other."""
    command = [sys.executable, reload.__file__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as worker:

        def read(job: dict[str, Any]) -> dict[str, Tensor]:
            assert worker.stdin is not None
            assert worker.stdout is not None
            print(json.dumps(job), file=worker.stdin, flush=True)
            assert worker.stdout.readline() == "done\n"
            said: dict[str, Tensor] = torch.load(Path(job["folder"]) / "said.pt")
            return said

        yield read
    assert worker.returncode == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("cell", "way"),
    [pytest.param(cell, way, id=f"{cell.id}-{way}") for cell in cells() for way in cell.ways],
)
def test_cell(
    cell: Cell,
    way: str,
    tmp_path: Path,
    elsewhere: Callable[[dict[str, Any]], dict[str, Tensor]],
    record_property: Callable[[str, object], None],
) -> None:
    outcome = cell.outcome(way)
    said = f"refused ({outcome.names})" if isinstance(outcome, Refused) else outcome
    record_property("matrix", (cell.group, cell.label, way, said))
    if cell.needs:
        pytest.importorskip(cell.needs)
    made = setups.make(cell, tmp_path)
    before = snapshot(made.model)
    restless = set(moved(before, snapshot(made.model)))  # what PEFT makes anew at every look
    folder = tmp_path / "made"
    if isinstance(outcome, Refused):
        with pytest.raises(HiMergeError) as raised:
            MERGERS[way](made, cell, folder)
        assert outcome.names in str(raised.value)
        assert outcome.fix in str(raised.value)
        assert set(moved(before, snapshot(made.model))) <= restless
        assert not folder.exists()
        return
    assert outcome == MERGED
    deltas = MERGERS[way](made, cell, folder)
    changed = set(moved(before, snapshot(made.model, but="made"))) - restless
    if cell.precision == "quantised":  # bitsandbytes packs weights to run and unpacks them to save
        changed = {fact for fact in changed if not fact.startswith("storage ")}
    assert changed == set()
    if "made" in made.model.peft_config:
        check_factors(oracle.deltas(made.model, "made"), deltas, cell.precision)
    job = {"base": cell.base, "dtype": str(made.dtype).removeprefix("torch.")}
    check_outputs(
        cell, made, deltas, elsewhere(job | {"tasks": list(WEIGHTS), "folder": str(folder)})
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=cell.id)
        for cell in cells()
        if cell.group in ("base", "model") and cell.hi == MERGED
    ],
)
def test_the_default_focuses_adapters_of_every_base(cell: Cell, tmp_path: Path) -> None:
    if cell.needs:
        pytest.importorskip(cell.needs)
    made = setups.make(cell, tmp_path)
    before = snapshot(made.model)
    restless = set(moved(before, snapshot(made.model)))
    config = HiMergeConfig(rank="exact", max_export_drop=None)
    fns = eval_fns(cell.base, made.dtype)
    result = merge_adapters_hi(made.model, list(WEIGHTS), fns, adapter_name="made", config=config)
    assert result.options["focus"]
    result.save(tmp_path / "made", page=False)  # and bitsandbytes unpacks what it packed
    changed = set(moved(before, snapshot(made.model, but="made"))) - restless
    if cell.precision == "quantised":
        changed = {fact for fact in changed if not fact.startswith("storage ")}
    assert changed == set()
    exact = {record.module: result.delta(record.module).double() for record in result.modules}
    check_factors(oracle.deltas(made.model, "made"), exact, cell.precision)
    whole = truth.weighted_sum(made.table(), dict.fromkeys(WEIGHTS, 1.0))
    shares = {m: float((exact[m] - d).norm() / d.norm()) for m, d in whole.items() if m in exact}
    assert max(shares.values()) > 0.1  # no plain sum


def check_outputs(
    cell: Cell, made: setups.Made, deltas: oracle.Deltas, got: dict[str, Tensor]
) -> None:
    """The fresh process says what the float64 model says, and the base says something else."""
    batches = {task: bases.inputs(cell.base, task, torch.float64) for task in WEIGHTS}
    base = truth.wide(cell.base, made.plain)
    plain = {task: bases.outputs(base, batch) for task, batch in batches.items()}
    if "alora_invocation_tokens" in cell.both:
        merged = truth.activated(base, deltas, bases.CALLED)
    else:
        merged = truth.with_deltas(base, deltas)
    if made.filed is None or not deltas:  # else the deltas are all there is
        truth.add_carried(made.model, merged, WEIGHTS, cell.policy)
    for task, batch in batches.items():
        want = bases.outputs(merged, batch)
        limit = TOLERANCE[cell.precision or cell.dtype] * float(want.abs().max())
        assert float((got[task] - want).abs().max()) < limit
        assert float((plain[task] - want).abs().max()) > 5 * limit


def test_readme_holds_the_matrix_as_the_cells_give_it() -> None:
    # Stale? python tests/matrix/table.py --write
    assert table.of_readme(table.README.read_text(encoding="utf-8")) == table.render()


def test_every_cell_has_a_name_of_its_own() -> None:
    ids = [cell.id for cell in cells()]
    assert len(set(ids)) == len(ids)
