"""Gradients of odd models against a loop of plain autograd in float64, and what the stream says and refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fastfisher.errors import FastFisherError, FisherError
from fastfisher.fisher.batches import SampleReader, known_samples, read_batch
from fastfisher.fisher.blocks import BlockLayout, LiveLayout
from fastfisher.fisher.gradients import GradientStream, chunks
from fastfisher.fisher.objective import Objective, untouched
from tests.prune.models import assert_same, batches, classifier, images, picture

CPU = torch.device("cpu")


def stream_of(
    model: nn.Module,
    data: Any,
    num_grads: int,
    names: Sequence[str] | None = None,
    *,
    live: Tensor | None = None,
    memory_limit: int = 1 << 30,
    **options: Any,
) -> GradientStream:
    parameters = dict(model.named_parameters())
    names = list(parameters) if names is None else names
    layout = BlockLayout(names, [parameters[name].shape for name in names], None)
    if live is not None:
        layout = LiveLayout(layout, live)
    objective = Objective(model, names, **options)
    return GradientStream(objective, data, layout, num_grads=num_grads, memory_limit=memory_limit)


def rows_of(model: nn.Module, data: Any, num_grads: int, **options: Any) -> tuple[Tensor, GradientStream]:
    stream = stream_of(model, data, num_grads, **options)
    with untouched(model, 0):
        rows = torch.cat([piece.clone() for piece in stream])
    return rows, stream


def loop(model: nn.Module, names: Sequence[str], losses: Sequence[Callable[[nn.Module], Tensor]]) -> Tensor:
    """Gradients [k, d] in float64 by plain backward, on a copy of the model in eval mode."""
    model = copy.deepcopy(model).double().eval()
    rows = []
    for loss in losses:
        model.zero_grad()
        loss(model).backward()
        parameters = dict(model.named_parameters())
        zero = {name: torch.zeros_like(parameters[name]) for name in names}
        grads = [parameters[name].grad if parameters[name].grad is not None else zero[name] for name in names]
        rows.append(torch.cat([grad.reshape(-1) for grad in grads]))
    return torch.stack(rows)


def cross_entropies(inputs: Tensor, labels: Tensor) -> list[Callable[[nn.Module], Tensor]]:
    return [
        lambda model, x=x, y=y: F.cross_entropy(model(x[None].double()), y[None])
        for x, y in zip(inputs, labels, strict=True)
    ]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def test_per_sample_gradients_equal_a_loop_in_float64() -> None:
    model = classifier()
    inputs, labels = images(23)
    expected = loop(model, list(dict(model.named_parameters())), cross_entropies(inputs, labels))
    found, stream = rows_of(model, batches(inputs, labels, 5), 23)
    assert found.dtype == torch.float32
    assert relative(found, expected) < 1e-5
    assert stream.objective.why_loop is None
    norms = (expected**2).sum(1)
    assert stream.effective == pytest.approx(float(norms.sum() ** 2 / (norms**2).sum()), rel=1e-4)


def test_float64_models_give_float64_gradients() -> None:
    model = classifier(dtype=torch.float64)
    inputs, labels = images(7, dtype=torch.float64)
    expected = loop(model, list(dict(model.named_parameters())), cross_entropies(inputs, labels))
    found, _ = rows_of(model, batches(inputs, labels, 4), 7)
    assert found.dtype == torch.float64
    assert relative(found, expected) < 1e-12


@pytest.mark.parametrize("size", [1, 4, 6, 30])
def test_mini_batch_means_cross_the_loaders_batches(size: int) -> None:
    model = classifier()
    inputs, labels = images(30)
    names = ["3.weight", "8.weight"]
    expected = loop(model, names, cross_entropies(inputs, labels))
    count = 30 // size
    expected = expected[: count * size].reshape(count, size, -1).mean(1)
    found, _ = rows_of(model, batches(inputs, labels, 7), count, names=names, grad_batch_size=size)
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("limit", [1, 20_000, 1 << 30])
def test_the_memory_limit_changes_pieces_and_not_gradients(limit: int) -> None:
    model = classifier()
    inputs, labels = images(20)
    data = batches(inputs, labels, 3)
    expected, _ = rows_of(model, data, 20)
    stream = stream_of(model, data, 20, memory_limit=limit)
    with untouched(model, 0):
        pieces = [piece.clone() for piece in stream]
    assert relative(torch.cat(pieces), expected.double()) < 1e-5
    row = 4 * expected.shape[1]
    assert all(piece.nbytes <= max(row, limit) for piece in pieces)


def test_chunks_stay_under_the_limit() -> None:
    for row, limit, activation in [
        (10**6, 10**9, 10**6),
        (10**6, 10**7, 0),
        (10**9, 10**6, 5),
        (40, 10**9, 10**8),
    ]:
        rows, micro = chunks(row, 512, limit, activation)
        assert rows >= micro >= 1
        assert rows == 1 or rows * row + micro * (row + 3 * activation) <= limit or micro == 1


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's; `shared_storage` ties two parameters by memory alone."""

    def __init__(self, shared_storage: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 7, bias=False)
        weight = self.embedding.weight
        self.head.weight = nn.Parameter(weight.data) if shared_storage else weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(tokens).mean(1)))


