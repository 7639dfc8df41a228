"""State dicts and adapter files of a sharded NF4 base: in from everywhere, out to everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from feinwerk.distributed import (
    load_checkpoint,
    load_full_state_dict,
    save_checkpoint,
    shard_nf4,
    unshard_nf4,
)
from feinwerk.nn import add_adapters, load_adapter, save_adapter
from feinwerk.optim import AdamW
from tests.distributed.sharded_models import (
    adapted_model,
    base_model,
    differing,
    loss_of,
    shard,
    trained,
    whole,
)
from tests.optim.processes import run_ranks

OPTIONS: dict[str, Any] = {"lr": 1e-2, "min_quantized_numel": 512}
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def entries(model: Any) -> dict[str, torch.Tensor]:
    """Every NF4 weight in bitsandbytes' keys; a collective under fully_shard."""
    found = {}
    for name, weight in unshard_nf4(model):
        found.update(weight.to_bitsandbytes(f"{name}."))
    return found


def sharded_entries(model: Any) -> dict[str, torch.Tensor]:
    """Without the layer that stays replicated, which takes any format."""
    return {key: value for key, value in entries(model).items() if "odd" not in key}


def other(mesh: Any, double_quant: bool = True, ignore: bool = True) -> Any:
    """A sharded model with other values."""
    model = base_model(seed=7, double_quant=double_quant)
    shard(model, mesh, ignore=ignore)
    return model


def move_states(mesh: DeviceMesh, rank: int, folder: str) -> dict[str, Any]:
    """Names of tensors that differ after each way in or out."""
    found: dict[str, Any] = {}
    for double_quant in (True, False):
        plain = base_model(double_quant=double_quant)
        original, state = entries(plain), plain.state_dict()
        kind = f"double_quant={double_quant}"

        model: Any = base_model(double_quant=double_quant)
        shard_nf4(model, mesh)
        found[f"{kind}: viewed by rows"] = differing(state, model.state_dict())

        model = base_model(double_quant=double_quant)
        shard(model, mesh)
        found[f"{kind}: unshard_nf4"] = differing(original, entries(model))

        loaded = other(mesh, double_quant=double_quant)
        found[f"{kind}: first"] = differing(original, entries(loaded))
        load_full_state_dict(loaded, state)
        found[f"{kind}: bitsandbytes' keys"] = differing(original, entries(loaded))

        shards = get_model_state_dict(model)
        loaded = other(mesh, double_quant=double_quant)
        loaded.load_state_dict(shards)
        found[f"{kind}: shards"] = differing(original, entries(loaded))

        full = get_model_state_dict(model, options=FULL)
        found[f"{kind}: full on rank 0 only"] = bool(full) == (rank == 0)
        if rank == 0:
            single = base_model(double_quant=double_quant, seed=7)
            single.load_state_dict(full)
            found[f"{kind}: into one process"] = differing(original, entries(single))
        loaded = other(mesh, double_quant=double_quant)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(loaded, full, options=options)
        found[f"{kind}: broadcast"] = differing(original, entries(loaded))

        path = f"{folder}/{double_quant}"
        dcp.save(get_model_state_dict(model), checkpoint_id=path)
        found[f"{kind}: loss"] = loss_of(model).item()
    return found


def load_with_another_world_size(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world_size,))
    found: dict[str, Any] = {}
    for double_quant in (True, False):
        model = other(mesh, double_quant=double_quant)
        state = get_model_state_dict(model)
        dcp.load(state, checkpoint_id=f"{folder}/{double_quant}")
        set_model_state_dict(model, state)
        original = entries(base_model(double_quant=double_quant))
        found[f"{double_quant}"] = differing(original, entries(model))
        found[f"{double_quant}: loss"] = loss_of(model).item()
    return found


def everything(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world_size,))
    return {"moved": move_states(mesh, rank, folder), "other": other_states(mesh, rank, folder)}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], str]:
    pytest.importorskip("safetensors")
    folder = str(tmp_path_factory.mktemp("states"))
    return run_ranks(everything, 2, folder, timeout=150), folder


def test_state_dicts_keep_every_bit_and_dcp_reshards(two_ranks: tuple[list[Any], str]) -> None:
    losses: dict[bool, set[float]] = {True: set(), False: set()}
    results, folder = two_ranks
    for rank, result in enumerate(results):
        found = result["moved"]
        for double_quant in (True, False):
            kind = f"double_quant={double_quant}"
            losses[double_quant].add(found.pop(f"{kind}: loss"))
            assert found.pop(f"{kind}: first"), "the other model must differ"
            assert found.pop(f"{kind}: full on rank 0 only")
        assert len(found) == (12 if rank == 0 else 10)
        assert not any(found.values()), found
    for found in run_ranks(load_with_another_world_size, 3, folder):
        for double_quant in (True, False):
            assert not found[f"{double_quant}"]
            losses[double_quant].add(found[f"{double_quant}: loss"])
    assert all(len(same) == 1 for same in losses.values())


