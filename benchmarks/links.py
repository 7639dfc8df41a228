"""Modelled links between ranks, and what a ring collective takes over them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Network:
    """Nodes of some ranks each: fast links within a node, slower ones between nodes.

    Attributes:
        name: of the network between nodes.
        node_size: ranks of a node.
        within_gbps: GB/s that a rank sends within its node, one direction.
        within_us: microseconds of one hop within a node.
        between_gbps: GB/s that all ranks of a node together send to other nodes.
        between_us: microseconds of one hop between nodes.
    """

    name: str
    node_size: int
    within_gbps: float
    within_us: float
    between_gbps: float
    between_us: float

    def bandwidth(self, world_size: int) -> float:
        """Bytes a second that pass through every place of a ring.

        There is a ring for each network card of a node; together they carry a node's traffic.
        """
        if world_size <= self.node_size:
            return self.within_gbps * 1e9
        return min(self.within_gbps, self.between_gbps) * 1e9

    def latency(self, world_size: int) -> float:
        """Seconds that a piece takes through the N - 1 hops of a ring."""
        nodes = -(-world_size // self.node_size)
        between = nodes - 1
        within = world_size - 1 - between
        return (within * self.within_us + between * self.between_us) * 1e-6

    def ring(self, total_bytes: float, world_size: int) -> float:
        """Seconds of a reduce-scatter or all-gather; an all-reduce is one of each.

        Args:
            total_bytes: of the whole buffer, all ranks' sections together.
            world_size: number of ranks, N. Each sends (N - 1) / N of the buffer.
        """
        if world_size == 1 or total_bytes == 0:
            return 0.0
        sent = total_bytes * (world_size - 1) / world_size
        return self.latency(world_size) + sent / self.bandwidth(world_size)

    def describe(self) -> dict[str, Any]:
        """The numbers, for the results file."""
        return asdict(self)


# 80 % of NVLink 4's 450 GB/s a direction; eight cards of 400 Gb/s a node or one of 100, at 90 %.
NETWORKS = (
    Network("InfiniBand", 8, within_gbps=360, within_us=2.5, between_gbps=360, between_us=6),
    Network("Ethernet", 8, within_gbps=360, within_us=2.5, between_gbps=11.25, between_us=25),
)
