"""The three conflict cases on bare numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_himerge import Edit, HiMergeConfig, MergePlan
from peft_himerge.conflict import Conflict, ConflictKind, find, grades, rank, resolve
from peft_himerge.contribution import Contribution
from peft_himerge.plan import DROP, IDENTITY

PAPER = HiMergeConfig()


def row(task: str, gamma: float, c_alone: float = 0.0, se: float | None = None) -> Contribution:
    return Contribution("h.0", task, 0, 0, 0, 0, c_alone, c_alone - gamma, gamma, gamma_se=se)


def judge(
    *rows: Contribution,
    config: HiMergeConfig = PAPER,
    gains: dict[str, float] | None = None,
    holders: set[str] | None = None,
) -> Conflict:
    held = {r.task for r in rows} if holders is None else holders
    return find(list(rows), config, gains or {}, held)


def test_all_positive_is_severe_and_the_largest_c_alone_stays() -> None:
    found = judge(row("a", 0.1, 1.0), row("b", 0.2, 3.0), row("c", 0.7, 2.0))
    assert found.kind is ConflictKind.SEVERE
    assert found.winner == "b"
    assert found.offenders == ()
    assert found.Gamma == pytest.approx(1.0)


def test_severe_tie_goes_to_the_first_name_in_any_order() -> None:
    tied = [row("b", 0.1, 1.0), row("a", 0.2, 1.0)]
    assert judge(*tied).winner == judge(*reversed(tied)).winner == "a"


def test_severe_winner_holds_a_delta_in_the_layer() -> None:
    found = judge(row("a", 0.1, 0.0), row("b", 0.2, -1.0), holders={"b"})
    assert found.kind is ConflictKind.SEVERE
    assert found.winner == "b"


def test_mixed_is_partial_and_the_ones_that_do_not_lose_offend() -> None:
    found = judge(row("a", 0.1), row("b", 0.0), row("c", -0.4))
    assert found.kind is ConflictKind.PARTIAL
    assert found.offenders == ("b", "c")
    assert found.winner is None
    assert found.Gamma == pytest.approx(-0.3)


def test_mixed_read_the_other_way_makes_the_losers_offend() -> None:
    other = HiMergeConfig(partial_target="degraded")
    found = judge(row("a", 0.1), row("b", 0.0), row("c", -0.4), config=other)
    assert found.offenders == ("a",)


def test_partial_offenders_hold_a_delta_in_the_layer() -> None:
    found = judge(row("a", 0.1), row("b", 0.0), row("c", -0.4), holders={"a", "c"})
    assert found.kind is ConflictKind.PARTIAL
    assert found.offenders == ("c",)


@pytest.mark.parametrize("gammas", [(0.0, 0.0), (-0.1, 0.0), (-1.0, -2.0)])
def test_none_positive_is_mutual(gammas: tuple[float, float]) -> None:
    found = judge(row("a", gammas[0]), row("b", gammas[1]))
    assert found.kind is ConflictKind.MUTUAL
    assert (found.winner, found.offenders) == (None, ())


def test_gamma_below_the_tolerance_counts_as_zero() -> None:
    config = HiMergeConfig(tolerance=0.1)
    found = judge(row("a", 0.09), row("b", -0.05), row("c", -0.3), config=config)
    assert found.kind is ConflictKind.MUTUAL
    assert dict(found.gammas) == {"a": 0.0, "b": 0.0, "c": -0.3}
    assert found.Gamma == -0.3
    assert judge(row("a", 0.11), row("b", -0.3), config=config).kind is ConflictKind.PARTIAL
    at_it = HiMergeConfig(tolerance=0.25)
    assert judge(row("a", 0.25), row("b", -0.3), config=at_it).kind is ConflictKind.PARTIAL


def test_gamma_below_its_own_standard_errors_counts_as_zero() -> None:
    config = HiMergeConfig(tolerance="2se")
    found = judge(row("a", 0.3, se=0.2), row("b", 0.3, se=0.1), config=config)
    assert found.kind is ConflictKind.PARTIAL
    assert found.offenders == ("a",)


def test_gain_divides_gammas_and_c_by_what_each_task_wins_alone() -> None:
    config = HiMergeConfig(normalize="gain")
    rows = (row("a", 0.1, 1.0), row("b", 20.0, 50.0))
    found = judge(*rows, config=config, gains={"a": 0.1, "b": 100.0})
    assert dict(found.gammas) == {"a": pytest.approx(1.0), "b": pytest.approx(0.2)}
    assert found.winner == "a"
    assert judge(*rows).winner == "b"


def test_gain_applies_before_the_tolerance() -> None:
    # |gamma| in units of the gain is what the tolerance is compared with.
    config = HiMergeConfig(normalize="gain", tolerance=0.1)
    found = judge(row("a", 0.05), row("b", 5.0), config=config, gains={"a": 0.1, "b": 100.0})
    assert dict(found.gammas) == {"a": 0.5, "b": 0.0}


@pytest.mark.parametrize("gains", [{"a": 7.0, "b": 0.01}, {"a": 0.01, "b": 7.0}])
def test_gain_leaves_a_tolerance_in_standard_errors_as_it_is(gains: dict[str, float]) -> None:
    config = HiMergeConfig(normalize="gain", tolerance="2se")
    rows = (row("a", 0.3, se=0.2), row("b", 0.3, se=0.1))
    assert judge(*rows, config=config, gains=gains).offenders == ("a",)


@given(
    st.dictionaries(st.sampled_from("abcde"), st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=1),
    st.randoms(use_true_random=False),
)
def test_verdict_does_not_depend_on_the_order_of_tasks(
    gammas: dict[str, float], random: object
) -> None:
    rows = [row(task, gamma, gamma * 2) for task, gamma in gammas.items()]
    want = judge(*rows)
    random.shuffle(rows)  # type: ignore[attr-defined]
    assert judge(*rows) == want
    positive = [gamma > 0 for gamma in gammas.values()]
    kind = "severe" if all(positive) else "partial" if any(positive) else "mutual"
    assert want.kind.value == kind
    assert set(want.offenders) == (
        {t for t, g in gammas.items() if g <= 0} if kind == "partial" else set()
    )


def test_rank_is_by_descending_Gamma_and_keeps_the_order_of_equals() -> None:
    layers = [
        Conflict(layer, ConflictKind.MUTUAL, Gamma, {})
        for layer, Gamma in [("h.0", 0.0), ("h.1", 2.0), ("h.2", -1.0), ("h.3", 2.0)]
    ]
    assert [c.layer for c in rank(layers)] == ["h.1", "h.3", "h.0", "h.2"]


# ---------------------------------------------------------------------------------------- resolve

PLAN = MergePlan.model_wise(
    {"h.0": ["a", "b", "c"]}, {"a": Edit(0.3, 0.9), "b": Edit(0.5, 0.7), "c": Edit(1.0, 1.0)}
)


def test_severe_keeps_the_winner_and_drops_the_others() -> None:
    found = judge(row("a", 1, 3), row("b", 1, 1), row("c", 1, 2))
    assert resolve(found, PLAN, PAPER) == {"a": IDENTITY, "b": DROP, "c": DROP}


def test_partial_halves_density_and_scale_of_the_offenders() -> None:
    found = judge(row("a", -1), row("b", 0), row("c", 1))
    assert resolve(found, PLAN, PAPER) == {"a": Edit(0.15, 0.45), "b": Edit(0.25, 0.35)}


def test_partial_uses_the_given_layer_density_and_scale() -> None:
    config = HiMergeConfig(layer_density=0.6, layer_scale=1.5)
    found = judge(row("a", -1), row("b", 1), row("c", 1))
    assert resolve(found, PLAN, config) == {"a": Edit(0.6, 1.5)}


def test_mutual_leaves_the_layer_alone() -> None:
    assert resolve(judge(row("a", -1), row("b", 0), row("c", -2)), PLAN, PAPER) == {}


def two_layers() -> MergePlan:
    whole = {"a": Edit(0.4, 0.8), "b": Edit(1.0, 1.0)}
    return MergePlan.model_wise({"h.0": ["a", "b"], "h.1": ["a"]}, whole)


def test_grades_scale_one_adapter_in_one_layer() -> None:
    plan = two_layers()
    assert grades(plan, "h.0", "a") == [Edit(1.0, 0.0), Edit(1.0, 0.5), Edit(1.0, 1.5)]
    edited = plan.with_edit("h.0", "a", Edit(0.5, 2.0)).with_edit("h.0", "b", DROP)
    assert grades(edited, "h.0", "a") == [Edit(0.5, 0.0), Edit(0.5, 1.0), Edit(0.5, 3.0)]
    assert grades(edited, "h.0", "b") == []
