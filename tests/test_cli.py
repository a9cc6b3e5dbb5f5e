"""The command line, called as a user calls it."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from commands import himerge, himerge_process
from peft import PeftModel
from transformers import LlamaForCausalLM

EVALS = """
import torch

IDS = torch.arange(3, 51).reshape(4, 12)

def _task(shift):
    def score(model):
        targets = (IDS * shift) % 60
        logits = model(input_ids=IDS).logits.log_softmax(-1)
        return logits.gather(-1, targets[..., None])[..., 0].mean(1)
    return score

def eval_fns(tokenizer):
    assert tokenizer is None
    return {"zh": _task(3), "en": _task(7)}
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    model.save_pretrained(
        root / "adapters", selected_adapters=["zh", "en"], save_embedding_layers=False
    )
    model.unload().save_pretrained(root / "base")
    (root / "my_evals.py").write_text(EVALS, encoding="utf-8")
    return root


def merge_args(root: Path, out: Path) -> list[object]:
    adapters = root / "adapters"
    return [
        "merge", "--base", root / "base",
        "--adapter", f"zh={adapters / 'zh'}", "--adapter", f"en={adapters / 'en'}",
        "--eval", root / "my_evals.py", "--out", out,
    ]  # fmt: skip


def test_merge_command_writes_an_adapter_that_plain_peft_loads(
    folders: Path, tmp_path: Path
) -> None:
    done = himerge_process(
        *merge_args(folders, tmp_path / "out"), "--set", "density=1.0", "--set", "scale=1.0",
        "--set", "layer_density=1.0", "--merged", tmp_path / "full",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert "exported" in done.stdout
    assert "Layers, worst first" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert set(report["scores"]) == {"base", "en", "zh", "model_wise", "merged", "exported"}
    ids = torch.arange(3, 27).reshape(2, 12)
    base = LlamaForCausalLM.from_pretrained(folders / "base")
    full = LlamaForCausalLM.from_pretrained(tmp_path / "full")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, full(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (["--set", "densty=0.5"], "Did you mean 'density'"),
        (["--set", "density"], "expected KEY=VALUE"),
        (["--set", "density=2"], "less than or equal to 1"),
        (["--adapter", "en"], "expected NAME=FOLDER"),
        (["--adapter", "en=elsewhere"], "names 'en' twice"),
        (["--adapter", "third=nowhere"], "no adapter_config.json"),
    ],
)
def test_merge_command_refuses_and_writes_nothing(
    folders: Path, tmp_path: Path, change: list[str], text: str
) -> None:
    done = himerge(*merge_args(folders, tmp_path / "out"), *change)
    assert done.code == 2
    assert text in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_merge_command_says_what_an_eval_file_must_define(folders: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n", encoding="utf-8")
    args = merge_args(folders, tmp_path / "out")
    args[args.index(folders / "my_evals.py")] = empty
    done = himerge(*args)
    assert done.code == 2
    assert "defines no eval_fns(tokenizer)" in " ".join(done.stderr.split())


def test_a_wrong_call_exits_with_2() -> None:
    assert himerge("merge").code == 2
