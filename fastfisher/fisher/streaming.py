"""Gradients from CPU memory to a GPU, a few rows at a time, while the GPU works on the rows before them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE_BYTES = 256 << 20  # of a buffer on the GPU; there are two


def streamed(grads: Tensor, device: torch.device) -> Iterator[Tensor]:
    """The rows of gradients [k, d] on the device, in pieces; each is overwritten after the one that follows it.

    On the device already, they are handed on as they are.   Copies run on a stream of their own.  Where the memory is
    pinned, they overlap with what the caller does with the piece before.
    """
    device = torch.empty(0, device=device).device  # with its index
    if grads.shape[0] == 0:
        return
    if grads.device == device:
        yield grads
        return
    rows = max(1, min(grads.shape[0], PIECE_BYTES // (grads.shape[1] * grads.itemsize)))
    pieces = grads.split(rows)
    if device.type != "cuda":
        for piece in pieces:
            yield piece.to(device)
        return
    compute, copier = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    buffers = [torch.empty(rows, grads.shape[1], dtype=grads.dtype, device=device) for _ in range(2)]
    arrived = [torch.cuda.Event(), torch.cuda.Event()]
    consumed = [torch.cuda.Event(), torch.cuda.Event()]
    for event in consumed:
        event.record(compute)  # nothing is written before the buffers are this stream's own

    def fetch(index: int) -> None:
        slot, piece = index % 2, pieces[index]
        with torch.cuda.stream(copier):
            copier.wait_event(consumed[slot])
            buffers[slot][: len(piece)].copy_(piece, non_blocking=True)
            arrived[slot].record(copier)

    fetch(0)
    for index, piece in enumerate(pieces):
        slot = index % 2
        if index + 1 < len(pieces):
            fetch(index + 1)
        compute.wait_event(arrived[slot])
        yield buffers[slot][: len(piece)]
        consumed[slot].record(compute)
    compute.wait_stream(copier)
