"""How stable the analysis is: against conflicts by hand, and data whose answer is known."""

from __future__ import annotations

from typing import Any

import bytewise
import numpy as np
import pytest
import tiny
import torch
from scipy.stats import spearmanr
from snapshot import snapshot

from peft_himerge import HiMergeConfig, merge_adapters_hi
from peft_himerge.bench.stability import RowScores, Stability, compare, score_rows
from peft_himerge.conflict import find
from peft_himerge.contribution import measure, states
from peft_himerge.errors import ConfigError
from peft_himerge.evals import MultipleChoiceRow, multiple_choice
from peft_himerge.plan import Edit, MergePlan
from peft_himerge.scoring import Score

ROWS = 24
LAYERS = ("0", "1", "2")
HOLDERS = dict.fromkeys(LAYERS, ("en", "zh"))
METRICS = ("accuracy", "probability")


def made_up(noise: float, rows: int = 64) -> RowScores:
    """Scores of every state: a layer's own effect, plus noise that differs from row to row."""
    plan = MergePlan.model_wise(HOLDERS, {"en": Edit(), "zh": Edit()})
    random = np.random.default_rng(3)
    tables: dict[str, Any] = {"a": {}}
    for place, name in enumerate(("en", "zh")):
        for number, key in enumerate(states(name, plan, LAYERS)):
            effect = ((7 * number + 3 * place) % 11) ** 0.5
            tables["a"][key] = effect + noise * random.standard_normal(rows)
    return RowScores(tables, plan, LAYERS, HOLDERS, rows)


def test_without_noise_every_draw_agrees() -> None:
    found = compare(made_up(0.0), [2, 8, 32], draws=3)
    assert [(row.rows, row.kinds) for row in found] == [(2, 1.0), (8, 1.0), (32, 1.0)]
    assert [row.order for row in found] == pytest.approx([1.0] * 3)


def test_more_rows_agree_better() -> None:
    few, many = compare(made_up(2.0, rows=400), [4, 200], draws=60)
    assert few.order + 0.1 < many.order
    assert few.kinds + 0.1 < many.kinds


def test_rows_that_say_nothing_as_a_whole_never_agree() -> None:
    scored = made_up(1.0)
    for key, table in scored.tables["a"].items():
        scored.tables["a"][key] = table - table.mean()
    # What half of the rows has too much of, the other half has too little of.
    (found,) = compare(scored, [32], draws=10)
    assert found.order == pytest.approx(-1.0)


def test_agreement_is_that_of_conflicts_found_by_hand() -> None:
    scored, size, seed = made_up(0.6), 16, 5
    (found,) = compare(scored, [size], draws=1, tolerance="1se", seed=seed)
    order = np.random.default_rng([seed, size]).permutation(scored.rows)
    config, sides = HiMergeConfig(tolerance="1se"), []
    for rows in (order[:size], order[size:]):
        conflicts = []
        for layer in LAYERS:
            contributions = [
                measure(
                    lambda t, s, rows=rows: Score(
                        float(scored.tables["a"][t, s][rows].mean()), scored.tables["a"][t, s][rows]
                    ),
                    task,
                    layer,
                    scored.plan,
                )
                for task in ("en", "zh")
            ]
            conflicts.append(find(contributions, config, {"en": 1.0, "zh": 1.0}, HOLDERS[layer]))
        sides.append(conflicts)
    kinds = [[c.kind for c in side] for side in sides]
    same = sum(a is b for a, b in zip(*kinds, strict=True)) / len(LAYERS)
    chance = sum(kinds[0].count(k) * kinds[1].count(k) for k in set(kinds[0])) / len(LAYERS) ** 2
    ranks = spearmanr(*[[c.Gamma for c in side] for side in sides]).statistic
    assert found == Stability("a", size, pytest.approx(same), pytest.approx(chance), found.order)
    assert found.order == pytest.approx(ranks)


def test_rows_of_a_model_give_the_contributions_of_a_merge() -> None:
    specs = {
        name: {"target_modules": ["q_proj", "v_proj"], "seed": i, "init_scale": 0.3}
        for i, name in enumerate(("zh", "en"))
    }
    model = tiny.add_adapters(bytewise.llama(torch.float64), specs)
    tokenizer = bytewise.tokenizer()
    rows = [MultipleChoiceRow(f"number {n} is", ("a", "b", "c"), n % 3) for n in range(2 * ROWS)]
    eval_fns = {
        "zh": multiple_choice(rows[:ROWS], tokenizer),
        "en": multiple_choice(rows[ROWS:], tokenizer),
    }
    before = snapshot(model)
    scored = score_rows(model, eval_fns, METRICS)
    assert snapshot(model) == before
    assert (scored.rows, set(scored.tables)) == (ROWS, set(METRICS))
    config = HiMergeConfig(density=1.0, scale=1.0, metric="probability", max_export_drop=None)
    merged = merge_adapters_hi(model, ["zh", "en"], eval_fns, config=config)
    table = scored.tables["probability"]
    for row in merged.contributions:
        plan = scored.plan
        again = measure(
            lambda t, s: Score(float(table[t, s].mean()), table[t, s]), row.task, row.layer, plan
        )
        assert again.gamma == pytest.approx(row.gamma, abs=1e-6)
        assert again.c_alone == pytest.approx(row.c_alone, abs=1e-6)
    found = compare(scored, [4, 12], draws=2)
    assert [(row.metric, row.rows) for row in found] == [(m, n) for m in METRICS for n in (4, 12)]


def test_sizes_and_tasks_that_do_not_fit_are_refused() -> None:
    for sizes in ([], [1], [33]):
        with pytest.raises(ConfigError, match="a draw takes from 2 to 32 of 64 rows"):
            compare(made_up(0.0), sizes)
    model = tiny.add_adapters(
        bytewise.llama(), {n: {"target_modules": ["q_proj"]} for n in ("zh", "en")}
    )
    lengths = {"zh": 3, "en": 4}
    eval_fns = {n: lambda _, size=size: {"a": [0.5] * size} for n, size in lengths.items()}
    with pytest.raises(ConfigError, match=r"as many rows, got \[3, 4\]"):
        score_rows(model, eval_fns, ["a"])
