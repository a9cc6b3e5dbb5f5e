"""`himerge check`: every rule on a folder that breaks it alone, and our own exports on none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.numpy import save_file
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from peft_himerge import HiMergeConfig, apply_plan, merge_adapters, merge_folders
from peft_himerge.adapters import read_adapters
from peft_himerge.cli import app
from peft_himerge.combine import Combiner
from peft_himerge.errors import ConfigError
from peft_himerge.plan import Edit
from peft_himerge.portable import ENGINES, check_adapter
from peft_himerge.portable.rules import KNOWN_FIELDS, MAX_LORA_RANKS
from peft_himerge.portable.targets import targeted

Q, V = (f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj"))
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/base",
    "r": 4,
    "lora_alpha": 4,
    "bias": "none",
    "target_modules": ["q_proj", "v_proj"],
}


def pair(module: str, rank: int = 4, dtype: Any = np.float16) -> dict[str, np.ndarray]:
    stem = f"base_model.model.{module}.lora_"
    return {
        f"{stem}A.weight": np.ones((rank, 8), dtype),
        f"{stem}B.weight": np.ones((6, rank), dtype),
    }


def write(
    folder: Path, config: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None
) -> Path:
    """Write an adapter; keys set to None in `tensors` are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = json.dumps({**CONFIG, **(config or {})})
    (folder / "adapter_config.json").write_text(fields, encoding="utf-8")
    held = {**pair(Q), **pair(V), **(tensors or {})}
    save_file(
        {k: v for k, v in held.items() if v is not None}, folder / "adapter_model.safetensors"
    )
    return folder


def rules(folder: Path, *engines: str, base: Path | None = None) -> dict[tuple[str, str], str]:
    """Return (rule, engine) -> severity."""
    report = check_adapter(folder, engines or ENGINES, base=base)
    return {(f.rule, engine): f.severity for f in report.findings for engine in f.engines}


def test_a_portable_folder_gives_no_finding(tmp_path: Path) -> None:
    report = check_adapter(write(tmp_path))
    assert report.findings == ()
    assert report.ok


