"""Zeros that stay zero in any training loop: after every step of an optimizer, w ← w where the mask keeps it, else 0.

The same goes for every state of the optimizer in the shape of its weight (momentum, exp_avg, ...), which would bring
the weight back later.  It happens in hooks of the optimizer; nothing is attached to the model, whose keys, copies and
compiled code stay as they are.  A step that a GradScaler skips changes no weight and calls no hook.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from fastfisher.errors import FastFisherError
from fastfisher.fisher.objective import parameter_aliases
from fastfisher.fisher.sharded import count_true, local
from fastfisher.prune.targets import find_targets

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside torch.compile, DistributedDataParallel or AveragedModel, which put words before its names."""
    while True:
        inner = model.module if isinstance(model, _WRAPPERS) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def unwrapped_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside accelerate's or Lightning's, which are of its class but call no hooks of their own.

    A wrapper that calls its own, such as Lookahead, stays: it may write weights after the optimizer inside has.
    """
    while "_optimizer_step_post_hooks" not in vars(optimizer):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer):
            break
        optimizer = inner
    return optimizer


def _keep(tensor: Tensor, mask: Tensor) -> None:
    """tensor ← tensor where the mask keeps it, else +0, whatever stood there; in place, floating point, any layout."""
    # As integers: a product with the mask leaves no NaN behind, and takes an eighth of the time of masked_fill_.
    local(tensor).view(_BITS[tensor.element_size()]).mul_(local(mask))


def _look_up(model: nn.Module, names: Iterable[str], shape: torch.Size) -> list[nn.Parameter]:
    """The parameters of these names, each once.  Raises FastFisherError where one is missing or has another shape."""
    found: dict[int, nn.Parameter] = {}
    for name in names:
        try:
            parameter = model.get_parameter(name)
        except AttributeError as error:
            raise FastFisherError(
                f"{type(model).__name__} has no parameter {name!r}, for which there is a mask"
            ) from error
        if parameter.shape != shape:
            raise FastFisherError(
                f"{name!r} has the shape {list(parameter.shape)}, its mask {list(shape)}; prune the new tensor anew"
            )
        found[id(parameter)] = parameter
    return list(found.values())


class HeldSparsity:
    """The masks of a model, and the hooks that keep what they remove at zero.

    masks: first name -> bool in the parameter's shape, True = keep; to be read only.
    aliases: first name -> all names.   strict: raise in `check`, rather than mend.
    kept: first name -> how many weights its mask keeps.
    mended: first name -> how many weights were found nonzero where their mask says zero, and set to zero, so far.

    Parameters are looked up by name each time, so that a model may move to another device or dtype meanwhile.  Tied
    tensors have one mask.
    """

    def __init__(self, model: nn.Module, *, strict: bool = False) -> None:
        self.model = unwrapped(model)
        self.strict = strict
        self.masks: dict[str, Tensor] = {}
        self.mended: dict[str, int] = {}
        self.aliases: dict[str, tuple[str, ...]] = {}
        self.kept: dict[str, int] = {}
        self._sparse: list[str] = []  # the names whose masks remove anything; the others cost no time
        # memory and version of weights that are known to be zero where they should, by name and identity
        self._seen: dict[tuple[str, int], tuple[int, int]] = {}
        self._hooks: WeakKeyDictionary[Optimizer, list[RemovableHandle]] = WeakKeyDictionary()
        self._warned = False

    def hold(self, aliases: Mapping[str, tuple[str, ...]]) -> None:
        """From now on the zeros that these parameters have are held.   aliases: first name -> all names."""
        masks = {name: self.model.get_parameter(name).detach() != 0 for name in aliases}
        self.set_masks(self.masks | masks, self.aliases | dict(aliases))

    def set_masks(self, masks: Mapping[str, Tensor], aliases: Mapping[str, tuple[str, ...]]) -> None:
        """Other masks, of which nothing is written yet."""
        self.masks, self.aliases = dict(masks), dict(aliases)
        self._sparse = [name for name, mask in self.masks.items() if not bool(local(mask).all())]
        self.kept = {name: count_true(mask) for name, mask in self.masks.items()}
        self._seen.clear()
        for optimizer in self.optimizers:
            self._clear_state(optimizer)

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that are attached and alive."""
        return list(self._hooks)

    def attach(self, *optimizers: Optimizer) -> None:
        """Keep zeros at zero through every step of these optimizers; one that is attached already stays so.

        An optimizer that is made anew, or unpickled, is attached anew.  Of a wrapper the optimizer inside is attached.
        Raises FastFisherError where one is no torch optimizer or holds none of the tensors.
        """
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                raise FastFisherError(f"only a torch.optim.Optimizer can be attached; got {optimizer!r:.60}")
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            if not any(id(p) in held for name in self.masks for p in self._parameters(name)):
                raise FastFisherError(
                    f"{type(optimizer).__name__} holds none of the {len(self.masks)} tensors that are pruned, such as "
                    f"{next(iter(self.masks), None)!r}; make it from the parameters of this very model"
                )
        for optimizer in map(unwrapped_optimizer, optimizers):
            if optimizer not in self._hooks:
                self._hooks[optimizer] = [
                    optimizer.register_step_pre_hook(self._before),
                    optimizer.register_step_post_hook(self._after),
                ]
            self._clear_state(optimizer)

    def remove(self) -> None:
        """Take the hooks off all optimizers; weights and masks stay as they are."""
        for hooks in self._hooks.values():
            for hook in hooks:
                hook.remove()
        self._hooks.clear()

    def apply_masks(self, model: nn.Module | None = None) -> None:
        """Set to zero what the masks remove, in this model or in another one with the same names, such as an EMA copy.

        A moving average decays towards the zeros of its model but does not reach them; call this after its updates.
        Raises FastFisherError where a parameter is missing or has another shape.
        """
        other = self.model if model is None else unwrapped(model)
        found = {name: self._parameters(name, other) for name in self._sparse}
        for name, parameters in found.items():
            for parameter in parameters:
                _keep(parameter, self._mask(name, parameter))
                if other is self.model:
                    self._seen[name, id(parameter)] = _version(parameter)

    def check(self, *, all_weights: bool = True) -> None:
        """Set to zero, or with `strict` refuse, what was written where the masks say zero since they were applied.

        all_weights: also where nothing seems to have been written; a write to `weight.data` leaves no trace.
        Raises FastFisherError with tensor and count, before anything is changed.
        """
        wrong = {}
        for name in self._sparse:
            counts = [
                int(((local(parameter) != 0) & ~local(self._mask(name, parameter))).sum())
                for parameter in self._parameters(name)
                if all_weights or self._seen.get((name, id(parameter))) != _version(parameter)
            ]
            if any(counts):
                wrong[name] = max(counts)
        if not wrong:
            return
        (first, count), *others = wrong.items()
        more = f" (and {sum(count for _, count in others):,} in {len(others)} others)" if others else ""
        cause = "load_state_dict, a write by hand, or an optimizer that is not attached"
        if self.strict:
            raise FastFisherError(
                f"{first!r} has {count:,} nonzero weights{more} where its mask says zero, from {cause}; call "
                f"apply_masks() after writing weights"
            )
        self.apply_masks()
        for name, times in wrong.items():
            self.mended[name] = self.mended.get(name, 0) + times
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{first!r} had {count:,} nonzero weights{more} where its mask says zero, from {cause}; they are zero "
                f"again, and this is said only once",
                stacklevel=3,
            )

    def _parameters(self, name: str, model: nn.Module | None = None) -> list[nn.Parameter]:
        """All parameters under the names of a mask: one, unless names share memory and not the object."""
        return _look_up(model or self.model, self.aliases[name], self.masks[name].shape)

    def _mask(self, name: str, like: Tensor) -> Tensor:
        """The mask on the device of a tensor."""
        mask = self.masks[name]
        if mask.device != like.device:
            mask = mask.to(like.device)
            self.masks[name] = mask
        return mask

    def _clear_state(self, optimizer: Optimizer) -> None:
        for name in self._sparse:
            for parameter in self._parameters(name):
                state = optimizer.state.get(parameter, {})
                for value in state.values():
                    # a count of steps has no dimension, and in a code of integers 0 may mean anything
                    if (
                        isinstance(value, Tensor)
                        and value.is_floating_point()
                        and value.dim()
                        and value.shape == parameter.shape
                    ):
                        _keep(value, self._mask(name, value))

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.check(all_weights=self.strict)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.apply_masks()
        self._clear_state(optimizer)


