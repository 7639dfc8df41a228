"""What fits: the largest batch and sequence are the largest, options are plans, bad input."""

from __future__ import annotations

import json
from typing import Any

import pytest

from feinwerk import plan
from feinwerk.plan.sizes import parse, show

MODEL = "smollm2-135m"
OPTIONS: dict[str, Any] = {"method": "qdora", "seq": 256, "batch": 2}


def test_the_largest_batch_and_sequence_fit_and_one_more_does_not() -> None:
    fit = plan(MODEL, **OPTIONS, memory="3GB").fit
    room = fit.memory - fit.reserve
    assert fit.memory == 3 * 10**9
    assert fit.reserve == 0.05 * fit.memory
    for name, value in (("batch", fit.batch), ("seq", fit.seq)):
        assert value > 1
        assert plan(MODEL, **{**OPTIONS, name: value}).peak <= room
        assert plan(MODEL, **{**OPTIONS, name: value + 1}).peak > room


def test_it_fits_exactly_up_to_its_peak() -> None:
    peak = plan(MODEL, **OPTIONS).peak
    tight = plan(MODEL, **OPTIONS, memory=peak + 1000, reserve=1000).fit
    assert (tight.fits, tight.spare, tight.batch, tight.seq) == (True, 0, 2, 256)
    short = plan(MODEL, **OPTIONS, memory=peak + 999, reserve=1000).fit
    assert (short.fits, short.spare, short.batch) == (False, -1, 1)


def test_nothing_fits_into_too_little() -> None:
    fit = plan(MODEL, **OPTIONS, memory="50MB").fit
    assert (fit.fits, fit.batch, fit.seq) == (False, 0, 0)
    assert not any(option.fits for option in fit.options)


@pytest.mark.parametrize(("world_size", "stages"), [(1, {0}), (4, {0, 1, 2, 3})])
def test_options_are_plans(world_size: int, stages: set[int]) -> None:
    settings = {"method": "full", "seq": 64, "world_size": world_size, "memory": "2GB"}
    fit = plan(MODEL, **settings).fit
    assert {option.stage for option in fit.options} == stages
    assert len(fit.options) == 4 * len(stages)
    for option in fit.options:
        other = plan(
            MODEL, method="full", seq=64, world_size=world_size, stage=option.stage,
            state_bits=option.state_bits, checkpointing=option.checkpointing,
        )  # fmt: skip
        assert option.peak == other.peak
        assert option.fits == (other.peak <= fit.memory - fit.reserve)
    assert len({option.fits for option in fit.options}) == 2


def test_a_table_says_it_all() -> None:
    found = plan("llama-3-8b", method="qdora", seq=2048, batch=4, world_size=2, memory="24GB")
    text = str(found)
    for words in (
        "llama, 8.03 B parameters: QDoRA r=16", "4 x 2048 tokens", "stage 2", "rank 0 of 2",
        "weights", "optimizer states", "8-bit moments, 1/2 of the rows", "peak",
        f"in the {found.moment}", "It does not fit into 24.0 GB less 1.20 GB in reserve",
        "No batch fits", "The largest sequence that fits is", "checkpointing",
    ):  # fmt: skip
        assert words in text, words
    assert show(found.peak) in text
    # Parts of the peak add up to it.
    assert sum(part.at_peak for part in found.parts) == found.peak
    assert all(part.at_peak <= part.bytes for part in found.parts)


def test_a_plan_is_json() -> None:
    found = plan(MODEL, **OPTIONS, memory="3GB")
    values = json.loads(json.dumps(found.to_dict()))
    assert values["peak"] == found.peak
    assert values["settings"]["method"] == "qdora"
    assert values["model"]["parameters"] == 134_515_008
    assert values["fit"]["batch"] == found.fit.batch
    assert {part["name"]: part["bytes"] for part in values["parts"]}["weights"] == found.weights


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("1.5 GiB", 3 << 29), ("800mb", 8 * 10**8), ("12", 12), (7.9, 7)],
)
def test_sizes_are_read(text: str | float, size: int) -> None:
    assert parse("memory", text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "24GBs", "1e9", "0", 0, -1, float("nan")])
def test_sizes_that_are_none(text: str | float) -> None:
    with pytest.raises(ValueError, match=r"^plan: memory must be "):
        parse("memory", text)


def test_sizes_are_shown() -> None:
    shown = [show(n) for n in (0, 999, 1000, 12_345, 999_400, 999_600, 24 * 10**9, 10**13)]
    assert shown == [
        "0 B", "999 B", "1.00 KB", "12.3 KB", "999 KB", "1.00 MB", "24.0 GB", "10.0 TB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lor"}, "method must be one of full, lora, .*got 'lor'"),
        ({"dtype": "float16"}, "dtype must be one of bfloat16, float32"),
        ({"stage": 4, "world_size": 2}, "stage must be one of 0, 1, 2, 3, got 4"),
        ({"stage": 2}, "stage must be 0 for one rank, got 2"),
        ({"state_bits": 4}, "state_bits must be one of 8, 16, 32, got 4"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, "rank must be below world_size = 2, got 2"),
        ({"targets": ("q_proj", "head")}, "targets must be all-linear or some of q_proj.*got head"),
        ({"targets": "q_proj"}, "targets must be all-linear or some of .*got q_proj"),
        ({"targets": ()}, "targets must be all-linear .*got none"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"bucket_mb": 0}, "bucket_mb must be above 0, got 0"),
        ({"nf4_blocksize": 100}, "nf4_blocksize must be one of 32, .*got 100"),
        ({"memory": "24GB", "reserve": "24GB"}, "reserve must be below memory"),
        ({"reserve": "1GB"}, "reserve must be left out without memory, got 1GB"),
        ({"attention": "flash"}, "attention must be one of sdpa, eager"),
    ],
)
def test_values_that_break_their_rule(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^plan: {message}"):
        plan(MODEL, **options)


@pytest.mark.parametrize("options", [{"batch": 1.5}, {"r": "8"}, {"world_size": True}])
def test_numbers_that_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"must be a whole number, got"):
        plan(MODEL, **options)
