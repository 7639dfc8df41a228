"""AdamW beside its peers: one step in one process, and a training step over 2 ranks.

python -m benchmarks.optimizer            under 15 minutes on 2 idle cores; writes results and page
python -m benchmarks.optimizer --quick    8 M parameters only

Ours and a peer take turns, A B A B; the figure is the median of the pairwise ratios. Bytes on the
wire are those of the loopback device, moments those of the tensors that ranks hold.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from benchmarks import machine
from benchmarks.harness import Candidate, paired, ratio
from feinwerk.optim import AdamW

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "optimizer_benchmarks.md"
SIZES = {"8 M": [(2048, 4096)], "100 M": [(4096, 1024)] * 24}
BARS = {
    ("8-bit", "bitsandbytes 8-bit"): 20.0,
    ("8-bit", "torchao 8-bit, compiled"): 20.0,
    ("8-bit", "torch fused fp32"): 1.0,
    ("32-bit", "torch fused fp32"): 1.0,
    ("32-bit", "DeepSpeedCPUAdam"): 1.2,
}


def parameters(shapes: list[tuple[int, int]]) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return params


def ours(bits: int) -> Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]:
    return lambda params: AdamW(params, lr=1e-4, state_bits=bits)


def peers() -> Iterator[tuple[str, str, Callable[[list[torch.nn.Parameter]], Any]]]:
    """Whom ours is compared with: (ours, the peer's name, how to make it)."""

    def bitsandbytes(params: list[torch.nn.Parameter]) -> Any:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(params, lr=1e-4)

    def torchao(params: list[torch.nn.Parameter]) -> Any:
        from torchao.optim import AdamW8bit

        return AdamW8bit(params, lr=1e-4)

    def deepspeed(params: list[torch.nn.Parameter]) -> Any:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(params, lr=1e-4)

    def fused(params: list[torch.nn.Parameter]) -> Any:
        return torch.optim.AdamW(params, lr=1e-4, fused=True)

    yield "8-bit", "torch fused fp32", fused
    yield "32-bit", "torch fused fp32", fused
    yield "8-bit", "bitsandbytes 8-bit", bitsandbytes
    yield "8-bit", "torchao 8-bit, compiled", torchao
    yield "32-bit", "DeepSpeedCPUAdam", deepspeed


def steps(threads: int, sizes: list[str]) -> list[dict[str, Any]]:
    """One process with one number of threads: every peer at every size."""
    torch.set_num_threads(threads)
    records = []
    for size in sizes:
        for name, peer, make in peers():
            record: dict[str, Any] = {"size": size, "threads": threads, "ours": name, "peer": peer}
            records.append(record)
            try:
                mine = parameters(SIZES[size])
                theirs = parameters(SIZES[size])
                a, b = ours(8 if name == "8-bit" else 32)(mine), make(theirs)
                b.step()
            except Exception as error:  # a peer that cannot be had is named, with its reason
                record["missing"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                continue
            count = sum(p.numel() for p in mine)
            result = paired(
                Candidate("ours", [a.step]), Candidate("peer", [b.step]),
                seconds=8.0, min_rounds=5, max_rounds=41,
            )  # fmt: skip
            record["ratio"] = result.ratio("peer").as_dict()
            for who in ("ours", "peer"):
                record[f"{who} ns"] = result.times(who)["median"] / count * 1e9
            print(json.dumps(record), file=sys.stderr, flush=True)
            del mine, theirs, a, b
            gc.collect()
    return records


def wire_bytes() -> int:
    """Bytes that the loopback device has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == "lo":
            return int(rest.split()[8])
    return 0


def stack() -> torch.nn.Module:
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for _ in range(8):
        layers += [torch.nn.Linear(1024, 1024), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers)


def ranks(rank: int, world_size: int, store: str, out: str) -> None:
    """A training step in turn with DDP + fused AdamW and with ZeroRedundancyOptimizer."""
    import torch.distributed as dist
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    from feinwerk.optim import ShardedAdamW

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    fused = {"lr": 1e-4, "fused": True}
    models = {name: stack() for name in ("8-bit", "32-bit")}
    sides: dict[str, tuple[torch.nn.Module, Any]] = {
        f"stage 2, {name}": (m, ShardedAdamW(m.parameters(), lr=1e-4, state_bits=int(name[:-4])))
        for name, m in models.items()
    }
    for name in ("DDP + torch fused AdamW", "DDP + ZeroRedundancyOptimizer"):
        model = DistributedDataParallel(stack())
        if "Zero" in name:
            optimizer: Any = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **fused)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), **fused)
        sides[name] = model, optimizer
    x = torch.randn(32, 1024, generator=torch.Generator().manual_seed(rank))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    sent: dict[str, list[int]] = {name: [] for name in sides}
    order = list(sides)
    for turn in range(34):
        for name in order[turn % 4 :] + order[: turn % 4]:
            model, optimizer = sides[name]
            dist.barrier()
            before, start = wire_bytes(), time.perf_counter()
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            dist.barrier()
            if turn > 3:
                seconds[name].append(time.perf_counter() - start)
                sent[name].append(wire_bytes() - before)
    if rank == 0:
        count = sum(p.numel() for p in models["8-bit"].parameters())
        record = {"parameters": count, "ranks": world_size, "seconds": seconds, "sent": sent}
        Path(out).write_text(json.dumps(record))
    dist.destroy_process_group()


def held(rank: int, world_size: int, store: str, out: str) -> None:
    """Bytes of the moments that one of 4 ranks holds, against 8 bytes a parameter."""
    import torch.distributed as dist

    from feinwerk.optim import ShardedAdamW
    from feinwerk.optim.state import to_local

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    cases = {
        "matrices, rows of 1024": [(1024, 1024)] * 2,
        "matrices, rows of 256": [(1024, 256)] * 2,
        "r=8 adapters of 2048 x 2048": [(8, 2048), (2048, 8)] * 4,
    }
    shares = {}
    for name, shapes in cases.items():
        params = parameters(shapes)
        optimizer = ShardedAdamW(params, lr=1e-4)
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        mine = sum(
            to_local(value).nbytes
            for state in optimizer.state.values()
            for key, value in state.items()
            if key.startswith("exp_avg")
        )
        most = torch.tensor([mine])
        dist.all_reduce(most, dist.ReduceOp.MAX)
        shares[name] = int(most) / (8 * sum(p.numel() for p in params))
    if rank == 0:
        Path(out).write_text(json.dumps(shares))
    dist.destroy_process_group()


def spawned(function: Callable[..., None], world_size: int) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out.json"
        mp.spawn(function, (world_size, f"{folder}/store", out), nprocs=world_size)  # type: ignore[no-untyped-call]
        return json.loads(Path(out).read_text())


def page(data: dict[str, Any]) -> str:
    """The tables, from what has been measured and nothing else."""
    lines = [
        "# Optimizer benchmarks", "",
        "Made by `python -m benchmarks.optimizer` from "
        f"`benchmarks/results/{data['file']}`; do not edit.", "",
        f"{data['machine']['cpu']}, {data['machine']['cores']} cores; "
        + ", ".join(f"{k} {v}" for k, v in data["versions"].items())
        + f"; commit {data['commit']}, {data['date']}.", "",
        "## One step", "",
        "Median time a parameter, and how many times faster ours is: median of the pairwise "
        "ratios with its 95 % interval.", "",
        "| parameters | threads | ours | ns | peer | ns | ours is faster by | required |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in data["steps"]:
        required = BARS[r["ours"], r["peer"]]
        head = f"| {r['size']} | {r['threads']} | {r['ours']} |"
        if "missing" in r:
            lines.append(f"{head} | {r['peer']} | | not measured: {r['missing']} | {required:g}x |")
            continue
        f = r["ratio"]
        lines.append(
            f"{head} {r['ours ns']:.2f} | {r['peer']} | {r['peer ns']:.2f} | "
            f"{f['median']:.2f}x [{f['low']:.2f}, {f['high']:.2f}] | {required:g}x |"
        )
    two = data["ranks"]
    count, names = two["parameters"], list(two["seconds"])
    least = 2 * (two["ranks"] - 1) / two["ranks"]
    lines += [
        "", "## A training step over 2 ranks", "",
        f"8 layers of 1024 x 1024, {count:,} parameters in fp32, batches of 32, gloo, 1 thread a "
        f"rank. Elements sent a parameter and rank: {least:g} is the least.", "",
        "| who | ms | sent | " + " | ".join(f"against {n}" for n in names[2:]) + " |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for name in names:
        values = sorted(two["seconds"][name])
        sent = sorted(two["sent"][name])
        share = sent[len(sent) // 2] / (4 * two["ranks"] * count)
        cells = []
        for other in names[2:]:
            f = ratio(two["seconds"][name], two["seconds"][other])
            cells.append(
                "" if name in names[2:] else f"{f.median:.2f}x [{f.low:.2f}, {f.high:.2f}]"
            )
        lines.append(
            f"| {name} | {values[len(values) // 2] * 1e3:.1f} | {share:.3f} | "
            + " | ".join(cells) + " |"
        )  # fmt: skip
    lines += ["", "## Moments that one of 4 ranks holds", "",
              "8-bit, the most of any rank, as a share of unsharded fp32 moments.", "",
              "| parameters | share |", "|---|---|"]  # fmt: skip
    lines += [f"| {name} | {share:.4f} |" for name, share in data["held"].items()]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 M parameters only")
    parser.add_argument("--steps", type=int, help="print the records of one number of threads")
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    options = parser.parse_args()
    sizes = ["8 M"] if options.quick else list(SIZES)
    if options.steps:
        print(json.dumps(steps(options.steps, sizes)))
        return
    facts = machine.describe()
    file = RESULTS / f"optimizer-{facts['name']}.json"
    if not options.page:
        data: dict[str, Any] = {"file": file.name, "machine": facts, "steps": []}
        data["date"] = time.strftime("%Y-%m-%d")
        data["commit"] = machine.commit()
        names = ("torch", "bitsandbytes", "torchao", "deepspeed")
        data["versions"] = {
            n: importlib.metadata.version(n)
            for n in names
            if any(d.metadata["Name"] == n for d in importlib.metadata.distributions())
        }
        data["ranks"], data["held"] = spawned(ranks, 2), spawned(held, 4)
        for threads in (1, 2):
            command = [sys.executable, "-m", "benchmarks.optimizer", "--steps", str(threads)]
            command += ["--quick"] if options.quick else []
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
            run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            data["steps"] += json.loads(run.stdout.splitlines()[-1])
        RESULTS.mkdir(exist_ok=True)
        file.write_text(json.dumps(data, indent=1) + "\n")
    PAGE.write_text(page(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
