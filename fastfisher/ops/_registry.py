"""One op, several backends: who is registered, who runs, and why the others do not.

An op is defined once with `torch.library`; what is registered there is a selector, because two kernels on one
dispatch key would replace each other silently.  The selector checks the arguments, walks the order table of
the device and runs the first backend that has no reason against it.  The checks stand here and not in the
public functions, so that calls through `torch.ops.fastfisher` and compiled graphs pass them too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastfisher import environment
from fastfisher.errors import BackendError, FastFisherError

Implementation = Callable[..., None]
WhyNot = Callable[..., "str | None"]

ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("native", "reference"),
    "cuda": ("native", "triton", "reference"),
}
BACKENDS = ("native", "triton", "reference")

_LIBRARY = torch.library.Library("fastfisher", "DEF")
_forced: ContextVar[str | None] = ContextVar("fastfisher_backend", default=None)


@dataclass
class Op:
    """One op: its check, its arguments, which of them it writes, and its backends in the order of registration."""

    name: str
    check: Callable[..., None]
    arguments: tuple[str, ...]
    written: tuple[int, ...]
    implementations: dict[str, tuple[Implementation, WhyNot | None]] = field(default_factory=dict)

    def why_not(self, backend: str, args: tuple) -> str | None:
        """The reason why a backend cannot run this call, or None when it can."""
        if backend not in self.implementations:
            return "it has no implementation of this op"
        why_not = self.implementations[backend][1]
        return why_not(*args) if why_not is not None else None

    def choose(self, args: tuple) -> Implementation:
        """The implementation that runs this call.  Raises BackendError where the forced backend cannot."""
        forced = _forced_backend()
        if forced is not None:
            reason = self.why_not(forced, args)
            if reason is not None:
                raise BackendError(f"backend {forced!r} cannot run {self.name}: {reason}")
            return self.implementations[forced][0]
        for backend in _order(args):
            if self.why_not(backend, args) is None:
                return self.implementations[backend][0]
        raise BackendError(f"no backend can run {self.name}:\n{explain(self.name, *args)}")

    def select(self, *args: object) -> None:
        """Check the arguments and run the backend whose turn it is; this is what torch.library calls."""
        self.check(*args)
        self.check_memory(args)
        self.choose(args)(*args)

    def check_memory(self, args: tuple) -> None:
        """Raise when a tensor to be written shares memory with another argument, or is needed by autograd."""
        ranges = [_byte_range(arg) if isinstance(arg, Tensor) else None for arg in args]
        for i in self.written:
            if args[i].requires_grad:
                raise FastFisherError(
                    f"{self.arguments[i]} is written by {self.name} but requires grad; pass it with .detach()"
                )
            first, last = ranges[i]  # type: ignore[misc]
            for j, other in enumerate(ranges):
                if j != i and other is not None and first < other[1] and other[0] < last:
                    raise FastFisherError(
                        f"{self.arguments[i]} must not overlap {self.arguments[j]} in memory, got bytes "
                        f"[{first:#x}, {last:#x}) and [{other[0]:#x}, {other[1]:#x})"
                    )


OPS: dict[str, Op] = {}


def define(schema: str, check: Callable[..., None]) -> Callable[..., None]:
    """Define an op by its torch.library schema and return it as a callable of the schema's arguments.

    schema: "name(Tensor(a!) out, Tensor x, ...) -> ()".   check: called with the same arguments, on real
    tensors before every run and on fake ones as the op's fake implementation; it raises FastFisherError and
    touches no data of a fake.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    overload = getattr(torch.ops.fastfisher, name).default
    arguments = overload._schema.arguments
    written = tuple(
        i for i, arg in enumerate(arguments) if arg.alias_info is not None and arg.alias_info.is_write
    )
    op = OPS[name] = Op(name, check, tuple(arg.name for arg in arguments), written)
    _LIBRARY.impl(name, op.select, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastfisher::{name}", check, lib=_LIBRARY)
    return overload


def implement(
    name: str, backend: str, why_not: WhyNot | None = None
) -> Callable[[Implementation], Implementation]:
    """Register the decorated function as one backend of an op; it gets the schema's positional arguments.

    why_not: called with the same arguments, returns None when the backend can run them, else the reason in
    one sentence.
    Raises ValueError on an unknown op or backend, or when the place is taken.
    """
    if name not in OPS:
        raise ValueError(f"there is no op {name!r}; the ops are {', '.join(OPS)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend in OPS[name].implementations:
        raise ValueError(f"{name} already has a backend {backend!r}")

    def register(function: Implementation) -> Implementation:
        OPS[name].implementations[backend] = (function, why_not)
        return function

    return register


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the `with` block on one backend; an op that it cannot run raises BackendError.

    It counts for the current thread (or asyncio task) and goes before FASTFISHER_BACKEND.
    Raises FastFisherError on an unknown name.
    """
    token = _forced.set(_known(name, "backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def explain(name: str, *args: object) -> str:
    """Say which backend would run this call, and why each of the others would not; one line per backend.

    name: of the op.   args: the op's positional arguments as its schema lists them.   Nothing is run.
    """
    if name not in OPS:
        raise FastFisherError(f"there is no op {name!r}; the ops are {', '.join(OPS)}")
    op = OPS[name]
    op.check(*args)
    forced = _forced_backend()
    chosen = None
    lines = []
    for backend in _order(args):
        reason = op.why_not(backend, args)
        if reason is not None:
            verdict = f"cannot run: {reason}"
        elif forced is not None and forced != backend:
            verdict = f"could run, but {forced!r} is forced"
        elif chosen is not None:
            verdict = f"could run, but {chosen!r} comes first"
        else:
            chosen, verdict = backend, "runs"
        lines.append(f"  {backend}: {verdict}")
    if chosen is None and forced is not None and forced not in _order(args):
        lines.append(f"  {forced}: is forced, but has no place on {_device(args)}")
    return "\n".join([f"{name} on {_device(args)}: {chosen or 'no backend'}", *lines])


def _known(name: str, what: str) -> str:
    if name not in BACKENDS:
        raise FastFisherError(f"{what} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _forced_backend() -> str | None:
    forced = _forced.get()
    if forced is not None:
        return forced
    name = environment.backend()
    return _known(name, environment.BACKEND.name) if name is not None else None


def _device(args: tuple) -> str:
    return next(arg.device.type for arg in args if isinstance(arg, Tensor))


def _order(args: tuple) -> tuple[str, ...]:
    return ORDER.get(_device(args), ("reference",))


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    """First byte of a tensor and the one after its last; the gaps between strided rows count as part of it."""
    first = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * tensor.element_size()
