"""The whole way: exact zeros, untouched models after every failure, odd models, bad input, and that it pays."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastfisher as ff
from fastfisher.errors import FastFisherError, FisherError
from fastfisher.prune import pruner, steps
from tests.fisher.test_gradients import Branching, Tied
from tests.prune.models import assert_same, batches, classifier, images, picture, train

METHODS = ("woodfisher", "diagonal", "magnitude")
TARGETS = ("0.weight", "3.weight", "8.weight", "10.weight")
D = 72 + 144 + 432 + 18


def zeros(model: nn.Module, names: tuple[str, ...] = TARGETS) -> int:
    parameters = dict(model.named_parameters())
    return sum(int((parameters[name] == 0).sum()) for name in names)


def run(model: nn.Module, **options: Any) -> ff.Report:
    defaults: dict[str, Any] = {
        "sparsity": 0.5,
        "num_grads": 32,
        "block_size": 16,
        "num_recomputations": 0,
    }
    data = options.pop("data") if "data" in options else batches(*images(32), 8)
    return ff.prune(model, data, **(defaults | options))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.333, 0.5, 0.9, 0.999])
def test_exactly_the_zeros_asked_for(method: str, scope: str, sparsity: float) -> None:
    model = classifier()
    model.train()
    before = picture(model)
    report = run(model, sparsity=sparsity, scope=scope, method=method)
    assert zeros(model) == report.num_zeros == round(sparsity * D)
    assert [row.zeros for row in report.layers] == [zeros(model, (row.name,)) for row in report.layers]
    if scope == "layer":
        assert all(abs(row.zeros - sparsity * row.weights) < 1 for row in report.layers)
    # everything but the targets' values is as before: places, flags, buffers, generator
    assert_same(before, picture(model), weights=sparsity == 0)
    others = [name for name, _ in model.named_parameters() if name not in TARGETS]
    assert all(torch.equal(before["bits"][name], picture(model)["bits"][name]) for name in others)


@pytest.mark.parametrize("update", ["sum", "joint", None])
@pytest.mark.parametrize("block_size", [1, 7, 64, None])
def test_the_pruned_weights_follow_from_the_inverse_in_float64(
    update: str | None, block_size: int | None
) -> None:
    model = classifier(dtype=torch.float64)
    inputs, labels = images(32, dtype=torch.float64)
    names = ["3.weight", "8.weight"]
    parameters = dict(model.named_parameters())
    rows = []
    model.eval()
    for x, y in zip(inputs, labels, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), [parameters[n] for n in names])
        rows.append(torch.cat([grad.reshape(-1) for grad in grads]))
    g = torch.stack(rows)  # [m, d]
    w = torch.cat([parameters[n].detach().reshape(-1) for n in names])
    damping = 1e-3
    fisher = g.T @ g / len(g)
    sizes = [144, 432]
    block = torch.zeros_like(fisher)
    for start, size in ((0, 144), (144, 432)):
        step = size if block_size is None else block_size
        for a in range(start, start + size, step):
            b = min(a + step, start + size)
            block[a:b, a:b] = fisher[a:b, a:b]
    if block_size is None:
        block = fisher
    f_inv = torch.linalg.inv(block + damping * torch.eye(sum(sizes), dtype=torch.float64))
    saliency = w**2 / (2 * f_inv.diag())
    q = torch.zeros(len(w), dtype=torch.bool)
    q[saliency.argsort()[: round(0.6 * len(w))]] = True
    if update == "sum":
        expected = w - f_inv @ torch.where(q, w / f_inv.diag(), 0)
    elif update == "joint":
        expected = w - f_inv[:, q] @ torch.linalg.solve(f_inv[q][:, q], w[q])
    else:
        expected = w.clone()
    expected[q] = 0

    run(
        model,
        data=[(inputs, labels)],
        sparsity=0.6,
        block_size=block_size,
        damping=damping,
        damping_mode="absolute",
        update=update,
        targets=names,
    )
    found = torch.cat([parameters[n].detach().reshape(-1) for n in names])
    assert torch.equal(found == 0, q)
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10)


def test_the_diagonal_method_ranks_by_the_diagonal_fisher() -> None:
    model, same = classifier(), classifier()
    run(model, method="diagonal", damping=1e-4, damping_mode="absolute")
    run(same, method="woodfisher", block_size=1, update=None, damping=1e-4, damping_mode="absolute")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


def test_huge_damping_gives_the_order_of_magnitude() -> None:
    model, same = classifier(), classifier()
    run(model, damping=1e12, damping_mode="absolute", update=None)
    run(same, method="magnitude", data=None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_zeros_that_are_there_stay_and_count(method: str, scope: str) -> None:
    model = classifier()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in TARGETS:
            weight = dict(model.named_parameters())[name]
            weight[torch.rand(weight.shape, generator=generator) < 0.3] = 0
    dead = {name: (dict(model.named_parameters())[name] == 0) for name in TARGETS}
    report = run(model, sparsity=0.6, method=method, scope=scope)
    assert zeros(model) == round(0.6 * D)
    assert all(bool((dict(model.named_parameters())[name][dead[name]] == 0).all()) for name in TARGETS)
    assert report.zeros_before == sum(int(mask.sum()) for mask in dead.values())
    # pruning to less than is there already changes nothing
    before = picture(model)
    report = run(model, sparsity=0.1, method=method, scope=scope)
    assert_same(before, picture(model))
    assert report.num_zeros == round(0.6 * D)
    assert any("were zero before" in note for note in report.notes)


@pytest.mark.parametrize("options", [{}, {"block_size": None}, {"grad_batch_size": 4, "num_grads": 8}])
def test_the_seed_reproduces_every_bit(options: dict[str, Any]) -> None:
    pruned = []
    for state in (3, 4):
        model = classifier()
        loader = DataLoader(TensorDataset(*images(64)), batch_size=8, shuffle=True)
        torch.manual_seed(state)  # what the caller's generator holds must not matter
        report = run(model, data=loader, seed=11, update="joint", **options)
        pruned.append((picture(model)["bits"], report.data_fingerprint))
    assert all(torch.equal(bits, pruned[1][0][name]) for name, bits in pruned[0][0].items())
    assert pruned[0][1] == pruned[1][1]


def test_loaders_generators_and_lists_give_the_same_network() -> None:
    inputs, labels = images(32)
    results = []
    for data in (
        batches(inputs, labels, 8),
        (batch for batch in batches(inputs, labels, 8)),
        DataLoader(TensorDataset(inputs, labels), batch_size=8),
    ):
        model = classifier()
        run(model, data=data)
        results.append(picture(model)["bits"])
    assert all(torch.equal(results[0][n], other[n]) for other in results[1:] for n in results[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("update", ["sum", "joint"])
def test_half_precision_weights_keep_dtype_and_exact_zeros(dtype: torch.dtype, update: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)
    data = [(torch.randn(32, 6).to(dtype), torch.randint(3, (32,)))]
    before = picture(model)
    run(model, data=data, update=update, sparsity=0.7)
    assert zeros(model, ("0.weight", "2.weight")) == round(0.7 * 360)
    assert before["places"] == picture(model)["places"]


@pytest.mark.parametrize("shared_storage", [False, True])
def test_tied_weights_are_pruned_once_and_stay_tied(shared_storage: bool) -> None:
    torch.manual_seed(0)
    model = Tied(shared_storage)
    data = [(torch.randint(7, (16, 4)), torch.randint(7, (16,)))]
    report = run(model, data=data, num_grads=16, targets="head")
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert report.num_weights == 35
    assert report.layers[0].tied_to == ("head.weight",)
    assert int((model.head.weight == 0).sum()) == round(0.5 * 35)


def test_frozen_layers_are_listed_and_bit_for_bit_the_same() -> None:
    model = classifier()
    model[8].requires_grad_(False)
    before = picture(model)
    report = run(model)
    assert report.frozen == ["8.weight"]
    assert "frozen" in str(report)
    assert torch.equal(before["bits"]["8.weight"], picture(model)["bits"]["8.weight"])
    assert zeros(model) == round(0.5 * (D - 432))


def test_noncontiguous_and_unused_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model[0].weight = nn.Parameter(torch.randn(6, 8).t())
    model.add_module("unused", nn.Linear(4, 4))
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    same = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    same.load_state_dict({name: t for name, t in model.state_dict().items() if "unused" not in name})
    data = [(torch.randn(32, 6), torch.randint(3, (32,)))]
    report = run(model, data=data)
    assert any("No gradient reached unused.weight" in note for note in report.notes)
    assert model[0].weight.stride() == (1, 8)
    model_only, _ = copy.deepcopy(same), run(same, data=data)
    again = run(model_only, data=data, seed=3)
    assert again.num_zeros == round(0.5 * 72)
    assert torch.equal(model_only[0].weight, same[0].weight)


def test_a_model_vmap_cannot_trace_is_pruned_and_the_report_says_why() -> None:
    torch.manual_seed(0)
    model = Branching()
    report = run(model, data=[(torch.randn(16, 4), torch.randint(3, (16,)))], num_grads=16, block_size=6)
    assert report.num_zeros == 12
    assert any("one at a time: vmap cannot trace the model (RuntimeError" in note for note in report.notes)
    assert report.predicted_change is not None


class FailsLate(nn.Module):
    """Raises in the forward of the sample whose first entry is 99."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.inner = classifier()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        if not torch._C._functorch.is_batchedtensor(x) and bool((x == 99).any()):
            raise self.error
        if torch._C._functorch.is_batchedtensor(x):
            raise RuntimeError("no vmap here")
        return self.inner(x)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            RuntimeError("boom"),
            FastFisherError,
            "^the model failed on batch.* 3 of the loader: RuntimeError: boom$",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
