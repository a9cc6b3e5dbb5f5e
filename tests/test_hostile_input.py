"""Input from strangers: one clear error of ours, bounded, and model and disk as they were."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import himerge
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from snapshot import moved, snapshot
from torch.utils._python_dispatch import TorchDispatchMode

from peft_himerge import (
    HiMergeConfig,
    MergePlan,
    add_weighted_adapter,
    merge_adapters,
    merge_adapters_hi,
    merge_folders,
)
from peft_himerge.card import licences_of
from peft_himerge.errors import AdapterError, ConfigError, HiMergeError, JournalError, PlanError
from peft_himerge.evals import load_rows
from peft_himerge.folders import hold_adapters, read_folder
from peft_himerge.guests import guests
from peft_himerge.journal import Journal
from peft_himerge.json_file import parse_json, read_object
from peft_himerge.layers import group_modules
from peft_himerge.page import parse_report, read_report, render_page
from peft_himerge.patterns import FirstMatch, pattern_fault
from peft_himerge.portable import check_adapter
from peft_himerge.probe import preserved
from peft_himerge.recipe import read_recipe
from peft_himerge.vetting import check_folder
from peft_himerge.yaml_file import parse_yaml

NAMES = ["zh", "en"]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NUMBERS = HiMergeConfig(density=0.5, scale=0.9)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    model.save_pretrained(root, selected_adapters=NAMES, save_embedding_layers=False)
    return root


@pytest.fixture
def pair(source: Path, tmp_path: Path) -> dict[str, Path]:
    """Two sound adapters; a test harms the first."""
    shutil.copytree(source, tmp_path / "in")
    return {name: tmp_path / "in" / name for name in NAMES}


def disk(root: Path) -> dict[str, Any]:
    """Return every path below `root` with what it holds."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path)] = path.readlink()
        else:
            found[str(path)] = path.read_bytes() if path.is_file() else path.stat().st_mode
    return found


def refusal(call: Callable[[], object]) -> str | None:
    """Return the text of our error, None if there was none; any other error ends the test."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a stated warning is fine, and tested for apart
            call()
    except HiMergeError as exc:
        text = str(exc)
        assert text
        assert len(text) < 2500
        return text
    return None


def entries(pair: dict[str, Path]) -> dict[str, Callable[[], object]]:
    """Return every way into the library for a folder."""
    out = pair["zh"].parents[1] / "out"
    return {
        "merge": lambda: merge_folders(pair, out, config=NUMBERS),
        "check": lambda: check_adapter(pair["zh"]),
        "live": lambda: hold_adapters(tiny.tiny_llama(), pair),
    }


def refused(pair: dict[str, Path], ways: tuple[str, ...] = ("merge", "live")) -> dict[str, str]:
    """Return entry -> error; whatever is refused changes nothing, whatever is not works."""
    root = pair["zh"].parents[1]
    texts = {}
    for name, call in entries(pair).items():
        if name not in ways:
            continue
        before = disk(root)
        text = refusal(call)
        if text is not None:
            assert disk(root) == before
            texts[name] = text
        shutil.rmtree(root / "out", ignore_errors=True)
    return texts


# ------------------------------------------------------------------------------ safetensors files


def parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def packed(head: Any, body: bytes, size: int | None = None) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def lying(**facts: Any) -> Callable[[bytes], bytes]:
    """Return what makes the first tensor's header say something else."""

    def harm(raw: bytes) -> bytes:
        head, body = parts(raw)
        first = next(key for key in head if key != "__metadata__")
        said = {k: v(head[first]) if callable(v) else v for k, v in facts.items()}
        return packed({**head, first: {**head[first], **said}}, body)

    return harm


def wider(times: int) -> Callable[[dict[str, Any]], list[int]]:
    return lambda entry: [entry["shape"][0] * times, *entry["shape"][1:]]


def twice(raw: bytes) -> bytes:
    head, body = parts(raw)
    first = next(key for key in head if key != "__metadata__")
    doubled = json.dumps({first: head[first]})[:-1] + ", " + json.dumps(head)[1:]
    return packed(doubled.encode(), body)


