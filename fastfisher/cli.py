"""The command line: `fastfisher prune | plan | tune | eval | export | report | doctor | bench`.

Models and data are named `package.module:function`; the function takes no arguments and returns the nn.Module, or an
iterable of batches.  Flags and the keys of a --config file are the keyword arguments of the Python call; a flag wins
over the file.  torch is imported inside the verbs only, so that --help stays quick.  Tables go to standard output,
progress and errors to standard error.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastfisher import environment
from fastfisher.errors import FastFisherError, FisherError

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit(f"the command line needs {error.name}: pip install 'fastfisher[cli]'") from None

if TYPE_CHECKING:
    from torch import nn

    from fastfisher.report import Report

OK, UNEXPECTED, BAD_INPUT, NUMERICAL, NO_MEMORY, PROBLEM = range(6)

EXIT_CODES = (
    f"Exit codes: {OK} done; {UNEXPECTED} unexpected error (with its traceback); {BAD_INPUT} bad input; "
    f"{NUMERICAL} the arithmetic broke down; {NO_MEMORY} does not fit in memory; {PROBLEM} doctor found a problem."
)
# What only the command line has, beside the keyword arguments of the Python call.
OWN_KEYS = ("model", "data", "weights", "out")
# Keys that name a function to be handed over as it is, rather than called for its result.
FUNCTIONS = ("loss_fn", "eval_fn")
NUMBERS = ("sparsity", "damping")
# Keys of whole numbers, with the word that stands for None.
WORDS = {"block_size": "all", "num_recomputations": "auto"}
# Arguments of the Python calls that no file or flag gives; --out names the folder.
NOT_KEYS = {"progress", "options", "folder"}

app = typer.Typer(
    help="Prune PyTorch networks by second-order information.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: the frames would cost a third of a second
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str | None, typer.Argument(help="package.module:function that returns the nn.Module.")]
Data = Annotated[
    str | None, typer.Argument(help="package.module:function that returns an iterable of batches.")
]
Config = Annotated[Path | None, typer.Option(help="YAML file with the keys of the Python call.")]
Sparsity = Annotated[float | None, typer.Option(help="Fraction of the weights to set to zero, such as 0.9.")]
Method = Annotated[
    str | None,
    typer.Option(help="woodfisher, woodtaylor, fishleg, diagonal, obd, kfac, hessian, magnitude or random."),
]
Scope = Annotated[str | None, typer.Option(help="global or layer.")]
BlockSize = Annotated[str | None, typer.Option(help="Weights in a Fisher block, or 'all' for one block.")]
NumGrads = Annotated[int | None, typer.Option(help="Gradients in the Fisher estimate.")]
Damping = Annotated[float | None, typer.Option(help="Added to the diagonal of the Fisher.")]
DampingMode = Annotated[str | None, typer.Option(help="absolute, or relative to the mean diagonal.")]
Update = Annotated[str | None, typer.Option(help="Of the kept weights: auto, joint, greedy, sum or none.")]
Recomputations = Annotated[
    str | None,
    typer.Option("--num-recomputations", help="How often the Fisher is estimated anew on the way; or auto."),
]
Others = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any other keyword of the Python call, such as pattern=2:4 or fisher_type=mc; may be repeated.",
    ),
]
EvalFn = Annotated[
    str | None, typer.Option(help="package.module:function(model) -> score or dict of scores.")
]
Weights = Annotated[Path | None, typer.Option(help="safetensors file to load into the model first.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the report, its plot, and model.safetensors.")]


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn errors of bad input, arithmetic and memory into one line and an exit code; others keep their traceback."""
    try:
        yield
    except FisherError as error:
        leave(error, NUMERICAL)
    except MemoryError as error:
        leave(error, NO_MEMORY)
    except FastFisherError as error:
        leave(error, BAD_INPUT)
    except RuntimeError as error:
        # torch's error of a full GPU, by name: torch may not have been imported
        if type(error).__name__ != "OutOfMemoryError":
            raise
        leave(error, NO_MEMORY)


