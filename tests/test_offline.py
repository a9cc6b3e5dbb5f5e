"""Folder to folder gives what the live model gives, and refuses by name what it cannot hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import himerge, himerge_process
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from peft_himerge import Edit, HiMergeConfig, MergePlan, apply_plan
from peft_himerge import export as export_room
from peft_himerge.adapters import read_adapters
from peft_himerge.combine import Combiner
from peft_himerge.errors import AdapterError, ConfigError, PlanError
from peft_himerge.folders import read_folder
from peft_himerge.geometry import layer_geometry, to_records
from peft_himerge.offline import merge_folders

NAMES = ["zh", "en", "math"]
FILES = {
    "adapter_config.json", "adapter_model.safetensors", "plan.json", "report.html", "report.json",
    "report.md", "README.md",
}  # fmt: skip


def saved(model: PeftModel, root: Path) -> dict[str, Path]:
    model.save_pretrained(
        root, selected_adapters=list(model.peft_config), save_embedding_layers=False
    )
    return {name: root / name for name in model.peft_config}


def logits(kind: str, model: Any) -> torch.Tensor:
    task = tiny.eval_fns(kind, ["zh"])["zh"]
    with torch.no_grad():
        found: torch.Tensor = model(**task.inputs).logits
    return found


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("density", [1.0, 0.4])
def test_folders_give_what_the_live_model_gives(kind: str, density: float, tmp_path: Path) -> None:
    model = tiny.peft_model(kind, 3, dtype=torch.float32)
    folders = saved(model, tmp_path / "in")
    combiner = Combiner(read_adapters(model, NAMES))
    plan = combiner.plan({name: Edit(density, 0.7) for name in NAMES})
    layer = next(iter(plan.edits))
    name = next(iter(plan.edits[layer]))
    plan = plan.with_edit(layer, name, Edit(0.5, 0.5))
    done = merge_folders(folders, tmp_path / "out", plan=plan)
    live = apply_plan(model, plan, adapter_name="live")
    model.set_adapter("live")
    want = logits(kind, model)
    base = tiny.tiny_model(kind, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(kind, loaded), want, rtol=1e-6, atol=1e-6)
    assert done.rank == live.rank
    assert {m.module: m.rank for m in done.modules} == {m.module: m.rank for m in live.modules}
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert MergePlan.from_json(tmp_path / "out" / "plan.json") == plan
    facts = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    want_geometry = to_records(layer_geometry(combiner), {})["layers"]
    assert facts["geometry"]["layers"] == want_geometry
    assert set(facts["geometry"]["singular_values"]) == set(combiner.modules)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_folder_is_read_as_peft_reads_it(kind: str, tmp_path: Path) -> None:
    model = tiny.peft_model(kind, 3, dtype=torch.float32)
    folders = saved(model, tmp_path)
    for adapter in read_adapters(model, NAMES):
        read = read_folder(adapter.name, folders[adapter.name])
        assert list(read.factors) == list(adapter.factors)
        assert read.digest() == adapter.digest()
        assert read.base == adapter.base


def test_embeddings_and_convolutions_are_read_and_written(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(11, 6)
            self.conv = torch.nn.Conv1d(6, 8, 3, padding=1)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.conv(self.embed(ids).transpose(1, 2))
            return found

    torch.manual_seed(0)
    base = Net()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["embed", "conv"])
    model = PeftModel(base, config, "a")
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    ids = torch.arange(11)[None]
    with torch.no_grad():
        want = model(ids)
    folders = saved(model, tmp_path / "in")
    done = merge_folders(folders, tmp_path / "out", config=HiMergeConfig(density=1.0, scale=1.0))
    assert done.export_error == 0.0
    fresh = Net()
    fresh.load_state_dict(state)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_sources_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    folders = saved(tiny.peft_model("llama", 2, dtype=torch.float32), tmp_path / "in")
    for folder in folders.values():
        path = folder / "adapter_model.safetensors"
        save_file({k: v.to(dtype) for k, v in load_file(path).items()}, path)
    config = HiMergeConfig(density=0.5, scale=1.0, rank=0.9)
    merge_folders(folders, tmp_path / "out", config=config)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {dtype}


def test_the_config_is_portable_and_names_the_modules_shortly_where_that_is_safe(
    tmp_path: Path,
) -> None:
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    folders = saved(model, tmp_path / "in")
    merge_folders(folders, tmp_path / "out", config=HiMergeConfig(density=1.0, scale=1.0))
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    short = {name for one in ("zh", "en") for name in model.peft_config[one].target_modules}
    assert fields["target_modules"] == sorted(short)
    assert fields["r"] == fields["lora_alpha"]
    assert (fields["use_rslora"], fields["rank_pattern"], fields["bias"]) == (False, {}, "none")
    change(folders["zh"], layers_to_transform=[0])
    change(folders["en"], target_modules=".*_proj")
    merge_folders(folders, tmp_path / "out", config=HiMergeConfig(density=1.0, scale=1.0))
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert all("." in name or name == "lm_head" for name in fields["target_modules"])


def change(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(json.dumps(config), encoding="utf-8")


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def first(tensors: dict[str, torch.Tensor], end: str = "lora_A.weight") -> str:
    return next(key for key in sorted(tensors) if key.endswith(end))


def add(key: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda t: t.update({key: torch.ones(2)}))


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (lambda f: change(f, use_dora=True), "use_dora"),
        (lambda f: change(f, lora_bias=True), "lora_bias"),
        (lambda f: change(f, bias="all"), "bias"),
        (lambda f: change(f, modules_to_save=["score"]), "modules_to_save"),
        (lambda f: change(f, trainable_token_indices=[3]), "trainable_token_indices"),
        (lambda f: change(f, some_new_variant={"x": 1}), "some_new_variant"),
        (lambda f: change(f, init_lora_weights="pissa"), "init_lora_weights"),
        (lambda f: change(f, peft_type="LOHA"), "LOHA"),
        (lambda f: change(f, peft_type=None), "peft_type"),
        (lambda f: change(f, r=4, rank_pattern={}), "its config says 4"),
        (lambda f: change(f, r="3"), "r must be a number"),
        (lambda f: change(f, base_model_name_or_path="other"), "different base models"),
        (lambda f: (f / "adapter_config.json").write_text("{", encoding="utf-8"), "valid JSON"),
        (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
        (only_pickle, "Pickle"),
        (truncate, "damaged"),
        (add("base_model.model.x.lora_magnitude_vector"), "DoRA"),
        (add("base_model.model.x.lora_B.bias"), "lora_bias"),
        (add("base_model.model.score.modules_to_save.weight"), "full copy"),
        (add("base_model.model.embed.base_layer.weight"), "save_embedding_layers"),
        (add("base_model.model.embed.token_adapter.trainable_tokens_delta"), "token rows"),
        (add("base_model.model.score.weight"), "no A or B"),
        (lambda f: rewrite(f, lambda t: t.pop(first(t))), "one A and one B"),
        (lambda f: rewrite(f, lambda t: t.clear()), "no factors"),
        (lambda f: rewrite(f, lambda t: t[first(t)].fill_(float("nan"))), "NaN"),
        (lambda f: rewrite(f, lambda t: t[first(t)].fill_(float("inf"))), "infinity"),
        (lambda f: rewrite(f, lambda t: t.update({first(t): t[first(t)][:1].clone()})), "ranks"),
        (
            lambda f: rewrite(
                f, lambda t: t.update({k: v[:, :5].clone() for k, v in t.items() if "_A" in k})
            ),
            "has the shape",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_by_name_and_nothing_is_written(
    harm: Callable[[Path], object], text: str, tmp_path: Path
) -> None:
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    for name in ("zh", "en"):
        model.peft_config[name].base_model_name_or_path = "base"
    folders = saved(model, tmp_path / "in")
    harm(folders["zh"])
    with pytest.raises(AdapterError, match=text) as caught:
        merge_folders(folders, tmp_path / "out", config=HiMergeConfig(density=0.5, scale=1.0))
    assert "'zh'" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_different_bases_merge_if_asked(tmp_path: Path) -> None:
    folders = saved(tiny.peft_model("llama", 2, dtype=torch.float32), tmp_path / "in")
    change(folders["zh"], base_model_name_or_path="one")
    change(folders["en"], base_model_name_or_path="two")
    config = HiMergeConfig(density=1.0, scale=1.0)
    merge_folders(folders, tmp_path / "out", config=config, strict_base=False)
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert fields["base_model_name_or_path"] is None


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    folders = saved(tiny.peft_model("llama", 2, dtype=torch.float32), tmp_path / "in")
    numbers = HiMergeConfig(density=1.0, scale=1.0)
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="nothing can be focused or searched"):
        merge_folders(folders, out)
    with pytest.raises(ConfigError, match="nothing can be focused or searched"):
        merge_folders(folders, out, config=HiMergeConfig(density=0.5))
    with pytest.raises(ConfigError, match="at least one"):
        merge_folders({}, out, config=numbers)
    with pytest.raises(ConfigError, match="folder of adapter 'zh'"):
        merge_folders(folders, folders["zh"], config=numbers)
    with pytest.raises(ConfigError, match="merges no adapter"):
        merge_folders(folders, out, plan=MergePlan.base())
    solo = merge_folders({"zh": folders["zh"]}, tmp_path / "solo", config=numbers).plan
    with pytest.raises(PlanError, match="does not merge the adapter 'en'"):
        merge_folders(folders, out, plan=solo)
    with pytest.raises(PlanError, match="not those the plan was made for"):
        merge_folders({"zh": folders["en"]}, out, plan=MergePlan(
            solo.adapters, merge_folders({"zh": folders["en"]}, tmp_path / "x", config=numbers)
            .plan.edits, sources=solo.sources))  # fmt: skip
    out.write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="is a file"):
        merge_folders(folders, out, config=numbers)


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_nothing_behind_and_nothing_changed(
    existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = saved(tiny.peft_model("llama", 2, dtype=torch.float32), tmp_path / "in")
    out = tmp_path / "out"
    numbers = HiMergeConfig(density=1.0, scale=1.0)
    if existing:
        merge_folders(folders, out, config=numbers)
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    calls = 0
    real = export_room.low_rank

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError("no space left on device")
        return real(*args)

    monkeypatch.setattr(export_room, "low_rank", failing)
    with pytest.raises(OSError, match="no space left"):
        merge_folders(folders, out, config=numbers)
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before
    assert out.exists() == existing


def test_an_existing_folder_keeps_its_other_files(tmp_path: Path) -> None:
    folders = saved(tiny.peft_model("llama", 2, dtype=torch.float32), tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    merge_folders(folders, out, config=HiMergeConfig(density=0.5, scale=1.0, rank=2))
    assert {path.name for path in out.iterdir()} == FILES | {"notes.txt"}
    assert read_folder("again", out).rank == 2


def test_threads_do_not_change_the_result(tmp_path: Path) -> None:
    folders = saved(tiny.peft_model("llama", 2, dtype=torch.float32), tmp_path / "in")
    config = HiMergeConfig(density=0.3, scale=0.9, rank=4)
    written = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            merge_folders(folders, tmp_path / "out", config=config)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
        written.append((tmp_path / "out" / "adapter_model.safetensors").read_bytes())
        shutil.rmtree(tmp_path / "out")
    assert written[0] == written[1]


def test_a_zero_adapter_is_dropped_with_a_warning(tmp_path: Path) -> None:
    folders = saved(tiny.peft_model("llama", 2, dtype=torch.float32), tmp_path / "in")
    rewrite(folders["en"], lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k])
    with pytest.warns(UserWarning, match="'en' changes nothing"):
        done = merge_folders(
            folders, tmp_path / "out", config=HiMergeConfig(density=0.5, scale=1.0)
        )
    assert done.plan.adapters["en"].drops


def test_commands_merge_without_a_base_and_replay_the_plan(tmp_path: Path) -> None:
    folders = saved(tiny.peft_model("llama", 2, dtype=torch.float32), tmp_path / "in")
    given = [x for name, folder in folders.items() for x in ("--adapter", f"{name}={folder}")]
    first, again = tmp_path / "first", tmp_path / "again"
    options = ["--set", "density=0.5", "--set", "scale=0.9", "--set", "rank=3"]
    done = himerge_process("merge", *given, "--out", first, *options)
    assert done.code == 0, done.stderr
    assert "rank 3, relative error" in done.stdout
    done = himerge_process("apply", first / "plan.json", *given, "--out", again, "--rank", "3")
    assert done.code == 0, done.stderr
    weights = [(f / "adapter_model.safetensors").read_bytes() for f in (first, again)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ([], "density and scale cannot be searched"),
        (["--base", "there"], "--eval is missing"),
        (["--eval", "evals.py"], "--base is missing"),
        (["--set", "density=1", "--set", "scale=1", "--merged", "full"], "--merged needs"),
    ],
)
def test_a_merge_command_without_scores_says_what_is_missing(
    more: list[str], text: str, tmp_path: Path
) -> None:
    done = himerge("merge", "--adapter", "a=a", "--out", tmp_path / "out", *more)
    assert done.code == 2
    assert text in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_licences_of_the_sources_go_into_the_card(tmp_path: Path) -> None:
    folders = saved(tiny.peft_model("llama", 2, torch.float32), tmp_path / "in")
    for folder in folders.values():
        (folder / "README.md").write_text("---\nlicense: mit\n---\ntext\n", encoding="utf-8")
    merge_folders(folders, tmp_path / "out", config=HiMergeConfig(density=1.0, scale=1.0))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "\nlicense: mit\n" in card
    assert card.count(", licence mit") == 2