def _version(parameter: nn.Parameter) -> tuple[int, int]:
    """Its memory and how often it was written: what changes with every write that torch knows of, without a look."""
    held = local(parameter)
    return held.data_ptr(), held._version


def hold_sparsity(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    *,
    strict: bool = False,
) -> HeldSparsity:
    """Keep the zeros that the model's weights have now at zero, weights and state, through every step of the optimizer.

    optimizer: one or several; more can be attached to what is returned, and its remove() ends it.
    targets, ignore: as for `prune`, by default Linear and convolution weights; frozen ones are held too.
    strict: raise where zeros were overwritten outside the optimizer, such as by load_state_dict, with tensor and count,
        in place of setting them to zero again with one warning.  It looks at every weight before each step.
    Raises FastFisherError on bad input.
    """
    found = find_targets(model := unwrapped(model), targets, ignore)
    held = HeldSparsity(model, strict=strict)
    aliases = parameter_aliases(model)
    held.hold({name: aliases[name] for name in [*found.parameters, *found.frozen]})
    held.attach(*([optimizer] if isinstance(optimizer, Optimizer) else optimizer))
    if all(held.kept[name] == mask.numel() for name, mask in held.masks.items()):
        warnings.warn(
            f"none of the weights of {len(held.masks)} tensors is zero, so there is nothing to hold; prune first, or "
            f"name others in targets",
            stacklevel=2,
        )
    return held