def leave(error: BaseException, code: int) -> None:
    typer.echo(f"fastfisher: {error or type(error).__name__}", err=True)
    raise typer.Exit(code) from error


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error message that lists the names most like `name`; empty where none is."""
    close = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.3)
    return f" Closest: {', '.join(map(repr, close))}." if close else ""


def load(spec: object, key: str) -> Callable[..., Any]:
    """The function that `package.module:function` names.  Raises FastFisherError where it cannot be had."""
    module_name, colon, name = str(spec).partition(":")
    if not (module_name and colon and name):
        raise FastFisherError(f"{key} must be package.module:function, got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise FastFisherError(f"{key}={spec!r}: {module_name} cannot be imported: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        public = [other for other, value in vars(module).items() if callable(value)]
        raise FastFisherError(
            f"{key}={spec!r}: {module_name} has no function {name!r}.{nearest(name, public)}"
        )
    return function  # type: ignore[no-any-return]


def read_config(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.  Raises FastFisherError unless it is one mapping."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise FastFisherError("--config needs pyyaml: pip install 'fastfisher[cli]'") from None
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FastFisherError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise FastFisherError(f"--config {path} must hold keys and values, got {type(content).__name__}")
    # YAML reads 1e-5 as a text because it lacks a dot.
    return {key: number(value) if key in NUMBERS else value for key, value in content.items()}


def _loader() -> type:
    """YAML's safe loader, for which 2:4 is a text and not two minutes and four seconds."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.yaml_implicit_resolvers = {
        first: [(tag, regex) for tag, regex in resolvers if not regex.match("2:04")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
    return Loader


def number(value: object) -> object:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def pairs(texts: Iterable[str]) -> dict[str, Any]:
    """The keys and values of --set flags; numbers, true, false and null as in JSON, all else is text."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise FastFisherError(f"--set takes KEY=VALUE, got {text!r}")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def gather(call: Callable[..., Any], config: Path | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a verb: file, then --set, then other flags.  One file serves every verb: keys of prune that
    `call` lacks are left.

    Raises FastFisherError on a key that no verb has, with the nearest names.
    """
    import fastfisher as ff

    given = read_config(config) if config else {}
    given |= pairs(flags.get("others") or ())
    prune_keys, tune_keys = ({*inspect.signature(verb).parameters} for verb in (ff.prune, ff.tune))
    own = {*inspect.signature(call).parameters}
    if call is ff.tune:
        own |= prune_keys - {"damping", "damping_mode", "eval_fn", "memory_limit"}
    known = ({*prune_keys, *tune_keys, *OWN_KEYS}) - NOT_KEYS
    accepted = ({*own, *OWN_KEYS}) - NOT_KEYS
    for key in given:
        if key not in known:
            where = f"in {config}" if config else "in --set"
            raise FastFisherError(f"unknown key {key!r} {where}.{nearest(str(key), known)}")
    given = {key: value for key, value in given.items() if key in accepted}
    given |= {key: value for key, value in flags.items() if value is not None and key in accepted}
    for key, word in (*WORDS.items(), ("update", "none")):
        if given.get(key) == word:
            given[key] = None
    for key, word in WORDS.items():
        value = given.get(key)
        if isinstance(value, str):
            if not value.isdecimal():
                raise FastFisherError(f"{key} must be a whole number or {word!r}, got {value!r}")
            given[key] = int(value)
    for key in FUNCTIONS:
        if given.get(key) is not None:
            given[key] = load(given[key], key)
    wanted = (
        ["model"] if given.get("pattern") else ["model", "sparsity"]
    )  # a pattern may bring its own sparsity
    missing = [key for key in wanted if key in accepted and given.get(key) is None]
    if missing:
        raise FastFisherError(f"{missing[0]} is missing: give it on the command line or in the --config file")
    return given


def build_model(given: dict[str, Any]) -> nn.Module:
    """Call the model's function and load its weights; takes both keys out of `given`."""
    from torch import nn

    spec, weights = given.pop("model"), given.pop("weights", None)
    model = load(spec, "model")()
    if not isinstance(model, nn.Module):
        raise FastFisherError(f"model={spec!r} must return an nn.Module, got {type(model).__name__}")
    if weights is not None:
        from fastfisher import io

        try:
            # any safetensors file will do, such as a dense model; what prune saved must be as it was saved
            io.load(weights, model, verify=io.KIND in io.read_metadata(weights))
        except FastFisherError as error:
            raise FastFisherError(f"--weights {weights} does not load: {error}") from error
    return model


def build_data(given: dict[str, Any]) -> Iterable[Any] | None:
    spec = given.pop("data", None)
    return None if spec is None else load(spec, "data")()


def table(title: str, *columns: str, rows: Iterable[Iterable[object]], left: int = 1) -> None:
    """Print a table to standard output; the first `left` columns are flush left, the others flush right."""
    from rich.console import Console
    from rich.table import Table

    out = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        out.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        out.add_row(*map(str, row))
    Console().print(out)


def scores(result: Any) -> dict[str, float]:
    if result is None:
        return {}
    return dict(result) if isinstance(result, Mapping) else {"score": float(result)}


def show(report: Report) -> None:
    """Print a report as tables: the layers, the scores beside dense and magnitude, and what the run cost."""
    rows = [
        (
            layer.name,
            "x".join(map(str, layer.shape)),
            f"{layer.weights:,}",
            f"{layer.zeros:,}",
            f"{layer.sparsity:.2%}",
        )
        for layer in report.layers
    ]
    total = f"{report.num_zeros / report.num_weights:.2%}"
    rows.append(("all", "", f"{report.num_weights:,}", f"{report.num_zeros:,}", total))
    table(
        f"{report.method}, {report.scope} scope", "layer", "shape", "weights", "zeros", "sparsity", rows=rows
    )
    results = [scores(result) for result in (report.dense, report.control, report.pruned)]
    if any(results):
        keys = dict.fromkeys(key for result in results for key in result)
        lines = [
            (key, *(f"{result[key]:.4f}" if key in result else "-" for result in results)) for key in keys
        ]
        table("scores", "", "dense", "magnitude", "pruned", rows=lines)
    if report.measured_change is not None:
        predicted = "" if report.predicted_change is None else f", {report.predicted_change:+.4g} predicted"
        print(f"loss change on the gradients' samples: {report.measured_change:+.4g} measured{predicted}")
    spent = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in report.seconds.items())
    print(f"compression ratio {report.compression_ratio:.2f}; {spent}; seed {report.seed}")
    for note in report.notes:
        print(f"note: {note}")


