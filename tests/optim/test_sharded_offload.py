"""ShardedAdamW with its states elsewhere: the same bits, in memory what was promised, resumable."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from feinwerk.distributed import load_latest, save_checkpoint
from feinwerk.optim import AdamW, ShardedAdamW
from feinwerk.optim.disk_errors import OffloadError, StatesInUse
from tests.optim.fault_ranks import run_to_the_end
from tests.optim.sharded_cases import (
    alternating,
    backward,
    compare_with_plain,
    freeze,
    groups,
    parameters,
)


def results(endings: list[Any]) -> list[Any]:
    for rank, ending in enumerate(endings):
        assert ending.error is None, f"rank {rank}: {ending.text}"
        assert (ending.signal, ending.stuck) == (None, False), f"rank {rank}: {ending}"
    return [ending.result for ending in endings]


def offloaded_bits(rank: int, world_size: int, folder: str) -> dict[str, list[str]]:
    disk = partial(dict, offload="disk", offload_fsync=False)
    options: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "cpu": ({"offload": "cpu"}, {}),
        "one bucket": (disk(offload_directory=f"{folder}/one"), {}),
        "many buckets": (disk(offload_directory=f"{folder}/many", bucket_mb=1e-3), {}),
        "stage 1, synced": (
            {"offload": "disk", "offload_directory": f"{folder}/sync", "stage": 1,
             "bucket_mb": 0.01},
            {"max_grad_norm": 1.0},
        ),
        "unused": (
            disk(offload_directory=f"{folder}/unused", bucket_mb=1e-3), {"unused": alternating}
        ),
        "frozen": (disk(offload_directory=f"{folder}/frozen"), {"give": freeze}),
        "groups": (disk(offload_directory=f"{folder}/groups", bucket_mb=1e-3), {"give": groups}),
        "bf16": (
            disk(offload_directory=f"{folder}/bf16"),
            {"dtype": torch.bfloat16, "same_gradients": True},
        ),
        "stochastic": (
            disk(offload_directory=f"{folder}/stochastic"),
            {"dtype": torch.bfloat16, "bf16_params": "stochastic", "same_gradients": True},
        ),
        "32 bits": (disk(offload_directory=f"{folder}/32"), {"state_bits": 32}),
    }  # fmt: skip
    return {
        name: compare_with_plain(rank, world_size, given, **more)
        for name, (given, more) in options.items()
    }


@pytest.mark.parametrize(
    "world_size", [1, 2, pytest.param(4, marks=pytest.mark.full)], ids="{}-ranks".format
)
def test_offloaded_states_have_the_same_bits(world_size: int, tmp_path: Path) -> None:
    for rank, found in enumerate(
        results(run_to_the_end(offloaded_bits, world_size, str(tmp_path), limit=120))
    ):
        assert found == {name: [] for name in found}, rank
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {f"rank-{rank}" for rank in range(world_size)}


def train(params: list[Any], optimizer: Any, steps: range) -> None:
    for step in steps:
        backward(params, 0, step)
        optimizer.step()
        optimizer.zero_grad()


def equal_states(params: list[Any], optimizer: Any, other: list[Any], reference: Any) -> bool:
    return all(
        torch.equal(a.detach(), b.detach())
        and set(optimizer.state[a]) == set(reference.state[b])
        and all(torch.equal(t, reference.state[b][n]) for n, t in optimizer.state[a].items())
        for a, b in zip(params, other, strict=True)
    )


def test_a_state_dict_goes_from_memory_to_disk_and_back(tmp_path: Path) -> None:
    plain = parameters()
    reference = AdamW(plain, lr=0.01)
    train(plain, reference, range(2))
    for to in range(2, 5):
        params = parameters()
        optimizer = ShardedAdamW(
            params, lr=0.01, offload="disk", offload_directory=tmp_path / str(to), bucket_mb=1e-3
        )
        if to == 4:
            train(params, optimizer, range(3))  # what is loaded replaces what is there
        for param, other in zip(params, plain, strict=True):
            param.data.copy_(other.data)
        optimizer.load_state_dict(reference.state_dict())
        assert equal_states(params, optimizer, plain, reference)
        train(params, optimizer, range(to, to + 2))
        train(plain, reference, range(to, to + 2))
        assert equal_states(params, optimizer, plain, reference)
        back = AdamW(params, lr=0.01)
        back.load_state_dict(optimizer.state_dict())
        optimizer.close()
        train(params, back, range(9, 11))
        train(plain, reference, range(9, 11))
        assert equal_states(params, back, plain, reference)


def test_loading_into_an_optimizer_that_has_stepped() -> None:
    plain, params = parameters(), parameters()
    reference, optimizer = AdamW(plain, lr=0.01), ShardedAdamW(params, lr=0.01)
    train(plain, reference, range(2))
    train(params, optimizer, range(3))
    for param, other in zip(params, plain, strict=True):
        param.data.copy_(other.data)
    optimizer.load_state_dict(reference.state_dict())
    train(params, optimizer, range(4, 6))
    train(plain, reference, range(4, 6))
    assert equal_states(params, optimizer, plain, reference)


def test_state_that_is_set_or_dropped_counts(tmp_path: Path) -> None:
    params, plain = parameters(), parameters()
    optimizer = ShardedAdamW(
        params, lr=0.01, offload="disk", offload_directory=tmp_path, bucket_mb=1e-3
    )
    reference = AdamW(plain, lr=0.01)
    for one, some in ((optimizer, params), (reference, plain)):
        train(some, one, range(2))
        one.state[some[0]]["exp_avg_codes"] = torch.full_like(some[0], 130, dtype=torch.uint8)
        one.state[some[1]]["exp_avg"].fill_(0.5)  # in place, through the map
        one.state[some[1]]["step"].fill_(7)
        del one.state[some[5]]
        train(some, one, range(2, 4))
    assert float(optimizer.state[params[1]]["step"]) == 9
    assert float(optimizer.state[params[5]]["step"]) == 2
    assert equal_states(params, optimizer, plain, reference)
    optimizer.state[params[0]]["exp_avg"] = torch.zeros(7, 700)
    backward(params, 0, 4)
    with pytest.raises(ValueError, match="record of bucket 3 must have the tensors"):
        optimizer.step()


def test_groups_that_come_later(tmp_path: Path) -> None:
    params, plain = parameters(), parameters()
    optimizer = ShardedAdamW(params[:3], lr=0.01, offload="disk", offload_directory=tmp_path)
    reference = AdamW(plain[:3], lr=0.01)
    for one, some in ((optimizer, params), (reference, plain)):
        train(some, one, range(2))
        one.add_param_group({"params": some[3:]})
        train(some, one, range(2, 4))
        some[0].requires_grad_(False)
        train(some, one, range(4, 6))
        some[0].requires_grad_(True)
        train(some, one, range(6, 8))
    assert equal_states(params, optimizer, plain, reference)


def test_the_directory_is_let_go(tmp_path: Path) -> None:
    params = parameters()

    def another() -> ShardedAdamW:
        return ShardedAdamW(params, lr=0.01, offload="disk", offload_directory=tmp_path)

    first = another()
    train(params, first, range(1))
    second = another()
    backward(params, 0, 1)
    with pytest.raises(StatesInUse, match="another object of this process"):
        second.step()
    held = first.state[params[0]]["exp_avg_codes"]
    before = held.clone()
    first.close()
    second.step()
    assert torch.equal(held, before), "what was shown stays usable, and is nobody else's"
    del second
    train(params, another(), range(2))


def test_rejections(tmp_path: Path) -> None:
    params = parameters()
    for options, message in (
        ({"offload": "tape"}, 'offload must be None, "cpu" or "disk", got \'tape\''),
        ({"offload": "disk"}, "offload_directory must be given with offload=\"disk\""),
        ({"offload_directory": tmp_path}, "and only then, got PosixPath"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ShardedAdamW(params, **options)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    optimizer = ShardedAdamW(params, offload="disk", offload_directory=tmp_path / "file")
    backward(params, 0, 0)
    with pytest.raises(OffloadError, match="Not a directory"):
        optimizer.step()


def save_and_resume(
    rank: int, world_size: int, folder: str, save: bool, more: int
) -> dict[str, Any]:
    model = torch.nn.ParameterList(parameters())
    params = list(model)
    optimizer = ShardedAdamW(
        params, lr=0.01, offload="disk", offload_directory=f"{folder}/disk-{world_size}",
        bucket_mb=1e-3,
    )  # fmt: skip
    if save:
        train(params, optimizer, range(3))
        save_checkpoint(f"{folder}/checkpoints", 3, model, optimizer)
    else:
        assert load_latest(f"{folder}/checkpoints", model, optimizer) is not None
        train(params, optimizer, range(3, 3 + more))
    shown = {
        f"{i}.{name}": tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
        for i, param in enumerate(params)
        for name, tensor in optimizer.state[param].items()
    }
    return shown | {str(i): param.detach().clone() for i, param in enumerate(params)}


def test_checkpoints_of_states_on_disk(tmp_path: Path) -> None:
    plain = parameters()
    reference = AdamW(plain, lr=0.01)
    train(plain, reference, range(3))
    results(run_to_the_end(save_and_resume, 2, str(tmp_path), True, 0))
    # The average of three equal gradients is not that gradient: there, only what is loaded counts.
    for world_size, more in ((3, 0), (2, 2)):
        train(plain, reference, range(3, 3 + more))
        for found in results(
            run_to_the_end(save_and_resume, world_size, str(tmp_path), False, more)
        ):
            for i, param in enumerate(plain):
                assert torch.equal(found[str(i)], param.detach())
                for name, tensor in reference.state[param].items():
                    assert torch.equal(found[f"{i}.{name}"], tensor), (world_size, i, name)


MEMORY = """
import os, sys, torch
from feinwerk.distributed import load_latest, save_checkpoint
from feinwerk.optim import ShardedAdamW

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def peak():
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

