"""--compare: the same start and data on both sides, one ratio a step, and who is measured."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from feinwerk.cli import compare, data, machine, main, model, plot
from feinwerk.cli.console import Display
from feinwerk.cli.errors import CommandError
from feinwerk.cli.settings import Settings
from feinwerk.cli.training import Trainer

PEFT_CLASS = {True: "peft.tuners.lora.bnb", False: "peft.tuners.lora.layer"}


@pytest.fixture(autouse=True)
def one_thread(keep_threads):
    torch.set_num_threads(1)


@pytest.fixture
def settings(tiny_model, questions, tmp_path):
    return Settings(
        model=str(tiny_model), dataset=str(questions), output=str(tmp_path), batch_size=4,
        held_out=6, rank=4, lora_alpha=8, dtype="float32", threads=1, steps=1,
    )  # fmt: skip


def with_method(settings: Settings, method: str) -> Settings:
    if method.startswith("q"):
        pytest.importorskip("bitsandbytes")
    return Settings(**{**settings.to_dict(), "method": method})


def trainer(settings: Settings, *, fused: bool) -> Trainer:
    source = model.find_model(settings.model)
    _, tokenizer = model.load_model(source, cache=False)
    examples, _ = data.split(data.load_dataset(settings.dataset).examples, settings.held_out)
    encoded = data.encode(tokenizer, examples, settings.max_length)
    adapted = compare.adapted_model(settings, source, fused=fused)
    return Trainer(adapted.train(), encoded, settings, compare.PAIRS)


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "qlora", "qdora"])
def test_the_other_side_is_stock_peft_on_the_same_weights(settings, method):
    settings = with_method(settings, method)
    ours, theirs = (trainer(settings, fused=fused) for fused in (True, False))
    layers = [m for m in theirs.model.modules() if hasattr(m, "lora_A")]
    assert len(layers) == 14
    assert {type(layer).__module__ for layer in layers} == {PEFT_CLASS[settings.quantized]}
    if settings.quantized:
        import bitsandbytes as bnb

        nf4 = [layer.base_layer for layer in ours.model.modules() if hasattr(layer, "lora_A")]
        for mine, layer in zip(nf4, layers, strict=True):
            base = layer.base_layer
            assert type(base) is bnb.nn.Linear4bit
            dense = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
            assert torch.equal(dense, mine.dequantize(torch.float32))
    ours.load_state_dict(theirs.state_dict())
    # fp32 sums in another order, nothing else, is between the two.
    step, other = ours.one_step(), theirs.one_step()
    assert step.loss == pytest.approx(other.loss, rel=1e-6)


def test_the_command_reports_both_sides(tiny_model, questions, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(compare, "PAIRS", 4)
    flags = {"model": tiny_model, "dataset": questions, "output": tmp_path, "steps": 2}
    flags |= {"batch-size": 4, "held-out": 4, "rank": 4, "dtype": "float32", "threads": 1}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = ["quickstart", *words, "--method", "qdora", "--compare", "--no-generate", "--quiet"]
    assert main(command) == 0
    found = json.loads((tmp_path / "report.json").read_text())["comparison"]
    assert found["peer"] == "stock PEFT + bitsandbytes"
    for side in ("ours", "theirs"):
        assert len(found[side]["seconds"]) == len(found[side]["losses"]) == 4
        assert all(seconds > 0 for seconds in found[side]["seconds"])
        assert 5e7 < found[side]["resident"] <= found[side]["peak"]
    pairs = sorted(
        theirs / mine
        for mine, theirs in zip(found["ours"]["seconds"], found["theirs"]["seconds"], strict=True)
    )
    ratio = found["ratio"]
    assert ratio["median"] == pytest.approx((pairs[1] + pairs[2]) / 2)
    assert pairs[0] <= ratio["low"] <= ratio["median"] <= ratio["high"] <= pairs[3]
    assert 0 <= found["loss_difference"] < 1e-4
    text = (tmp_path / "report.md").read_text()
    assert "## Beside stock PEFT + bitsandbytes" in text
    assert f"{ratio['median']:.2f}x as fast" in text
    assert f"{found['ours']['peak'] / 2**20:,.0f} MiB" in text
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_bitsandbytes_is_said_before_anything_runs(settings, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a)
    )
    flags = ["--model", settings.model, "--dataset", settings.dataset, "--output", settings.output]
    assert main(["quickstart", "--compare", *flags, "--quiet"]) == 2
    message = capsys.readouterr().err
    assert "--method qlora --compare needs the Python package bitsandbytes" in message
    assert "pip install bitsandbytes" in message


def test_a_process_that_fails_is_one_sentence(settings):
    broken = Settings(**{**settings.to_dict(), "model": "/nonexistent"})
    with pytest.raises(CommandError, match=r"could not measure memory \(ours\): .*--model must be"):
        compare.measured_alone("ours", broken)


def result(ours: float, theirs: float, peaks: tuple[int, int]) -> compare.Comparison:
    sides = [
        compare.Side((seconds,) * 3, (2.0, 1.0, loss), 1 << 20, peak)
        for seconds, loss, peak in zip((ours, theirs), (0.5, 0.51), peaks, strict=True)
    ]
    ratio = compare.paired_ratio(sides[0].seconds, sides[1].seconds, 0)
    return compare.Comparison("stock PEFT", *sides, ratio)


def test_ratios_are_of_pairs():
    ratio = compare.paired_ratio([1.0, 10.0, 2.0], [2.0, 20.0, 8.0], 0)
    assert ratio.median == 2.0
    assert ratio.low <= ratio.median <= ratio.high
    assert ratio.p10 <= ratio.p90 <= 4.0


def test_sentences_and_plot_say_who_needs_less(tmp_path):
    better, worse = result(1.0, 2.5, (1 << 30, 2 << 30)), result(2.0, 1.0, (2 << 30, 1 << 30))
    assert better.loss_difference == pytest.approx(0.01 / 0.51)
    assert "2.50x as fast" in better.sentences()[0]
    assert "0.50x as fast" in worse.sentences()[0]
    assert "1,024 MiB, with stock PEFT 2,048 MiB" in better.sentences()[1]
    for name, each in (("better", better), ("worse", worse)):
        plot.draw_comparison(tmp_path / f"{name}.png", each, "QLoRA")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_free_memory_is_returned_before_the_peak_is_measured():
    block = torch.ones(8 << 20)
    before = machine.resident_memory()
    del block
    machine.return_free_memory()
    assert machine.resident_memory() < before


def test_comparing_shows_its_progress(settings, capsys, monkeypatch):
    settings = with_method(settings, "lora")
    monkeypatch.setattr(compare, "PAIRS", 2)
    monkeypatch.setattr(
        compare, "measured_alone", lambda side, settings: {"resident": 1, "peak": 2}
    )
    trained = trainer(settings, fused=True)
    source = model.find_model(settings.model)
    compare.run(trained, settings, source, Display())
    lines = capsys.readouterr().out
    assert "training in turn with stock PEFT, dense weights 4/4" in lines
    assert "peak memory, each side in a process of its own 2/2" in lines
