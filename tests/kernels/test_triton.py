"""The Triton stages: checked by the interpreter and, where there is one, on a GPU; compiled for an H100 without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nolora_vision.kernels import LowRank, triton_stack
from nolora_vision.kernels.eager import operands_of, with_operands
from tests.operands import make_branch
from tests.soak import SOAK, times

ROOT = Path(__file__).parents[2]

pytest.importorskip("triton")


def run_checks(file: str, *args: str, interpret: bool) -> str:
    """The end of what pytest says of this file, in a process of its own: the interpreter is chosen at import.

    Raises:
        AssertionError: with all that it says, if a check fails.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if interpret else {}
    command = [sys.executable, "-m", "pytest", f"tests/kernels/{file}", "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run([*command, *args], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(("part", "passed"), [("float32", times(45, 23)), ("not float32", times(78, 55))])
def test_by_the_interpreter(part: str, passed: int) -> None:
    """In two parts, so that they may run at the same time; the counts say that neither is empty."""
    assert f"{passed} passed" in run_checks("triton_checks.py", "-k", part, interpret=True)


def test_the_rank_space_by_the_interpreter() -> None:
    assert f"{times(116, 71)} passed" in run_checks("triton_rank_checks.py", interpret=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("file", ["triton_checks.py", "triton_rank_checks.py"])
def test_on_a_gpu(file: str) -> None:
    run_checks(file, interpret=False)


@pytest.mark.parametrize(("switch", "value"), [("fp32_precision", "tf32"), ("allow_tf32", True)])
def test_tf32_by_either_switch_of_pytorch(switch: str, value: object) -> None:
    """Once the newer one is set, PyTorch refuses to read the older."""
    from nolora_vision.kernels.triton_stages import types_of

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        assert types_of(torch.float32)["PRECISION"] == "ieee"
        setattr(matmul, switch, value)
        assert types_of(torch.float32)["PRECISION"] == "tf32" and types_of(torch.bfloat16)["PRECISION"] == "ieee"
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = before


def in_fp32(branch: LowRank) -> LowRank:
    return with_operands(branch, iter([t.float() for t in operands_of(branch)]))


def test_what_is_not_supported_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x, f32 = torch.zeros(2, 5), torch.float32
    branch = in_fp32(make_branch("tanh", "vector", r=3))
    other = in_fp32(make_branch("relu", "gate", r=4))._replace(scale=2.0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_stack.supports([branch], x, f32) == "x is on the device cpu, not on a GPU"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_stack.supports([branch], x, f32) is None
    assert triton_stack.supports([branch, branch], x, torch.bfloat16) is None
    mixed = triton_stack.supports([branch, other], x, f32)
    assert mixed == "the branches of one layer differ in nonlinearity and rank and scale and modulation"
    per_sample = branch._replace(v=torch.ones(2, 1, 3))
    assert triton_stack.supports([branch, per_sample], x, f32) == "the branches of one layer differ in modulation"
    assert triton_stack.supports([branch], x.double(), f32) == (
        "x of torch.float64 and an output of torch.float32; it takes float32, bfloat16 and float16"
    )
    wide = in_fp32(make_branch("tanh", "none", r=33))
    assert triton_stack.supports([wide], x, f32) is None
    assert triton_stack.supports([wide] * 2, x, f32) == "rank 66 of all branches together is above 64"
    unknown = triton_stack.supports([branch._replace(nonlinearity="sine")], x, f32)
    assert unknown == "no formula for the nonlinearity 'sine'"
    message = "Triton can't compute this update: rank 66 .* Use the backend 'autograd' or 'eager'"
    with pytest.raises(triton_stack.Unsupported, match=message):
        triton_stack.stacked([wide] * 2, x, f32)


@pytest.mark.parametrize(
    ("hip", "capability", "reason"),
    [
        ("6.4", (9, 4), "the GPU is AMD's, for which Triton has no sums of three tf32 products"),
        (None, (7, 5), "the GPU's compute capability is below 8.0"),
        (None, (9, 0), None),
    ],
)
def test_gpus_that_are_not_fit(
    hip: str | None, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    branch = in_fp32(make_branch("tanh", "vector", r=3))
    assert triton_stack.supports([branch], x, torch.bfloat16) == reason


def test_the_package_imports_no_triton_of_its_own() -> None:
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import nolora_vision; "
        "import nolora_vision.kernels.triton_stack; assert ('triton' in sys.modules) == before; "
        "assert 'nolora_vision.kernels.triton_stages' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


SHARED_BYTES = 227 * 1024 // 2
"""Two programs fit onto one processor of an H100."""


ONLY_IN_SOAK = pytest.mark.skipif(not SOAK, reason="in `make soak` only")


@pytest.mark.skipif(sys.platform != "linux", reason="triton's ptxas is for Linux")
@pytest.mark.parametrize(
    ("nonlinearity", "modulation", "ranks", "dtype", "samples"),
    [
        ("swish", "gate", (8, 8, 8), torch.bfloat16, None),
        ("rational", "gate", (64,), torch.bfloat16, 64),
        pytest.param("residual_tanh", "vector", (8,), torch.float16, None, marks=ONLY_IN_SOAK),
        ("aurora", "gate", (8, 8, 8), torch.float32, None),
        pytest.param("gelu", "none", (64,), torch.float32, None, marks=ONLY_IN_SOAK),
    ],
    ids=str,
)
def test_kernels_compile_for_an_h100_without_one(
    nonlinearity: str, modulation: str, ranks: tuple[int, ...], dtype: torch.dtype, samples: int | None
) -> None:
    """By triton and ptxas, with no register spilled. `python -m tests.kernels.triton_ahead` shows every combination."""
    from tests.kernels.triton_ahead import uses

    found = list(uses(nonlinearity, modulation, ranks, dtype, samples, halves=True))
    assert [use.kernel.removesuffix("_kernel") for use in found] == [
        *("features", "up", "rank", "input"),
        *("up", "rank", "input", "input"),
        *("space", "rank"),
    ]
    for use in found:
        assert use.spilled_bytes == 0 and use.registers <= 255 and use.shared_bytes <= SHARED_BYTES, use
