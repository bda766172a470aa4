"""The stream of gradients: model + data -> pieces [k, d] in the layout's order, each row written once.

How one micro-batch is differentiated is objective.py's matter; here it is how many samples at once, where their rows
go, which of them are finite, and what is noted of them on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastfisher.errors import FastFisherError, FisherError
from fastfisher.fisher.batches import SampleReader, Samples
from fastfisher.fisher.blocks import BlockLayout
from fastfisher.fisher.objective import Objective, Rows

# Above 64 samples a micro-batch no longer gets faster (ResNet-20, one core: 3.3 ms a sample at 16, 2.3 at 64).
MAX_MICRO_BATCH = 64
MAX_ROWS = 256
# Rows handed over at once are long-lived scratch: enough for a matrix product to be efficient, no more.
ROWS_BYTES = 256 << 20
# Samples kept to compare the loss before and after: enough for a mean, few enough to cost little beside the gradients.
KEPT_BYTES = 256 << 20
KEPT_GRADS = 128
# What one sample's forward saves for backward, times this, bounds what vmap(grad) holds for it (measured 1.6 to 2.5).
ACTIVATION_FACTOR = 3
# Numbers that are widened to float64 at once for their norm.
NORM_NUMBERS = 1 << 20
# Formats of the rows that are handed over; "auto" is float32, float64 where a weight is.
GRAD_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _norms(rows: Tensor) -> Tensor:
    """‖g‖ of every row in float64; torch makes a float64 copy for that, here of a few rows at a time."""
    at_once = max(1, NORM_NUMBERS // rows.shape[1])
    norms = rows.new_empty(len(rows), dtype=torch.float64)
    # results of their own would lie in the holes that the copies leave, and each copy would take new memory
    for part, out in zip(rows.split(at_once), norms.split(at_once), strict=True):
        torch.linalg.vector_norm(part, dim=1, dtype=torch.float64, out=out)
    return norms


def chunks(row_bytes: int, num_grads: int, limit: int, activation_bytes: int = 0) -> tuple[int, int]:
    """Rows handed over at once, and samples differentiated at once, such that both fit into `limit` bytes.

    row_bytes: of one gradient.   activation_bytes: of one sample.   Both numbers are at least 1.
    """
    rows = max(1, min(MAX_ROWS, num_grads, min(ROWS_BYTES, limit // 2) // row_bytes))
    each = ACTIVATION_FACTOR * activation_bytes + row_bytes
    return rows, max(1, min(MAX_MICRO_BATCH, rows, (limit - rows * row_bytes) // each))


class _Piece(Rows):
    """Rows [k, n_out, d] of a buffer, into which gradients are written in the layout's order and the buffer's dtype.

    nonzero: bool [k], which gradients were not zero before they were rounded, where the dtype can lose them.
    """

    def __init__(self, piece: Tensor, layout: BlockLayout, batch: int) -> None:
        super().__init__()
        self.flat = piece.view(-1, piece.shape[2])  # [k n_out, d]
        self.layout = layout
        self.count = piece.shape[0]
        self.batch = batch
        self.nonzero = torch.zeros(self.count, dtype=torch.bool, device=piece.device)

    @property
    def narrow(self) -> bool:
        """Whether rounding can turn a gradient into zeros."""
        return self.flat.dtype.itemsize < 4

    def wants(self, name: str) -> bool:
        return name in self.layout.parameter_ranges

    def place(self, name: str) -> Tensor | None:
        return None if self.narrow else self.layout.place(name, self.flat)

    def put(self, name: str, rows: Tensor) -> None:
        came = len(rows)
        if came != len(self.flat):
            each = len(self.flat) // self.count
            raise FastFisherError(
                f"fisher_type='exact' needs outputs of one size; batch {self.batch} of the loader gives "
                f"{came // self.count} of a sample where the first gave {each}"
            )
        start, stop = self.layout.parameter_ranges[name]
        rows = self.layout.rows(name, rows)
        if self.narrow:
            self.nonzero |= (rows != 0).view(self.count, -1).any(1)
        self.flat[:, start:stop] = rows


class GradientStream:
    """Iterate over the gradients of num_grads samples (or mini-batch means) as [k, d] pieces in the layout's order.

    num_grads is m, the divisor of the Fisher.  For fisher_type "exact" every sample gives `rows_per_grad` rows, a piece
    holds those of whole samples, and all counts and norms are those of samples.

    The pieces are views of one buffer that the next piece overwrites; gradients are written into it once.   dtype: of
    the pieces, one of GRAD_DTYPES.  A gradient that a narrow one overflows or loses altogether counts as not finite.
    data: batches, or a reader that goes on where another stream has stopped.
    layout: with the weights wanted; a LiveLayout leaves out those that are removed.
    Gradients or losses that are not finite are left out, counted, and replaced by further samples while the loader has
    any; rows of zeros complete the count after that.
    memory_limit: bytes for buffer, activations and gradients of a micro-batch.
    keep_samples: all samples whose gradients were finite stay in `used`, on the CPU, in their order.

    Raises FastFisherError when the loader is too short or the model fails, FisherError when no gradient is finite.
    """

    def __init__(
        self,
        objective: Objective,
        data: Iterable[Any] | SampleReader,
        layout: BlockLayout,
        *,
        num_grads: int,
        memory_limit: int = 1 << 30,
        keep_samples: bool = False,
        dtype: str = "auto",
    ) -> None:
        self.objective = objective
        self.layout = layout
        self.num_grads = num_grads
        self.num_finite = 0
        self.num_non_finite = 0
        self.first_non_finite: str | None = None
        self.micro_batch = 0
        self.sum_squares = 0.0  # Σ ‖g‖²
        self.sum_fourth = 0.0  # Σ ‖g‖⁴
        self.kept: list[Samples] = []
        self.kept_losses: list[Tensor] = []
        self.used: list[Samples] = []
        self._keep_samples = keep_samples
        self._reader = data if isinstance(data, SampleReader) else SampleReader(data, objective.device)
        self._per_grad = objective.grad_batch_size
        self._each = 1 if objective.fisher_type != "exact" else 0  # rows per gradient, 0 for not yet known
        self._ranges = list(layout.parameter_ranges.items())
        self._reached = [False] * len(self._ranges)
        self._limit = memory_limit
        wide = any(w.dtype == torch.float64 for w in objective.weights.values())
        self.dtype = GRAD_DTYPES[dtype] or (torch.float64 if wide else torch.float32)
        known = self._reader.known
        if known is not None and known < num_grads * self._per_grad:
            raise self._too_short(known)
        self._seen_before = self._reader.seen

    @property
    def fingerprint(self) -> str:
        """A hash of the batches read so far."""
        return self._reader.fingerprint

    @property
    def rows_per_grad(self) -> int:
        """Rows that every gradient gives: 1, or for "exact" the outputs of a sample, told by the first one to come."""
        if not self._each:
            self._each = self.objective.rows_per_sample(self._first())
        return self._each

    @property
    def effective(self) -> float:
        """The effective number of gradients, (Σ‖g‖²)² / Σ‖g‖⁴; 0 when all are zero."""
        return self.sum_squares**2 / self.sum_fourth if self.sum_fourth > 0 else 0.0

    @property
    def unreached(self) -> list[str]:
        """Targets that no gradient has reached so far."""
        return [name for (name, _), reached in zip(self._ranges, self._reached, strict=True) if not reached]

    def _too_short(self, samples: int) -> FastFisherError:
        needs = f" of grad_batch_size={self._per_grad}" if self._per_grad > 1 else ""
        text = f"num_grads={self.num_grads}{needs} but the loader yields {samples} samples"
        if self._reader.once and self._seen_before:
            text += (
                f" after the {self._seen_before} of the estimates before; give data that can be read again"
            )
        return FastFisherError(text + ".")

    def _first(self) -> Samples:
        sample = self._reader.peek()
        if sample is None:
            raise self._too_short(0)
        return sample

    def _chunks(self) -> tuple[int, int, int | None]:
        """Gradients in the buffer, samples differentiated at once, and rows of one sample at once where not all."""
        row = self.layout.num_weights * self.dtype.itemsize
        if self._per_grad > 1:
            return chunks(row, self.num_grads, self._limit)[0], 1, None
        activation = self.objective.activation_bytes(self._first())
        each = self.rows_per_grad
        # all rows of a sample must be there before it is known to be finite: in the buffer, and as they came
        if each > 1 and 2 * each * row > self._limit:
            raise FastFisherError(
                f"fisher_type='exact' takes 2 x {each} rows of {self.layout.num_weights} weights for one sample, "
                f"{2 * each * row} bytes where memory_limit is {self._limit}; use fisher_type='mc'"
            )
        rows, at_once = chunks(row, self.num_grads * each, self._limit, activation)
        if at_once >= each:
            return rows // each, at_once // each, None
        return 1, 1, chunks(row, each, self._limit - 2 * each * row, activation)[1]

    def __iter__(self) -> Iterator[Tensor]:
        exactly = self._per_grad > 1
        room_for, self.micro_batch, chunk_size = self._chunks()
        each = self.rows_per_grad
        buffer = torch.empty(
            room_for * each, self.layout.num_weights, dtype=self.dtype, device=self.objective.device
        )  # [rows, d]
        kept_bytes = 0
        filled = 0
        # a loader without end may yield nothing finite: as many failures as gradients asked for are enough
        while self.num_finite < self.num_grads and self.num_non_finite <= self.num_grads:
            wanted = min(self.micro_batch, room_for - filled, self.num_grads - self.num_finite)
            samples = self._reader.take(self._per_grad if exactly else wanted, exactly=exactly)
            if samples is None:
                break
            count = 1 if exactly else len(samples)
            piece = buffer[filled * each : (filled + count) * each].view(count, each, -1)  # [k, n_out, d]
            rows = _Piece(piece, self.layout, samples.origin[0])
            losses = self.objective.write(samples, rows, chunk_size=chunk_size)
            finite = self._judge(rows, losses, samples)
            good = int(finite.sum())
            if good < len(finite):
                piece[:good] = piece[finite]
                # a mini-batch mean has one row for all its samples
                samples = samples.pick(finite) if not exactly else samples.narrow(0, good * len(samples))
            room = kept_bytes + samples.nbytes <= KEPT_BYTES and self.num_finite < KEPT_GRADS
            if good and (room or not self.kept):
                self.kept.append(samples)
                self.kept_losses.append(losses[finite.to(losses.device)].double())
                kept_bytes += samples.nbytes
            if good and self._keep_samples:
                self.used.append(samples.cpu())
            self.num_finite += good
            filled += good
            if filled == room_for:
                yield buffer
                filled = 0
        missing = self.num_grads - self.num_finite
        if missing and self.num_finite + self.num_non_finite < self.num_grads:
            raise self._too_short(self._reader.seen - self._seen_before)
        if not self.num_finite:
            raise FisherError(
                f"all {self.num_non_finite} gradients were non-finite (first: {self.first_non_finite}); "
                f"check the loss and the precision of the model"
            )
        if filled:
            yield buffer[: filled * each]
        while missing:
            count = min(room_for, missing)
            yield buffer[: count * each].zero_()
            missing -= count

    def differentiate(self, samples: Samples, out: Tensor) -> Tensor:
        """Write the gradients of samples into out [rows, d], of the stream's dtype; returns the losses [k].

        Nothing is noted, and the rows may be anything but finite.
        """
        count = 1 if self._per_grad > 1 else len(samples)
        return self.objective.write(
            samples, _Piece(out.view(count, -1, out.shape[1]), self.layout, samples.origin[0])
        )

    def _judge(self, rows: _Piece, losses: Tensor, samples: Samples) -> Tensor:
        """Note the norms of the gradients, and tell which of the k are finite."""
        flat, k = rows.flat, rows.count
        each = len(flat) // k
        squares = torch.stack([_norms(flat[:, a:b]).view(k, each) ** 2 for _, (a, b) in self._ranges]).sum(
            2
        )  # [tensors, k]
        loss_finite = torch.isfinite(losses)
        lost = rows.nonzero & (squares.sum(0) == 0)
        finite = (torch.isfinite(squares).all(0) & loss_finite & ~lost).cpu()
        squares = squares.cpu()
        if not bool(finite.all()):
            self.num_non_finite += int((~finite).sum())
            if self.first_non_finite is None:
                row = int((~finite).nonzero()[0])
                batch = samples.origin[min(row, len(samples) - 1)]
                wrong = (~torch.isfinite(squares[:, row])).nonzero()
                if len(wrong):
                    name = self._ranges[int(wrong[0])][0]
                    dtype = self.dtype if rows.narrow else self.objective.weights[name].dtype
                    self.first_non_finite = f"batch {batch}, {name!r}, {str(dtype).removeprefix('torch.')}"
                elif bool(lost[row]):
                    kind = str(self.dtype).removeprefix("torch.")
                    self.first_non_finite = f"batch {batch}, too small for {kind}"
                else:
                    self.first_non_finite = (
                        f"batch {batch}, the loss, {str(losses.dtype).removeprefix('torch.')}"
                    )
        good = squares[:, finite]
        for i, reached in enumerate((good > 0).any(1).tolist()):
            self._reached[i] = self._reached[i] or reached
        norms = good.sum(0)  # [k]
        self.sum_squares += float(norms.sum())
        self.sum_fourth += float((norms**2).sum())
        return finite