OTHER = {"base_model.model.score.weight": np.ones((2, 8), np.float16)}
NORM = {"base_model.model.model.norm.weight": np.ones(8, np.float16)}
HEAD = pair("lm_head")
ROWS = {
    "base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 9), np.float16),
    "base_model.model.model.embed_tokens.lora_embedding_B": np.ones((8, 4), np.float16),
}
ALL = ["q_proj", "v_proj", "lm_head", "embed_tokens"]
BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {
    # what: config, tensors, rule:engine -> severity (exactly these)
    "alpha": ({"lora_alpha": 8}, {}, {"alpha:vllm": "warning", "alpha:llama.cpp": "warning"}),
    "rslora": (
        {"use_rslora": True},
        {},
        {"rslora:vllm": "warning", "scale:llama.cpp": "error"},
    ),
    "patterns of one scale": (
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 2}},
        pair(V, 2),
        {
            **{"mixed-rank:vllm": "warning", "mixed-rank:llama.cpp": "warning"},
            **{"alpha-pattern:vllm": "warning", "alpha-pattern:llama.cpp": "warning"},
            "scale:llama.cpp": "error",  # 4 / 2 there, 2 / 2 in PEFT
        },
    ),
    "rank pattern": (
        {"rank_pattern": {"v_proj": 2}},
        pair(V, 2),
        {
            **{"mixed-rank:vllm": "warning", "mixed-rank:llama.cpp": "warning"},
            "scale:vllm": "error",  # 4 / 4 there, 4 / 2 in PEFT
        },
    ),
    "alpha pattern": (
        {"alpha_pattern": {"q_proj": 1}},
        {},
        {
            **{"alpha-pattern:vllm": "warning", "alpha-pattern:llama.cpp": "warning"},
            **{"scale:vllm": "error", "scale:llama.cpp": "error"},
        },
    ),
    "dora": ({"use_dora": True}, {}, {"dora:vllm": "error", "dora:llama.cpp": "error"}),
    "bias": ({"bias": "all"}, {}, {"bias:vllm": "error", "bias:llama.cpp": "error"}),
    "lora_bias": ({"lora_bias": True}, {}, {"bias:vllm": "error", "bias:llama.cpp": "error"}),
    "saved": (
        {"modules_to_save": ["score"]},
        OTHER,
        {
            **{"modules-to-save:vllm": "error", "modules-to-save:llama.cpp": "error"},
            **{"other-tensors:vllm": "error", "other-tensors:llama.cpp": "error"},
        },
    ),
    "norm": ({}, NORM, {"other-tensors:vllm": "error"}),
    "tokens": (
        {"trainable_token_indices": [1]},
        {},
        {"trained-tokens:vllm": "error", "trained-tokens:llama.cpp": "error"},
    ),
    "experts": (
        {"target_parameters": ["experts.w"]},
        {},
        {"fused-experts:vllm": "warning", "fused-experts:llama.cpp": "warning"},
    ),
    "replicated": (
        {"layer_replication": [[0, 1], [0, 1]]},
        {},
        {"layer-replication:vllm": "error", "layer-replication:llama.cpp": "error"},
    ),
    "pissa": (
        {"init_lora_weights": "pissa_niter_4"},
        {},
        {"changed-base:vllm": "error", "changed-base:llama.cpp": "error"},
    ),
    "head": (
        {"target_modules": ALL},
        HEAD,
        {"head:vllm": "warning", "tied-head:llama.cpp": "warning"},
    ),
    "embedding": ({"target_modules": ALL}, ROWS, {"head:vllm": "warning"}),
    "odd module": (
        {"target_modules": [*ALL, "router"]},
        pair("model.layers.0.router"),
        {"modules:vllm": "warning"},
    ),
    "convolution": (
        {"target_modules": [*ALL, "in_proj"]},
        {
            "base_model.model.in_proj.lora_A.weight": np.ones((4, 8, 3), np.float16),
            "base_model.model.in_proj.lora_B.weight": np.ones((6, 4, 1), np.float16),
        },
        {"modules:vllm": "error", "modules:llama.cpp": "error"},
    ),
    "no base": (
        {"base_model_name_or_path": None},
        {},
        {"base-name:llama.cpp": "warning", "base-name:peft": "warning"},
    ),
    "local base": (
        {"base_model_name_or_path": "/home/me/base"},
        {},
        {"base-name:llama.cpp": "warning", "base-name:peft": "warning"},
    ),
    "local base on windows": (
        {"base_model_name_or_path": "C:\\base"},
        {},
        {"base-name:llama.cpp": "warning", "base-name:peft": "warning"},
    ),
    "uncovered": ({"target_modules": ["q_proj"]}, {}, {"targets:peft": "error"}),
    "excluded": ({"exclude_modules": ["v_proj"]}, {}, {"targets:peft": "error"}),
    "other layer": ({"layers_to_transform": [3]}, {}, {"targets:peft": "error"}),
    "no targets": (
        {"target_modules": None},
        {},
        {"targets:vllm": "error", "targets:peft": "error"},
    ),
    "pattern": (
        {"target_modules": r".*\.[qv]_proj"},
        {},
        {f"target-form:{engine}": "warning" for engine in ENGINES},
    ),
    "unknown field": ({"himerge": 1}, {}, {"config-fields:peft": "warning"}),
    "float32": (
        {},
        pair(V, dtype=np.float32),
        {f"float32:{engine}": "warning" for engine in ENGINES},
    ),
    "half a pair": (
        {},
        {f"base_model.model.{V}.lora_B.weight": None},
        {f"factors:{engine}": "error" for engine in ENGINES},
    ),
    "ranks that differ": (
        {},
        {f"base_model.model.{V}.lora_B.weight": np.ones((6, 3), np.float16)},
        {f"factors:{engine}": "error" for engine in ENGINES},
    ),
    "another adapter's config": (
        {"r": 2, "lora_alpha": 2},
        {},
        {"rank:peft": "error", "scale:llama.cpp": "error"},
    ),
    "no prefix": (
        {},
        {"model.layers.1.self_attn.q_proj.lora_A.weight": np.ones((4, 8), np.float16)},
        {
            **{"other-tensors:vllm": "error", "other-tensors:llama.cpp": "error"},
            "key-names:peft": "error",
        },
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_each_rule_alone(what: str, tmp_path: Path) -> None:
    config, tensors, wanted = BROKEN[what]
    folder = write(tmp_path, config, tensors)
    assert {":".join(key): value for key, value in rules(folder).items()} == wanted
    report = check_adapter(folder)
    assert report.ok == ("error" not in wanted.values())
    assert all(f.found and f.fix for f in report.findings)
    for engine in ENGINES:
        only = {k: v for k, v in rules(folder).items() if k[1] == engine}
        assert rules(folder, engine) == only


@pytest.mark.parametrize("rank", [1, 8, 9, 16, 17, 33, 64, 65, 300, 320, 321, 512, 513])
def test_vllm_gets_the_smallest_legal_limit(rank: int, tmp_path: Path) -> None:
    config = {"r": rank, "lora_alpha": rank}
    folder = write(tmp_path, config, {**pair(Q, rank), **pair(V, rank)})
    found = check_adapter(folder, ["vllm"]).findings
    if rank <= 16:
        assert found == ()
        return
    (finding,) = found
    assert finding.rule == "max-lora-rank"
    assert (finding.severity == "error") == (rank > 512)
    if rank <= 512:
        limit = int(finding.fix.rpartition(" ")[2])
        assert finding.fix == f"serve with --max-lora-rank {limit}"
        assert limit in MAX_LORA_RANKS
        assert limit >= rank
        assert not any(rank <= other < limit for other in MAX_LORA_RANKS)
    assert ("costs" in finding.found) == (64 < rank <= 512)


@pytest.mark.parametrize(
    ("says", "severity"),
    [
        ({"tie_word_embeddings": True}, "error"),
        ({"text_config": {"tie_word_embeddings": True}}, "error"),
        ({"tie_word_embeddings": False}, None),
        ({}, "warning"),
    ],
)
def test_the_base_says_whether_a_head_is_tied(
    says: dict[str, Any], severity: str | None, tmp_path: Path
) -> None:
    folder = write(tmp_path / "adapter", {"target_modules": ALL}, HEAD)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(says), encoding="utf-8")
    found = rules(folder, base=base)
    assert found.get(("tied-head", "llama.cpp")) == severity
    assert found.get(("tied-head", "peft")) == ("warning" if severity == "error" else None)


