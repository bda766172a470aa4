"""What `fastfisher doctor` finds out about the kernels by running them."""

from __future__ import annotations

import pytest
import torch

from fastfisher import doctor, ops, selftest

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_every_op_is_tried_and_agrees(backend: str) -> None:
    checks = selftest.check(CPU, backend, seconds=300)
    if not checks:
        pytest.skip(f"{backend} is not available here")
    assert {check.op for check in checks} == set(ops.OPS)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    assert max(check.error for check in checks) < selftest.TOLERANCE / 50


@pytest.mark.parametrize("value", [2.0, float("nan")])
def test_a_wrong_kernel_is_a_problem(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setitem(
        ops.OPS["obs_saliency"].implementations, "native", (lambda w, d, out: out.fill_(value), None)
    )
    wrong = [found for found in doctor.examine() if found.subject == "self-test, cpu native"]
    assert [found.state for found in wrong] == ["problem"]
    assert "obs_saliency: relative error" in wrong[0].sentence


def test_a_kernel_that_raises_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no image for this device\nand more")

    monkeypatch.setitem(ops.OPS["spd_inverse_"].implementations, "native", (broken, None))
    (check,) = [check for check in selftest.check(CPU, "native", 60) if not check.passed]
    assert (check.op, check.reason) == ("spd_inverse_", "RuntimeError: no image for this device")


def test_time_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SELFTEST_SECONDS", -1.0)
    (found, *_) = [found for found in doctor.examine() if found.subject == "self-test, cpu native"]
    assert found.state == "note"
    assert "no time was left for inverse_from_grads" in found.sentence
