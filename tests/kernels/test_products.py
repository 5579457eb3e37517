"""The products by whichever library, against fp64; on processors where there is no choice, PyTorch's own."""

from __future__ import annotations

import pytest
import torch

from nolora_vision.kernels import products


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7, 197])
def test_products(rows: int, dtype: torch.dtype, onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: onednn)
    torch.manual_seed(0)
    weight = torch.randn(9, 12).to(dtype)
    z, dy = torch.randn(rows, 3).to(dtype), torch.randn(rows, 9).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-1}[
        dtype
    ]  # bf16: half a bit of sums < 50

    def check(found: torch.Tensor, exact: torch.Tensor) -> None:
        assert found.dtype == dtype and found.shape == exact.shape and found.is_contiguous()
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance)

    check(products.input_gradient(dy, weight), dy.double() @ weight.double())
    check(products.thin_transposed(z, dy), z.double().t() @ dy.double())
    check(products.up_gradient(z, dy).t(), z.double().t() @ dy.double())


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's, of its own switch
def test_a_switched_off_onednn_is_not_used() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert not products._onednn_is_faster()
