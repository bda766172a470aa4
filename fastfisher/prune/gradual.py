"""Gradual pruning inside a training loop: `prune` at the times of a schedule, and zeros that stay zero in between.

    pruner = Pruner(model, schedule=CubicSchedule(0.3, 0.9, begin=1, end=24, every=2))
    pruner.attach(optimizer)
    for epoch in range(30):
        pruner.step(loader, epoch=epoch)
        train_one_epoch(model, optimizer)
    pruner.finalize()

Every target is a share of all target weights, whatever was removed before.  `schedule.py` says when, `masks.py` holds.
"""

from __future__ import annotations

import difflib
import inspect
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fastfisher import runlog
from fastfisher.errors import FastFisherError
from fastfisher.prune.learner import Learner, learner_of
from fastfisher.prune.masks import HeldSparsity, unwrapped, unwrapped_optimizer
from fastfisher.prune.patterns import Pattern
from fastfisher.prune.plan import checked_plan, layout_of
from fastfisher.prune.pruner import prune, prune_once
from fastfisher.prune.ranks import Ranks, group_of
from fastfisher.prune.schedule import as_schedule, real
from fastfisher.prune.settings import Settings, layer_limits
from fastfisher.prune.surgeon import Surgeon
from fastfisher.prune.targets import Targets, find_targets
from fastfisher.report import Report

FORMAT = 3
# Keywords of `prune` that a step is told, or that belong to one call.
_OF_A_STEP = ("model", "data", "sparsity", "eval_fn", "process_group")
_OF_THE_CALL = ("targets", "ignore", "loss_fn", "progress", "memory_limit")


