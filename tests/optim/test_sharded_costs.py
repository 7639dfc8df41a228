"""A step of ShardedAdamW costs what it should: bytes sent by each rank, bytes of its states."""

from __future__ import annotations

import sys

import pytest

from tests.optim import sharded_costs
from tests.optim.processes import run_ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts bytes by Linux's tcp_info")


def test_costs_of_four_ranks() -> None:
    results = run_ranks(sharded_costs.costs, 4, timeout=120)
    for found in results:
        # A ring: the measure itself is right to a percent.
        count, sent, _ = found.pop("all-reduce")
        assert 2 * count * 3 / 4 * 4 <= sent <= 2 * count * 3 / 4 * 4 * 1.02
        kept, whole = found.pop("memory with stage 2")
        assert kept == whole / 4
        for name, (count, sent, states) in found.items():
            # 2 P (N - 1) / N elements of 4 bytes, and some hundred bytes of agreement.
            elements = 2 * count * 3 / 4
            assert elements <= sent / 4 <= 1.02 * elements + 1000, name
            limit = 0.07 if "matrices" in name else 0.08
            assert states <= limit * 8 * count, (name, states / (8 * count))
    for name in results[0]:
        # Nobody holds a state twice, and all of them together hold all.
        count = results[0][name][0]
        assert sum(found[name][2] for found in results) >= 2 * count
