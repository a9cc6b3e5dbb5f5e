"""The only room that touches live weights: put a plan's state in place, score, put all back.

Two strategies, never arithmetic undo (adding and subtracting a delta changes a fifth of a weight's
elements):

* fold: the weight of each affected module is swapped for W0 + delta; the original parameter object
  goes back in afterwards, so restoring is exact and costs nothing.
* lazy: weights stay as they are; the module's delta is made inside its forward call. An ordinary
  weight is swapped for the duration of the call (same bits as fold); for a quantised or offloaded
  one, the delta's own output is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Literal

import psutil
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .adapters import lora_layers, plain_weight
from .blocks import BlockMemo, find_blocks
from .combine import Combiner, DeltaLike, Term, add_to_weight
from .errors import AdapterError, ConfigError, EvalError, HiMergeError
from .factors import as_matrix
from .interrupts import heard
from .keeping import Settings, Snapshot, Structure, preserved, watch
from .plan import MergePlan
from .randomness import put_back
from .scoring import Score, Task, read_score
from .threads import one_core, spread

__all__ = ["Probe", "Strategy", "preserved"]

Strategy = Literal["auto", "fold", "lazy"]
_What = tuple[Term, ...] | DeltaLike
_SAME = 1e-6  # two scores of one state that differ by less are the same


def _eager(model: nn.Module) -> AbstractContextManager[object]:
    """Run compiled modules as they are written: compiled code need not see swaps and hooks."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()


