"""Which backend runs, what is said when one cannot, and that all of them agree."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch.nn import functional as F

import nolora_vision
from nolora_vision.kernels import (
    BACKENDS,
    Frozen,
    LowRank,
    TritonUnavailable,
    backends,
    eager,
    low_rank_delta,
    select_backend,
)
from nolora_vision.kernels.eager import operands_of, with_operands
from tests.operands import make_branch

GPU = torch.device("cuda", 0)


def operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Frozen, nolora_vision.kernels.LowRank]:
    torch.manual_seed(0)
    made = make_branch("swish", "gate", d=5, e=6, r=3)
    branch = with_operands(made, iter(t.detach().to(dtype).requires_grad_() for t in operands_of(made)))
    return torch.randn(4, 7, 5, dtype=dtype), Frozen(torch.randn(6, 5, dtype=dtype), None), branch


@pytest.mark.parametrize("backend", ["eager", "autograd", "custom_op"])
def test_a_base_that_is_not_frozen_gets_its_gradients(backend: str) -> None:
    """Biases trained beside adapters, or everything after a warm-up of the adapters."""
    x, base, branch = operands(torch.float64)
    weight, bias = base.weight.requires_grad_(), torch.randn(6, dtype=torch.float64).requires_grad_()
    wanted = torch.autograd.grad((F.linear(x, weight, bias) + update_of(x, branch)).square().sum(), [weight, bias])
    for layer in (Frozen(weight, bias), Frozen(weight * 1, bias * 1)):  # parameters, and what was computed of some
        y = low_rank_delta(x, layer, [branch], backend=backend)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), [weight, bias]), wanted)
        if backend != "custom_op":
            assert torch.equal(y, eager.low_rank_delta(x, layer, [branch]))
    y = low_rank_delta(x, Frozen(weight.detach(), bias), [branch], backend=backend)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), bias), wanted[1:])


def update_of(x: torch.Tensor, branch: LowRank) -> torch.Tensor:
    return eager.low_rank_delta(x, x.new_zeros(*x.shape[:-1], 6), [branch])


def test_the_node_is_chosen() -> None:
    assert select_backend("auto")[0] == select_backend("auto", torch.device("cpu"))[0] == "autograd"


def on_a_gpu_where_triton_is_faster(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(backends, "TRITON_IS_FASTER", {"Some GPU": "triton_rank"})
    monkeypatch.setattr(backends, "_triton_stages", lambda: (None, reason))
    backends._warn_once.cache_clear()


def test_triton_is_chosen_where_it_measured_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu_where_triton_is_faster(monkeypatch, "")
    assert select_backend("auto", GPU)[0] == "triton_rank"
    assert select_backend("auto", torch.device("cpu"))[0] == "autograd"
    monkeypatch.setattr(backends, "TRITON_IS_FASTER", {"Another GPU": "triton"})
    assert select_backend("auto", GPU)[0] == "autograd"


def test_a_missing_triton_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu_where_triton_is_faster(monkeypatch, "importing triton failed")
    with pytest.warns(UserWarning, match="without Triton, though it is faster on this GPU: importing triton failed"):
        assert select_backend("auto", GPU)[0] == "autograd"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_backend("auto", GPU)[0] == "autograd"


def test_what_triton_does_not_support_runs_otherwise_and_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, layer, branch = operands()
    expected = low_rank_delta(x, layer, [branch], backend="eager")
    monkeypatch.setattr(backends, "select_backend", lambda backend, device: ("triton", ""))
    monkeypatch.setattr(backends, "_why_not_triton", lambda x, base, branches: "no formula")
    backends._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="Some adapters run without Triton: no formula"):
        y = low_rank_delta(x, layer, [branch])
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("backend", ["triton", "triton_rank"])
def test_triton_by_name_raises_where_it_cannot_run(backend: str) -> None:
    x, layer, branch = operands()
    with pytest.raises(TritonUnavailable, match=rf'backend="{backend}" cannot run: .+\. Use backend="auto"'):
        low_rank_delta(x, layer, [branch], backend=backend)


def test_an_import_that_fails_is_told() -> None:
    """In a process of its own: modules that are imported stay imported."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\nfrom nolora_vision.kernels import Frozen, LowRank, low_rank_delta\n"
        "branch = LowRank(torch.zeros(2, 3), torch.zeros(4, 2))\n"
        "layer = Frozen(torch.zeros(4, 3), None)\n"
        "assert low_rank_delta(torch.zeros(1, 3), layer, [branch]).shape == (1, 4)\n"
        "low_rank_delta(torch.zeros(1, 3), layer, [branch], backend='triton')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "TritonUnavailable" in ran.stderr and "pip install 'nolora-vision[triton]'" in ran.stderr


def test_an_unknown_backend() -> None:
    known = ", ".join(("auto", *BACKENDS))
    with pytest.raises(ValueError, match=rf"backend must be one of {known}, got 'autograt'\. Did you mean 'autograd'"):
        select_backend("autograt")