@app.command(epilog=EXIT_CODES)
def prune(
    model: Model = None,
    data: Data = None,
    config: Config = None,
    sparsity: Sparsity = None,
    method: Method = None,
    scope: Scope = None,
    block_size: BlockSize = None,
    num_grads: NumGrads = None,
    damping: Damping = None,
    damping_mode: DampingMode = None,
    update: Update = None,
    num_recomputations: Recomputations = None,
    eval_fn: EvalFn = None,
    weights: Weights = None,
    out: Out = None,
    others: Others = None,
) -> None:
    """Prune a network in one shot, print the report, and save both with --out."""
    flags = locals().copy()
    with exit_codes():
        import fastfisher as ff

        given = gather(ff.prune, flags.pop("config"), flags)
        folder = given.pop("out", None)
        network, batches = build_model(given), build_data(given)
        report = ff.prune(network, batches, **given)
        show(report)
        if folder is not None:
            report.save(folder)
            ff.save(network, Path(folder) / "model.safetensors", report=report)
            print(f"saved the report and model.safetensors in {folder}")


def several(text: str, convert: Callable[[str], Any]) -> Any:
    """The values of a flag such as 0.01,0.1; 'none' for none at all."""
    if text == "none":
        return ()
    try:
        return [convert(word.strip()) for word in text.split(",")]
    except ValueError as error:
        raise FastFisherError(f"{text!r} is no list of numbers such as 1,2,3") from error


@app.command(epilog=EXIT_CODES)
def tune(
    model: Model = None,
    data: Data = None,
    config: Config = None,
    sparsity: Sparsity = None,
    method: Method = None,
    update: Update = None,
    relative_damping: Annotated[
        str | None, typer.Option(help="Dampings relative to the mean diagonal, such as 0.01,0.1; or none.")
    ] = None,
    absolute_damping: Annotated[str | None, typer.Option(help="Absolute dampings; or none.")] = None,
    num_grads: Annotated[str | None, typer.Option(help="Numbers of gradients, such as 256,1024.")] = None,
    block_size: Annotated[
        str | None, typer.Option(help="Sizes of Fisher blocks, such as 64,128,all.")
    ] = None,
    num_recomputations: Annotated[
        str | None, typer.Option(help="Numbers of recomputations, such as 0,15.")
    ] = None,
    held_out: Annotated[
        float | None, typer.Option(help="Share of the samples that judge, not used else.")
    ] = None,
    weights: Weights = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the trials; a second run goes on there.")
    ] = None,
    others: Others = None,
) -> None:
    """Prune with many settings and tell which lose least on samples held out."""
    flags = locals().copy()
    with exit_codes():
        import fastfisher as ff

        texts = {name: flags.pop(name) for name in ("relative_damping", "absolute_damping")}
        sizes = {name: flags.pop(name) for name in ("num_grads", "block_size", "num_recomputations")}
        given = gather(ff.tune, flags.pop("config"), flags)
        for name, text in texts.items():
            if text is not None:
                given[name] = several(text, float) or None
        for name, text in sizes.items():
            if text is not None:
                given[name] = several(text, lambda word: None if word in WORDS.values() else int(word))
        folder = given.pop("out", None)
        network, batches = build_model(given), build_data(given)
        if batches is None:
            raise FastFisherError("data is missing: give it on the command line or in the --config file")
        found = ff.tune(network, batches, folder=folder, **given)
        print(found)
        if folder is not None:
            found.save(folder)
            print(f"saved tune.json, tune.csv and tune.png in {folder}")
        flags_of = " ".join(
            f"--{name.replace('_', '-')} {WORDS[name] if value is None else value}"
            for name, value in found.best.items()
        )
        print(f"best: fastfisher prune {flags_of}")


