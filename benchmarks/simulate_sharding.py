"""Simulates fine-tunes of 7 B and 70 B parameters on 1 to 1,024 ranks: memory and waiting.

Bytes come from the shipped code: `feinwerk.plan`, whose states are `optim.state.new_state`'s and
whose sections are `optim.buckets.make_buckets`'. Time is a model: layers take FLOP / (peak x
efficiency), links as in links.py, and one stream of transfers beside one of computation:

```
   compute   forward ────────> backward  L  L-1  ...  1 │            │ step b0  step b1 ...
   stage 1,2                        reduce-scatter b0 b1 ...  bn ──>│     gather b0  gather b1 ...
   stage 3   gather 1 2 ... L   gather L L-1 ... 1, reduce-scatter L ... 1
```
Exposed is what the step takes longer than its computation.

python -m benchmarks.simulate_sharding             writes benchmarks/results/simulation.json
python -m benchmarks.simulate_sharding --docs      renders its tables and plot from that file
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.links import NETWORKS, Network
from feinwerk.optim.buckets import Bucket, make_buckets
from feinwerk.plan import Settings, moments, resident
from feinwerk.plan.architecture import Architecture, architecture
from feinwerk.plan.workspace import Workspace

RESULTS = Path(__file__).resolve().parent / "results" / "simulation.json"
WORLD_SIZES = tuple(2**i for i in range(11))
MODELS = ("llama-2-7b", "llama-2-70b")
METHODS = ("full", "lora", "qlora", "qdora")
STAGES, STATE_BITS = (1, 2, 3), (8, 32)


@dataclass(frozen=True)
class Machine:
    """What every rank computes with, and the work it has.

    Attributes:
        tflops: peak of bf16 products, dense.
        efficiency: share of it that a model's layers reach.
        memory_gbps: GB/s that the optimizer's step moves.
        seq: tokens of the one sequence of a rank.
        r: rank of the adapters.
        bucket_mb: ShardedAdamW's.
    """

    tflops: float = 989.0
    efficiency: float = 0.4
    memory_gbps: float = 2680.0
    seq: int = 4096
    r: int = 16
    bucket_mb: float = 25.0


ASSUMPTIONS = (
    "Ranks: H100, 989 TFLOP/s in bf16 at 40 %, 3.35 TB/s of memory at 80 % in the optimizer's "
    "step.",
    "Work: one sequence of 4,096 tokens a rank and step (weak scaling), no accumulation, "
    "checkpointing of every layer, sdpa; FLOP of products and attention only, decoding NF4 not "
    "counted.",
    "Adapters: r = 16 in fp32 on every Linear but the head. Full fine-tunes: bf16 parameters with "
    "a 16-bit remainder, gradients in bf16.",
    "Links: nodes of 8. Within: NVLink, 360 GB/s a rank and direction, 2.5 us a hop. Between: "
    "InfiniBand, 360 GB/s a node (8 x 400 Gb/s at 90 %), 6 us; or Ethernet, 11.25 GB/s a node "
    "(100 Gb/s at 90 %), 25 us.",
    "Collectives: rings of N - 1 hops; every rank sends (N - 1) / N of the padded buffer. One "
    "transfer at a time, in the order of the buckets; nothing slows computation down beside it.",
    "Stages 1 and 2: ShardedAdamW, buckets of 25 MiB; the step starts when all gradients are "
    "reduced, and gathers a bucket while the next ones are stepped, not beside the next forward.",
    "Stage 3: fully_shard on every layer and on the rest; one layer is gathered ahead, and anew "
    "in the backward.",
    "Memory: that of rank 0, which has the most rows; weights, adapters, gradients, states, "
    "NCCL's buffers, gathered weights, activations and loss, at their peak. Workspace of kernels, "
    "CUDA context and gaps of the allocator are left out.",
)


@functools.cache
def model_of(name: str) -> Architecture:
    """The architecture of a preset."""
    return architecture(name)


def settings_of(method: str, stage: int, bits: int, world_size: int, machine: Machine) -> Settings:
    """What is planned for."""
    return Settings(
        method=method, r=machine.r, batch=1, seq=machine.seq, world_size=world_size,
        stage=stage if world_size > 1 else 0, state_bits=bits, checkpointing=True,
        bucket_mb=machine.bucket_mb, device="cuda",
    )  # fmt: skip


def memory(model: Architecture, settings: Settings) -> dict[str, int]:
    """Bytes of rank 0, by use; `peak` is all of it at its most."""
    transfers = resident.transfers(model, settings)
    found = moments.moments(model, settings, transfers, Workspace())
    highest = max(found, key=lambda moment: moment.total)
    adapters = resident.adapters(model, settings) if settings.adapted else 0
    parts = {
        "weights": resident.weights(model, settings) + adapters,
        "states": resident.states(model, settings),
        "gradients": highest.gradients + transfers.sums,
        "buffers": transfers.buffers + highest.sent + highest.gathered,
        "activations": highest.activations + highest.loss + highest.temporaries,
    }
    return {**parts, "peak": sum(parts.values())}


@dataclass(frozen=True)
class Work:
    """Seconds of computation of one step on one rank.

    Attributes:
        forward: of one layer.
        backward: of one layer, its recomputation included.
        head: of the head, forward and backward.
        step: of the optimizer.
    """

    forward: float
    backward: float
    head: float
    step: float

    def total(self, layers: int) -> float:
        """Of the whole step."""
        return layers * (self.forward + self.backward) + self.head + self.step


def work(model: Architecture, settings: Settings, machine: Machine) -> Work:
    """Return the seconds of a step's computation."""
    speed = machine.tflops * 1e12 * machine.efficiency
    M, T = settings.tokens, settings.seq
    products = 2.0 * M * sum(m.N * m.K for m in model.linears)
    attention = 2.0 * M * T * model.heads * model.head_dim  # causal: half of two products
    adapters = 2.0 * M * sum(t.numel for t in resident.adapter_tensors(model, settings, 0))
    weights_too = 2.0 if not settings.adapted else 1.0  # gradients of x, and of W where trained
    forward = products + attention + adapters
    backward = weights_too * products + 2 * attention + 2 * adapters
    head = 2.0 * M * model.vocab_size * model.hidden_size * (1 + weights_too)
    return Work(
        forward / speed, (backward + forward) / speed, head / speed,
        step_bytes(model, settings) / (machine.memory_gbps * 1e9),
    )  # fmt: skip


