"""Adapters from folders, in a live model for a while, and gone again without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel

from .adapters import lora_layers
from .vetting import check_folder, check_placed, loading

__all__ = ["check_folder", "guests"]

_RECORDS = ("targeted_module_names", "targeted_parameter_names")


@contextmanager
def guests(model: PeftModel, folders: Mapping[str, str | Path]) -> Iterator[None]:
    """Load adapters into `model`, frozen and not active, for as long as the context lasts.

    Modules that only a guest adapts are wrapped by PEFT meanwhile; they are unwrapped again, so
    the model ends with the modules it had. The caller keeps flags, active adapters and random
    states (`probe.preserved`).

    Args:
        model: holds no adapter of these names.
        folders: adapter name -> its folder.
    """
    tuner = model.base_model
    at_home = set(lora_layers(model))
    records = {name: list(getattr(tuner, name)) for name in _RECORDS if hasattr(tuner, name)}
    try:
        for name, folder in folders.items():
            check_folder(name, folder)
            with loading(name):
                model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
            check_placed(name, folder, model)
        yield
    finally:
        for name in folders:
            if name in model.peft_config:
                model.delete_adapter(name)
        for module, layer in lora_layers(model).items():
            if module not in at_home:
                tuner.model.set_submodule(module, layer.get_base_layer())
        for name, value in records.items():
            setattr(tuner, name, value)