def overlapping(raw: bytes) -> bytes:
    head, body = parts(raw)
    one, other = [key for key in head if key != "__metadata__"][:2]
    return packed({**head, one: {**head[one], "data_offsets": head[other]["data_offsets"]}}, body)


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "no bytes": lambda raw: b"",
    "five bytes": lambda raw: raw[:5],
    "header alone": lambda raw: packed(parts(raw)[0], b""),
    "cut": lambda raw: raw[:-7],
    "longer": lambda raw: raw + b"123",
    "endless header": lambda raw: packed(*parts(raw), size=2**63),
    "header of 101 MB": lambda raw: packed(*parts(raw), size=101 << 20),
    "no header": lambda raw: packed(*parts(raw), size=0),
    "header is no JSON": lambda raw: packed(b"{" * 100, parts(raw)[1]),
    "header is a list": lambda raw: packed(b"[]", parts(raw)[1]),
    "header is no UTF-8": lambda raw: packed(b"\xff\xfe{}", parts(raw)[1]),
    "header is deep": lambda raw: packed(b'{"a":' * 5000 + b"1" + b"}" * 5000, parts(raw)[1]),
    "key twice": twice,
    "unknown type": lying(dtype="F31"),
    "type too wide": lying(dtype="F64"),
    "integers": lying(dtype="I32"),
    "complex": lying(dtype="C64", shape=lambda e: [e["shape"][0], e["shape"][1] // 2]),
    "bool": lying(dtype="BOOL", shape=wider(4)),
    "8 bits": lying(dtype="F8_E4M3", shape=wider(4)),
    "4 bits": lying(dtype="F4", shape=wider(8)),
    "negative shape": lying(shape=[-1, 3]),
    "huge shape": lying(shape=[2**62, 2**62]),
    "other shape": lying(shape=lambda e: e["shape"][::-1]),
    "one axis": lying(shape=lambda e: [e["shape"][0] * e["shape"][1]]),
    "no axis": lying(shape=[]),
    "overlap": overlapping,
    "out of the file": lying(data_offsets=[0, 10**12]),
    "backwards": lying(data_offsets=lambda e: e["data_offsets"][::-1]),
    "metadata of numbers": lambda raw: packed(
        {**parts(raw)[0], "__metadata__": {"a": 1}}, parts(raw)[1]
    ),
}


@pytest.mark.parametrize("harm", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_everywhere_with_its_adapter(
    harm: Callable[[bytes], bytes], pair: dict[str, Path]
) -> None:
    path = pair["zh"] / WEIGHTS
    path.write_bytes(harm(path.read_bytes()))
    texts = refused(pair)
    assert set(texts) == {"merge", "live"}
    assert all("'zh'" in text for text in texts.values())
    check_adapter(pair["zh"])  # its findings say what other engines would: no error


@given(data=st.data())
def test_a_flipped_bit_is_refused_or_merged_and_never_breaks(
    data: st.DataObject, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("flipped")
    shutil.copytree(source, root / "in")
    pair = {name: root / "in" / name for name in NAMES}
    path = pair["zh"] / WEIGHTS
    raw = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", raw[:8])
    end = data.draw(st.sampled_from([8 + size, len(raw)]))  # the header is the delicate part
    place = data.draw(st.integers(0, end - 1))
    raw[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), place]))])
    refused(pair, ("merge", "check", "live"))


def test_a_renamed_module_has_no_place_in_the_model(pair: dict[str, Path]) -> None:
    path = pair["zh"] / WEIGHTS
    tensors = {key.replace("layers.2.", "layers.7."): t for key, t in load_file(path).items()}
    save_file(tensors, path)
    base = tiny.tiny_llama()
    before = [(name, id(module)) for name, module in base.named_modules()]
    flags = [weight.requires_grad for weight in base.parameters()]
    text = refusal(lambda: hold_adapters(base, pair))
    assert text is not None
    assert re.search(r"'zh'.*no place.*layers\.7", text)
    assert [(name, id(module)) for name, module in base.named_modules()] == before
    assert [weight.requires_grad for weight in base.parameters()] == flags


def test_a_guest_that_is_refused_leaves_the_model_as_it_was(pair: dict[str, Path]) -> None:
    model = tiny.peft_model("llama", 1, dtype=torch.float32)
    before = snapshot(model)
    broken = pair["zh"] / WEIGHTS
    save_file({key: t.mT.contiguous() for key, t in load_file(broken).items()}, broken)
    with pytest.raises(AdapterError, match="'two'"), preserved(model):
        with guests(model, {"one": pair["en"], "two": pair["zh"]}):
            raise AssertionError("never reached")
    assert moved(before, snapshot(model)) == []


# ------------------------------------------------------------------------------------------ config


def configure(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **fields}), encoding="utf-8")


def texts_of_json() -> dict[str, Callable[[bytes], bytes]]:
    return {
        "empty": lambda raw: b"",
        "no UTF-8": lambda raw: b"\xff" + raw,
        "byte order mark": lambda raw: b"\xef\xbb\xbf" + raw,
        "UTF-16": lambda raw: raw.decode().encode("utf-16"),
        "a list": lambda raw: b"[]",
        "null": lambda raw: b"null",
        "deep": lambda raw: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "rather deep": lambda raw: b'{"a":' * 300 + b"1" + b"}" * 300,
        "key twice": lambda raw: b'{"r": 3, ' + raw.strip()[1:],
        "17 MB": lambda raw: b'{"x": "' + b"a" * (17 << 20) + b'"}',
        "zeros": lambda raw: b"\0" * 100,
        "10,000 digits": lambda raw: b'{"r": ' + b"9" * 10_000 + b"}",
    }


@pytest.mark.parametrize("harm", texts_of_json().values(), ids=texts_of_json())
def test_a_config_that_is_no_plain_object_is_refused_everywhere(
    harm: Callable[[bytes], bytes], pair: dict[str, Path]
) -> None:
    path = pair["zh"] / CONFIG
    path.write_bytes(harm(path.read_bytes()))
    texts = refused(pair)
    assert set(texts) == {"merge", "live"}
    assert all("'zh'" in text and CONFIG in text for text in texts.values())
    (finding,) = check_adapter(pair["zh"]).findings
    assert (finding.rule, finding.severity) == ("config", "error")


