"""nf4_quantize: check, schema and the public function."""

from __future__ import annotations

import torch

from feinwerk import _checks
from feinwerk._library import register_op
from feinwerk.ops.nf4_quantize import cpp, reference


def _check(
    weight: torch.Tensor,
    *,
    blocksize: int = 64,
    rule: str = "cpu",
    allow_non_finite: bool = False,
) -> None:
    _checks.floating("nf4_quantize", "weight", weight)
    if weight.numel() < 1:
        _checks.reject(
            ValueError, "nf4_quantize", "weight", "have at least one element", tuple(weight.shape)
        )
    _checks.blocksize("nf4_quantize", blocksize)
    _checks.rule("nf4_quantize", rule)


def _fake(
    weight: torch.Tensor,
    *,
    blocksize: int = 64,
    rule: str = "cpu",
    allow_non_finite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    count = weight.numel()
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device=weight.device)
    blocks = (count + blocksize - 1) // blocksize
    return packed, torch.empty(blocks, dtype=torch.float32, device=weight.device)


_OP = register_op(
    "nf4_quantize",
    '(Tensor weight, *, int blocksize=64, str rule="cpu", bool allow_non_finite=False)'
    " -> (Tensor, Tensor)",
    check=_check,
    reference=reference.nf4_quantize,
    cpp=cpp.nf4_quantize,
    fake=_fake,
    triton="feinwerk.ops.nf4_quantize.triton",
)


def nf4_quantize(
    weight: torch.Tensor,
    *,
    blocksize: int = 64,
    rule: str = "cpu",
    allow_non_finite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight to 4-bit NF4 codes, bit for bit as bitsandbytes does.

    With x the flattened weight in fp32, block b holding elements b * blocksize onwards:

        absmax[b] = max |x_i| over block b
        code_i    = number of thresholds strictly below x_i * (1 / absmax[b])
        packed[j] = code_{2j} << 4 | code_{2j+1}

    `rule="cpu"` takes bitsandbytes' CPU decisions (the partial last block divides), `rule="cuda"`
    takes CUDA's thresholds and its zero and NaN rules with an exact reciprocal. Most users want
    `NF4Weight.from_dense`, which also compresses absmax.

    Args:
        weight: any shape, fp32, bf16 or fp16, at least one element.
        blocksize: elements per absmax: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
        rule: "cpu" or "cuda".
        allow_non_finite: quantize NaN and infinity as bitsandbytes does instead of raising.

    Returns:
        packed, uint8 [ceil(numel / 2)], the even element in the high nibble; and
        absmax, fp32 [ceil(numel / blocksize)].

    Raises:
        TypeError: if `weight` is not a tensor of one of the three dtypes.
        ValueError: if `weight` is empty, `blocksize` or `rule` is unknown, or `weight` holds NaN
            or infinity and `allow_non_finite` is False.

    Source:
        QLoRA (arXiv 2305.14314), section 3; docs/format.md, "Rules".

    Example:
        >>> packed, absmax = nf4_quantize(torch.randn(128, 96))
        >>> packed.shape, absmax.shape
        (torch.Size([6144]), torch.Size([192]))
    """
    _checks.tensor("nf4_quantize", "weight", weight)
    packed, absmax = _OP(
        weight.detach(), blocksize=blocksize, rule=rule, allow_non_finite=allow_non_finite
    )
    return packed, absmax
