import pytest
import torch
from dq_torchao.kernels import floating


def test_the_switch_is_put_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with floating.onednn_float32():
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with pytest.raises(RuntimeError), floating.onednn_float32():
        torch.ones(2) @ torch.ones(3)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_products_of_bfloat16_are_refused(monkeypatch) -> None:
    def rounded(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().float() @ w.bfloat16().float().T

    monkeypatch.setattr(torch.nn.functional, "linear", rounded)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    floating.why_not_exact.cache_clear()
    assert "relative error of" in floating.why_not_exact()
    monkeypatch.undo()
    floating.why_not_exact.cache_clear()


def test_a_matrix_unit_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    floating.why_not_exact.cache_clear()
    assert "AMX" in floating.why_not_exact()
    floating.why_not_exact.cache_clear()