WRONG = [
    *(("r", v) for v in (None, True, 0, -1, 1.5, "3", [3], 10**400, float("nan"))),
    *(("lora_alpha", v) for v in (None, True, 0, -1, "3", 10**400, float("inf"), float("nan"))),
    *(("rank_pattern", v) for v in ([1], {"q_proj": "3"}, {"q_proj": 0}, {"(": 3}, "x")),
    *(("alpha_pattern", v) for v in ([1], {"q_proj": "3"}, {"q_proj": float("nan")}, {"[": 3})),
    *(("target_modules", v) for v in (3, {"a": 1}, [1], [["q_proj"]], "(")),
    *(("exclude_modules", v) for v in (True, [None], "(a+)+$")),
    *(("layers_to_transform", v) for v in ("x", [1.5], [[1]], True)),
    *(("use_rslora", v) for v in ("yes", 1.0, [])),
    *(("task_type", v) for v in (3, ["CAUSAL_LM"])),
    *(("base_model_name_or_path", v) for v in (3, ["x"], {})),
    *(("peft_type", v) for v in (None, 3, [], {}, "LOHA", "LORA ", "x" * 5000)),
    *(("bias", v) for v in ("all", 3, ["none"])),
    *(("init_lora_weights", v) for v in (3, ["x"], "pissa_niter_4", "loftq")),
    *(("auto_mapping", v) for v in (3, [1], {"parent_library": 3})),
    *(("modules_to_save", v) for v in (3, "score", [3])),
    *(("fresh_idea_of_2027", v) for v in (True, {"a": [1]}, "x" * 100_000)),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_field_of_the_wrong_type_is_named(field: str, value: Any, pair: dict[str, Path]) -> None:
    configure(pair["zh"], **{field: value})
    texts = refused(pair)
    assert set(texts) == {"merge", "live"}
    assert all("'zh'" in text for text in texts.values())
    assert all(field in text or f" {value}," in text for text in texts.values())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(data=st.data(), value=JSON)
@settings(max_examples=40)
def test_any_value_in_any_field_is_refused_or_merged(
    data: st.DataObject, value: Any, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("config")
    shutil.copytree(source, root / "in")
    pair = {name: root / "in" / name for name in NAMES}
    fields = json.loads((pair["zh"] / CONFIG).read_text("utf-8"))
    field = data.draw(st.sampled_from([*fields, "new_field"]))
    if data.draw(st.booleans()):
        configure(pair["zh"], **{field: value})
    else:
        fields.pop(field, None)
        (pair["zh"] / CONFIG).write_text(json.dumps(fields), encoding="utf-8")
    refused(pair, ("merge", "check"))
    refusal(lambda: check_folder("zh", pair["zh"]))


def test_nothing_that_a_config_names_is_imported(
    pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    configure(pair["zh"], megatron_config={"a": 1}, megatron_core="evil_module")
    texts = refused(pair)
    assert set(texts) == {"merge", "live"}
    assert all("megatron_config" in text for text in texts.values())
    with pytest.raises(AdapterError, match="megatron_config"):
        with guests(tiny.peft_model("llama", 1), {"b": pair["zh"]}):
            raise AssertionError("never reached")
    assert not (tmp_path / "ran").exists()
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize(
    ("pattern", "fine"),
    [
        ("q_proj", True),
        (r"model\.layers\.(1|2)\..*(q_proj|v_proj)", True),
        (r"^(?!.*visual).*(?:q_proj|v_proj)", True),
        # As a popular fine-tuning library writes it.
        (r"(?:.*?(?:text).*?(?:attn|mlp).*?(?:k_proj|o_proj).*?)|(?:\bx\.[\d]{1,}\.y)", True),
        ("(a+)+$", False),
        ("(a|a)*b", False),
        ("(.*)*", False),
        ("(?:a{1,30}){1,30}b", False),
        (".*" * 20 + "x", False),
        ("(", False),
        ("a" * 100_000 + "?", False),
        ("a{99999999999999999999}", False),
    ],
)  # fmt: skip
def test_a_pattern_that_might_never_end_is_refused(
    pattern: str, fine: bool, pair: dict[str, Path]
) -> None:
    assert (pattern_fault(pattern, 60) is None) == fine
    if not fine:
        configure(pair["zh"], rank_pattern={pattern: 3})
        texts = refused(pair)
        assert set(texts) == {"merge", "live"}
        assert all("rank_pattern" in text for text in texts.values())
        assert not check_adapter(pair["zh"]).ok


WORD = st.text(st.sampled_from("ab1_"), min_size=1, max_size=3)
PATH = st.lists(WORD, min_size=1, max_size=4).map(".".join)


@given(
    patterns=st.lists(PATH | st.sampled_from(["a.*b", "^a", "a|b", "[ab]", r"a\.b", ".*"])),
    modules=st.lists(PATH, min_size=1),
)
@settings(max_examples=200)
def test_the_first_match_is_that_of_peft(patterns: list[str], modules: list[str]) -> None:
    first = FirstMatch(patterns)
    for module in [*modules, *(f"x.{p}" for p in patterns if "." in p)]:
        # PEFT gives the module itself where no pattern matches.
        assert (first.find(module) or module) == get_pattern_key(patterns, module)


@given(value=JSON)
def test_json_that_is_read_is_what_was_written(value: Any) -> None:
    text = json.dumps(value)
    assert repr(parse_json(text)) == repr(json.loads(text))


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: reading it would fill the memory
    with pytest.raises(ConfigError, match=r"large\.json' has 1099511627776 bytes"):
        read_object(path)


# ------------------------------------------------------------------------- files that are none


def opened_by_pickle(target: Path) -> bytes:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (target,))

    return pickle.dumps(Evil())


def test_pickle_is_refused_unopened(pair: dict[str, Path], tmp_path: Path) -> None:
    (pair["zh"] / WEIGHTS).unlink()
    (pair["zh"] / "adapter_model.bin").write_bytes(opened_by_pickle(tmp_path / "ran"))
    texts = refused(pair)
    assert set(texts) == {"merge", "live"}
    assert all("Pickle" in text for text in texts.values())
    with pytest.raises(AdapterError, match="Pickle"):
        with guests(tiny.peft_model("llama", 1), {"b": pair["zh"]}):
            raise AssertionError("never reached")
    (finding,) = check_adapter(pair["zh"]).findings
    assert "adapter_model.bin" in finding.found
    (pair["zh"] / WEIGHTS).write_bytes(opened_by_pickle(tmp_path / "ran"))  # in disguise
    assert set(refused(pair)) == {"merge", "live"}
    assert not (tmp_path / "ran").exists()


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def itself(path: Path) -> None:
    path.symlink_to(path)


def folder_instead(path: Path) -> None:
    path.mkdir()


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes of POSIX")
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("make", [device, pipe, itself, folder_instead])
def test_what_is_no_file_is_never_opened(
    make: Callable[[Path], None], name: str, pair: dict[str, Path]
) -> None:
    (pair["zh"] / name).unlink()
    make(pair["zh"] / name)
    for text in (refusal(call) for key, call in entries(pair).items() if key != "check"):
        assert f"has no {name}" in str(text)
    (finding,) = check_adapter(pair["zh"]).findings
    assert finding.rule == "layout"


@pytest.mark.skipif(sys.platform == "win32", reason="links of POSIX")
def test_links_are_read_through_and_never_written_through(
    pair: dict[str, Path], tmp_path: Path
) -> None:
    blob = tmp_path / "blob"  # as in the hub's cache
    (pair["zh"] / WEIGHTS).rename(blob)
    (pair["zh"] / WEIGHTS).symlink_to(blob)
    out, victim = tmp_path / "out", tmp_path / "victim"
    out.mkdir()
    victim.write_text("precious", encoding="utf-8")
    for name in (CONFIG, WEIGHTS, "README.md", "report.json"):
        (out / name).symlink_to(victim)
    merge_folders(pair, out, config=NUMBERS)
    assert victim.read_text(encoding="utf-8") == "precious"
    assert not (out / WEIGHTS).is_symlink()
    (tmp_path / "alias").symlink_to(pair["zh"], target_is_directory=True)
    with pytest.raises(ConfigError, match="folder of adapter 'zh'"):
        merge_folders(pair, tmp_path / "alias", config=NUMBERS)


def test_a_hostile_card_is_no_licence(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)
    )
    texts = {
        "bomb": f"---\n{bomb}license: *a39\n---\n",
        "control": '---\nlicense: "a\\u001b[31m"\n---\n',
        "table": "---\nlicense: {a: 1}\n---\n",
        "deep": "---\nlicense: " + "[" * 3000 + "\n---\n",
    }
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(text, encoding="utf-8")
    os.mkfifo(tmp_path / "README.md")
    found = licences_of({name: tmp_path / name for name in texts}, texts)
    assert found == dict.fromkeys(texts, "unknown (its model card cannot be read)")
    assert licences_of({"pipe": tmp_path}, {"pipe"}) == {}  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ values


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / WEIGHTS
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_one_bad_entry_is_named_with_adapter_module_factor_and_place(
    value: float, factor: str, pair: dict[str, Path]
) -> None:
    module = "model.layers.2.self_attn.v_proj"
    key = f"base_model.model.{module}.lora_{factor}.weight"
    rewrite(pair["zh"], lambda t: t[key].__setitem__((1, 2), value))
    for text in refused(pair).values():
        for part in ("'zh'", f"'{module}'", f"{factor}", "NaN or infinity", "[1, 2]", "1 of"):
            assert part in text
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    with torch.no_grad():
        held = model.base_model.model.get_submodule(module)
        getattr(held, f"lora_{factor}")["zh"].weight[1, 2] = value
    before = snapshot(model)
    calls: list[Callable[[], object]] = [
        lambda: merge_adapters_hi(model, NAMES, tiny.eval_fns("llama", NAMES)),
        lambda: add_weighted_adapter(model, NAMES, [1.0, 1.0], "new", "ties", density=0.5),
        lambda: merge_adapters(model, NAMES, "cat"),
    ]
    for call in calls:
        with pytest.raises(AdapterError, match=rf"'zh', module '{module}': {factor} .*\[1, 2\]"):
            call()
        assert moved(before, snapshot(model)) == []


def test_entries_that_overflow_are_refused(pair: dict[str, Path]) -> None:
    rewrite(pair["zh"], lambda t: [v.mul_(1e20) for v in t.values()])
    assert "may be as large as" in refused(pair, ("merge",))["merge"]
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    layer.scaling["zh"] = 1e30
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"'zh'.*v_proj.*may be as large as"):
        merge_adapters(model, NAMES, "cat")
    assert moved(before, snapshot(model)) == []


