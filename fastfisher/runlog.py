"""The log of a gradual run: a file of JSON lines, one for every pruning step and every record of scores.

    {"unit": "epoch", "when": 3, "time": "2026-11-25T23:51:32+00:00", "report": {what Report.to_dict tells}}
    {"unit": "epoch", "when": 3, "time": ..., "scores": {"accuracy": 0.91}}

A line is written at once and behind all others.  A run that was killed and goes on from its checkpoint repeats lines,
and may have left one cut off in the middle; `read` drops what was made void.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastfisher.errors import FastFisherError
from fastfisher.report import Report


@dataclass
class RunLog:
    """A run as its log tells it.   unit: of times, "epoch" or "step".   steps, scores: in the order of their times."""

    unit: str
    steps: list[tuple[float, Report]] = field(default_factory=list)
    scores: list[tuple[float, dict[str, float]]] = field(default_factory=list)


def append(path: Path, unit: str, when: float, **content: Any) -> None:
    """Write one line behind the others, and no other one if the process dies.   Raises OSError."""
    entry = {"unit": unit, "when": when, "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    line = json.dumps(entry | content, ensure_ascii=False, default=float).encode() + b"\n"
    with path.open("a+b", buffering=0) as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                line = (
                    b"\n" + line
                )  # what a killed process left is a line of its own, and no part of this one
        file.write(line)


def read(path: str | Path) -> RunLog:
    """The steps and scores that count: a line takes back all lines before it that are later in time, or its like.

    Raises FastFisherError where there is no such file, or it is no log.
    """
    path = Path(path)
    if not path.is_file():
        raise FastFisherError(f"there is no file {str(path)!r}")
    entries: list[tuple[str, float, Any]] = []
    unit = None
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut off where a process was killed
        if not isinstance(entry, Mapping) or not isinstance(entry.get("when"), (int, float)):
            raise FastFisherError(f"line {number} of {str(path)!r} is none of a log of ff.Pruner")
        kind = "report" if "report" in entry else "scores"
        unit, when = str(entry.get("unit")), entry["when"]
        while entries and entries[-1][1] > when:
            entries.pop()
        for like in [e for e in entries[-2:] if e[:2] == (kind, when)]:
            entries.remove(like)
        entries.append((kind, when, entry.get(kind)))
    if unit is None:
        raise FastFisherError(f"{str(path)!r} holds no line of a log of ff.Pruner")
    found = RunLog(unit)
    try:
        for kind, when, content in entries:
            if kind == "report":
                found.steps.append((when, Report.from_dict(content)))
            else:
                found.scores.append((when, {str(key): float(value) for key, value in content.items()}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FastFisherError(f"{str(path)!r} is no log of ff.Pruner: {error}") from error
    return found
