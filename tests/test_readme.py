"""What README.md shows is what the code does."""

import ast
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

import peft_himerge
from peft_himerge import HiMergeConfig
from peft_himerge.bench.table import read_settings
from peft_himerge.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    evals = tiny.eval_fns("llama", ["en", "zh"])
    code = code.replace("scale=0.9)", "scale=0.9, max_export_drop=None)")
    names = {"model": model, "eval_en": evals["en"], "eval_zh": evals["zh"]}
    names |= {f"batches_{name}": [dict(evals[name].inputs)] for name in ("en", "zh")}
    exec(compile(code, "README.md", "exec"), names)
    assert model.active_adapter == "merged"
    assert {"merged", "again", "both", "ties", "tsv"} <= set(model.peft_config)
    assert names["result"].options["focus"]
    assert set(names["result"].plan.adapters) == {"en", "zh"}
    assert (tmp_path / "merged_adapter" / "focused" / "zh" / "adapter_config.json").is_file()
    assert (tmp_path / "merged_adapter" / "adapter_model.safetensors").is_file()
    assert names["again"].plan == names["plain"].plan
    assert not names["plain"].options["focus"]
    assert not (tmp_path / "plain_adapter" / "focused").exists()


def table(name: str) -> list[list[str]]:
    """Return the cells of the rows of a marked table, without the header."""
    _, _, rest = README.partition(f"<!-- {name} -->\n")
    lines = rest.partition("\n<!-- end -->")[0].splitlines()
    assert len(lines) > 2, name
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_option_has_its_default_and_its_reason() -> None:
    rows = table("options of HiMergeConfig")
    told = {option.strip("`"): ast.literal_eval(default.strip("`")) for option, default, _ in rows}
    assert len(told) == len(rows)
    assert list(told) == list(HiMergeConfig.model_fields)  # none more, none less, in their order
    for name, field in HiMergeConfig.model_fields.items():
        assert (told[name], type(told[name])) == (field.default, type(field.default)), name
    assert all(3 <= len(why) <= 90 for _, _, why in rows)


FUNCTIONS = {
    f.__name__: f
    for f in (
        *(peft_himerge.merge_adapters_hi, peft_himerge.merge_adapters, peft_himerge.merge_folders),
        *(peft_himerge.add_weighted_adapter, peft_himerge.apply_plan, peft_himerge.score_plans),
        *(peft_himerge.densify, peft_himerge.focus_adapters),
    )
}


def test_every_argument_has_its_default_and_its_reason() -> None:
    rows = table("options of functions")
    told: dict[tuple[str, str], str] = {}
    for option, default, of, why in rows:
        assert 3 <= len(why) <= 90, option
        for name in of.split(", "):
            assert (name.strip("`"), option.strip("`")) not in told
            told[name.strip("`"), option.strip("`")] = default.strip("`")
    real = {
        (name, parameter.name): parameter.default
        for name, function in FUNCTIONS.items()
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is not inspect.Parameter.empty
    }
    assert set(told) == set(real)
    for key, default in real.items():
        assert told[key].replace('"', "'") == repr(default), key


def test_no_function_of_the_front_door_is_left_out() -> None:
    functions = {
        name for name in peft_himerge.__all__ if inspect.isfunction(getattr(peft_himerge, name))
    }
    assert functions == {*FUNCTIONS, "list_methods"}  # which takes nothing


def test_every_command_of_the_readme_is_there() -> None:
    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    for name in re.findall(r"^(?:.venv/bin/)?himerge (\w+)", README, re.MULTILINE):
        assert name in commands, name
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0


def test_the_result_table_is_the_one_the_demo_printed() -> None:
    printed = (ROOT / "examples" / "demo_result.md").read_text(encoding="utf-8").strip()
    assert printed.splitlines()[0].startswith("| state |")
    assert printed in README


def script(*place: str) -> Any:
    """Return a script of the repository as a module."""
    spec = importlib.util.spec_from_file_location("script", ROOT.joinpath(*place))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_table_is_made_from_the_results() -> None:
    _, _, rest = README.partition("<!-- benchmarks -->\n")
    assert rest.partition("\n<!-- end -->")[0] == script("tests", "benchmarks", "table.py").render()


def test_the_comparison_is_made_from_its_cells() -> None:
    _, _, rest = README.partition("<!-- comparison -->\n")
    made = script("examples", "bench", "table.py")
    assert rest.partition("\n<!-- end -->")[0] == made.text()
    assert made.TABLES.read_text(encoding="utf-8") == made.tables()


def test_the_picture_of_the_comparison_shows_its_cells() -> None:
    figure = script("examples", "bench", "figure.py")
    assert f"cells {figure.digest()}" in figure.PICTURE.read_text(encoding="utf-8")


def test_the_picture_is_drawn_from_the_cells(tmp_path: Path) -> None:
    figure = script("examples", "bench", "figure.py")
    text = figure.draw(picture=tmp_path / "again.svg").read_text(encoding="utf-8")
    assert f"cells {figure.digest()}" in text
    for setting, lines in read_settings(figure.CELLS).items():
        assert setting in text
        assert all(line.title in text for line in lines if line.rank is not None)


def test_both_commands_use_the_constraints_file() -> None:
    blocks = re.findall(r"<!-- (?:install|test) -->\n```sh\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    assert all("-c constraints.txt" in block for block in blocks)
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