@pytest.mark.parametrize("shared_storage", [False, True])
def test_a_tied_weight_gets_the_gradients_of_all_its_uses(shared_storage: bool) -> None:
    torch.manual_seed(0)
    model = Tied(shared_storage)
    tokens, labels = torch.randint(7, (6, 4)), torch.randint(7, (6,))
    reference = Tied(False)
    reference.load_state_dict(model.state_dict())
    losses = [lambda m, i=i: F.cross_entropy(m(tokens[i : i + 1]), labels[i : i + 1]) for i in range(6)]
    expected = loop(reference, ["embedding.weight"], losses)
    found, _ = rows_of(model, [(tokens, labels)], 6, names=["embedding.weight"])
    assert relative(found, expected) < 1e-5


class Branching(nn.Module):
    """Control flow that depends on the data, which vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) if x.sum().item() > 0 else self.right(x)


def test_a_model_vmap_cannot_trace_runs_sample_by_sample_and_says_so() -> None:
    torch.manual_seed(0)
    model = Branching()
    inputs, labels = torch.randn(9, 4), torch.randint(3, (9,))
    expected = loop(model, list(dict(model.named_parameters())), cross_entropies(inputs, labels))
    found, stream = rows_of(model, [(inputs, labels)], 9)
    assert relative(found, expected) < 1e-5
    assert stream.objective.why_loop is not None
    assert "RuntimeError" in stream.objective.why_loop


def test_float_labels_mean_squared_error_and_several_inputs() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.linear(a + b)

    torch.manual_seed(0)
    model = Sum()
    a, b, target = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5)
    losses = [
        lambda m, i=i: (m(a[i : i + 1].double(), b[i : i + 1].double()) - target[i]).square().mean()
        for i in range(5)
    ]
    expected = loop(model, ["linear.weight", "linear.bias"], losses)
    found, _ = rows_of(model, [(a, b, target)], 5)
    assert relative(found, expected) < 1e-5


class WithLoss(nn.Module):
    """Returns an object with .loss, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> SimpleNamespace:
        logits = self.linear(x)
        return SimpleNamespace(
            logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels)
        )


def test_dict_batches_and_loss_fn_give_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = WithLoss()
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    as_dict, _ = rows_of(model, [{"x": x, "labels": y, "mask": None}], 6)
    as_pair, _ = rows_of(model, [(x, y)], 6)

    def loss_fn(given: nn.Module, batch: Any) -> Tensor:
        assert given is model
        return F.cross_entropy(given.linear(batch["x"]), batch["labels"])

    as_function, _ = rows_of(model, [{"x": x, "labels": y}], 6, loss_fn=loss_fn)
    assert torch.equal(as_dict, as_pair)
    assert torch.equal(as_dict, as_function)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_give_float32_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    inputs, labels = torch.randn(10, 6).to(dtype), torch.randint(3, (10,))
    expected = loop(model, list(dict(model.named_parameters())), cross_entropies(inputs, labels))
    found, _ = rows_of(model, [(inputs, labels)], 10)
    assert found.dtype == torch.float32
    assert relative(found, expected) < 2e-2


