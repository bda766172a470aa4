"""Gradients of the loss in the target weights, one row per sample or per mini-batch: model + data -> [k, d].

Per sample (grad_batch_size = 1): g_i = ∇_w ℓ(w; x_i), by torch.func.vmap(grad) over micro-batches; a model that
vmap cannot trace (control flow that depends on data, `.item()`) is differentiated one sample at a time, and `why_loop`
says why.
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
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap

from fastfisher.errors import FastFisherError, FisherError
from fastfisher.fisher.batches import SampleReader, Samples
from fastfisher.fisher.blocks import BlockLayout
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

# Above 64 samples a micro-batch no longer gets faster (ResNet-20, one core: 3.3 ms a sample at 16, 2.3 at 64).
MAX_MICRO_BATCH = 64
MAX_ROWS = 256
# Rows handed over at once are long-lived scratch: enough for a matrix product to be efficient, no more.
ROWS_BYTES = 256 << 20
# Samples kept to compare the loss before and after: enough for a mean, few enough to cost little beside the gradients.
KEPT_BYTES = 256 << 20
KEPT_GRADS = 128
# What one sample's forward saves for backward, times this, bounds what vmap(grad) holds for it (measured 1.6 to 2.5).
ACTIVATION_FACTOR = 3

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


class Objective:
    """The loss as a function of the target weights alone: losses(weights, samples) -> [k].

    weights: name -> tensor in the parameter's shape and dtype, for every target name.   grad_batch_size 1: one loss per
    sample; above 1: one loss per call, over all samples given.   `why_loop` is None, or why samples run one at a time.
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
        self.why_loop: str | None = None
        self.model = model
        self.loss_fn = loss_fn
        self._loss = _BatchLoss(model, loss_fn)
        self._aliases = {name: tuple(f"model.{alias}" for alias in aliases[name]) for name in names}
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
        other._fixed = dict(self._fixed)
        for name, weight in self.weights.items():
            if name not in other.weights:
                other._fixed.update(dict.fromkeys(self._aliases[name], weight))
        return other

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
        self, samples: Samples, plain: Callable[[], Any], vmapped: Callable[[], Any] | None = None
    ) -> Any:
        """Run the vmapped form, or from its first failure on the plain one; a failure of that one is the model's."""
        try:
            if vmapped is not None and self.why_loop is None:
                try:
                    with warnings.catch_warnings():
                        # operators that vmap runs sample by sample, such as fused attention: no slower than others here
                        warnings.filterwarnings("ignore", "There is a performance drop because")
                        return vmapped()
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, TypeError) as error:
                    result = plain()
                    self.why_loop = f"{type(error).__name__}: {error}".split("\n")[0].split(". ")[0]
                    return result
            return plain()
        except (FastFisherError, torch.OutOfMemoryError):
            raise
        except _FORWARD_ERRORS as error:
            first, last = samples.origin[0], samples.origin[-1]
            where = f"batch {first}" if first == last else f"batches {first} to {last}"
            raise FastFisherError(
                f"the model failed on {where} of the loader: {type(error).__name__}: {error}"
            ) from error

    def losses(self, weights: Mapping[str, Tensor], samples: Samples) -> Tensor:
        """One loss per sample [k], or [1] over all samples when grad_batch_size > 1."""
        if self.grad_batch_size > 1:
            return self._guarded(samples, lambda: self._batch_loss(weights, samples, samples.leaves)[None])
        return self._guarded(
            samples,
            lambda: torch.stack([self._sample_loss(weights, samples, leaves) for leaves in _each(samples)]),
            lambda: vmap(lambda leaves: self._sample_loss(weights, samples, leaves), randomness="different")(
                samples.leaves
            ),
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
        if self.fisher_type == "exact":
            return self._exact(samples, chunk_size)
        return self._single(self.fisher_type, samples)

    def _single(self, kind: str, samples: Samples) -> tuple[dict[str, Tensor], Tensor]:
        """One row per sample or mini-batch, and its loss."""
        if self.grad_batch_size > 1:
            return self._guarded(samples, lambda: self._plain(kind, samples, samples.leaves))

        def vmapped() -> tuple[dict[str, Tensor], Tensor]:
            one = grad(lambda w, leaves: self._height(kind, w, samples, _alone(leaves)), has_aux=True)
            # no_grad reaches the level outside grad only: nothing else records a graph
            with torch.no_grad():
                return vmap(one, in_dims=(None, 0), randomness="different")(self.weights, samples.leaves)

        return self._guarded(
            samples, lambda: self._looped(samples, lambda x: self._plain(kind, samples, x)), vmapped
        )

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
        grads, losses = self._single("empirical", samples)
        return _along(direction, grads, len(losses))

    def curvatures(self, direction: Mapping[str, Tensor], samples: Samples) -> Tensor:
        """The Fisher along `direction`, δᵀ F_i δ = Σ (g · δ)² over the rows of a sample, in float64 [k]; without λ."""
        grads, losses = self.gradients(samples)
        rows = len(next(iter(grads.values())))
        return _along(direction, grads, rows).square().reshape(len(losses), -1).sum(1)

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
        along = _along(direction, grads, rows) / len(losses)  # [rows]
        return {
            name: (along @ grads[name].reshape(rows, -1).double()).reshape(weight.shape).to(weight.dtype)
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
        return {name: weight.detach().requires_grad_() for name, weight in self.weights.items()}

    def loss_at(self, weights: Mapping[str, Tensor], samples: Samples) -> Tensor:
        """The loss of all samples as one batch at these weights, with a graph where they require a gradient."""
        loss: Tensor = self._guarded(samples, lambda: self._batch_loss(weights, samples, samples.leaves))
        return loss

    def batch_loss(self, samples: Samples) -> Tensor:
        """The loss of all samples as one batch with the model's own weights, without vmap and without a graph."""
        with torch.no_grad():
            loss: Tensor = self._guarded(
                samples, lambda: self._batch_loss(self.weights, samples, samples.leaves)
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

        def run() -> None:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                self._batch_loss(self._differentiable(), samples, samples.leaves)

        self._guarded(samples, run)
        for tensor in [*self.weights.values(), *self._fixed.values(), *samples.leaves]:
            saved.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(saved.values())


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


def _along(direction: Mapping[str, Tensor], grads: Mapping[str, Tensor], rows: int) -> Tensor:
    """g · δ of every row in float64 [k]."""
    total = torch.zeros(rows, dtype=torch.float64, device=next(iter(grads.values())).device)
    for name, delta in direction.items():
        total += grads[name].reshape(rows, -1).double() @ delta.reshape(-1).double()
    return total


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


def chunks(row_bytes: int, num_grads: int, limit: int, activation_bytes: int = 0) -> tuple[int, int]:
    """Rows handed over at once, and samples differentiated at once, such that both fit into `limit` bytes.

    row_bytes: of one gradient.   activation_bytes: of one sample.   Both numbers are at least 1.
    """
    rows = max(1, min(MAX_ROWS, num_grads, min(ROWS_BYTES, limit // 2) // row_bytes))
    each = ACTIVATION_FACTOR * activation_bytes + row_bytes
    return rows, max(1, min(MAX_MICRO_BATCH, rows, (limit - rows * row_bytes) // each))


class GradientStream:
    """Iterate over the gradients of num_grads samples (or mini-batch means) as [k, d] pieces in the layout's order.

    num_grads is m, the divisor of the Fisher.  For fisher_type "exact" every sample gives `rows_per_grad` rows, a piece
    holds those of whole samples, and all counts and norms are those of samples.

    The pieces are float32 (float64 where a target is float64) views of one buffer that the next piece overwrites.
    data: batches, or a reader that goes on where another stream has stopped.
    layout: with the weights wanted; a LiveLayout leaves out those that are removed.
    Gradients or losses that are not finite are left out, counted, and replaced by further samples while the loader has
    any; rows of zeros complete the count after that.
    memory_limit: bytes for buffer, activations and gradients of a micro-batch.
    keep_samples: all samples whose gradients were finite stay in `used`, on the CPU, in their order.

    Raises FastFisherError when the loader is too short or the model fails, FisherError when no gradient is finite.
    """

    def __init__(
        self,
        objective: Objective,
        data: Iterable[Any] | SampleReader,
        layout: BlockLayout,
        *,
        num_grads: int,
        memory_limit: int = 1 << 30,
        keep_samples: bool = False,
    ) -> None:
        self.objective = objective
        self.layout = layout
        self.num_grads = num_grads
        self.num_finite = 0
        self.num_non_finite = 0
        self.first_non_finite: str | None = None
        self.micro_batch = 0
        self.sum_squares = 0.0  # Σ ‖g‖²
        self.sum_fourth = 0.0  # Σ ‖g‖⁴
        self.kept: list[Samples] = []
        self.kept_losses: list[Tensor] = []
        self.used: list[Samples] = []
        self._keep_samples = keep_samples
        self._reader = data if isinstance(data, SampleReader) else SampleReader(data, objective.device)
        self._per_grad = objective.grad_batch_size
        self._each = 1 if objective.fisher_type != "exact" else 0  # rows per gradient, 0 for not yet known
        self._ranges = list(layout.parameter_ranges.items())
        self._reached = [False] * len(self._ranges)
        self._limit = memory_limit
        self.dtype = (
            torch.float64
            if any(w.dtype == torch.float64 for w in objective.weights.values())
            else torch.float32
        )
        known = self._reader.known
        if known is not None and known < num_grads * self._per_grad:
            raise self._too_short(known)
        self._seen_before = self._reader.seen

    @property
    def fingerprint(self) -> str:
        """A hash of the batches read so far."""
        return self._reader.fingerprint

    @property
    def rows_per_grad(self) -> int:
        """Rows that every gradient gives: 1, or for "exact" the outputs of a sample, told by the first one to come."""
        if not self._each:
            self._each = self.objective.rows_per_sample(self._first())
        return self._each

    @property
    def effective(self) -> float:
        """The effective number of gradients, (Σ‖g‖²)² / Σ‖g‖⁴; 0 when all are zero."""
        return self.sum_squares**2 / self.sum_fourth if self.sum_fourth > 0 else 0.0

    @property
    def unreached(self) -> list[str]:
        """Targets that no gradient has reached so far."""
        return [name for (name, _), reached in zip(self._ranges, self._reached, strict=True) if not reached]

    def _too_short(self, samples: int) -> FastFisherError:
        needs = f" of grad_batch_size={self._per_grad}" if self._per_grad > 1 else ""
        text = f"num_grads={self.num_grads}{needs} but the loader yields {samples} samples"
        if self._reader.once and self._seen_before:
            text += (
                f" after the {self._seen_before} of the estimates before; give data that can be read again"
            )
        return FastFisherError(text + ".")

    def _first(self) -> Samples:
        sample = self._reader.peek()
        if sample is None:
            raise self._too_short(0)
        return sample

    def _chunks(self) -> tuple[int, int, int | None]:
        """Gradients in the buffer, samples differentiated at once, and rows of one sample at once where not all."""
        row = self.layout.num_weights * self.dtype.itemsize
        if self._per_grad > 1:
            return chunks(row, self.num_grads, self._limit)[0], 1, None
        activation = self.objective.activation_bytes(self._first())
        each = self.rows_per_grad
        # all rows of a sample must be there before it is known to be finite: in the buffer, and as they came
        if each > 1 and 2 * each * row > self._limit:
            raise FastFisherError(
                f"fisher_type='exact' takes 2 x {each} rows of {self.layout.num_weights} weights for one sample, "
                f"{2 * each * row} bytes where memory_limit is {self._limit}; use fisher_type='mc'"
            )
        rows, at_once = chunks(row, self.num_grads * each, self._limit, activation)
        if at_once >= each:
            return rows // each, at_once // each, None
        return 1, 1, chunks(row, each, self._limit - 2 * each * row, activation)[1]

    def __iter__(self) -> Iterator[Tensor]:
        exactly = self._per_grad > 1
        room_for, self.micro_batch, chunk_size = self._chunks()
        each = self.rows_per_grad
        buffer = torch.empty(
            room_for * each, self.layout.num_weights, dtype=self.dtype, device=self.objective.device
        )  # [rows, d]
        kept_bytes = 0
        filled = 0
        # a loader without end may yield nothing finite: as many failures as gradients asked for are enough
        while self.num_finite < self.num_grads and self.num_non_finite <= self.num_grads:
            wanted = min(self.micro_batch, room_for - filled, self.num_grads - self.num_finite)
            samples = self._reader.take(self._per_grad if exactly else wanted, exactly=exactly)
            if samples is None:
                break
            grads, losses = self.objective.gradients(samples, chunk_size=chunk_size)
            piece = buffer[filled * each : (filled + len(losses)) * each].view(
                len(losses), each, -1
            )  # [k, n_out, d]
            finite = self._write(piece, grads, losses, samples)
            good = int(finite.sum())
            if good < len(finite):
                piece[:good] = piece[finite]
                # a mini-batch mean has one row for all its samples
                samples = samples.pick(finite) if not exactly else samples.narrow(0, good * len(samples))
            room = kept_bytes + samples.nbytes <= KEPT_BYTES and self.num_finite < KEPT_GRADS
            if good and (room or not self.kept):
                self.kept.append(samples)
                self.kept_losses.append(losses[finite.to(losses.device)].double())
                kept_bytes += samples.nbytes
            if good and self._keep_samples:
                self.used.append(samples.cpu())
            self.num_finite += good
            filled += good
            if filled == room_for:
                yield buffer
                filled = 0
        missing = self.num_grads - self.num_finite
        if missing and self.num_finite + self.num_non_finite < self.num_grads:
            raise self._too_short(self._reader.seen - self._seen_before)
        if not self.num_finite:
            raise FisherError(
                f"all {self.num_non_finite} gradients were non-finite (first: {self.first_non_finite}); "
                f"check the loss and the precision of the model"
            )
        if filled:
            yield buffer[: filled * each]
        while missing:
            count = min(room_for, missing)
            yield buffer[: count * each].zero_()
            missing -= count

    def _write(self, piece: Tensor, grads: Mapping[str, Tensor], losses: Tensor, samples: Samples) -> Tensor:
        """Put the gradients into piece [k, n_out, d], note their norms, and tell which of the k are finite."""
        k, each, _ = piece.shape
        came = len(next(iter(grads.values())))
        if came != k * each:
            raise FastFisherError(
                f"fisher_type='exact' needs outputs of one size; batch {samples.origin[0]} of the loader gives "
                f"{came // k} of a sample where the first gave {each}"
            )
        flat = piece.view(came, -1)
        for name, (start, stop) in self._ranges:
            flat[:, start:stop] = self.layout.rows(name, grads[name])
        squares = torch.stack(
            [
                torch.linalg.vector_norm(flat[:, a:b], dim=1, dtype=torch.float64).view(k, each) ** 2
                for _, (a, b) in self._ranges
            ]
        ).sum(2)  # [tensors, k]
        loss_finite = torch.isfinite(losses)
        finite = (torch.isfinite(squares).all(0) & loss_finite).cpu()
        squares = squares.cpu()
        if not bool(finite.all()):
            self.num_non_finite += int((~finite).sum())
            if self.first_non_finite is None:
                row = int((~finite).nonzero()[0])
                batch = samples.origin[min(row, len(samples) - 1)]
                wrong = (~torch.isfinite(squares[:, row])).nonzero()
                if len(wrong):
                    name = self._ranges[int(wrong[0])][0]
                    self.first_non_finite = (
                        f"batch {batch}, {name!r}, {str(grads[name].dtype).removeprefix('torch.')}"
                    )
                else:
                    self.first_non_finite = (
                        f"batch {batch}, the loss, {str(losses.dtype).removeprefix('torch.')}"
                    )
        good = squares[:, finite]
        for i, reached in enumerate((good > 0).any(1).tolist()):
            self._reached[i] = self._reached[i] or reached
        norms = good.sum(0)  # [k]
        self.sum_squares += float(norms.sum())
        self.sum_fourth += float((norms**2).sum())
        return finite
