"""nf4_quantize on every backend: the rules to the bit, and byte equality with bitsandbytes."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feinwerk import nf4_dequantize, nf4_quantize, testing
from feinwerk.codebook import BLOCKSIZES, NF4_THRESHOLDS, NF4_VALUES, RULES, nf4_thresholds
from feinwerk.testing import assert_same_bits, make_x, use_backend
from feinwerk.testing.interpreted import some

OP = torch.ops.feinwerk.nf4_quantize.default
SIZES = (1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 129, 4095, 4097, 20_001)


@functools.cache
def bitsandbytes_quantize(
    count: int, kind: str, dtype: torch.dtype, blocksize: int
) -> list[torch.Tensor]:
    import bitsandbytes  # noqa: F401  (registers the op)

    operation = torch.ops.bitsandbytes.quantize_4bit.default
    return list(operation(inputs(count, kind, dtype), blocksize, "nf4", torch.uint8))


@functools.lru_cache(maxsize=4096)
def reference_quantize(
    count: int, kind: str, dtype: torch.dtype, blocksize: int, rule: str, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    with use_backend("reference"):
        return nf4_quantize(
            inputs(count, kind, dtype, seed), blocksize=blocksize, rule=rule, allow_non_finite=True
        )


@functools.lru_cache(maxsize=4096)
def inputs(count: int, kind: str, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal weights; with zeros, denormals or NaN and infinity mixed in."""
    generator = torch.Generator().manual_seed(seed + count)
    x = torch.randn(count, generator=generator)
    if kind == "zeros":
        x[: count // 2] = 0
        x[-1:] = -0.0
    elif kind == "zero tail":
        x[count // 64 * 64 :] = 0
    elif kind == "all zeros":
        x.zero_()
    elif kind == "tiny":
        x *= 1e-38
    elif kind == "denormal":
        x *= 3e-42
    elif kind == "huge":
        x *= 1e38 if dtype != torch.float16 else 1e4
    elif kind == "non-finite":
        x[torch.rand(count, generator=generator) < 0.02] = torch.nan
        x[torch.rand(count, generator=generator) < 0.01] = torch.inf
        x[torch.rand(count, generator=generator) < 0.01] = -torch.inf
    elif kind == "all NaN":
        x.fill_(torch.nan)
    return x.to(dtype)


KINDS = ("normal", "zeros", "zero tail", "all zeros", "tiny", "denormal", "huge")
NON_FINITE = ("non-finite", "all NaN")


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_byte_equal_to_bitsandbytes_on_cpu(
    backend: str, dtype: torch.dtype, blocksize: int
) -> None:
    for count, kind in some(itertools.product(SIZES, (*KINDS, *NON_FINITE)), 12):
        x = inputs(count, kind, dtype)
        packed, absmax = nf4_quantize(x, blocksize=blocksize, allow_non_finite=True)
        theirs, their_absmax = bitsandbytes_quantize(count, kind, dtype, blocksize)
        what = f"{kind} {count}"
        assert_same_bits(packed, theirs.view(-1), what)
        assert_same_bits(absmax, their_absmax, what)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_same_bits_on_every_backend(backend: str, dtype: torch.dtype, rule: str) -> None:
    cases = itertools.product(SIZES, (*KINDS, *NON_FINITE), (32, 64, 4096))
    for count, kind, blocksize in some(cases, 24):
        x = inputs(count, kind, dtype)
        options = {"blocksize": blocksize, "rule": rule, "allow_non_finite": True}
        packed, absmax = nf4_quantize(x, **options)
        expected, expected_absmax = reference_quantize(count, kind, dtype, blocksize, rule)
        what = f"{kind} {count} {blocksize}"
        assert_same_bits(packed, expected, what)
        assert_same_bits(absmax, expected_absmax, what)


@pytest.mark.parametrize("rule", RULES)
def test_thresholds_and_their_neighbours(backend: str, rule: str) -> None:
    # absmax is 1, so that the scaled value is the weight itself.
    threshold = nf4_thresholds(rule)
    above = torch.nextafter(threshold, torch.tensor(2.0))
    below = torch.nextafter(threshold, torch.tensor(-2.0))
    weight = torch.cat([threshold, above, below, torch.zeros(18), torch.ones(1)])
    packed, absmax = nf4_quantize(weight, rule=rule)
    assert absmax.tolist() == [1.0]
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1).tolist()
    assert codes[:15] == list(range(15))  # a tie takes the lower code
    assert codes[15:30] == list(range(1, 16))
    assert codes[30:45] == list(range(15))


def test_zero_block_and_padding(backend: str) -> None:
    zeros = torch.zeros(65)
    packed, absmax = nf4_quantize(zeros)
    assert packed.tolist() == [0x77] * 33
    assert_same_bits(absmax, torch.tensor([0.0, 1e-38]))  # the partial block keeps the floor
    packed, absmax = nf4_quantize(zeros, rule="cuda")
    assert packed.tolist() == [0x00] * 33
    assert absmax.tolist() == [0.0, 0.0]
    assert nf4_dequantize(packed, absmax, shape=(65,)).signbit().all()
    for rule in RULES:
        packed, _ = nf4_quantize(torch.tensor([1.0]), rule=rule)
        assert packed.tolist() == [0xF7]


def test_nan_and_infinity_by_rule(backend: str) -> None:
    weight = torch.ones(64)
    weight[3] = torch.nan
    packed, absmax = nf4_quantize(weight, allow_non_finite=True)
    assert packed.tolist() == [0xFF] * 32
    assert absmax.isnan().all()
    packed, absmax = nf4_quantize(weight, rule="cuda", allow_non_finite=True)
    assert packed.tolist() == [0xFF, 0xF0, *[0xFF] * 30]
    assert absmax.tolist() == [1.0]
    weight[3] = torch.inf
    packed, _ = nf4_quantize(weight, allow_non_finite=True)
    assert packed.tolist() == [0x77, 0x7F, *[0x77] * 30]
    packed, _ = nf4_quantize(weight, rule="cuda", allow_non_finite=True)
    assert packed.tolist() == [0x77, 0x70, *[0x77] * 30]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_non_finite_is_refused(backend: str, dtype: torch.dtype, value: float) -> None:
    for count, where in ((1, 0), (64, 63), (1000, 0), (1000, 511), (1000, 999)):
        weight = torch.ones(count, dtype=dtype)
        weight[where] = value
        for rule in RULES:
            with pytest.raises(ValueError, match="nf4_quantize: weight must be finite, got NaN or"):
                nf4_quantize(weight, rule=rule)


def test_any_shape_and_stride(backend: str) -> None:
    weight = make_x((6, 5, 33), torch.float32)
    flat = nf4_quantize(weight.reshape(-1))
    for shape in ((990,), (30, 33), (6, 5, 33), (1, 2, 3, 165)):
        for got, expected in zip(nf4_quantize(weight.view(shape)), flat, strict=True):
            assert_same_bits(got, expected)
    turned = weight.transpose(0, 2)
    for got, expected in zip(nf4_quantize(turned), nf4_quantize(turned.contiguous()), strict=True):
        assert_same_bits(got, expected)
    scalar, _ = nf4_quantize(torch.tensor(2.0))
    assert scalar.tolist() == [0xF7]


def test_parameters_have_no_gradient(backend: str) -> None:
    packed, absmax = nf4_quantize(torch.nn.Parameter(torch.ones(64)))
    assert not packed.requires_grad
    assert not absmax.requires_grad


@given(
    count=st.integers(1, 5000),
    blocksize=st.sampled_from(BLOCKSIZES),
    dtype=st.sampled_from(testing.DTYPES),
    rule=st.sampled_from(RULES),
    kind=st.sampled_from((*KINDS, *NON_FINITE)),
    seed=st.integers(0, 1000),
)
def test_any_sizes(
    backend: str,
    count: int,
    blocksize: int,
    dtype: torch.dtype,
    rule: str,
    kind: str,
    seed: int,
) -> None:
    x = inputs(count, kind, dtype, seed)
    options = {"blocksize": blocksize, "rule": rule, "allow_non_finite": True}
    results = nf4_quantize(x, **options)
    expected = reference_quantize(count, kind, dtype, blocksize, rule, seed)
    for got, want in zip(results, expected, strict=True):
        assert_same_bits(got, want)


@pytest.mark.full
def test_every_bf16_value_beside_every_scale(backend: str) -> None:
    # All 65,536 bf16 patterns, 31 to a block whose first element sets a scale of its own.
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    values = torch.nn.functional.pad(every, (0, -len(every) % 31)).view(-1, 31)
    for rule in RULES:
        for scale in (1.0, 0.7, 3e-39, 1e30):
            x = torch.cat([torch.full((len(values), 1), scale), values], 1)
            x[:, 1:] *= scale
            got = nf4_quantize(x, blocksize=32, rule=rule, allow_non_finite=True)
            with use_backend("reference"):
                want = nf4_quantize(x, blocksize=32, rule=rule, allow_non_finite=True)
            for left, right in zip(got, want, strict=True):
                assert_same_bits(left, right)


def test_round_trip_error(backend: str) -> None:
    weight = make_x((64, 64), torch.float32)
    packed, absmax = nf4_quantize(weight)
    error = nf4_dequantize(packed, absmax, shape=weight.shape) - weight
    gap = max(b - a for a, b in itertools.pairwise(NF4_VALUES)) / 2
    limit = absmax.repeat_interleave(64).view(64, 64) * gap * (1 + 1e-6)
    assert (error.abs() <= limit).all()


def test_the_rules_differ_in_four_thresholds() -> None:
    pairs = zip(NF4_THRESHOLDS["cpu"], NF4_THRESHOLDS["cuda"], strict=True)
    assert [i for i, (cpu, cuda) in enumerate(pairs) if cpu != cuda] == [0, 8, 12, 14]


def test_opcheck(backend: str) -> None:
    torch.library.opcheck(OP, (make_x((3, 65), torch.bfloat16),), {"blocksize": 32})
    torch.library.opcheck(OP, (make_x((64,), torch.float32),), {"rule": "cuda"})


def test_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda w: nf4_quantize(w + 1), fullgraph=True, backend="aot_eager")
    weight = make_x((5, 64), torch.float32)
    for got, expected in zip(compiled(weight), nf4_quantize(weight + 1), strict=True):
        assert_same_bits(got, expected)


def test_more_than_2_to_the_31_elements_by_shapes() -> None:
    weight = torch.empty(2**16 + 1, 2**15 + 1, dtype=torch.bfloat16, device="meta")
    packed, absmax = nf4_quantize(weight, blocksize=4096)
    count = (2**16 + 1) * (2**15 + 1)
    assert packed.shape == ((count + 1) // 2,)
    assert absmax.shape == (-(-count // 4096),)
