"""Gradients of the loss in the target weights, one row per sample or per mini-batch: model + data -> [k, d].

Per sample (grad_batch_size = 1): g_i = ∇_w ℓ(w; x_i), by torch.func.vmap(grad) over micro-batches; a model that
vmap cannot trace (control flow that depends on data, `.item()`) is differentiated one sample at a time, and `why_loop`
says why.
Mini-batch means (grad_batch_size = n > 1): g_i = ∇_w of the batch loss over n samples, by plain autograd.

The model is called through torch.func.functional_call on detached weights and on copies of its buffers, so it is never
written.  Source: WoodFisher, eq. 3.3 (empirical Fisher) and its 'fisher-mini-bsz'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fastfisher.errors import FastFisherError, FisherError
from fastfisher.fisher.batches import SampleReader, Samples
from fastfisher.fisher.blocks import BlockLayout

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
def untouched(model: nn.Module, seed: int) -> Iterator[None]:
    """Eval mode and a seeded generator inside; every training flag, buffer and generator state as before outside.

    Only torch's generators are seeded and restored (CPU, and the CUDA devices the model lives on).
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    tensors = [*model.parameters(), *model.buffers()]
    devices = sorted({tensor.device.index or 0 for tensor in tensors if tensor.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            # the flag itself, not .eval(): a model's own train() may do more than set it
            for module, _ in flags:
                module.training = False
            yield
    finally:
        for module, training in flags:
            module.training = training
        for module, name, buffer, value in buffers:
            if buffer is not None and value is not None:
                with torch.no_grad():
                    buffer.copy_(value)
            module._buffers[name] = buffer


class _BatchLoss(nn.Module):
    """One number per batch: loss_fn(model, batch), or model(**batch).loss, or the loss inferred from the label."""

    def __init__(self, model: nn.Module, loss_fn: LossFn | None) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        loss: Any
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
        elif isinstance(batch, tuple) and len(batch) >= 2 and isinstance(batch[-1], Tensor):
            loss = label_loss(self.model(*batch[:-1]), batch[-1])
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
        return loss.reshape(())


def label_loss(output: Any, label: Tensor) -> Tensor:
    """Cross entropy for integer labels [n, ...] and outputs [n, C, ...]; mean squared error for float labels."""
    if not isinstance(output, Tensor):
        output = getattr(output, "logits", None)
        if not isinstance(output, Tensor):
            raise FastFisherError(
                "the model's output is neither a tensor nor has .logits; give loss_fn(model, batch)"
            )
    if label.dtype == torch.bool or label.is_complex():
        raise FastFisherError(f"no loss can be inferred for {label.dtype} labels; give loss_fn(model, batch)")
    if label.is_floating_point():
        if output.numel() != label.numel():
            raise FastFisherError(
                f"float labels must have the shape of the output {tuple(output.shape)}; got {tuple(label.shape)}"
            )
        return F.mse_loss(output, label.reshape(output.shape).to(output.dtype))
    if output.dim() != label.dim() + 1:
        raise FastFisherError(
            f"integer labels of shape {tuple(label.shape)} do not fit outputs of shape {tuple(output.shape)} "
            f"[n, classes, ...]; give loss_fn(model, batch)"
        )
    return F.cross_entropy(output, label.long())


def parameter_aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First name -> all names of each parameter; it is one parameter where memory, shape and strides are the same."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        # tensors without elements share address 0 and are told apart by identity
        place = tensor.data_ptr() if tensor.numel() else -id(tensor)
        groups.setdefault((tensor.device, place, tensor.shape, tensor.stride(), tensor.dtype), []).append(
            name
        )
    return {names[0]: tuple(names) for names in groups.values()}


class Objective:
    """The loss as a function of the target weights alone: losses(weights, samples) -> [k].

    weights: name -> tensor in the parameter's shape and dtype, for every target name.   grad_batch_size 1: one loss per
    sample; above 1: one loss per call, over all samples given.   `why_loop` is None, or why samples run one at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        loss_fn: LossFn | None = None,
        grad_batch_size: int = 1,
    ) -> None:
        aliases = parameter_aliases(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in names:
            if name not in aliases:
                raise FastFisherError(f"{name!r} is not the first name of a parameter of the model")
        self.weights: dict[str, Tensor] = {name: parameters[name].detach() for name in names}
        self.device = next(iter(self.weights.values())).device
        self.grad_batch_size = grad_batch_size
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

    def _batch_loss(
        self, weights: Mapping[str, Tensor], samples: Samples, leaves: Sequence[Tensor]
    ) -> Tensor:
        state = dict(self._fixed)
        for name, weight in weights.items():
            state.update(dict.fromkeys(self._aliases[name], weight))
        # aliases are spelled out above: storage may be shared where torch sees two parameters
        loss: Tensor = functional_call(self._loss, state, (samples.batch(leaves),), tie_weights=False)
        return loss

    def _sample_loss(
        self, weights: Mapping[str, Tensor], samples: Samples, leaves: Sequence[Tensor]
    ) -> Tensor:
        return self._batch_loss(weights, samples, [leaf.unsqueeze(0) for leaf in leaves])

    def _guarded(
        self, samples: Samples, plain: Callable[[], Any], vmapped: Callable[[], Any] | None = None
    ) -> Any:
        """Run the vmapped form, or from its first failure on the plain one; a failure of that one is the model's."""
        try:
            if vmapped is not None and self.why_loop is None:
                try:
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

    def gradients(self, samples: Samples) -> tuple[dict[str, Tensor], Tensor]:
        """Per target the gradients [k, *shape], and the losses [k]; k = 1 when grad_batch_size > 1."""
        if self.grad_batch_size > 1:
            return self._guarded(samples, lambda: self._plain(samples, None))

        def vmapped() -> tuple[dict[str, Tensor], Tensor]:
            one = grad_and_value(lambda w, leaves: self._sample_loss(w, samples, leaves))
            # no_grad reaches the level outside grad_and_value only: nothing else records a graph
            with torch.no_grad():
                return vmap(one, in_dims=(None, 0), randomness="different")(self.weights, samples.leaves)

        def looped() -> tuple[dict[str, Tensor], Tensor]:
            pairs = [self._plain(samples, leaves) for leaves in _each(samples)]
            grads = {name: torch.cat([pair[0][name] for pair in pairs]) for name in self.weights}
            return grads, torch.cat([pair[1] for pair in pairs])

        return self._guarded(samples, looped, vmapped)

    def slopes(self, direction: Mapping[str, Tensor], samples: Samples) -> Tensor:
        """The loss's derivatives along `direction`, g_i · δ in float64 [k]."""
        # forward mode would take as long (ResNet-20, one core) and lacks operators
        grads, losses = self.gradients(samples)
        total = torch.zeros(len(losses), dtype=torch.float64, device=losses.device)
        for name, delta in direction.items():
            total += grads[name].reshape(len(total), -1).double() @ delta.reshape(-1).double()
        return total

    def _plain(self, samples: Samples, leaves: Sequence[Tensor] | None) -> tuple[dict[str, Tensor], Tensor]:
        """Gradient and loss of one sample, or of the whole batch where leaves is None, by plain autograd."""
        with torch.enable_grad():
            weights = {name: weight.detach().requires_grad_() for name, weight in self.weights.items()}
            if leaves is None:
                loss = self._batch_loss(weights, samples, samples.leaves)
            else:
                loss = self._sample_loss(weights, samples, leaves)
            grads: Sequence[Tensor | None] = (None,) * len(weights)
            if loss.requires_grad:
                grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        rows = {
            name: torch.zeros_like(weight)[None] if grad is None else grad[None]
            for (name, weight), grad in zip(weights.items(), grads, strict=True)
        }
        return rows, loss.detach()[None]

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
            return tensor

        def run() -> None:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                weights = {name: weight.detach().requires_grad_() for name, weight in self.weights.items()}
                self._batch_loss(weights, samples, samples.leaves)

        self._guarded(samples, run)
        for tensor in [*self.weights.values(), *self._fixed.values(), *samples.leaves]:
            saved.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(saved.values())


def _each(samples: Samples) -> Iterator[tuple[Tensor, ...]]:
    return (tuple(leaf[i] for leaf in samples.leaves) for i in range(len(samples)))


def chunks(row_bytes: int, num_grads: int, limit: int, activation_bytes: int = 0) -> tuple[int, int]:
    """Rows handed over at once, and samples differentiated at once, such that both fit into `limit` bytes.

    row_bytes: of one gradient.   activation_bytes: of one sample.   Both numbers are at least 1.
    """
    rows = max(1, min(MAX_ROWS, num_grads, min(ROWS_BYTES, limit // 2) // row_bytes))
    each = ACTIVATION_FACTOR * activation_bytes + row_bytes
    return rows, max(1, min(MAX_MICRO_BATCH, rows, (limit - rows * row_bytes) // each))


class GradientStream:
    """Iterate over the gradients of num_grads samples (or mini-batch means) as [k, d] pieces in the layout's order.

    The pieces are float32 (float64 where a target is float64) views of one buffer that the next piece overwrites.
    data: batches, or a reader that goes on where another stream has stopped.
    layout: with the weights wanted; a LiveLayout leaves out those that are removed.
    Gradients or losses that are not finite are left out, counted, and replaced by further samples while the loader has
    any; rows of zeros complete the count after that.
    memory_limit: bytes for buffer, activations and gradients of a micro-batch.

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
        self._reader = data if isinstance(data, SampleReader) else SampleReader(data, objective.device)
        self._per_grad = objective.grad_batch_size
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

    def _chunks(self) -> tuple[int, int]:
        """Rows of the buffer, and samples differentiated at once."""
        row = self.layout.num_weights * self.dtype.itemsize
        if self._per_grad > 1:
            return chunks(row, self.num_grads, self._limit)[0], 1
        sample = self._reader.peek()
        if sample is None:
            raise self._too_short(0)
        return chunks(row, self.num_grads, self._limit, self.objective.activation_bytes(sample))

    def __iter__(self) -> Iterator[Tensor]:
        exactly = self._per_grad > 1
        rows, self.micro_batch = self._chunks()
        buffer = torch.empty(
            rows, self.layout.num_weights, dtype=self.dtype, device=self.objective.device
        )  # [rows, d]
        kept_bytes = 0
        filled = 0
        # a loader without end may yield nothing finite: as many failures as gradients asked for are enough
        while self.num_finite < self.num_grads and self.num_non_finite <= self.num_grads:
            wanted = min(self.micro_batch, rows - filled, self.num_grads - self.num_finite)
            samples = self._reader.take(self._per_grad if exactly else wanted, exactly=exactly)
            if samples is None:
                break
            grads, losses = self.objective.gradients(samples)
            piece = buffer[filled : filled + len(losses)]  # [k, d]
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
            self.num_finite += good
            filled += good
            if filled == rows:
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
            yield buffer[:filled]
        while missing:
            count = min(rows, missing)
            yield buffer[:count].zero_()
            missing -= count

    def _write(self, piece: Tensor, grads: Mapping[str, Tensor], losses: Tensor, samples: Samples) -> Tensor:
        """Put the gradients into piece [k, d], note their norms, and tell which rows are finite [k]."""
        for name, (start, stop) in self._ranges:
            piece[:, start:stop] = self.layout.rows(name, grads[name])
        squares = torch.stack(
            [
                torch.linalg.vector_norm(piece[:, a:b], dim=1, dtype=torch.float64) ** 2
                for _, (a, b) in self._ranges
            ]
        )  # [tensors, k]
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
