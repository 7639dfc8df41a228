"""blockwise_quantize and blockwise_dequantize on every backend, to the bit."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feinwerk import blockwise_dequantize, blockwise_quantize
from feinwerk.codebook import RULES, dynamic_map
from feinwerk.ops.blockwise_quantize.reference import ordered_mean
from feinwerk.testing import assert_same_bits, use_backend
from feinwerk.testing.interpreted import some

QUANTIZE = torch.ops.feinwerk.blockwise_quantize.default
DEQUANTIZE = torch.ops.feinwerk.blockwise_dequantize.default
SIZES = (1, 2, 5, 7, 8, 9, 31, 33, 255, 256, 257, 1000, 4097, 20_001)


def inputs(count: int, kind: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + count)
    x = torch.randn(count, generator=generator)
    if kind == "absmax":
        x = x.abs() * 0.02 + 0.05
    elif kind == "zeros":
        x[: count // 2] = 0
    elif kind == "denormal":
        x *= 3e-42
    elif kind == "huge":
        x *= 1e38
    elif kind == "non-finite":
        x[torch.rand(count, generator=generator) < 0.02] = torch.nan
        x[torch.rand(count, generator=generator) < 0.01] = torch.inf
        x[torch.rand(count, generator=generator) < 0.01] = -torch.inf
    elif kind == "all NaN":
        x.fill_(torch.nan)
    return x


KINDS = ("normal", "absmax", "zeros", "denormal", "huge", "non-finite", "all NaN")


CODEBOOKS = {
    "dynamic": dynamic_map(),
    "unsigned": dynamic_map(signed=False),
    "linear": torch.linspace(-1, 1, 256),
}


@functools.cache
def bitsandbytes_quantize(count: int, kind: str, name: str, blocksize: int) -> list[torch.Tensor]:
    import bitsandbytes  # noqa: F401  (registers the op)

    operation = torch.ops.bitsandbytes.quantize_blockwise.default
    return list(operation(inputs(count, kind), CODEBOOKS[name], blocksize))


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("blocksize", [64, 100, 256])
def test_byte_equal_to_bitsandbytes_on_cpu(backend: str, blocksize: int, name: str) -> None:
    sizes = SIZES if name == "dynamic" else (1000,)
    for count, kind in some(itertools.product(sizes, KINDS), 10):
        x = inputs(count, kind)
        codes, absmax, offset = blockwise_quantize(x, CODEBOOKS[name], blocksize=blocksize)
        their_codes, their_absmax = bitsandbytes_quantize(count, kind, name, blocksize)
        assert_same_bits(codes, their_codes, f"{kind} {count}")
        assert_same_bits(absmax, their_absmax, f"{kind} {count}")
        assert offset.item() == 0


def test_second_level_of_double_quantization_is_bitsandbytes(backend: str) -> None:
    from bitsandbytes.functional import quantize_4bit

    from feinwerk import nf4_quantize

    for rows in (1, 3, 100, 700):
        weight = torch.randn(rows, 832, generator=torch.Generator().manual_seed(rows))
        theirs, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        packed, absmax = nf4_quantize(weight)
        codes, nested_absmax, offset = blockwise_quantize(absmax, dynamic_map(), center=True)
        assert_same_bits(packed, theirs.view(-1))
        assert_same_bits(offset, state.offset)
        assert_same_bits(codes, state.absmax)
        assert_same_bits(nested_absmax, state.state2.absmax)


@functools.cache
def reference_quantize(
    count: int, kind: str, blocksize: int, rule: str, center: bool, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    with use_backend("reference"):
        return blockwise_quantize(
            inputs(count, kind, seed), dynamic_map(), blocksize=blocksize, rule=rule, center=center
        )


@pytest.mark.parametrize("center", [False, True], ids=["plain", "center"])
@pytest.mark.parametrize("rule", RULES)
def test_same_bits_on_every_backend(backend: str, rule: str, center: bool) -> None:
    for count, kind, blocksize in some(itertools.product(SIZES, KINDS, (1, 100, 256)), 24):
        x = inputs(count, kind)
        options = {"blocksize": blocksize, "rule": rule, "center": center}
        got = blockwise_quantize(x, dynamic_map(), **options)
        want = reference_quantize(count, kind, **options)
        for left, right in zip(got, want, strict=True):
            assert_same_bits(left, right, f"{kind} {count} {blocksize}")


def test_ordered_mean_is_torchs_on_one_thread(backend: str) -> None:
    sizes = [*range(1, 140), 511, 513, 2047, 4096, 16383, 32769, 262_144, 300_001, 1_048_577]
    for count in some(sizes, 24):
        x = inputs(count, "absmax")
        assert_same_bits(ordered_mean(x), x.mean(), str(count))
        offset = blockwise_quantize(x, dynamic_map(), center=True)[2]
        assert_same_bits(offset, x.mean(), str(count))
        x = inputs(count, "normal") * 10 ** inputs(count, "normal", seed=1)
        offset = blockwise_quantize(x, dynamic_map(), center=True)[2]
        assert_same_bits(offset, x.mean(), str(count))


def test_offset_does_not_depend_on_threads(backend: str) -> None:
    x = inputs(200_003, "absmax")
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(blockwise_quantize(x, dynamic_map(), center=True))
    for result in results[1:]:
        for left, right in zip(result, results[0], strict=True):
            assert_same_bits(left, right)


def test_cuda_rule_is_the_exact_nearest_with_ties_to_the_lower_code(backend: str) -> None:
    codebook = dynamic_map()
    midpoints = (codebook[:-1] + codebook[1:]) * 0.5
    up = torch.nextafter(midpoints, torch.tensor(2.0))
    x = torch.cat([torch.ones(1), midpoints])
    codes = blockwise_quantize(x, codebook, rule="cuda")[0]
    assert codes[1:].tolist() == list(range(255))
    codes = blockwise_quantize(torch.cat([torch.ones(1), up]), codebook, rule="cuda")[0]
    assert codes[1:].tolist() == list(range(1, 256))


def test_zero_blocks_and_nan(backend: str) -> None:
    for rule in RULES:
        codes, absmax, _ = blockwise_quantize(torch.zeros(300), dynamic_map(), rule=rule)
        assert codes.tolist() == [0] * 300
        assert absmax.tolist() == [0.0, 0.0]
        x = torch.ones(10)
        x[4] = torch.nan
        codes, absmax, _ = blockwise_quantize(x, dynamic_map(), rule=rule)
        assert absmax.tolist() == [1.0]
        assert codes.tolist() == [255] * 4 + [0] + [255] * 5


def test_shapes_and_strides(backend: str) -> None:
    x = inputs(600, "normal").view(2, 3, 100)
    flat = blockwise_quantize(x.view(-1), dynamic_map(), center=True)
    codes, absmax, offset = blockwise_quantize(x, dynamic_map(), center=True)
    assert codes.shape == x.shape
    assert offset.dim() == 0
    assert_same_bits(codes.view(-1), flat[0])
    turned = x.transpose(0, 2)
    got = blockwise_quantize(turned, dynamic_map())
    want = blockwise_quantize(turned.contiguous(), dynamic_map())
    for left, right in zip(got, want, strict=True):
        assert_same_bits(left, right)
    dense = blockwise_dequantize(codes, absmax, dynamic_map(), offset)
    assert dense.shape == x.shape


@pytest.mark.parametrize("with_offset", [False, True])
def test_dequantize_values(backend: str, with_offset: bool) -> None:
    codebook = dynamic_map()
    for count in SIZES:
        for blocksize in (1, 100, 256):
            generator = torch.Generator().manual_seed(count)
            codes = torch.randint(256, (count,), generator=generator).to(torch.uint8)
            absmax = torch.rand(-(-count // blocksize), generator=generator)
            offset = torch.tensor(0.0511) if with_offset else None
            got = blockwise_dequantize(codes, absmax, codebook, offset, blocksize=blocksize)
            want = codebook[codes.long()] * absmax[torch.arange(count) // blocksize]
            if offset is not None:
                want = want + offset
            assert_same_bits(got, want)


def test_dequantize_without_offset_keeps_the_sign_of_zero(backend: str) -> None:
    codes = torch.zeros(3, dtype=torch.uint8)
    got = blockwise_dequantize(codes, torch.zeros(1), dynamic_map())
    assert got.signbit().all()
    got = blockwise_dequantize(codes, torch.zeros(1), dynamic_map(), torch.tensor(0.0))
    assert not got.signbit().any()


@given(
    count=st.integers(1, 3000),
    blocksize=st.integers(1, 600),
    rule=st.sampled_from(RULES),
    center=st.booleans(),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
)
def test_any_sizes(
    backend: str, count: int, blocksize: int, rule: str, center: bool, kind: str, seed: int
) -> None:
    x = inputs(count, kind, seed)
    options = {"blocksize": blocksize, "rule": rule, "center": center}
    codes, absmax, offset = blockwise_quantize(x, dynamic_map(), **options)
    dense = blockwise_dequantize(codes, absmax, dynamic_map(), offset, blocksize=blocksize)
    want = reference_quantize(count, kind, **options, seed=seed)
    with use_backend("reference"):
        want_dense = blockwise_dequantize(codes, absmax, dynamic_map(), offset, blocksize=blocksize)
    for left, right in zip((codes, absmax, offset, dense), (*want, want_dense), strict=True):
        assert_same_bits(left, right)


@pytest.mark.full
def test_every_bin_boundary(backend: str) -> None:
    # Around each of the 65,535 boundaries between bins of the CPU rule, both neighbours.
    edges = ((torch.arange(65535).double() + 0.5) / 65535 * 2 - 1).float()
    near = [edges]
    for direction in (-2.0, 2.0):
        for _ in range(2):
            near.append(torch.nextafter(near[-1], torch.tensor(direction)))
        near.append(edges)
    x = torch.cat(near)
    x = torch.cat(
        [
            torch.ones(-(-x.numel() // 255), 1),
            torch.nn.functional.pad(x, (0, -x.numel() % 255)).view(-1, 255),
        ],
        1,
    )
    for rule in RULES:
        got = blockwise_quantize(x, dynamic_map(), rule=rule)
        with use_backend("reference"):
            want = blockwise_quantize(x, dynamic_map(), rule=rule)
        for left, right in zip(got, want, strict=True):
            assert_same_bits(left, right)


def test_opcheck(backend: str) -> None:
    x = inputs(600, "normal").view(2, 300)
    torch.library.opcheck(QUANTIZE, (x, dynamic_map()), {"center": True})
    torch.library.opcheck(QUANTIZE, (x, dynamic_map()), {"blocksize": 7, "rule": "cuda"})
    codes, absmax, offset = blockwise_quantize(x, dynamic_map())
    torch.library.opcheck(DEQUANTIZE, (codes, absmax, dynamic_map(), offset))
    torch.library.opcheck(DEQUANTIZE, (codes, absmax, dynamic_map(), None))


def test_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    codebook = dynamic_map()

    def round_trip(x: torch.Tensor) -> torch.Tensor:
        codes, absmax, offset = blockwise_quantize(x * 2, codebook, center=True)
        return blockwise_dequantize(codes, absmax, codebook, offset) / 2

    x = inputs(600, "normal")
    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x), round_trip(x))


def test_more_than_2_to_the_31_elements_by_shapes() -> None:
    x = torch.empty(2**31 + 3, device="meta")
    codebook = torch.empty(256, device="meta")
    codes, absmax, offset = blockwise_quantize(x, codebook)
    assert codes.shape == x.shape
    assert absmax.shape == (2**23 + 1,)
    out = blockwise_dequantize(codes, absmax, codebook, offset)
    assert out.shape == x.shape
