"""The live model with any multiples of the adapters' deltas, differentiable in the multiples.

    y = W0 x + sum_i c_i * scaling_i * B_i (A_i x)

Nothing is added to a weight and no delta is formed: a hook on each adapted module adds the low-rank
branch to its output, so that quantised and offloaded weights are left alone too. A gradient reaches
the multiples c (and whatever is computed from them), never a parameter.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .adapters import lora_layers
from .batches import Batch, Batches, counted_tokens, read_batches
from .combine import Combiner
from .errors import ConfigError
from .factors import Kind, LoraFactors, working_dtype
from .interrupts import heard
from .probe import Probe, preserved
from .recording import record

__all__ = ["Evidence", "Mixture", "Watch", "chunk_of_row", "gather", "logits_of"]

# (module, its input, its output) -> the output to go on with.
Watch = Callable[[str, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What a method that learns from inputs may look at.

    Attributes:
        model: the user's model.
        combiner: the adapters.
        batches: the examples of each adapter's task.
        seed: the user's seed.
    """

    model: PeftModel
    combiner: Combiner
    batches: Batches
    seed: int

    @contextmanager
    def mixture(self) -> Iterator[Mixture]:
        """Lend the live model; afterwards, also after an exception or Ctrl-C, it is as before.

        Inside, it is in eval mode with PEFT's adapters off, no parameter takes a gradient,
        gradient checkpointing and the key/value cache are off.
        """
        # Inside a user's inference_mode nothing could be differentiated.
        with torch.inference_mode(False), torch.no_grad(), preserved(self.model):
            _settle(self.model)
            mixture = Mixture(self.model, self.combiner)
            hooks: list[Any] = []
            try:
                for module, base in mixture.bases.items():
                    hooks.append(base.register_forward_hook(mixture.hook(module)))
                if mixture.is_encoder_decoder:
                    encoder = self.model.base_model.model.get_encoder()
                    hooks.append(encoder.register_forward_hook(mixture.encoder_hook))
                yield mixture
            finally:
                for hook in hooks:
                    hook.remove()


def _settle(model: PeftModel) -> None:
    for parameter in model.parameters():
        parameter.requires_grad = False
    for module in model.modules():
        module.training = False
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            module._disable_adapters = True
        if "gradient_checkpointing" in vars(module):
            module.gradient_checkpointing = False
    config = getattr(model.base_model.model, "config", None)
    if config is not None and getattr(config, "use_cache", None):
        config.use_cache = False


@dataclass(frozen=True, slots=True, eq=False)
class _Branch:
    """What is added to a module's output: ``(b * scale) @ (a @ x)``.

    Attributes:
        a: (R, in).
        b: (out, R), LoRA's scaling applied.
        scale: (R,), or (out, R) if it differs by row; None is 1.
    """

    a: Tensor
    b: Tensor
    scale: Tensor | None = None

    def up(self, z: Tensor) -> Tensor:
        """Return (..., out) of z (..., R)."""
        b = self.b.to(z.device)
        if self.scale is None:
            return z @ b.t()
        scale = self.scale.to(z.device)
        return z @ (b * scale).t() if scale.dim() == 2 else (z * scale) @ b.t()


