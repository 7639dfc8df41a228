"""ShardedAdamW gives the bits of AdamW that gets the averaged gradients: any stage, any ranks."""

from __future__ import annotations

import pytest

from tests.optim import sharded_cases
from tests.optim.processes import run_ranks


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_bits_of_adamw(world_size: int) -> None:
    for rank, found in enumerate(run_ranks(sharded_cases.all_bits, world_size)):
        assert len(found) == 35
        assert not {case: what for case, what in found.items() if what}, f"rank {rank}"


def test_one_process_without_a_group() -> None:
    found = sharded_cases.all_bits(0, 1)
    assert not {case: what for case, what in found.items() if what}
