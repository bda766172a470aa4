"""The page of runs: well-formed, without anything from elsewhere, and its pictures show the numbers of the runs."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fastfisher import cli, report_html, runlog
from fastfisher.errors import FastFisherError
from fastfisher.report import LayerRow, Report, StepRow
from fastfisher.report_html import BOTTOM, HEIGHT, LEFT, PAD, RIGHT, TOP, WIDTH, page, ticks, write_page

HOSTILE = "<script>\"a\" & 'b'</script>"


def made(share: float, **changes: object) -> Report:
    """A report of 200 weights in two layers, of which the first is sparser."""
    zeros = round(200 * share)
    first = min(100, round(1.2 * zeros / 2))
    report = Report(
        method="woodfisher",
        scope="global",
        sparsity=share,
        update="joint",
        num_weights=200,
        num_zeros=zeros,
        zeros_before=0,
        layers=[
            LayerRow("body.0.weight", (10, 10), 100, 0, first),
            LayerRow("head.weight", (10, 10), 100, 0, zeros - first),
        ],
        loss_dense=0.5,
        loss_pruned=0.75,
        num_grads=64,
        seconds={"gradients": 2.0, "inverse": 0.5},
        compression_ratio=1 / (1 - share),
    )
    return replace(report, **changes)  # type: ignore[arg-type]


def write_log(path: Path, unit: str = "epoch", last: float = 0.9) -> Path:
    """A run that prunes at 1, 3, 5 and records its accuracy at 0 ... 6."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for when in range(7):
        if when in (1, 3, 5):
            share = {1: 0.3, 3: 0.6, 5: last}[when]
            runlog.append(
                path, unit, when, report=made(share, loss_dense=when / 4, loss_pruned=when / 2).to_dict()
            )
        runlog.append(path, unit, when, scores={"accuracy": 0.5 + when / 16})
    return path


