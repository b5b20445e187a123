"""Products in half precision: sums in float32, rounded once, with and without the CPU's instructions."""

from unittest.mock import Mock

import pytest
import torch

from compiled_logprobs.operation import products

TILES, INSTRUCTIONS = frozenset(), frozenset({"avx512_bf16", "avx512_fp16"})
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Half a unit in the last place, at most, as a share of the number."""


@pytest.fixture(params=[TILES, INSTRUCTIONS], ids=["tiles", "instructions"], autouse=True)
def flags(request, monkeypatch):
    monkeypatch.setattr(products, "_cpu_flags", lambda: request.param)
    monkeypatch.setattr(products, "TILE", 16)
    monkeypatch.setattr(products, "BLOCK", 8)
    return request.param


def matrices(dtype, m=37, k=50, n=33):
    """[M, K], which lies row by row, or column by column; [K, N], the same."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((m, k), (k, n)))
    return [(x, y) for x in (a, a.T.contiguous().T, a[:, ::2].repeat(1, 2)) for y in (b, b.T.contiguous().T)]


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_a_product_is_rounded_once(dtype):
    bias = torch.linspace(-1.0, 1.0, 33).to(dtype)
    for a, b in matrices(dtype):
        for plus in (None, bias):
            got = products.multiply(a, b, a.new_empty(len(a), b.shape[-1]), plus)
            right = a.double() @ b.double() + (0.0 if plus is None else plus.double())
            torch.testing.assert_close(got.double(), right, rtol=1.01 * ROUNDING[dtype], atol=2e-5)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_a_product_is_added_to_sums_in_float32(flags, dtype):
    for a, b in matrices(dtype):
        sums = torch.full((len(a), b.shape[-1]), 64.0)
        products.add_product(a, b, sums)
        rounded = 0.0 if flags is TILES or dtype == torch.float32 else ROUNDING[dtype]  # each product, and not the sum
        torch.testing.assert_close(sums.double() - 64.0, a.double() @ b.double(), rtol=1.01 * rounded, atol=1e-4)


def test_rows_without_number_and_a_part_of_a_larger_tensor_are_served():
    a, b = matrices(torch.bfloat16)[0]
    out = torch.full((40, 33), 7.0, dtype=torch.bfloat16)
    products.multiply(a, b, out[:37])
    products.multiply(a[:0], b, out[:0])
    assert bool((out[37:] == 7.0).all()) and not bool((out[:37] == 7.0).all())


@pytest.mark.parametrize(
    ("known", "expected"), [({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "x"}, {"avx512_bf16"}), (None, set())]
)
def test_without_a_list_of_the_system_torch_says_what_it_knows(known, expected, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(products.Path, "read_text", Mock(side_effect=FileNotFoundError))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    if known is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert products._cpu_flags.__wrapped__() == expected


@pytest.mark.parametrize("line", ["flags\t\t: fpu avx512_bf16 sse", "Features\t: fp asimd bf16"])
def test_the_list_of_instructions_is_read(line, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(products.Path, "read_text", lambda *_, **__: f"processor\t: 0\nbugs\t: none\n{line}\n")
    assert products._cpu_flags.__wrapped__() & products._INSTRUCTIONS[torch.bfloat16]