def step_bytes(model: Architecture, settings: Settings) -> int:
    """Bytes that the optimizer's step reads and writes: parameters and states twice, gradients."""
    size = resident.trained_size(settings)
    tensors = resident.trained_tensors(model, settings)
    numel = sum(resident.local_numel(tensor, settings) for tensor in tensors)
    gradient = size if settings.stage in (0, 3) else resident.FP32
    return 2 * resident.states(model, settings) + numel * (2 * size + gradient)


@dataclass(frozen=True)
class Timing:
    """One step: seconds, and what a rank sends.

    Attributes:
        compute: what the computation takes.
        exposed: what the step takes longer.
        communication: what all transfers take, one after the other.
        sent: bytes that one rank sends.
    """

    compute: float
    exposed: float
    communication: float
    sent: float


class Stream:
    """Transfers, one after the other, each at the earliest when it is ready."""

    def __init__(self, network: Network, world_size: int) -> None:
        """Free from the beginning."""
        self.network, self.world_size = network, world_size
        self.free = self.busy = self.sent = 0.0

    def send(self, ready: float, total_bytes: float) -> float:
        """Send a buffer; return when it has arrived."""
        seconds = self.network.ring(total_bytes, self.world_size)
        self.free = max(self.free, ready) + seconds
        self.busy += seconds
        self.sent += total_bytes * (self.world_size - 1) / self.world_size
        return self.free


@functools.lru_cache(maxsize=16)
def buckets_of(model: Architecture, settings: Settings) -> tuple[list[Bucket], list[int]]:
    """The buckets of ShardedAdamW, and of each parameter the layer (0: outside) it belongs to."""
    tensors = list(resident.trained_tensors(model, settings))
    sizes = [resident.trained_size(settings)] * len(tensors)
    capacity = int(settings.bucket_mb * 2**20)
    shapes = [tensor.shape for tensor in tensors]
    buckets = make_buckets(shapes, [0] * len(shapes), sizes, settings.world_size, capacity)
    return buckets, [_when(tensor, model.layers) for tensor in tensors]


def _when(tensor: resident.Tensor, layers: int) -> int:
    """How many layers' backward have to be over before its gradient is there."""
    if tensor.layer is not None:
        return layers - tensor.layer
    return layers if tensor.name == "embed_tokens" else 0


def replicated(
    model: Architecture, settings: Settings, network: Network, machine: Machine
) -> Timing:
    """Stages 1 and 2."""
    done = work(model, settings, machine)
    size, N = resident.trained_size(settings), settings.world_size
    buckets, when = buckets_of(model, dataclasses.replace(settings, state_bits=8))
    stream = Stream(network, N)
    begun = model.layers * done.forward + done.head
    for bucket in buckets:
        last = max(when[slot.index] for slot in bucket.slots)
        stream.send(begun + last * done.backward, bucket.section * N * size)
    now = begun + model.layers * done.backward
    now = stream.free = max(now, stream.free)
    numel = sum(bucket.local_numel(0) for bucket in buckets)
    for bucket in buckets:
        now += done.step * bucket.local_numel(0) / numel
        stream.send(now, bucket.section * N * size)
    compute = done.total(model.layers)
    return Timing(compute, max(now, stream.free) - compute, stream.busy, stream.sent)