def test_an_adapter_without_effect_is_warned_about_everywhere(pair: dict[str, Path]) -> None:
    rewrite(pair["zh"], lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k])
    out = pair["zh"].parents[1] / "out"
    with pytest.warns(UserWarning, match="'zh' changes nothing"):
        done = merge_folders(pair, out, config=HiMergeConfig(density=1.0, scale=1.0))
    want = read_folder("en", pair["en"])
    for module, factors in read_folder("out", out).factors.items():
        delta = sum(block for _, block in factors.blocks()) if module not in want.factors else None
        if delta is None:
            got = torch.cat([block for _, block in factors.blocks()])
            source = torch.cat([block for _, block in want.factors[module].blocks()])
            torch.testing.assert_close(got, source, rtol=1e-5, atol=1e-6)
    assert done.plan.adapters["zh"].drops


# ------------------------------------------------------------------------------------------- names


def write_adapter(
    folder: Path,
    modules: list[str],
    rank: int = 2,
    shape: tuple[int, int] = (4, 3),
    **fields: Any,
) -> Path:
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(len(str(folder)))
    tensors = {}
    for module in modules:
        stem = f"base_model.model.{module}.lora_"
        tensors[f"{stem}A.weight"] = torch.randn(rank, shape[1], generator=draw)
        tensors[f"{stem}B.weight"] = torch.randn(shape[0], rank, generator=draw)
    save_file(tensors, folder / WEIGHTS)
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "target_modules": ["q_proj"]}
    (folder / CONFIG).write_text(json.dumps(told | fields), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("module", "fine"),
    [
        ("../../etc/passwd", False),
        ("a..b", False),
        (".a", False),
        ("a\nb.c", False),
        ("a\u202eb.c", False),
        ("a\x1b[31mb", False),
        ("módel.láyers.0.q_프로", True),
        ("m" * 5000, True),
        (".".join("ab" * 500), True),
        ("model." + "9" * 5000 + ".q", True),
        ("model.².q", True),
        ("<script>alert(1)</script>.q", True),
        ("[red]x[/red].q|y", True),
    ],
)
def test_a_module_name_is_refused_or_carried_over_as_it_is(
    module: str, fine: bool, tmp_path: Path
) -> None:
    folders = {name: write_adapter(tmp_path / "in" / name, [module]) for name in NAMES}
    text = refusal(lambda: merge_folders(folders, tmp_path / "out", config=NUMBERS))
    assert (text is None) == fine
    assert {p.name for p in tmp_path.iterdir()} == ({"in", "out"} if fine else {"in"})
    if fine:
        assert list(read_folder("out", tmp_path / "out").factors) == [module]
        assert "<script>alert" not in (tmp_path / "out" / "report.html").read_text("utf-8")
        assert render_page(read_report(tmp_path / "out"))


