"""K-FAC: the Fisher of one layer as a Kronecker product S ⊗ A of its inputs' and output gradients' second moments.

A = E[a aᵀ] over samples and places of weight sharing (pixels, tokens, several calls of a layer), S = E[Σ g gᵀ], the sum
over the places of one sample: exact for one sample with one place.  The flat order of a weight [out, in] makes it
S ⊗ A; a convolution is the linear map of its unfolded patches, and one with groups is a product of its own for each.
The weight [in, out] of a Conv1D of transformers makes it A ⊗ S: there the two change places.
(S ⊗ A + λ I)⁻¹ is applied exactly, in the eigenvectors of both factors, where the usual damping of each factor is not.
Source: Martens & Grosse, 2015; Grosse & Martens, 2016; 'expand' of Eschenhagen et al., 2023.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fastfisher.errors import FastFisherError, FisherError
from fastfisher.fisher.batches import Samples
from fastfisher.fisher.blocks import BlockLayout
from fastfisher.fisher.conjugate import conjugate_gradients
from fastfisher.fisher.conv1d import is_conv1d
from fastfisher.fisher.hessian import target_names
from fastfisher.fisher.inverse import UPDATES, _check_options, absolute_damping, check_weight, checked_vectors
from fastfisher.fisher.layers import source_of
from fastfisher.fisher.objective import Objective, parameter_aliases, untouched

FISHER_TYPES = ("empirical", "mc")
# Patches unfolded at once, in bytes: they are kernel-size times as large as the image they come from.
PATCH_BYTES = 64 << 20
# Kept weights of a layer up to which the joint update is solved with a Cholesky factor.
DIRECT = 2048
# Of the constraint w_Q = 0 in the joint update, relative to w_Q.
TOLERANCE = 1e-8
MAX_ITERATIONS = 1000


@dataclass
class _Factors:
    """What is gathered of one layer.   A: float64 [G, p, p].   S: float64 [G, q, q].   rows: a's in A so far.

    swapped: the weight is [in, out].
    """

    A: Tensor
    S: Tensor
    rows: int = 0
    swapped: bool = False

    def in_order(self) -> tuple[Tensor, Tensor]:
        """The factors of the last and of the first dimension of the weight: A and S, or S and A."""
        return (self.S, self.A) if self.swapped else (self.A, self.S)


@dataclass(frozen=True)
class KroneckerInverse:
    """(S ⊗ A + λ I)⁻¹ of one layer with G groups of q outputs and p inputs.

    shape: of the weight.   A: [G, p, p].   S: [G, q, q].   U, V: their eigenvectors, U of S and V of A.
    spectrum: [G, q, p], eigenvalues of S ⊗ A, without the damping.   All float64.
    """

    shape: torch.Size
    A: Tensor
    S: Tensor
    U: Tensor
    V: Tensor
    spectrum: Tensor
    damping: float

    @classmethod
    def from_factors(cls, shape: torch.Size, A: Tensor, S: Tensor, damping: float) -> KroneckerInverse:
        """Decompose A [G, p, p] and S [G, q, q]; eigenvalues below 0 are rounding and become 0."""
        a, V = torch.linalg.eigh(A)
        s, U = torch.linalg.eigh(S)
        spectrum = s.clamp(min=0)[:, :, None] * a.clamp(min=0)[:, None, :]
        return cls(shape, A, S, U, V, spectrum, damping)

    def grouped(self, x: Tensor) -> Tensor:
        """A tensor like the weight as [G, q, p], float64."""
        return x.double().reshape(self.spectrum.shape)

    def times(self, x: Tensor) -> Tensor:
        """F⁻¹ x.   x: [G, q, p]."""
        return self.U @ ((self.U.mT @ x @ self.V) / (self.spectrum + self.damping)) @ self.V.mT

    def submatrix(self, keep: Tensor) -> Tensor:
        """F[R, R] of the weights where `keep` is True, [r, r].   keep: bool [G, q, p]."""
        g, o, i = keep.nonzero().unbind(1)
        same = g[:, None] == g
        F_ = self.S[g[:, None], o[:, None], o] * self.A[g[:, None], i[:, None], i] * same
        F_.diagonal().add_(self.damping)
        return F_

    def diag(self) -> Tensor:
        """diag F⁻¹, in the shape of the weight: Σ_kl U_ok² V_il² / (s_k a_l + λ)."""
        inverse = 1 / (self.spectrum + self.damping)
        return (self.U.square() @ inverse @ self.V.square().mT).reshape(self.shape)


class KFACInverse:
    """F⁻¹ of the K-FAC Fisher, one (S ⊗ A + λ I)⁻¹ for each layer, behind the interface of `FisherInverse`.

    layout: of the weights; its blocks are not used.   layers: per name.   damping: λ, absolute.   num_grads: samples.
    Sizes, errors and results of the methods are those of `FisherInverse`; all arithmetic is float64.
    """

    form = "kfac"
    mean: Tensor | None = None

    def __init__(
        self, layout: BlockLayout, layers: Mapping[str, KroneckerInverse], *, damping: float, num_grads: int
    ) -> None:
        self.layout = layout
        self.layers = dict(layers)
        self.damping = damping
        self.num_grads = num_grads
        self._diagonal: Tensor | None = None

    @property
    def num_blocks(self) -> int:
        """How many Kronecker products there are: one for each layer, or for each group of a convolution."""
        return sum(len(layer.U) for layer in self.layers.values())

    @property
    def device(self) -> torch.device:
        """Where the factors lie."""
        return next(iter(self.layers.values())).U.device

    def __repr__(self) -> str:
        return (
            f"KFACInverse({self.layout.num_weights} weights, {len(self.layers)} layers, num_grads={self.num_grads}, "
            f"damping={self.damping:g})"
        )

    def _inv_diag(self) -> Tensor:
        """The diagonal [d], computed once."""
        if self._diagonal is None:
            self._diagonal = self.layout.flatten({name: layer.diag() for name, layer in self.layers.items()})
        return self._diagonal

    def diag(self) -> Tensor:
        """The diagonal of F⁻¹, a new float64 [d]."""
        return self._inv_diag().clone()

    def mul(self, v: Tensor | Mapping[str, Tensor]) -> Any:
        """F⁻¹ v, new.   v: [d], [d, n], or named tensors of the layout's shapes; the result has the same form."""
        if isinstance(v, Mapping):
            return self.layout.unflatten(self.mul(self.layout.flatten(v)))
        wide = checked_vectors(v, self.layout.num_weights)
        if v.ndim == 2:
            return torch.stack([self.mul(column) for column in v.unbind(1)], dim=1)
        product = {}
        for name, x in self.layout.unflatten(v.detach()).items():
            layer = self.layers[name]
            product[name] = layer.times(layer.grouped(x)).reshape(layer.shape)
        return self.layout.flatten(product).to(wide)

    def __matmul__(self, v: Tensor | Mapping[str, Tensor]) -> Any:
        """F⁻¹ @ v, the same as `mul`."""
        return self.mul(v)

    def saliency(self, weight: Tensor) -> Tensor:
        """ρ = w² / (2 diag F⁻¹), what removing each weight alone costs.   weight: [d]; returns the like."""
        check_weight(weight, self.layout.num_weights)
        return (weight.detach().double().square() / (2 * self._inv_diag())).to(weight.dtype)

    def prune_update(self, weight: Tensor, mask: Tensor, update: str = "sum") -> Tensor:
        """The weights after removing those outside the mask and correcting the others; new, exactly 0 outside.

        weight: [d] float32/float64, left as it is.   mask: bool [d], True = keep.
        update: "sum" adds the corrections of all removed weights, −F⁻¹ (1_Q ∘ w / diag F⁻¹); "joint" minimises the
        quadratic model, −F⁻¹[:, Q] (F⁻¹[Q, Q])⁻¹ w_Q, layer by layer, directly where few weights are kept, else by
        conjugate gradients on the Kronecker product.
        Raises FastFisherError on wrong input, FisherError where a joint solve breaks down or does not converge.
        """
        check_weight(weight, self.layout.num_weights)
        if mask.shape != weight.shape or mask.dtype != torch.bool:
            raise FastFisherError(
                f"mask must be bool [{self.layout.num_weights}], got {mask.dtype} {list(mask.shape)}"
            )
        if update not in UPDATES:
            raise FastFisherError(f"update must be one of {', '.join(UPDATES)}, got {update!r}")
        w = weight.detach().double()  # [d]
        if update == "sum":
            change = -self.mul(torch.where(mask, 0, w / self._inv_diag()))
        else:
            pieces, masks = self.layout.unflatten(w), self.layout.unflatten(mask)
            change = self.layout.flatten(
                {name: self._joint(name, pieces[name], masks[name]) for name in self.layers}
            )
        return torch.where(mask, w + change, 0).to(weight.dtype)

    def _joint(self, name: str, w: Tensor, mask: Tensor) -> Tensor:
        """The change of the kept weights of one layer when all outside the mask are removed, 0 outside.

        w: the weights.   mask: bool, True = keep.   Both in the shape of the weight, as is the result.
        """
        layer = self.layers[name]
        keep = mask.reshape(layer.spectrum.shape)
        removed = torch.where(keep, 0, layer.grouped(w))
        if int(keep.sum()) <= DIRECT:
            change = self._direct(name, removed, keep)
        else:
            change = self._conjugate_gradients(name, removed, keep)
        return change.reshape(layer.shape)

    def _direct(self, name: str, removed: Tensor, keep: Tensor) -> Tensor:
        """δ_R = F[R, R]⁻¹ F[R, Q] w_Q, for few kept weights, where conjugate gradients are slowest."""
        layer = self.layers[name]
        L, info = torch.linalg.cholesky_ex(layer.submatrix(keep))  # [r, r]
        if info.item() != 0:
            raise FisherError(
                f"the joint update of {name!r} breaks down in float64 at damping={self.damping:g}; use update='sum' "
                f"or a larger damping"
            )
        pull = (layer.S @ removed @ layer.A)[keep]  # [r]
        change = torch.zeros_like(removed)
        change[keep] = torch.cholesky_solve(pull[:, None], L).squeeze(1)
        return change

    def _conjugate_gradients(self, name: str, removed: Tensor, keep: Tensor) -> Tensor:
        """δ_R = −F⁻¹[R, Q] y where F⁻¹[Q, Q] y = w_Q, by products with F⁻¹ alone.

        The residual is what is left of the removed weights.  Most eigenvalues of F⁻¹ lie at 1/λ, so that no
        preconditioner is needed: F[Q, Q] as one made it slower, the diagonal no faster (a digits network, 80 %).
        """
        layer = self.layers[name]
        y, residual = conjugate_gradients(
            lambda x: torch.where(keep, 0, layer.times(x)),
            removed,
            dims=(0, 1, 2),
            tolerance=TOLERANCE,
            max_iterations=MAX_ITERATIONS,
        )
        if not residual <= TOLERANCE:
            raise FisherError(
                f"the joint update of {name!r} does not converge in {MAX_ITERATIONS} conjugate gradients at "
                f"damping={self.damping:g} (relative residual {residual:.2g}); use update='sum' or a larger damping"
            )
        return torch.where(keep, -layer.times(y), 0)