@app.command(epilog=EXIT_CODES)
def plan(
    model: Model = None,
    data: Data = None,
    config: Config = None,
    sparsity: Sparsity = None,
    method: Method = None,
    block_size: BlockSize = None,
    num_grads: NumGrads = None,
    num_recomputations: Recomputations = None,
    others: Others = None,
) -> None:
    """Tell the bytes and seconds of each phase before anything runs."""
    flags = locals().copy()
    with exit_codes():
        import fastfisher as ff

        given = gather(ff.plan, flags.pop("config"), flags)
        given.pop("out", None)
        network, batches = build_model(given), build_data(given)
        found = ff.plan(network, batches, **given)
        print(found)
        if not found.fits:
            raise typer.Exit(NO_MEMORY)


def evaluate(
    model: nn.Module, data: Iterable[Any] | None, *, loss_fn: Any = None, eval_fn: Any = None, seed: int = 0
) -> dict[str, Any]:
    """The zeros of a model, its mean loss over all samples of `data`, its accuracy there, and what eval_fn returns.

    Accuracy is told where batches are (inputs, integer labels [n]) and outputs are [n, classes].
    """
    import torch

    from fastfisher.fisher.batches import SampleReader
    from fastfisher.fisher.objective import Objective, parameter_aliases, untouched

    parameters = {name: model.get_parameter(name) for name in parameter_aliases(model)}
    if not parameters:
        raise FastFisherError("the model has no parameters")
    size = sum(value.numel() for value in parameters.values())
    nonzero = sum(int(torch.count_nonzero(value.detach())) for value in parameters.values())
    result: dict[str, Any] = {"parameters": size, "zeros": size - nonzero}
    with untouched(model, seed), torch.no_grad():
        if data is not None:
            # above 1, so that the loss is taken over a whole batch at once
            objective = Objective(model, list(parameters), loss_fn=loss_fn, grad_batch_size=2)
            reader = SampleReader(data, objective.device)
            loss, correct, judged = 0.0, 0, 0
            for samples in reader.groups(256):
                loss += float(objective.losses(objective.weights, samples)) * len(samples)
                batch = samples.batch()
                label = batch[-1] if isinstance(batch, tuple) and batch[-1].dim() == 1 else None
                if label is not None and not (label.is_floating_point() or label.dtype == torch.bool):
                    output = model(*batch[:-1])
                    if isinstance(output, torch.Tensor) and output.dim() == 2:
                        correct += int((output.argmax(1) == label).sum())
                        judged += len(samples)
            if not reader.seen:
                raise FastFisherError("the data holds no samples")
            result |= {"samples": reader.seen, "loss": loss / reader.seen}
            if judged:
                result["accuracy"] = correct / judged
        if eval_fn is not None:
            result |= scores(eval_fn(model))
    return result


@app.command("eval", epilog=EXIT_CODES)
def evaluate_verb(
    model: Model = None,
    data: Data = None,
    config: Config = None,
    eval_fn: EvalFn = None,
    weights: Weights = None,
) -> None:
    """Tell the zeros, loss and accuracy of a network, such as one that prune saved."""
    flags = locals().copy()
    with exit_codes():
        given = gather(evaluate, flags.pop("config"), flags)
        given.pop("out", None)
        network, batches = build_model(given), build_data(given)
        result = evaluate(network, batches, **given)
        rows = (
            (key, f"{value:,}" if isinstance(value, int) else f"{value:.4f}") for key, value in result.items()
        )
        table("evaluation", "", "value", rows=rows)


@app.command(epilog=EXIT_CODES)
def export(
    model: Model = None,
    config: Config = None,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="File to write, such as packed.safetensors.")] = None,
) -> None:
    """Write the weights of a pruned network packed: the values that are not zero, and a bitmask of where they are.

    ff.load_packed reads it.
    """
    with exit_codes():
        import fastfisher as ff

        # out in a --config file is the folder of prune
        given = gather(ff.export_packed, config, {"model": model, "weights": weights})
        if out is None:
            raise FastFisherError("out is missing: name the file to write, such as --out packed.safetensors")
        if out.is_dir():
            raise FastFisherError(
                f"--out {out} is a folder; name a file, such as {out / 'packed.safetensors'}"
            )
        network = build_model(given)
        try:
            size = ff.export_packed(network, out)
        except OSError as error:
            raise FastFisherError(f"--out {out} cannot be written: {error.strerror}") from error
        print(size)
        print(f"saved {out}")


