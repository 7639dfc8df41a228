"""The row-aligned layout of the blockwise ops, and unsigned codes of any blocksize."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feinwerk import blockwise_dequantize, blockwise_quantize
from feinwerk.codebook import RULES, dynamic_map
from feinwerk.testing import assert_same_bits, use_backend
from feinwerk.testing.interpreted import some

SHAPES = ((1, 1), (3, 1), (1, 300), (5, 64), (5, 65), (4, 7, 11), (2, 1000), (300,), ())
BLOCKSIZES = (1, 7, 64, 256, 2048, 2**62)
MAPS = {"signed": dynamic_map(), "unsigned": dynamic_map(signed=False)}


def values(shape: tuple[int, ...], seed: int = 0, positive: bool = False) -> torch.Tensor:
    """Rows of very different size, some odd numbers among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if x.dim() > 1:
        size = torch.rand(x.shape[0], generator=generator) * 12 - 6
        x = x * 10 ** size.view(-1, *[1] * (x.dim() - 1))
    odd = torch.tensor([0.0, torch.nan, 1e-42, -torch.inf])
    chosen = odd[torch.randint(4, shape, generator=generator)]
    x = torch.where(torch.rand(shape, generator=generator) < 0.01, chosen, x)
    return x.abs() if positive else x


def row_by_row(
    x: torch.Tensor, codebook: torch.Tensor, blocksize: int, rule: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by a flat call for each row."""
    rows = x.reshape(x.shape[0] if x.dim() > 1 else 1, -1)
    parts = [blockwise_quantize(row, codebook, blocksize=blocksize, rule=rule) for row in rows]
    codes = torch.stack([part[0] for part in parts]).view(x.shape)
    return codes, torch.stack([part[1] for part in parts])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MAPS)
def test_rows_are_flat_calls_for_each_row(backend: str, name: str, rule: str) -> None:
    codebook = MAPS[name]
    for shape, blocksize in some(itertools.product(SHAPES, BLOCKSIZES), 12):
        x = values(shape, positive=name == "unsigned")
        options = {"blocksize": blocksize, "layout": "rows"}
        codes, absmax, offset = blockwise_quantize(x, codebook, rule=rule, **options)
        want_codes, want_absmax = row_by_row(x, codebook, blocksize, rule)
        assert_same_bits(codes, want_codes, f"{shape} {blocksize}")
        assert_same_bits(absmax, want_absmax, f"{shape} {blocksize}")
        assert offset.item() == 0
        dense = blockwise_dequantize(codes, absmax, codebook, **options)
        rows = codes.reshape(len(absmax), -1)
        want = [
            blockwise_dequantize(row, scales, codebook, blocksize=blocksize)
            for row, scales in zip(rows, absmax, strict=True)
        ]
        assert_same_bits(dense, torch.stack(want).view(shape))


def test_the_nearest_code_of_the_unsigned_map(backend: str) -> None:
    codebook = dynamic_map(signed=False)
    x = values((3, 700), positive=True).nan_to_num(0.5, 0.5)
    for blocksize in (1, 7, 64, 256, 2048):
        codes, absmax, _ = blockwise_quantize(
            x, codebook, blocksize=blocksize, rule="cuda", layout="rows"
        )
        column = torch.arange(700) // blocksize
        scaled = x * (1 / absmax)[:, column]
        near = (scaled[..., None].double() - codebook.double()).abs()
        best = near.amin(dim=-1)
        chosen = near.gather(-1, codes.long()[..., None])[..., 0]
        finite = absmax[:, column] > 2.0**-126
        # The midpoints are rounded to fp32: half an ulp of them is all that may be lost.
        assert (chosen <= best + 2.0**-24 * scaled)[finite].all()


@pytest.mark.parametrize("center", [False, True], ids=["plain", "center"])
def test_same_bits_on_every_backend(backend: str, center: bool) -> None:
    for shape, blocksize, rule in some(itertools.product(SHAPES, BLOCKSIZES, RULES), 16):
        x = values(shape).nan_to_num(0.1, 0.2, 0.3)
        options: dict[str, Any] = {"blocksize": blocksize, "layout": "rows"}
        got = blockwise_quantize(x, dynamic_map(), center=center, rule=rule, **options)
        with use_backend("reference"):
            want = blockwise_quantize(x, dynamic_map(), center=center, rule=rule, **options)
            back = blockwise_dequantize(want[0], want[1], dynamic_map(), want[2], **options)
        for left, right in zip(got, want, strict=True):
            assert_same_bits(left, right, f"{shape} {blocksize} {rule}")
        dense = blockwise_dequantize(got[0], got[1], dynamic_map(), got[2], **options)
        assert_same_bits(dense, back)


def test_rows_cut_anywhere_have_the_codes_of_the_whole(backend: str) -> None:
    x = values((23, 150))
    options: dict[str, Any] = {"blocksize": 64, "layout": "rows", "rule": "cuda"}
    codes, absmax, _ = blockwise_quantize(x, dynamic_map(), **options)
    assert absmax.shape == (23, 3)
    for begin, end in ((0, 1), (1, 9), (9, 23)):
        part = blockwise_quantize(x[begin:end], dynamic_map(), **options)
        assert_same_bits(part[0], codes[begin:end])
        assert_same_bits(part[1], absmax[begin:end])


def test_flat_is_the_default_and_ignores_rows(backend: str) -> None:
    x = values((5, 65))
    one = blockwise_quantize(x, dynamic_map(), blocksize=64)
    two = blockwise_quantize(x.view(-1), dynamic_map(), blocksize=64, layout="flat")
    assert one[1].shape == (6,)
    for left, right in zip(one, two, strict=True):
        assert_same_bits(left.view(-1), right.view(-1))


def test_threads_change_nothing(backend: str) -> None:
    x = values((700, 300))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(blockwise_quantize(x, dynamic_map(), blocksize=64, layout="rows"))
    for result in results[1:]:
        for left, right in zip(result, results[0], strict=True):
            assert_same_bits(left, right)


@given(
    shape=st.lists(st.integers(1, 40), min_size=0, max_size=3).map(tuple),
    blocksize=st.integers(1, 1600),
    rule=st.sampled_from(RULES),
    name=st.sampled_from(list(MAPS)),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    backend: str, shape: tuple[int, ...], blocksize: int, rule: str, name: str, seed: int
) -> None:
    x = values(shape, seed, name == "unsigned")
    options: dict[str, Any] = {"blocksize": blocksize, "layout": "rows"}
    codes, absmax, _ = blockwise_quantize(x, MAPS[name], rule=rule, **options)
    with use_backend("reference"):
        want_codes, want_absmax, _ = blockwise_quantize(x, MAPS[name], rule=rule, **options)
        want = blockwise_dequantize(want_codes, want_absmax, MAPS[name], **options)
    assert_same_bits(codes, want_codes)
    assert_same_bits(absmax, want_absmax)
    assert_same_bits(blockwise_dequantize(codes, absmax, MAPS[name], **options), want)


def test_opcheck_and_compile(backend: str) -> None:
    x = torch.randn(4, 150, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"blocksize": 64, "layout": "rows"}
    quantize = torch.ops.feinwerk.blockwise_quantize.default
    torch.library.opcheck(quantize, (x, dynamic_map()), options)
    codes, absmax, _ = blockwise_quantize(x, dynamic_map(), **options)
    dequantize = torch.ops.feinwerk.blockwise_dequantize.default
    torch.library.opcheck(dequantize, (codes, absmax, dynamic_map()), options)
    torch._dynamo.reset()
    codebook = dynamic_map()

    def round_trip(x: torch.Tensor) -> torch.Tensor:
        codes, absmax, _ = blockwise_quantize(x * 2, codebook, **options)
        return blockwise_dequantize(codes, absmax, codebook, **options) / 2

    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x), round_trip(x))


def test_shapes_without_memory() -> None:
    x = torch.empty(3, 2**30 + 1, device="meta")
    codebook = torch.empty(256, device="meta")
    codes, absmax, _ = blockwise_quantize(x, codebook, layout="rows")
    assert codes.shape == x.shape
    assert absmax.shape == (3, 2**22 + 1)
    assert blockwise_dequantize(codes, absmax, codebook, layout="rows").shape == x.shape
    vector = blockwise_quantize(x[0], codebook, layout="rows")
    assert vector[1].shape == (1, 2**22 + 1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rejections(device: str) -> None:
    x, codebook = torch.ones(4, 150, device=device), dynamic_map().to(device)
    rule = 'layout must be "flat" or "rows", got '
    with pytest.raises(ValueError, match=f"^blockwise_quantize: {rule}'columns'$"):
        blockwise_quantize(x, codebook, layout="columns")
    codes = torch.ones(4, 150, dtype=torch.uint8, device=device)
    absmax = torch.ones(10, device=device)
    with pytest.raises(ValueError, match=f"^blockwise_dequantize: {rule}''$"):
        blockwise_dequantize(codes, absmax, codebook, layout="")
    with pytest.raises(ValueError, match="absmax must have 12 elements, got 10"):
        blockwise_dequantize(codes, absmax, codebook, blocksize=64, layout="rows")
    blockwise_dequantize(codes, absmax, codebook, blocksize=64)