def test_a_folder_without_an_adapter_says_where_it_is(tmp_path: Path) -> None:
    write(tmp_path / "out" / "merged")
    (finding,) = check_adapter(tmp_path / "out").findings
    assert (finding.rule, finding.severity, finding.engines) == ("layout", "error", ENGINES)
    assert "'merged'" in finding.found or "sub-folder merged" in finding.found
    assert str(tmp_path / "out" / "merged") in finding.fix
    (tmp_path / "out" / "merged" / "adapter_model.safetensors").unlink()
    (tmp_path / "out" / "merged" / "adapter_model.bin").write_bytes(b"")
    (finding,) = check_adapter(tmp_path / "out" / "merged").findings
    assert finding.rule == "layout"
    assert "adapter_model.bin" in finding.found


def test_a_file_without_factors_is_an_error(tmp_path: Path) -> None:
    save_file({"notes": np.zeros(1)}, write(tmp_path) / "adapter_model.safetensors")
    report = check_adapter(tmp_path)
    found = {f.found: f.severity for f in report.findings if f.rule == "factors"}
    assert found == {"the file holds no pair of A and B": "error"}
    assert not report.ok


@pytest.mark.parametrize("cut", [0, 4, 40, -1])
def test_damaged_weights_are_an_error_and_no_traceback(cut: int, tmp_path: Path) -> None:
    path = write(tmp_path) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    (finding,) = check_adapter(tmp_path).findings
    assert (finding.rule, finding.severity) == ("weights", "error")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", *(json.dumps({**CONFIG, **bad}) for bad in (
        {"peft_type": "IA3"}, {"r": "4"}, {"r": 0}, {"r": True}, {"lora_alpha": None},
        {"rank_pattern": [1]}, {"alpha_pattern": {"q_proj": "x"}},
        {"alpha_pattern": {"(": 1}}, {"rank_pattern": {"q_proj": 0}}, {"r": float("nan")},
        {"target_modules": "("}, {"target_modules": 3}, {"exclude_modules": [1]},
        {"layers_to_transform": ["a"]},
        {"layers_pattern": "("}, {"exclude_modules": "["}, {"rank_pattern": {"x(?i)": 1}},
    ))],
)  # fmt: skip
def test_a_config_that_says_nothing_is_an_error(text: str, tmp_path: Path) -> None:
    (write(tmp_path) / "adapter_config.json").write_text(text, encoding="utf-8")
    (finding,) = check_adapter(tmp_path).findings
    assert (finding.rule, finding.severity) == ("config", "error")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"folder": "nowhere"}, "is not a folder"),
        ({"engines": ["vlm"]}, "Did you mean 'vllm'"),
        ({"engines": []}, "engines is empty"),
        ({"base": "nowhere"}, "no config.json"),
    ],
)
def test_a_wrong_call_is_refused(call: dict[str, Any], text: str, tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ConfigError, match=text):
        check_adapter(**{"folder": tmp_path, **call})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 40) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=3,
)


