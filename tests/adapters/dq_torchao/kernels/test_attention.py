from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest
import torch
from dq_torchao.kernels import native
from dq_torchao.kernels.attention import attention_kernel, cpu_kernel, int8_attention
from dq_torchao.kernels.codes import activation_codes
from torch import nn
from torch.nn import functional as F

from dq_plugins.affine import affine_parameters, fake_quantize, integer_range
from dq_plugins.quantized.attention import QuantizedAttention

SHAPES = {  # B, H, H', L, S, D, D'
    "one token": (1, 1, 1, 1, 1, 4, 4),
    "odd": (2, 3, 3, 5, 7, 6, 6),
    "odd channels": (1, 2, 2, 9, 33, 37, 5),
    "image": (2, 2, 2, 64, 64, 32, 32),
    "text": (2, 4, 4, 40, 77, 40, 40),
    "shared heads": (1, 6, 2, 17, 20, 16, 24),
    "many tokens": (1, 1, 1, 130, 1100, 16, 16),
    "wide": (1, 1, 1, 20, 30, 300, 280),
}


def operands(shape: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    b, h, shared, queries, keys, d, e = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((b, queries, h, d), (b, keys, shared, d), (b, keys, shared, e))
    return [torch.randn(s, generator=generator).transpose(1, 2) + 0.3 for s in sizes]


def parameters(tensors: list[torch.Tensor], bits: int, symmetric: bool = False) -> list[torch.Tensor]:
    """Ranges that clip a little."""
    found = [affine_parameters(0.8 * x.min(), 0.9 * x.max(), bits, symmetric=symmetric) for x in tensors]
    return [p.reshape(1) for pair in found for p in pair]


def simulated(tensors, tables, bits: int, mask=None, is_causal=False, scale=None) -> torch.Tensor:
    quantized = [
        fake_quantize(x.float(), s, z, *integer_range(bits))
        for x, s, z in zip(tensors, tables[::2], tables[1::2], strict=True)
    ]
    site = QuantizedAttention(nn.Identity(), nn.Identity(), nn.Identity())
    return site(*quantized, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=True)


def integer(tensors, tables, bits: int, mask=None, is_causal=False, scale=None) -> torch.Tensor:
    scale = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    return int8_attention(*tensors, mask, is_causal, scale, *for_stored(tables), bits, tensors[0].dtype)


def for_stored(tables: list[torch.Tensor]) -> list[torch.Tensor]:
    """Zero points of stored codes."""
    return [t + 128 if t.dtype == torch.int32 else t for t in tables]


@pytest.fixture(scope="module", autouse=True)
def built():
    assert not attention_kernel(torch.device("cpu")).unsupported_reason


def close(ours: torch.Tensor, expected: torch.Tensor, value: torch.Tensor) -> None:
    """Equal but for codes of probabilities that lie between two: a code in 255 of some values."""
    assert ours.shape == expected.shape
    assert float((ours.float() - expected).abs().max()) <= 1.5 / 255 * float(value.abs().max())
    assert float((ours.float() - expected).norm() / expected.norm().clamp_min(1e-9)) < 1e-3


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_simulated(shape, bits: int) -> None:
    tensors = operands(shape)
    tables = parameters(tensors, bits)
    close(integer(tensors, tables, bits), simulated(tensors, tables, bits), tensors[2])


def stored(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes as what makes the values writes them, in their layout."""
    return activation_codes(x, scale.reciprocal(), zero_point + 128, bits)


@pytest.mark.parametrize("coded", ["query", "key", "value", "all"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_codes_are_taken_as_they_are(shape, bits: int, coded: str) -> None:
    tensors = operands(shape)
    tables = parameters(tensors, bits)
    given = [
        stored(x, *tables[2 * i : 2 * i + 2], bits) if coded in (name, "all") else x
        for i, (name, x) in enumerate(zip(("query", "key", "value"), tensors, strict=True))
    ]
    y = int8_attention(*given, None, False, shape[5] ** -0.5, *for_stored(tables), bits, torch.float32)
    assert torch.equal(y, integer(tensors, tables, bits))


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("each", [False, True], ids=["one factor", "a factor for each channel"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_result_as_codes(shape, each: bool, bits: int) -> None:
    b, h, _, queries, _, _, e = shape
    tensors = operands(shape)
    tables = parameters(tensors, 8)
    values = integer(tensors, tables, 8)  # [B, H, L, D']
    factor = 1 + torch.rand(h * e if each else 1, generator=torch.Generator().manual_seed(2))
    factor *= 2**bits / (values.max() - values.min() + 1e-3)  # all codes, and a few beyond
    zero_point = (128 - factor.mean() * values.mean()).round().to(torch.int32).reshape(1)
    rows = values.transpose(1, 2).reshape(b, queries, h * e)
    expected = activation_codes(rows, factor, zero_point, bits)
    given = (*tensors, None, False, shape[5] ** -0.5, *for_stored(tables), 8, torch.float32)
    codes = int8_attention(*given, factor, zero_point, bits)
    assert codes.dtype == torch.uint8
    assert len(codes.unique()) > 1
    assert torch.equal(codes.transpose(1, 2).reshape(b, queries, h * e), expected)


MASKS = {
    "bool": lambda *s: torch.rand(s, generator=torch.Generator().manual_seed(1)) > 0.4,
    "added": lambda *s: torch.randn(s, generator=torch.Generator().manual_seed(1)),
    "bool of keys": lambda b, h, q, k: (torch.arange(k) < k - 2)[None, None, None].expand(b, 1, 1, k),
    "one for all": lambda b, h, q, k: torch.randn(q, k, generator=torch.Generator().manual_seed(1)),
    "half": lambda *s: torch.randn(s, generator=torch.Generator().manual_seed(1)).half(),
    "some rows see nothing": lambda b, h, q, k: (torch.arange(q) > 2)[:, None].expand(q, k),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", ["odd", "image", "shared heads"])
def test_masks_are_those_of_the_simulated(shape: str, mask: str) -> None:
    b, h, _, queries, keys, _, _ = SHAPES[shape]
    tensors = operands(SHAPES[shape])
    tables, given = parameters(tensors, 8), MASKS[mask](b, h, queries, keys)
    y = integer(tensors, tables, 8, given)
    close(y, simulated(tensors, tables, 8, given), tensors[2])
    if mask == "some rows see nothing":
        assert not y[:, :, :3].any()


@pytest.mark.parametrize("shape", ["odd", "image", "text"])
def test_causal_attention_and_a_scale(shape: str) -> None:
    tensors = operands(SHAPES[shape])
    tables = parameters(tensors, 8, symmetric=True)
    options = {"is_causal": True, "scale": 0.31}
    close(integer(tensors, tables, 8, **options), simulated(tensors, tables, 8, **options), tensors[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_come_back_in_theirs(dtype: torch.dtype) -> None:
    tensors = [x.to(dtype) for x in operands(SHAPES["image"])]
    tables = parameters([x.float() for x in tensors], 8)
    y = integer(tensors, tables, 8)
    assert y.dtype == dtype
    expected = simulated(tensors, tables, 8)
    assert float((y.float() - expected.float()).norm() / expected.float().norm()) < 0.01


def test_any_layout_of_memory() -> None:
    tensors = operands(SHAPES["odd"])
    tables = parameters(tensors, 8)
    expected = integer(tensors, tables, 8)
    fused = torch.cat([x.transpose(1, 2).flatten(2) for x in (tensors[1], tensors[2])], -1)
    k, v = (x.unflatten(-1, (3, 6)).transpose(1, 2) for x in fused.chunk(2, -1))
    turned = tensors[0].mT.contiguous().mT  # channels far apart
    assert torch.equal(integer([turned, k, v], tables, 8), expected)


def test_every_sample_has_ranges_of_its_own() -> None:
    tensors = operands((3, 2, 2, 10, 12, 8, 8))
    tables = parameters(tensors, 8)
    factors = torch.tensor([1.0, 2.0, 0.5])
    own = [t.expand(3) * factors if t.dtype == torch.float32 else t.expand(3).contiguous() for t in tables]
    together = integer(tensors, own, 8)
    for i in range(3):
        alone = integer([x[i : i + 1] for x in tensors], [t[i : i + 1] for t in own], 8)
        assert torch.equal(together[i : i + 1], alone)


def test_more_keys_than_one_int32_sum_takes() -> None:
    keys = 66_000  # 66,000 * 255 * 127 > 2^31
    q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, keys, 4)
    v = torch.full((1, 1, keys, 4), 1.27)
    one, zero = torch.full((1,), 0.01), torch.full((1,), 128, dtype=torch.int32)
    y = int8_attention(q, k, v, None, False, 0.5, one, zero, one, zero, one, zero, 8, q.dtype)
    assert torch.allclose(y, torch.full_like(y, 1.27), rtol=1e-4)


def test_threads_share_the_work_and_change_nothing() -> None:
    tensors = operands(SHAPES["many tokens"])
    tables = parameters(tensors, 8)
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(integer(tensors, tables, 8))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, found[0]) for each in found)


def test_memory_grows_with_tokens_not_with_their_square() -> None:
    one, zero = torch.full((1,), 0.02), torch.full((1,), 128, dtype=torch.int32)

    def megabytes(tokens: int) -> float:
        x = torch.randn(1, 1, tokens, 8)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = resident("VmRSS")
        int8_attention(x, x, x, None, False, 1.0, *[one, zero] * 3, 8, x.dtype)
        return resident("VmHWM") - before

    megabytes(1024)
    assert megabytes(16384) < 16  # 16384^2 scores alone would take 1024


def resident(field: str) -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_operator_is_one_of_pytorch(is_causal: bool) -> None:
    tensors = operands(SHAPES["odd"])
    arguments = (*tensors, None, is_causal, 0.4, *parameters(tensors, 8), 8, torch.float32)
    torch.library.opcheck(int8_attention, arguments, test_utils=("test_schema", "test_faketensor"))


def test_close_to_full_precision() -> None:
    tensors = operands(SHAPES["image"])
    tables = [p.reshape(1) for x in tensors for p in affine_parameters(x.min(), x.max(), 8, symmetric=False)]
    y, exact = integer(tensors, tables, 8), F.scaled_dot_product_attention(*tensors)
    assert float((y - exact).norm() / exact.norm()) < 0.03


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """As in a new process, with an empty cache."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    native.library.cache_clear()
    cpu_kernel.cache_clear()
    yield tmp_path
    native.library.cache_clear()
    cpu_kernel.cache_clear()


def reason() -> str:
    cpu_kernel.cache_clear()
    return attention_kernel(torch.device("cpu")).unsupported_reason


@pytest.mark.parametrize(("compiler", "text"), [("no-such-compiler", "need a compiler"), ("false", "cannot compile")])
def test_without_a_compiler_the_reason_says_so(empty, monkeypatch, compiler: str, text: str) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert text in reason()
    assert not list(empty.rglob("*.so*"))


def test_a_library_is_built_once_whoever_asks_and_found_without_a_compiler(empty, monkeypatch) -> None:
    built = []
    build = native._build
    monkeypatch.setattr(native, "_build", lambda target: (built.append(target), build(target)))
    threads = [threading.Thread(target=native.library) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == list(empty.rglob("*.so"))
    native.library.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert reason() == ""


def test_a_damaged_library_is_a_reason(empty) -> None:
    native.path().parent.mkdir(parents=True)
    native.path().write_bytes(b"not a library")
    assert "cannot be written or loaded" in reason()


def test_a_processor_without_vnni_is_a_reason(empty, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert "VNNI" in reason()


def test_the_kernel_needs_a_cpu() -> None:
    assert "device type 'cuda'" in attention_kernel(torch.device("cuda")).unsupported_reason


def test_shapes_of_heads_and_masks_combine() -> None:
    """A small sweep, as the shapes above are few."""
    for seed, (queries, keys, d) in enumerate(itertools.product((1, 15, 16, 65), (3, 16, 17, 64), (4, 8, 20))):
        tensors = operands((1, 2, 1, queries, keys, d, d), seed)
        tables = parameters(tensors, 8)
        close(integer(tensors, tables, 8), simulated(tensors, tables, 8), tensors[2])
