"""Any engine and world size loads what any other has saved, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from feinwerk.distributed import list_checkpoints, verify_checkpoint
from tests.distributed.checkpoint_cases import run
from tests.distributed.checkpoint_engines import load_one, save_one

Engine = tuple[str, int]


def name_of(engine: Engine) -> str:
    return f"{engine[0]}-{engine[1]}"


def save_all(rank: int, world_size: int, root: Path, engines: list[str]) -> dict[str, Any]:
    return {
        engine: save_one(rank, world_size, root / name_of((engine, world_size)), engine)
        for engine in engines
    }


def load_all(
    rank: int, world_size: int, root: Path, engines: list[str], saved: list[Engine]
) -> dict[tuple[str, Engine], Any]:
    return {
        (engine, source): load_one(rank, world_size, root / name_of(source), engine)
        for engine in engines
        for source in saved
    }


def check(root: Path, savers: list[Engine], loaders: list[Engine]) -> None:
    """Save with each of `savers`, load each of these with each of `loaders`."""

    def by_size(engines: list[Engine]) -> dict[int, list[str]]:
        sizes: dict[int, list[str]] = {}
        for engine, size in engines:
            sizes.setdefault(size, []).append(engine)
        return sizes

    saved: dict[Engine, tuple[str, str]] = {}
    for size, engines in by_size(savers).items():
        results = run(save_all, size, root, engines)
        for engine in engines:
            assert len({result[engine] for result in results}) == 1, "the ranks agree"
            saved[engine, size] = results[0][engine]
            (stored,) = list_checkpoints(root / name_of((engine, size)))
            assert verify_checkpoint(stored.path) == []
    for size, engines in by_size(loaders).items():
        results = run(load_all, size, root, engines, savers, limit=4 * len(engines) * len(savers))
        for rank, result in enumerate(results):
            for (engine, source), (now, later, extra) in result.items():
                case = f"{name_of(source)} loaded by {name_of((engine, size))}"
                assert now == saved[source][0], case
                if source == (engine, size):
                    assert later == saved[source][1], f"{case}: another trajectory"
                assert extra == (("rank", rank) if source[1] == size else None), case


def test_two_ranks_three_ranks_and_one_process(tmp_path: Path) -> None:
    check(
        tmp_path,
        [("plain", 1), ("fsdp2", 2), ("stage2", 2), ("ddp", 2), ("fsdp2", 3)],
        [("plain", 1), ("stage2", 3), ("fsdp2", 3), ("stage2-disk", 2), ("fsdp2", 2)],
    )
    described = json.loads((tmp_path / "fsdp2-3/step-2/manifest.json").read_text())
    assert (described["engine"], described["world_size"]) == ("fsdp2", 3)
    codes = described["tensors"]["optimizer.first.weight.exp_avg_codes"]
    assert [(s["shape"], s["rank"]) for s in codes["shards"]] == [
        ([4, 20], 0), ([4, 20], 1), ([3, 20], 2)
    ]  # fmt: skip
    # A tensor that all ranks have is written by one, and not always by the same.
    ranks = {
        tensor["shards"][0]["rank"]
        for key, tensor in described["tensors"].items()
        if key.endswith(".step")
    }
    assert len(ranks) > 1


@pytest.mark.full
def test_every_engine_and_world_size(tmp_path: Path) -> None:
    engines = [("plain", 1), ("plain", 2), ("ddp", 2), ("hsdp", 4)]
    engines += [("stage2-disk", 2), ("stage2-disk", 3), ("stage2-cpu", 3)]
    engines += [(name, size) for name in ("fsdp2", "stage1", "stage2") for size in (1, 2, 3, 4)]
    check(tmp_path, engines, engines)