def refused(call: Any) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing was refused"


def other_states(mesh: DeviceMesh, rank: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    # From the meta device: a rank never holds more than its rows.
    plain = base_model()
    state = plain.state_dict()
    with torch.device("meta"):
        model: Any = base_model()
    shard(model, mesh)
    model.to_empty(device="cpu")
    missing = load_full_state_dict(model, state)
    found["meta keys"] = [*missing.missing_keys, *missing.unexpected_keys]
    found["meta"] = differing(entries(plain), entries(model))
    found["meta loss"] = loss_of(model).item() == loss_of(plain).item()

    # The same by torch's own functions, which assign shards to what is still on meta.
    full = {} if rank else get_model_state_dict(model, options=FULL)
    if rank:
        get_model_state_dict(model, options=FULL)
    with torch.device("meta"):
        assigned: Any = base_model()
    shard(assigned, mesh)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(assigned, full, options=options)
    found["assigned"] = differing(entries(plain), entries(assigned))

    # A weight quantized otherwise, and parameters that fully_shard holds.
    unlike = base_model(double_quant=False).state_dict()
    before = sharded_entries(model)
    found["other format"] = refused(lambda: load_full_state_dict(model, unlike))
    up = {key.removeprefix("1.up."): value for key, value in state.items() if "1.up.w" in key}
    found["assign"] = refused(lambda: model[1].up.load_state_dict(up, strict=False, assign=True))
    found["changed by refusals"] = differing(before, sharded_entries(model))

    # Adapters, in PEFT's files.
    one, many = adapted_model(dora=True), adapted_model(dora=True)
    shard(many, mesh)
    save_adapter(many, f"{folder}/sharded")
    if rank == 0:
        save_adapter(one, f"{folder}/plain")
        found["files"] = sorted(path.name for path in Path(folder, "sharded").iterdir())
        found["equal files"] = all(
            Path(folder, kind, name).read_bytes() == Path(folder, "plain", name).read_bytes()
            for kind, name in (("sharded", name) for name in found["files"])
        )
    torch.distributed.barrier()
    loaded = base_model()
    add_adapters(loaded, 4, lora_alpha=8, dora=True)
    shard(loaded, mesh)
    load_adapter(loaded, f"{folder}/sharded")
    found["loaded adapters"] = differing(
        {name: whole(p) for name, p in trained(one).items()},
        {name: whole(p) for name, p in trained(loaded).items()},
    )
    found["loaded loss"] = loss_of(loaded).item() == loss_of(one).item()

    # A weight that could not be cut by rows, and was not ignored either, is cut by bytes.
    model = base_model()
    shard(model, mesh, ignore=False)
    found["cut by bytes"] = model[1].odd.weight.shape, model[1].odd.weight.to_local().shape
    found["cut by bytes, weights"] = differing(entries(plain), entries(model))
    loaded = other(mesh, ignore=False)
    loaded.load_state_dict(get_model_state_dict(model))
    found["cut by bytes, shards"] = differing(entries(plain), entries(loaded))
    found["cut by bytes, loss"] = loss_of(loaded).item() == loss_of(plain).item()

    # A checkpoint of a training: adapters and their states alone.
    optimizer = AdamW(trained(many).values(), **OPTIONS)
    loss_of(many).backward()
    optimizer.step()
    optimizer.zero_grad()
    found["checkpoint"] = str(save_checkpoint(f"{folder}/training", 1, many, optimizer))
    found["trained"] = {name: whole(p) for name, p in trained(many).items()}
    found["next loss"] = loss_of(many).item()
    found["merge"] = refused(lambda: many[1].up.merge())
    return found


def test_meta_loading_refusals_and_adapter_files(two_ranks: tuple[list[Any], str]) -> None:
    for rank, result in enumerate(two_ranks[0]):
        found = result["other"]
        assert not found["meta keys"]
        assert not found["meta"]
        assert found["meta loss"]
        assert not found["assigned"]
        rule = "0.weight must have blocksize=64, double_quant=True: its rows have been viewed"
        assert rule in found["other format"]
        assert "weight must be loaded with assign=False, or as shards" in found["assign"]
        assert not found["changed by refusals"]
        if rank == 0:
            assert found["files"] == ["adapter_config.json", "adapter_model.safetensors"]
            assert found["equal files"]
        assert not found["loaded adapters"]
        assert found["loaded loss"]
        assert found["cut by bytes"] == ((64 * 30, 1), (64 * 30 // 2, 1))
        assert not found["cut by bytes, weights"]
        assert not found["cut by bytes, shards"]
        assert found["cut by bytes, loss"]
        assert "weight must be gathered before it is used" in found["merge"]

        # Into one process, whose base is not sharded.
        single = adapted_model(dora=True)
        optimizer = AdamW(trained(single).values(), **OPTIONS)
        load_checkpoint(found["checkpoint"], single, optimizer)
        assert not differing(found["trained"], {n: p.detach() for n, p in trained(single).items()})
        assert loss_of(single).item() == found["next loss"]
