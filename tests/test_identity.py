"""What a score depends on: equal digests for equal things, others for all that changes a score."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, PeftModel, get_peft_model
from snapshot import run_python

from peft_himerge.identity import adapter_digest, base_digest, environment, eval_digest


def digest(fn: Any) -> str:
    found = eval_digest(fn)
    assert found.unseen == ()
    return found.digest


# ----------------------------------------------------------------------------------------- weights


def test_base_digest_does_not_depend_on_the_adapters() -> None:
    one, three = tiny.peft_model("llama", 1), tiny.peft_model("llama", 3)
    assert base_digest(one) == base_digest(three)
    before = base_digest(three)
    three.set_adapter("en")
    with torch.no_grad():
        next(p for n, p in three.named_parameters() if "lora_A.en" in n).add_(1.0)
    three.delete_adapter("zh")
    assert base_digest(three) == before


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_base_digest_changes_with_any_weight(kind: str) -> None:
    model = tiny.peft_model(kind, 2, dtype=torch.float32)
    seen = {base_digest(model)}
    base = [(n, p) for n, p in model.base_model.model.named_parameters() if "lora_" not in n]
    with torch.no_grad():
        for count, (_, parameter) in enumerate(base, 1):
            place = (parameter.shape[0] - 1,) * 1 + (0,) * (parameter.ndim - 1)
            kept = parameter[place].clone()
            parameter[place] = torch.nextafter(kept, torch.tensor(9.0))
            seen.add(base_digest(model))
            assert len(seen) == count + 1
            parameter[place] = kept
    assert base_digest(model) in seen


@pytest.mark.parametrize("size", [1, 7, 8, 9, 2**15 * 2, 2**15 * 2 + 5, 2**15 * 6])
def test_a_checksum_sees_every_change_and_every_swap(size: int) -> None:
    from peft_himerge.identity import tensor_digest

    draw = torch.Generator().manual_seed(size)
    tensor = torch.randn(size, generator=draw)
    before = tensor_digest(tensor)
    assert tensor_digest(tensor.clone()) == before
    assert tensor_digest(tensor.reshape(1, -1)) != before
    assert tensor_digest(tensor.half()) != before
    padded = torch.cat([torch.zeros(1), tensor])[1:]  # starts in the middle of a word
    assert tensor_digest(padded) == before
    for place in {0, size // 2, size - 1}:
        other = tensor.clone()
        other[place] += 1.0
        assert tensor_digest(other) != before
    if size > 3:
        for step in {2, 2 * (size // 4)}:  # whole words change places
            assert tensor_digest(tensor.roll(step)) != before


def test_base_digest_changes_with_settings_that_change_the_forward() -> None:
    model = tiny.peft_model("llama", 1)
    before = base_digest(model)
    model.base_model.model.config.rms_norm_eps *= 2
    assert base_digest(model) != before
    model.base_model.model.config.rms_norm_eps /= 2
    model.base_model.model.config.use_cache = not model.base_model.model.config.use_cache
    model.base_model.model.config._name_or_path = "elsewhere"
    assert base_digest(model) == before


def test_base_digest_changes_with_the_dtype() -> None:
    wide, narrow = (tiny.peft_model("llama", 1, dtype=d) for d in (torch.float64, torch.float32))
    assert base_digest(wide) != base_digest(narrow)


def test_adapter_digest_sees_its_own_weights_and_scaling_alone() -> None:
    model = tiny.peft_model("qwen2", 2)  # has an adapted embedding
    zh, en = adapter_digest(model, "zh"), adapter_digest(model, "en")
    assert zh != en
    changed = 0
    for name, parameter in model.named_parameters():
        if ".en" in name:
            with torch.no_grad():
                parameter.view(-1)[-1] += 1.0
            assert adapter_digest(model, "en") != en
            en, changed = adapter_digest(model, "en"), changed + 1
    assert changed > 4
    layer = next(m for m in model.modules() if "en" in getattr(m, "scaling", {}))
    layer.scaling["en"] *= 2
    assert adapter_digest(model, "en") != en
    assert adapter_digest(model, "zh") == zh


def test_environment_names_versions_and_device() -> None:
    found = environment(tiny.peft_model("llama", 1))
    assert found["device"] == "cpu"
    assert found["torch"] == torch.__version__
    assert all(isinstance(value, str) for value in found.values())


# ---------------------------------------------------------------------------------- eval functions

LIMIT = 3


def over_data(rows: Any, scale: float = 1.0) -> Callable[[Any], float]:
    def fn(model: Any) -> float:
        return scale * len(rows)

    return fn


def with_default(model: Any, rows: tuple[int, ...] = (1, 2)) -> float:
    return float(sum(rows))


def with_global(model: Any) -> float:
    return float(LIMIT)


def helper(x: float) -> float:
    return x + 1


def with_helper(model: Any) -> float:
    return helper(1.0)


def recursive(rows: int) -> Callable[[Any], float]:
    def fn(model: Any) -> float:
        return fn(model) if rows < 0 else float(rows)

    return fn


def unbound(bound: bool) -> Callable[[Any], float]:
    if bound:
        rows = 3

    def fn(model: Any) -> float:
        return float(rows)

    return fn


@dataclass
class Scorer:
    rows: list[int]

    def __call__(self, model: Any) -> float:
        return self.total()

    def total(self) -> float:
        return float(sum(self.rows))


class Plain:
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def score(self, model: Any) -> float:
        return float(len(self.rows))


@dataclass(frozen=True)
class Row:
    text: str
    answer: int


@pytest.mark.parametrize(
    "make",
    [
        lambda: over_data([Row("a", 1), {"b": {1, 2}}, ("c", None, 0.1)]),
        lambda: over_data(torch.arange(6).reshape(2, 3)),
        lambda: over_data(np.arange(6.0)),
        lambda: over_data(Path("a/b")),
        lambda: with_default,
        lambda: with_global,
        lambda: with_helper,
        lambda: Scorer([1, 2]),
        lambda: Plain("abc").score,
        lambda: functools.partial(with_default, rows=(3, 4)),
        lambda: lambda model: 1.0,
        lambda: torch.no_grad()(with_default),
        lambda: over_data([torch.float32, torch.Size([2]), torch.device("cuda:1")]),
        lambda: over_data(compile("1 + 1", "rows", "eval")),
        lambda: recursive(2),
        lambda: tiny.eval_fns("llama", ["zh"])["zh"],
    ],
)
def test_equal_functions_have_equal_digests(make: Callable[[], Any]) -> None:
    assert digest(make()) == digest(make())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (over_data([1, 2]), over_data([1, 3])),
        (over_data([1, 2]), over_data((1, 2))),
        (over_data([1]), over_data([True])),
        (over_data([1]), over_data([1.0])),
        (over_data(0.1), over_data(0.1 + 1e-17 + 1e-16)),
        (over_data({"a": 1, "b": 2}), over_data({"a": 2, "b": 1})),
        (over_data([Row("a", 1)]), over_data([Row("a", 2)])),
        (over_data(torch.zeros(3)), over_data(torch.tensor([0.0, 0.0, 1e-30]))),
        (over_data(torch.zeros(3)), over_data(torch.zeros(3, dtype=torch.float64))),
        (over_data(np.zeros(3)), over_data(np.array([0.0, 1e-30, 0.0]))),
        (over_data([1], scale=1.0), over_data([1], scale=2.0)),
        (Scorer([1, 2]), Scorer([2, 1])),
        (Plain("abc").score, Plain("abd").score),
        (functools.partial(with_default, rows=(3,)), functools.partial(with_default, rows=(4,))),
        (lambda model: 1.0, lambda model: 2.0),
        (over_data(torch.float32), over_data(torch.float16)),
        (over_data(torch.device("cpu")), over_data(torch.device("meta"))),
        (over_data(torch.empty(2, device="meta")), over_data(torch.empty(3, device="meta"))),
        (over_data(compile("1 + 1", "rows", "eval")), over_data(compile("1 - x", "rows", "eval"))),
        (recursive(2), recursive(3)),
        (unbound(True), unbound(False)),
        (lambda model: model.a(), lambda model: model.b()),
    ],
)
def test_other_code_or_data_is_another_digest(one: Any, other: Any) -> None:
    assert digest(one) != digest(other)


def test_which_of_several_devices_it_is_does_not_matter() -> None:
    one, other = (over_data(torch.device("cuda", index)) for index in (0, 1))
    assert digest(one) == digest(other)


def test_a_fault_of_what_a_function_holds_is_not_taken_for_nothing() -> None:
    class Rows:
        @property
        def fingerprint(self) -> str:
            raise ValueError("the rows are gone")

    with pytest.raises(ValueError, match="the rows are gone"):
        digest(over_data(Rows()))


def test_base_digest_of_a_model_without_a_config_goes_by_its_class() -> None:
    class Net(torch.nn.Linear):
        pass

    def made(kind: type[torch.nn.Linear]) -> Any:
        base = torch.nn.Sequential(torch.nn.Linear(2, 2), kind(2, 2))
        for parameter in base.parameters():
            torch.nn.init.ones_(parameter)
        return get_peft_model(base, LoraConfig(target_modules=["0"]))

    assert base_digest(made(Net)) == base_digest(made(Net))
    assert base_digest(made(Net)) == base_digest(made(torch.nn.Linear))  # the top one's class


def test_digest_sees_globals_and_helpers_of_the_same_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = digest(with_global), digest(with_helper)
    monkeypatch.setitem(globals(), "LIMIT", 4)
    monkeypatch.setitem(globals(), "helper", lambda x: x + 2)
    assert digest(with_global) != before[0]
    assert digest(with_helper) != before[1]


def test_digest_sees_the_methods_a_callable_object_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(Scorer([1]))
    monkeypatch.setattr(Scorer, "total", lambda self: 0.0)
    assert digest(Scorer([1])) != before


class Opaque:
    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value


def test_what_cannot_be_seen_is_named_and_may_tell_its_fingerprint() -> None:
    one, other = eval_digest(over_data(Opaque(1))), eval_digest(over_data(Opaque(2)))
    assert one == other  # honest about it:
    assert one.unseen == (f"rows ({__name__}.Opaque)",)
    told = [Plain(Opaque(1)), Plain(Opaque(1))]
    for number, value in enumerate(told):
        value.fingerprint = f"version {number}"  # type: ignore[attr-defined]
    assert digest(over_data(told[0])) != digest(over_data(told[1]))


def test_a_functions_own_fingerprint_is_believed() -> None:
    one, other = over_data(Opaque(1)), over_data(Opaque(2))
    one.fingerprint = other.fingerprint = "rows v1"  # type: ignore[attr-defined]
    assert digest(one) == digest(other)
    other.fingerprint = "rows v2"  # type: ignore[attr-defined]
    assert digest(one) != digest(other)


def test_things_that_hold_themselves_are_read_once() -> None:
    rows: list[Any] = [1]
    rows.append(rows)
    again: list[Any] = [1]
    again.append(again)
    assert digest(over_data(rows)) == digest(over_data(again))
    assert digest(over_data(rows)) != digest(over_data([1, [1]]))


IN_ANOTHER_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import test_identity as t, tiny
fns = [t.over_data([t.Row("a", 1), {"b": {"x", "y", "z"}}]), t.with_helper, t.Scorer([1, 2]),
       tiny.eval_fns("llama", ["zh"])["zh"]]
print([t.digest(fn) for fn in fns], t.base_digest(tiny.peft_model("llama", 2)))
"""


