"""Gradients of the loss in the target weights, one row per sample or per mini-batch: model + data -> [k, d].

Per sample (grad_batch_size = 1): g_i = ∇_w ℓ(w; x_i) over micro-batches, by the first of these ways that works, and
`explain` says which and why:
  by layers     one forward under vmap and one backward to the layers' outputs; each layer's rows follow from its input
                and that gradient (layers.py).  Weights without such a rule go in once for each sample, in the same two
                passes ("torch.func").  The first sample's rows are compared with plain autograd.
  vmap(grad)    where that fails or differs; `why_vmap` says why.
  one by one    a model that vmap cannot trace (control flow that depends on data, `.item()`); `why_loop` says why.
Mini-batch means (grad_batch_size = n > 1): g_i = ∇_w of the batch loss over n samples, by plain autograd.

Three kinds of Fisher, F = (1/m) Σ_i F_i, with J = ∂o/∂w and the loss ℓ(o, y) of outputs and labels:
  empirical   F_i = g_i g_iᵀ with the labels of the data
  mc          the same with labels drawn from the model's prediction, one draw per sample: E[F_i] = Jᵀ ∇²_o ℓ J
  exact       F_i = Jᵀ ∇²_o ℓ J itself, the sum over the outputs: one row per output, per sample only
The losses are those of the data's labels in all three.  Products F v need no rows kept: `Objective.fisher_product`
and, by two gradients of a whole batch, `Objective.antithetic_product`.

The model is called through torch.func.functional_call on detached weights and on copies of its buffers, so it is never
written.  Source: WoodFisher, eq. 3.3 (empirical Fisher) and its 'fisher-mini-bsz', 1.5 and 3.6 (the others).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap

from fastfisher.errors import FastFisherError
from fastfisher.fisher.batches import Samples
from fastfisher.fisher.layers import Call, Capture, NoPadding, ScaledNorm, Unseen, rule_of
from fastfisher.fisher.likelihood import (
    FISHER_TYPES,
    drawn_labels,
    drawn_root,
    hessian_root,
    label_loss,
    logits_of,
)
from fastfisher.fisher.sharded import local

LossFn = Callable[[nn.Module, Any], Tensor]

# Columns that are made float64 at once.
COLUMNS = 1 << 16
# By how much a sample's gradient by layers may differ from plain autograd, of its norm in each tensor: kinks such as
# ReLU's flip under rounding, and a use of a weight that was missed leaves all or much of it.
TOLERANCE = {torch.float64: 0.02, torch.float32: 0.1}
HALF_TOLERANCE = 0.5
# what a model's forward may raise without it being a fault of this package; interrupts and lack of memory pass through
_FORWARD_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every training flag as before outside."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        # the flag itself, not .eval(): a model's own train() may do more than set it
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Attention by operators that have a derivative: torch asks tensors under vmap, which do not say they want one."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def untouched(model: nn.Module, seed: int) -> Iterator[None]:
    """Eval mode and a seeded generator inside; every training flag, buffer and generator state as before outside.

    Only torch's generators are seeded and restored (CPU, and the CUDA devices the model lives on).
    """
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    tensors = [*model.parameters(), *model.buffers()]
    devices = sorted({tensor.device.index or 0 for tensor in tensors if tensor.device.type == "cuda"})
    try:
        with evaluating(model), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        for module, name, buffer, value in buffers:
            if buffer is not None and value is not None:
                with torch.no_grad():
                    buffer.copy_(value)
            module._buffers[name] = buffer


class _BatchLoss(nn.Module):
    """One number per batch: loss_fn(model, batch), or model(**batch).loss, or the loss inferred from the label.

    With it outputs and labels, where they tell the likelihood as `label_loss` does, else None.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn | None) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        loss: Any
        known = None
        if self.loss_fn is not None:
            loss = self.loss_fn(self.model, batch)
        elif isinstance(batch, Mapping):
            output = self.model(**batch)
            loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
            if loss is None:
                raise FastFisherError(
                    f"the model returned no loss for a batch with the keys {sorted(batch)}; add labels to the batch "
                    f"or give loss_fn(model, batch)"
                )
            known = _classified(output, batch.get("labels"))
        elif isinstance(batch, tuple) and len(batch) >= 2 and isinstance(batch[-1], Tensor):
            known = logits_of(self.model(*batch[:-1])), batch[-1]
            loss = label_loss(*known)
        else:
            what = (
                f"a tensor of shape {tuple(batch.shape)}"
                if isinstance(batch, Tensor)
                else f"a {type(batch).__name__}"
            )
            raise FastFisherError(
                f"a batch must be (input, label) or a dict, or loss_fn must be given; got {what}"
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = (
                f"a tensor of shape {tuple(loss.shape)}"
                if isinstance(loss, Tensor)
                else f"{type(loss).__name__}"
            )
            raise FastFisherError(f"the loss of a batch must be one number; got {what}")
        return loss.reshape(()), known


def _classified(output: Any, labels: Any) -> tuple[Tensor, Tensor] | None:
    """Logits [n, C] and labels [n] of a model that classifies and computes its own loss, or None for any other."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        return None
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    # one logit to a sample is a regression, whatever the labels are
    fits = labels.dim() == 1 and logits.dim() == 2 and logits.shape[1] > 1
    return (logits, labels) if whole and fits else None


def parameter_aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First name -> all names of each parameter; it is one parameter where memory, shape and strides are the same."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        # tensors without elements share address 0 and are told apart by identity
        held = local(tensor)
        place = held.data_ptr() if held.numel() else -id(tensor)
        groups.setdefault((tensor.device, place, tensor.shape, tensor.stride(), tensor.dtype), []).append(
            name
        )
    return {names[0]: tuple(names) for names in groups.values()}


class Rows:
    """Where the rows of every target go, [k, *shape] each: here into a dict of tensors."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def wants(self, name: str) -> bool:
        """Whether the rows of a target are wanted at all."""
        return True

    def place(self, name: str) -> Tensor | None:
        """Memory [k, *shape] that the rows may be written into, which makes `put` unnecessary; or None."""
        return None

    def put(self, name: str, rows: Tensor) -> None:
        """Take rows that were made elsewhere."""
        self.found[name] = rows


class _Along(Rows):
    """g · δ of every row in float64, tensor by tensor, with no row kept."""

    def __init__(self, direction: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.direction = direction
        self.total: Tensor | None = None  # [rows]

    def wants(self, name: str) -> bool:
        return name in self.direction

    def put(self, name: str, rows: Tensor) -> None:
        flat, delta = rows.reshape(len(rows), -1), self.direction[name].reshape(-1)
        for part, some in zip(flat.split(COLUMNS, dim=1), delta.split(COLUMNS), strict=True):
            along = part.double() @ some.double()
            self.total = along if self.total is None else self.total + along

    def products(self) -> Tensor:
        """[rows]; raises KeyError where nothing came."""
        if self.total is None:
            raise KeyError("no target lies along the direction")
        return self.total


class Objective:
    """The loss as a function of the target weights alone: losses(weights, samples) -> [k].

    weights: name -> tensor in the parameter's shape and dtype, for every target name.   grad_batch_size 1: one loss per
    sample; above 1: one loss per call, over all samples given.   `why_vmap` is None, or why gradients come from
    vmap(grad) and not by layers; `why_loop` is None, or why samples run one at a time; `explain` has a word for each
    target.
    fisher_type: "empirical", "mc" or "exact".   The last two need to know the likelihood: batches (input, label), or
    dicts with integer labels [n] and a model that returns .logits [n, C].
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        loss_fn: LossFn | None = None,
        grad_batch_size: int = 1,
        fisher_type: str = "empirical",
    ) -> None:
        if fisher_type not in FISHER_TYPES:
            raise FastFisherError(
                f"fisher_type must be one of {', '.join(FISHER_TYPES)}; got {fisher_type!r}"
            )
        if fisher_type == "exact" and grad_batch_size > 1:
            raise FastFisherError(
                f"fisher_type='exact' sums over the outputs of single samples; got grad_batch_size={grad_batch_size}"
            )
        if fisher_type != "empirical" and loss_fn is not None:
            raise FastFisherError(
                f"fisher_type={fisher_type!r} needs labels that tell the likelihood, which loss_fn does not; "
                f"use fisher_type='empirical'"
            )
        aliases = parameter_aliases(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in names:
            if name not in aliases:
                raise FastFisherError(f"{name!r} is not the first name of a parameter of the model")
        self.weights: dict[str, Tensor] = {name: parameters[name].detach() for name in names}
        self.device = next(iter(self.weights.values())).device
        self.grad_batch_size = grad_batch_size
        self.fisher_type = fisher_type
        self.why_vmap: str | None = None
        self.why_loop: str | None = None
        self.model = model
        self.loss_fn = loss_fn
        self._loss = _BatchLoss(model, loss_fn)
        self._aliases = {name: tuple(f"model.{alias}" for alias in aliases[name]) for name in names}
        self._owners: dict[
            str, list[tuple[nn.Module, str]]
        ] = {}  # of the weights that layers give the rows of
        self._unruled: dict[str, str] = {}  # of the others, why
        for name in names:
            self._find_rule(name, aliases[name])
        self._compared = False
        self._scaled_norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        # torch's convolutions on a CPU take up to four times as long where channels come first (16 channels, float32)
        self._channels_last = {
            name
            for name, weight in self.weights.items()
            if weight.dim() == 4
            and name in self._owners
            and all(isinstance(module, nn.Conv2d) for module, _ in self._owners[name])
            and weight.device.type == "cpu"
            and weight.dtype in (torch.float32, torch.bfloat16)
            and torch.backends.mkldnn.is_available()
        }
        target_names = {alias for name in names for alias in aliases[name]}
        # detached, so that no gradient is computed for what is not a target
        self._fixed = {f"model.{n}": p.detach() for n, p in parameters.items() if n not in target_names}
        copies: dict[int, Tensor] = {}
        for name, buffer in model.named_buffers(remove_duplicate=False):
            self._fixed[f"model.{name}"] = copies.setdefault(id(buffer), buffer.detach().clone())

    def only(self, names: Sequence[str]) -> Objective:
        """The same loss as a function of some of the targets, the others staying as they are."""
        other = copy.copy(self)
        other.weights = {name: self.weights[name] for name in names}
        other._owners = {name: self._owners[name] for name in names if name in self._owners}
        other._unruled = {name: self._unruled[name] for name in names if name in self._unruled}
        other._fixed = dict(self._fixed)
        for name, weight in self.weights.items():
            if name not in other.weights:
                other._fixed.update(dict.fromkeys(self._aliases[name], weight))
        return other

    def _find_rule(self, name: str, aliases: Sequence[str]) -> None:
        places = []
        for alias in aliases:
            path, _, key = alias.rpartition(".")
            module = self.model.get_submodule(path)
            rule, why = rule_of(module, key)
            if rule is None:
                self._unruled[name] = why
                return
            places.append((module, key))
        self._owners[name] = places

    def explain(self) -> dict[str, str]:
        """How the gradients of every target come about, and why so where a faster way was not taken."""
        if self.grad_batch_size > 1:
            return dict.fromkeys(self.weights, "plain autograd of the mini-batch")
        if self.why_loop is not None:
            return dict.fromkeys(self.weights, f"one sample at a time: {self.why_loop}")
        if self.fisher_type == "exact":
            return dict.fromkeys(self.weights, "vmap(vjp): one row for each output")
        if self.why_vmap is not None:
            return dict.fromkeys(self.weights, f"vmap(grad): {self.why_vmap}")
        found = {}
        for name in self.weights:
            if name in self._unruled:
                found[name] = f"torch.func: {self._unruled[name]}"
                continue
            hows = []
            for module, key in self._owners[name]:
                rule, _ = rule_of(module, key)
                if rule is not None:
                    hows.append(rule.how(module, key, self.device))
            found[name] = " + ".join(dict.fromkeys(hows))
        return found

    @property
    def fallbacks(self) -> str | None:
        """One sentence on per-sample gradients that do not come by layers, or None; see `explain` for each target."""
        if self.grad_batch_size > 1 or self.fisher_type == "exact":
            return None
        if self.why_loop is not None:
            return f"Samples are differentiated one at a time: vmap cannot trace the model ({self.why_loop})."
        if self.why_vmap is not None:
            return f"All gradients come from torch.func.vmap(grad): {self.why_vmap}."
        if not self._unruled:
            return None
        first, why = next(iter(self._unruled.items()))
        return (
            f"Gradients of {len(self._unruled)} of {len(self.weights)} tensors come from torch.func "
            f"(first: {first!r}, {why})."
        )

    def _laid_out(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of convolutions with their channels last, which the activations follow then."""
        return {
            name: weight.contiguous(memory_format=torch.channels_last)
            if name in self._channels_last
            else weight
            for name, weight in weights.items()
        }

    def _evaluate(
        self, weights: Mapping[str, Tensor], samples: Samples, leaves: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The loss of a batch, and its outputs and labels where they are known."""
        state = dict(self._fixed)
        for name, weight in weights.items():
            state.update(dict.fromkeys(self._aliases[name], weight))
        # aliases are spelled out above: storage may be shared where torch sees two parameters
        result: tuple[Tensor, tuple[Tensor, Tensor] | None] = functional_call(
            self._loss, state, (samples.batch(leaves),), tie_weights=False
        )
        return result

    def _batch_loss(
        self, weights: Mapping[str, Tensor], samples: Samples, leaves: Sequence[Tensor]
    ) -> Tensor:
        return self._evaluate(weights, samples, leaves)[0]

    def _sample_loss(
        self, weights: Mapping[str, Tensor], samples: Samples, leaves: Sequence[Tensor]
    ) -> Tensor:
        return self._batch_loss(weights, samples, _alone(leaves))

    def _outputs(
        self, weights: Mapping[str, Tensor], samples: Samples, leaves: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Outputs, and labels with the loss of the data; raises where the likelihood is not known."""
        loss, known = self._evaluate(weights, samples, leaves)
        if known is None:
            raise FastFisherError(
                f"fisher_type={self.fisher_type!r} needs batches (input, label), or dicts with integer labels [n] and "
                f"a model that returns .logits [n, classes >= 2]; got a dict with the keys {sorted(samples.skeleton)}"
            )
        return known[0], (known[1], loss)

    def _height(
        self, kind: str, weights: Mapping[str, Tensor], samples: Samples, leaves: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What is differentiated for one row, and the loss of the data."""
        if kind == "empirical":
            loss = self._batch_loss(weights, samples, leaves)
            return loss, loss
        output, (label, loss) = self._outputs(weights, samples, leaves)
        return (drawn_root(output.detach(), label) * output).sum(), loss

    def _guarded(
        self,
        samples: Samples,
        plain: Callable[[], Any],
        vmapped: Callable[[], Any] | None = None,
        layered: Callable[[], Any] | None = None,
    ) -> Any:
        """Run the layered form, the vmapped one from its first failure on, and then the plain one.

        A failure of the plain form is the model's.
        """
        try:
            if layered is None or self.why_vmap is not None or self.why_loop is not None:
                return self._vmapped_or_plain(plain, vmapped)
            state = torch.get_rng_state()
            try:
                with _quiet():
                    return self._in_either_layout(layered)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError) as error:
                torch.set_rng_state(state)  # the draws of labels begin again
                result = self._vmapped_or_plain(plain, vmapped)
                if self.why_loop is None:
                    self.why_vmap = _told(error)
                return result
        except (FastFisherError, torch.OutOfMemoryError):
            raise
        except _FORWARD_ERRORS as error:
            first, last = samples.origin[0], samples.origin[-1]
            where = f"batch {first}" if first == last else f"batches {first} to {last}"
            raise FastFisherError(
                f"the model failed on {where} of the loader: {type(error).__name__}: {error}"
            ) from error

    def _vmapped_or_plain(self, plain: Callable[[], Any], vmapped: Callable[[], Any] | None) -> Any:
        if vmapped is None or self.why_loop is not None:
            return self._in_either_layout(plain)
        try:
            with _quiet():
                return self._in_either_layout(vmapped)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:
            result = self._in_either_layout(plain)
            self.why_loop = _told(error)
            return result

    def _in_either_layout(self, run: Callable[[], Any]) -> Any:
        """With channels first from now on where the model cannot have them last, as one with .view(n, -1)."""
        if not self._channels_last:
            return run()
        state = torch.get_rng_state()
        try:
            return run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            torch.set_rng_state(state)
            self._channels_last = set()
            return run()

    def losses(self, weights: Mapping[str, Tensor], samples: Samples) -> Tensor:
        """One loss per sample [k], or [1] over all samples when grad_batch_size > 1."""
        if self.grad_batch_size > 1:
            return self._guarded(
                samples, lambda: self._batch_loss(self._laid_out(weights), samples, samples.leaves)[None]
            )

        def vmapped() -> Tensor:
            laid_out = self._laid_out(weights)
            with self._norms():
                return vmap(
                    lambda leaves: self._sample_loss(laid_out, samples, leaves), randomness="different"
                )(samples.leaves)

        return self._guarded(
            samples,
            lambda: torch.stack([self._sample_loss(weights, samples, leaves) for leaves in _each(samples)]),
            vmapped,
        )

    def rows_per_sample(self, samples: Samples) -> int:
        """Rows that each of these samples gives: the size of its output for "exact", else 1."""
        if self.fisher_type != "exact":
            return 1
        with torch.no_grad():
            output, _ = self._guarded(samples, lambda: self._outputs(self.weights, samples, samples.leaves))
        return int(output[0].numel())

    def gradients(
        self, samples: Samples, *, chunk_size: int | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Per target the rows [k, *shape] of the Fisher, and the losses of the data [k]; k = 1 if grad_batch_size > 1.

        fisher_type "exact": [k n_out, *shape], the rows of a sample one after the other, by backward passes for
        `chunk_size` rows at once (default: all).
        """
        rows = Rows()
        losses = self.write(samples, rows, chunk_size=chunk_size)
        return rows.found, losses

    def write(self, samples: Samples, rows: Rows, *, chunk_size: int | None = None) -> Tensor:
        """`gradients` into places that the caller chooses, tensor by tensor; returns the losses [k]."""
        if self.fisher_type == "exact":
            return _put(self._exact(samples, chunk_size), rows)
        return self._single(self.fisher_type, samples, rows)

    def _single(self, kind: str, samples: Samples, rows: Rows) -> Tensor:
        """One row per sample or mini-batch, and its loss."""
        if self.grad_batch_size > 1:
            return _put(self._guarded(samples, lambda: self._plain(kind, samples, samples.leaves)), rows)

        def vmapped() -> Tensor:
            one = grad(lambda w, leaves: self._height(kind, w, samples, _alone(leaves)), has_aux=True)
            # no_grad reaches the level outside grad only: nothing else records a graph
            with torch.no_grad():
                found = vmap(one, in_dims=(None, 0), randomness="different")(self.weights, samples.leaves)
            return _put(found, rows)

        def plain() -> Tensor:
            return _put(self._looped(samples, lambda x: self._plain(kind, samples, x)), rows)

        def layered() -> Tensor:
            if not self._compared:
                self._compare(samples)
            return self._seen(kind, samples, rows)

        losses: Tensor = self._guarded(samples, plain, vmapped, layered)
        return losses

    def _seen(self, kind: str, samples: Samples, rows: Rows) -> Tensor:
        """`_by_layers`, after those weights are known that layers do not account for."""
        while True:
            try:
                return self._by_layers(kind, samples, rows)
            except Unseen as unseen:
                del self._owners[unseen.name]
                self._unruled[unseen.name] = unseen.why

    def _by_layers(self, kind: str, samples: Samples, rows: Rows) -> Tensor:
        """Rows from the inputs of the layers and the gradients at their outputs, and the losses.

        Raises Unseen where a weight turns out to have no place in this.
        """
        k = len(samples)
        weights, stand_ins = {}, {}
        for name, weight in self.weights.items():
            if name in self._owners:
                weights[name] = weight.detach().requires_grad_()
                stand_ins[name] = weight.detach()
            else:
                weights[name] = weight.detach().expand(k, *weight.shape).requires_grad_()
        stand_ins = {name: weight.requires_grad_() for name, weight in self._laid_out(stand_ins).items()}
        capture = Capture(self._owners, stand_ins, k)

        def heights(w: dict[str, Tensor], zero: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            capture.zero = zero
            return self._height(kind, w, samples, _alone(leaves))

        dims = {name: None if name in self._owners else 0 for name in weights}
        with torch.enable_grad():
            zero = torch.zeros(k, device=self.device)
            odd = NoPadding(stand_ins.values()) if self._unruled else nullcontext()
            with capture.watching(), _without_fast_path(), self._norms(), odd:
                height, loss = vmap(heights, in_dims=(dims, 0, 0), randomness="different")(
                    weights, zero, samples.leaves
                )
            calls = capture.calls
            places: list[Any] = [call.edge for call in calls] + list(weights.values())
            grads: list[Tensor | None] = [None] * len(places)
            if height.requires_grad:
                grads = list(torch.autograd.grad(height.sum(), places, allow_unused=True))
        for name, g in zip(weights, grads[len(calls) :], strict=True):
            if name in self._owners and g is not None:
                raise Unseen(name, "it is used outside the layer that owns it")
        uses = {name: capture.calls_of(name) for name in self._owners}
        left = [sum(i == j for found in uses.values() for j, _ in found) for i in range(len(calls))]
        for at, name in enumerate(weights, len(calls)):
            if not rows.wants(name):
                continue
            if name in self._owners:
                self._put_layer(name, k, [(calls[i], how, grads[i]) for i, how in uses[name]], rows)
            else:
                g = grads[at]
                rows.put(name, weights[name].new_zeros(()).expand(weights[name].shape) if g is None else g)
            grads[at] = None
            for i, _ in uses.get(name, ()):
                left[i] -= 1
                if not left[i]:
                    grads[i] = None
                    calls[i].x = calls[i].x.new_empty(0)
        return loss.detach()

    def _put_layer(
        self, name: str, k: int, found: Sequence[tuple[Call, Any, Tensor | None]], rows: Rows
    ) -> None:
        """The rows of one weight, summed over the calls of its layers that the loss depends on."""
        reached = [(call, how, g) for call, how, g in found if g is not None]
        shape = self.weights[name].shape
        if any(call.overwritten for call, _, _ in reached):
            raise Unseen(name, "the input of its layer was overwritten in place")
        if not reached:
            rows.put(name, self.weights[name].new_zeros(()).expand(k, *shape))
            return
        place = rows.place(name) if len(reached) == 1 else None
        total: Tensor | None = None
        for call, how, g in reached:
            row = how(call, call.output_gradient(g), place)
            total = row if total is None else total + row
        if total is not place and total is not None:
            rows.put(name, total.view(k, *shape))

    def _compare(self, samples: Samples) -> None:
        """Raise RuntimeError where the first sample's rows by layers are not those of plain autograd."""
        one = samples.narrow(0, 1)
        found = Rows()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self._seen("empirical", one, found)
            expected, _ = self._plain("empirical", one, one.leaves)
        norms = {name: float(torch.linalg.vector_norm(row.double())) for name, row in expected.items()}
        total = math.hypot(*norms.values())
        if not math.isfinite(total):
            return  # nothing to compare with: the next samples will tell
        for name, row in expected.items():
            off = float(torch.linalg.vector_norm(found.found[name].double() - row.double()))
            allowed = TOLERANCE.get(row.dtype, HALF_TOLERANCE) * max(norms[name], 0.01 * total)
            if not off <= allowed:
                raise RuntimeError(
                    f"by layers the gradient of {name!r} differs from plain autograd by {off:.2g} of a norm of "
                    f"{norms[name]:.2g}"
                )
        self._compared = True

    def _exact(self, samples: Samples, chunk_size: int | None) -> tuple[dict[str, Tensor], Tensor]:
        """Rows Jᵀ v, v the rows of a root V of the Hessian in the outputs, and losses."""

        def one(leaves: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
            pulled: Any = vjp(lambda w: self._outputs(w, samples, _alone(leaves)), self.weights, has_aux=True)
            output, pull, (label, loss) = pulled
            v = hessian_root(output, label)  # [n_out, 1, ...]
            return vmap(lambda v: pull(v)[0], chunk_size=chunk_size)(v), loss

        def vmapped() -> tuple[dict[str, Tensor], Tensor]:
            with torch.no_grad():
                grads, losses = vmap(one, randomness="different")(samples.leaves)
            return {name: rows.flatten(0, 1) for name, rows in grads.items()}, losses

        def plain(leaves: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
            with torch.enable_grad():
                weights = self._differentiable()
                output, (label, loss) = self._outputs(weights, samples, leaves)
                v = hessian_root(output.detach(), label)
                rows = [_backward((row * output).sum(), weights, again=True) for row in v]
            return {name: torch.cat([row[name] for row in rows]) for name in weights}, loss.detach()[None]

        return self._guarded(samples, lambda: self._looped(samples, plain), vmapped)

    def slopes(self, direction: Mapping[str, Tensor], samples: Samples) -> Tensor:
        """The derivatives of the data's loss along `direction`, ∇ℓ_i · δ in float64 [k], for every fisher_type."""
        # forward mode would take as long (ResNet-20, one core) and lacks operators
        rows = _Along(direction)
        self._single("empirical", samples, rows)
        return rows.products()

    def curvatures(self, direction: Mapping[str, Tensor], samples: Samples) -> Tensor:
        """The Fisher along `direction`, δᵀ F_i δ = Σ (g · δ)² over the rows of a sample, in float64 [k]; without λ."""
        rows = _Along(direction)
        losses = self.write(samples, rows)
        return rows.products().square().reshape(len(losses), -1).sum(1)

    def fisher_product(self, direction: Mapping[str, Tensor], samples: Samples) -> dict[str, Tensor]:
        """F v = (1/k) Σ g (g · v) over the rows g that `gradients` gives for k samples, without λ: name -> its shape.

        direction: v for every target.   Sums run in float64.   fisher_type "mc": a draw for each sample, whose mean is
        the exact product.   With grad_batch_size n > 1 the one row is a mean over n samples and F that of such rows,
        for "mc" 1/n of the Fisher of single samples.
        The model runs in eval mode; the draws are those of torch's generator.
        Source: FishLeg Surgeon (McGowan et al., 2024).
        """
        with evaluating(self.model):
            grads, losses = self.gradients(samples)
        rows = len(next(iter(grads.values())))
        along = _Along(direction)
        for name, row in grads.items():
            along.put(name, row)
        share = along.products() / len(losses)  # [rows]
        return {
            name: (share @ grads[name].reshape(rows, -1).double()).reshape(weight.shape).to(weight.dtype)
            for name, weight in self.weights.items()
        }

    def antithetic_product(
        self, direction: Mapping[str, Tensor], samples: Samples, *, step: float | None = None
    ) -> dict[str, Tensor]:
        """F v by two gradients of the loss of all samples as one batch, (∇ℓ(w + εv; y) − ∇ℓ(w − εv; y)) / 2ε.

        direction: v for every target.   step: ε, by default `difference_step`.   Returns name -> its shape.
        fisher_type "mc": y is drawn once for each sample, from the prediction at w.  The difference is H_y v + O(ε²),
        H_y the Hessian of ℓ, and E[H_y] = Jᵀ ∇²_o ℓ J since E[∇_o ℓ] = 0.  ℓ is the mean over n samples, so that this
        is (1/n) Σ F_i without another factor.  (Where integer labels leave positions out, ℓ is the mean over those that
        count, which weighs a sample by how many it has.)
        "empirical": the labels of the data, which gives the Hessian of their loss and not their empirical Fisher.
        The model runs in eval mode; the draws are those of torch's generator.
        Source: FishLeg Surgeon (McGowan et al., 2024).
        """
        if self.fisher_type == "exact":
            raise FastFisherError(
                "a difference of gradients needs labels; use fisher_type 'mc', or fisher_product for 'exact'"
            )
        epsilon = difference_step(self.weights, direction) if step is None else step
        with evaluating(self.model):
            drawn: Tensor | None = None
            if self.fisher_type == "mc":
                with torch.no_grad():
                    output, (label, _) = self._guarded(
                        samples, lambda: self._outputs(self.weights, samples, samples.leaves)
                    )
                drawn = drawn_labels(output, label)
            ahead = self._slope(_moved(self.weights, direction, epsilon), samples, drawn)
            back = self._slope(_moved(self.weights, direction, -epsilon), samples, drawn)
        return {name: (ahead[name] - back[name])[0] / (2 * epsilon) for name in self.weights}

    def _slope(
        self, weights: Mapping[str, Tensor], samples: Samples, label: Tensor | None
    ) -> dict[str, Tensor]:
        """∇ℓ at these weights as rows [1, *shape], all samples one batch; with the labels of the data, or others."""

        def run() -> dict[str, Tensor]:
            with torch.enable_grad():
                moved = {name: weight.requires_grad_() for name, weight in weights.items()}
                if label is None:
                    return _backward(self._batch_loss(moved, samples, samples.leaves), moved)
                output, _ = self._outputs(moved, samples, samples.leaves)
                return _backward(label_loss(output, label), moved)

        found: dict[str, Tensor] = self._guarded(samples, run)
        return found

    def _looped(
        self, samples: Samples, one: Callable[[Sequence[Tensor]], tuple[dict[str, Tensor], Tensor]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        pairs = [one(_alone(leaves)) for leaves in _each(samples)]
        grads = {name: torch.cat([pair[0][name] for pair in pairs]) for name in self.weights}
        return grads, torch.cat([pair[1] for pair in pairs])

    def _plain(
        self, kind: str, samples: Samples, leaves: Sequence[Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradient and loss of a batch, by plain autograd."""
        with torch.enable_grad():
            weights = self._differentiable()
            height, loss = self._height(kind, weights, samples, leaves)
            rows = _backward(height, weights)
        return rows, loss.detach()[None]

    def _differentiable(self) -> dict[str, Tensor]:
        weights = {name: weight.detach() for name, weight in self.weights.items()}
        return {name: weight.requires_grad_() for name, weight in self._laid_out(weights).items()}

    def _norms(self) -> ScaledNorm | nullcontext[None]:
        """How batch norms run under vmap."""
        return ScaledNorm() if self._scaled_norms else nullcontext()

    def loss_at(self, weights: Mapping[str, Tensor], samples: Samples) -> Tensor:
        """The loss of all samples as one batch at these weights, with a graph where they require a gradient."""
        loss: Tensor = self._guarded(samples, lambda: self._batch_loss(weights, samples, samples.leaves))
        return loss

    def batch_loss(self, samples: Samples) -> Tensor:
        """The loss of all samples as one batch with the model's own weights, without vmap and without a graph."""
        with torch.no_grad():
            loss: Tensor = self._guarded(
                samples, lambda: self._batch_loss(self._laid_out(self.weights), samples, samples.leaves)
            )
        return loss

    def activation_bytes(self, samples: Samples) -> int:
        """Bytes that the forward of these samples, as one batch, saves for its backward, the weights aside."""
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            # not itself: an output that its own node saves would hold the graph for ever
            return tensor.detach()

        def run() -> list[Tensor]:
            weights = self._differentiable()
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                self._batch_loss(weights, samples, samples.leaves)
            return list(weights.values())

        weights = self._guarded(samples, run)
        for tensor in [*weights, *self._fixed.values(), *samples.leaves]:
            saved.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(saved.values())


def _told(error: Exception) -> str:
    """The first sentence of what went wrong."""
    return f"{type(error).__name__}: {error}".split("\n")[0].split(". ")[0]


def _put(found: tuple[dict[str, Tensor], Tensor], rows: Rows) -> Tensor:
    """Hand tensors over and return the losses."""
    grads, losses = found
    while grads:
        name = next(iter(grads))
        row = grads.pop(name)
        if rows.wants(name):
            rows.put(name, row)
    return losses


@contextmanager
def _quiet() -> Iterator[None]:
    """No warning of operators that vmap runs sample by sample, such as fused attention: no slower than others here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop because")
        yield


def _each(samples: Samples) -> Iterator[tuple[Tensor, ...]]:
    return (tuple(leaf[i] for leaf in samples.leaves) for i in range(len(samples)))


def _alone(leaves: Sequence[Tensor]) -> list[Tensor]:
    """One sample as a batch."""
    return [leaf.unsqueeze(0) for leaf in leaves]


def _backward(height: Tensor, weights: Mapping[str, Tensor], *, again: bool = False) -> dict[str, Tensor]:
    """∇ height as rows [1, *shape], zeros where it does not reach; `again` keeps the graph for another one."""
    grads: Sequence[Tensor | None] = (None,) * len(weights)
    if height.requires_grad:
        grads = torch.autograd.grad(height, list(weights.values()), allow_unused=True, retain_graph=again)
    return {
        name: torch.zeros_like(weight)[None] if grad is None else grad[None]
        for (name, weight), grad in zip(weights.items(), grads, strict=True)
    }


def _moved(weights: Mapping[str, Tensor], direction: Mapping[str, Tensor], step: float) -> dict[str, Tensor]:
    """w + εv, in new tensors."""
    return {
        name: torch.add(weight, direction[name].reshape(weight.shape).to(weight), alpha=step)
        for name, weight in weights.items()
    }


def difference_step(weights: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> float:
    """ε = ¼ u^⅓ min(‖w‖₂/‖v‖₂, ‖w‖_∞/‖v‖_∞) for central differences of gradients, u the spacing of floats at 1.

    With η = ε‖v‖/‖w‖ the quotient is off by c η² (curvature: derivatives of the fourth order) and by about u/η
    (rounding), which balance at η ~ (u/c)^⅓.  ¼ stands for a c well above 1 (measured on a small convolutional network:
    10, and an error of 3e-10 in float64, 5e-5 in float32).  Kinks such as ReLU's between w − εv and w + εv add noise
    of mean about 0 over drawn labels; they are the rarer the smaller ε, so float64 hardly meets one.  The second pair
    of norms keeps a v of few large entries from moving these by far more than any weight is large.
    Zero weights count as norm 1, and so does v = 0.
    """
    unit = max(torch.finfo(weight.dtype).eps for weight in weights.values())

    def norm(tensors: Iterable[Tensor], order: float) -> float:
        norms = [torch.linalg.vector_norm(t, order, dtype=torch.float64) for t in tensors]
        return float(torch.linalg.vector_norm(torch.stack(norms), order)) or 1.0

    scale = min(
        norm(weights.values(), order) / norm((direction[name] for name in weights), order)
        for order in (2, float("inf"))
    )
    return unit ** (1 / 3) / 4 * scale
