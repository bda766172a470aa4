"""What fastfisher raises: a base class, one class for broken arithmetic, one for a backend that cannot run."""

from __future__ import annotations


class FastFisherError(ValueError):
    """Bad input; the message is one sentence with the offending value and, where there is one, the way out."""


class FisherError(FastFisherError, ArithmeticError):
    """An inverse or a solve broke down in float64 too; the message names parameter, block and damping."""


class BackendError(FastFisherError, RuntimeError):
    """A backend that was asked for by name cannot run this call; the message holds its reason."""


class DoesNotFitError(FastFisherError, MemoryError):
    """A run that would need more memory than there is; the message names the largest block that fits."""


class DistributedError(FastFisherError, RuntimeError):
    """Another process of the group failed or was lost; the message says which, where that is known, and where."""
