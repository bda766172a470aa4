"""What labels stand for: the loss ℓ(o, y) of outputs o, and vectors v whose outer products are its Hessian there.

Integer labels [n, ...] stand for a softmax p over the outputs [n, C, ...]: ℓ is the mean of −log p_y over samples and
positions.  Float labels stand for a Gaussian: ℓ is the mean of (o − y)², and exp(−ℓ) of one sample with n_out outputs
has the variance n_out / 2 in each.  Bool labels stand for independent Bernoulli variables with the logits o, that is
p = 1 / (1 + exp(−o)): ℓ is the mean of −log p where y is true and −log(1 − p) elsewhere.  With P positions in a sample,

    softmax    ∇²_o ℓ = (1/P) (diag(p) − p pᵀ) at each position = (1/P) Σ_c p_c (p − e_c)(p − e_c)ᵀ
    Gaussian   ∇²_o ℓ = (2/n_out) I
    Bernoulli  ∇²_o ℓ = (1/n_out) diag(p (1 − p))

and none depends on y: the labels tell which of the three it is, and which positions cross entropy leaves out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfisher.errors import FastFisherError

FISHER_TYPES = ("empirical", "mc", "exact")

_IGNORED = -100  # the label that cross entropy leaves out of its mean


def logits_of(output: Any) -> Tensor:
    """The output itself, or its `.logits`."""
    if not isinstance(output, Tensor):
        output = getattr(output, "logits", None)
        if not isinstance(output, Tensor):
            raise FastFisherError(
                "the model's output is neither a tensor nor has .logits; give loss_fn(model, batch)"
            )
    return output


def label_loss(output: Tensor, label: Tensor) -> Tensor:
    """Cross entropy for integer labels [n, ...] and outputs [n, C, ...]; for a label to each output mean squared error
    if labels are floats, binary cross entropy with logits if they are bools.
    """
    if label.is_complex():
        raise FastFisherError(f"no loss can be inferred for {label.dtype} labels; give loss_fn(model, batch)")
    if label.is_floating_point() or label.dtype == torch.bool:
        if output.numel() != label.numel():
            kind, way_out = (
                ("float", "") if label.is_floating_point() else ("bool", "; labels of classes are integers")
            )
            raise FastFisherError(
                f"{kind} labels must have the shape of the output {tuple(output.shape)}; got {tuple(label.shape)}"
                f"{way_out}"
            )
        wanted = label.reshape(output.shape).to(output.dtype)
        if label.dtype == torch.bool:
            return F.binary_cross_entropy_with_logits(output, wanted)
        return F.mse_loss(output, wanted)
    if output.dim() != label.dim() + 1:
        raise FastFisherError(
            f"integer labels of shape {tuple(label.shape)} do not fit outputs of shape {tuple(output.shape)} "
            f"[n, classes, ...]; give loss_fn(model, batch)"
        )
    return F.cross_entropy(output, label.long())


def drawn_labels(output: Tensor, label: Tensor) -> Tensor:
    """y ~ what the output predicts, in the shape of `label` and as `label_loss` takes it: int64, bool, or floats.

    Integers y ~ softmax(o) at every position, and what cross entropy leaves out stays so; bools that are true with the
    probability p; floats y = o + N(0, n_out / 2) in the output's dtype.   `drawn_root` makes the same draws.
    """
    output = output.detach()
    if label.is_floating_point():
        spread = (output.numel() / output.shape[0] / 2) ** 0.5
        return (output + spread * _normal(output)).to(output.dtype).reshape(label.shape)
    if label.dtype == torch.bool:
        return _drawn_bits(output.double().sigmoid()).reshape(label.shape)
    drawn = _drawn_classes(output.double().softmax(1))[:, 0]
    return torch.where(label.long() == _IGNORED, _IGNORED, drawn)


def drawn_root(output: Tensor, label: Tensor) -> Tensor:
    """v in the shape of the output, drawn such that E[v vᵀ] = ∇²_o ℓ / n: √P times ∇_o ℓ for labels the model predicts.

    output: [n, ...], label: as in `label_loss`, ℓ their mean over n samples.   The labels are those of `drawn_labels`;
    √P makes up for the mean over independent positions, whose gradient has 1/P of that Hessian (P = n_out for bool
    labels; 1 for float labels, as their variance does it).   Source: WoodFisher, eq. 1.5.
    """
    n = output.shape[0]
    if label.is_floating_point():
        return (_normal(output) * (2 / output.numel() / n) ** 0.5).to(output.dtype)
    if label.dtype == torch.bool:
        p = output.detach().double().sigmoid()
        return ((p - _drawn_bits(p).double()) * (1 / output.numel() / n) ** 0.5).to(output.dtype)
    p, scale = _softmax(output, label)
    hit = _classes(p) == _drawn_classes(p)  # [n, C, ...]
    return ((p - hit.double()) * (scale / n).sqrt()).to(output.dtype)


def hessian_root(output: Tensor, label: Tensor) -> Tensor:
    """V [n_out, *output.shape] with Σ v vᵀ = ∇²_o ℓ over its rows v, for the n_out outputs of one sample [1, ...].

    Softmax: v = √(p_c/P) ∇_o(−log p_c) for every class c at every position.   Source: WoodFisher, eq. 3.6.
    """
    size = output.numel()
    if label.is_floating_point():
        identity = torch.eye(size, dtype=output.dtype, device=output.device)
        return (identity * (2 / size) ** 0.5).reshape(size, *output.shape)
    if label.dtype == torch.bool:
        logits = output.detach().double().reshape(-1)
        # sigmoid(−o) and not 1 − p, which is 0 where p rounds to 1
        root = (logits.sigmoid() * (-logits).sigmoid() / size).sqrt()  # [n_out]
        return torch.diag(root).reshape(size, *output.shape).to(output.dtype)
    p, scale = _softmax(output, label)
    root = (p * scale).sqrt().reshape(p.shape[1], -1)  # [C, P]
    p = p.reshape(p.shape[1], -1)  # [C, P]
    classes, positions = (torch.eye(k, dtype=p.dtype, device=p.device) for k in p.shape)
    v = root[:, :, None] * (p.T - classes[:, None])  # [C, P, C]
    return (v[..., None] * positions[:, None]).reshape(size, *output.shape).to(output.dtype)


def _softmax(output: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """p in float64 [n, C, ...], and the weight that each position has in the mean loss [n, 1, ...]."""
    counted = (label.long() != _IGNORED).double().unsqueeze(1)
    return output.detach().double().softmax(1), counted / counted.sum()


def _classes(p: Tensor) -> Tensor:
    """0 .. C - 1 along the classes of p [n, C, ...]."""
    return torch.arange(p.shape[1], device=p.device).reshape(-1, *(1,) * (p.dim() - 2))


def _drawn_classes(p: Tensor) -> Tensor:
    """A class at every position [n, 1, ...], drawn with the probabilities p [n, C, ...]."""
    below = p.cumsum(1) <= _uniform(p.select(1, 0).shape, p.device)[:, None]  # [n, C, ...]
    return below.sum(1, keepdim=True).clamp(max=p.shape[1] - 1)  # rounding can leave the last sum below 1


def _drawn_bits(p: Tensor) -> Tensor:
    """Bools that are true with the probabilities p."""
    return _uniform(p.shape, p.device) < p


def _normal(output: Tensor) -> Tensor:
    """N(0, 1) in float64, in the shape of the output."""
    return torch.special.ndtri(_uniform(output.shape, output.device))


def _uniform(shape: torch.Size, device: torch.device) -> Tensor:
    # float64 on the CPU: there the generator yields number by number, so that the labels do not depend on the device or
    # on how many samples run at once; and 0, which has no finite quantile, comes once in 2⁵³
    return torch.rand(shape, dtype=torch.float64).to(device)
