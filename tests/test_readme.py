"""The README's Python examples run as they stand, the tutorial's one after another, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import fastfisher as ff

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
TUTORIAL = README[README.index("## Tutorial") : README.index("## Prune your own network")]
EXAMPLES = BLOCK.findall(README.replace(TUTORIAL, ""))


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.splitlines()[-1][:30])
def test_example_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in re.findall(r"^from (transformers|lightning|accelerate)\b", code, re.MULTILINE):
        pytest.importorskip(library)  # make test-integrations installs them
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_tutorial_runs_and_gives_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    from fastfisher import cli

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in BLOCK.findall(TUTORIAL):
        exec(compile(code, "README.md", "exec"), names)
    with pytest.raises(SystemExit) as left:
        cli.app(re.findall(r"^\.venv/bin/fastfisher (.*)", TUTORIAL, re.MULTILINE)[0].split())
    assert left.value.code in (0, None)
    assert "saved a page of 2 runs" in capsys.readouterr().out

    # another processor trains to other last digits
    shown = [float(number) for number in re.findall(r"score  (\S+) +(\S+) +(\S+)", TUTORIAL)[0]]
    oneshot = ff.Report.load("tutorial/oneshot")
    assert [oneshot.dense, oneshot.pruned] == pytest.approx([shown[0], shown[2]], abs=0.02)
    assert oneshot.control < oneshot.pruned - 0.3
    assert names["accuracy"](names["again"]) == pytest.approx(0.9749, abs=0.02)
    assert names["pruner"].sparsity == pytest.approx(0.97, abs=1e-3)


def test_the_two_commands_come_first() -> None:
    first = re.search(r"```sh\n(.*?)```", README, re.DOTALL)
    assert first is not None
    assert [line.split("#")[0].strip() for line in first[1].splitlines()] == ["make demo", "make test"]
    assert README[: first.start()].count("\n") < 5


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_links_and_make_targets_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", text, re.MULTILINE)) <= {
        pair for target in targets for pair in ((target, ""), ("", target))
    }