def test_unused_removed_and_noncontiguous_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model.register_parameter("unused", nn.Parameter(torch.randn(2, 3)))
    model[0].weight = nn.Parameter(torch.randn(4, 5).t())
    assert not model[0].weight.is_contiguous()
    inputs, labels = torch.randn(6, 4), torch.randint(3, (6,))
    names = ["unused", "0.weight", "2.weight"]
    expected = loop(model, names, cross_entropies(inputs, labels))
    for size in (1, 2):
        found, stream = rows_of(model, [(inputs, labels)], 6 // size, names=names, grad_batch_size=size)
        assert relative(found, expected.reshape(6 // size, size, -1).mean(1)) < 1e-5
        assert stream.unreached == ["unused"]
    live = torch.rand(expected.shape[1]) < 0.5
    live[6:26] = False  # one tensor as a whole
    found, stream = rows_of(model, [(inputs, labels)], 6, names=names, live=live)
    assert relative(found, expected[:, live]) < 1e-5
    assert stream.unreached == ["unused"]


def test_streams_go_on_in_the_data_and_begin_again_at_its_end() -> None:
    model = classifier()
    inputs, labels = images(10)
    names = [name for name, _ in model.named_parameters()]
    layout = BlockLayout(names, [p.shape for p in model.parameters()], None)
    objective = Objective(model, names)

    def three(data: Any, repeat: int | None) -> list[Tensor]:
        reader = SampleReader(data, CPU, repeat=repeat)
        streams = (GradientStream(objective, reader, layout, num_grads=6) for _ in range(3))
        with untouched(model, 0):
            return [torch.cat([piece.clone() for piece in stream]) for stream in streams]

    data = batches(inputs, labels, 4)
    everything, _ = rows_of(model, data, 10)
    found = three(data, 6)
    order = [*range(10), *range(8)]
    for i, rows in enumerate(found):
        assert relative(rows, everything[order[6 * i : 6 * i + 6]]) < 1e-5
    with pytest.raises(FastFisherError, match="num_grads=6 but the loader yields 4 samples"):
        three(data, None)
    with pytest.raises(
        FastFisherError, match="4 samples after the 6 of the estimates before; give data that"
    ):
        three(iter(data), 6)


def test_a_pass_with_too_few_samples_is_not_repeated() -> None:
    model = classifier()
    loader = DataLoader(TensorDataset(*images(5)), batch_sampler=[[0, 1], [2, 3, 4]])
    reader = SampleReader(loader, CPU, repeat=6)
    names = [name for name, _ in model.named_parameters()]
    layout = BlockLayout(names, [p.shape for p in model.parameters()], None)
    stream = GradientStream(Objective(model, names), reader, layout, num_grads=6)
    with pytest.raises(FastFisherError, match="num_grads=6 but the loader yields 5 samples"):
        list(stream)


def test_generators_loaders_and_lists_are_read_alike_and_no_further_than_needed() -> None:
    model = classifier()
    inputs, labels = images(40)
    data = batches(inputs, labels, 4)
    read = []

    def generator() -> Any:
        for i, batch in enumerate(data):
            read.append(i)
            yield batch

    from_list, _ = rows_of(model, data, 10)
    from_generator, _ = rows_of(model, generator(), 10)
    from_loader, _ = rows_of(model, DataLoader(TensorDataset(inputs, labels), batch_size=4), 10)
    assert read == [0, 1, 2]
    assert torch.equal(from_list, from_generator)
    assert torch.equal(from_list, from_loader)


def test_shuffled_loaders_follow_the_seed() -> None:
    model = classifier()
    loader = DataLoader(TensorDataset(*images(40)), batch_size=4, shuffle=True)
    first, stream = rows_of(model, loader, 10)
    torch.manual_seed(99)
    second, again = rows_of(model, loader, 10)
    assert torch.equal(first, second)
    assert stream.fingerprint == again.fingerprint


def test_the_fingerprint_knows_the_data() -> None:
    def fingerprint(inputs: Tensor, labels: Tensor) -> str:
        reader = SampleReader([(inputs, labels)], CPU)
        reader.take(5, exactly=False)
        return reader.fingerprint

    inputs, labels = images(5)
    same = fingerprint(inputs, labels)
    assert fingerprint(inputs.clone(), labels) == same
    assert fingerprint(inputs.bfloat16(), labels) != same
    inputs[3, 0, 0, 0] += 1e-3
    assert fingerprint(inputs, labels) != same


def test_non_finite_gradients_are_named_skipped_and_replaced() -> None:
    model = classifier()
    inputs, labels = images(12)
    good, _ = rows_of(model, [(inputs[[0, 2, 3, 5, 6, 7]], labels[[0, 2, 3, 5, 6, 7]])], 6)
    inputs[1], inputs[4, 0, 0, 0] = float("nan"), float("inf")
    found, stream = rows_of(model, batches(inputs, labels, 3), 6, names=["0.weight", "8.weight"])
    expected, _ = rows_of(
        model, [(inputs[[0, 2, 3, 5, 6, 7]], labels[[0, 2, 3, 5, 6, 7]])], 6, names=["0.weight", "8.weight"]
    )
    assert relative(found, expected.double()) < 1e-5
    assert good.shape[0] == found.shape[0] == 6
    assert (stream.num_finite, stream.num_non_finite) == (6, 2)
    assert stream.first_non_finite == "batch 0, '0.weight', float32"
    assert all(bool(torch.isfinite(leaf).all()) for kept in stream.kept for leaf in kept.leaves)


def test_missing_gradients_become_rows_of_zeros() -> None:
    model = classifier()
    inputs, labels = images(6)
    inputs[1] = float("nan")
    found, stream = rows_of(model, [(inputs, labels)], 6)
    assert found.shape[0] == 6
    assert (stream.num_finite, stream.num_non_finite) == (5, 1)
    assert bool((found[5] == 0).all())


def test_a_mini_batch_with_one_bad_sample_is_skipped_whole() -> None:
    model = classifier()
    inputs, labels = images(12)
    inputs[4] = float("nan")
    found, stream = rows_of(model, [(inputs, labels)], 3, grad_batch_size=3)
    assert found.shape[0] == 3
    assert stream.num_non_finite == 1
    assert sum(map(len, stream.kept)) == 9


def test_losses_that_are_not_finite_are_named() -> None:
    model = nn.Linear(3, 2)
    x, y = torch.ones(4, 3), torch.zeros(4, dtype=torch.long)

    def loss_fn(given: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(given(batch[0]), batch[1]) + batch[2].sum()

    extra = torch.tensor([0.0, float("inf"), 0.0, 0.0])
    found, stream = rows_of(model, [(x, y, extra)], 3, loss_fn=loss_fn)
    assert found.shape[0] == 3
    assert stream.first_non_finite == "batch 0, the loss, float32"


def test_nothing_finite_is_an_error_even_from_a_loader_without_end() -> None:
    model = classifier()
    inputs, labels = images(4)

    def forever() -> Any:
        while True:
            yield torch.full_like(inputs, float("nan")), labels

    with pytest.raises(
        FisherError, match=r"all \d+ gradients were non-finite \(first: batch 0, '0.weight', float32\)"
    ):
        rows_of(model, forever(), 8)


def test_a_short_loader_is_refused_before_the_work_where_its_length_is_known() -> None:
    model = classifier()
    inputs, labels = images(18)
    data = batches(inputs, labels, 4)
    for known in (data, DataLoader(TensorDataset(inputs, labels), batch_size=4)):
        with pytest.raises(FastFisherError, match=r"^num_grads=20 but the loader yields 18 samples\.$"):
            stream_of(model, known, 20)
    with pytest.raises(FastFisherError, match=r"^num_grads=20 but the loader yields 18 samples\.$"):
        rows_of(model, iter(data), 20)
    with pytest.raises(
        FastFisherError, match=r"^num_grads=7 of grad_batch_size=3 but the loader yields 18 samples\.$"
    ):
        rows_of(model, iter(data), 7, grad_batch_size=3)
    with pytest.raises(FastFisherError, match=r"^num_grads=2 but the loader yields 0 samples\.$"):
        rows_of(model, iter([]), 2)


def test_known_samples() -> None:
    class Endless(IterableDataset):
        def __iter__(self) -> Any:
            return iter([])

    dataset = TensorDataset(*images(10))
    assert known_samples(DataLoader(dataset, batch_size=4)) == 10
    assert known_samples(DataLoader(dataset, batch_size=4, drop_last=True)) == 8
    assert known_samples(DataLoader(Endless(), batch_size=4)) is None
    assert known_samples(DataLoader(dataset, batch_sampler=[[0, 1], [2]])) is None
    assert known_samples(iter([])) is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(3, 4), "data must be an iterable of batches, .* got Tensor"),
        (3, "data must be an iterable of batches, .* got int"),
        ([torch.zeros(3, 4)], r"a batch must be \(input, label\) or a dict, .* got a tensor of shape"),
        (
            [(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))],
            r"disagree on the number of samples: \[3, 2\]",
        ),
        ([(torch.zeros(3, 4), ["a", "b", "c"])], "must be a tensor with samples .* got str"),
        ([(torch.zeros(3, 4), torch.tensor(1))], "got a tensor without dimensions"),
        ([{}], "batch 0 of the loader holds no tensor"),
        (
            [(torch.zeros(3, 4), torch.zeros(3, dtype=torch.cfloat))],
            "no loss can be inferred for torch.complex64 labels",
        ),
        (
            [(torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool))],
            r"bool labels must .* \(1, 2\); got \(1,\); labels of classes are integers",
        ),
        ([(torch.zeros(3, 4), torch.zeros(3, 9))], "float labels must have the shape of the output"),
        ([(torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.long))], "integer labels of shape .* do not fit"),
        (
            [(torch.zeros(3, 4), torch.full((3,), 77))],
            "the model failed on batch 0 of the loader: .*out of bounds",
        ),
        (
            [(torch.zeros(3, 5), torch.zeros(3, dtype=torch.long))],
            "the model failed on batch 0 of the loader: ",
        ),
    ],
)
def test_bad_batches_are_refused_in_one_sentence(data: Any, message: str) -> None:
    model = nn.Linear(4, 2)
    before = picture(model)
    with pytest.raises(FastFisherError, match=message):
        rows_of(model, data, 1)
    assert_same(before, picture(model))


