"""The ONNX operators beside what stock ONNX Runtime has: sessions in turn, in one process.

python -m benchmarks.bench_onnx            `make bench OP=onnx`: writes the results and the page
python -m benchmarks.bench_onnx --quick    fewer rounds, nothing stored
python -m benchmarks.bench_onnx --page     only the page, from stored results

Ours and its peers take turns, A B A B; a figure is the median of the pairwise ratios with its 10th
and 90th percentile and a bootstrap interval. Up to M = 4 a session holds copies of its node with
weights that exceed the last-level cache together, so that every weight comes from memory; above,
one node. Memory is the growth of the peak resident set while a session is created, in a process of
its own. Last comes a whole chat model, token by token (onnx_decode.py).
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine, onnx_decode, peers
from benchmarks.harness import Candidate, Paired, paired
from benchmarks.problem import Problem, dense_weight, nf4_weight
from benchmarks.text import number, table
from feinwerk.cli.deployment import open_session

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "onnx_benchmarks.md"
SHAPES = ((4096, 4096), (2048, 2048))
THREADS, RANK = 2, 16
OURS, LORA, GAIN, DENSE = "NF4Linear", "NF4LoraLinear r=16", "NF4LoraLinear r=16, gain", "MatMul"
BNB, NBITS = "MatMulBnb4", "MatMulNBits int4 level 0"
# (rows, ours, peer) -> required; at least so many times faster, or with <= at most its time.
BARS = {
    (1, OURS, BNB): ">= 25",
    (1, OURS, NBITS): ">= 1",
    (128, OURS, BNB): ">= 1.5",
    (128, OURS, DENSE): ">= 1",
    (1, LORA, OURS): "<= 1.1",
    (1, GAIN, LORA): "<= 1.02",
}
MEMORY_BAR = 1.2  # times the packed bytes
SHOWN = "NF4Linear, double-quantized"


def tensors_of(problem: Problem, op: str, index: int) -> dict[str, np.ndarray]:
    """The inputs of node `index` beside x, by name; every node has bytes of its own."""
    rng = np.random.default_rng(index)
    adapter = {
        "lora_A": rng.standard_normal((RANK, problem.K), dtype=np.float32) / RANK,
        "lora_B": rng.standard_normal((problem.N, RANK), dtype=np.float32) / RANK,
        "scaling": np.float32([0.5]),
    }
    if op == DENSE:
        return {
            "weight": np.roll(dense_weight(problem.N, problem.K).t().contiguous().numpy(), index)
        }
    weight = nf4_weight(problem.N, problem.K, problem.blocksize, op == SHOWN)
    names = ("packed", "absmax", "nested_absmax", "nested_codebook", "nested_offset")
    found = {name: getattr(weight, name) for name in names}
    tensors = {n: t.flatten().numpy() for n, t in found.items() if t is not None}
    tensors["packed"] = np.roll(tensors["packed"], index)
    if op in (LORA, GAIN):
        tensors |= adapter
    if op == GAIN:
        tensors["gain"] = rng.random(problem.N, dtype=np.float32) + 0.5
    return tensors


def order(op: str, names: dict[str, np.ndarray]) -> list[str]:
    """The node's inputs in order, "" for absent ones."""
    nested = ("nested_absmax", "nested_codebook", "nested_offset")
    inputs = {
        DENSE: ("weight",),
        OURS: ("packed", "absmax"),
        SHOWN: ("packed", "absmax", "bias", *nested),
    }.get(op, ("packed", "absmax", "lora_A", "lora_B", "scaling", "gain"))
    given = [name if name in names else "" for name in inputs]
    return given[:-1] if given and not given[-1] else given


def model(problem: Problem, op: str, nodes: int) -> bytes:
    """`nodes` nodes on one x; adapters are run-time inputs with default values."""
    from onnx import helper, numpy_helper

    body, weights, graph_inputs, outputs = [], [], [], []
    for i in range(nodes):
        tensors = tensors_of(problem, op, i)
        for name, array in tensors.items():
            weights.append(numpy_helper.from_array(array, f"{name}{i}"))
            if name in ("lora_A", "lora_B", "scaling", "gain"):
                graph_inputs.append(helper.make_tensor_value_info(f"{name}{i}", 1, array.shape))
        names = ["x", *(f"{name}{i}" if name else "" for name in order(op, tensors))]
        if op == DENSE:
            body.append(helper.make_node("MatMul", names, [f"y{i}"]))
        else:
            kind = "NF4LoraLinear" if op in (LORA, GAIN) else "NF4Linear"
            sizes = {"N": problem.N, "K": problem.K, "block_size": problem.blocksize}
            body.append(helper.make_node(kind, names, [f"y{i}"], domain="feinwerk", **sizes))
        outputs.append(helper.make_tensor_value_info(f"y{i}", 1, ["M", problem.N]))
    x = helper.make_tensor_value_info("x", 1, ["M", problem.K])
    graph = helper.make_graph(body, "g", [x, *graph_inputs], outputs, weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("feinwerk", 1)]
    data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return data


