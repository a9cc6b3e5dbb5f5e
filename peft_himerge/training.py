"""What the callback has to know of a trainer: who shards, what was evaluated, what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, extract_model_from_parallel
from torch import nn

from .errors import ConfigError, suggest
from .events import Listener
from .rounds import ANALYSES, Analysis
from .tracking import JsonlListener, LogListener, TensorBoardListener, WandbListener

__all__ = [
    "EVENTS",
    "blank_memory",
    "check_analysis",
    "checked_names",
    "covers",
    "default_listeners",
    "evaluation_set",
    "kept_state",
    "per_event",
    "put_state",
    "refuse_sharded",
    "unwrap",
]

EVENTS = ("evaluate", "save", "train_end")


def blank_memory() -> dict[str, Any]:
    """Return what the callback remembers before its first round; plain JSON values."""
    return {
        "round": 0,
        "best_score": None,
        "at": None,
        "set": None,
        "seen": {},
        "counts": {},
        "metrics": {},
        "history": [],
    }


def checked_names(
    option: str, values: Any, allowed: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Return a list of names that a user gave as a tuple, after checking it."""
    if isinstance(values, str) or not all(isinstance(value, str) for value in values):
        raise ConfigError(f"{option} must be a list of names, got {values!r}.")
    for value in values if allowed is not None else ():
        if value not in (allowed or ()):
            raise ConfigError(f"{option} got {value!r}.{suggest(value, allowed or ())}")
    return tuple(values)


def per_event(analysis: Any) -> dict[str, Analysis]:
    """Return event -> analysis; an event that a mapping leaves out gets "full"."""
    events = (*EVENTS, "now")
    given = analysis if isinstance(analysis, Mapping) else dict.fromkeys(events, analysis)
    checked_names("analysis", list(given), events)
    for kind in given.values():
        if kind not in ANALYSES:
            raise ConfigError(f"analysis got {kind!r}.{suggest(str(kind), ANALYSES)}")
    return {event: given.get(event, "full") for event in events}


def check_analysis(analysis: Mapping[str, Analysis], *, scored: bool) -> None:
    """Refuse an analysis that cannot be made.

    Args:
        analysis: event -> analysis.
        scored: there are eval functions.

    Raises:
        ConfigError: scores without eval functions.
    """
    if not scored and any(kind != "off" for kind in analysis.values()):
        raise ConfigError(
            "eval_fns is empty: give one function per adapter, or set analysis='off' to save "
            "merged adapters without scoring them."
        )


def unwrap(model: Any) -> Any:
    """Return the model inside DistributedDataParallel, DataParallel or torch.compile."""
    return extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model of which no process holds the whole: none could merge or score it.

    Raises:
        ConfigError: FSDP, DeepSpeed ZeRO-3, or tensor parallelism.
    """
    # The state that accelerate keeps for the trainer; making one would choose a setup for it.
    shared = AcceleratorState._shared_state
    kind = shared.get("distributed_type")
    plugins = shared.get("deepspeed_plugins") or shared.get("deepspeed_plugin")
    plugin = next(iter(plugins.values()), None) if isinstance(plugins, dict) else plugins
    reason = None
    if kind == DistributedType.FSDP:
        reason = "FSDP"
    elif kind == DistributedType.DEEPSPEED and getattr(plugin, "zero_stage", 0) == 3:
        reason = "DeepSpeed ZeRO-3"
    elif any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in model.parameters()):
        reason = "sharded parameters (FSDP, ZeRO-3 or tensor parallelism)"
    if reason is not None:
        raise ConfigError(
            f"HiMergeCallback cannot work with {reason}: every process holds only a part of each "
            f"weight, so none can merge or score. Train without the callback and merge the saved "
            f"adapters afterwards (`himerge merge`), or use data parallelism or ZeRO-1/2."
        )


def covers(done: Sequence[Any] | None, wanted: Sequence[Any]) -> bool:
    """Return True if the round at `done` = (step, weights, analysis) tells all that is wanted."""
    if done is None or list(done[:2]) != list(wanted[:2]):
        return False
    return ANALYSES.index(done[2]) <= ANALYSES.index(wanted[2])


def evaluation_set(metrics: Mapping[str, Any]) -> str:
    """Return the prefix of one evaluation's metrics: "eval", or "eval_<set>" with several sets."""
    for key in metrics:
        for end in ("_runtime", "_loss", "_model_preparation_time"):
            if key.endswith(end):
                return key.removesuffix(end)
    return "eval"


def kept_state(state: Any, name: str, key: str) -> dict[str, Any] | None:
    """Return what a checkpoint kept for the callback of this class name and key, or None."""
    held = state.stateful_callbacks.get(name)
    found = None
    for entry in held if isinstance(held, list) else [held]:
        if entry is not None and entry["args"].get("restore") == key:
            found = entry  # the trainer appends: the last one is the newest
    return None if found is None else found["attributes"]


def put_state(state: Any, name: str, entry: dict[str, Any]) -> None:
    """Put a callback's state where the trainer keeps it, in place of an older one."""
    held = state.stateful_callbacks.get(name)
    if isinstance(held, list):
        key = entry["args"]["restore"]
        others = [old for old in held if old["args"].get("restore") != key]
        state.stateful_callbacks[name] = [*others, entry]
    else:
        state.stateful_callbacks[name] = entry


def default_listeners(root: Path | None, args: Any) -> tuple[Listener, ...]:
    """Return the log, the W&B run if there is one, a file, and TensorBoard if the trainer uses it.

    Args:
        root: folder of the callback's files; None writes no file.
        args: the trainer's arguments, or None.
    """
    made: list[Listener] = [LogListener(), WandbListener()]
    if root is not None:
        made.append(JsonlListener(root / "rounds.jsonl"))
    if args is not None and "tensorboard" in (args.report_to or ()):
        made.append(TensorBoardListener(Path(args.output_dir) / "runs" / "himerge"))
    return tuple(made)