def test_digests_are_the_same_in_another_process() -> None:
    here = Path(__file__).parent
    told = run_python(IN_ANOTHER_PROCESS, here, PYTHONHASHSEED="1", PYTHONWARNINGS="ignore")
    fns = [
        over_data([Row("a", 1), {"b": {"x", "y", "z"}}]),
        with_helper,
        Scorer([1, 2]),
        tiny.eval_fns("llama", ["zh"])["zh"],
    ]
    here_and_now = [digest(fn) for fn in fns]
    assert told.split("\n")[0] == f"{here_and_now} {base_digest(tiny.peft_model('llama', 2))}"


# --------------------------------------------------------------------------------------- offloaded


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_base_digest_reads_offloaded_weights(where: str, tmp_path: Path) -> None:
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    want = base_digest(model)
    offload(model, where, tmp_path)
    assert any(p.is_meta for p in model.parameters())
    assert base_digest(model) == want
    assert any(p.is_meta for p in model.parameters())


def offload(model: PeftModel, where: str, folder: Path) -> None:
    """Offload the weights inside the blocks, each module apart, as device_map does."""
    device = torch.device("cpu")
    for path, module in list(model.base_model.model.named_modules()):
        if ".layers." in path and "lora_" not in path and module._parameters:
            if where == "cpu":
                cpu_offload(module, execution_device=device)
            else:
                disk_offload(module, folder / path, execution_device=device)


def quantised(bits: int, scale: float) -> Any:
    """A model of one layer that bitsandbytes has quantised; codes do not depend on the scale."""
    library = pytest.importorskip("bitsandbytes")
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 64, generator=draw) * scale
    layer = (
        library.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
        if bits == 4
        else library.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    )
    layer.load_state_dict({"weight": weight})
    base = torch.nn.Sequential(layer).to("cpu")
    return get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize("bits", [4, 8])
def test_what_quantised_codes_stand_for_counts(bits: int) -> None:
    one, again, doubled = quantised(bits, 1.0), quantised(bits, 1.0), quantised(bits, 2.0)
    codes = [m.base_model.model[0].base_layer.weight.data for m in (one, doubled)]
    assert torch.equal(*codes)
    assert base_digest(one) == base_digest(again) != base_digest(doubled)