@functools.lru_cache(maxsize=8)
def opened(problem: Problem, op: str, nodes: int) -> Any:
    """A session of so many nodes, set up as the peers' are."""
    return open_session(model(problem, op, nodes))


def truth(problem: Problem, op: str, x: torch.Tensor) -> torch.Tensor:
    """What node 0 must compute, for the first rows."""
    tensors = {name: torch.from_numpy(array) for name, array in tensors_of(problem, op, 0).items()}
    if op == DENSE:
        return x @ tensors["weight"]
    y = x @ nf4_weight(problem.N, problem.K, problem.blocksize, op == SHOWN).dequantize().t()
    if op in (LORA, GAIN):
        y = y + tensors["scaling"] * (x @ tensors["lora_A"].t()) @ tensors["lora_B"].t()
    return y * tensors["gain"] if op == GAIN else y


def candidate(problem: Problem, op: str) -> Candidate:
    """A session of ours, or of stock MatMul, with bound input and outputs; checked."""
    import onnxruntime

    nodes = 1
    if problem.M <= peers.ORT_SWEEP_ROWS:
        nodes = problem.copies(problem.N * problem.K * 4) if op == DENSE else problem.nf4_copies
    session = opened(problem, op, nodes)
    x = problem.activations()
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy()))
    shape, values = [problem.M, problem.N], []
    for i in range(nodes):
        values.append(onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cpu"))
        binding.bind_ortvalue_output(f"y{i}", values[-1])
    call = functools.partial(session.run_with_iobinding, binding)
    call()
    actual = torch.from_numpy(values[0].numpy()[:4].copy())
    return peers.sane(Candidate(op, [call], per_call=nodes), actual, truth(problem, op, x[:4]))


def rounds(problem: Problem, ours: str, others: list[str], seconds: float) -> Paired:
    """Time `ours` and the others in turn."""
    stock: dict[str, Callable[[Problem], Candidate]] = {BNB: peers.ort_nf4, NBITS: peers.ort_int4}
    made = []
    for name in (ours, *others):
        made.append(stock[name](problem) if name in stock else candidate(problem, name))
        made[-1].name = name
    return paired(made[0], *made[1:], seconds=seconds, min_rounds=9, max_rounds=101)


def speeds(seconds: float) -> Iterator[dict[str, Any]]:
    """A record for each shape, M and pair."""
    torch.set_num_threads(THREADS)
    for N, K in SHAPES:
        for M, cold, ours, others in (
            (1, True, OURS, [BNB, NBITS, DENSE, SHOWN, LORA]),
            (1, True, LORA, [GAIN]),
            (1, False, OURS, [BNB, NBITS]),
            (128, True, OURS, [BNB, NBITS, DENSE]),
        ):
            cache = machine.cache_bytes()
            problem = Problem(N, K, M, torch.float32, cold=cold, cache_bytes=cache)
            load = machine.OtherLoad()
            result = rounds(problem, ours, others, seconds)
            for peer in others:
                yield {
                    "N": N, "K": K, "M": M, "cold": cold, "ours": ours, "peer": peer,
                    "ms": result.times(ours)["median"] * 1e3,
                    "peer_ms": result.times(peer)["median"] * 1e3,
                    "ratio": result.ratio(peer).as_dict(), "others_share": load.share(),
                }  # fmt: skip
            opened.cache_clear()
            peers.ort_session.cache_clear()


def memory() -> list[dict[str, Any]]:
    """Growth of the peak resident set, one process for each operator."""
    found = []
    for op in (OURS, BNB):
        command = [sys.executable, "-m", "benchmarks.onnx_memory", op]
        result = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=HERE.parent)
        found.append(json.loads(result.stdout))
    return found


def within(measured: float, bar: str) -> bool:
    """Whether a figure keeps a bar such as ">= 25" or "<= 1.1"."""
    sign, limit = bar.split()
    return measured >= float(limit) if sign == ">=" else measured <= float(limit)


