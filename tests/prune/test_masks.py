"""Zeros stay zero through every optimizer, in weights and state, and what is written past the optimizer is noticed."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastfisher as ff
from fastfisher.errors import FastFisherError
from tests.device import DEVICE
from tests.fisher.test_gradients import Tied
from tests.prune.models import batches, classifier, images

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, foreach=False),
    "sgd-foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, foreach=False),
    "adam-foreach": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
}
DATA = batches(*images(32), 8)


def sparse(seed: int = 0, share: float = 0.6) -> nn.Module:
    """The classifier with zeros in its target weights, by magnitude."""
    model = classifier(seed)
    ff.prune(model, None, method="magnitude", sparsity=share)
    return model.train()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def steps(model: nn.Module, *optimizers: Optimizer, call: nn.Module | None = None) -> None:
    for batch in DATA:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss(call or model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()


def removed(model: nn.Module, masks: dict[str, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    for name, mask in masks.items():
        yield model.get_parameter(name), ~mask


def assert_zero(model: nn.Module, masks: dict[str, Tensor], *optimizers: Optimizer) -> None:
    """Weights and states are exactly zero where removed, and only there as far as weights go."""
    assert sum(int((~mask).sum()) for mask in masks.values()) > 0
    for parameter, gone in removed(model, masks):
        assert not parameter.detach()[gone].any()
        assert bool(parameter.detach()[~gone].any())
        for optimizer in optimizers:
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    assert not value[gone].any()
                    assert bool(value[~gone].any())


def test_without_it_one_step_brings_the_zeros_back() -> None:
    model = sparse()
    before = sum(int((p == 0).sum()) for p in model.parameters())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    steps(model, optimizer)
    assert sum(int((p == 0).sum()) for p in model.parameters()) < before / 10


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_and_state_stay_zero(kind: str) -> None:
    model, plain = sparse(), sparse()
    optimizer, other = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](plain.parameters())
    held = ff.hold_sparsity(model, optimizer)
    assert list(held.masks) == ["0.weight", "3.weight", "8.weight", "10.weight"]
    for net, own in ((model, optimizer), (plain, other)):
        torch.manual_seed(0)
        loss(net, DATA[0]).backward()
        own.step()
    # one step from the same point: the weights that are kept know nothing of the hook
    for (a, gone), (b, _) in zip(removed(model, held.masks), removed(plain, held.masks), strict=True):
        assert torch.equal(a[~gone], b[~gone])
    steps(model, optimizer)
    assert_zero(model, held.masks, optimizer)
    assert not held.mended


def test_masks_of_state_that_is_there_already() -> None:
    model = sparse()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    masks = {n: p.detach() != 0 for n, p in model.named_parameters() if p.dim() > 1 and (p == 0).any()}
    steps(model, optimizer)
    with torch.no_grad():
        for parameter, gone in removed(model, masks):
            parameter[gone] = 0
    held = ff.hold_sparsity(model, optimizer)  # the state is dense until now
    assert_zero(model, held.masks, optimizer)
    assert all(int(state["step"]) == len(DATA) for state in optimizer.state.values())


def test_several_optimizers_and_accumulation() -> None:
    model = sparse()
    first = OPTIMIZERS["adam"](model[:4].parameters())
    second = OPTIMIZERS["sgd"](model[4:].parameters())
    held = ff.hold_sparsity(model, [first, second])
    for batch in DATA:
        loss(model, batch).backward()  # no zero_grad in between
    first.step()
    second.step()
    steps(model, first, second)
    assert_zero(model, held.masks, first, second)
    assert not held.mended


def test_an_optimizer_made_anew_is_attached_anew() -> None:
    model = sparse()
    held = ff.hold_sparsity(model, OPTIMIZERS["sgd"](model.parameters()))
    gc.collect()
    for kind in (
        "adam",
        "adamw-fused",
        "sgd",
    ):  # the memory, and the id, of one that is gone may be the next one's
        optimizer = OPTIMIZERS[kind](model.parameters())
        held.attach(optimizer)
        held.attach(optimizer)
        assert len(optimizer._optimizer_step_post_hooks) == 1
        steps(model, optimizer)
        assert_zero(model, held.masks, optimizer)
        del optimizer
        gc.collect()
    assert not held.mended


class Inside(Optimizer):
    """As accelerate's: of the class of an optimizer, and never made one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self) -> None:  # type: ignore[override]
        self.optimizer.step()