def test_losses_of_the_wrong_kind_are_refused() -> None:
    model = WithLoss()
    x, y = torch.randn(4, 3), torch.randint(2, (4,))
    with pytest.raises(FastFisherError, match=r"returned no loss for a batch with the keys \['x'\]"):
        rows_of(model, [{"x": x}], 2)
    with pytest.raises(
        FastFisherError, match=r"the loss of a batch must be one number; got a tensor of shape \(1, 2\)"
    ):
        rows_of(model, [(x, y)], 2, loss_fn=lambda m, b: m(b[0]).logits)
    with pytest.raises(FastFisherError, match="must be one number; got float"):
        rows_of(model, [(x, y)], 2, loss_fn=lambda m, b: 1.0)


def test_samples_of_different_shapes() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.mean(1))

    torch.manual_seed(0)
    model = Mean()
    data = [(torch.randn(2, n, 3), torch.randint(2, (2,))) for n in (4, 4, 6)]
    found, _ = rows_of(model, data, 6)
    assert found.shape[0] == 6
    with pytest.raises(FastFisherError, match="batch 2 of the loader differs in shape or dtype"):
        rows_of(model, data, 2, grad_batch_size=3)


def test_untouched_restores_flags_buffers_and_generator_after_an_interrupt() -> None:
    model = classifier()
    model.train()
    model[1].eval()
    model[8].weight.grad = torch.randn_like(model[8].weight)
    before = picture(model)

    def disturb() -> None:
        with untouched(model, 3):
            assert not any(module.training for module in model.modules())
            model.train()
            torch.rand(3)
            model(images(4)[0])
            model[1]._buffers["running_mean"] = torch.zeros(4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disturb()
    assert_same(before, picture(model))


def test_a_forward_that_writes_its_buffers_leaves_them_as_they_were() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x)

    model = Counting()
    data = [(torch.randn(4, 3), torch.randint(2, (4,)))]
    before = picture(model)
    found, _ = rows_of(model, data, 4)
    assert found.shape[0] == 4
    assert_same(before, picture(model))


def test_slopes_are_the_gradients_times_the_direction() -> None:
    model = classifier(dtype=torch.float64)
    inputs, labels = images(6, dtype=torch.float64)
    names = ["0.weight", "8.weight"]
    rows, stream = rows_of(model, [(inputs, labels)], 6, names=names)
    delta = torch.randn(rows.shape[1], dtype=torch.float64)
    with untouched(model, 0):
        slopes = stream.objective.slopes(stream.layout.unflatten(delta), stream.kept[0])
        losses = stream.objective.losses(stream.objective.weights, stream.kept[0])
    assert torch.allclose(slopes, rows @ delta, rtol=1e-10)
    assert torch.allclose(losses, stream.kept_losses[0], rtol=1e-12)


def test_read_batch_keeps_the_structure() -> None:
    batch = {"a": torch.zeros(2, 3), "b": (torch.ones(2), None)}
    samples = read_batch(batch)
    again = samples.batch()
    assert list(again) == ["a", "b"]
    assert again["b"][1] is None
    assert torch.equal(again["a"], batch["a"])
    assert len(samples.narrow(1, 2)) == 1