class Probe:
    """Shows plans in the live model and scores them there; a context manager.

    Inside the context the model is in eval mode with every adapter switched off and the shown
    plan's deltas in place. On leaving, also by an exception, all is as before: the same parameter
    objects, flags, modes, active adapters, RNG states; `interrupts.held` sees to Ctrl-C.

    Args:
        model: the user's model.
        combiner: makes the deltas.
        strategy: "fold", "lazy", or "auto": fold if every affected weight is an ordinary one and a
            second copy of them fits into half of the free memory.
        cache_bytes: memory for sharing blocks between scores (`blocks.BlockMemo`); 0 runs every
            score in full.
        verify: look at every weight's values after every score, and score each task's first state
            twice (`HiMergeConfig.verify`).

    Attributes:
        tainted: True once a weight was found changed only after the scores that it changed.
    """

    def __init__(
        self,
        model: PeftModel,
        combiner: Combiner,
        strategy: Strategy = "auto",
        cache_bytes: int = 0,
        verify: bool = False,
    ) -> None:
        self.model = model
        self.combiner = combiner
        layers = lora_layers(model)
        self._bases = {m: layers[m].get_base_layer() for m in combiner.modules}
        self._check_shapes()
        self.strategy = self._choose(strategy)
        self._shown: dict[str, object] = dict.fromkeys(combiner.modules, ())
        self._swapped: dict[str, nn.Parameter] = {}
        self._hooks: dict[str, list[Any]] = {}
        self._adapter: str | None = None
        self._snapshot: Snapshot | None = None
        self._changed: Callable[[], str | None] | None = None
        self._called: dict[str, None] = {}
        self._verify = verify
        self.tainted = False
        self._doubted: set[str] = set()
        inner = model.base_model.model
        blocks = find_blocks(inner, [g.label for g in combiner.layers]) if cache_bytes else {}
        self.blocks = BlockMemo(inner, blocks, cache_bytes)
        self._owners = self._find_owners(blocks)

    def _find_owners(self, blocks: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
        """Return label -> the adapted modules inside that block, shared ones included."""
        names = {id(base): module for module, base in self._bases.items()}
        return {
            label: tuple(names[id(m)] for m in block.modules() if id(m) in names)
            for label, block in blocks.items()
        }

    def _block_state(self, label: str) -> object:
        """Return a value that is equal exactly if the block's weights are."""
        return self._adapter, tuple(self._shown[module] for module in self._owners[label])

    def _check_shapes(self) -> None:
        for module, base in self._bases.items():
            weight = base._parameters.get("weight")
            if weight is None or weight.dim() < 2 or not plain_weight(base):
                continue
            want = tuple(as_matrix(weight, self.combiner.kind(module)).shape)
            for name, adapter in self.combiner.adapters.items():
                got = adapter.factors[module].shape if module in adapter.factors else want
                if got == want:
                    continue
                raise AdapterError(
                    f"module {module!r}: the delta of {name!r} is {got} but the base weight is "
                    f"{want} (out, in). The adapter was trained on another base model, or the "
                    f"embedding was resized."
                )

    def _choose(self, strategy: Strategy) -> Literal["fold", "lazy"]:
        plain = all(plain_weight(base) for base in self._bases.values())
        if strategy == "fold" and not plain:
            odd = next(m for m, base in self._bases.items() if not plain_weight(base))
            raise AdapterError(
                f"strategy='fold' needs ordinary weights, but {odd!r} is quantised or offloaded. "
                f"Use strategy='lazy' or 'auto'."
            )
        if strategy != "auto":
            return strategy
        return "fold" if plain and self._second_copy_fits() else "lazy"

    def _second_copy_fits(self) -> bool:
        need: dict[torch.device, int] = {}
        for base in self._bases.values():
            weight = base.weight
            need[weight.device] = (
                need.get(weight.device, 0) + weight.numel() * weight.element_size()
            )
        for device, size in need.items():
            cuda = device.type == "cuda"
            free = torch.cuda.mem_get_info(device)[0] if cuda else psutil.virtual_memory().available
            if size > free // 2:
                return False
        return True

    def __enter__(self) -> Probe:
        if self._changed is None:
            self._changed = watch(self.model)
        self._snapshot = Snapshot.take(self.model)
        self._snapshot.set_gradients_aside()
        self._settle()
        self.blocks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            for module in self.combiner.modules:
                self._clear(module)
        finally:
            self.blocks.__exit__()
            assert self._snapshot is not None
            self._snapshot.restore()
            self._snapshot = None
            self._shown = dict.fromkeys(self.combiner.modules, ())
        if kind is None:
            self._refuse_writes()

    def _refuse_writes(self) -> None:
        """Tell of writes to the model that no call could be seen to make."""
        assert self._changed is not None
        called, self._called = list(self._called), {}
        name = self._changed() if called else None
        if name is None:
            return
        self._changed, self.tainted = None, True
        who = f"the eval function of task {called[0]!r}"
        if len(called) > 1:
            tasks = ", ".join(map(repr, called))
            who = f"an eval function (one of the tasks {tasks}; verify=True says which)"
        raise EvalError(
            f"{who} changed the weight {name!r} of the model past torch's records, through .data "
            f"or NumPy. An eval function may only read; score a copy instead. What it wrote over "
            f"is lost: load the model again. No score of this run can be trusted."
        )

    def _settle(self) -> None:
        """Eval mode, and PEFT's own adapters off (or only the one that is shown on)."""
        for module in self.model.modules():
            module.training = False
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                module._disable_adapters = self._adapter is None
                if self._adapter is not None:
                    module._active_adapter = [self._adapter]

    def show(self, plan: MergePlan) -> None:
        """Put the state of `plan` into the model; only modules that differ are touched."""
        self._adapter = None
        wanted = {m: self.combiner.terms(plan, m) for m in self.combiner.modules}
        changed = [m for m, terms in wanted.items() if terms != self._shown[m]]
        for module in changed:
            self._clear(module)
        todo = [m for m in changed if wanted[m]]
        if self.strategy == "fold":
            on_host = all(self._weight(m).device.type == "cpu" for m in todo)
            made = spread(
                lambda m: self._folded(m, self._weight(m), wanted[m]),
                todo,
                most=None if on_host else 1,
            )
            for module, weight in zip(todo, made, strict=True):
                self._fold(module, weight)
                self._shown[module] = wanted[module]
            return
        for module in todo:
            self._hooks[module] = self._hook(module, wanted[module])
            self._shown[module] = wanted[module]

    def show_deltas(self, deltas: Iterable[tuple[str, DeltaLike]]) -> None:
        """Put the given deltas into the model, each as it comes; the base's weights elsewhere.

        With the strategy "fold" no delta is held on to for its size: only the folded weight is.

        Raises:
            ConfigError: a module comes twice, or is not among the combiner's.
        """
        self._adapter = None
        rest = set(self.combiner.modules)
        for module, delta in deltas:
            if module not in rest:
                raise ConfigError(f"module {module!r} came twice, or no adapter changes it.")
            rest.remove(module)
            self._clear(module)
            if self.strategy == "fold":
                with one_core():
                    folded = self._folded(module, self._weight(module), delta)
                self._fold(module, folded)
            else:
                self._hooks[module] = self._hook(module, delta)
            self._shown[module] = object()  # equal to no other state; the delta may be large
        for module in rest:
            self._clear(module)

    def show_adapter(self, name: str) -> None:
        """Put the base weights back and switch one adapter on, through PEFT's own forward."""
        self.show(MergePlan.base())
        self._adapter = name

    def _clear(self, module: str) -> None:
        for hook in self._hooks.pop(module, ()):
            hook.remove()
        original = self._swapped.pop(module, None)
        if original is not None:
            self._bases[module]._parameters["weight"] = original
        self._shown[module] = ()

    def _hook(self, module: str, what: _What) -> list[Any]:
        base = self._bases[module]
        if plain_weight(base):
            return self._swap_hooks(module, what)
        return [base.register_forward_hook(self._add_hook(module, what))]

    def _fold(self, module: str, folded: nn.Parameter) -> None:
        self._swapped[module] = self._weight(module)
        self._bases[module]._parameters["weight"] = folded

    def _weight(self, module: str) -> nn.Parameter:
        weight: nn.Parameter | None = self._bases[module]._parameters["weight"]
        assert weight is not None
        return weight

    def _folded(self, module: str, weight: Tensor, what: _What) -> nn.Parameter:
        """Return W0 + delta in W0's dtype, made block by block without a dense delta."""
        if isinstance(what, tuple):
            blocks = self.combiner.blocks(module, what)
        else:
            blocks = what.blocks()
        new = add_to_weight(weight.detach(), self.combiner.kind(module), blocks)
        return nn.Parameter(new, requires_grad=False)

    def _swap_hooks(self, module: str, what: _What) -> list[Any]:
        base = self._bases[module]
        kept: list[nn.Parameter] = []

        def before(_module: nn.Module, _args: Any) -> None:
            original = self._weight(module)
            with one_core():
                folded = self._folded(module, original, what)
            kept.append(original)
            self._swapped[module] = original
            base._parameters["weight"] = folded

        def after(_module: nn.Module, _args: Any, _output: Any) -> None:
            if kept:
                base._parameters["weight"] = kept.pop()
                self._swapped.pop(module, None)

        return [
            base.register_forward_pre_hook(before),
            base.register_forward_hook(after, always_call=True),
        ]

    def _add_hook(self, module: str, what: _What) -> Callable[..., Any]:
        base = self._bases[module]
        if self.combiner.kind(module) != "linear":
            raise AdapterError(
                f"module {module!r}: a quantised or offloaded {type(base).__name__} cannot be "
                f"scored; only linear layers can."
            )

        def add(_module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if isinstance(what, tuple):
                delta = self.combiner.delta(module, what)
            else:
                delta = what.dense()
            delta = delta.to(args[0].device)
            return output + F.linear(args[0].to(delta.dtype), delta).to(output.dtype)

        return add

    def call(self, task: Task) -> Score:
        """Score the state in place with one task's eval function.

        Every call starts from the same RNG states, so equal states give equal scores even if the
        eval function samples. What it does to flags, settings, gradients and random states ends
        with the call.

        Raises:
            EvalError: the function returned no score, or changed weights, modules, hooks or
                adapters of the model; all but what it wrote into a weight is put back. With
                `verify`: also if it gave the same state two scores.
        """
        score = self._called_once(task)
        if self._verify and task.name not in self._doubted:
            self._doubted.add(task.name)
            again = self._called_once(task)
            if not math.isclose(score.value, again.value, rel_tol=_SAME, abs_tol=_SAME):
                raise EvalError(
                    f"the eval function of task {task.name!r} is random: it gave the same state "
                    f"the scores {score.value!r} and {again.value!r}. Let it draw from torch's, "
                    f"NumPy's or Python's global generator, which are set before every call, or "
                    f"give its own a fixed seed inside the function."
                )
        return score

    def _called_once(self, task: Task) -> Score:
        assert self._snapshot is not None, "call() outside the context"
        self._settle()
        put_back(self._snapshot.rng)
        self._called[task.name] = None
        settings, structure = Settings.take(), Structure(self.model)
        changed_values = watch(self.model) if self._verify else None
        try:
            scoring = self.blocks.scoring(task.name, self._block_state)
            with torch.no_grad(), _eager(self.model), scoring, heard():
                raw = task.fn(self.model)
        except Exception as exc:
            if hasattr(exc, "add_note") and not isinstance(exc, HiMergeError):  # Python >= 3.11
                exc.add_note(f"raised by the eval function of task {task.name!r}")
            raise
        finally:
            settings.restore()
            self._snapshot.set_gradients_aside()
            copies = {id(self._weight(module)) for module in self._swapped}
            changed, whole = structure.put_back(copies)
        if changed is None and changed_values is not None and (name := changed_values()):
            changed = f"changed the weight {name!r}"
            whole = id(self.model.get_parameter(name)) in copies
        if changed is not None:
            raise EvalError(
                f"the eval function of task {task.name!r} {changed} of the model. An eval function "
                f"may only read; score a copy instead."
                + ("" if whole else " What it wrote over is lost: load the model again.")
            )
        return read_score(raw, task)
