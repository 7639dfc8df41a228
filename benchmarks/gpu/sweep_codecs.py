"""One GPU: the fastest configurations of the NF4 codecs, each equal to the reference to the bit.

PYTHONPATH=python:. python3 -m benchmarks.gpu.sweep_codecs out.json [seconds]

Device time by CUDA graphs over buffers rotated beyond the L2 cache, as a share of a measured copy.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.device import Device
from benchmarks.gpu.limits import copy_rate
from benchmarks.gpu.timing import Contender, alone
from feinwerk.codebook import dynamic_map
from feinwerk.ops.blockwise_dequantize import triton as blockwise_decode
from feinwerk.ops.blockwise_quantize import reference as blockwise_law
from feinwerk.ops.blockwise_quantize import triton as blockwise_encode
from feinwerk.ops.nf4_dequantize import reference as decode_law
from feinwerk.ops.nf4_dequantize import triton as decode
from feinwerk.ops.nf4_embedding import triton as embedding
from feinwerk.ops.nf4_quantize import reference as encode_law
from feinwerk.ops.nf4_quantize import triton as encode

DEVICE = torch.device("cuda")
SHAPES = ((4096, 4096), (14336, 4096))
ROTATED = 192 << 20  # bytes that the buffers of a measurement hold together
Run = Callable[[], Any]


def milliseconds(runs: list[Run]) -> float:
    """Median device time of one run, the runs taken in turn."""
    return alone(Device(), Contender("run", runs))["us"] / 1e3


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    return torch.equal(got.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8))


def random_weight(count: int, nested: bool) -> tuple[torch.Tensor | None, ...]:
    """Random codes and scales of an NF4 weight, plain or double-quantized."""
    packed = torch.randint(256, (count // 2,), dtype=torch.uint8, device=DEVICE)
    blocks = count // 64
    if not nested:
        return packed, torch.rand(blocks, device=DEVICE) + 0.01, None, None, None
    codes = torch.randint(256, (blocks,), dtype=torch.uint8, device=DEVICE)
    scales = torch.rand(-(-blocks // 256), device=DEVICE) * 0.01
    offset = torch.tensor(0.05, device=DEVICE)
    return packed, codes, scales, dynamic_map(device=DEVICE), offset


def sweep_dequantize(copy: float, deadline: float) -> list[dict[str, Any]]:
    """Every configuration, to bf16."""
    cuts = ((256, 4), (512, 4), (1024, 4), (1024, 8), (2048, 8))
    choices = [decode.Choice(lookup, *cut) for lookup in ("table", "planes") for cut in cuts]
    choices.append(decode.Choice("select", 512, 4))
    results = []
    for rows, K in SHAPES:
        for nested in (False, True):
            count = rows * K
            size = count * 2 + count // 2
            sets = max(2, -(-ROTATED // size))
            tensors = [random_weight(count, nested) for _ in range(sets)]
            outs = [torch.empty(rows, K, dtype=torch.bfloat16, device=DEVICE) for _ in range(sets)]
            law = decode_law.nf4_dequantize(*tensors[0], shape=(rows, K), dtype=torch.bfloat16)
            moved = size + (count // 64 if nested else count // 16)
            for choice in choices:
                if time.monotonic() > deadline:
                    break

                runs = [_decoding(o, t, choice) for o, t in zip(outs, tensors, strict=True)]
                outs[0].fill_(torch.nan)
                runs[0]()
                exact = same(outs[0], law)
                ms = milliseconds(runs)
                results.append(
                    {"op": "nf4_dequantize", "shape": [rows, K], "nested": nested, "exact": exact,
                     "choice": list(choice), "ms": ms, "gbs": moved / ms / 1e6,
                     "share": moved / ms / 1e6 / copy}
                )  # fmt: skip
    return results


def _decoding(out: torch.Tensor, tensors: tuple[Any, ...], choice: decode.Choice) -> Run:
    flat = out.view(1, -1)
    return lambda: decode.dequantize_tile(
        flat, *tensors, K=flat.shape[1], row=0, column=0, blocksize=64, choice=choice
    )


def sweep_quantize(copy: float, deadline: float) -> list[dict[str, Any]]:
    """Every configuration, from bf16, both rules."""
    rows, K = SHAPES[-1]
    weights = [torch.randn(rows, K, device=DEVICE).bfloat16() for _ in range(2)]
    results = []
    for rule in ("cpu", "cuda"):
        law = encode_law.nf4_quantize(weights[0], rule=rule, allow_non_finite=True)
        for size, warps in ((4096, 4), (4096, 8), (8192, 4), (8192, 8), (16384, 8)):
            if time.monotonic() > deadline:
                break
            choice = encode.Choice(size, warps)
            options = {"rule": rule, "allow_non_finite": True, "choice": choice}
            got = encode.nf4_quantize(weights[0], **options)
            exact = all(same(left, right) for left, right in zip(got, law, strict=True))
            runs = [
                lambda w=w, options=options: encode.nf4_quantize(w, **options)  # type: ignore[misc]
                for w in weights
            ]
            ms = milliseconds(runs)
            moved = rows * K * (2 + 0.5 + 4 / 64)
            results.append(
                {"op": "nf4_quantize", "shape": [rows, K], "rule": rule, "exact": exact,
                 "choice": list(choice), "ms": ms, "gbs": moved / ms / 1e6,
                 "share": moved / ms / 1e6 / copy}
            )  # fmt: skip
    return results


def others(copy: float) -> list[dict[str, Any]]:
    """The second level of double quantization, its inverse, and an embedding."""
    results = []

    def add(op: str, exact: bool, run: Run, moved: float) -> None:
        ms = milliseconds([run])
        share = moved / ms / 1e6 / copy
        results.append({"op": op, "exact": exact, "ms": ms, "choice": [], "share": share})

    x = torch.rand(14336 * 64, device=DEVICE) + 0.1
    codebook = dynamic_map(device=DEVICE)
    got = blockwise_encode.blockwise_quantize(x, codebook, center=True)
    law = blockwise_law.blockwise_quantize(x.cpu(), dynamic_map(), center=True)
    exact = all(same(left.cpu(), right) for left, right in zip(got, law, strict=True))
    add(
        "blockwise_quantize 917504, center", exact,
        lambda: blockwise_encode.blockwise_quantize(x, codebook, center=True), x.numel() * 5.0,
    )  # fmt: skip
    codes, absmax, offset = got
    dense = blockwise_decode.blockwise_dequantize(codes, absmax, codebook, offset)
    want = codebook[codes.int()] * absmax.repeat_interleave(256)[: codes.numel()] + offset
    add(
        "blockwise_dequantize 917504", same(dense, want),
        lambda: blockwise_decode.blockwise_dequantize(codes, absmax, codebook, offset),
        x.numel() * 5.0,
    )  # fmt: skip
    table = random_weight(32000 * 4096, True)
    indices = torch.randint(32000, (8192,), device=DEVICE)
    sizes = {"N": 32000, "K": 4096, "dtype": torch.bfloat16}
    rows = embedding.nf4_embedding(indices, *table, **sizes)
    whole = decode_law.nf4_dequantize(*table, shape=(32000, 4096), dtype=torch.bfloat16)
    add(
        "nf4_embedding 8192 x 4096", same(rows, whole[indices]),
        lambda: embedding.nf4_embedding(indices, *table, **sizes), rows.numel() * 2.52,
    )  # fmt: skip
    return results


def main() -> None:
    """Measure, print the best few of each case, write all to the file named first."""
    begin = time.monotonic()
    limit = begin + float(sys.argv[2] if len(sys.argv) > 2 else 60)
    copy = copy_rate(Device())["copy_gbps"]
    print(f"{torch.cuda.get_device_name()}: copy {copy:.0f} GB/s")
    results = sweep_dequantize(copy, limit - 15) + sweep_quantize(copy, limit - 5) + others(copy)
    cases: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        case = " ".join(str(result.get(k, "")) for k in ("op", "shape", "nested", "rule"))
        cases.setdefault(case, []).append(result)
    for case, found in cases.items():
        wrong = [r["choice"] for r in found if not r["exact"]]
        print(f"{case}: {'WRONG BITS ' + str(wrong) if wrong else 'exact'}")
        for r in sorted(found, key=lambda r: r["ms"])[:4]:
            print(f"   {r['ms'] * 1000:8.1f} us  {r['share']:6.1%} of copy  {r['choice']}")
    data = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_gbs": copy,
        "seconds": time.monotonic() - begin,
        "results": results,
    }
    Path(sys.argv[1]).write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
