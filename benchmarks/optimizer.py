"""AdamW beside its peers: one step in one process, and a training step over 2 ranks.

python -m benchmarks.optimizer            under 15 minutes on 2 idle cores; writes results and page
python -m benchmarks.optimizer --quick    8 M parameters only
python -m benchmarks.optimizer --params 100    100 M only, into the results beside those of 8 M

Ours and a peer take turns, A B A B; the figure is the median of the pairwise ratios. Bytes on the
wire are those that the kernel counts for each process's connections, moments those of the tensors
that ranks hold.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.harness import Candidate, paired, ratio
from benchmarks.optimizer_ranks import ADAPTERS, held, spawned, train
from benchmarks.peers import SANE_ERROR
from feinwerk import testing
from feinwerk.optim import AdamW
from feinwerk.testing.adamw import make_step

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "optimizer_benchmarks.md"
SIZES = {"8 M": [(2048, 4096)], "100 M": [(4096, 1024)] * 24}
LEARNING_RATE = 1e-4
BARS = {
    ("8-bit", "bitsandbytes 8-bit"): 20.0,
    ("8-bit", "torchao 8-bit, compiled"): 20.0,
    ("8-bit", "torch fused fp32"): 1.0,  # with 2 threads: one does not fill the memory bus
    ("32-bit", "torch fused fp32"): 1.0,
    ("32-bit", "DeepSpeedCPUAdam"): 1.2,
}
HELD_BAR, HELD_ADAPTERS_BAR = 0.07, 0.08
SENT_SLACK = 1.02  # of the elements: headers of messages, the agreement of ranks


def check_ours() -> None:
    """Time nothing whose bits are not the reference's."""
    for states in (torch.uint8, torch.float32):
        case = make_step(((300, 520), (33,)), states=states)
        want = case.copy()
        for step in range(3):
            case.step()
            with testing.use_backend("reference"):
                want.step()
            case.advance(step)
            want.advance(step)
        case.assert_same(want)


def check_peer(params: list[torch.nn.Parameter], before: torch.Tensor) -> None:
    """A first step of AdamW goes lr against the gradient's sign, beside the decay it was given."""
    moved = params[0].detach() - before
    expected = -LEARNING_RATE * params[0].grad.sign()
    error = float((moved - expected).norm() / expected.norm())
    if not error < SANE_ERROR:
        raise RuntimeError(f"wrong result: relative error {error:.2g}")