def fully_sharded(
    model: Architecture, settings: Settings, network: Network, machine: Machine
) -> Timing:
    """Stage 3."""
    done = work(model, settings, machine)
    sizes, stream = resident.transfers(model, settings), Stream(network, settings.world_size)
    arrived = stream.send(0.0, sizes.root)
    coming = stream.send(0.0, sizes.layer)
    now = arrived
    for index in range(model.layers):
        now = max(now, coming)
        if index + 1 < model.layers:
            coming = stream.send(now, sizes.layer)
        now += done.forward
    now += done.head
    coming = stream.send(now - done.head, sizes.layer)  # the last layer's again
    for index in range(model.layers):
        now = max(now, coming)
        if index + 1 < model.layers:
            coming = stream.send(now, sizes.layer)
        now += done.backward
        stream.send(now, sizes.reduced)
    stream.send(now, sizes.reduced_root)
    now = max(now, stream.free) + done.step
    compute = done.total(model.layers)
    return Timing(compute, now - compute, stream.busy, stream.sent)


def timing(model: Architecture, settings: Settings, network: Network, machine: Machine) -> Timing:
    """One step of a rank."""
    if settings.world_size == 1:
        return Timing(work(model, settings, machine).total(model.layers), 0.0, 0.0, 0.0)
    way = fully_sharded if settings.stage == 3 else replicated
    return way(model, settings, network, machine)


def zero_bytes(
    shapes: Sequence[tuple[int, int]], world_size: int, stage: int, *, K: float
) -> float:
    """Bytes of model states of rank 0 as ZeRO counts them, over the shipped row shards.

    Args:
        shapes: of the parameters.
        world_size: number of ranks.
        stage: 0 to 3.
        K: bytes an element of the optimizer's states; parameters and gradients have 2.
    """
    kinds = [0] * len(shapes)
    buckets = make_buckets(shapes, kinds, [2] * len(shapes), world_size, 1 << 62)
    whole = sum(bucket.numel for bucket in buckets)
    local = sum(bucket.local_numel(0) for bucket in buckets)
    parameters = local if stage == 3 else whole
    gradients = local if stage >= 2 else whole
    states = local if stage >= 1 else whole
    return 2 * parameters + 2 * gradients + K * states


def records(machine: Machine, world_sizes: Sequence[int] = WORLD_SIZES) -> Iterator[dict[str, Any]]:
    """Every case: memory once, timing on each network."""
    for name in MODELS:
        for method in METHODS:
            for stage in STAGES:
                for bits in STATE_BITS:
                    for N in world_sizes:
                        settings = settings_of(method, stage, bits, N, machine)
                        model = model_of(name)
                        yield {
                            "model": name, "method": method, "stage": stage, "state_bits": bits,
                            "world_size": N, "memory": memory(model, settings),
                            "timing": {
                                network.name: asdict(timing(model, settings, network, machine))
                                for network in NETWORKS
                            },
                        }  # fmt: skip


# The paper's model of 7.5 billion parameters, in matrices as a transformer has them.
ZERO_SHAPES = [(30_000, 2_500)] * 100
ZERO_WORLD_SIZES = (1, 4, 16, 64, 256, 1024)


def simulate(machine: Machine) -> dict[str, Any]:
    """The whole results file."""
    zero = {
        str(N): [zero_bytes(ZERO_SHAPES, N, stage, K=12) for stage in range(4)]
        for N in ZERO_WORLD_SIZES
    }
    return {
        "assumptions": list(ASSUMPTIONS), "machine": asdict(machine),
        "networks": [network.describe() for network in NETWORKS],
        "zero": zero, "cases": list(records(machine)),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the simulation."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate_sharding")
    parser.add_argument("--docs", action="store_true", help="render tables and plot, no simulation")
    options = parser.parse_args(argv)
    if not options.docs:
        data = simulate(Machine())
        text = json.dumps(data, separators=(",", ":"))
        RESULTS.write_text(text.replace('{"model"', '\n{"model"') + "\n", encoding="utf-8")
        print(f"{len(data['cases'])} cases in {RESULTS}")
        return
    from benchmarks import plot_sharding, report_sharding

    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    report_sharding.render(data)
    plot_sharding.draw(data)


if __name__ == "__main__":
    main()
