"""The definition of the adapter against independent references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nolora_vision.config import MODULATIONS, NONLINEARITIES
from nolora_vision.kernels import FORMULAS, low_rank_delta, select_backend
from tests.operands import make_branch


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_gradients_of_every_operand(nonlinearity: str, modulation: str) -> None:
    torch.manual_seed(0)
    branch = make_branch(nonlinearity, modulation)
    x = torch.randn(4, 2, 5, dtype=torch.float64, requires_grad=True)
    base = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)
    leaves = [
        t for part in branch for t in (part if isinstance(part, tuple) else (part,)) if isinstance(t, torch.Tensor)
    ]

    def run(x: torch.Tensor, base: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return low_rank_delta(x, base, [branch])

    assert torch.autograd.gradcheck(run, (x, base, *leaves))


@pytest.mark.parametrize("nonlinearity", [name for name in NONLINEARITIES if name != "aurora"])
@given(seed=st.integers(0, 2**32), size=st.floats(1e-6, 1e6), rank=st.integers(1, 16))
@settings(max_examples=50, deadline=None)
def test_f_is_zero_at_zero_for_every_theta(nonlinearity: str, seed: int, size: float, rank: int) -> None:
    """Otherwise B f(0) would be a hidden bias. AuroRA's splines are not 0 at 0: it is exempt, and tested below."""
    random = torch.Generator().manual_seed(seed)
    theta = [torch.randn(make(rank).shape, generator=random) * size for make in FORMULAS[nonlinearity].theta.values()]
    assert torch.equal(FORMULAS[nonlinearity].function(torch.zeros(2, rank), *theta), torch.zeros(2, rank))


def test_aurora_is_the_exemption_and_follows_the_paper() -> None:
    torch.manual_seed(0)
    h = torch.randn(7, 4, dtype=torch.float64)
    mixer, weights = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    knots = torch.arange(-3, 9, dtype=torch.float64) * 0.4 - 1
    x = h.unsqueeze(-1)
    basis = ((x >= knots[:-1]) & (x < knots[1:])).double()
    for k in range(1, 4):  # Cox-de Boor
        left = (x - knots[: -k - 1]) / (knots[k:-1] - knots[: -k - 1]) * basis[..., :-1]
        right = (knots[k + 1 :] - x) / (knots[k + 1 :] - knots[1:-k]) * basis[..., 1:]
        basis = left + right
    expected = torch.tanh(torch.tanh(h) @ mixer.T) + torch.einsum("nik,jk->nj", basis, weights)
    aurora = FORMULAS["aurora"].function
    torch.testing.assert_close(aurora(h, mixer, weights), expected)
    assert aurora(torch.zeros(1, 4, dtype=torch.float64), mixer, weights).abs().max() > 0


@pytest.mark.parametrize("shape", [(5,), (0, 5), (1, 5), (7, 197, 5), (2, 3, 4, 5)])
def test_equals_the_formula_for_any_shape(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    branch = make_branch("swish", "gate")
    x, base = torch.randn(*shape, dtype=torch.float64), torch.randn(*shape[:-1], 6, dtype=torch.float64)
    kept = base.clone()
    h = x @ branch.down.T
    assert branch.v is not None and branch.gate is not None
    v = branch.v * (1 + torch.tanh(h @ branch.gate[0].T + branch.gate[1]))
    z = 2 * h * torch.sigmoid(branch.theta[0] * h) * v
    torch.testing.assert_close(low_rank_delta(x, base, [branch]), base + 0.7 * z @ branch.up.T)
    assert torch.equal(base, kept)


def test_modulation_per_sample() -> None:
    torch.manual_seed(0)
    branch = make_branch("tanh", "vector")
    v = torch.randn(2, 1, 3, dtype=torch.float64)
    x, base = torch.randn(2, 7, 5, dtype=torch.float64), torch.zeros(2, 7, 6, dtype=torch.float64)
    both = low_rank_delta(x, base, [branch._replace(v=v)])
    for i in range(2):
        torch.testing.assert_close(both[i], low_rank_delta(x[i], base[i], [branch._replace(v=v[i, 0])]))
    with pytest.raises(ValueError, match=r"v must have shape \(R,\) or \(B, 1, R\)"):
        low_rank_delta(x, base, [branch._replace(v=v[:, 0])])


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match=r"got 'eagre'\. Did you mean 'eager'"):
        select_backend("eagre")