BAD_NAMES = ["", ".", "..", "a.b", "../../x", "a/b", "a\\b", "/abs", "a\nb", "a\0b", "x" * 201]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_would_be_a_path_is_refused_everywhere(
    name: str, pair: dict[str, Path], tmp_path: Path
) -> None:
    before = disk(tmp_path)
    calls: list[Callable[[], object]] = [
        lambda: merge_folders({name: pair["zh"]}, tmp_path / "out", config=NUMBERS),
        lambda: merge_folders(pair, tmp_path / "out", config=NUMBERS, adapter_name=name),
        lambda: hold_adapters(tiny.tiny_llama(), {name: pair["zh"]}),
        lambda: merge_adapters(tiny.peft_model("llama", 2), NAMES, "cat", adapter_name=name),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="without dots, slashes and control characters"):
            call()
    assert disk(tmp_path) == before


@pytest.mark.parametrize("base", ["../../etc", "<x>", "a\nb: c", "---\n", "x" * 5000, "\u202e"])
def test_a_base_model_s_name_is_never_opened_nor_run(
    base: str, pair: dict[str, Path], tmp_path: Path
) -> None:
    for folder in pair.values():
        configure(folder, base_model_name_or_path=base, revision="../x")
    merge_folders(pair, tmp_path / "out", config=NUMBERS)
    fields = json.loads((tmp_path / "out" / CONFIG).read_text("utf-8"))
    assert fields["base_model_name_or_path"] == base
    head = (tmp_path / "out" / "README.md").read_text("utf-8").split("---")[1]
    assert "base_model:" not in head or base == "<x>"
    hold_adapters(tiny.tiny_llama(), pair)


def test_modules_are_in_the_order_of_their_numbers_whatever_their_length() -> None:
    numbers = ["10", "9", "2", "0", "007", "1" + "0" * 5000]
    labels = [group.label for group in group_modules(f"h.{n}.q" for n in numbers)]
    assert labels == [f"h.{n}" for n in ("0", "2", "007", "9", "10", "1" + "0" * 5000)]


# -------------------------------------------------------------------------------------------- size