@pytest.mark.parametrize("grad_batch_size", [1, 4])
def test_a_forward_that_fails_half_way_leaves_the_model_as_it_was(
    error: BaseException, raised: type[BaseException], message: str | None, grad_batch_size: int
) -> None:
    model = FailsLate(error)
    model.train()
    model.inner[8].weight.grad = torch.ones_like(model.inner[8].weight)
    inputs, labels = images(32)
    inputs[27, 0, 0, 0] = 99
    before = picture(model)
    with pytest.raises(raised, match=message):
        run(
            model,
            data=batches(inputs, labels, 8),
            grad_batch_size=grad_batch_size,
            num_grads=32 // grad_batch_size,
        )
    assert_same(before, picture(model))


@pytest.mark.parametrize("at_call", [1, 2, 3])
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_eval_fn_that_fails_leaves_the_model_as_it_was(at_call: int, error: BaseException) -> None:
    model = classifier()
    calls = []

    def eval_fn(given: nn.Module) -> float:
        calls.append(zeros(given))
        given.train()
        torch.rand(1)
        if len(calls) == at_call:
            raise error
        return 1.0

    before = picture(model)
    with pytest.raises(type(error)):
        run(model, eval_fn=eval_fn)
    assert_same(before, picture(model))
    assert calls == [0, round(0.5 * D), round(0.5 * D)][:at_call]