def run(folder, count, numel, offload):
    model = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(1, numel)) for _ in range(count))
    options = {"offload_directory": folder + "/states"} if offload else {}
    optimizer = ShardedAdamW(model, state_bits=32, offload="disk" if offload else None,
                             bucket_mb=numel * 4 / 2**20, **options)
    found = []
    for param in model:
        param.grad = torch.ones_like(param)
    for act in ("step", "step", "save", "load", "step"):
        start = resident()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        if act == "step":
            optimizer.step()
        elif act == "save":
            save_checkpoint(folder + "/saved", 1, model, optimizer)
        else:
            load_latest(folder + "/saved", model, optimizer)
        found.append(peak() - start)
        if not found[1:]:
            first = start
        if offload:
            print(act, (peak() - start) / (8 * numel), (resident() - first) / (8 * numel),
                  file=sys.stderr)
    optimizer.close()
    return max(found), resident() - first

torch.set_num_threads(1)
run(sys.argv[1] + "/warm", 3, 1000, True)
print(*run(sys.argv[1] + "/run", 24, int(sys.argv[2]), sys.argv[3] == "disk"))
"""


def test_memory_stays_bounded_in_steps_saves_and_loads(tmp_path: Path) -> None:
    numel = 1 << 18
    states = 8 * numel  # of one bucket, fp32 moments
    found = {}
    for offload in ("disk", "None"):
        command = [sys.executable, "-c", MEMORY, str(tmp_path / offload), str(numel), offload]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        found[offload] = [int(number) / states for number in run.stdout.split()], run.stderr
    (most, stays), log = found["disk"]
    assert most <= 3.5, f"{most:.1f} buckets of 24\n{log}"
    assert stays <= 6, f"{stays:.1f} buckets of 24\n{log}"
    assert found["None"][0][1] >= 24, "the measure sees states in memory"
