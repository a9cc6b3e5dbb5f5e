"""Focused adapters, against RegMean's equation taken apart by hand in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from snapshot import moved, snapshot
from test_methods_inputs import (
    TRIO,
    Inputs,
    dense_of,
    inputs_of,
    regmean_parts,
    regmean_truth,
    relative_shares,
    token_rows,
)
from tiny import eval_fns, peft_model, tiny_model
from torch import Tensor

from peft_himerge import (
    HiMergeConfig,
    MergePlan,
    apply_plan,
    export,
    focus_adapters,
    merge_adapters,
    merge_adapters_hi,
    merge_folders,
    score_plans,
)
from peft_himerge.adapters import read_adapters
from peft_himerge.combine import Combiner
from peft_himerge.errors import AdapterError, ConfigError, PlanError
from peft_himerge.events import FocusStarted, MergeStarted
from peft_himerge.page import parse_report, render_page
from peft_himerge.plan import IDENTITY
from peft_himerge.recording import record

OFF, RIDGE = 0.8, 1e-4


def dense(model: Any, name: str) -> dict[str, Tensor]:
    combiner = Combiner(read_adapters(model, [name]))
    plan = combiner.plan({name: IDENTITY})
    return {m: combiner.delta(m, combiner.terms(plan, m)).double() for m in combiner.modules}


def foreign(changes: list[str]) -> list[str]:
    return [c for c in changes if "_focused" not in c and c != "adapters"]


PUBLISHED: dict[str, Any] = {"rounds": 1, "relative": False}
USUAL: dict[str, Any] = {"rounds": 2, "relative": True}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "qwen2"])
@pytest.mark.parametrize("options", [PUBLISHED, {}])
def test_focused_adapters_are_regmean_taken_apart(kind: str, options: dict[str, Any]) -> None:
    """As published, and, unless told otherwise, in two rounds with relative errors."""
    model = peft_model(kind, 3)
    plain = dense_of(model, kind)
    inputs: Inputs = inputs_of(kind, TRIO)
    before = snapshot(model)
    made = focus_adapters(model, TRIO, inputs, off_diagonal=OFF, ridge=RIDGE, **options)
    assert made == {name: f"{name}_focused" for name in TRIO}
    assert foreign(moved(before, snapshot(model))) == []
    fit: dict[str, Any] = {"off_diagonal": OFF, "ridge": RIDGE, **(options or USUAL)}
    merge_adapters(model, TRIO, "regmean", inputs=inputs, **fit)
    whole = dense(model, "merged")
    parts = {name: dense(model, new) for name, new in made.items()}
    merged, shares = None, {}
    if not options:
        shares = {m: relative_shares(plain, inputs, m, kind) for m in plain.modules}
        weights = {m: plain.plain.get_submodule(m).weight.detach() for m in plain.modules}
        merged = {
            f"{m}.weight": weight
            + regmean_truth(plain, token_rows(plain, inputs, m, kind), m, OFF, RIDGE)
            for m, weight in weights.items()
        }
    checked = 0
    for module, summed in whole.items():
        held = [part[module] for part in parts.values() if module in part]
        torch.testing.assert_close(torch.stack(held).sum(0), summed, rtol=1e-4, atol=1e-6)
        rows = token_rows(plain, inputs, module, kind, merged)
        truth = regmean_parts(plain, rows, module, OFF, RIDGE, shares.get(module))
        for name in TRIO:
            if module in parts[name]:
                lost = torch.linalg.vector_norm(parts[name][module] - truth[name])
                assert lost <= 1e-3 * torch.linalg.vector_norm(truth[name]), (module, name)
                checked += 1
    assert checked > 6
    for name, new in made.items():
        (source,), (part,) = read_adapters(model, [name]), read_adapters(model, [new])
        assert max(f.rank for f in part.factors.values()) <= max(
            f.rank for f in source.factors.values()
        )


def test_one_adapter_alone_keeps_what_its_inputs_reach() -> None:
    model = peft_model("llama", 1)
    name = next(iter(model.peft_config))
    inputs = inputs_of("llama", [name], 32)
    made = focus_adapters(model, [name], inputs)
    before, after = dense(model, name), dense(model, made[name])
    for module in before:
        torch.testing.assert_close(after[module], before[module], rtol=1e-4, atol=1e-6)


def test_focused_adapters_merge_like_any_others() -> None:
    model = peft_model("llama", 2)
    names = TRIO[:2] if set(TRIO[:2]) <= set(model.peft_config) else list(model.peft_config)[:2]
    made = focus_adapters(model, names, inputs_of("llama", names), suffix="-f")
    fns = {made[name]: fn for name, fn in eval_fns("llama", names).items()}
    config = HiMergeConfig(variant="joint", density=1.0, scale=1.0, max_export_drop=None)
    result = merge_adapters_hi(model, list(made.values()), fns, config=config)
    assert set(result.plan.adapters) == set(made.values())
    assert all(str(new).endswith("-f") for new in made.values())


def test_what_does_not_fit_is_refused_and_nothing_is_added() -> None:
    model = peft_model("llama", 2)
    names = sorted(model.peft_config)[:2]
    inputs = inputs_of("llama", names)
    before = snapshot(model)
    for wrong, text in (
        (({}, {}), "needs inputs"),
        (({names[0]: inputs[names[0]]}, {}), names[1]),
        ((inputs, {"suffix": ""}), "already"),
        ((inputs, {"off_diagonal": 2.0}), "off_diagonal"),
        ((inputs, {"lam": 2.0}), "lam"),
        ((inputs, {"rounds": 1}), "Give that or relative=False"),
    ):
        with pytest.raises(ConfigError, match=text):
            focus_adapters(model, names, wrong[0], **wrong[1])
    assert moved(before, snapshot(model)) == []


def test_a_failure_on_the_way_takes_all_new_adapters_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_himerge import export

    model = peft_model("llama", 2)
    names = sorted(model.peft_config)[:2]
    before, real = snapshot(model), export.add_adapter
    calls: list[str] = []

    def second_fails(model: Any, name: str, *rest: Any, **more: Any) -> int:
        calls.append(name)
        if len(calls) == 2:
            raise AdapterError("no")
        return real(model, name, *rest, **more)

    monkeypatch.setattr(export, "add_adapter", second_fails)
    with pytest.raises(AdapterError, match="no"):
        focus_adapters(model, names, inputs_of("llama", names))
    assert len(calls) == 2
    assert moved(before, snapshot(model)) == []


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_eval_functions_serve_as_inputs(kind: str) -> None:
    model, other = peft_model(kind, 3), peft_model(kind, 3)
    focus_adapters(model, TRIO, inputs_of(kind, TRIO, per=6))
    before = snapshot(other)
    focus_adapters(other, TRIO, eval_fns(kind, TRIO, 6))
    assert foreign(moved(before, snapshot(other))) == []
    for name in TRIO:
        one, two = dense(model, f"{name}_focused"), dense(other, f"{name}_focused")
        assert all(torch.equal(one[module], two[module]) for module in one)


def test_an_eval_function_is_overheard_however_it_calls_the_model() -> None:
    model = peft_model("llama", 1)
    inner = model.get_base_model()
    ids = torch.tensor([[0, 5, 6, 7], [3, 4, 8, 9]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])

    def fn(tried: Any) -> float:
        tried(input_ids=ids, attention_mask=mask, logits_to_keep=torch.tensor([2, 3]))
        tried.get_base_model()(ids, mask, labels=ids)
        told = {"input_ids": ids, "attention_mask": mask, "pad_token_id": 0}
        tried.generate(**told, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        return 0.0

    before = snapshot(model)
    plain, labelled, prompts = record(model, "x", fn)
    assert moved(before, snapshot(model)) == []
    assert "forward" not in vars(inner)
    assert set(plain) == {"input_ids", "attention_mask"}
    assert set(labelled) == {"input_ids", "attention_mask", "labels"}
    for batch in (plain, labelled, prompts):
        assert torch.equal(batch["input_ids"], ids)
        assert torch.equal(batch["attention_mask"], mask)


def test_what_is_overheard_comes_in_small_batches_and_is_a_copy() -> None:
    model = peft_model("llama", 1)
    ids = torch.arange(70 * 3).reshape(70, 3) % 50

    def fn(tried: Any) -> float:
        mine = ids.clone()
        tried(input_ids=mine)
        mine.zero_()
        return 0.0

    found = [batch["input_ids"] for batch in record(model, "x", fn)]
    assert [len(batch) for batch in found] == [32, 32, 6]
    assert torch.equal(torch.cat(found), ids)


def test_a_function_that_shows_the_model_nothing_is_refused() -> None:
    model = peft_model("llama", 3)
    before = snapshot(model)
    fns = {name: lambda tried: 1.0 for name in TRIO[:2]}
    with pytest.raises(ConfigError, match=r"the eval function of '.*' never called the model"):
        focus_adapters(model, TRIO[:2], fns)

    def broken(tried: Any) -> float:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        focus_adapters(model, TRIO[:2], {name: broken for name in TRIO[:2]})
    with pytest.raises(AdapterError, match="Adapter nobody does not exist"):
        focus_adapters(model, ["nobody"], {"nobody": fns[TRIO[0]]})
    assert moved(before, snapshot(model)) == []


@pytest.mark.parametrize("adapted", [False, True])
def test_logits_that_nobody_reads_are_left_out_unless_the_head_is_adapted(adapted: bool) -> None:
    model = tiny_model("llama")
    targets = ["q_proj", *(["lm_head"] if adapted else [])]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    peft = get_peft_model(model, config, "en")
    seen: list[tuple[int, bool]] = []
    inner = peft.get_base_model()
    inner.lm_head.register_forward_hook(
        lambda _m, args, _o: seen.append((args[0].shape[1], args[0].is_contiguous()))
    )
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])}
    focus_adapters(peft, ["en"], {"en": [batch]})
    # Of a slice that is not contiguous PyTorch would copy the head once per row.
    assert set(seen) == ({(5, True)} if adapted else {(1, True)})


RUNS = ("out", "again")
OPTIONS: dict[str, Any] = {"scale": {name: 0.5 + 0.25 * i for i, name in enumerate(TRIO)}}
OPTIONS |= {"density": dict.fromkeys(TRIO, 1.0), "max_export_drop": None}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_the_variant_is_joint_on_focused_adapters(kind: str, tmp_path: Path) -> None:
    model, other = peft_model(kind, 3), peft_model(kind, 3)
    fns = eval_fns(kind, TRIO, 6)
    before = snapshot(model)
    config = HiMergeConfig(variant="focused", **OPTIONS)
    heard: list[object] = []
    result = merge_adapters_hi(model, TRIO, fns, config=config, callbacks=[heard.append])
    assert moved(before, snapshot(model, but="merged")) == []
    assert heard[0] == FocusStarted(tuple(TRIO))
    assert isinstance(heard[1], MergeStarted)
    assert set(result.plan.adapters) == set(result.scores["merged"]) == set(TRIO)

    made = focus_adapters(other, TRIO, fns)
    named = {
        key: {made[name]: one for name, one in value.items()} if isinstance(value, dict) else value
        for key, value in OPTIONS.items()
    }
    want = merge_adapters_hi(
        other,
        list(made.values()),
        {made[name]: fn for name, fn in fns.items()},
        config=HiMergeConfig(variant="joint", **named),
    )
    assert result.states["merged"].keys() == {name for name in made}
    for state, row in want.scores.items():
        if state not in made.values():
            assert {made[task]: value for task, value in result.scores[state].items()} == row
    # Alone are the adapters that the user has, as PEFT runs them.
    for name in TRIO:
        other.set_adapter(name)
        with torch.no_grad():
            alone = {task: float(fn(other).double().mean()) for task, fn in fns.items()}
        assert result.scores[name] == pytest.approx(alone, abs=1e-12)
        assert result.scores[name] != pytest.approx(want.scores[made[name]], abs=1e-6)
    for module in (m.module for m in want.modules):
        assert torch.equal(result.delta(module), want.delta(module))

    # The plan is replayed on this model, and in another one from the folders beside it.
    again = apply_plan(model, result.plan, adapter_name="again")
    assert again.options["focus"]
    again.save(tmp_path / "again", page=False)
    shown = render_page(parse_report(result.to_dict()))
    assert f"{' + '.join(TRIO)}, each focused on its own task's inputs, merged into" in shown
    assert "gamma is c of the focused adapter alone minus c after merging" in shown
    plans: dict[str, MergePlan | str] = {"it": result.plan, **{name: name for name in TRIO}}
    scored = score_plans(model, TRIO, plans, fns)
    assert {t: s.value for t, s in scored["it"].items()} == result.scores["merged"]
    for name in TRIO:
        assert {t: s.value for t, s in scored[name].items()} == result.scores[name]
    with pytest.raises(AdapterError, match="Adapter nobody does not exist"):
        score_plans(model, TRIO, {"it": "nobody"}, fns)
    saved = snapshot(model)
    result.save(tmp_path / "out", page=False)
    assert moved(saved, snapshot(model)) == []
    fresh = peft_model(kind, 3)
    with pytest.raises(PlanError, match="folder 'focused' beside the plan"):
        apply_plan(fresh, result.plan)
    for name in TRIO:
        export.remove_adapter(fresh, name)
        fresh.load_adapter(str(tmp_path / "out" / "focused" / name), name)
    later = apply_plan(fresh, MergePlan.from_json(tmp_path / "out" / "plan.json"))
    merged = merge_folders(
        {name: tmp_path / "out" / "focused" / name for name in TRIO},
        tmp_path / "offline",
        plan=result.plan,
    )
    assert merged.rank == later.rank
    for name in TRIO:
        of = [tmp_path / run / "focused" / name / "adapter_model.safetensors" for run in RUNS]
        assert of[0].read_bytes() == of[1].read_bytes()
    for module in (m.module for m in want.modules):
        assert torch.equal(again.delta(module), result.delta(module))
        assert torch.equal(later.delta(module), result.delta(module))


def test_focusing_is_the_same_however_often_it_is_done() -> None:
    model, config = peft_model("llama", 3), HiMergeConfig(variant="focused", **OPTIONS)
    one = merge_adapters_hi(model, TRIO, eval_fns("llama", TRIO, 6), config=config)
    two = merge_adapters_hi(
        model, TRIO, eval_fns("llama", TRIO, 6), config=config, adapter_name="two"
    )
    assert one.plan == two.plan
    other = merge_adapters_hi(
        model, TRIO, eval_fns("llama", TRIO, 5), config=config, adapter_name="other"
    )
    assert other.plan.sources != two.plan.sources
    with pytest.raises(PlanError, match="are not those the plan was made for"):
        apply_plan(model, two.plan, adapter_name="late")


def test_one_adapter_has_nobody_to_make_way_for() -> None:
    model, name = peft_model("llama", 3), TRIO[0]
    heard: list[object] = []
    fns = eval_fns("llama", [name], 6)
    config = HiMergeConfig(max_export_drop=None)
    result = merge_adapters_hi(model, [name], fns, config=config, callbacks=[heard.append])
    assert isinstance(heard[0], MergeStarted)
    assert not result.options["focus"]
    scale = result.plan.adapters[name].scale
    for module, delta in dense(model, name).items():
        torch.testing.assert_close(result.delta(module).double(), scale * delta)


@pytest.mark.filterwarnings("ignore:adapter '.*' changes nothing")
def test_an_adapter_without_effect_makes_nobody_focus() -> None:
    model, fns = peft_model("llama", 3), eval_fns("llama", TRIO, 6)
    silence(model, TRIO[0])
    config, heard = HiMergeConfig(max_export_drop=None), list[object]()
    result = merge_adapters_hi(model, TRIO, fns, config=config, callbacks=[heard.append])
    assert heard[0] == FocusStarted(tuple(TRIO[1:]))
    assert result.scores[TRIO[0]] == result.scores["base"]
    pair = merge_adapters_hi(model, TRIO[1:], fns, adapter_name="pair", config=config)
    assert {n: pair.plan.sources[n] for n in TRIO[1:]} == {
        n: result.plan.sources[n] for n in TRIO[1:]
    }
    silence(model, TRIO[1])
    heard.clear()
    merge_adapters_hi(model, TRIO, fns, adapter_name="one", config=config, callbacks=[heard.append])
    assert isinstance(heard[0], MergeStarted)


def silence(model: Any, name: str) -> None:
    for key, parameter in model.named_parameters():
        if f"lora_B.{name}." in key or f"lora_embedding_B.{name}" in key:
            parameter.data.zero_()


def test_without_a_look_at_inputs_nothing_is_focused(tmp_path: Path) -> None:
    model = peft_model("llama", 3)
    before = snapshot(model)
    config = HiMergeConfig(variant="focused", scale=1.0)
    with pytest.raises(ConfigError, match="never called the model"):
        merge_adapters_hi(model, TRIO, {n: lambda tried: 1.0 for n in TRIO}, config=config)
    assert moved(before, snapshot(model)) == []
    folders = {}
    for name in TRIO:
        export.write_adapter(model, name, make(tmp_path / name))
        folders[name] = tmp_path / name
    with pytest.raises(ConfigError, match="nothing can be focused or searched"):
        merge_folders(folders, tmp_path / "out", config=config)
    assert not (tmp_path / "out").exists()


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder
