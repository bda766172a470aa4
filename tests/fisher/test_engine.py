"""Gradients by layers: every rule against plain autograd in float64, what cannot go by layers, what is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfisher.errors import FastFisherError
from fastfisher.fisher import layers, objective
from fastfisher.fisher.batches import read_batch
from fastfisher.fisher.blocks import BlockLayout, LiveLayout
from fastfisher.fisher.gradients import GradientStream
from fastfisher.fisher.objective import Objective, untouched
from fastfisher.prune.plan import plan
from fastfisher.prune.pruner import prune
from tests.prune.models import assert_same, classifier, images, picture

DOUBLE = torch.float64
N = 5


def pooled(*modules: nn.Module) -> nn.Module:
    """Layers, and two outputs that see every number of the last one."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*modules)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x).flatten(1)
            return torch.stack([(h * torch.linspace(-1, 2, h.shape[1]).to(h)).sum(1), h.square().mean(1)], 1)

    return Pooled()


def checked(
    model: nn.Module,
    x: Tensor,
    names: list[str] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    tolerance: float = 1e-12,
) -> Objective:
    """Compare all rows with plain autograd of one sample at a time; returns what made them."""
    model = model.double().eval()
    labels = torch.arange(len(x)) % 2
    names = [name for name, _ in model.named_parameters()] if names is None else names
    objective = Objective(model, names, loss_fn=loss_fn)
    samples = read_batch((x, labels))
    before = picture(model)
    with untouched(model, 0):
        rows, losses = objective.gradients(samples)
    assert_same(before, picture(model))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for i in range(len(x)):
        model.zero_grad()
        batch = (x[i : i + 1], labels[i : i + 1])
        loss = F.cross_entropy(model(batch[0]), batch[1]) if loss_fn is None else loss_fn(model, batch)
        loss.backward()
        assert float(losses[i]) == pytest.approx(float(loss.detach()), rel=1e-10)
        for name in names:
            expected = model.get_parameter(name).grad
            found = rows[name][i]
            if expected is None:
                assert not bool(found.any()), name
            else:
                assert (
                    float((found - expected).abs().max()) <= tolerance * float(expected.abs().max()) + 1e-13
                ), name
    model.zero_grad()
    return objective


IMAGE, LINE, TOKENS = (4, 7, 6), (4, 9), (5, 6)
CONV2D = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0)},
    "dilated": {"kernel_size": 2, "dilation": (2, 3), "padding": 1},
    "grouped": {"kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1, "stride": 2},
    "same": {"kernel_size": (3, 4), "padding": "same", "dilation": (1, 2)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflected": {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"},
    "1x1": {"kernel_size": 1},
    "1x1 strided": {"kernel_size": 1, "stride": (2, 3)},
    "1x1 grouped": {"kernel_size": 1, "groups": 2, "padding": "same"},
    "1x1 padded": {"kernel_size": 1, "padding": 1},
    "no bias": {"kernel_size": 3, "bias": False},
}


@pytest.mark.parametrize("kind", CONV2D)
def test_convolutions(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, **CONV2D[kind])
    x = torch.randn(N, *IMAGE, dtype=DOUBLE)
    objective = checked(pooled(conv), x)
    assert objective.fallbacks is None
    assert ("product" in objective.explain()["body.0.weight"]) == (
        kind.startswith("1x1") and "padded" not in kind
    )
    # behind another layer, overwritten in place, and by the way of a GPU
    monkeypatch.setattr(layers, "_fused", layers._unfolded)
    monkeypatch.setattr(layers, "PATCH_BYTES", 4000)
    assert checked(pooled(nn.Conv2d(4, 4, 1), nn.ReLU(True), conv, nn.Tanh()), x).fallbacks is None


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_of_other_dimensions(dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv3d)[dims // 2](4, 6, 3, stride=2, padding=1, groups=2)
    x = torch.randn(N, 4, *(6, 5, 4)[:dims], dtype=DOUBLE)
    assert checked(pooled(conv), x).fallbacks is None
    if dims == 1:
        monkeypatch.setattr(layers, "_fused", layers._unfolded)
        assert checked(pooled(conv), x).fallbacks is None


@pytest.mark.parametrize(
    ("modules", "shape"),
    [
        ([nn.Linear(6, 3), nn.ReLU(True), nn.Linear(3, 4, bias=False)], (6,)),
        ([nn.Linear(6, 3), nn.ReLU(True), nn.Linear(3, 4)], TOKENS),
        ([nn.LayerNorm(6)], TOKENS),
        ([nn.LayerNorm((5, 6), bias=False), nn.Tanh(), nn.RMSNorm(6)], TOKENS),
        ([nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(True)], IMAGE),
        ([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(True)], IMAGE),
        ([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Tanh()], IMAGE),
        ([nn.BatchNorm1d(4), nn.Tanh(), nn.Conv1d(4, 2, 3)], LINE),
        ([nn.BatchNorm1d(6), nn.Linear(6, 2)], (6,)),
    ],
    ids=lambda value: "-".join(type(m).__name__ for m in value) if isinstance(value, list) else "",
)
def test_linear_layers_and_norms(modules: list[nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for module in modules:
        if hasattr(module, "running_var"):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
    assert checked(pooled(*modules), torch.randn(N, *shape, dtype=DOUBLE)).fallbacks is None


class Residual(nn.Module):
    """Two convolutions with batch norms and a shortcut, and a classifier.   x [n, 4, 7, 6] -> logits [n, 3]."""

    def __init__(self, *, by_view: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.norm, self.plain = nn.BatchNorm2d(16), nn.BatchNorm2d(16, affine=False)
        self.head = nn.Linear(16 * 42, 3)
        self.by_view = by_view

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.first(x)))
        h = F.relu(self.plain(self.second(h)) + h)
        return self.head(h.view(len(h), -1) if self.by_view else h.flatten(1))


@pytest.mark.parametrize("grad_batch_size", [1, N])
@pytest.mark.parametrize("by_view", [False, True])
def test_convolutions_have_their_channels_last_where_the_model_can(
    by_view: bool, grad_batch_size: int
) -> None:
    torch.manual_seed(0)
    model = Residual(by_view=by_view)
    for norm in (model.norm, model.plain):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    x, y = torch.randn(N, *IMAGE), torch.arange(N) % 3
    names = [name for name, _ in model.named_parameters()]
    strides: list[tuple[int, ...]] = []

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        strides.append(model.first.weight.stride())
        return F.cross_entropy(model(batch[0]), batch[1])

    for loss in (None, loss_fn):
        objective = Objective(model, names, loss_fn=loss, grad_batch_size=grad_batch_size)
        with untouched(model, 0):
            rows, losses = objective.gradients(read_batch((x, y)))
            again = objective.losses(objective.weights, read_batch((x, y)))
        assert objective.fallbacks is None
        torch.testing.assert_close(losses, again)
        wide = Residual(by_view=by_view).double().eval()
        wide.load_state_dict(model.state_dict())
        for i, part in enumerate(range(N) if grad_batch_size == 1 else [slice(None)]):
            wide.zero_grad()
            F.cross_entropy(wide(x[part].double().view(-1, *IMAGE)), y[part].view(-1)).backward()
            for name, p in wide.named_parameters():
                torch.testing.assert_close(rows[name][i].double(), p.grad, rtol=1e-4, atol=1e-6)
    assert bool(objective._channels_last) != by_view
    if grad_batch_size > 1:  # else each layer has them in turn
        assert (strides[-1][1] == 1) != by_view
    assert model.first.weight.is_contiguous()


class Text(nn.Module):
    """Tokens and positions, one of the embeddings also the output's weight, and a layer that is called twice."""

    def __init__(self, *, by_hand: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4, padding_idx=2)
        self.positions = nn.Embedding(6, 4)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.tokens.weight
        self.by_hand = by_hand

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        h = self.twice(torch.tanh(self.twice(h))).mean(1)
        return F.linear(h, self.tokens.weight) if self.by_hand else self.head(h)


def test_embeddings_ties_positions_and_a_layer_called_twice() -> None:
    torch.manual_seed(0)
    ids = torch.randint(7, (N, 6))
    objective = checked(Text(), ids)
    assert objective.fallbacks is None
    assert objective.explain()["tokens.weight"] == "embedding: scattered sum + linear: batched product"
    # the same weight behind its layer's back: no half of its gradient is lost without a sign
    model = Text(by_hand=True)
    model.tokens.padding_idx = None
    objective = checked(model, ids)
    assert objective.explain()["tokens.weight"] == "torch.func: it is used outside the layer that owns it"
    assert "1 of 4 tensors come from torch.func (first: 'tokens.weight'" in str(objective.fallbacks)
    # a padded table that is batched gets a gradient in torch that it must not have
    objective = checked(Text(by_hand=True), ids)
    assert objective.why_vmap == "RuntimeError: torch.vmap forgets padding_idx where a table is batched"


class Own(nn.Module):
    """A layer nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class OtherForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs(), self.bias)


@pytest.mark.parametrize(
    ("model", "shape", "why"),
    [
        (lambda: pooled(nn.Linear(6, 6), Own()), (6,), {"body.1.scale": "Own has no rule"}),
        (lambda: pooled(OtherForward(6, 3)), (6,), {"body.0.weight": "OtherForward has no rule"}),
        (
            lambda: pooled(nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))),
            (6,),
            {"body.0.parametrizations.weight.original0": "ParametrizedLinear has no rule"},
        ),
        (
            lambda: pooled(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=True)),
            TOKENS,
            {
                "body.0.self_attn.in_proj_weight": "MultiheadAttention has no rule",
                "body.0.self_attn.out_proj.weight": "it is used outside the layer that owns it",
            },
        ),
        (
            lambda: pooled(nn.Linear(6, 6), nn.BatchNorm1d(5, track_running_stats=False)),
            TOKENS,
            {"body.1.weight": "BatchNorm1d has no rule where it has no running statistics"},
        ),
    ],
)
def test_what_has_no_rule_goes_by_torch_func_alone(
    model: Callable[[], nn.Module], shape: tuple[int, ...], why: dict[str, str]
) -> None:
    torch.manual_seed(0)
    objective = checked(model(), torch.randn(N, *shape, dtype=DOUBLE), tolerance=1e-10)
    found = objective.explain()
    assert objective.why_vmap is None
    for name, reason in why.items():
        if "parametrizations" not in name:
            assert found[name] == f"torch.func: {reason}"
        assert found[name].startswith("torch.func")
    assert objective.fallbacks is not None


class Mixing(nn.Module):
    """Normalises over whatever comes as one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - 0.5 * x.mean(0, keepdim=True))


def test_a_layer_inside_a_transform_of_the_model_goes_by_torch_func() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each, self.head = nn.Linear(6, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.vmap(self.each, in_dims=1, out_dims=1)(x).tanh().sum(1))

    torch.manual_seed(0)
    objective = checked(Rows(), torch.randn(N, *TOKENS, dtype=DOUBLE))
    how = objective.explain()
    assert how["each.weight"] == "torch.func: its layer runs inside a transform of the model's own"
    assert how["head.weight"] == "linear: batched product"


def test_samples_cannot_meet() -> None:
    """Every sample is a batch of its own: the model's means, and a loss that is no mean over samples."""

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) * batch[1].sum()

    torch.manual_seed(0)
    x = torch.randn(N, 6, dtype=DOUBLE)
    assert checked(Mixing(), x).fallbacks is None
    assert checked(pooled(nn.Linear(6, 3)), x, loss_fn=loss_fn).fallbacks is None


