"""Which backend runs, how one is forced, and that nothing falls back silently."""

from __future__ import annotations

import threading

import pytest
import torch

from fastfisher import environment, ops
from fastfisher.errors import BackendError, FastFisherError
from fastfisher.ops import _registry

WEIGHT = torch.tensor([1.0, 2.0])


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(environment.BACKEND.name, raising=False)


def saliency() -> torch.Tensor:
    """One call of the smallest op."""
    out = torch.empty(2)
    ops.obs_saliency(WEIGHT, torch.ones(2), out=out)
    return out


def explained() -> str:
    """What is said about such a call."""
    return ops.explain("obs_saliency", WEIGHT, torch.ones(2), torch.empty(2))


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two recording backends in place of the real ones; native refuses the weight 13."""
    ran: list[str] = []
    implementations = {
        "native": (
            lambda *args: ran.append("native"),
            lambda weight, inv_diag, out: "13 brings bad luck" if 13 in weight else None,
        ),
        "reference": (lambda *args: ran.append("reference"), None),
    }
    monkeypatch.setattr(ops.OPS["obs_saliency"], "implementations", implementations)
    return ran


def test_every_op_has_a_reference_and_a_place_for_native() -> None:
    for op in ops.OPS.values():
        assert {"native", "reference"} <= set(op.implementations)
        assert op.written


def test_first_backend_without_a_reason_runs(backends: list[str]) -> None:
    saliency()
    ops.obs_saliency(torch.tensor([13.0, 1.0]), torch.ones(2), out=torch.empty(2))
    assert backends == ["native", "reference"]


def test_use_backend_forces_and_ends(backends: list[str]) -> None:
    with ops.use_backend("reference"):
        saliency()
        with ops.use_backend("native"):
            saliency()
        saliency()
    saliency()
    assert backends == ["reference", "native", "reference", "native"]


def test_use_backend_ends_after_an_exception(backends: list[str]) -> None:
    with pytest.raises(KeyError), ops.use_backend("reference"):
        raise KeyError
    saliency()
    assert backends == ["native"]


def test_environment_forces_and_use_backend_goes_before_it(
    backends: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.BACKEND.name, "reference")
    saliency()
    with ops.use_backend("native"):
        saliency()
    assert backends == ["reference", "native"]


def test_forced_backend_that_cannot_run_raises_with_its_reason(backends: list[str]) -> None:
    with (
        ops.use_backend("native"),
        pytest.raises(BackendError, match="'native' cannot run obs_saliency: 13 brings"),
    ):
        ops.obs_saliency(torch.tensor([13.0, 1.0]), torch.ones(2), out=torch.empty(2))
    with (
        ops.use_backend("triton"),
        pytest.raises(BackendError, match="'triton' cannot run obs_saliency: it has no"),
    ):
        saliency()
    assert backends == []


def test_no_backend_left_raises_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ops.OPS["obs_saliency"], "implementations", {"native": (print, lambda *args: "it is asleep")}
    )
    with pytest.raises(
        BackendError, match=r"(?s)no backend can run.*native: .*asleep.*reference: .*no implementation"
    ):
        saliency()


def test_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FastFisherError, match="backend must be one of native, triton, reference, got 'cuda'"):
        ops.use_backend("cuda").__enter__()
    monkeypatch.setenv(environment.BACKEND.name, "nativ")
    with pytest.raises(FastFisherError, match=r"FASTFISHER_BACKEND must be one of .*, got 'nativ'"):
        saliency()


def test_forced_backend_is_a_matter_of_the_thread(backends: list[str]) -> None:
    with ops.use_backend("reference"):
        thread = threading.Thread(target=saliency)
        thread.start()
        thread.join()
    assert backends == ["native"]


def test_explain_tells_who_runs_and_why_the_others_do_not(backends: list[str]) -> None:
    assert explained() == (
        "obs_saliency on cpu: native\n  native: runs\n  reference: could run, but 'native' comes first"
    )
    with ops.use_backend("reference"):
        assert explained() == (
            "obs_saliency on cpu: reference\n  native: could run, but 'reference' is forced\n  reference: runs"
        )
    with ops.use_backend("triton"):
        assert explained().startswith("obs_saliency on cpu: no backend\n")
        assert "triton: is forced, but has no place on cpu" in explained()
    text = ops.explain("obs_saliency", torch.tensor([13.0, 1.0]), torch.ones(2), torch.empty(2))
    assert (
        text == "obs_saliency on cpu: reference\n  native: cannot run: 13 brings bad luck\n  reference: runs"
    )
    assert backends == []


def test_explain_of_an_unknown_op_names_the_ops() -> None:
    with pytest.raises(FastFisherError, match=r"there is no op .saliency.; the ops are .*woodbury_"):
        ops.explain("saliency", WEIGHT)


def test_implement_refuses_what_it_does_not_know_or_has() -> None:
    with pytest.raises(ValueError, match="there is no op 'nothing'"):
        ops.implement("nothing", "native")
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'metal'"):
        ops.implement("obs_saliency", "metal")
    with pytest.raises(ValueError, match="obs_saliency already has a backend 'reference'"):
        ops.implement("obs_saliency", "reference")


def test_an_unknown_device_is_left_to_the_reference() -> None:
    assert _registry._order((torch.empty(1, device="meta"),)) == ("reference",)


def test_reference_restores_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ops.use_backend("reference"):
            saliency()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
