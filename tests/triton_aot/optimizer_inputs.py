"""Inputs of the optimizer's ops."""

from __future__ import annotations

import torch

from tests.triton_aot.meta_tensors import BF16, DTYPES, FP32, Rows, meta

SHAPES = ((4096, 16), (16, 4096), (4099,), (31, 97), (1024, 1024), (3, 20000))


def adamw_step() -> Rows:
    # name, dtype of parameters, gradients and states, remainders, seed, scalars, everywhere
    table = (
        ("fp32", FP32, FP32, FP32, False, False, False, True),
        ("8-bit", FP32, FP32, torch.uint8, False, False, False, True),
        ("8-bit, bf16 gradients", FP32, BF16, torch.uint8, False, False, True, False),
        ("8-bit, stochastic", BF16, BF16, torch.uint8, False, True, False, True),
        ("8-bit, remainders", BF16, BF16, torch.uint8, True, False, False, False),
        ("bf16 states", FP32, FP32, BF16, False, False, True, False),
        ("bf16 states, stochastic", BF16, BF16, BF16, False, True, True, False),
        ("fp32 states, stochastic", BF16, BF16, FP32, False, True, False, False),
        ("fp32 states, remainders", BF16, FP32, FP32, True, False, False, False),
        ("8-bit, blocks of 8192", FP32, FP32, torch.uint8, False, False, False, False),
        ("above 2^31", FP32, FP32, FP32, False, False, False, False),
        ("8-bit above 2^31", BF16, BF16, torch.uint8, False, True, False, False),
    )
    for name, param, grad, state, remainders, seed, scalars, everywhere in table:
        shapes: tuple[tuple[int, ...], ...] = SHAPES
        if "above" in name:
            shapes = ((2**31 + 1000,) if state is FP32 else (2**16, 2**15 + 1),)
        size = 8192 if "8192" in name else 256
        blocks = [(shape[0] if len(shape) > 1 else 1) * -(-shape[-1] // size) for shape in shapes]
        absmaxes = [meta(count) for count in blocks] if state is torch.uint8 else []
        args = (
            [meta(*shape, dtype=param) for shape in shapes],
            [meta(*shape, dtype=grad) for shape in shapes],
            [meta(*shape, dtype=state) for shape in shapes],
            [meta(*shape, dtype=state) for shape in shapes],
            absmaxes,
            [each.clone() for each in absmaxes],
            [meta(*shape, dtype=torch.int16) for shape in shapes] if remainders else [],
            [3] * len(shapes), list(range(len(shapes))), [0] * len(shapes),
            meta(dtype=torch.int64) if seed else None,
            *((meta(), meta(), meta()) if scalars else (None, None, None)),
        )  # fmt: skip
        options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
        yield name, args, {**options, "blocksize": size, "maximize": scalars}, everywhere


def square_sum() -> Rows:
    shapes = ((4096, 16), (16, 4096), (4099,), (31, 97), (3, 200000))
    for dtype in DTYPES:
        yield str(dtype), ([meta(*s, dtype=dtype) for s in shapes],), {}, dtype is BF16
    for shape in ((2**16, 2**15 + 1), (2**31 + 1000,)):
        yield f"{shape}, above 2^31", ([meta(*shape, dtype=BF16)],), {}, False
    yield "mixed", ([meta(31, 97, dtype=dtype) for dtype in DTYPES],), {}, False