def test_frozen_layers_before_and_behind() -> None:
    model = classifier(dtype=DOUBLE)
    model[3].requires_grad_(False)
    x, _ = images(N, dtype=DOUBLE)
    for names in (["0.weight"], ["10.weight"], ["8.weight", "1.bias", "3.weight"]):
        for name in names:
            model.get_parameter(name).requires_grad_(True)
        assert set(checked(model, x, names).explain()) == set(names)


class WithoutGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(6, 4), nn.Linear(4, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.first(x)
        self.unused(self.second(h))
        return self.second(torch.tanh(h))


def test_layers_without_a_gradient_have_zeros() -> None:
    torch.manual_seed(0)
    assert checked(WithoutGradient(), torch.randn(N, 6, dtype=DOUBLE)).fallbacks is None


class Overwritten(nn.Module):
    """Writes over what its layer has read, which autograd itself lets pass where no gradient needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(6, bias=False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        bias = torch.nn.functional.linear(y, torch.ones(2, 6).to(y))
        h = self.head(self.norm(y)) + bias
        y.zero_()
        return h


def test_an_input_that_is_overwritten_is_found_out() -> None:
    """Plain autograd refuses such a model, and so does this: no gradient comes from numbers that were not there."""
    torch.manual_seed(0)
    samples = read_batch((torch.randn(3, 6), torch.zeros(3, dtype=torch.long)))
    model = Overwritten().eval()
    with pytest.raises(FastFisherError, match="modified by an inplace operation"), untouched(model, 0):
        Objective(model, ["norm.weight"]).gradients(samples)


def test_a_missed_gradient_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = images(N)
    model = classifier()
    names = [name for name, _ in model.named_parameters()]
    expected, _ = Objective(model.eval(), names).gradients(read_batch((x, y)))
    monkeypatch.setattr(layers.Call, "output_gradient", lambda self, g: g.reshape(self.shape) * 1.5)
    objective = Objective(model, names)
    found, _ = objective.gradients(read_batch((x, y)))
    assert "by layers the gradient of '0.weight' differs from plain autograd" in str(objective.why_vmap)
    assert objective.explain()["0.weight"].startswith("vmap(grad): RuntimeError: by layers")
    assert "All gradients come from torch.func.vmap(grad)" in str(objective.fallbacks)
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_nothing_is_left_behind_by_a_forward_that_raises() -> None:
    class Raising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 2)
            self.broken = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.broken(self.linear(x))

    model = Raising().eval()
    before = picture(model)
    objective = Objective(model, ["linear.weight", "broken.weight"])
    with pytest.raises(FastFisherError, match="the model failed on batch 0"), untouched(model, 0):
        objective.gradients(read_batch((torch.randn(3, 6), torch.zeros(3, dtype=torch.long))))
    assert_same(before, picture(model))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert objective.why_vmap is None


def stream_of(
    model: nn.Module, data: Any, num: int, live: Tensor | None = None, **options: Any
) -> GradientStream:
    parameters = dict(model.named_parameters())
    layout = BlockLayout(list(parameters), [p.shape for p in parameters.values()], None)
    if live is not None:
        layout = LiveLayout(layout, live)
    objective = Objective(model, list(parameters))
    return GradientStream(objective, data, layout, num_grads=num, **options)


def rows_of(stream: GradientStream) -> Tensor:
    with untouched(stream.objective.model, 0):
        return torch.cat([piece.clone() for piece in stream])


def test_rows_lie_where_they_belong() -> None:
    model = classifier(dtype=DOUBLE)
    x, y = images(9, dtype=DOUBLE)
    whole = rows_of(stream_of(model, [(x, y)], 9))
    by_vmap = stream_of(model, [(x, y)], 9)
    by_vmap.objective.why_vmap = "the test says so"
    torch.testing.assert_close(whole, rows_of(by_vmap), rtol=1e-10, atol=1e-12)
    torch.manual_seed(3)
    live = torch.rand(whole.shape[1]) < 0.4
    live[: 4 * 2 * 9] = False  # one tensor as a whole
    found = rows_of(stream_of(model, [(x, y)], 9, live))
    assert torch.equal(found, whole[:, live])
    x[3] = float("nan")
    stream = stream_of(model, [(x, y)], 8)
    good = [0, 1, 2, 4, 5, 6, 7, 8]
    torch.testing.assert_close(rows_of(stream), whole[good], rtol=1e-10, atol=1e-12)
    assert (stream.num_non_finite, stream.first_non_finite) == (1, "batch 0, '0.weight', float64")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_rows(dtype: str) -> None:
    model = classifier()
    x, y = images(9)
    expected = rows_of(stream_of(model, [(x, y)], 9))
    found = rows_of(stream_of(model, [(x, y)], 9, dtype=dtype))
    assert found.dtype == getattr(torch, dtype)
    # rounded once, from float32
    assert torch.equal(found, expected.to(found.dtype))


def test_what_float16_overflows_or_loses_is_not_finite() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    x, y = torch.randn(6, 4), torch.randint(2, (6,))
    scale = torch.tensor([1.0, 1e7, 1.0, 1e-9, 1.0, 1.0])

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) * batch[2].sum()

    def stream(dtype: str, picked: list[int], num: int) -> GradientStream:
        layout = BlockLayout(["weight"], [(2, 4)], None)
        data = [(x[picked], y[picked], scale[picked])]
        objective = Objective(model, ["weight"], loss_fn=loss_fn)
        return GradientStream(objective, data, layout, num_grads=num, dtype=dtype)

    every = list(range(6))
    for picked, first in (
        (every, "batch 0, 'weight', float16"),
        ([0, 3, 2, 1, 4, 5], "batch 0, too small for float16"),
    ):
        made = stream("float16", picked, 4)
        assert len(rows_of(made)) == 4
        assert (made.num_non_finite, made.first_non_finite) == (2, first)
    made = stream("bfloat16", every, 6)
    assert bool(rows_of(made).isfinite().all())
    assert made.num_non_finite == 0


@pytest.mark.parametrize(
    ("method", "block_size"), [("woodfisher", 8), ("woodfisher", None), ("woodtaylor", 8), ("diagonal", 8)]
)
def test_pruning_with_narrow_gradients(method: str, block_size: int | None) -> None:
    data = [images(24)]
    masks, stored = [], []
    for dtype in ("auto", "bfloat16"):
        model = classifier()
        options: dict[str, Any] = {
            "method": method,
            "block_size": block_size,
            "num_grads": 24,
            "grad_dtype": dtype,
        }
        told = plan(model, data, sparsity=0.5, num_recomputations=0, **options)
        stored.append({phase.name: phase.bytes for phase in told.phases}["gradients"])
        assert "gradients: " in str(told)
        assert "linear: batched product" in told.gradients
        report = prune(model, data, sparsity=0.5, num_recomputations=0, progress=False, **options)
        assert not any("torch.func" in note for note in report.notes)
        masks.append(torch.cat([(p != 0).flatten() for n, p in model.named_parameters() if p.dim() > 1]))
    assert float((masks[0] == masks[1]).double().mean()) > 0.97
    assert stored[1] < stored[0]
    with pytest.raises(FastFisherError, match=r"grad_dtype goes with method .* got method='fishleg'"):
        plan(model, None, sparsity=0.5, method="fishleg", grad_dtype="bfloat16")
    with pytest.raises(FastFisherError, match=r"grad_dtype must be one of 'auto', .* got 'half'"):
        plan(model, None, sparsity=0.5, grad_dtype="half")


def test_a_report_says_what_fell_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OtherForward(6, 8), nn.Tanh(), nn.Linear(8, 2))
    data = [(torch.randn(16, 6), torch.randint(2, (16,)))]
    report = prune(model, data, sparsity=0.5, num_grads=16, num_recomputations=0, progress=False)
    assert any(
        "Gradients of 1 of 2 tensors come from torch.func (first: '0.weight'" in n for n in report.notes
    )


def test_half_precision_and_drawn_labels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16()
    samples = read_batch((torch.randn(6, 6).bfloat16(), torch.randint(3, (6,))))
    for kind in ("empirical", "mc"):
        found = []
        for why in (None, "the test says so"):
            objective = Objective(model, ["0.weight", "2.bias"], fisher_type=kind)
            objective.why_vmap = why
            with untouched(model, 1):
                found.append(objective.gradients(samples)[0])
            assert objective.why_vmap == why
        for name, rows in found[0].items():
            assert rows.dtype == torch.bfloat16
            torch.testing.assert_close(rows, found[1][name], rtol=5e-2, atol=2e-2)


def test_kinks_are_within_the_tolerance() -> None:
    assert set(objective.TOLERANCE) == {torch.float32, DOUBLE}
    assert max(objective.TOLERANCE.values()) < 0.5 <= objective.HALF_TOLERANCE