def parameters(shapes: list[tuple[int, int]]) -> list[torch.nn.Parameter]:
    """Random parameters with gradients, the same at every call."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return params


def ours(bits: int) -> Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]:
    """How to make our optimizer."""
    return lambda params: AdamW(params, lr=LEARNING_RATE, state_bits=bits)


def peers() -> Iterator[tuple[str, str, Callable[[list[torch.nn.Parameter]], Any]]]:
    """Whom ours is compared with: (ours, the peer's name, how to make it)."""

    def bitsandbytes(params: list[torch.nn.Parameter]) -> Any:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(params, lr=LEARNING_RATE)

    def torchao(params: list[torch.nn.Parameter]) -> Any:
        from torchao.optim import AdamW8bit

        return AdamW8bit(params, lr=LEARNING_RATE)

    def deepspeed(params: list[torch.nn.Parameter]) -> Any:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(params, lr=LEARNING_RATE)

    def fused(params: list[torch.nn.Parameter]) -> Any:
        return torch.optim.AdamW(params, lr=LEARNING_RATE, fused=True)

    yield "8-bit", "torch fused fp32", fused
    yield "32-bit", "torch fused fp32", fused
    yield "8-bit", "bitsandbytes 8-bit", bitsandbytes
    yield "8-bit", "torchao 8-bit, compiled", torchao
    yield "32-bit", "DeepSpeedCPUAdam", deepspeed


def steps(threads: int, sizes: list[str]) -> list[dict[str, Any]]:
    """One process with one number of threads: every peer at every size."""
    torch.set_num_threads(threads)
    check_ours()
    records = []
    for size in sizes:
        for name, peer, make in peers():
            record: dict[str, Any] = {"size": size, "threads": threads, "ours": name, "peer": peer}
            record["commit"] = machine.commit()
            records.append(record)
            try:
                mine = parameters(SIZES[size])
                theirs = parameters(SIZES[size])
                a, b = ours(8 if name == "8-bit" else 32)(mine), make(theirs)
                before = theirs[0].detach().clone()
                b.step()
                check_peer(theirs, before)
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


def page(data: dict[str, Any]) -> str:
    """The tables, from what has been measured and nothing else."""
    commits = sorted({data["commit"], *(r.get("commit", data["commit"]) for r in data["steps"])})
    lines = [
        "# Optimizer benchmarks", "",
        "Made by `python -m benchmarks.optimizer` from "
        f"`benchmarks/results/{data['file']}`; do not edit.", "",
        f"{data['machine']['cpu']}, {data['machine']['cores']} cores; "
        + ", ".join(f"{k} {v}" for k, v in data["versions"].items())
        + f"; commit {', '.join(commits)}, {data['date']}.", "",
        "## One step", "",
        "Median time a parameter, and how many times faster ours is: median of the pairwise "
        "ratios with its 95 % interval.", "",
        "| parameters | threads | ours | ns | peer | ns | ours is faster by | required | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in data["steps"]:
        bar = BARS[r["ours"], r["peer"]]
        if r["ours"] == "8-bit" and r["peer"] == "torch fused fp32" and r["threads"] == 1:
            bar = 0.0
        required = f"{bar:g}x" if bar else ""
        head = f"| {r['size']} | {r['threads']} | {r['ours']} |"
        if "missing" in r:
            why = f"not measured: {r['missing']}"
            lines.append(f"{head} | {r['peer']} | | {why} | {required} | |")
            continue
        f = r["ratio"]
        met = verdict(f["median"] >= bar) if bar else ""
        lines.append(
            f"{head} {r['ours ns']:.2f} | {r['peer']} | {r['peer ns']:.2f} | "
            f"{f['median']:.2f}x [{f['low']:.2f}, {f['high']:.2f}] | {required} | {met} |"
        )
    return "\n".join([*lines, *rank_lines(data["ranks"]), *held_lines(data["held"]), ""])


def verdict(met: bool) -> str:
    """The last column of a bar."""
    return "met" if met else "missed"


def rank_lines(two: dict[str, Any]) -> list[str]:
    """Time and bytes of a training step over ranks; the peers are the last two."""
    count, names = two["parameters"], list(two["seconds"])
    peers = names[2:]
    least = 2 * (two["ranks"] - 1) / two["ranks"]
    lines = [
        "", f"## A training step over {two['ranks']} ranks", "",
        f"8 layers of 1024 x 1024, {count:,} parameters in fp32, batches of 32, gloo, 1 thread a "
        f"rank. Sent: elements of fp32 a parameter and rank; {least:g} is the least. Required: not "
        "slower than either peer, and no more sent than the least.", "",
        "| who | ms | sent | " + " | ".join(f"against {n}" for n in peers) + " | |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in names:
        values, sent = sorted(two["seconds"][name]), sorted(two["sent"][name])
        share = sent[len(sent) // 2] / (4 * count)
        cells, met = ["", ""], ""
        if name not in peers:
            ratios = [ratio(two["seconds"][name], two["seconds"][other]) for other in peers]
            cells = [f"{f.median:.2f}x [{f.low:.2f}, {f.high:.2f}]" for f in ratios]
            fast = all(f.median >= 1 for f in ratios)
            met = verdict(fast and share <= least * SENT_SLACK)
        lines.append(
            f"| {name} | {values[len(values) // 2] * 1e3:.1f} | {share:.3f} | "
            + " | ".join(cells) + f" | {met} |"
        )  # fmt: skip
    return lines


def held_lines(held: dict[str, float]) -> list[str]:
    """Shares of the unsharded moments."""
    lines = ["", "## Moments that one of 4 ranks holds", "",
             "8-bit, the most of any rank, as a share of unsharded fp32 moments.", "",
             "| parameters | share | required | |", "|---|---|---|---|"]  # fmt: skip
    for name, share in held.items():
        adapters = name == ADAPTERS
        met = share <= HELD_ADAPTERS_BAR if adapters else share < HELD_BAR
        required = f"at most {HELD_ADAPTERS_BAR}" if adapters else f"under {HELD_BAR}"
        lines.append(f"| {name} | {share:.4f} | {required} | {verdict(met)} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    """Measure, store, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 M parameters only")
    parser.add_argument(
        "--params", type=int, choices=[int(size.split()[0]) for size in SIZES],
        help="one step of so many million parameters; the other stored results are kept",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, help="print the records of one number of threads")
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    options = parser.parse_args(argv)
    sizes = ["8 M"] if options.quick else list(SIZES)
    if options.params:
        sizes = [f"{options.params} M"]
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
        if options.params and file.exists():
            stored = json.loads(file.read_text())
            data["steps"] = [r for r in stored["steps"] if r["size"] not in sizes]
            for r in data["steps"]:
                r.setdefault("commit", stored["commit"])
            data["ranks"], data["held"] = stored["ranks"], stored["held"]
        else:
            data["ranks"], data["held"] = spawned(train, 2), spawned(held, 4)
        extensions = machine.BUILD / "extensions"
        for lock in extensions.glob("*/lock"):
            lock.unlink()
        for threads in (1, 2):
            command = [sys.executable, "-m", "benchmarks.optimizer", "--steps", str(threads)]
            command += ["--quick"] if options.quick else []
            command += ["--params", str(options.params)] if options.params else []
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "DS_ACCELERATOR": "cpu",
                # DeepSpeed compiles its optimizer at first use; where that has been interrupted
                # before, the lock it left behind would block for ever.
                "TORCH_EXTENSIONS_DIR": str(extensions),
            }
            run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            data["steps"] += json.loads(run.stdout.splitlines()[-1])
        RESULTS.mkdir(exist_ok=True)
        file.write_text(json.dumps(data, indent=1) + "\n")
    PAGE.write_text(page(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