@pytest.mark.parametrize("phase", ["updated", "select", "as_parameters", "count_flops", "peak_bytes"])
def test_an_interrupt_in_any_phase_leaves_the_model_as_it_was(
    phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(steps if phase in ("updated", "select") else pruner, phase, interrupt)
    model = classifier()
    model.train()
    before = picture(model)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    assert_same(before, picture(model))


def test_an_update_beyond_the_dtype_is_an_error_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "updated", lambda weight, mask, *_: torch.where(mask, 1e30, 0.0))
    model = nn.Sequential(nn.Linear(8, 8)).to(torch.float16)
    data = [(torch.randn(16, 8).half(), torch.randint(8, (16,)))]
    before = picture(model)
    with pytest.raises(FisherError, match=r"the update of '0.weight' reaches 1e\+30, beyond torch.float16"):
        run(model, data=data, num_grads=16)
    assert_same(before, picture(model))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": 90}, "sparsity must be a fraction in [0, 1); got 90. Did you mean 0.90?"),
    ({"sparsity": 1}, "sparsity must be a fraction in [0, 1); got 1."),
    ({"sparsity": -0.1}, "sparsity must be a fraction in [0, 1); got -0.1."),
    ({"sparsity": float("nan")}, "sparsity must be a fraction in [0, 1); got nan."),
    ({"sparsity": "0.5"}, "sparsity must be a fraction in [0, 1); got '0.5'."),
    (
        {"method": "wood"},
        "method must be one of 'woodfisher', 'woodtaylor', 'fishleg', 'diagonal', 'obd', 'kfac', 'hessian', "
        "'magnitude', 'random'; got 'wood'",
    ),
    ({"scope": "all"}, "scope must be one of 'global', 'layer'; got 'all'"),
    ({"update": "all"}, "update must be one of 'auto', 'sum', 'joint', 'greedy', None; got 'all'"),
    (
        {"update": "greedy", "block_size": None},
        "update='greedy' goes through blocks of an inverse; got method='woodfisher' with block_size=None",
    ),
    ({"update": "greedy", "method": "kfac"}, "got method='kfac' with block_size=16"),
    ({"sparsity": None}, "sparsity is missing: pattern='unstructured' leaves it open"),
    ({"pattern": "2:4", "sparsity": 0.8}, "pattern='2:4' makes a sparsity of 0.5, so leave it out; got 0.8"),
    ({"pattern": "4:2"}, "pattern must be 'unstructured', N:M with N < M such as '2:4', or blockN"),
    (
        {"pattern": "block7"},
        "none of 4 tensors can take the pattern 'block7'; '0.weight': 2 inputs are no multiple of 7",
    ),
    ({"cost": "time"}, "cost must be one of 'params', 'flops'; got 'time'"),
    ({"fisher_type": "true"}, "fisher_type must be one of 'empirical', 'mc', 'exact'; got 'true'"),
    ({"fisher_type": "mc", "method": "woodtaylor"}, "method='woodtaylor' needs the gradient of the loss"),
    ({"fisher_type": "mc", "method": "obd"}, "method='obd' takes the Hessian of the loss, not a Fisher"),
    ({"fisher_type": "exact", "method": "kfac"}, "method='kfac' knows fisher_type 'empirical' and 'mc'"),
    ({"fisher_type": "exact", "grad_batch_size": 4}, "sums over the outputs of single samples; got"),
    ({"max_layer_sparsity": 1.5}, "max_layer_sparsity must be within [0, 1]; got 1.5"),
    ({"max_layer_sparsity": {"nosuch": 0.5}}, "max_layer_sparsity={'nosuch': ...} matches none of"),
    ({"max_layer_sparsity": 0.1}, "needs 333 zeros, but max_layer_sparsity leaves"),
    ({"method": "random", "cost": "flops", "data": None}, "cost='flops' needs a sample; got None"),
    ({"method": "kfac", "num_grads": 33}, "num_grads=33 but the loader yields 32 samples."),
    ({"damping": 0}, "damping must be a positive number; got 0"),
    ({"damping": -1e-5}, "damping must be a positive number; got -1e-05"),
    ({"damping": float("inf")}, "damping must be a positive number; got inf"),
    ({"damping_mode": "trace"}, "damping_mode must be one of 'absolute', 'relative'; got 'trace'"),
    ({"num_grads": 0}, "num_grads must be a whole number of at least 1; got 0"),
    ({"num_grads": 1.5}, "num_grads must be a whole number of at least 1; got 1.5"),
    ({"grad_batch_size": 0}, "grad_batch_size must be a whole number of at least 1; got 0"),
    ({"block_size": 0}, "block_size must be a whole number of at least 1; got 0"),
    ({"block_size": 5000}, "block_size=5000 exceeds the 666 weights"),
    ({"seed": 0.5}, "seed must be a whole number; got 0.5"),
    ({"targets": "layer9"}, "targets=['layer9'] matched none of 12 tensors."),
    ({"num_grads": 33}, "num_grads=33 but the loader yields 32 samples."),
    ({"data": None}, "method='woodfisher' needs data to take gradients from; got None"),
    ({"data": 5}, "data must be an iterable of batches"),
    (
        {"memory_limit": "lots"},
        "a memory limit must be a positive number of bytes or a text like \"8 GB\"; got 'lots'",
    ),
    (
        {"memory_limit": "20 kB"},
        "block_size=16 needs 44.7 kB; free on cpu: 20.0 kB. No block size fits.",
    ),
    ({"memory_limit": 10}, "No block size fits."),
    ({"eval_fn": lambda model: "good"}, "eval_fn must return a number or a dict of numbers; got 'good'"),
]