def calls_of(work: Callable[[], object]) -> int:
    """Return how many Python functions `work` calls: what grows with it, on any machine."""
    count = 0

    def hear(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(hear)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def many(folder: Path, count: int) -> dict[str, Path]:
    """Write two adapters of so many modules, one with a pattern for each, as EVA does."""
    modules = [f"model.layers.{i // 4}.sub{i % 4}.q_proj" for i in range(count)]
    table = dict.fromkeys(modules, 2)
    one = write_adapter(folder / "one", modules, rank_pattern=table, alpha_pattern=table)
    return {"one": one, "two": write_adapter(folder / "two", modules)}


def test_work_grows_in_step_with_the_number_of_modules(tmp_path: Path) -> None:
    found = []
    for count in (120, 120, 480):  # the first also imports
        root = tmp_path / f"{count}-{len(found)}"
        folders = many(root, count)
        exact = HiMergeConfig(density=1.0, scale=0.5)
        steps = [
            lambda: read_folder("one", folders["one"]),  # noqa: B023
            lambda: check_adapter(folders["one"]),  # noqa: B023
            lambda: merge_folders(folders, root / "out", config=exact),  # noqa: B023
            lambda: merge_folders(folders, root / "cut", config=NUMBERS),  # noqa: B023
        ]
        re.purge()
        found.append([calls_of(step) for step in steps])
    for few, more in zip(found[1], found[2], strict=True):
        assert more < 4.6 * few


def test_ten_thousand_modules_are_read_and_checked(tmp_path: Path) -> None:
    folders = many(tmp_path, 10_000)
    adapter = read_folder("one", folders["one"])
    assert len(adapter.factors) == 10_000
    assert {f.scaling for f in adapter.factors.values()} == {1.0}
    check_adapter(folders["one"])


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(part, torch.Tensor):
                self.entries = max(self.entries, part.numel())
        return out


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_a_huge_rank_takes_no_more_than_its_file(density: float, tmp_path: Path) -> None:
    rank, shape = 6000, (5, 7)
    folders = {
        name: write_adapter(tmp_path / name, ["m.q_proj"], rank, shape) for name in ("a", "bb")
    }
    config = HiMergeConfig(density=density, scale=0.5, rank="exact")
    with Largest() as largest:
        done = merge_folders(folders, tmp_path / "out", config=config)
    assert done.rank <= 5
    assert largest.entries <= 4 * rank * sum(shape)  # rank * rank would be 100 times that
    if density == 1.0:
        deltas = []
        for folder in (*folders.values(), tmp_path / "out"):
            pair = load_file(folder / WEIGHTS)
            a, b = (pair[f"base_model.model.m.q_proj.lora_{x}.weight"].double() for x in "AB")
            deltas.append(b @ a)
        want = 0.5 * (3 / rank) * (deltas[0] + deltas[1])
        torch.testing.assert_close(deltas[2], want, rtol=1e-5, atol=1e-5)


def test_a_small_file_with_an_enormous_delta_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "in", ["m.q_proj"], 1, (200_000, 200_000))
    text = refusal(lambda: merge_folders({"a": folder}, tmp_path / "out", config=NUMBERS))
    assert text is not None
    assert "(200000, 200000)" in text


# ----------------------------------------------------------------------------------------- recipes

GOOD_RECIPE = "adapters: {zh: in/zh, en: in/en}\nout: out\noptions: {density: 0.5, scale: 0.9}\n"


def laughs(levels: int) -> str:
    rows = "".join(f"  x{n}: &x{n} [*x{n - 1}, *x{n - 1}]\n" for n in range(1, levels))
    return GOOD_RECIPE + f"more:\n  x0: &x0 [ha, ha]\n{rows}"


HOSTILE_YAML = {
    "python object": GOOD_RECIPE + "name: !!python/object/apply:os.system ['touch ran']\n",
    "python name": GOOD_RECIPE + "name: !!python/name:os.system\n",
    "python module": GOOD_RECIPE + "name: !!python/module:os\n",
    "python tuple": GOOD_RECIPE + "name: !!python/tuple [1]\n",
    "unknown tag": GOOD_RECIPE + "name: !evil x\n",
    "a billion laughs": laughs(40),
    "endless alias": GOOD_RECIPE + "options: &a {density: *a}\n",
    "alias of itself": "adapters: &a {zh: *a}\nout: x\n",
    "merge bomb": "a: &a {x: 1}\n" + "".join(
        f"b{n}: {{<<: [*a, *a, *a]}}\n" for n in range(5)
    ),
    "deep": "a: " + "[" * 2000,
    "deep and closed": "a: " + "[" * 900 + "]" * 900,
    "key twice": GOOD_RECIPE + "out: elsewhere\n",
    "inner key twice": GOOD_RECIPE.replace("zh: in/zh", "zh: in/zh, zh: in/en"),
    "10,000 digits": GOOD_RECIPE + "rank: " + "9" * 10_000 + "\n",
    "huge number": GOOD_RECIPE + "rank: 1e400\n",
    "huge int": GOOD_RECIPE + "rank: " + "9" * 400 + "\n",
    "no date": GOOD_RECIPE + "name: 2001-99-99\n",
    "sixties": GOOD_RECIPE + "rank: " + ":".join(["59"] * 300) + "\n",
    "list as key": GOOD_RECIPE + "? [a, b]\n: c\n",
    "table as key": GOOD_RECIPE + "? {a: b}\n: c\n",
    "no text": GOOD_RECIPE + "name: a\x00b\n",
    "two documents": GOOD_RECIPE + "---\n" + GOOD_RECIPE,
    "a list": "- a\n- b\n",
    "nothing": "",
    "a megabyte": GOOD_RECIPE + "# " + "x" * (1 << 20),
    "no number": GOOD_RECIPE.replace("0.5", ".nan"),
    "binary": GOOD_RECIPE + "name: !!binary '%%%'\n",
    "paths": GOOD_RECIPE.replace("zh:", "../../zh:"),
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE_YAML.values(), ids=HOSTILE_YAML)
def test_a_hostile_recipe_is_a_list_of_faults(
    text: str, pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    before = disk(tmp_path)
    found = refusal(lambda: read_recipe(path))
    assert found is not None
    assert "recipe.yaml" in found
    done = himerge("merge", path)
    assert done.code == 2, done
    assert "Traceback" not in done.told
    assert disk(tmp_path) == before  # nothing ran, nothing was written


def test_a_recipe_may_still_use_aliases() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": [{"x": 1}, {"x": 1}],
    }


