"""One line on standard error while a call runs: the phase it is in, the share that is done, and the time that remains.

prune to 90 %: inverse  42%|████████▍           | 00:31<00:43
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from fastfisher.errors import FastFisherError

Progress = Callable[[str, int, int], None]

DELAY = 1.0  # seconds before the line is shown: what is over by then needs none
INTERVAL = 0.1  # seconds between two drawings
LINE = "{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}"


class Bar:
    """The progress of one call, for a person or a function; a context manager.

    progress: None for a line where standard error is a terminal, and of several processes in the first one; True for a
        line anywhere, False for none; or a function of (phase, done, total).   title: what the call does.
    Raises FastFisherError on anything else.
    """

    def __init__(self, progress: Progress | bool | None, title: str) -> None:
        if progress is not None and not isinstance(progress, bool) and not callable(progress):
            raise FastFisherError(
                f"progress must be True, False, None, or a function of (phase, done, total); got {progress!r:.60}"
            )
        self._tell = progress if callable(progress) else None
        if progress is None and dist.is_available() and dist.is_initialized() and dist.get_rank():
            progress = False
        self._show = None if progress is None else progress is True
        self._title = title
        self._line: Any = None
        self._drawn = 0.0

    def __enter__(self) -> Bar:
        if self._show is not False:
            # smoothing=0: gradients and inverses take turns, and only the mean over both tells what remains
            self._line = tqdm(
                total=1,
                desc=self._title,
                bar_format=LINE,
                smoothing=0,
                leave=False,
                dynamic_ncols=True,
                delay=DELAY,
                disable=None if self._show is None else False,
            )
            self._drawn = time.monotonic() + DELAY
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None

    def phase(self, name: str) -> None:
        """The call enters this phase."""
        self._draw(name)

    def __call__(self, phase: str, done: int, total: int) -> None:
        """So much of the whole call is done."""
        if self._tell is not None:
            self._tell(phase, done, total)
        if self._line is not None:
            self._line.total, self._line.n = total, done
        self._draw(phase)

    def _draw(self, phase: str) -> None:
        if self._line is None:
            return
        self._line.set_description_str(f"{self._title}: {phase}", refresh=False)
        now = time.monotonic()
        if now - self._drawn >= INTERVAL:
            self._drawn = now
            self._line.refresh()