def lines_of(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table: how many times faster ours is; of our adapters the ratio of times."""
    shape, M = f"{record['N']}x{record['K']}", record["M"]
    ours, peer, f = record["ours"], record["peer"], record["ratio"]
    own = (M, peer, ours) in BARS or peer == SHOWN
    bar = BARS.get((M, peer, ours) if own else (M, ours, peer), "") if record["cold"] else ""
    what = f"{peer}: time over {ours}'s" if own else f"{ours}: faster than {peer} by"
    what += "" if record["cold"] else ", warm"
    verdict = ("met" if within(f["median"], bar) else "missed") if bar else ""
    figure = f"{number(f['median'])}x [{number(f['low'])}, {number(f['high'])}]"
    spread = f"{number(f['p10'])} to {number(f['p90'])}"
    times = (f"{record['ms']:.3f}", f"{record['peer_ms']:.3f}")
    return [(shape, str(M), what, figure, spread, *times, bar, verdict)]


def decode_line(record: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table of the chat model."""
    f, bar = record["ratio"], onnx_decode.BAR if record["peer"] == onnx_decode.CONTRIB else ""
    return (
        record["peer"], f"{number(f['median'])}x [{number(f['low'])}, {number(f['high'])}]",
        f"{number(f['p10'])} to {number(f['p90'])}",
        f"{record['tokens_s']:.1f}", f"{record['peer_tokens_s']:.1f}",
        f"{record['bytes'] / 2**20:.0f}", f"{record['peer_bytes'] / 2**20:.0f}",
        bar, ("met" if within(f["median"], bar) else "missed") if bar else "",
    )  # fmt: skip


def page(data: dict[str, Any]) -> str:
    """The tables, from what has been measured and nothing else."""
    facts = data["machine"]
    head = ("W", "M", "what", "median [95 %]", "10th to 90th percentile", "ours ms", "peer ms",
            "required", "")  # fmt: skip
    rows = [row for record in data["speeds"] for row in lines_of(record)]
    worst = max(record["others_share"] for record in data["speeds"])
    grown = []
    for record in data["memory"]:
        ratios = [record[when] / record["packed"] for when in ("created", "ran")]
        ours = record["op"] == OURS
        met = ("met" if ratios[0] < MEMORY_BAR else "missed") if ours else ""
        grown.append(
            (record["op"], f"{record['packed'] / 2**20:.1f}", *(f"{r:.2f}x" for r in ratios),
             f"< {MEMORY_BAR}x" if ours else "", met)
        )  # fmt: skip
    decode_head = ("peer", "faster than it by [95 %]", "10th to 90th percentile", "ours tokens/s",
                   "peer tokens/s", "ours MiB", "peer MiB", "required", "")  # fmt: skip
    memory_head = ("operator", "packed MiB", "created", "after a run", "required", "")
    return "\n".join(
        [
            "# ONNX benchmarks", "",
            f"Made by `make bench OP=onnx` from `benchmarks/results/{data['file']}`; do not edit.",
            "",
            f"{facts['cpu']}, {facts['cores']} cores, {THREADS} threads, fp32; "
            + ", ".join(f"{k} {v}" for k, v in data["versions"].items())
            + f"; commit {data['commit']}, {data['date']}. Other processes used up to "
            f"{worst:.0%} of the cores meanwhile.",
            "",
            "## Speed", "",
            "Sessions in turn, A B A B; a figure is the median of the pairwise ratios. At M = 1 "
            "every weight comes from memory, unless the line says warm.",
            "",
            *table(head, rows),
            "",
            "## Memory", "",
            "Growth of the peak resident set, over the bytes of packed codes and absmax, of a "
            "model of 8 layers of 4096 x 4096 with external data: while the session is created, "
            "and after one run with one row.",
            "",
            *table(memory_head, grown),
            "",
            "## A chat model, token by token", "",
            "SmolLM2-135M-Instruct, NF4 with a LoRA adapter of rank 16 on every decoder layer, one "
            f"text, a token after {onnx_decode.PAST} others; head and embedding are dense "
            "everywhere. MatMulBnb4 has the adapter as constants, MatMul has it merged. "
            f"Other processes used up to {max(r['others_share'] for r in data['decode']):.0%} of "
            "the cores.",
            "",
            *table(decode_head, [decode_line(record) for record in data["decode"]]),
            "",
        ]
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure, store, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a second a group, nothing stored")
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    options = parser.parse_args(argv)
    facts = machine.describe()
    file = RESULTS / f"onnx-{facts['name']}.json"
    if not options.page:
        started = time.perf_counter()
        data: dict[str, Any] = {
            "file": file.name, "machine": facts, "date": time.strftime("%Y-%m-%d"),
            "commit": machine.commit(), "memory": memory(), "speeds": [],
        }  # fmt: skip
        data["versions"] = {
            name: importlib.metadata.version(name) for name in ("onnxruntime", "onnx", "numpy")
        }
        for record in speeds(1.0 if options.quick else 20.0):
            data["speeds"].append(record)
            print(" | ".join(lines_of(record)[0]), flush=True)
        data["decode"] = onnx_decode.measure(3.0 if options.quick else 30.0)
        print(f"{time.perf_counter() - started:.0f} s")
        if options.quick:
            print(page(data))
            return 0
        RESULTS.mkdir(exist_ok=True)
        file.write_text(json.dumps(data, indent=1) + "\n")
    PAGE.write_text(page(json.loads(file.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
