"""The gradient norm and the clip coefficient where the limbs are, so that a step need not wait.

The same bits as `norm_of` and `clip_coefficient` give on the host, in some forty small operations:

```
   limbs, without carries ── carries ──> digits below 2^30 ── four from the highest on ──> 62 bits
                                                              the others: one sticky bit
   62 bits and a power of two ── rounded once to fp64 ──> root ──> coefficient
```
"""

from __future__ import annotations

import functools

import torch

from feinwerk.optim.gradient_norm import LIMB_BITS, LOWEST, clip_coefficient, norm_of

_MASK = (1 << LIMB_BITS) - 1
# Limbs grow by carries beyond the highest, and four digits are taken from the lowest on as well.
_ABOVE, _BELOW = 3, 4
_KEPT_BITS = 61
_POWERS = range(-200, 1000)


def norm_on_device(limbs: torch.Tensor) -> torch.Tensor:
    """Return `norm_of(limbs)` as a 0-dim fp64 tensor on their device, without waiting for it.

    On a GPU, whose fp64 root is the nearest; torch's on the CPU is off by an ulp now and then.

    Args:
        limbs: int64 [22], as `square_sum` gives them, or a sum of several.

    Example:
        >>> from feinwerk import square_sum
        >>> norm_on_device(square_sum([torch.tensor([3.0, 4.0])]))
        tensor(5., dtype=torch.float64)
    """
    norm = total_on_device(limbs[:-2]).sqrt() * 2.0 ** (LOWEST // 2)
    infinities, nans = limbs[-2], limbs[-1]
    norm = torch.where(infinities != 0, torch.inf, norm)
    return torch.where(nans != 0, torch.nan, norm)


def total_on_device(limbs: torch.Tensor) -> torch.Tensor:
    """Return the integer that limbs stand for, rounded once to fp64: a 0-dim tensor.

    Args:
        limbs: int64 [20], in base 2^30, lowest first, at least 0.

    Example:
        >>> total_on_device(torch.tensor([1, 2**31] + [0] * 18)) == 1 + 2**61
        tensor(True)
    """
    digits = _normalized(limbs)
    place = torch.arange(len(digits), device=limbs.device)
    highest = torch.where(digits != 0, place, _BELOW).amax()
    # gather: an index without dimensions would be read by the host.
    a, b, c, d = digits.gather(0, highest - place[:4])
    high, low = (a << LIMB_BITS) | b, (c << LIMB_BITS) | d
    # 61 bits or so remain, more than the 53 that rounding looks at; what is cut off sticks.
    length = torch.frexp(high.double())[1].long()
    shift = (_KEPT_BITS - length).clamp(1, 2 * LIMB_BITS)
    cut = 2 * LIMB_BITS - shift
    rest = low & ((torch.ones_like(cut) << cut) - 1)
    sticky = (rest != 0) | ((digits != 0) & (place < highest - 3)).any()
    kept = (high << shift) | (low >> cut) | sticky.long()
    exponent = LIMB_BITS * (highest - _BELOW - 1) - shift
    power = _powers(limbs.device).gather(0, (exponent - _POWERS.start).view(1))[0]
    total: torch.Tensor = kept.double() * power
    return total


def clip_coefficient_on_device(norm: torch.Tensor, max_grad_norm: float) -> torch.Tensor:
    """Return `clip_coefficient(norm, max_grad_norm)` as a 0-dim fp64 tensor on norm's device.

    Args:
        norm: 0-dim fp64.
        max_grad_norm: the bound.

    Example:
        >>> clip_coefficient_on_device(torch.tensor(4.0, dtype=torch.float64), 1.0)
        tensor(0.2500, dtype=torch.float64)
    """
    # A number over a tensor would be the tensor's reciprocal times the number: two roundings.
    coefficient = torch.full_like(norm, max_grad_norm) / (norm + 1e-6)
    return torch.where(coefficient > 1, 1.0, coefficient)


def _normalized(limbs: torch.Tensor) -> torch.Tensor:
    """Digits below 2^30 of the same number, with zeros below and room above."""
    digits = torch.nn.functional.pad(limbs, (_BELOW, _ABOVE))
    for _ in range(3):  # 2^63, 2^33 + 2^30, 2^30 + 7, and then 2^30 at most
        digits = (digits & _MASK) + (digits >> LIMB_BITS).roll(1)
    # A digit of 2^30 carries, and those of 2^30 - 1 above it pass that on.
    place = torch.arange(len(digits), device=digits.device)
    source = torch.where(digits != _MASK, place, -1).cummax(0).values
    carries = (source >= 0) & (digits.gather(0, source.clamp(min=0)) > _MASK)
    return (digits + carries.long().roll(1)) & _MASK


@functools.cache
def _powers(device: torch.device) -> torch.Tensor:
    """2^k, exact, for every k that occurs."""
    powers = [2.0**k for k in _POWERS]
    return torch.tensor(powers, dtype=torch.float64, device="cpu").to(device)


class Norm:
    """The norm of a step's gradients, which the host reads when it is asked for, and not before.

    Args:
        limbs: int64 [22], of the scaled gradients.
        grad_scale: one number that scaled them, or None.
    """

    def __init__(self, limbs: torch.Tensor, grad_scale: torch.Tensor | None) -> None:
        """Take what `reduced_square_sum` gave."""
        # The scaler changes its scale in place, after the step.
        self._limbs, self._grad_scale = limbs, None if grad_scale is None else grad_scale.clone()
        self._value: float | None = None

    def value(self) -> float:
        """The norm of the gradients without their scale."""
        if self._value is None:
            scale = 1.0 if self._grad_scale is None else float(self._grad_scale)
            self._value = norm_of(self._limbs) / scale
            self._grad_scale = None
        return self._value

    def clip_coefficient(self, max_grad_norm: float) -> torch.Tensor:
        """What clips the unscaled gradients, on the device of the limbs."""
        if self._limbs.device.type == "cpu":
            coefficient = clip_coefficient(self.value(), max_grad_norm)
            return torch.tensor(coefficient, dtype=torch.float64, device="cpu")
        norm = norm_on_device(self._limbs)
        if self._grad_scale is not None:
            norm = norm / self._grad_scale.to(norm.device, torch.float64, non_blocking=True)
        return clip_coefficient_on_device(norm, max_grad_norm)