def _layers_of(objective: Objective, names: Sequence[str]) -> dict[str, list[nn.Module]]:
    """The modules that hold each weight, one or, where weights are tied, several of one kind and geometry."""
    aliases = parameter_aliases(objective.model)
    found: dict[str, list[nn.Module]] = {}
    for name in names:
        modules: dict[int, nn.Module] = {}
        for alias in aliases.get(name, ()):
            owner, _, leaf = alias.rpartition(".")
            module = objective.model.get_submodule(owner)
            known = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) or is_conv1d(module)
            if leaf != "weight" or not known:
                raise FastFisherError(
                    f"K-FAC takes the weights of Linear, Conv1d and Conv2d layers; {alias!r} belongs to "
                    f"{type(module).__name__}: leave it out of the targets, or use method='woodfisher'"
                )
            modules[id(module)] = module
        if not modules:
            raise FastFisherError(f"{name!r} is not the first name of a parameter of the model")
        found[name] = list(modules.values())
        kinds = {
            (isinstance(module, nn.Linear), is_conv1d(module), getattr(module, "groups", 1))
            for module in modules.values()
        }
        if len(kinds) > 1:
            raise FastFisherError(
                f"{name!r} is shared by layers of different kinds, which K-FAC cannot add up"
            )
    return found


def _start(weight: Tensor, module: nn.Module) -> _Factors:
    """Factors of zeros for a module's weight [out, in / G, ...], or [in, out] of a Conv1D of transformers."""
    groups, swapped = getattr(module, "groups", 1), is_conv1d(module)
    q, p = weight.shape[0] // groups, weight[0].numel()
    if swapped:
        q, p = p, q
    zeros = torch.zeros(groups, 1, 1, dtype=torch.float64, device=weight.device)
    return _Factors(zeros.repeat(1, p, p), zeros.repeat(1, q, q), swapped=swapped)