@pytest.mark.parametrize(
    ("options", "message"), BAD, ids=[str(sorted(options)) + str(i) for i, (options, _) in enumerate(BAD)]
)
def test_bad_input_is_one_sentence_and_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = classifier()
    model.train()
    before = picture(model)
    with pytest.raises(FastFisherError, match=re.escape(message)) as caught:
        run(model, **options)
    assert "\n" not in str(caught.value)
    assert_same(before, picture(model))


def test_weights_that_are_not_finite_are_named() -> None:
    model = classifier()
    with torch.no_grad():
        model[8].weight[0, 0] = float("nan")
    before = picture(model)
    with pytest.raises(FastFisherError, match=r"'8\.weight' holds weights that are not finite"):
        run(model)
    assert_same(before, picture(model))


def test_non_finite_gradients_are_counted_in_the_report() -> None:
    model = classifier()
    inputs, labels = images(40)
    inputs[9] = float("nan")
    report = run(model, data=batches(inputs, labels, 8))
    assert report.non_finite_grads == 1
    assert "1 of 33 gradients were non-finite (first: batch 1, '0.weight', float32)." in report.notes


def test_progress_counts_to_the_end() -> None:
    seen: list[tuple[str, int, int]] = []
    run(classifier(), progress=lambda *event: seen.append(event))
    assert seen[-1] == ("gradients", 32, 32)


