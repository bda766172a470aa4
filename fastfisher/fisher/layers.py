"""Gradients of single samples in one layer, from its input and the gradient at its output: (x, g) -> rows [k, *shape].

With samples s, positions p of weight sharing (tokens, pixels) and the gradient g at the layer's output,
  Linear, convolutions   Σ_p g_p x_pᵀ, x_p the input, or its patch, at p   (Goodfellow, 2015; Rochette et al., 2019)
  Embedding              g_p added to the row of the token at p
  norms                  Σ_p g_p x̂_p, x̂ the normalised input
  biases                 Σ_p g_p
The model runs once under vmap over the samples, forward only, so that samples cannot meet; its layers' inputs and the
places where their outputs arise are noted by hooks as plain tensors [k, ...]; one backward pass stops at those places
and never makes the weight gradients of the batch.  Which route a layer takes follows from its type, its arguments and
the device alone, so that a run repeated has the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import (
    get_unwrapped,
    is_functorch_wrapped_tensor,
    maybe_get_bdim,
    maybe_get_level,
)
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from fastfisher import ops
from fastfisher.fisher.conv1d import is_conv1d

# Patches unfolded at once on a GPU, in bytes: they are kernel-size times as large as the image they come from.
PATCH_BYTES = 64 << 20


class Unseen(Exception):
    """A weight whose layer cannot be read off from inputs and outputs, and why."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, why)
        self.name = name
        self.why = why


@dataclass
class Call:
    """One call of a layer under vmap.

    x: [k, *input].   edge: where the output arises, a tensor of `shape` after a reshape, its samples along `dim`.
    statistics: running mean and variance of a batch norm.
    """

    module: nn.Module
    x: Tensor
    edge: GradientEdge
    shape: torch.Size
    dim: int
    statistics: tuple[Tensor, Tensor] | None = None
    version: int = field(init=False)

    def __post_init__(self) -> None:
        self.version = self.x._version

    @property
    def overwritten(self) -> bool:
        """Whether the input is no longer what the layer saw."""
        return self.x._version != self.version

    def output_gradient(self, g: Tensor) -> Tensor:
        """What arrived at the edge, as [k, *output]."""
        return g.reshape(self.shape).movedim(self.dim, 0)


# rows [k, *shape] from a call and the gradient at its output, in `out` where that is given and fits
_Rows = Callable[[Call, Tensor, Tensor | None], Tensor]


def _product(left: Tensor, right: Tensor, out: Tensor | None) -> Tensor:
    """left @ right, in `out` where it has the result's dtype.   left: [k, a, p].   right: [k, p, b]."""
    wide = torch.promote_types(left.dtype, right.dtype)  # autocast: the input is wider than the output
    left, right = left.to(wide), right.to(wide)
    if out is None or out.dtype != wide:
        return torch.bmm(left, right)
    return torch.bmm(left, right, out=out.view(len(left), left.shape[1], right.shape[2])).view(out.shape)


def _linear_weight(call: Call, g: Tensor, out: Tensor | None) -> Tensor:
    x = call.x.reshape(len(call.x), -1, call.x.shape[-1])  # [k, P, in]
    g = g.reshape(len(g), -1, g.shape[-1])  # [k, P, out]
    return _product(g.mT, x, out)


def _transposed_weight(call: Call, g: Tensor, out: Tensor | None) -> Tensor:
    x = call.x.reshape(len(call.x), -1, call.x.shape[-1])  # [k, P, in]
    return _product(x.mT, g.reshape(len(g), -1, g.shape[-1]), out)


def _linear_bias(call: Call, g: Tensor, out: Tensor | None) -> Tensor:
    return g.reshape(len(g), -1, g.shape[-1]).sum(1)


def _images(call: Call, x: Tensor) -> Tensor:
    """[k, (n,) C, *space] as [k n, C, *space]."""
    return x.reshape(-1, *x.shape[-1 - len(call.module.kernel_size) :])  # type: ignore[arg-type]


def _over_images(rows: Tensor, k: int) -> Tensor:
    """[k n, ...] summed over the images of a sample."""
    return rows if len(rows) == k else rows.reshape(k, -1, *rows.shape[1:]).sum(1)


