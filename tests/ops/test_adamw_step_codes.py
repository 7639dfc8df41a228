"""The 8-bit codes of adamw_step against torch.bucketize: near every midpoint and over all sizes."""

from __future__ import annotations

import re

import pytest
import torch

from feinwerk import adamw_step
from feinwerk.codebook import dynamic_map
from feinwerk.ops.adamw_step import triton_ptx
from feinwerk.testing import assert_same_bits, use_backend
from feinwerk.testing.adamw import make_step

SMALLEST_NORMAL = 2.0**-126
# Powers of two, whose reciprocal is exact, and others; the ends of what has finite squares and of
# the normal numbers.
ABSMAX = (1.0, 0.75, 3.0, 1e-3, 0.1, 7e5, 1e-3 / 3, 1.8e19, 2.0**-100, 1.1 * 2.0**-126, 2.0**-126)


def midpoints(signed: bool) -> torch.Tensor:
    values = dynamic_map(signed)
    return (values[:-1] + values[1:]) * 0.5


def neighbours(x: torch.Tensor, ulps: int) -> torch.Tensor:
    """Every x with its neighbours on both sides, `ulps` away at most."""
    found = [x]
    for direction in (-torch.inf, torch.inf):
        near = x
        for _ in range(ulps):
            near = torch.nextafter(near, torch.tensor(direction))
            found.append(near)
    return torch.cat(found)