@given(text=st.text(st.sampled_from("ab:-[]{}&*!<'\"\n ,?|>#%@0.1~"), max_size=40))
@settings(max_examples=300)
def test_any_text_is_yaml_or_refused(text: str) -> None:
    refusal(lambda: parse_yaml(text))


@pytest.mark.parametrize("value", ["*a", "!!python/name:os", "[" * 3000, "9" * 5000, "2001-99-99"])
def test_a_hostile_override_is_a_fault(value: str, pair: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD_RECIPE, encoding="utf-8")
    assert refusal(lambda: read_recipe(path, [f"name={value}"])) is not None


@pytest.mark.parametrize("name", ["cut", "no bytes", "key twice", "8 bits"])
def test_commands_on_a_broken_folder_exit_with_a_reason_and_write_nothing(
    name: str, pair: dict[str, Path], tmp_path: Path
) -> None:
    path = pair["zh"] / WEIGHTS
    path.write_bytes(BROKEN[name](path.read_bytes()))
    (tmp_path / "recipe.yaml").write_text(GOOD_RECIPE, encoding="utf-8")
    flags = [part for key, folder in pair.items() for part in ("--adapter", f"{key}={folder}")]
    merge = ["merge", *flags, "--out", tmp_path / "out", "--set", "density=1", "--set", "scale=1"]
    before = disk(tmp_path)
    for arguments in (merge, ["merge", tmp_path / "recipe.yaml"], ["plan", *flags]):
        done = himerge(*arguments)
        assert done.code == 2, done
        assert "'zh'" in done.told
        assert "Traceback" not in done.told
    done = himerge("check", pair["zh"])
    assert done.code in (0, 1)
    assert "Traceback" not in done.told
    assert disk(tmp_path) == before


# -------------------------------------------------------------------- plans, reports and journals


@pytest.fixture(scope="module")
def merged(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "out"
    merge_folders({name: source / name for name in NAMES}, out, config=NUMBERS)
    return out


PLANS = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "null": b"null",
    "no UTF-8": b"\xff\xfe{}",
    "deep": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "digits": b'{"a":' + b"9" * 10_000 + b"}",
    "17 MB": b'{"a": "' + b"x" * (17 << 20) + b'"}',
}