@given(changes=st.dictionaries(st.sampled_from(sorted(KNOWN_FIELDS)), JSON, max_size=4))
def test_any_config_gives_a_report(
    changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    report = check_adapter(write(tmp_path_factory.mktemp("any"), changes))
    assert report.ok == all(f.severity == "warning" for f in report.findings)
    json.dumps(report.to_dict())


def test_known_fields_are_those_of_the_installed_peft() -> None:
    assert {f.name for f in dataclasses.fields(LoraConfig)} <= KNOWN_FIELDS


@given(
    target=st.sampled_from([["q_proj"], [Q], ["proj"], r".*\.layers\.[01]\..*q_proj", "q_proj"]),
    exclude=st.sampled_from([None, ["layers.0.self_attn.q_proj"], r".*layers\.1.*"]),
    layers=st.sampled_from([None, 1, [0], [0, 2]]),
    pattern=st.sampled_from([None, "layers", ["h", "layers"]]),
    module=st.sampled_from([Q, V, Q.replace("0", "1"), Q.replace("0", "2"), "q_proj"]),
)
def test_targets_are_those_of_peft(
    target: Any, exclude: Any, layers: Any, pattern: Any, module: str
) -> None:
    fields = {"target_modules": target, "exclude_modules": exclude}
    if not isinstance(target, str):
        fields |= {"layers_to_transform": layers}
        if layers is not None:
            fields |= {"layers_pattern": pattern}
    asked = LoraConfig(**fields)
    if isinstance(asked.target_modules, set):
        asked.target_modules = sorted(asked.target_modules)
    assert targeted(fields, module) == bool(check_target_module_exists(asked, module))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_all_linear_means_what_peft_makes_of_it(kind: str) -> None:
    base = tiny.tiny_llama() if kind == "llama" else tiny.tiny_gpt2()
    linear = [n for n, m in base.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
    config = LoraConfig(target_modules="all-linear", fan_in_fan_out=kind == "gpt2")
    model = get_peft_model(base, config)
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert {name for name in linear if targeted({"target_modules": "all-linear"}, name)} == adapted
    assert 0 < len(adapted) < len(linear)  # all but the head


def test_a_module_without_a_layer_number_is_in_no_layer() -> None:
    fields = {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}
    for module in ("head.q_proj", "model.layers.0.q_proj", "model.layers.1.q_proj"):
        there = bool(check_target_module_exists(LoraConfig(**fields), module))
        assert targeted(fields, module) == there == (module == "model.layers.0.q_proj")


# --------------------------------------------------------------------------------- our own exports


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(16).reshape(2, 8)).logits


def named(model: PeftModel) -> PeftModel:
    for config in model.peft_config.values():
        config.base_model_name_or_path = "org/base"
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "qwen2"])
@pytest.mark.parametrize("way", ["method", "plan", "folders"])
def test_every_export_passes_for_all_engines(kind: str, way: str, tmp_path: Path) -> None:
    model = named(tiny.peft_model(kind, 3, torch.float32))
    names = ["zh", "en", "math"]
    if way == "method":
        folder = merge_adapters(model, names, "cat", adapter_name="new").save(tmp_path / "new")
    elif way == "plan":
        plan = Combiner(read_adapters(model, names)).plan(dict.fromkeys(names, Edit(1.0, 1.0)))
        folder = apply_plan(model, plan, adapter_name="new").save(tmp_path / "new")
    else:
        model.save_pretrained(tmp_path / "in", save_embedding_layers=False)
        merge_folders(
            {name: tmp_path / "in" / name for name in names},
            tmp_path / "new",
            config=HiMergeConfig(density=1.0, scale=1.0),
        )
        folder = tmp_path / "new"
    found = check_adapter(folder)
    assert found.ok, found.findings
    allowed = {"float32", "max-lora-rank", "head", "tied-head", "modules"}
    assert {f.rule for f in found.findings} <= allowed
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["lora_alpha"] == config["r"]
    assert config["target_modules"] == sorted(config["target_modules"])
    assert set(config) <= {f.name for f in dataclasses.fields(LoraConfig)} - {"runtime_config"}
    assert not {"lora_bias", "peft_version", "target_parameters"} & set(config)
    base = tiny.tiny_model(kind)
    reloaded = PeftModel.from_pretrained(base, str(folder)).eval()
    reloaded.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    again = PeftModel.from_pretrained(tiny.tiny_model(kind), str(tmp_path / "again")).eval()
    assert torch.equal(logits(reloaded), logits(again))
    if way != "folders":
        model.set_adapter("new")
        torch.testing.assert_close(logits(reloaded), logits(model))