class Around(Optimizer):
    """As Lookahead: an optimizer of its own, which writes weights after the one inside has."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer

    def step(self) -> None:  # type: ignore[override]
        self.optimizer.step()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(1)


@pytest.mark.parametrize("kind", [Inside, Around])
def test_wrapped_optimizers(kind: type[Optimizer]) -> None:
    model = classifier()
    ff.prune(model, None, sparsity=0.5, method="magnitude")
    inner = torch.optim.Adam(model.parameters(), lr=1e-2)
    wrapper = kind(inner)
    held = ff.hold_sparsity(model, wrapper, strict=True)
    assert held.optimizers == [inner if kind is Inside else wrapper]
    for _ in range(3):
        F.cross_entropy(model(images(8)[0]), images(8)[1]).backward()
        wrapper.step()  # type: ignore[call-arg]
        assert_zero(model, held.masks)
    held.remove()


def test_loading_an_optimizer_keeps_its_hooks() -> None:
    model = sparse()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    steps(model, optimizer)
    dense = copy.deepcopy(optimizer.state_dict())
    model.load_state_dict(sparse().state_dict())
    held = ff.hold_sparsity(model, optimizer)
    optimizer.load_state_dict(dense)
    steps(model, optimizer)
    assert_zero(model, held.masks, optimizer)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_and_the_steps_it_skips(fused: bool) -> None:
    model = sparse()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=fused)
    held = ff.hold_sparsity(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for i, batch in enumerate(DATA):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model, batch)
        scaler.scale(value).backward()
        if i == 1:
            model[8].weight.grad[0, 0] = torch.inf
        before = model[8].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model[8].weight) == (i == 1)
        assert_zero(model, held.masks, optimizer)
    assert scaler.get_scale() == 8.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_layout_and_bit(dtype: torch.dtype) -> None:
    model = nn.Linear(6, 4, bias=False, dtype=dtype)
    model.weight = nn.Parameter(torch.randn(6, 4).to(dtype).t())  # strides of a transposed tensor
    with torch.no_grad():
        model.weight[:, :3] = 0
        model.weight[1, 4] = -0.0
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    held = ff.hold_sparsity(model, optimizer)
    with torch.no_grad():
        for i, value in enumerate([torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).tiny]):
            model.weight[i, :3] = value
    kept = model.weight.detach()[held.masks["weight"]].clone()
    with pytest.warns(UserWarning, match="had 12 nonzero weights where its mask says zero"):
        optimizer.step()
    weight = model.weight.detach()
    assert torch.equal(weight[held.masks["weight"]], kept)
    assert not weight[~held.masks["weight"]].any()
    assert not torch.signbit(weight[~held.masks["weight"]]).any()
    assert int((~held.masks["weight"]).sum()) == 13


def test_infinite_and_missing_numbers_become_zero_too() -> None:
    model = sparse()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    held = ff.hold_sparsity(model, optimizer)
    loss(model, DATA[0]).backward()
    model[8].weight.grad[~held.masks["8.weight"]] = torch.nan
    optimizer.step()
    assert_zero(model, held.masks, optimizer)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models(backend: str) -> None:
    model = sparse()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = OPTIMIZERS["adam"](compiled.parameters())
    held = ff.hold_sparsity(compiled, optimizer)
    assert list(held.masks) == ["0.weight", "3.weight", "8.weight", "10.weight"]
    steps(model, optimizer, call=compiled)
    assert_zero(model, held.masks, optimizer)


def test_a_compiled_step_of_the_optimizer() -> None:
    model = sparse(share=0.3)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    held = ff.hold_sparsity(model, optimizer)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for share in (0.3, 0.7):  # other masks between two calls
        ff.prune(model, None, method="magnitude", sparsity=share)
        held.hold(held.aliases)
        for batch in DATA[:2]:
            optimizer.zero_grad()
            loss(model, batch).backward()
            step()
        assert_zero(model, held.masks, optimizer)
        assert sum(int((~m).sum()) for m in held.masks.values()) == round(share * 666)


def test_ties_by_identity_and_by_memory() -> None:
    torch.manual_seed(0)
    model = Tied(shared_storage=False)
    ff.prune(model, None, method="magnitude", sparsity=0.5)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    held = ff.hold_sparsity(model, optimizer)
    assert {name: held.aliases[name] for name in held.masks} == {
        "embedding.weight": ("embedding.weight", "head.weight")
    }
    loss(model, (torch.randint(7, (6, 4)), torch.randint(7, (6,)))).backward()
    optimizer.step()
    assert_zero(model, held.masks, optimizer)

    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    two.weight.data = one.weight.data  # two parameters, one memory
    with torch.no_grad():
        one.weight[0] = 0
    both = nn.Sequential(one, two)
    optimizer = OPTIMIZERS["sgd"](both.parameters())
    held = ff.hold_sparsity(both, optimizer)
    assert list(held.masks) == ["0.weight"]
    for _ in range(3):
        optimizer.zero_grad()
        both(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    assert not two.weight.detach()[0].any()
    assert not optimizer.state[two.weight]["momentum_buffer"][0].any()
    assert not optimizer.state[one.weight]["momentum_buffer"][0].any()


def test_a_model_that_changes_dtype_and_device() -> None:
    model = sparse()
    held = ff.hold_sparsity(model, OPTIMIZERS["sgd"](model.parameters()))
    model.to(DEVICE, torch.float64)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    held.attach(optimizer)
    for x, y in DATA:
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(DEVICE, torch.float64)), y.to(DEVICE)).backward()
        optimizer.step()
    assert_zero(model, held.masks, optimizer)
    assert not held.mended


def test_parameters_that_are_replaced_are_looked_up_anew() -> None:
    model = sparse()
    held = ff.hold_sparsity(model, OPTIMIZERS["sgd"](model.parameters()))
    model[8].weight = nn.Parameter(model[8].weight.detach().clone())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    held.attach(optimizer)
    steps(model, optimizer)
    assert_zero(model, held.masks, optimizer)
    model[8] = nn.Linear(5, 6)
    with pytest.raises(FastFisherError, match=re.escape("'8.weight' has the shape [6, 5], its mask [6, 72]")):
        optimizer.step()


def test_copies_and_pickles_of_the_model_stay_plain() -> None:
    model = sparse()
    keys = list(model.state_dict())
    optimizer = OPTIMIZERS["adam"](model.parameters())
    held = ff.hold_sparsity(model, optimizer)
    steps(model, optimizer)
    twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (twin, again):
        assert list(other.state_dict()) == list(model.state_dict()) == keys
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    assert not copy.deepcopy(optimizer)._optimizer_step_post_hooks
    assert_zero(twin, held.masks)


def test_moving_averages() -> None:
    model = classifier()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)  # the first one copies
    twin = copy.deepcopy(model)
    ff.prune(model, None, method="magnitude", sparsity=0.6)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    held = ff.hold_sparsity(model, optimizer)
    steps(model.train(), optimizer)
    average.update_parameters(model)
    assert any(bool(p[gone].any()) for p, gone in removed(average.module, held.masks))
    for other in (average, twin):
        held.apply_masks(other)
    assert_zero(average.module, held.masks)
    assert_zero(twin, held.masks)
    with pytest.raises(
        FastFisherError, match=r"Linear has no parameter '0.weight', for which there is a mask"
    ):
        held.apply_masks(nn.Linear(3, 3))


@pytest.mark.parametrize("by_hand", [False, True])
def test_what_is_written_past_the_optimizer_is_mended_and_told_once(by_hand: bool) -> None:
    model, dense = sparse(), classifier()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    held = ff.hold_sparsity(model, optimizer)
    gone = {name: int((~mask).sum()) for name, mask in held.masks.items()}

    def write() -> None:
        with torch.no_grad():
            if by_hand:
                model[8].weight.fill_(1.0)
            else:
                model.load_state_dict(dense.state_dict())

    write()
    count = gone["8.weight" if by_hand else "0.weight"]
    with pytest.warns(
        UserWarning, match=rf"had {count:,} nonzero weights.* where its mask says zero, from load_state"
    ):
        optimizer.step()
    expected = {"8.weight": count} if by_hand else gone
    assert held.mended == expected
    assert_zero(model, held.masks)
    write()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert held.mended == {name: 2 * count for name, count in expected.items()}
    assert_zero(model, held.masks)


def test_strict_refuses_before_the_step_and_changes_nothing() -> None:
    model = sparse()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    held = ff.hold_sparsity(model, optimizer, strict=True)
    steps(model, optimizer)
    gone = ~held.masks["8.weight"]
    model[8].weight.data[gone] = 1.0  # no trace in the version of the parameter
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        FastFisherError, match=rf"'8.weight' has {int(gone.sum())} nonzero weights where its mask"
    ):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    held.apply_masks()
    steps(model, optimizer)
    assert_zero(model, held.masks, optimizer)


def test_an_optimizer_that_is_not_attached_is_noticed() -> None:
    model = sparse()
    held = ff.hold_sparsity(model, OPTIMIZERS["sgd"](model[:4].parameters()), strict=True)
    steps(model, OPTIMIZERS["sgd"](model.parameters()))
    with pytest.raises(FastFisherError, match="or an optimizer that is not attached"):
        held.check()


def test_remove_ends_it() -> None:
    model = sparse()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    held = ff.hold_sparsity(model, optimizer)
    held.remove()
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    steps(model, optimizer)
    assert any(bool(p[gone].any()) for p, gone in removed(model, held.masks))


def test_targets_and_frozen_tensors() -> None:
    model = sparse()
    model[8].weight.requires_grad_(False)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    held = ff.hold_sparsity(model, optimizer, targets=["8", "10"])
    assert sorted(held.masks) == ["10.weight", "8.weight"]
    model[8].weight.requires_grad_(True)  # as fine-tuning layer by layer does
    steps(model, optimizer)
    assert_zero(model, held.masks, optimizer)
    with pytest.raises(FastFisherError, match="matched none"):
        ff.hold_sparsity(model, optimizer, ignore="conv9")


def test_a_model_without_zeros_is_told() -> None:
    model = classifier()
    with pytest.warns(
        UserWarning, match="none of the weights of 4 tensors is zero, so there is nothing to hold"
    ):
        ff.hold_sparsity(model, OPTIMIZERS["sgd"](model.parameters()))


def test_what_cannot_be_attached() -> None:
    model = sparse()
    with pytest.raises(FastFisherError, match=r"only a torch.optim.Optimizer can be attached; got 'adam'"):
        ff.hold_sparsity(model, ["adam"])  # type: ignore[list-item]
    other = OPTIMIZERS["sgd"](classifier().parameters())
    with pytest.raises(
        FastFisherError, match=r"SGD holds none of the 4 tensors that are pruned, such as '0.weight'"
    ):
        ff.hold_sparsity(model, other)
    assert not other._optimizer_step_post_hooks