class Mixture:
    """The live model inside `Evidence.mixture`; shows the base until told otherwise.

    Attributes:
        bases: module path -> the module whose output the deltas are added to.
        names: adapter names, sorted.
        watch: looks at, and may change, every adapted module's output; None for nobody.
    """

    def __init__(self, model: PeftModel, combiner: Combiner) -> None:
        layers = lora_layers(model)
        self._model = model
        self._combiner = combiner
        self.bases: dict[str, nn.Module] = {m: layers[m].get_base_layer() for m in combiner.modules}
        self.names = tuple(combiner.adapters)
        self.watch: Watch | None = None
        self._joint = {m: self._stacked(m) for m in combiner.modules}
        self._now: dict[str, _Branch] = {}
        self._encoded: Tensor | None = None
        inner = model.base_model.model
        self._head_is_free = "logits_to_keep" in inspect.signature(inner.forward).parameters and (
            inner.get_output_embeddings() not in (None, *map(layers.get, self.bases))
        )
        self.is_encoder_decoder = bool(
            getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
        )

    def _factors(self, module: str) -> list[LoraFactors | None]:
        return [a.factors.get(module) for a in self._combiner.adapters.values()]

    def _stacked(self, module: str) -> tuple[_Branch, Tensor]:
        """Return all adapters' branch in one, and which adapter each of its rank-one terms is."""
        held = [(i, f) for i, f in enumerate(self._factors(module)) if f is not None]
        dtype = working_dtype(*(f.dtype for _, f in held))
        device = held[0][1].b.device
        pairs = [tuple(x.to(device, dtype) for x in f.scaled()) for _, f in held]
        owner = torch.tensor([i for i, f in held for _ in range(f.rank)], device=device)
        joint = _Branch(torch.cat([a for _, a in pairs]), torch.cat([b for b, _ in pairs], dim=1))
        return joint, owner

    def kind(self, module: str) -> Kind:
        """Return how `module` stores its weight."""
        return self._combiner.kind(module)

    def show(self, multiples: Mapping[str, Tensor]) -> None:
        """Put multiples of all deltas in place of what is shown.

        Args:
            multiples: module -> (adapters,) in the order of `names`, or (adapters, chunks) where
                the rows of a delta are cut into equally large chunks with multiples of their own.
                Modules that are not named show the base.
        """
        self._now = {}
        for module, c in multiples.items():
            joint, owner = self._joint[module]
            with torch.enable_grad():
                own = c.to(joint.b.dtype).to(joint.b.device)[owner]
                if own.dim() == 2:
                    own = own[:, chunk_of_row(joint.b.shape[0], own.shape[1]).to(own.device)].t()
            self._now[module] = _Branch(joint.a, joint.b, own)

    def solo(self, name: str) -> None:
        """Show one adapter alone, as it was trained."""
        self._now = {}
        for module, f in self._combiner.adapters[name].factors.items():
            b, a = f.scaled()
            self._now[module] = _Branch(a, b)

    def lend(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Show other deltas: module -> (B, A), scaling included; others show the base."""
        self._now = {module: _Branch(a, b) for module, (b, a) in factors.items()}

    def hook(self, module: str) -> Callable[..., Tensor]:
        """Return the forward hook of one adapted module."""

        def after(base: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            branch = self._now.get(module)
            if branch is not None:
                output = (output + self._added(module, base, args[0], branch)).to(output.dtype)
            return output if self.watch is None else self.watch(module, args[0], output)

        return after

    def encoder_hook(self, _encoder: nn.Module, _args: Any, output: Any) -> None:
        """Note which tensor an encoder-decoder's encoder gave."""
        self._encoded = output[0]

    def _added(self, module: str, base: Any, x: Tensor, branch: _Branch) -> Tensor:
        kind = self.kind(module)
        a = branch.a.to(x.device)
        if kind == "embedding":
            scale = getattr(base, "embed_scale", None)  # Gemma multiplies after the look-up
            added = branch.up(F.embedding(x, a.t()))
            return added if scale is None else added * scale.to(added)
        x = x.to(a.dtype)
        if kind != "conv":
            return branch.up(x @ a.t())
        kernel = self._kernel(module)
        z = base._conv_forward(x, a.reshape(a.shape[0], -1, *kernel), None)
        channel = -1 - len(kernel)
        return branch.up(z.movedim(channel, -1)).movedim(-1, channel)

    def _kernel(self, module: str) -> tuple[int, ...]:
        return next(f.kernel for f in self._factors(module) if f is not None)

    def run(self, batch: Batch, *, grad: bool = False, logits: bool = True) -> Any:
        """Call the model in the state that is shown.

        Args:
            batch: what it is called with; moved to the model's device.
            grad: True to keep what a gradient needs.
            logits: False if nobody reads the logits; then those of one position do, where the model
                can leave the others out: they are its largest tensor, and its largest product.
        """
        device = next(self._model.parameters()).device
        placed: dict[str, Any] = {
            k: v if device.type == "meta" else v.to(device) for k, v in batch.items()
        }
        if not logits and self._head_is_free:
            placed.pop("labels", None)  # a loss would ask for all of them
            # A position, not a number: of a slice PyTorch copies the head once per row (bfloat16,
            # CPU, 32 rows, 262,144 tokens: 59 s in place of 0.06).
            placed["logits_to_keep"] = torch.zeros(1, dtype=torch.long)
        with torch.set_grad_enabled(grad), heard():
            return self._model(**placed)

    def alone(self, name: str, batch: Batch) -> Any:
        """Call the model with one adapter alone and go back to what was shown; no gradient.

        Args:
            name: the adapter.
            batch: as for `run`.
        """
        shown = self._now
        try:
            self.solo(name)
            return self.run(batch)
        finally:
            self._now = shown

    @contextmanager
    def reading(self, blocks: Sequence[str]) -> Iterator[list[tuple[str, Tensor]]]:
        """Note what blocks give while the model runs.

        Not by the model's own `output_hidden_states`, which leaves hooks behind in transformers 5.

        Args:
            blocks: module paths.

        Returns:
            A list that each run extends by (block, its output in float32 or wider).
        """
        found: list[tuple[str, Tensor]] = []

        def note(block: str) -> Callable[..., None]:
            def after(_block: nn.Module, _args: Any, output: Any) -> None:
                first = output[0] if isinstance(output, tuple) else output
                found.append((block, first.to(working_dtype(first.dtype))))

            return after

        hooks: list[Any] = []
        try:
            for block in blocks:
                inner = self._model.base_model.model.get_submodule(block)
                hooks.append(inner.register_forward_hook(note(block)))
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def tokens(self, module: str, batch: Batch, x: Tensor) -> Tensor:
        """Return a module's inputs, or a block's outputs, as rows without those of padding.

        Args:
            module: its path.
            batch: what the model was given.
            x: (..., width).

        Returns:
            (rows, width).
        """
        decoder = self.is_encoder_decoder and "encoder" not in module.split(".")
        if self._encoded is not None and x.data_ptr() == self._encoded.data_ptr():
            decoder = False  # cross-attention reads what the encoder gave
        mask = counted_tokens(batch, x.shape[:-1], decoder=decoder)
        return x.flatten(0, -2) if mask is None else x[mask.to(x.device)]

    def patches(self, module: str, x: Tensor) -> Iterator[Tensor]:
        """Yield, example by example, what a convolution multiplies its kernel with.

        Args:
            module: its path.
            x: its input, (examples, channels, *size), or without examples.

        Returns:
            Each (positions of the output, channels * prod(kernel)), a row in the order of a
            kernel's entries; zeros where it reads its own padding.
        """
        base: Any = self.bases[module]
        kernel = self._kernel(module)
        size = x.shape[-len(kernel) :]
        # Where each entry of the kernel reads, 1 for the first place: found by the convolution
        # itself, whatever its stride, padding and dilation. In float64, which some devices lack, no
        # place is rounded.
        places = torch.arange(1, math.prod(size) + 1, dtype=torch.float64)
        probes = torch.eye(math.prod(kernel)).double().reshape(-1, 1, *kernel)
        read = base._conv_forward(places.reshape(1, 1, *size), probes, None)[0].flatten(1).long()
        read = read.to(x.device)
        for example in x.reshape(-1, x.shape[-len(kernel) - 1], math.prod(size)):
            yield F.pad(example, (1, 0))[:, read].flatten(0, 1).t()


def chunk_of_row(rows: int, chunks: int) -> Tensor:
    """Return the number of the chunk that each row is in; sizes differ by at most one."""
    return torch.arange(rows) * chunks // rows


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output, in float32 or wider.

    Raises:
        ConfigError: it has none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise ConfigError(
            f"the model must return logits, (examples, ..., classes), got "
            f"{type(output).__name__}. Merge adapters of a model with a head."
        )
    return logits.to(working_dtype(logits.dtype))


def gather(
    model: PeftModel,
    names: Sequence[str],
    inputs: Any,
    carried: Mapping[str, Any],
    seed: int,
) -> Callable[[Probe], Evidence] | None:
    """Check what the user gave to learn from; return what makes it evidence, None for nothing.

    Args:
        model: the user's model; it runs only for eval functions among the inputs.
        names: the adapters.
        inputs: adapter -> batches, or the task's eval function; or None.
        carried: what the adapters hold beside their factors.
        seed: the user's seed.

    Raises:
        ConfigError: see `batches.read_batches`; or the adapters hold more than factors, which the
            live model would not show.
    """
    if inputs is None:
        return None
    if carried:
        raise ConfigError(
            f"methods that learn from inputs run the model with the adapters' deltas alone, but "
            f"these adapters also have {', '.join(carried)}. Choose a method that needs nothing."
        )
    if isinstance(inputs, Mapping):
        inputs = {n: record(model, n, one) if _is_eval(one) else one for n, one in inputs.items()}
    batches = read_batches(model.base_model.model, names, inputs)
    return lambda probe: Evidence(model, probe.combiner, batches, seed)


def _is_eval(given: Any) -> bool:
    return callable(given) and not isinstance(given, (Iterable, type))