class Balanced(HTMLParser):
    """Every tag is closed where it should be, and the text is collected."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def pictures(text: str) -> dict[str, ElementTree.Element]:
    """The pictures by title, with the last of several."""
    found = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    return {svg.attrib["aria-label"]: svg for svg in found}


def dots(svg: ElementTree.Element) -> list[tuple[float, float, str]]:
    return [
        (float(dot.attrib["cx"]), float(dot.attrib["cy"]), dot[0].text or "") for dot in svg.iter("circle")
    ]


def assert_alone(text: str) -> None:
    """Nothing on the page is fetched or run."""
    Balanced(text)
    for word in ("http:", "https:", "src=", "href=", "url(", "@import", "<script", "<link", "<img"):
        assert word not in text, word


def test_pictures_show_the_numbers(tmp_path: Path) -> None:
    write_log(tmp_path / "a" / "run.jsonl")
    runs = write_page([tmp_path / "a"], tmp_path / "new" / "page.html")
    text = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert_alone(text)
    assert [run.name for run in runs] == ["a"]
    found = pictures(text)

    def x(when: float) -> float:
        return LEFT + PAD + when / 6 * (WIDTH - LEFT - RIGHT - 2 * PAD)

    def y(part: float) -> float:
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    shares = [(0, 0.0), (1, 0.3), (3, 0.6), (5, 0.9), (6, 0.9)]
    sparsity = dots(found["share of zeros, by epoch"])
    assert [dot[:2] for dot in sparsity] == [pytest.approx((x(t), y(s)), abs=0.06) for t, s in shares]
    assert [dot[2] for dot in sparsity] == [f"a, epoch {t}: {s:.2%}" for t, s in shares]
    # 0.5 to 0.875 on an axis from 0.5 to 0.9
    accuracy = dots(found["accuracy, by epoch"])
    assert [dot[:2] for dot in accuracy] == [
        pytest.approx((x(t), y(t / 16 / 0.4)), abs=0.06) for t in (1, 3, 5)
    ]
    curve = next(path for path in found["accuracy, by epoch"].iter("path") if path.attrib["class"] == "line")
    assert len(re.findall("[ML]", curve.attrib["d"])) == 7
    heat = list(found["a"].iter("rect"))
    assert [float(re.sub("[^0-9.]", "", rect.attrib["style"])) for rect in heat] == [
        pytest.approx(row) for row in (0.36, 0.72, 1.0, 0.24, 0.48, 0.8)
    ]
    assert heat[5][0].text == "head, epoch 5: 80.00%"


def test_losses_before_and_after_each_pruning(tmp_path: Path) -> None:
    (run,) = report_html.find_runs([write_log(tmp_path / "run.jsonl")])
    assert run.before == [(1, 0.25), (3, 0.75), (5, 1.25)]
    assert run.after == [(1, 0.5), (3, 1.5), (5, 2.5)]
    section = report_html._losses([run])
    says = [dot[2] for dot in dots(pictures(section)["run"])]
    assert says[0] == "epoch 1, before: 0.25"
    assert says[-1] == "epoch 5, after: 2.5"
    heights = {dot[2]: dot[1] for dot in dots(pictures(section)["run"])}
    assert heights["epoch 3, before: 0.75"] > heights["epoch 3, after: 1.5"]  # y grows downwards
    assert run.seconds == {"gradients": 6.0, "inverse": 1.5}


def test_a_run_of_one_call(tmp_path: Path) -> None:
    steps = [StepRow(0.4, 0.5, 20.0, 1e-3), StepRow(0.8, 0.7, 20.0, 1e-3)]
    report = made(
        0.8,
        steps=steps,
        dense={"accuracy": 0.9},
        control={"accuracy": 0.25},
        pruned={"accuracy": 0.875},
        notes=["something to know"],
    )
    (tmp_path / "shot").mkdir()
    (tmp_path / "shot" / "report.json").write_text(json.dumps(report.to_dict()))
    (run,) = write_page([tmp_path / "shot"], tmp_path / "page.html")
    assert run.sparsity == [(0, 0.0), (1, 0.4), (2, 0.8)]
    assert (run.before, run.after) == ([(1, 0.5), (2, 0.7)], [(2, 0.75)])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert_alone(text)
    words = Balanced(text).words
    for word in ("0.9", "0.25", "0.875", "something to know", "share of zeros, by recomputation", "80.00%"):
        assert word in words


def test_several_runs_share_a_picture_where_they_share_a_unit(tmp_path: Path) -> None:
    write_log(tmp_path / "x" / "run" / "log.jsonl")
    write_log(tmp_path / "y" / "run" / "log.jsonl", last=0.8)
    write_log(tmp_path / "same.jsonl", last=0.8)
    write_log(tmp_path / "steps.jsonl", unit="step")
    runs = write_page(
        [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "same.jsonl", tmp_path / "steps.jsonl"],
        tmp_path / "page.html",
    )
    assert [run.name for run in runs] == ["run (1)", "run (2)", "same", "steps"]
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert_alone(text)
    found = pictures(text)
    assert {"share of zeros, by epoch", "share of zeros, by step"} <= set(found)
    curves = [
        path for path in found["share of zeros, by epoch"].iter("path") if "line" in path.attrib["class"]
    ]
    # the third lies over the second, and leaves it to be seen
    assert [path.attrib["class"] for path in curves] == ["line", "line", "line dashed"]
    assert curves[1].attrib["d"] == curves[2].attrib["d"] != curves[0].attrib["d"]
    rows = re.findall(r'<tr class="differs"><th scope="row">(.*?)</th>', text)
    assert rows == ["sparsity"]


def test_what_is_missing_or_not_finite_is_left_out(tmp_path: Path) -> None:
    bare = made(0.5, loss_dense=None, loss_pruned=None, num_grads=None, seconds={}, method="random")
    path = tmp_path / "run.jsonl"
    runlog.append(path, "epoch", 2, report=bare.to_dict())
    (run,) = write_page([path], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert_alone(text)
    assert "Loss before" not in text
    assert (run.before, run.scores) == ([], {})

    runlog.append(path, "epoch", 3, report=made(0.6, loss_dense=2.0, loss_pruned=math.inf).to_dict())
    runlog.append(path, "epoch", 4, report=made(0.7, loss_dense=math.nan, loss_pruned=math.nan).to_dict())
    for when, value in ((4, math.nan), (5, 0.5), (6, 0.5)):
        runlog.append(path, "epoch", when, scores={"accuracy": value})
    write_page([path], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert_alone(text)
    drawn = "".join(
        attribute for svg in pictures(text).values() for p in svg.iter() for attribute in p.attrib.values()
    )
    assert "nan" not in drawn
    assert "inf" not in drawn
    assert "nan → nan" in text


def test_names_and_notes_are_text(tmp_path: Path) -> None:
    layer = LayerRow(HOSTILE, (2, 2), 4, 0, 2)
    report = made(
        0.5, layers=[layer], notes=[HOSTILE], method=HOSTILE, command=HOSTILE, seconds={HOSTILE: 1.0}
    )
    path = tmp_path / "a&b.jsonl"
    runlog.append(path, "epoch", 1, report=report.to_dict())
    runlog.append(path, "epoch", 1, scores={HOSTILE: 0.5})
    write_page([path], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert_alone(text)
    assert HOSTILE in Balanced(text).words
    assert {"a&b", f"{HOSTILE}, by epoch"} <= set(pictures(text))


def test_labels_keep_what_tells_layers_apart() -> None:
    assert report_html._labels(["model.layers.0.q", "model.layers.0.k", "model.layers.1.q"]) == [
        "0.q",
        "0.k",
        "1.q",
    ]
    assert report_html._labels(["a.b", "a.b.c", "a.d"]) == ["b", "b.c", "d"]
    assert report_html._labels(["a", "b.c"]) == ["a", "b.c"]
    assert report_html._labels(["layer.weight"]) == ["weight"]
    (long, _) = report_html._labels(["0.self_attention.query_projection", "1.x"])
    assert (long, len(long)) == ("0.self_a…_projection", 20)


def test_a_note_is_told_once_with_its_times(tmp_path: Path) -> None:
    for when, notes in ((1, ["few"]), (2, []), (3, ["few", "other"])):
        runlog.append(tmp_path / "a.jsonl", "epoch", when, report=made(0.2 * when, notes=notes).to_dict())
    write_page([tmp_path / "a.jsonl"], tmp_path / "page.html")
    words = Balanced((tmp_path / "page.html").read_text(encoding="utf-8")).words
    assert words.count("few") == 1
    assert words[words.index("few") - 1] == " (epoch 1, 3)"
    assert words[words.index("other") - 1] == " (epoch 3)"


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0, 1, False, [0, 0.25, 0.5, 0.75, 1]),
        (0, 1, True, [0, 1]),
        (1, 22, True, [0, 5, 10, 15, 20, 25]),
        (0.31, 0.32, False, [0.31, 0.3125, 0.315, 0.3175, 0.32]),
        (-3, 5e6, False, [-2e6, 0, 2e6, 4e6, 6e6]),
    ],
)
def test_ticks_are_round_and_cover_the_range(
    low: float, high: float, whole: bool, expected: list[float]
) -> None:
    found = ticks(low, high, whole=whole)
    assert found[0] <= low
    assert found[-1] >= high
    assert found == pytest.approx(expected)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FastFisherError, match="no report at"):
        write_page([tmp_path], tmp_path / "page.html")
    runlog.append(tmp_path / "run.jsonl", "epoch", 0, scores={"accuracy": 0.5})
    with pytest.raises(FastFisherError, match=r"run.jsonl' tells of no pruning yet"):
        write_page([tmp_path], tmp_path / "page.html")
    write_log(tmp_path / "run.jsonl")
    with pytest.raises(FastFisherError, match="a page shows at most 8 runs; got 9"):
        write_page([tmp_path] * 9, tmp_path / "page.html")
    with pytest.raises(FastFisherError, match="cannot be written: Is a directory"):
        write_page([tmp_path], tmp_path)
    assert not (tmp_path / "page.html").exists()


def test_the_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_log(Path("run", "run.jsonl"))

    def run(*words: str) -> int:
        with pytest.raises(SystemExit) as left:
            cli.app(["report", *words])
        return int(left.value.code or 0)

    assert run("run") == 0
    shown = capsys.readouterr().out
    for word in ("woodfisher, global scope", "epoch", "60.00%", "0.75", "1.5", "2.50"):
        assert word in shown
    assert run("run", "run/run.jsonl", "--html", "pages/page.html") == 0
    assert "saved a page of 2 runs in pages/page.html" in capsys.readouterr().out
    assert Path("pages/page.html").read_text(encoding="utf-8") == page(report_html.find_runs(["run"] * 2))
    assert run("run", "elsewhere", "--html", "page.html") == cli.BAD_INPUT
    assert "no report at 'elsewhere'" in capsys.readouterr().err
