"""Weights on the device, quantized by the reference, in as many copies as the L2 cache asks for."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.gpu.device import Device
from benchmarks.gpu.timing import copies
from feinwerk import NF4Weight, blockwise_quantize, nf4_quantize, testing
from feinwerk.codebook import dynamic_map

BLOCKSIZE = 64


def make_weight(
    device: torch.device, N: int, K: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> NF4Weight:
    """A normal weight in NF4 with double quantization; no kernel of ours has a part in it."""
    generator = torch.Generator(device).manual_seed(seed + N + K)
    dense = torch.randn(N, K, generator=generator, device=device) / K**0.5
    codebook = dynamic_map(device=device)
    with testing.use_backend("reference"), torch.no_grad():
        packed, absmax = nf4_quantize(dense, blocksize=BLOCKSIZE)
        codes, nested_absmax, offset = blockwise_quantize(absmax, codebook, center=True)
    return NF4Weight(
        packed, codes, (N, K), BLOCKSIZE, dtype, nested_absmax, codebook, offset.reshape(())
    )


def another(weight: NF4Weight) -> NF4Weight:
    """The same weight in memory of its own."""
    return dataclasses.replace(
        weight, packed=weight.packed.clone(), absmax=weight.absmax.clone(),
        nested_absmax=None if weight.nested_absmax is None else weight.nested_absmax.clone(),
    )  # fmt: skip


def nf4_copies(device: Device, weight: NF4Weight) -> list[NF4Weight]:
    """The weight and its copies, beyond the cache together."""
    return [weight, *(another(weight) for _ in range(copies(device, weight.nbytes) - 1))]


def dense_copies(device: Device, weight: torch.Tensor) -> list[torch.Tensor]:
    """A dense weight and its copies, likewise."""
    return [weight, *(weight.clone() for _ in range(copies(device, weight.nbytes) - 1))]


def nested_of(weight: NF4Weight) -> tuple[torch.Tensor | None, ...]:
    """The tensors of double quantization, in the ops' order."""
    return (weight.nested_absmax, weight.nested_codebook, weight.nested_offset)