@pytest.mark.parametrize("raw", PLANS.values(), ids=PLANS)
def test_a_file_that_is_no_plan_is_refused(
    raw: bytes, pair: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(raw)
    with pytest.raises(PlanError):
        MergePlan.from_json(path)
    flags = [part for key, folder in pair.items() for part in ("--adapter", f"{key}={folder}")]
    before = disk(tmp_path)
    done = himerge("apply", path, *flags, "--out", tmp_path / "out")
    assert done.code == 2, done
    assert "Traceback" not in done.told
    assert disk(tmp_path) == before


@pytest.mark.parametrize("path", ["nowhere.json", "a\0b", "x" * 10_000, "."])
def test_a_plan_that_is_not_there_is_refused(path: str) -> None:
    with pytest.raises(PlanError):
        MergePlan.from_json(path)


def replaced(table: Any, data: st.DataObject) -> Any:
    """Return JSON values with one value, anywhere, replaced or left out."""
    if isinstance(table, dict) and table and data.draw(st.integers(0, 3)):
        key = data.draw(st.sampled_from(sorted(table)))
        if not data.draw(st.integers(0, 4)):
            return {k: v for k, v in table.items() if k != key}
        return {**table, key: replaced(table[key], data)}
    if isinstance(table, list) and table and data.draw(st.integers(0, 3)):
        place = data.draw(st.integers(0, len(table) - 1))
        return [*table[:place], replaced(table[place], data), *table[place + 1 :]]
    return data.draw(JSON | st.just(10**400) | st.sampled_from(["zh", "model.layers.0"]))


@given(data=st.data())
@settings(max_examples=80)
def test_a_damaged_plan_is_refused_and_never_half_believed(
    data: st.DataObject, merged: Path, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    facts = json.loads((merged / "plan.json").read_text("utf-8"))
    damaged = replaced(facts, data)
    if isinstance(damaged, dict) and data.draw(st.booleans()):
        damaged.pop("fingerprint", None)
    if refusal(lambda: MergePlan.from_dict(damaged)) is not None:
        return
    plan = MergePlan.from_dict(damaged)
    assert MergePlan.from_json(plan.to_json()) == plan
    out = tmp_path_factory.mktemp("replay") / "out"
    folders = {name: source / name for name in NAMES}
    if refusal(lambda: merge_folders(folders, out, plan=plan)) is None:
        assert all(t.isfinite().all() for t in load_file(out / WEIGHTS).values())


def test_a_plan_whose_scales_overflow_together_is_refused(
    merged: Path, pair: dict[str, Path], tmp_path: Path
) -> None:
    facts = json.loads((merged / "plan.json").read_text("utf-8"))
    del facts["fingerprint"]
    facts["adapters"]["zh"]["scale"] = 1e300
    layer = next(name for name, row in facts["edits"].items() if "zh" in row)
    facts["edits"][layer]["zh"]["scale"] = 1e300
    text = refusal(lambda: merge_folders(pair, tmp_path / "out", plan=MergePlan.from_dict(facts)))
    assert text is not None
    assert not (tmp_path / "out").exists()


@given(data=st.data())
@settings(max_examples=60)
def test_a_damaged_report_is_refused_or_shown(data: st.DataObject, scored: dict[str, Any]) -> None:
    damaged = json.loads(json.dumps(replaced(scored, data)))
    refusal(lambda: render_page(parse_report(damaged)))


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a scored merge, which says more than that of a merge from folders."""
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    config = HiMergeConfig(density=1.0, scale=0.9, rank="exact")
    result = merge_adapters_hi(model, NAMES, tiny.eval_fns("llama", NAMES), config=config)
    out = tmp_path_factory.mktemp("scored")
    result.save(out)
    return json.loads((out / "report.json").read_text("utf-8"))


@pytest.mark.parametrize("raw", PLANS.values(), ids=PLANS)
def test_the_report_command_refuses_what_is_no_report(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(raw)
    before = disk(tmp_path)
    for more in ([], ["--compare", tmp_path]):
        done = himerge("report", tmp_path, *more)
        assert done.code == 2, done
        assert "Traceback" not in done.told
    assert disk(tmp_path) == before


def journal_line(previous: str, record: Any) -> tuple[str, str]:
    """Return (line, checksum) as a forger would who knows the format."""
    import hashlib

    text = record if isinstance(record, str) else json.dumps(record)
    found = hashlib.sha256(f"{previous}|{text}".encode()).hexdigest()[:16]
    return f'{{"sha256":"{found}","record":{text}}}\n', found


HEADER = {"format": "peft_himerge.journal/1", "identity": {"a": "b"}, "random_state": {"x": 1}}
ROW = {"key": {"task": "t"}, "seconds": 1.0, "value": 0.5, "examples": None, "metrics": {}}


@pytest.mark.parametrize(
    "record",
    [
        *({**ROW, "value": v} for v in ("0.5", None, True, [0.5], {})),
        *({**ROW, "examples": v} for v in (3, "x", [[1.0]], ["x"], [None], {"a": 1})),
        *({**ROW, "metrics": v} for v in (3, [1], {"a": "x"}, {"a": None})),
        {**ROW, "seconds": "1"},
        {**ROW, "key": 3},
        {**ROW, "error": "x"},
        {k: v for k, v in ROW.items() if k != "value"},
        [], None, 3, "[" * 50_000 + "]" * 50_000,
    ],
)  # fmt: skip
def test_a_forged_score_is_set_aside_with_its_journal(record: Any, tmp_path: Path) -> None:
    head, checksum = journal_line("", HEADER)
    line, _ = journal_line(checksum, record)
    path = tmp_path / "scores.jsonl"
    path.write_text(head + line, encoding="utf-8")
    with Journal(path, {"a": "b"}, {"x": 1}) as journal:
        kept = journal.find({"task": "t"})
        if record == {**ROW, "key": 3}:  # a key of its own, that nobody asks for
            assert kept is None
            return
        assert (kept, journal.found) == (None, 0)
    assert (tmp_path / "scores.jsonl.corrupt-1").read_text("utf-8") == head + line


@pytest.mark.parametrize("state", [{}, {"python": 3}, {"python": [3, ["x"], None]}, {"numpy": []}])
def test_a_forged_random_state_ends_the_merge_and_changes_nothing(
    state: dict[str, Any], tmp_path: Path
) -> None:
    fns, path = tiny.eval_fns("llama", NAMES), tmp_path / "scores.jsonl"
    config = HiMergeConfig(density=1.0, scale=1.0)
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    with pytest.raises(ZeroDivisionError):
        merge_adapters_hi(model, NAMES, {**fns, "en": lambda m: 1 / 0}, config=config, journal=path)
    first = path.read_text("utf-8").splitlines()[0]
    header = json.loads(first)["record"] | {"random_state": state}
    path.write_text(journal_line("", json.dumps(header, separators=(",", ":")))[0], "utf-8")
    before = snapshot(model)
    with pytest.raises(JournalError, match="random state in the journal"):
        merge_adapters_hi(model, NAMES, fns, config=config, journal=path)
    assert moved(before, snapshot(model)) == []


# --------------------------------------------------------------------------------------- eval data

LINES = st.one_of(
    st.fixed_dictionaries({}, optional={
        "prompt": JSON, "choices": JSON, "answer": JSON, "references": JSON, "text": JSON,
    }).map(json.dumps),
    st.text(max_size=20),
    JSON.map(json.dumps),
)  # fmt: skip


@given(
    lines=st.lists(LINES, max_size=4),
    kind=st.sampled_from(["multiple_choice", "generation", "perplexity"]),
)
@settings(max_examples=60)
def test_any_lines_are_rows_or_refused(
    lines: list[str], kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    refusal(lambda: load_rows(path, kind))


@pytest.mark.parametrize(
    "raw",
    [b"", b"\n\n", b"\xff\xfe", b"[" * 10_000, b'{"prompt": ' * 3000, b"\0" * 1000,
     b'{"prompt": "a", "choices": ["b", "c"], "answer": ' + b"9" * 5000 + b"}",
     b'{"prompt": "a", "choices": ["b", "c"], "answer": 1e999}',
     b'{"prompt": "a", "choices": "bc", "answer": 0}',
     b'{"prompt": "a"}\n{"choices": []}', b'"just a text"', b"3", b"null"],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_file_without_rows_is_refused_by_name(raw: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(raw)
    text = refusal(lambda: load_rows(path, "multiple_choice"))
    assert text is not None
    assert "rows" in text
