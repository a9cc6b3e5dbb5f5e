"""The cost said beforehand against the scores and block-forwards of real merges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import Done, himerge
from paper import paper
from safetensors.torch import load_file, save_file

from peft_himerge import HiMergeConfig, merge_adapters_hi
from peft_himerge.adapters import read_adapters
from peft_himerge.blocks import find_blocks
from peft_himerge.combine import Combiner
from peft_himerge.contribution import states
from peft_himerge.cost import Cost, estimate, path_of
from peft_himerge.engine import Engine
from peft_himerge.errors import AdapterError, ConfigError
from peft_himerge.events import MergeStarted, StateScored
from peft_himerge.focus import USUAL
from peft_himerge.plan import Edit, MergePlan
from peft_himerge.preview import preview
from peft_himerge.probe import Probe
from peft_himerge.scoring import Task

GIVEN = {"density": 0.4, "scale": 0.9}
LAYERS = [f"model.layers.{i}" for i in range(18)]


def cost_of(n_layers: int, own: list[str], guards: list[str], **options: Any) -> Cost:
    config = paper(**{**GIVEN, **options})
    table = {f"model.layers.{i}": own for i in range(n_layers)}
    return estimate(table, own, guards, config)


def scores(cost: Cost) -> dict[str, int]:
    return {step.name: step.scores for step in cost.steps}


# ------------------------------------------------------------------------------- worked by hand


@pytest.mark.parametrize(("n", "n_layers"), [(2, 4), (3, 18), (5, 1)])
def test_the_analysis_costs_4l_plus_3_scores_per_task(n: int, n_layers: int) -> None:
    own = [f"a{i}" for i in range(n)]
    found = scores(cost_of(n_layers, own, []))
    if n_layers == 1:  # a layer alone is the whole, the whole without it the base
        assert found["analysis"] == 0
    else:
        # Base, alone and merged are among the states of the steps before.
        assert found["analysis"] == n * 4 * n_layers
    assert found["base"] == n
    assert found["alone"] == n * (n + 1)
    assert found["exported"] == found["merged"] == n


@pytest.mark.parametrize(
    ("options", "searched", "alone"),
    [
        ({"density": "search", "scale": "search"}, 2 * 12, 7),
        ({"density": "search", "scale": 1.0}, 2 * 10, 7),
        ({"density": "search", "scale": "search", "search": "grid"}, 2 * 100, 7),
        ({"density": "search", "scale": 1.0, "search_target": "merged"}, 2 * 10 * 3, 6),
        ({"density": "search", "scale": "search", "search": "optuna"}, 2 * 20, 7),
        (
            {
                "density": "search",
                "scale": "search",
                "search": "optuna",
                "search_budget": 7,
                "search_target": "merged",
            },
            (2 * 7 + 6) * 3,
            6,
        ),
    ],
)
def test_a_search_pays_for_states_that_later_steps_find(
    options: dict[str, Any], searched: int, alone: int
) -> None:
    # Two adapters and a guard. Alone: 2 adapters and the merge on 3 tasks are 9 scores; a search on
    # the own task paid for 2, one on the merged model for the 3 of the merge.
    found = scores(cost_of(4, ["a", "b"], ["g"], **options))
    assert found["search"] == searched
    assert found["alone"] == alone


def test_focus_pays_for_the_sources_alone_and_for_their_parts_on_their_own_tasks() -> None:
    found = scores(cost_of(18, ["a", "b"], ["g"], variant="focused"))
    assert (found["sources"], found["alone"]) == (2 * 3, 3)
    assert found["analysis"] == 2 * 4 * 18 + 2
    assert "sources" not in scores(cost_of(18, ["a"], ["g"], variant="focused"))


def test_a_single_adapter_is_neither_analysed_nor_repaired() -> None:
    found = cost_of(4, ["a"], [])
    assert scores(found) == {"base": 1, "alone": 1, "merged": 0, "exported": 1}


def test_a_dropped_adapter_costs_nothing_beyond_the_base() -> None:
    assert scores(cost_of(4, ["a", "b"], [], density=0.0)) | {"merged": 0} == {
        "base": 2, "alone": 0, "analysis": 0, "repair": 0, "merged": 0, "exported": 2,
    }  # fmt: skip


def test_blocks_of_the_analysis_are_the_distinct_edges_of_the_prefix_tree() -> None:
    plan = MergePlan.model_wise(
        {layer: ["a", "b"] for layer in LAYERS}, {"a": Edit(0.4, 0.9), "b": Edit(0.4, 0.9)}
    )
    edges = set()
    for task in ("a", "b"):
        for _, state in states(task, plan, LAYERS):
            path = path_of(state, LAYERS)
            edges.update((task, path[:depth]) for depth in range(1, len(LAYERS) + 1))
    # Per task, with L(L+1)/2 = 171 edges of a row that leaves a trunk at every layer: the base's
    # 18, two rows "only", two trunks (but for their first edge), and two rows "without" (of which
    # the first three edges are shared with others). 0.541 of the naive 75 * 18.
    assert len(edges) == 2 * (18 + 2 * 171 + 2 * 17 + 2 * (171 - 3))
    cost = cost_of(18, ["a", "b"], [])
    steps = {step.name: step for step in cost.steps}
    analysis = steps["analysis"]
    assert analysis.naive_blocks == 2 * 72 * 18
    # Three states per task were scored in steps of their own: their last edges are paid for there.
    assert len(edges) - 2 * 3 * 18 <= analysis.shared_blocks <= len(edges)
    assert cost.shared_blocks <= cost.naive_blocks == 18 * cost.scores


# ------------------------------------------------------------------------------ against the engine


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_shared_blocks_are_what_the_engine_runs(kind: str) -> None:
    names = list(tiny.NAMES[:2])
    model = tiny.peft_model(kind, 2, dtype=torch.float32)
    combiner = Combiner(read_adapters(model, names))
    labels = [layer.label for layer in combiner.layers]
    blocks = list(find_blocks(model.base_model.model, labels))
    order = [layer.label for layer in combiner.in_order()]
    assert set(order) - {"outside"} == set(blocks)
    cost = estimate(combiner.table(), names, [], paper(**GIVEN), order=order)
    plan = combiner.plan(dict.fromkeys(names, Edit(0.4, 0.9)))
    probe = Probe(model, combiner, cache_bytes=10**9)
    steps = {step.name: step for step in cost.steps}
    fns = tiny.eval_fns(kind, names)
    with probe:
        engine = Engine(probe, {name: Task(name, fns[name]) for name in names}, lambda _: None)
        engine.score_many([(task, MergePlan.base()) for task in names])
        assert probe.blocks.run == steps["base"].shared_blocks
        alone = [(task, plan.solo(name)) for name in names for task in names]
        engine.score_many([*alone, *((task, plan) for task in names)])
        before = steps["base"].shared_blocks + steps["alone"].shared_blocks
        assert probe.blocks.run == before
        engine.score_many([r for name in names for r in states(name, plan, labels)])
        assert probe.blocks.run == before + steps["analysis"].shared_blocks
        assert engine.done == sum(steps[n].scores for n in ("base", "alone", "analysis"))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"density": 0.0},
    {"density": {"zh": 0.4, "en": 0.0}, "scale": {"zh": 1.0, "en": 1.0}},
    {"accept": "no_regression"},
    {"reanalyze": "each"},
    {"reanalyze": "each", "accept": "no_regression"},
    {"density": "search", "scale": "search"},
    {"density": "search", "scale": 0.5, "search_target": "merged", "accept": "no_regression"},
    {"density": "search", "scale": "search", "search": "optuna", "search_budget": 9},
    {"variant": "focused"},
    {"variant": "focused", "density": 1.0, "scale": "search"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("kind", "guard"), [("llama", False), ("qwen2", True)])
def test_the_total_is_an_upper_bound_that_only_falls_to_what_was_done(
    kind: str, guard: bool, options: dict[str, Any]
) -> None:
    names = list(tiny.NAMES[:2])
    fns = tiny.eval_fns(kind, [*names, *(["general"] if guard else [])])
    events: list[Any] = []
    config = paper(**{**GIVEN, "max_export_drop": None, **options})
    result = merge_adapters_hi(
        tiny.peft_model(kind, 2), names, fns, config=config, callbacks=[events.append]
    )
    scored = [e for e in events if isinstance(e, StateScored)]
    started = next(e for e in events if isinstance(e, MergeStarted))
    totals = [started.scores, *(e.total for e in scored)]
    assert totals == sorted(totals, reverse=True)
    assert all(e.done <= e.total for e in scored)
    assert totals[-1] == scored[-1].done == result.scores_computed
    cost = result_cost(kind, names, config, ["general"] if guard else [])
    assert cost.scores == started.scores
    # What has no decision in it is known to the last score.
    counts = {stage: sum(e.stage == stage for e in scored) for stage in ("analysis", "export")}
    assert counts == {
        "analysis": scores(cost)["analysis"],
        "export": scores(cost)["exported"],
    }
    repaired = sum(e.stage == "repair" for e in scored)
    assert repaired <= scores(cost)["repair"]


def result_cost(kind: str, names: list[str], config: HiMergeConfig, guards: list[str]) -> Cost:
    combiner = Combiner(read_adapters(tiny.peft_model(kind, 2), names))
    order = [layer.label for layer in combiner.in_order()]
    return estimate(combiner.table(), names, guards, config, order=order)


# ------------------------------------------------------------------------------------ from folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cost")
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    model.save_pretrained(
        root / "adapters", selected_adapters=["zh", "en"], save_embedding_layers=False
    )
    model.unload().save_pretrained(root / "base")
    (root / "base" / "model.safetensors").unlink()  # no weight is needed
    return root


def paths(root: Path) -> dict[str, Path]:
    return {name: root / "adapters" / name for name in ("zh", "en")}


def test_preview_of_folders_is_the_cost_of_the_merge(folders: Path) -> None:
    config = paper(**GIVEN)
    found = preview(folders / "base", paths(folders), config)
    assert (found.blocks, found.layers, found.zero) == (4, 5, ())
    assert found.cost == result_cost("llama", ["zh", "en"], config, [])
    assert preview(None, paths(folders), config).cost == found.cost


def test_preview_counts_blocks_that_no_adapter_changes(tmp_path: Path) -> None:
    specs = {
        name: {"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "seed": seed}
        for seed, name in enumerate(("zh", "en"))
    }
    model = tiny.add_adapters(tiny.tiny_llama(dtype=torch.float32), specs)
    model.save_pretrained(tmp_path / "adapters", selected_adapters=["zh", "en"])
    model.unload().save_pretrained(tmp_path / "base")
    adapters = {name: tmp_path / "adapters" / name for name in ("zh", "en")}
    config = paper(**GIVEN)
    whole, adapted = (preview(b, adapters, config) for b in (tmp_path / "base", None))
    assert (whole.blocks, adapted.blocks) == (4, 2)
    assert whole.cost.scores == adapted.cost.scores
    # Block 0 is the same in all states of a task, block 3 in none.
    assert whole.cost.naive_blocks == 2 * adapted.cost.naive_blocks


def test_preview_refuses_what_does_not_fit(folders: Path, tmp_path: Path) -> None:
    config = paper(**GIVEN)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        preview(tmp_path, paths(folders), config)
    settings = json.loads((folders / "base" / "config.json").read_text(encoding="utf-8"))
    small = tmp_path / "small"
    small.mkdir()
    text = json.dumps({**settings, "num_hidden_layers": 3})
    (small / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(AdapterError, match=r"no module 'model\.layers\.3"):
        preview(small, paths(folders), config)
    with pytest.raises(ConfigError, match="density is given for"):
        preview(None, paths(folders), paper(density={"zh": 1.0}, scale={"zh": 1.0}))


def test_preview_says_what_is_wrong_with_a_config(folders: Path, tmp_path: Path) -> None:
    config = paper(**GIVEN)
    settings = json.loads((folders / "base" / "config.json").read_text(encoding="utf-8"))
    base = tmp_path / "base"
    base.mkdir()

    def rewrite(**changes: Any) -> None:
        text = json.dumps({k: v for k, v in (settings | changes).items() if v is not None})
        (base / "config.json").write_text(text, encoding="utf-8")

    rewrite(architectures=None)  # then a causal LM, like the adapters of this repository
    assert preview(base, paths(folders), config) == preview(
        folders / "base", paths(folders), config
    )
    rewrite(model_type="no-such-model")
    with pytest.raises(ConfigError, match=r"config\.json of the base .*no-such-model"):
        preview(base, paths(folders), config)
    rewrite()

    def typed(**kinds: str) -> dict[str, Path]:
        made = {}
        for name, folder in paths(folders).items():
            made[name] = tmp_path / f"{name} {kinds[name]}"
            shutil.copytree(folder, made[name], dirs_exist_ok=True)
            file = made[name] / "adapter_config.json"
            told = json.loads(file.read_text(encoding="utf-8")) | {"task_type": kinds[name]}
            file.write_text(json.dumps(told), encoding="utf-8")
        return made

    fitting = preview(base, typed(zh="CAUSAL_LM", en="CAUSAL_LM"), config)
    assert fitting == preview(base, paths(folders), config)
    with pytest.raises(ConfigError, match=r"the base .*LlamaConfig"):
        preview(base, typed(zh="SEQ_2_SEQ_LM", en="SEQ_2_SEQ_LM"), config)
    with pytest.raises(AdapterError, match=r"different task types: \{'zh': 'CAUSAL_LM', 'en': "):
        preview(base, typed(zh="CAUSAL_LM", en="SEQ_CLS"), config)
    with pytest.raises(AdapterError, match=r"'CAUSAL' is not known. Allowed: .*CAUSAL_LM"):
        preview(base, typed(zh="CAUSAL", en="CAUSAL"), config)


def plan_command(root: Path, *more: object) -> Done:
    given = [f"--adapter={name}={path}" for name, path in paths(root).items()]
    return himerge("plan", *given, *more)


def test_plan_command_prints_every_step_and_writes_nothing(folders: Path) -> None:
    before = sorted(folders.rglob("*"))
    done = plan_command(folders, "--base", folders / "base", "--set", "density=0.4",
                        "--set", "scale=0.9", "--set", "accept=no_regression",
                        "--guard", "general")  # fmt: skip
    assert done.code == 0, done.stderr
    rows = {
        cells[0]: [int(cell) for cell in cells[1:]]
        for line in done.stdout.splitlines()
        if len(cells := line.replace("│", " ").replace("┃", " ").split()) == 4
        and cells[1].isdigit()
    }
    config = paper(**GIVEN, accept="no_regression")
    cost = result_cost("llama", ["zh", "en"], config, ["general"])
    assert rows == {
        **{s.name: [s.scores, s.naive_blocks, s.shared_blocks] for s in cost.steps},
        "total": [cost.scores, cost.naive_blocks, cost.shared_blocks],
    }
    assert "5 layers are judged; a full score runs 4 blocks" in done.stdout
    assert "focus" not in done.stdout
    assert sorted(folders.rglob("*")) == before


def test_plan_command_tells_what_the_focus_takes(folders: Path) -> None:
    done = plan_command(folders, "--set", "variant=focused")
    assert done.code == 0, done.stderr
    runs = 1 + USUAL["rounds"]  # the eval function, then each round on what it showed
    assert f"focus: it runs the model on each adapter's rows {runs} times before" in done.stdout


def test_plan_command_refuses_like_the_merge(folders: Path) -> None:
    done = plan_command(folders, "--set", "densty=0.5")
    assert done.code == 2
    assert "Did you mean 'density'" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_plan_command_says_which_adapter_has_no_effect(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "adapters", tmp_path / "adapters")
    file = tmp_path / "adapters" / "zh" / "adapter_model.safetensors"
    save_file({key: torch.zeros_like(value) for key, value in load_file(file).items()}, file)
    done = plan_command(tmp_path, "--set", "density=0.4", "--set", "scale=0.9")
    assert done.code == 0, done.stderr
    assert "adapter 'zh' has no effect: its task is a guard" in done.stdout
    assert "adapter 'en'" not in done.stdout
