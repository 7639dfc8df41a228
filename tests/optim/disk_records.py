"""Buckets of every kind for the tests of states on disk, and what is done to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from feinwerk.optim.disk_states import DiskStates

BUCKETS = [
    {
        "0.step": (torch.float32, ()),
        "0.exp_avg_codes": (torch.uint8, (5, 300)),
        "0.exp_avg_absmax": (torch.float32, (5, 2)),
        "0.param_remainder": (torch.int16, (5, 300)),
    },
    {"1.exp_avg": (torch.bfloat16, (3, 7)), "2.exp_avg": (torch.float32, (0, 9))},
    {"3.exp_avg_sq": (torch.float32, (70000,))},
    {},
    {"4.step": (torch.float32, ())},
]


def records(seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for bucket in BUCKETS:
        record = {}
        for name, (dtype, shape) in bucket.items():
            values = torch.randint(0, 250, shape, generator=generator)
            record[name] = values.to(dtype)
        made.append(record)
    return made


def content(states: DiskStates) -> list[dict[str, torch.Tensor]]:
    return [
        {name: tensor.clone() for name, tensor in states.tensors(i).items()}
        for i in range(len(states.layout.records))
    ]


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return all(
        list(x) == list(y) and all(torch.equal(x[n], y[n]) and x[n].dtype == y[n].dtype for n in x)
        for x, y in zip(a, b, strict=True)
    )


def change(
    states: DiskStates, how: Callable[[torch.Tensor], object], order: Sequence[int] | None = None
) -> None:
    """One step that does the same to every tensor."""
    with states.step(order) as buckets:
        for _, tensors in buckets:
            for tensor in tensors.values():
                how(tensor)


def reopened(directory: Path, **changes: Any) -> DiskStates:
    given = {"buckets": BUCKETS, "identity": "rank 0 of 1", **changes}
    return DiskStates(directory, given.pop("buckets"), reopen=True, **given)
