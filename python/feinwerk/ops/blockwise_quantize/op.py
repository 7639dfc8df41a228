"""blockwise_quantize: check, schema and the public function."""

from __future__ import annotations

import torch

from feinwerk import _checks
from feinwerk._library import register_op
from feinwerk.ops.blockwise_quantize import cpp, reference


def _check(
    x: torch.Tensor,
    codebook: torch.Tensor,
    *,
    blocksize: int = 256,
    center: bool = False,
    rule: str = "cpu",
    layout: str = "flat",
) -> None:
    if x.dtype is not torch.float32:
        _checks.reject(TypeError, "blockwise_quantize", "x", "be torch.float32", x.dtype)
    if x.numel() < 1:
        _checks.reject(
            ValueError, "blockwise_quantize", "x", "have at least one element", tuple(x.shape)
        )
    _checks.buffer("blockwise_quantize", "codebook", codebook, torch.float32, 256, x.device)
    _checks.positive("blockwise_quantize", "blocksize", blocksize)
    _checks.rule("blockwise_quantize", rule)
    _checks.layout("blockwise_quantize", layout)


def _fake(
    x: torch.Tensor,
    codebook: torch.Tensor,
    *,
    blocksize: int = 256,
    center: bool = False,
    rule: str = "cpu",
    layout: str = "flat",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, length = _checks.rows_of(x.shape, layout)
    blocks = (length + blocksize - 1) // blocksize
    shape = (rows, blocks) if layout == "rows" else (blocks,)
    return (
        torch.empty(x.shape, dtype=torch.uint8, device=x.device),
        torch.empty(shape, dtype=torch.float32, device=x.device),
        torch.empty((), dtype=torch.float32, device=x.device),
    )


_OP = register_op(
    "blockwise_quantize",
    "(Tensor x, Tensor codebook, *, int blocksize=256, bool center=False, "
    'str rule="cpu", str layout="flat") -> (Tensor, Tensor, Tensor)',
    check=_check,
    reference=reference.blockwise_quantize,
    cpp=cpp.blockwise_quantize,
    fake=_fake,
    triton="feinwerk.ops.blockwise_quantize.triton",
)


def blockwise_quantize(
    x: torch.Tensor,
    codebook: torch.Tensor,
    *,
    blocksize: int = 256,
    center: bool = False,
    rule: str = "cpu",
    layout: str = "flat",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize fp32 values to 8-bit codes into a codebook, block by block.

        offset    = mean(x) if center else 0
        absmax[b] = max |x_i - offset| over block b
        code_i    = nearest entry of codebook to (x_i - offset) * (1 / absmax[b])

    `rule="cpu"` finds the code as bitsandbytes does on CPU, through 65,536 bins; `rule="cuda"`
    takes the exact nearest, ties to the lower code. It is the second level of double quantization
    (with `center=True` and blocks of 256) and serves 8-bit optimizer states.

    The mean has one order of additions, that of torch on one x86 thread, whatever the number of
    threads; docs/ops/blockwise_quantize.md writes it out. NaN is left out of absmax and takes the
    first code; a block of zeros takes code 0.

    With `layout="rows"` a block never crosses a row (dimension 0; a vector is one row): whatever
    rows are quantized together, the codes are the same.

    Args:
        x: fp32, any shape, at least one element.
        codebook: fp32 [256], ascending, contiguous; see `feinwerk.codebook.dynamic_map`.
        blocksize: elements per absmax, any positive number.
        center: subtract the mean first.
        rule: "cpu" or "cuda".
        layout: "flat", blocks over the flattened x, or "rows".

    Returns:
        codes, uint8 like x; absmax, fp32 [ceil(numel / blocksize)], or with rows
        [rows, ceil(row / blocksize)]; offset, fp32 0-dim.

    Raises:
        TypeError: if `x` or `codebook` is not fp32.
        ValueError: if `x` is empty, `codebook` has not 256 entries or lives on another device, or
            `blocksize`, `rule` or `layout` is not allowed.

    Source:
        8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), section 2; QLoRA
        (arXiv 2305.14314), section 3, "Double Quantization".

    Example:
        >>> from feinwerk.codebook import dynamic_map
        >>> codes, absmax, offset = blockwise_quantize(torch.randn(1000), dynamic_map())
        >>> codes.dtype, absmax.shape
        (torch.uint8, torch.Size([4]))
    """
    _checks.tensor("blockwise_quantize", "x", x)
    _checks.tensor("blockwise_quantize", "codebook", codebook)
    codes, absmax, offset = _OP(
        x.detach(), codebook, blocksize=blocksize, center=center, rule=rule, layout=layout
    )
    return codes, absmax, offset