def test_one_block_over_the_network_works_in_the_dual_form() -> None:
    model = classifier()
    report = run(model, block_size=None, update="joint")
    assert report.form == "dual"
    assert zeros(model) == round(0.5 * D)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": None},
        {"method": "diagonal"},
        {"method": "magnitude"},
        {"grad_batch_size": 4, "num_grads": 8},
    ],
)
def test_plan_tells_bytes_and_seconds_and_changes_nothing(options: dict[str, Any]) -> None:
    model = classifier()
    model.train()
    before = picture(model)
    data = batches(*images(32), 8)
    plan = ff.plan(model, data, **({"sparsity": 0.5, "num_grads": 32, "block_size": 16} | options))
    assert_same(before, picture(model))
    assert plan.fits
    assert plan.peak_bytes == max(phase.bytes for phase in plan.phases) > 0
    assert plan.seconds is not None or options.get("method") == "magnitude"
    text = str(plan)
    assert all(phase.name in text for phase in plan.phases)


def test_plan_does_not_read_what_can_be_read_once() -> None:
    data = iter(batches(*images(32), 8))
    plan = ff.plan(classifier(), data, sparsity=0.5, num_grads=32, block_size=16)
    assert plan.seconds is None
    assert "can be read only once" in str(plan)
    assert len(list(data)) == 4


def test_plan_and_prune_refuse_alike_and_the_block_named_fits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 10))
    data = [(torch.randn(600, 100), torch.randint(10, (600,)))]
    options: dict[str, Any] = {"sparsity": 0.5, "num_grads": 600, "memory_limit": "2 MB"}
    plan = ff.plan(model, data, block_size=500, **options)
    assert not plan.fits
    assert plan.largest_block == 200
    assert plan.refusal in str(plan)
    with pytest.raises(FastFisherError, match=re.escape(plan.refusal)):
        ff.prune(model, data, block_size=500, **options)
    assert ff.prune(model, data, block_size=200, **options).num_zeros == 5500


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, tuple[Tensor, Tensor], Callable[[nn.Module], float]]:
    """A convolutional network trained on scikit-learn's digits, its training data, its test accuracy."""
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(inputs, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    seen, held = order[:1297], order[1297:]
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    train(model, x[seen], y[seen], epochs=12, seed=1)

    def accuracy(given: nn.Module) -> float:
        with torch.no_grad():
            return float((given(x[held]).argmax(1) == y[held]).float().mean())

    return model, (x[seen], y[seen]), accuracy


def test_woodfisher_beats_magnitude_on_digits(
    digits: tuple[nn.Module, tuple[Tensor, Tensor], Callable[[nn.Module], float]],
) -> None:
    trained, samples, accuracy = digits
    model = copy.deepcopy(trained)
    report = ff.prune(
        model, batches(*samples, 64), sparsity=0.9, num_grads=1024, block_size=64, eval_fn=accuracy
    )
    assert report.dense > 0.95
    assert report.pruned == pytest.approx(accuracy(model))
    assert report.pruned > report.control + 0.05
    assert report.pruned > 0.85


def test_the_quadratic_model_predicts_a_small_change(
    digits: tuple[nn.Module, tuple[Tensor, Tensor], Callable[[nn.Module], float]],
) -> None:
    trained, samples, _ = digits
    model = copy.deepcopy(trained)
    report = ff.prune(model, batches(*samples, 64), sparsity=0.3, num_grads=256, num_recomputations=0)
    assert report.loss_samples == 128
    before = F.cross_entropy(trained(samples[0][:128]), samples[1][:128]).item()
    after = F.cross_entropy(model(samples[0][:128]), samples[1][:128]).item()
    assert report.loss_dense == pytest.approx(before, rel=1e-4)
    assert report.loss_pruned == pytest.approx(after, rel=1e-4)
    assert report.predicted_change is not None
    assert report.predicted_change >= 0
    assert report.predicted_change == pytest.approx(after - before, abs=0.01)


def test_a_norm_that_needs_a_batch_works_with_mini_batch_gradients_and_is_named_without() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3))
    data = [(torch.randn(16, 4), torch.randint(3, (16,)))]
    with pytest.raises(
        FastFisherError, match=r"the model failed on batch 0 .*Expected more than 1 value per channel"
    ):
        run(model, data=data, num_grads=16)
    options: dict[str, Any] = {"sparsity": 0.4, "num_grads": 4, "grad_batch_size": 4, "block_size": 8}
    assert ff.plan(model, data, **options).seconds is not None
    assert run(model, data=data, **options).num_zeros == round(0.4 * 35)