@app.command(epilog=EXIT_CODES)
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders that prune --out or Report.save wrote, or logs of ff.Pruner (.jsonl)."),
    ],
    html: Annotated[Path | None, typer.Option(help="File for one page that shows all of them.")] = None,
) -> None:
    """Print what runs did, or draw them side by side on a page."""
    with exit_codes():
        from fastfisher.report_html import find_runs, write_page

        if html is not None:
            found = write_page(runs, html)
            print(f"saved a page of {len(found)} run{'s' if len(found) > 1 else ''} in {html}")
            return
        for run in find_runs(runs):
            if run.unit == "recomputation":
                show(run.last)
                continue
            before, after = dict(run.before), dict(run.after)
            rows = [
                (
                    f"{when:g}",
                    f"{one.num_zeros / one.num_weights:.2%}",
                    *(f"{loss[when]:.4g}" if when in loss else "-" for loss in (before, after)),
                    f"{sum(one.seconds.values()):.2f}",
                )
                for when, one in zip(run.times, run.reports, strict=True)
            ]
            columns = (run.unit, "sparsity", "loss before", "loss after", "seconds")
            table(f"{run.name}: {run.last.method}, {run.last.scope} scope", *columns, rows=rows)


@app.command(epilog=EXIT_CODES)
def doctor() -> None:
    """Tell what is installed, which kernels run, and what is missing."""
    from fastfisher.doctor import examine

    with exit_codes():
        findings = examine()
    marks = {"ok": "ok", "note": "note", "problem": "PROBLEM"}
    rows = ((finding.subject, marks[finding.state], finding.sentence) for finding in findings)
    table("fastfisher", "", "state", "", rows=rows, left=3)
    print("environment variables:")
    for variable in environment.VARIABLES:
        print(f"  {variable.name}: {variable.sentence}")
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(PROBLEM)


def duration(seconds: float) -> str:
    """Three digits in the unit that suits."""
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= s), ("us", 1e-6))
    return f"{seconds / scale:.3g} {unit}"


@app.command(epilog=EXIT_CODES)
def bench(
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:1; without it a GPU, where there is one.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long the timing takes, about.")] = 20.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the figures, as JSON.")] = None,
) -> None:
    """Time a few calls on this machine beside plain PyTorch, and compare both with float64.

    Inverses from gradients in three sizes of block, an update and a selection.  "ratio" is plain PyTorch's time over
    fastfisher's; there is none where a result is wrong.
    """
    with exit_codes():
        from fastfisher.bench import run

        result = run(device, seconds)
        rows = [
            (
                row.what,
                duration(row.seconds),
                duration(row.plain_seconds),
                "-" if row.ratio is None else f"{row.ratio:.3g}x",
                f"{row.error:.0e}",
                row.verdict,
            )
            for row in result.rows
        ]
        columns = ("fastfisher", "plain PyTorch", "ratio", "worst error", "verdict")
        table(f"{result.weights:,} weights, {result.device}, torch {result.torch}", "", *columns, rows=rows)
        if json_file is not None:
            try:
                json_file.write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                raise FastFisherError(f"--json {json_file} cannot be written: {error.strerror}") from error
            print(f"saved the figures in {json_file}")
        if any(row.verdict == "WRONG" for row in result.rows):
            raise typer.Exit(NUMERICAL)


def help_text(arguments: list[str]) -> str | None:
    """What `--help` prints; None where the arguments do not ask for it.

    typer alone would parse the arguments first and import pydantic for that, in a third of a second.
    """
    if not {"-h", "--help"} & set(arguments):
        return None
    command = typer.main.get_command(app)
    context = command.context_class(command, info_name="fastfisher", **command.context_settings)
    if arguments[0].startswith("-"):
        return command.get_help(context)
    verb = getattr(command, "commands", {}).get(arguments[0])
    if verb is None:
        return None
    return verb.get_help(verb.context_class(verb, info_name=arguments[0], parent=context))


def main() -> None:
    """The console script `fastfisher`."""
    text = help_text(sys.argv[1:])
    if text is None:
        app()
    else:
        typer.echo(text)


if __name__ == "__main__":
    main()
