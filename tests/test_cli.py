"""The command line: every verb on a small network, its exit codes, its speed."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastfisher as ff
from fastfisher import bench, cli, doctor
from fastfisher.errors import FastFisherError, FisherError
from fastfisher.report import Report

ROOT = Path(__file__).resolve().parent.parent

USER_MODULE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

def data():
    torch.manual_seed(1)
    return [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(8)]

def score(model):
    return {"norm": float(sum(p.detach().norm() for p in model.parameters()))}

def number():
    return 3
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of the user's."""
    (tmp_path / "mine.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def run(*words: str, code: int = 0) -> None:
    """Run one command in this process and check its exit code."""
    with pytest.raises(SystemExit) as left:
        cli.app(list(words))
    assert (left.value.code or 0) == code


PRUNE = ("prune", "mine:model", "mine:data", "--sparsity", "0.5", "--num-grads", "32", "--block-size", "16")


def test_prune_eval_and_report_work_on_the_same_folder(
    user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*PRUNE, "--update", "joint", "--eval-fn", "mine:score", "--out", "run")
    assert "50.00%" in capsys.readouterr().out
    assert {"report.json", "layers.csv", "model.safetensors"} <= {path.name for path in Path("run").iterdir()}
    saved = Report.load("run")
    assert (saved.num_zeros, saved.update, saved.block_size) == (72, "joint", 16)

    run("eval", "mine:model", "mine:data", "--weights", "run/model.safetensors", "--eval-fn", "mine:score")
    shown = capsys.readouterr().out
    assert "72" in shown
    assert f"{saved.pruned['norm']:.4f}" in shown
    assert "accuracy" in shown

    run("report", "run")
    assert "woodfisher, global scope" in capsys.readouterr().out


def test_export_packs_what_prune_saved(user: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(
        "model: mine:model\ndata: mine:data\nsparsity: 0.9\nnum_grads: 32\nout: run\n"
    )
    run("prune", "--config", "run.yaml")
    capsys.readouterr()
    run("export", "--config", "run.yaml", "--weights", "run/model.safetensors", "--out", "packed.safetensors")
    size, saved = capsys.readouterr().out.splitlines()
    assert "packed, 652 bytes dense" in size.replace(" B ", " bytes ")
    assert saved == "saved packed.safetensors"
    model = cli.load("mine:model", "model")()
    ff.load("run/model.safetensors", model)
    packed = ff.load_packed("packed.safetensors")
    assert all(torch.equal(value, packed[name]) for name, value in model.state_dict().items())


def test_plan_tells_bytes(user: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("plan", "mine:model", "mine:data", "--sparsity", "0.5", "--num-grads", "32")
    assert "144 weights" in capsys.readouterr().out


def test_config_has_the_keys_of_the_python_call_and_flags_win(user: Path) -> None:
    Path("run.yaml").write_text(
        "model: mine:model\ndata: mine:data\nsparsity: 0.9\nnum_grads: 16\nblock_size: null\n"
        "damping: 1e-4\nignore: ['2']\nout: run\n"
    )
    run("prune", "--config", "run.yaml", "--sparsity", "0.25")
    saved = Report.load("run")
    assert (saved.num_zeros, saved.num_weights, saved.block_size, saved.damping) == (24, 96, None, 1e-4)
    run("eval", "--config", "run.yaml")  # keys that only prune has are left alone


def test_weights_are_any_safetensors_file_but_a_changed_one(
    user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_model

    model = cli.load("mine:model", "model")()
    evaluate = ("eval", "mine:model", "--weights", "model.safetensors")
    save_model(model, "model.safetensors")
    run(*evaluate)
    ff.save(model, "model.safetensors")
    run(*evaluate)
    content = Path("model.safetensors").read_bytes()
    Path("model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    run(*evaluate, code=cli.BAD_INPUT)
    assert (
        "--weights model.safetensors does not load: 'model.safetensors' is changed" in capsys.readouterr().err
    )


def test_accuracy_is_that_of_classes_alone() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Linear(6, 1), torch.randn(8, 6)
    output = model(x).detach()[:, 0]
    found = cli.evaluate(model, [(x, output > 0)])
    expected = torch.nn.functional.softplus(-output.abs()).mean()
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert "accuracy" not in found
    assert cli.evaluate(model, [(x, torch.zeros(8, dtype=torch.long))])["accuracy"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("prune", "mine:model", "mine:data"), "sparsity is missing"),
        (("prune", "--sparsity", "0.5"), "model is missing"),
        (
            ("prune", "mine", "mine:data", "--sparsity", "0.5"),
            "model must be package.module:function, got 'mine'",
        ),
        (("prune", "yours:model", "mine:data", "--sparsity", "0.5"), "yours cannot be imported"),
        (("prune", "mine:modle", "mine:data", "--sparsity", "0.5"), "no function 'modle'. Closest: 'model'"),
        (("prune", "mine:number", "mine:data", "--sparsity", "0.5"), "must return an nn.Module, got int"),
        (("prune", "mine:model", "mine:data", "--sparsity", "50"), "got 50.0. Did you mean 0.50?"),
        ((*PRUNE[:-1], "tiny"), "block_size must be a whole number or 'all', got 'tiny'"),
        ((*PRUNE, "--method", "fischer"), "method must be one of"),
        ((*PRUNE, "--weights", "none.safetensors"), "--weights none.safetensors does not load"),
        (("report", "nowhere"), "no report at 'nowhere'"),
        (("export", "mine:model"), "out is missing: name the file to write"),
        (("export", "--out", "packed.safetensors"), "model is missing"),
        (
            ("export", "mine:model", "--out", "."),
            "--out . is a folder; name a file, such as packed.safetensors",
        ),
        (("export", "mine:model", "--out", "mine.py/packed"), "--out mine.py/packed cannot be written: "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    user: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    run(*words, code=cli.BAD_INPUT)
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsty: 0.5\n", "unknown key 'sparsty' in run.yaml. Closest: 'sparsity'"),
        ("- a list\n", "must hold keys and values, got list"),
        ("a: [\n", "cannot be read"),
    ],
)
def test_bad_config(user: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    Path("run.yaml").write_text(text)
    run("prune", "--config", "run.yaml", code=cli.BAD_INPUT)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FastFisherError("bad"), cli.BAD_INPUT),
        (FisherError("block 3"), cli.NUMERICAL),
        (MemoryError(), cli.NO_MEMORY),
        (torch.OutOfMemoryError("full"), cli.NO_MEMORY),
    ],
)
def test_exit_codes_tell_the_errors_apart(
    user: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise error

    broken.__signature__ = __import__("inspect").signature(ff.prune)  # type: ignore[attr-defined]
    monkeypatch.setattr(ff, "prune", broken)
    run(*PRUNE, code=code)


def test_a_bad_environment_variable_is_bad_input(
    user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTFISHER_NUM_THREADS", "many")
    run("doctor", code=cli.BAD_INPUT)
    assert (
        "FASTFISHER_NUM_THREADS must be a whole number of at least 1, got 'many'" in capsys.readouterr().err
    )


def test_what_does_not_fit_in_memory_has_its_own_exit_code(user: Path) -> None:
    Path("run.yaml").write_text("memory_limit: 2 kB\n")
    run(*PRUNE, "--config", "run.yaml", code=cli.NO_MEMORY)
    run("plan", *PRUNE[1:], "--config", "run.yaml", code=cli.NO_MEMORY)


def test_unexpected_errors_keep_their_traceback(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "build_data", lambda given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.app([*PRUNE])


@pytest.mark.parametrize(
    "verb",
    [(), ("prune",), ("plan",), ("tune",), ("eval",), ("export",), ("report",), ("doctor",), ("bench",)],
)
def test_help_is_quick_and_documents_the_exit_codes(
    verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "fastfisher.cli", *verb, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "200"},
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Time on the processor: the clock on the wall would measure what else the machine does.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5
    assert "2 bad input" in done.stdout
    # flags are the lines whose first word, behind the frame, is a long option
    assert sum(line.strip("│ ").startswith("--") for line in done.stdout.splitlines()) < 15
    # the same text as typer's own, which takes three times as long
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.app([*verb, "--help"], prog_name="fastfisher")
    assert done.stdout == capsys.readouterr().out


@pytest.fixture
def few_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bench that is over in a moment."""
    monkeypatch.setattr(bench, "WEIGHTS", {"cpu": 3_000})


@pytest.mark.usefixtures("few_weights")
def test_bench_times_checks_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    run("bench", "--device", "cpu", "--seconds", "0.01", "--json", str(tmp_path / "bench.json"))
    shown = capsys.readouterr().out
    assert "plain PyTorch" in shown
    assert "WRONG" not in shown
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert [row["what"].split()[0] for row in saved["rows"]] == [*["inverse"] * 3, "update", "selection"]
    for row in saved["rows"]:
        assert row["error"] <= 1e-4
        assert row["plain_error"] <= 1e-4
        assert row["ratio"] == pytest.approx(row["plain_seconds"] / row["seconds"])
        assert row["verdict"] == ("faster" if row["ratio"] >= 1 else "slower")
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("few_weights")
def test_bench_shows_no_ratio_of_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = ff.FisherInverse.diag
    monkeypatch.setattr(ff.FisherInverse, "diag", lambda self: real(self) * 1.01)
    run("bench", "--device", "cpu", "--seconds", "0.01", code=cli.NUMERICAL)
    wrong = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert len(wrong) == 3
    assert all(" - " in line for line in wrong)
    plain_is_wrong = bench.Row("", 1e-6, float("nan"), 1.0, 2.0)
    assert (plain_is_wrong.ratio, plain_is_wrong.verdict) == (None, "right, plain PyTorch is not")
    assert bench.Row("", float("nan"), 1e-6, 1.0, 2.0).verdict == "WRONG"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "tpu"), "device must be cpu, or a GPU that torch sees, such as cuda:0; got 'tpu'"),
        (("--device", "cuda:99"), "got 'cuda:99'"),
        (("--seconds", "0"), "seconds must be positive, got 0"),
        (
            ("--seconds", "0.01", "--json", "no/such/folder.json"),
            "--json no/such/folder.json cannot be written",
        ),
    ],
)
@pytest.mark.usefixtures("few_weights")
def test_bench_says_what_is_wrong_with_an_option(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    device = () if words[0] == "--device" else ("--device", "cpu")
    run("bench", *device, *words, code=cli.BAD_INPUT)
    assert message in capsys.readouterr().err


def test_doctor_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.app(["doctor"])
    shown = capsys.readouterr().out
    assert "native kernels" in shown
    assert "FASTFISHER_NUM_THREADS" in shown


def test_doctor_repeats_the_reason_of_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ModuleNotFoundError("No module named 'fastfisher._native'")
    reason = SimpleNamespace(
        REASON="no C++ compiler was found", CUDA_REASON="", CUDA_ARCHS=(), CUDA_TOOLKIT=""
    )
    monkeypatch.setitem(sys.modules, "fastfisher._native", None)
    monkeypatch.setitem(sys.modules, "fastfisher._build_info", reason)
    assert doctor.native_reason(error) == "no C++ compiler was found"
    (finding,) = [found for found in doctor.examine() if found.subject == "native kernels"]
    assert (finding.state, "no C++ compiler was found" in finding.sentence) == ("problem", True)
    reason.REASON = ""
    assert "does not load" in doctor.native_reason(error)
    monkeypatch.setitem(sys.modules, "fastfisher._build_info", None)
    assert "was not built" in doctor.native_reason(error)


def test_doctor_recognises_a_torchvision_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("operator torchvision::nms does not exist")
    assert "built for another torch" in doctor.torchvision_sentence(error)
    assert doctor.torchvision_sentence(OSError("gone")).startswith("does not import (gone)")


def test_report_json_is_json(user: Path) -> None:
    run(*PRUNE, "--out", "run")
    assert json.loads(Path("run/report.json").read_text())["size"] == 163


TUNE = (
    "tune",
    "mine:model",
    "mine:data",
    "--sparsity",
    "0.5",
    "--num-grads",
    "8,16",
    "--block-size",
    "16,all",
)


def test_tune_finds_settings_and_goes_on_where_it_stopped(
    user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--relative-damping", "0.1,1", "--absolute-damping", "none", "--num-recomputations", "0,auto")
    run(*TUNE, *options, "--held-out", "0.5", "--out", "tuning")
    said = capsys.readouterr().out
    assert "best: fastfisher prune --damping" in said
    assert {path.name for path in Path("tuning").iterdir()} == {"tune.json", "tune.csv", "tune.png"}
    rows = Path("tuning/tune.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 * 2 * 2
    run(*TUNE, *options, "--held-out", "0.5", "--out", "tuning")
    assert Path("tuning/tune.csv").read_text().splitlines() == rows
    best = capsys.readouterr().out.split("best: fastfisher ")[1].split()
    run(best[0], "mine:model", "mine:data", "--sparsity", "0.5", *best[1:])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--relative-damping", "0.1;1"), "'0.1;1' is no list of numbers such as 1,2,3"),
        (("--relative-damping", "none", "--absolute-damping", "none"), "there is no damping to try"),
        (("--method", "wood"), "method must be one of"),
    ],
)
def test_tune_says_what_is_wrong(
    user: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], sentence: str
) -> None:
    run(*TUNE, *flags, code=2)
    assert sentence in capsys.readouterr().err


def test_tune_takes_the_file_of_prune(user: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(
        "model: mine:model\ndata: mine:data\nsparsity: 0.5\nnum_grads: 16\nblock_size: 16\ndamping: 0.1\n"
        "method: woodtaylor\nnum_recomputations: 1\nrelative_damping: [0.1, 1.0]\nabsolute_damping: null\n"
    )
    run("tune", "--config", "run.yaml", "--out", "tuning")
    assert len(Path("tuning/tune.csv").read_text().splitlines()) == 3
    run("prune", "--config", "run.yaml")
    assert "woodtaylor" in capsys.readouterr().out


def test_set_takes_every_other_keyword(user: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(*PRUNE, "--set", "pattern=block2", "--set", "seed=3", "--set", "scope=layer")
    assert "layer scope" in capsys.readouterr().out
    run(*PRUNE, "--set", "patern=2:4", code=cli.BAD_INPUT)
    assert "unknown key 'patern' in --set. Closest: 'pattern'" in capsys.readouterr().err
    run(*PRUNE, "--set", "pattern", code=cli.BAD_INPUT)
    assert "--set takes KEY=VALUE, got 'pattern'" in capsys.readouterr().err


def test_a_pattern_in_a_file_is_no_time_of_day(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("pattern: 2:4\nnum_grads: 64\ndamping: 1e-5\nblock_size: 0x10\ncentered: true\n")
    assert cli.read_config(file) == {
        "pattern": "2:4",
        "num_grads": 64,
        "damping": 1e-5,
        "block_size": "0x10",
        "centered": True,
    }