def input_rows(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The vectors a that a layer multiplies its weight with, [G, rows, p], a few samples at a time.

    A row of a convolution is a patch of the padded input, in the order (channel, kernel) of the weight.
    """
    if isinstance(module, nn.Linear) or is_conv1d(module):
        yield x.reshape(1, -1, x.shape[-1])
        return
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    if x.ndim == len(module.kernel_size) + 1:
        x = x[None]  # a convolution takes one image without a batch dimension too
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    # one dimension is two, of which the first has size 1
    one = (1,) * (2 - len(module.kernel_size))
    kernel, dilation, stride = (
        (*one, *size) for size in (module.kernel_size, module.dilation, module.stride)
    )
    bytes_each = 8 * x[0].numel() * math.prod(kernel)
    for piece in x.split(max(1, PATCH_BYTES // max(1, bytes_each))):
        piece = F.pad(piece, module._reversed_padding_repeated_twice, mode=mode)
        piece = piece.unsqueeze(2) if one else piece
        patches = F.unfold(piece, kernel, dilation=dilation, stride=stride)  # [n, G p, places]
        n, _, places = patches.shape
        rows = patches.reshape(n, module.groups, -1, places).permute(1, 0, 3, 2)
        yield rows.reshape(module.groups, n * places, -1)


def output_rows(module: nn.Module, g: Tensor) -> Tensor:
    """The gradients in a layer's outputs, [G, rows, q], row by row those that belong to `input_rows`."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return g.reshape(1, -1, g.shape[-1])
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    if g.ndim == len(module.kernel_size) + 1:
        g = g[None]
    rows = g.reshape(g.shape[0], module.groups, module.out_channels // module.groups, -1)  # [n, G, q, places]
    return rows.permute(1, 0, 3, 2).reshape(module.groups, -1, rows.shape[2])


def _moment(rows: Tensor) -> Tensor:
    """Σ r rᵀ in float64.   rows: [G, n, p]; returns [G, p, p]."""
    rows = rows.double()
    return rows.mT @ rows


class _Recorder:
    """Takes the inputs of every layer into A as they pass by, and remembers where their outputs arise."""

    def __init__(self, layers: Mapping[str, list[nn.Module]], factors: Mapping[str, _Factors]) -> None:
        self.layers = layers
        self.factors = factors
        self.calls: list[tuple[str, nn.Module, GradientEdge]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the layers inside, none outside."""
        self.calls = []
        with ExitStack() as hooks:
            for name, modules in self.layers.items():
                for module in modules:
                    handle = module.register_forward_hook(self._hook(name), prepend=True, with_kwargs=True)
                    hooks.callback(handle.remove)
            yield

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else kwargs["x" if is_conv1d(module) else "input"]
            if not output.requires_grad:
                raise FastFisherError(
                    f"the layer of {name!r} runs where no gradient is recorded (torch.no_grad, or a reentrant "
                    f"checkpoint), so K-FAC cannot see its output's gradient"
                )
            # an edge and not the tensor: what follows may overwrite the output in place, of which a view has its base
            source = source_of(output)
            self.calls.append((name, module, get_gradient_edge(output if source is None else source)))
            factors = self.factors[name]
            with torch.no_grad():
                for rows in input_rows(module, x.detach()):
                    factors.A += _moment(rows)
                    factors.rows += rows.shape[1]

        return hook


def draw_labels(objective: Objective, samples: Samples, generator: torch.Generator) -> Samples:
    """The samples with labels drawn from the model's own predictions, y ~ softmax(output): the true Fisher's.

    Raises FastFisherError unless batches are (input, integer label), the loss is inferred and the output has logits.
    """
    skeleton = samples.skeleton
    index = skeleton[-1] if isinstance(skeleton, tuple) and len(skeleton) >= 2 else None
    if (
        objective.loss_fn is not None
        or not isinstance(index, int)
        or samples.leaves[index].is_floating_point()
        or samples.leaves[index].dtype == torch.bool
    ):
        raise FastFisherError(
            "fisher_type='mc' draws labels for batches (input, integer label) whose loss is the inferred cross "
            "entropy; give such batches and no loss_fn, or use fisher_type='empirical'"
        )
    seen: list[Any] = []

    def see(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output)

    handle = objective.model.register_forward_hook(see)
    try:
        with torch.no_grad():
            objective.loss_at(objective.weights, samples)
    finally:
        handle.remove()
    logits = seen[-1] if isinstance(seen[-1], Tensor) else seen[-1].logits
    label = samples.leaves[index]
    probabilities = logits.detach().double().softmax(dim=1).movedim(1, -1).cpu()  # [n, ..., C]
    if not bool(probabilities.isfinite().all()):
        raise FisherError(
            f"no label can be drawn for batch {samples.origin[0]}: the model's outputs are not finite; check "
            f"the data and the precision of the model"
        )
    drawn = torch.multinomial(probabilities.flatten(end_dim=-2), 1, generator=generator)
    # a negative label marks what the loss leaves out
    drawn = torch.where(label < 0, label, drawn.reshape(label.shape).to(label))
    leaves = (*samples.leaves[:index], drawn, *samples.leaves[index + 1 :])
    return Samples(leaves, skeleton, samples.origin)


def _take(objective: Objective, samples: Samples, recorder: _Recorder) -> None:
    """Add the samples' a aᵀ to A and their g gᵀ to S; g is the gradient of a sample's own loss."""
    weights = {name: weight.detach() for name, weight in objective.weights.items()}
    for name in recorder.layers:
        weights[name].requires_grad_()
    with torch.enable_grad():
        with recorder.watching():
            loss = objective.loss_at(weights, samples)
        if not loss.requires_grad:
            return
        # a layer that was not called has no place in the loss, or its weight is used behind the layer's back
        called = {name for name, _, _ in recorder.calls}
        rest = [name for name in recorder.layers if name not in called]
        inputs: list[Any] = [edge for _, _, edge in recorder.calls] + [weights[name] for name in rest]
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    for name, grad in zip(rest, grads[len(recorder.calls) :], strict=True):
        if grad is not None:
            raise FastFisherError(
                f"{name!r} is used without calling its layer, so K-FAC cannot see inputs and outputs; leave it out of "
                f"the targets"
            )
    n = len(samples)
    for (name, module, _), grad in zip(recorder.calls, grads, strict=False):
        if grad is not None:
            # the loss is a mean over n samples: n g for the gradient of one sample's loss
            recorder.factors[name].S += n**2 * _moment(output_rows(module, grad))


def kfac_factors(
    objective: Objective,
    groups: Iterable[Samples],
    names: Sequence[str],
    *,
    fisher_type: str = "empirical",
    seed: int = 0,
) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """A = E[a aᵀ] and S = E[Σ g gᵀ] of every layer, and the number of samples.

    groups: mini-batches, whose loss must be the mean over the samples.   names: of the weights.
    fisher_type: "empirical" takes the labels of the data, "mc" draws one for each sample from the model.
    Returns per name A float64 [G, p, p], S float64 [G, q, q]; zeros for a layer that the loss does not reach.  For a
    weight [in, out] the first is S and the second A.
    Raises FastFisherError on targets that are no layers and without samples, FisherError where a factor is not finite.
    """
    if fisher_type not in FISHER_TYPES:
        raise FastFisherError(f"fisher_type must be one of {', '.join(FISHER_TYPES)}, got {fisher_type!r}")
    layers = _layers_of(objective, names)
    factors = {name: _start(objective.weights[name], modules[0]) for name, modules in layers.items()}
    recorder = _Recorder(layers, factors)
    generator = torch.Generator().manual_seed(seed)
    count = 0
    with untouched(objective.model, seed):
        for samples in groups:
            if fisher_type == "mc":
                samples = draw_labels(objective, samples, generator)
            _take(objective, samples, recorder)
            count += len(samples)
    if not count:
        raise FastFisherError("K-FAC needs at least one sample, the data yielded none")
    for name, found in factors.items():
        found.A /= max(1, found.rows)
        found.S /= count
        if not bool(found.A.isfinite().all() and found.S.isfinite().all()):
            raise FisherError(
                f"the K-FAC factors of {name!r} over {count} samples are not finite; check the loss and the precision "
                f"of the model"
            )
    return {name: found.in_order() for name, found in factors.items()}, count


def kfac_inverse(
    objective: Objective,
    groups: Iterable[Samples],
    layout: BlockLayout,
    *,
    damping: float,
    damping_mode: str = "absolute",
    fisher_type: str = "empirical",
    seed: int = 0,
) -> KFACInverse:
    """(S ⊗ A + λ I)⁻¹ of every layer in the layout.

    layout: of whole weights of Linear, Conv1d and Conv2d layers, or Conv1D of transformers; its blocks do not matter.
    damping: λ, or its ratio to the mean diagonal of S ⊗ A over all layers.
    The other arguments and the errors are those of `kfac_factors`.
    """
    _check_options(damping, damping_mode, "primal")
    shapes = {name: objective.weights[name].shape for name in target_names(layout, objective)}
    if sum(shape.numel() for shape in shapes.values()) != layout.num_weights:
        raise FastFisherError(
            f"K-FAC needs all weights of its layers, the layout holds {layout.num_weights} of "
            f"{sum(shape.numel() for shape in shapes.values())}; give the whole layout, and a mask to prune_update"
        )
    factors, count = kfac_factors(objective, groups, list(shapes), fisher_type=fisher_type, seed=seed)
    if damping_mode == "relative":
        traces = [
            float((_trace(A) * _trace(S)).sum()) for A, S in factors.values()
        ]  # of S ⊗ A, over the groups
        damping = absolute_damping(damping, sum(traces) / layout.num_weights)
    layers = {}
    for name, (A, S) in factors.items():
        try:
            layers[name] = KroneckerInverse.from_factors(shapes[name], A, S, damping)
        except torch.linalg.LinAlgError as error:
            raise FisherError(
                f"the K-FAC factors of {name!r} have no eigendecomposition in float64 at damping={damping:g}: {error}"
            ) from error
    return KFACInverse(layout, layers, damping=damping, num_grads=count)


def _trace(matrices: Tensor) -> Tensor:
    """The trace of every matrix, [G]."""
    return matrices.diagonal(dim1=1, dim2=2).sum(dim=1)
