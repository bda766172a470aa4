"""Tables that tests print into the summary at the end, whichever process they ran in."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "build" / "tables"


def show(title: str, text: str) -> None:
    """Have a table printed at the end of the run."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{title}.txt").write_text(text + "\n")


def shown(since: float) -> dict[str, str]:
    """Title -> text of the tables written since that time."""
    files = sorted(FOLDER.glob("*.txt"))
    return {file.stem: file.read_text() for file in files if file.stat().st_mtime >= since}
