"""The adapters' benchmarks: right results only, the right peers, and bars that judge both ways."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from benchmarks import adapters, bars, counted, machine, peers, peft_peers, saved
from benchmarks.adapters import AdapterProblem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_our_candidate_and_pefts_compute_the_same_and_a_wrong_one_is_found(
    dtype: torch.dtype, dora: bool, backward: bool
) -> None:
    problem = AdapterProblem(96, 128, 8, dtype, dora=dora, backward=backward)
    results = adapters.ours(problem).calls[0]()
    assert len(results) == (2 + 2 + dora if backward else 1)
    adapters.check(problem, results)
    for wrong in range(len(results)):
        spoiled = [r * 1.2 if i == wrong else r for i, r in enumerate(results)]
        with pytest.raises(AssertionError):
            adapters.check(problem, spoiled)
        with pytest.raises(peers.Unsupported, match="wrong result"):
            peft_peers.layer(problem, [r * 2 if i == wrong else r for i, r in enumerate(results)])
    peer = peft_peers.layer(problem, results)
    assert peer.name.startswith("PEFT + bitsandbytes")


def test_the_peer_is_what_a_qlora_user_trains() -> None:
    from peft.tuners.lora.bnb import Linear4bit

    problem = AdapterProblem(64, 128, 4, torch.bfloat16)
    layer = peft_peers.lora_layer(
        peft_peers.linear4bit(64, 128, torch.bfloat16), problem.adapters()
    )
    assert type(layer) is Linear4bit
    assert layer.training
    assert layer.base_layer.weight.quant_state.nested
    assert layer.base_layer.compute_dtype is torch.bfloat16
    adapters.step(
        layer, problem.x().requires_grad_(), problem.grad_y(), peft_peers.trained(layer, "0")
    )
    assert not getattr(layer.base_layer.weight.quant_state, "packing_format_for_cpu", False)
    assert {p.dtype for p in peft_peers.trained(layer, "0")} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_adapters_equals_its_peers_runs(dtype: torch.dtype) -> None:
    problem = AdapterProblem(64, 128, 12, dtype, count=3)
    results = adapters.ours(problem).calls[0]()
    adapters.check(problem, results)
    assert peft_peers.one_by_one(problem, results).name == "PEFT + bitsandbytes, one by one"
    swapped = [*results[:2], *results[4:6], *results[2:4], *results[6:]]
    with pytest.raises(AssertionError):
        adapters.check(problem, swapped)
    forward = dataclasses.replace(problem, backward=False)
    results = adapters.ours(forward).calls[0]()
    adapters.check(forward, results)
    assert peft_peers.mixed_batch(forward, results).name == "PEFT + bitsandbytes eval"


def test_work_and_traffic_of_a_step() -> None:
    problem = AdapterProblem(128, 64, 8, torch.bfloat16)
    forward = dataclasses.replace(problem, backward=False)
    assert problem.operations == 2 * (2 * 8 * 128 * 64 + 3 * 8 * adapters.RANK * (128 + 64))
    assert forward.operations == 2 * (8 * 128 * 64 + 8 * adapters.RANK * (128 + 64))
    low_rank = 4 * adapters.RANK * (128 + 64)
    assert forward.traffic[1] == 8 * 128 * 2
    assert problem.traffic[1] == forward.traffic[1] + 8 * 64 * 2 + low_rank
    assert problem.traffic[0] == 2 * forward.traffic[0] + 8 * 128 * 2


def ratio_record(median: float, low: float, high: float) -> dict[str, object]:
    spread = {"median": median, "p10": low, "p90": high, "low": low, "high": high, "rounds": 9}
    peer = {"min": 1e-3, "median": 1e-3, "ratio": spread, "note": ""}
    return {
        "op": "lora_linear", "what": "LoRA forward+backward", "N": 4096, "K": 4096, "M": 512,
        "dtype": "fp32", "cold": True, "threads": 2, "isa": "avx512", "onednn": "",
        "ours": {"min": 1e-3, "median": 1e-3}, "limits": {},
        "peers": {"NF4 alone": peer, "PEFT + bitsandbytes": peer},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("median", "met", "open_"),
    [(1 / 1.05, True, False), (1 / 1.11, True, True), (1 / 1.14, False, True), (0.5, False, False)],
)
def test_a_bar_of_at_most_judges_our_time_over_theirs(
    median: float, met: bool, open_: bool
) -> None:
    data = {"cases": {"a": ratio_record(median, median / 1.02, median * 1.02)}}
    (bar,) = [
        bar for bar in bars.BARS
        if bar.at_most and bar.op == "lora_linear" and bar.dtype == "fp32" and bar.M == 512
        and bar.what.startswith("LoRA") and bar.shape == (4096, 4096)
    ]  # fmt: skip
    verdict = bars.judge(data, bar)
    assert verdict.ratio["median"] == pytest.approx(1 / median)
    assert verdict.ratio["low"] < verdict.ratio["median"] < verdict.ratio["high"]
    assert (verdict.met, verdict.open) == (met, open_)


def test_plot_shows_the_measured_layers(tmp_path: Path) -> None:
    from benchmarks import plot_adapters

    case = {**ratio_record(1.25, 1.2, 1.3), "dtype": "bf16"}
    data = {"cases": {"a": case}, "machine": machine.describe()}
    assert plot_adapters.bars_of(data, "LoRA", 512, 2) == [("4096 x 4096", 1.0, 1.0, 1.25)]
    assert plot_adapters.bars_of(data, "DoRA", 512, 2) == []
    plot_adapters.draw(data, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_bars_on_bytes() -> None:
    peft = "PEFT + bitsandbytes"
    step = {"feinwerk LoRA": 100, "feinwerk DoRA": 106}
    shape = {"N": 3072, "K": 8192, "rank": 16, "M": 512, "dtype": "fp32"}
    data = {
        "cases": {
            "a": {"op": "adapter_memory", "what": "forward+backward", **shape, "bytes": step},
            "b": {
                "op": "adapter_memory", "what": counted.NORM, **shape,
                "bytes": {"feinwerk DoRA": 3072 * 16 * 4 + counted.MEMORY_SLACK},
            },
            "c": {
                "op": "saved", "what": "QLoRA", "M": 128, "bytes": {"feinwerk": 180.4e6, peft: 9e9},
            },
            "d": {
                "op": "saved", "what": "QDoRA", "M": 128, "bytes": {"feinwerk": 210.6e6, peft: 9e9},
            },
            "e": {
                "op": "quickstart", "what": "qdora", "dtype": "bf16", "against": "stock",
                "ratio": {"median": 2.6, "low": 2.4, "high": 2.7}, "ours": 1.0, "theirs": 2.6,
                "bytes": {"feinwerk": 11 << 20, "stock": 10 << 20},
            },
        }
    }  # fmt: skip
    rows = list(counted.bars(data))
    assert [row[-1] for row in rows] == ["missed", "met", "met", "missed", "met", "missed"]
    assert "1.06x" in rows[0]
    assert "180.4 MB" in rows[2]
    titles = {title: lines for title, lines in counted.tables(data) if lines}
    assert len(titles) == 3


class _KeepsAside(torch.autograd.Function):
    """Saves one tensor as autograd wants it, and hides another in its context."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x * 2)
        ctx.aside = [x * 3]
        return x * 4

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_saved_bytes_counts_what_lives_once_and_nothing_else() -> None:
    x = torch.ones(100, requires_grad=True)
    weight = torch.ones(100)

    def forward() -> torch.Tensor:
        dead = (x.exp() * weight).sum()  # its graph ends here
        del dead
        y = x.exp()  # exp saves its result, and so does the product with itself: 400 bytes
        return (y * y * weight).sum()

    assert saved.saved_bytes(forward, [weight]) == 400
    assert saved.saved_bytes(forward, []) == 800
    assert saved.saved_bytes(lambda: _KeepsAside.apply(x).sum(), []) == 800


@pytest.fixture(scope="module")
def smollm() -> torch.nn.Module:
    pytest.importorskip("transformers")
    return saved.quantized("feinwerk")


@pytest.mark.parametrize("method", saved.METHODS)
def test_a_step_saves_no_more_than_its_bar(smollm: torch.nn.Module, method: str) -> None:
    found = saved.count("feinwerk", method, smollm)
    assert found > 0
    if method == "QDoRA":  # above its bar by its norms, N floats a layer; the results say so
        outputs = 30 * (576 + 2 * 192 + 576 + 2 * 1536 + 576)
        found -= 4 * outputs
    assert round(found / 1e6) <= counted.SAVED_MB[method]
