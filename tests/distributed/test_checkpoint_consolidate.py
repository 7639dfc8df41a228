"""consolidate: one safetensors file with every bit, written in a few MiB of memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from feinwerk.distributed import CorruptShard, consolidate, save_checkpoint
from feinwerk.distributed.checkpoint.consolidate import runs
from feinwerk.optim import AdamW
from tests.distributed.checkpoint_cases import contents, tiny_model, tiny_optimizer, train


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    model = tiny_model(dtype=torch.bfloat16)
    optimizer = tiny_optimizer(model)
    train(model, optimizer, 0, 2)
    path = save_checkpoint(tmp_path, 2, model, optimizer, parameters="all")
    return path, contents(model, optimizer)


@pytest.mark.parametrize("part", ["model", "optimizer", "all"])
def test_every_tensor_is_there_to_the_bit(
    checkpoint: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, part: str
) -> None:
    path, expected = checkpoint
    out = consolidate(path, tmp_path / "out.safetensors", part=part)
    found = load_file(out)
    prefix = "" if part == "all" else f"{part}."
    expected = {k.removeprefix(prefix): v for k, v in expected.items() if k.startswith(prefix)}
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    header = json.loads(out.read_bytes()[8:].partition(b"}}")[0] + b"}}")
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % found[name].element_size() == 0
    assert {p.name for p in tmp_path.iterdir()} == {"step-2", "out.safetensors"}


def test_the_model_part_loads_into_the_model(
    checkpoint: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    path, _ = checkpoint
    model = tiny_model(seed=3, dtype=torch.bfloat16)
    model.load_state_dict(load_file(consolidate(path, tmp_path / "model.safetensors")))


def test_a_failure_leaves_no_file(
    checkpoint: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    path, _ = checkpoint
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match='part must be "model", "optimizer" or "all", got'):
        consolidate(path, out, part="weights")  # type: ignore[arg-type]
    data = bytearray((path / "__0_0.distcp").read_bytes())
    damaged = bytearray(data)
    damaged[data.index(b"PK\x05\x06")] ^= 1  # the end of the first archive
    (path / "__0_0.distcp").write_bytes(damaged)
    with pytest.raises(CorruptShard, match="have checksum"):
        consolidate(path, out)
    with pytest.raises(CorruptShard, match="the archive cannot be read"):
        consolidate(path, out, verify=False, part="all")
    assert {p.name for p in tmp_path.iterdir()} == {"step-2"}


@hypothesis.given(st.data())
def test_runs_cover_a_box_and_nothing_else(data: st.DataObject) -> None:
    whole = tuple(data.draw(st.lists(st.integers(1, 4), max_size=4)))
    shape = tuple(data.draw(st.integers(1, size)) for size in whole)
    offsets = tuple(
        data.draw(st.integers(0, size - own)) for size, own in zip(whole, shape, strict=True)
    )
    numbers = torch.arange(torch.Size(whole).numel()).reshape(whole)
    box = numbers
    for dim, (offset, size) in enumerate(zip(offsets, shape, strict=True)):
        box = box.narrow(dim, offset, size)
    found = [start + i for start, count in runs(whole, offsets, shape) for i in range(count)]
    assert found == box.reshape(-1).tolist()


MEASURE = """
import sys
from feinwerk.distributed import consolidate

def kib(name):
    return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1])

small, large, out = sys.argv[1:]
consolidate(small, out, part="all")  # what is loaded and allocated once is there by now
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
before = kib("VmRSS")
consolidate(large, out, part="all")
print("KiB", kib("VmHWM") - before)
"""


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    paths = []
    for rows in (4, 4096):
        model = nn.Linear(4096, rows, bias=False)
        optimizer = AdamW(model.parameters())
        model(torch.ones(1, 4096)).sum().backward()
        optimizer.step()
        paths.append(str(save_checkpoint(tmp_path / str(rows), 1, model, optimizer)))
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-c", MEASURE, *paths, str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    used = re.search(r"KiB (-?\d+)", run.stdout)
    assert used is not None
    assert out.stat().st_size > 96 << 20  # 64 MiB of weights, 32 MiB of codes
    assert int(used[1]) < 8 << 10, "KiB beside a tensor of 64 MiB"