def encode(grad: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, ...]:
    """The codes and absmax of exp_avg and exp_avg_sq when they are `grad` and its square."""
    rows, cols = grad.shape
    blocks = rows, -(-cols // blocksize)
    codes = [torch.full(grad.shape, zero, dtype=torch.uint8) for zero in (127, 0)]
    absmax = [torch.zeros(blocks), torch.zeros(blocks)]
    adamw_step(
        [grad.clone()], [grad], codes[:1], codes[1:], absmax[:1], absmax[1:],
        steps=[1], lr=0.0, beta1=0.0, beta2=0.0, blocksize=blocksize,
    )  # fmt: skip
    return codes[0], absmax[0], codes[1], absmax[1]


def nearest(x: torch.Tensor, absmax: torch.Tensor, signed: bool) -> torch.Tensor:
    """What the codes have to be; x is [rows, block] and absmax [rows]."""
    scaled = torch.where(absmax >= SMALLEST_NORMAL, 1 / absmax, 0.0)[:, None] * x
    codes = torch.bucketize(scaled, midpoints(signed))
    if not signed:
        positive = (x > 0) & (absmax >= SMALLEST_NORMAL)[:, None]
        codes = torch.where(positive & (codes == 0), 1, codes)
    return codes.to(torch.uint8)


def check(values: torch.Tensor, absmax: float, width: int = 255) -> tuple[torch.Tensor, ...]:
    """Encode values in blocks that each begin with `absmax`; returns both scaled moments."""
    rows = -(-values.numel() // width)
    padded = torch.nn.functional.pad(values, (0, rows * width - values.numel())).view(rows, width)
    grad = torch.cat([torch.full((rows, 1), absmax), padded], dim=1)
    codes, most, codes_sq, most_sq = encode(grad, width + 1)
    square = grad * grad
    assert_same_bits(most[:, 0], grad.abs().amax(dim=1))
    assert_same_bits(most_sq[:, 0], square.amax(dim=1))
    assert_same_bits(codes, nearest(grad, most[:, 0], True))
    assert_same_bits(codes_sq, nearest(square, most_sq[:, 0], False))
    return grad / most, square / most_sq


@pytest.mark.parametrize("absmax", ABSMAX)
def test_around_every_midpoint_of_the_signed_map(backend: str, absmax: float) -> None:
    scale = torch.tensor(absmax)
    near = neighbours(midpoints(True) * scale, 3)
    check(near[near.abs() <= scale], absmax)


@pytest.mark.parametrize("absmax", [1.0, 1.5, 3.0, 1.7e-3, 2.0**40, 2.0**-50, 1e-14, 1e18])
def test_around_every_midpoint_of_the_unsigned_map(backend: str, absmax: float) -> None:
    # exp_avg_sq is the square of the gradient: its neighbours come from those of the root.
    scale = torch.tensor(absmax)
    middle = midpoints(False)
    near = neighbours(middle.double().sqrt().float() * scale, 8)
    _, scaled = check(near[near <= scale], absmax)
    # Both sides of every midpoint were met, 4 ulps away at most.
    found = scaled.flatten().sort().values
    above = torch.searchsorted(found, middle, right=True)
    step = torch.nextafter(middle, torch.tensor(2.0)) - middle
    assert ((found[above] - middle) <= 4 * step).all()
    assert ((middle - found[above - 1]) <= 4 * step).all()


def test_dense_random_values(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        # All magnitudes alike: exponents are uniform, down to far below the lowest midpoint.
        exponent = torch.rand(60_000, generator=generator) * -40
        sign = torch.randint(2, exponent.shape, generator=generator) * 2 - 1
        check(torch.exp2(exponent) * sign, 1.0)
        check(torch.rand(60_000, generator=generator) * 2 - 1, 1.0)
        check(torch.randn(60_000, generator=generator), 0.1)


def test_ties_go_to_the_lower_code(backend: str) -> None:
    middle = midpoints(True)
    codes = encode(torch.cat([torch.ones(1), middle])[None], 4096)[0]
    assert codes[0, 1:].tolist() == list(range(255))


def test_blocks_too_small_for_a_reciprocal_are_zero(backend: str) -> None:
    for absmax in (2.0**-126, 1.17e-38, 1e-42, 1e-45, 0.0):
        grad = torch.full((1, 40), absmax)
        grad[0, ::2] *= -0.5
        codes, most, codes_sq, most_sq = encode(grad, 4096)
        assert_same_bits(most, grad.abs().amax(dim=1, keepdim=True))
        assert most_sq.item() == 0
        assert (codes_sq == 0).all()
        if absmax < SMALLEST_NORMAL:
            assert (codes == 127).all()
        else:
            assert_same_bits(codes, nearest(grad, most[:, 0], True))


@pytest.mark.parametrize("signed", [True, False])
def test_every_entry_of_the_tables_in_shared_memory(signed: bool) -> None:
    entries, (lost, first, _) = triton_ptx.entries(signed), triton_ptx.CUTS[signed]
    middle = midpoints(signed)
    # Within an entry codes change at a midpoint at most: its ends, and all around that, are enough.
    ends = torch.arange(len(entries)) + first << lost
    x = neighbours(middle, 3)
    keys = torch.cat([ends, ends + (1 << lost) - 1, triton_ptx.key_of(x, signed)])
    x = triton_ptx.value_of(keys, signed)
    used = (x.abs() >= (2.0**-22 if signed else 2.0**-23)) & (x.abs() <= 1)
    keys, x = keys[used], x[used]
    codes = (entries[(keys >> lost) - first] + (keys << 24 - lost) & 0xFFFFFFFF) >> 24
    want = torch.bucketize(x, middle)
    assert torch.equal(codes, want if signed else want.clamp(min=1))
    # What is below the lowest key has the code of zero.
    assert (torch.bucketize(torch.tensor([-(2.0**-22), 2.0**-22]), midpoints(True)) == 127).all()
    assert torch.bucketize(torch.tensor(2.0**-23), midpoints(False)) == 0


def test_the_quotient_tests_every_moment_against_the_limit_of_its_block() -> None:
    # A thread's 8 elements may be of two blocks, of which one has a moment that is out of range.
    looked_at = re.findall(r"\$(\d+)", triton_ptx._QUOTIENT.value.split("@out bra slow;")[0])
    assert sorted(map(int, looked_at)) == [*range(8, 16), *range(40, 48)]


def test_a_huge_moment_beside_blocks_of_usual_ones(backend: str) -> None:
    grad = torch.ones(40, 16)
    grad[::3, 5] = -1e18
    case = make_step((tuple(grad.shape),), states=torch.uint8)
    case.grads[0] = grad
    other = case.copy()
    case.step()
    with use_backend("reference"):
        other.step()
    assert_same_bits(case.params[0], other.params[0])


@pytest.mark.full
def test_around_midpoints_at_many_scales(backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for exponent in range(-125, 63, 2):
        absmax = float((1 + torch.rand(1, generator=generator)) * 2.0**exponent)
        scale = torch.tensor(absmax)
        near = neighbours(midpoints(True) * scale, 3)
        check(near[near.abs() <= scale], absmax)