def _padded(conv: Any, x: Tensor) -> tuple[Tensor, list[int]]:
    """The input with all padding that is not the same number of zeros on both sides, and the rest of the padding."""
    dims = len(conv.kernel_size)
    if conv.padding == "valid":
        return x, [0] * dims
    if conv.padding == "same":
        total = [d * (n - 1) for d, n in zip(conv.dilation, conv.kernel_size, strict=True)]
        pads = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
        even = all(t % 2 == 0 for t in total)
        sides = [t // 2 for t in total]
    else:
        sides = list(conv.padding)
        pads, even = [side for side in reversed(sides) for _ in range(2)], True
    if conv.padding_mode != "zeros":
        return F.pad(x, pads, mode=conv.padding_mode), [0] * dims
    return (x, sides) if even else (F.pad(x, pads), [0] * dims)


def _pointwise(conv: Any) -> bool:
    """Whether every output pixel sees one input pixel."""
    return all(n == 1 for n in conv.kernel_size) and (isinstance(conv.padding, str) or not any(conv.padding))


def _conv_weight(call: Call, g: Tensor, out: Tensor | None) -> Tensor:
    conv: Any = call.module
    k, shape = len(call.x), conv.weight.shape
    x, g = _images(call, call.x), _images(call, g)
    n, groups, q = len(x), conv.groups, shape[0] // conv.groups
    if len(x) > k:
        out = None
    if _pointwise(conv):
        steps: list[Any] = [slice(None, None, step) for step in conv.stride]
        x = x[(..., *steps)]
        left = g.reshape(n * groups, q, -1)
        rows = _product(left, x.reshape(n * groups, shape[1], -1).mT, out if groups == 1 else None)
        return _over_images(rows.view(n, *shape), k)
    x, sides = _padded(conv, x)
    if len(sides) > 2:
        rows = _grouped(conv, x, g, sides)
    elif x.device.type == "cuda":
        rows = _unfolded(conv, x, g, sides, out)
    else:
        rows = _fused(conv, x, g, sides, out)
    return _over_images(rows, k)


def _fused(conv: Any, x: Tensor, g: Tensor, sides: list[int], out: Tensor | None) -> Tensor:
    """One kernel for all samples: rows [n, *shape], float32 or float64."""
    wide = torch.float64 if torch.float64 in (x.dtype, g.dtype) else torch.float32
    # one dimension of space is the second of two
    flat = (1,) * (2 - len(sides))
    shape = (*conv.weight.shape[:2], *flat, *conv.kernel_size)
    if out is None or out.dtype != wide:
        out = x.new_empty(len(x), *conv.weight.shape, dtype=wide)
    ops.conv_weight_grads(
        _dense(x.to(wide).reshape(*x.shape[:2], *flat, *x.shape[2:])),
        _dense(g.to(wide).reshape(*g.shape[:2], *flat, *g.shape[2:])),
        out=out.view(len(x), *shape),
        stride=(*flat, *conv.stride),
        padding=((0,) * len(flat)) + tuple(sides),
        dilation=(*flat, *conv.dilation),
        groups=conv.groups,
    )
    return out


def _dense(x: Tensor) -> Tensor:
    """x [n, C, H, W], contiguous if its channels do not come last."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _grouped(conv: Any, x: Tensor, g: Tensor, sides: list[int]) -> Tensor:
    """Samples as groups of one convolution, whose weight gradient has all rows [n, *shape]."""
    n, shape = len(x), conv.weight.shape
    wide = torch.promote_types(x.dtype, g.dtype)
    x, g = x.to(wide), g.to(wide)
    grads = torch.ops.aten.convolution_backward(
        g.reshape(1, -1, *g.shape[2:]),
        x.reshape(1, -1, *x.shape[2:]),
        x.new_empty(1).expand(n * shape[0], *shape[1:]),  # its shape is all that is read
        None,
        list(conv.stride),
        sides,
        list(conv.dilation),
        False,
        [0] * len(sides),
        n * conv.groups,
        [False, True, False],
    )
    rows: Tensor = grads[1]
    return rows.view(n, *shape)


def _unfolded(conv: Any, x: Tensor, g: Tensor, sides: list[int], out: Tensor | None) -> Tensor:
    """Patches, and one matrix product for each sample and group: rows [n, *shape]."""
    n, shape, groups = len(x), conv.weight.shape, conv.groups
    dims = len(sides)
    # one dimension of space is the second of two
    x, g = (
        x.reshape(n, x.shape[1], -1, x.shape[-1]) if dims == 1 else x,
        g.flatten(2),
    )  # [n, C, H, W], [n, O, P]
    arguments = {
        "kernel_size": (1,) * (2 - dims) + tuple(conv.kernel_size),
        "dilation": (1,) * (2 - dims) + tuple(conv.dilation),
        "padding": (0,) * (2 - dims) + tuple(sides),
        "stride": (1,) * (2 - dims) + tuple(conv.stride),
    }
    each = x.shape[1] * math.prod(shape[2:]) * g.shape[2] * x.element_size()
    at_once = max(1, PATCH_BYTES // max(1, each))
    wide = torch.promote_types(x.dtype, g.dtype)
    rows = x.new_empty(n, *shape, dtype=wide) if out is None or out.dtype != wide else out
    for start in range(0, n, at_once):
        part = slice(start, start + at_once)
        patches = F.unfold(x[part], **arguments)  # [b, C · kernel, P]
        count = len(patches)
        left = g[part].reshape(count * groups, -1, g.shape[2])
        right = patches.reshape(count * groups, -1, g.shape[2]).mT
        if groups == 1:
            _product(left, right, rows[part])
        else:
            rows[part] = _product(left, right, None).view(count, *shape)
    return rows


def _conv_bias(call: Call, g: Tensor, out: Tensor | None) -> Tensor:
    return _over_images(_images(call, g).flatten(2).sum(2), len(call.x))


def _embedding(call: Call, g: Tensor, out: Tensor | None) -> Tensor:
    layer: Any = call.module
    k = len(call.x)
    tokens, g = call.x.reshape(k, -1).long(), g.reshape(k, -1, g.shape[-1])  # [k, P], [k, P, D]
    if layer.padding_idx is not None:
        g = g.masked_fill((tokens == layer.padding_idx)[..., None], 0)
    if out is None or out.dtype != g.dtype:
        out = g.new_empty(k, *layer.weight.shape)
    out.zero_()
    if g.device.type == "cuda":  # in a fixed order there, as scatter_add_ is on a CPU
        samples = torch.arange(k, device=g.device)[:, None].expand_as(tokens)
        return out.index_put_((samples, tokens), g, accumulate=True)
    return out.scatter_add_(1, tokens[..., None].expand_as(g), g)


def _normalised_last(call: Call) -> Tensor:
    layer: Any = call.module
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(call.x, layer.normalized_shape, None, None, layer.eps)
    return F.rms_norm(call.x, layer.normalized_shape, None, layer.eps)


def _last_weight(call: Call, g: Tensor, out: Tensor | None) -> Tensor:
    return _last_bias(call, g * _normalised_last(call), out)


def _last_bias(call: Call, g: Tensor, out: Tensor | None) -> Tensor:
    layer: Any = call.module
    return g.reshape(len(g), -1, *layer.normalized_shape).sum(1)


def _channels(x: Tensor, k: int, channels: int) -> Tensor:
    """[k, n, C, *space] as [k n, C, P]."""
    return x.reshape(k * x.shape[1], channels, -1)


def _channel_bias(call: Call, g: Tensor, out: Tensor | None) -> Tensor:
    layer: Any = call.module
    return _over_images(_channels(g, len(g), len(layer.weight)).sum(2), len(g))


def _group_weight(call: Call, g: Tensor, out: Tensor | None) -> Tensor:
    layer: Any = call.module
    x = _channels(call.x, len(g), layer.num_channels)
    x = F.group_norm(x, layer.num_groups, None, None, layer.eps)
    return _over_images((x * _channels(g, len(g), layer.num_channels)).sum(2), len(g))


def _batch_weight(call: Call, g: Tensor, out: Tensor | None) -> Tensor:
    layer: Any = call.module
    assert call.statistics is not None
    mean, variance = call.statistics
    k, channels = len(g), layer.num_features
    x, g = _channels(call.x, k, channels), _channels(g, k, channels)
    # Σ g (x - μ) / √(v + ε), without writing x̂ out
    total = torch.einsum("ncp,ncp->nc", g, x - mean[:, None].to(x.dtype))
    return _over_images(total * (variance + layer.eps).rsqrt().to(total.dtype), k)


@dataclass(frozen=True)
class Rule:
    """How the rows of a layer's weights follow from a call.

    rows: by the name of the weight in the layer.   why_not: the reason why a layer of this type cannot, or None.
    how: words for the arithmetic, given the layer, the name and the device.
    """

    rows: Mapping[str, _Rows]
    how: Callable[[Any, str, torch.device], str]
    why_not: Callable[[Any], str | None] = lambda layer: None


def _conv_how(conv: Any, key: str, device: torch.device) -> str:
    size = "x".join(map(str, conv.kernel_size))
    if key == "bias":
        return f"convolution {size}: sum"
    if _pointwise(conv):
        return f"convolution {size}: batched product"
    if len(conv.kernel_size) > 2:
        return f"convolution {size}: grouped convolution"
    if device.type == "cuda":
        return f"convolution {size}: unfolded patches, batched product"
    return f"convolution {size}: one kernel"


def _conv_why_not(conv: Any) -> str | None:
    own = next(base for base in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(conv, base))
    return None if type(conv)._conv_forward is own._conv_forward else "it has a _conv_forward of its own"


def _embedding_why_not(layer: Any) -> str | None:
    wrong = [name for name in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(layer, name)]
    return f"it has {wrong[0]}" if wrong else None


_CONV = Rule({"weight": _conv_weight, "bias": _conv_bias}, _conv_how, _conv_why_not)
_BATCH = Rule(
    {"weight": _batch_weight, "bias": _channel_bias},
    lambda layer, key, device: "batch norm in eval mode: sum",
    lambda layer: None if layer.running_mean is not None else "it has no running statistics",
)
# By the function that runs: a subclass with another forward is another layer.
RULES: dict[Any, Rule] = {
    nn.Linear.forward: Rule(
        {"weight": _linear_weight, "bias": _linear_bias},
        lambda layer, key, device: f"linear: {'sum' if key == 'bias' else 'batched product'}",
    ),
    nn.Conv1d.forward: _CONV,
    nn.Conv2d.forward: _CONV,
    nn.Conv3d.forward: _CONV,
    nn.Embedding.forward: Rule(
        {"weight": _embedding}, lambda layer, key, device: "embedding: scattered sum", _embedding_why_not
    ),
    nn.LayerNorm.forward: Rule(
        {"weight": _last_weight, "bias": _last_bias}, lambda layer, key, device: "layer norm: sum"
    ),
    nn.RMSNorm.forward: Rule({"weight": _last_weight}, lambda layer, key, device: "RMS norm: sum"),
    nn.GroupNorm.forward: Rule(
        {"weight": _group_weight, "bias": _channel_bias}, lambda layer, key, device: "group norm: sum"
    ),
    nn.BatchNorm2d.forward: _BATCH,  # one function for all dimensions
}


# GPT-2's linear layer, with a weight [in, out]; its class is known where transformers is imported.
_CONV1D = Rule(
    {"weight": _transposed_weight, "bias": _linear_bias},
    lambda layer, key, device: f"linear: {'sum' if key == 'bias' else 'batched product'}",
)


def rule_of(module: nn.Module, key: str) -> tuple[Rule | None, str]:
    """The rule of a weight, or None and why there is none."""
    kind = type(module).__name__
    rule = _CONV1D if is_conv1d(module) else RULES.get(type(module).forward)
    if "forward" in vars(module):
        rule = None
    if rule is None or key not in rule.rows:
        return None, f"{kind} has no rule"
    if module._parameters[key].is_complex():  # type: ignore[union-attr]
        return None, "it is complex"
    why = rule.why_not(module)
    return (rule, "") if why is None else (None, f"{kind} has no rule where {why}")


def _plain(x: Tensor, level: int) -> tuple[Tensor, int | None]:
    """The tensor behind one that vmap batches at `level`, and the dimension of the samples; None where it has none."""
    if not is_functorch_wrapped_tensor(x):
        return x, None
    behind = get_unwrapped(x)
    if maybe_get_level(x) != level or is_functorch_wrapped_tensor(behind):
        raise LookupError("its layer runs inside a transform of the model's own")
    return behind, maybe_get_bdim(x)


@dataclass
class Capture:
    """The calls of the layers that own some weights, in one forward of a model under vmap.

    owners: of each weight, by name, the modules and the names that it has there.   stand_ins: for each weight the
    tensor that its layers use in its place, so that what is used behind their back still leads to the weight itself.
    samples: k.   zero: 0, as vmap batches it, set inside the vmapped function.
    """

    owners: Mapping[str, Sequence[tuple[nn.Module, str]]]
    stand_ins: Mapping[str, Tensor]
    samples: int
    zero: Tensor | None = None
    calls: list[Call] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the layers inside, none outside."""
        keys: dict[nn.Module, dict[str, str]] = {}
        for name, places in self.owners.items():
            for module, key in places:
                keys.setdefault(module, {})[key] = name
        with ExitStack() as hooks:
            for module, names in keys.items():
                before, after = self._around(names)
                # the last to see what comes in, and the first to see what goes out: as the forward itself does
                hooks.callback(module.register_forward_pre_hook(before).remove)
                handle = module.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=True)
                hooks.callback(handle.remove)
            yield

    def _around(self, names: Mapping[str, str]) -> tuple[Any, Any]:
        """The hooks before and after a layer's forward.   names: key in the layer -> weight."""
        held: list[dict[str, Any]] = []

        def before(module: nn.Module, args: Any) -> None:
            held.append({key: module._parameters[key] for key in names})
            for key, name in names.items():
                module._parameters[key] = self.stand_ins[name]  # type: ignore[assignment]

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
            if held:
                module._parameters.update(held.pop())
            # None where the forward has raised; no gradient where the model asks for none
            if not isinstance(output, Tensor) or not torch.is_grad_enabled():
                return None
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise Unseen(next(iter(names.values())), "its batch norm is in training mode")
            return self._see(next(iter(names.values())), module, args[0] if args else kwargs["input"], output)

        return before, after

    def _see(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> Tensor | None:
        """Note a call; another tensor with the output's values where the output itself is no place to stop at."""
        assert self.zero is not None
        level = maybe_get_level(self.zero)
        try:
            behind, dim = _plain(output, level)
            if not behind.requires_grad:
                return None
            replaced = None
            if dim is None:
                # the same for all samples so far, as positions are; from here on each has its own gradient
                replaced = output + self.zero.to(output.dtype)
                behind, dim = _plain(replaced, level)
            source = source_of(behind)
            if source is None:
                replaced = output.clone()
                behind, dim = _plain(replaced, level)
                source = behind
            seen, x_dim = _plain(x, level)
        except LookupError as error:
            raise Unseen(name, str(error)) from None
        assert dim is not None
        seen = seen.detach()
        seen = seen.expand(self.samples, *seen.shape) if x_dim is None else seen.movedim(x_dim, 0)
        statistics: Any = (
            (module.running_mean, module.running_var)
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            else None
        )
        self.calls.append(Call(module, seen, get_gradient_edge(source), behind.shape, dim, statistics))
        return replaced

    def calls_of(self, name: str) -> list[tuple[int, _Rows]]:
        """Which calls a weight took part in, and by which function each gives its rows."""
        found = []
        for module, key in dict.fromkeys(self.owners[name]):
            rule, _ = rule_of(module, key)
            assert rule is not None
            found += [(i, rule.rows[key]) for i, call in enumerate(self.calls) if call.module is module]
        return found


class NoPadding(TorchFunctionMode):
    """Refuse an embedding with padding_idx whose table vmap batches: its rule forgets that the row has no gradient.

    known: tables that are not batched.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = list(known)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.embedding, torch.embedding, F.embedding_bag, torch.embedding_bag):
            # what torch.embedding takes first is the table; it and padding_idx are told by what they are
            tables = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]
            unknown = [t for t in tables if all(t is not known for known in self.known)]
            padding = kwargs.get(
                "padding_idx", args[2] if len(args) > 2 and func is not F.embedding_bag else None
            )
            if unknown and padding not in (None, -1):
                raise RuntimeError("torch.vmap forgets padding_idx where a table is batched")
        return func(*args, **kwargs)


class ScaledNorm(TorchFunctionMode):
    """Batch norm in eval mode as a product and a sum, x s + t.

    vmap's own rule takes the channels of all samples for channels of one, which copies where channels come last.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = self._scaled(*args, **kwargs) if func is F.batch_norm else None
        return func(*args, **kwargs) if found is None else found

    @staticmethod
    def _scaled(
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor | None:
        """None where that is another function, or another precision."""
        if training or running_mean is None or running_var is None or input.dtype != running_mean.dtype:
            return None
        scale = (running_var + eps).rsqrt()
        if weight is not None:
            scale = scale * weight
        shift = -running_mean * scale if bias is None else bias - running_mean * scale
        over_space = (-1, *(1,) * (input.dim() - 2))
        return input * scale.view(over_space) + shift.view(over_space)


def source_of(output: Tensor) -> Tensor | None:
    """The tensor whose gradient is that of `output` up to a reshape, also after `output` is overwritten in place.

    It is the base of a view, since the view itself drops out of the graph then; None for views that are no reshape.
    """
    if not output._is_view():
        return output
    base = output._base
    if base is None or base.numel() != output.numel() or base.dtype != output.dtype:
        return None
    contiguous = base.is_contiguous() and output.is_contiguous()
    return base if contiguous or _places(base) == _places(output) else None


def _places(x: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides, without the dimensions of size 1."""
    return [place for place in zip(x.shape, x.stride(), strict=True) if place[0] != 1]