def test_sources_of_the_tests_themselves_do_not_pass(tmp_path: Path) -> None:
    """What PEFT saves for adapters with rank and alpha patterns is the counter-example."""
    model = named(tiny.peft_model("llama", 3, torch.float32))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert check_adapter(tmp_path / "zh").ok
    assert ("scale", "vllm") in rules(tmp_path / "en")
    assert ("scale", "llama.cpp") in rules(tmp_path / "math")  # rsLoRA


# -------------------------------------------------------------------------------- the command line


def test_command_prints_findings_and_exits_with_1(tmp_path: Path) -> None:
    write(tmp_path, {"use_dora": True, "lora_alpha": 8})
    done = CliRunner().invoke(app, ["check", str(tmp_path)], env={"COLUMNS": "160"})
    assert done.exit_code == 1
    assert "NOT portable to vllm, llama.cpp, peft: 1 errors, 1 warnings" in done.output
    assert "use_dora=True" in done.output
    done = CliRunner().invoke(app, ["check", str(tmp_path), "--for", "peft"])
    assert done.exit_code == 0
    assert "portable to peft: 0 errors, 0 warnings" in done.output


def test_command_prints_json(tmp_path: Path) -> None:
    write(tmp_path, {"use_dora": True})
    done = CliRunner().invoke(app, ["check", str(tmp_path), "--for", "vllm,peft", "--json"])
    assert done.exit_code == 1
    report = json.loads(done.output)
    assert report["ok"] is False
    assert report["engines"] == ["vllm", "peft"]
    (finding,) = report["findings"]
    assert (finding["rule"], finding["engines"]) == ("dora", ["vllm"])


@pytest.mark.parametrize("arguments", [["nowhere"], [".", "--for", "vlm"], [".", "--for", ""], []])
def test_command_refuses_a_wrong_call_with_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["check", *arguments]).exit_code == 2