class Pruner:
    """Prune to s(t) at the times t of a schedule, each time from the weights as they are, and keep zeros at zero.

    schedule: CubicSchedule, LinearSchedule, ExponentialSchedule, a list of pairs (when, sparsity), or a function
        when -> sparsity or None.   Times are epochs or steps, whichever `step` is told.
    method, options: the keywords of `prune` but sparsity and eval_fn.  num_recomputations is 0 by default, as training
        goes on between the steps; seed is that of the first step, and each later one adds one.
    strict: raise where zeros were overwritten outside the attached optimizers, in place of mending it with a warning.
    log: a file of JSON lines, such as "run.jsonl", to which every step that prunes and every `record` is appended at
        once; `fastfisher report run.jsonl --html page.html` draws it.  Of several processes, let one have it.
    writer: the same figures go to its add_scalar(tag, value, when), such as that of TensorBoard's SummaryWriter.

    process_group: the processes that train copies of this model, by default those of DistributedDataParallel around it.
        They prune together, each with its own data; see `prune`.

    masks: first name -> bool in the parameter's shape, True = keep.   reports: one for every step that pruned.
    Zeros that the weights have at the beginning are held too.  The model itself stays plain: same keys, same copies.
    Raises FastFisherError on bad input, as early as it can be known.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        schedule: Any,
        method: str = "woodfisher",
        strict: bool = False,
        log: str | Path | None = None,
        writer: Any = None,
        process_group: Any = None,
        **options: Any,
    ) -> None:
        defaults = {name: p.default for name, p in inspect.signature(prune).parameters.items()}
        for name in options:
            if name in _OF_A_STEP:
                raise FastFisherError(
                    f"Pruner takes no {name!r}: the schedule says how sparse, and step(data, ...) is given the data"
                )
            if name not in defaults:
                close = difflib.get_close_matches(name, defaults, n=1, cutoff=0.0)
                raise FastFisherError(f"Pruner has no option {name!r}; the closest is {close[0]!r}")
        given = {**defaults, "num_recomputations": 0, **options, "method": method}
        self.model = unwrapped(model)
        self.process_group = process_group or group_of(model)
        self.schedule = as_schedule(schedule)
        self.reports: list[Report] = []
        self._last: float | None = None  # the latest time of the schedule that was served
        self._unit: str | None = None  # of times, "epoch" or "step", once it is known
        self._options = {name: given[name] for name in _OF_THE_CALL}
        self._settings = Settings.of({**given, "sparsity": self._final(given["pattern"])})
        found = self._targets()
        layout = layout_of(found, self._settings)
        layer_limits(self._settings, layout)
        checked_plan(
            layout, self._settings, found, given["memory_limit"], ranks=Ranks(self.process_group).size
        )
        self._held = HeldSparsity(self.model, strict=strict)
        self._held.hold(found.aliases)
        self._learner: Learner | None = None  # what is kept from one pruning to the next
        self._steps = 0  # of the first optimizer attached
        self._stepped: RemovableHandle | None = None
        self._data: Iterable[Any] | None = None
        self._mended = 0  # how many were told of in reports
        self._writer = writer
        self._log = None if log is None else Path(log)
        if self._log is not None:
            try:
                self._log.parent.mkdir(parents=True, exist_ok=True)
                self._log.touch()
            except OSError as error:
                raise FastFisherError(f"log={str(log)!r} cannot be written: {error.strerror}") from error
        for name, kept in self._held.kept.items():
            if not kept:
                warnings.warn(
                    f"{name!r} holds nothing but zeros, which will stay; name it in ignore if it is to be trained",
                    stacklevel=2,
                )

    def _final(self, pattern: str) -> float:
        """The sparsity at the end; 0 where the schedule cannot tell, so that each step is checked by itself."""
        own, final = Pattern.parse(pattern).sparsity, self.schedule.final
        if own is not None and final is not None and final != own:
            raise FastFisherError(
                f"pattern={pattern!r} makes a sparsity of {own:g}, at which the schedule must end; got {final!r}"
            )
        return final or own or 0.0

    def _targets(self) -> Targets:
        found = find_targets(self.model, self._options["targets"], self._options["ignore"])
        found.take(self.model, self._settings.rule)
        return found

    @property
    def masks(self) -> dict[str, Tensor]:
        """First name -> bool in the parameter's shape, True = keep; to be read only."""
        return self._held.masks

    @property
    def sparsity(self) -> float:
        """The share of the target weights that the masks remove."""
        return 1 - sum(self._held.kept.values()) / sum(mask.numel() for mask in self.masks.values())

    def attach(self, *optimizers: Optimizer) -> None:
        """Keep zeros at zero, weights and state, through every step of these optimizers; a new one is attached anew.

        Raises FastFisherError where one is no torch optimizer or holds none of the target weights.
        """
        self._held.attach(*optimizers)
        if self._settings.method == "fishleg":
            if self._stepped is not None:
                self._stepped.remove()
            self._stepped = unwrapped_optimizer(optimizers[0]).register_step_post_hook(self._after_step)

    def _new_learner(self) -> Learner | None:
        return learner_of(self.model, layout_of(self._targets(), self._settings), self._settings)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """An auxiliary step every so many steps of the optimizer, once there was a pruning."""
        self._steps += 1
        every = self._settings.options.update_aux_every
        surgeon = self._learner
        if isinstance(surgeon, Surgeon) and self._data is not None and every and self._steps % every == 0:
            surgeon.move(self.model, self._data, self._options["loss_fn"])

    def apply_masks(self, model: nn.Module | None = None) -> None:
        """Set to zero what the masks remove, in this model or in another one with the same names, such as an EMA copy.

        A moving average decays towards the zeros of its model but does not reach them; call this after its updates.
        """
        self._held.apply_masks(model)

    def step(
        self, data: Iterable[Any] | None, *, epoch: float | None = None, step: float | None = None
    ) -> Report | None:
        """Prune to the latest target due by this epoch or step, and report; None where there is none, or nothing to do.

        data: as for `prune`; it is read only when pruning is due.
        Call it as often as you like, always with epoch or always with step.  After a time that was missed the latest
        target is made good.  On any error the weights and the place in the schedule are as they were.
        Raises FastFisherError and FisherError as `prune` does.
        """
        when = self._time(epoch, step)
        self._data = data
        due = self.schedule.due(when)
        if due is None or (self._last is not None and due[0] <= self._last):
            return None
        at, sparsity = due
        report = None
        if sparsity > (self.reports[-1].sparsity if self.reports else 0):
            report = self._prune(data, sparsity, f"{self._unit} {when:g}: prune")
        self._last = at
        if report is not None:
            figures = {"sparsity": report.num_zeros / report.num_weights}
            if report.loss_dense is not None and report.loss_pruned is not None:
                figures |= {
                    "loss before pruning": report.loss_dense,
                    "loss after pruning": report.loss_pruned,
                }
            self._tell(when, figures, report=report.to_dict())
        return report

    def record(
        self, scores: Mapping[str, float] | float, *, epoch: float | None = None, step: float | None = None
    ) -> None:
        """Append scores of yours at this epoch or step, such as the accuracy on held-out data, to the log and writer.

        Raises FastFisherError where there is neither, or a score is no number.
        """
        when = self._time(epoch, step)
        if self._log is None and self._writer is None:
            raise FastFisherError("record needs a log or a writer: Pruner(model, ..., log='run.jsonl')")
        named = scores if isinstance(scores, Mapping) else {"score": scores}
        try:
            figures = {str(name): float(value) for name, value in named.items()}
        except (TypeError, ValueError) as error:
            raise FastFisherError(
                f"scores must be a number or numbers by name; got {scores!r:.60}"
            ) from error
        self._tell(when, figures, scores=figures)

    def _tell(self, when: float, figures: Mapping[str, float], **content: Any) -> None:
        """Write a line of the log, and figures to the writer."""
        if self._log is not None:
            try:
                runlog.append(self._log, str(self._unit), when, **content)
            except OSError as error:  # a full disk is no reason to lose the training
                warnings.warn(f"{str(self._log)!r} lacks a line: {error.strerror}", stacklevel=3)
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(f"fastfisher/{name}", value, when)

    def _time(self, epoch: float | None, step: float | None) -> float:
        if (epoch is None) == (step is None):
            raise FastFisherError(
                f"step takes either epoch=... or step=...; got epoch={epoch!r} and step={step!r}"
            )
        unit, when = ("step", step) if epoch is None else ("epoch", epoch)
        if when is None or not real(when):
            raise FastFisherError(f"{unit} must be a number; got {when!r}")
        if self._unit not in (None, unit):
            raise FastFisherError(f"this Pruner counts by {self._unit}; got {unit}={when!r}")
        self._unit = unit
        return when

    def _prune(self, data: Iterable[Any] | None, sparsity: float, title: str) -> Report:
        held = self._held
        held.check()
        settings = replace(
            self._settings,
            sparsity=sparsity,
            on_the_way=True,
            seed=self._settings.seed + len(self.reports),  # a loader that shuffles gives other samples
        )
        learner = self._new_learner() if self._learner is None else self._learner.copy()
        report = prune_once(
            self.model,
            data,
            settings,
            title=title,
            learner=learner,
            process_group=self.process_group,
            **self._options,
        )
        self._learner = learner
        held.hold(self._targets().aliases)
        mended = sum(held.mended.values())
        if mended > self._mended:
            report.notes.append(
                f"{mended - self._mended:,} weights that had been removed were nonzero again and were set to zero."
            )
            self._mended = mended
        if not held.optimizers and not self.reports:
            warnings.warn(
                "no optimizer is attached, and any step of one brings zeros back; call attach(optimizer)",
                stacklevel=3,
            )
        self.reports.append(report)
        return report

    def finalize(self) -> None:
        """Check that all zeros are in place, let go of the optimizers, and warn where the schedule was not completed.

        Training after it does not keep zeros; `hold_sparsity` does.
        Raises FastFisherError with `strict` where zeros were overwritten.
        """
        self._held.check()
        self._held.remove()
        if self._stepped is not None:
            self._stepped.remove()
        final, reached = self.schedule.final, self.reports[-1].sparsity if self.reports else 0.0
        if final is not None and reached < final:
            warnings.warn(
                f"the schedule ends at a sparsity of {final:g}, but training ended at {reached:g}",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Masks, place in the schedule, settings and reports; torch.load reads it with weights_only=True.

        It goes into a checkpoint beside the state of model and optimizer.  The masks of a model that is spread over
        processes are spread alike, for torch.distributed.checkpoint; what method="fishleg" or a fisher_average has
        learned does not go there, as each process holds all of it: save such a run by `save_checkpoint`.
        """
        return {
            "format": FORMAT,
            "masks": dict(self.masks),
            "unit": self._unit,
            "last": self._last,
            "settings": self._fingerprint(),
            "reports": json.dumps([report.to_dict() for report in self.reports]),
            "steps": self._steps,
            "learner": None if self._learner is None else self._learner.state_dict(),
        }

    def _fingerprint(self) -> dict[str, str]:
        """All that decides which weights go, but the data and functions."""
        names = [field.name for field in fields(Settings) if field.name != "on_the_way"]
        return {"schedule": repr(self.schedule)} | {
            name: repr(getattr(self._settings, name)) for name in names
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another Pruner was; load the states of model and optimizer too, in any order.

        Raises FastFisherError, with nothing changed, where the state is of another model or of other settings.
        """
        missing = set(self.state_dict()) - set(state)
        if missing or state["format"] != FORMAT:
            what = f"{sorted(missing)[0]!r} is missing" if missing else f"its format is {state['format']!r}"
            raise FastFisherError(f"this is no state of a Pruner that this version can read: {what}")
        mine = self._fingerprint()
        for name, value in state["settings"].items():
            if mine.get(name) != value:
                raise FastFisherError(
                    f"the state was saved with {name}={value}; this Pruner has {mine.get(name)}"
                )
        masks = state["masks"]
        for name in [*self.masks, *masks]:
            ours, theirs = (list(m[name].shape) if name in m else "none" for m in (self.masks, masks))
            if ours != theirs:
                raise FastFisherError(
                    f"the state is of another model: its mask of {name!r} has the shape {theirs}, here it is {ours}"
                )
        reports = [Report.from_dict(report) for report in json.loads(state["reports"])]
        self._held.set_masks({name: masks[name].bool() for name in self.masks}, self._held.aliases)
        self._unit, self._last, self.reports = state["unit"], state["last"], reports
        self._steps, self._learner = state["steps"], None
        if state["learner"] is not None and (learner := self._new_learner()) is not None:
            learner.load_state_dict(state["learner"])
            self._learner = learner
