"""Quantizes a large weight in bounded memory: in pieces where one call would need a workspace."""

from __future__ import annotations

from collections.abc import Callable

import torch

from feinwerk.backends import serving

# Elements quantized per call where a call needs a workspace, which this bounds whatever the size of
# the weight. Multiples of every blocksize, so blocks are never cut. On a GPU each call also costs
# launches and a wait, which are dear beside 65,536 elements.
_SLAB = 1 << 16
_SLAB_ON_GPU = 1 << 22


def quantize_in_slabs(
    weight: torch.Tensor,
    blocksize: int,
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the flattened weight in one call if that needs no workspace, else slab by slab."""
    count = weight.numel()
    backend, _ = serving("nf4_quantize", weight.device.type)
    in_place = backend != "reference" and weight.is_contiguous()
    slab = _SLAB_ON_GPU if weight.is_cuda else _SLAB
    if count <= slab or in_place or weight.is_meta:
        return quantize(weight)
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-count // blocksize), dtype=torch.float32, device=weight.device)
    for start in range(0, count, slab):
        codes, scales = quantize(_flat_range(weight, start, min(start + slab, count)))
        packed[start // 2 : start // 2 + codes.numel()] = codes
        absmax[start // blocksize : start // blocksize + scales.numel()] = scales
    return packed, absmax


def _flat_range(weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Elements start..stop of the flattened weight; copies only these when it is not contiguous."""
    if weight.is_contiguous() or weight.dim() == 1:
        return weight.reshape(-1)[start:stop]
    row = weight[0].numel()
    first = start // row
    rows = weight[first : -(-stop // row)].reshape(-1)
    return rows[start - first * row : stop - first * row]
