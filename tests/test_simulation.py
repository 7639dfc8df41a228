"""The simulation of sharding: ZeRO's table, bytes on the wire, times in their bounds, its page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import plot_sharding, report_sharding
from benchmarks import simulate_sharding as sim
from benchmarks.links import NETWORKS, Network
from benchmarks.report import BEGIN, END
from feinwerk.plan import resident

MACHINE = sim.Machine()
INFINIBAND, ETHERNET = NETWORKS
FREE = Network("free", 8, within_gbps=1e12, within_us=0, between_gbps=1e12, between_us=0)
SMALL = "smollm2-135m"


# ZeRO (arXiv 1910.02054), figure 1, for 64 ranks; the others by its formulas.
@pytest.mark.parametrize(
    ("world_size", "gigabytes"),
    [
        (1, (120, 120, 120, 120)),
        (4, (120, 52.5, 41.25, 30)),
        (16, (120, 35.6, 21.6, 7.5)),
        (64, (120, 31.4, 16.6, 1.88)),
        (256, (120, 30.4, 15.4, 0.47)),
        (1024, (120, 30.1, 15.1, 0.12)),
    ],
)
def test_zero_paper_table(world_size: int, gigabytes: tuple[float, ...]) -> None:
    found = [sim.zero_bytes(sim.ZERO_SHAPES, world_size, stage, K=12) / 1e9 for stage in range(4)]
    for mine, printed in zip(found, gigabytes, strict=True):
        digits = len(str(printed).partition(".")[2])
        # Half a unit in the last place that is printed.
        assert abs(mine - printed) <= 0.5 * 10.0**-digits + 1e-9


def test_a_trillion_parameters_on_1024_ranks() -> None:
    shapes = [(102_400, 10_000)] * 977
    count = sum(rows * row for rows, row in shapes)
    found = sim.zero_bytes(shapes, 1024, 3, K=12) * 1e12 / count
    assert found / 1e9 == pytest.approx(15.6, abs=0.05)


def test_a_ring_takes_hops_and_its_share_of_the_bytes() -> None:
    network = Network("n", 4, within_gbps=100, within_us=2, between_gbps=10, between_us=20)
    assert network.ring(8e9, 1) == 0
    assert network.ring(8e9, 4) == pytest.approx(3 * 2e-6 + 6e9 / 100e9)
    # Two nodes: 6 hops within, 1 between; the slower link sets the pace.
    assert network.ring(8e9, 8) == pytest.approx(6 * 2e-6 + 20e-6 + 7e9 / 10e9)


@pytest.mark.parametrize("method", ["full", "qdora"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [2, 8, 64])
def test_a_step_takes_between_overlap_of_all_and_of_nothing(
    method: str, stage: int, world_size: int
) -> None:
    model = sim.model_of(SMALL)
    settings = sim.settings_of(method, stage, 8, world_size, MACHINE)
    compute = sim.work(model, settings, MACHINE).total(model.layers)
    free = sim.timing(model, settings, FREE, MACHINE)
    assert free.exposed == pytest.approx(0, abs=1e-6 * compute)
    for network in NETWORKS:
        found = sim.timing(model, settings, network, MACHINE)
        assert found.compute == compute
        assert 0 <= found.exposed <= found.communication * (1 + 1e-9)
        assert found.compute + found.exposed >= found.communication * (1 - 1e-9)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_elements_on_the_wire(world_size: int) -> None:
    """Stages 1 and 2 send 2 P (N - 1) / N elements, stage 3 one and a half times that."""
    model = sim.model_of("llama-2-7b")  # every dimension divides by 8: no padding
    share = (world_size - 1) / world_size
    for stage, times in ((1, 2), (2, 2), (3, 3)):
        settings = sim.settings_of("full", stage, 8, world_size, MACHINE)
        sent = sim.timing(model, settings, INFINIBAND, MACHINE).sent / 2
        # Under stage 3 what is outside the layers is gathered once.
        outside = 2 * model.vocab_size * model.hidden_size if stage == 3 else 0
        expected = (times * model.parameters - outside) * share
        assert sent == pytest.approx(expected, rel=1e-4), stage


def test_padding_of_adapters_with_fewer_rows_than_ranks_is_sent() -> None:
    model = sim.model_of("llama-2-7b")
    adapters = 4 * sum(
        tensor.numel
        for tensor in resident.trained_tensors(model, sim.settings_of("lora", 2, 8, 16, MACHINE))
    )
    sent = {}
    for world_size in (16, 1024):
        settings = sim.settings_of("lora", 2, 8, world_size, MACHINE)
        sent[world_size] = sim.timing(model, settings, INFINIBAND, MACHINE).sent
    assert sent[16] == pytest.approx(2 * adapters * 15 / 16, rel=1e-6)
    assert sent[1024] > 20 * 2 * adapters


def test_slower_links_and_less_work_expose_more() -> None:
    model = sim.model_of("llama-2-7b")
    settings = sim.settings_of("qdora", 3, 8, 64, MACHINE)
    fast = sim.timing(model, settings, INFINIBAND, MACHINE)
    slow = sim.timing(model, settings, ETHERNET, MACHINE)
    assert slow.exposed > fast.exposed > 0
    short = dataclasses.replace(MACHINE, seq=256)
    less = sim.timing(model, sim.settings_of("qdora", 3, 8, 64, short), INFINIBAND, short)
    assert less.exposed > fast.exposed


def test_flop_of_a_step_are_the_usual_ones() -> None:
    """6 P a token and 2 P of recomputation for a full fine-tune, a third less with adapters."""
    model, short = sim.model_of("llama-2-7b"), dataclasses.replace(MACHINE, seq=128)
    speed = short.tflops * 1e12 * short.efficiency
    for method, times in (("full", 8), ("lora", 6)):
        settings = sim.settings_of(method, 2, 8, 8, short)
        done = sim.work(model, settings, short)
        flop = (done.total(model.layers) - done.step) * speed / short.seq
        head = model.vocab_size * model.hidden_size
        # The head is not recomputed.
        expected = times * model.linear_parameters + (times - 2) * head
        assert flop == pytest.approx(expected, rel=0.03)


@pytest.fixture(scope="module")
def stored() -> dict[str, object]:
    return json.loads(sim.RESULTS.read_text(encoding="utf-8"))


def test_the_stored_results_are_those_of_this_code(stored: dict[str, object]) -> None:
    assert stored["assumptions"] == list(sim.ASSUMPTIONS)
    assert stored["networks"] == [network.describe() for network in NETWORKS]
    fresh = {
        json.dumps(case, sort_keys=True)
        for case in sim.records(MACHINE, world_sizes=(8, 1024))
        if case["model"] == "llama-2-7b"
    }
    kept = {json.dumps(case, sort_keys=True) for case in stored["cases"]}  # type: ignore[attr-defined]
    assert len(fresh) == 48
    assert fresh <= kept


def test_the_page_shows_the_stored_results(stored: dict[str, object]) -> None:
    text = report_sharding.PAGE.read_text(encoding="utf-8")
    between = text.split(BEGIN, 1)[1].split(END, 1)[0]
    assert between.strip() == report_sharding.markdown(stored).strip()


def test_a_page_without_markers_is_refused(stored: dict[str, object], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold the markers"):
        report_sharding.render(stored, page)


def test_the_plot_is_drawn(stored: dict[str, object], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_sharding.draw(stored, tmp_path / "sharding.png")
    assert (tmp_path / "sharding.png").read_bytes().startswith(b"\x89PNG")
