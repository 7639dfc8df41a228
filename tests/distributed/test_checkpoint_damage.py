"""A flipped bit, a lost, short or foreign file: loading names it, or goes back a checkpoint."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from feinwerk.distributed import (
    CheckpointError,
    CorruptShard,
    IncompleteCheckpoint,
    load_checkpoint,
    load_latest,
    save_checkpoint,
    verify_checkpoint,
)
from feinwerk.distributed.checkpoint import load as load_module
from tests.distributed.checkpoint_cases import digest, file_bytes, tiny_model, tiny_optimizer, train

FILES = ("__0_0.distcp", ".metadata", "manifest.json")


class Saved:
    """Steps 1 and 2 of one training."""

    def __init__(self, path: Path) -> None:
        self.directory = path / "checkpoints"
        model = tiny_model()
        optimizer = tiny_optimizer(model)
        self.digests = {}
        for step in (1, 2):
            train(model, optimizer, step, 1)
            save_checkpoint(self.directory, step, model, optimizer)
            self.digests[step] = digest(model, optimizer)
        self.path = self.directory / "step-2"
        self.manifest = json.loads((self.path / "manifest.json").read_text())

    def load(self, **options: Any) -> int:
        """Load the latest into something else; what fails must not have changed it."""
        model = tiny_model()
        optimizer = tiny_optimizer(model)
        train(model, optimizer, 7, 2)
        before = digest(model, optimizer)
        loaded = None
        try:
            loaded = load_latest(self.directory, model, optimizer, **options)
        finally:
            assert loaded is not None or digest(model, optimizer) == before
        assert loaded is not None
        assert digest(model, optimizer) == self.digests[loaded.step]
        return loaded.step

    def key_at(self, file: str, place: int) -> str | None:
        """The tensor whose bytes are at a place of a file."""
        for key, tensor in self.manifest["tensors"].items():
            for shard in tensor["shards"]:
                if shard["file"] == file and 0 <= place - shard["start"] < shard["length"]:
                    return str(key)
        return None


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def copy(saved: Saved, tmp_path: Path) -> Saved:
    own = Saved.__new__(Saved)
    own.__dict__ |= saved.__dict__
    own.directory = Path(shutil.copytree(saved.directory, tmp_path / "copy"))
    own.path = own.directory / "step-2"
    return own


def flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "places", [40, pytest.param(None, marks=pytest.mark.full)], ids=["some bytes", "every byte"]
)
def test_a_flipped_bit_is_named(copy: Saved, file: str, places: int | None) -> None:
    path = copy.path / file
    size = path.stat().st_size
    draw = random.Random(0)
    chosen = range(size) if places is None else [0, size - 1, *draw.sample(range(size), places)]
    for place in chosen:
        bit = draw.randrange(8)
        flip(path, place, bit)
        if file == "manifest.json":
            with pytest.raises(CorruptShard) as caught:
                verify_checkpoint(copy.path)
            error = caught.value
        else:
            (error,) = verify_checkpoint(copy.path)
        assert error.file == str(path)
        assert error.parameter == copy.key_at(file, place)
        assert (error.parameter is None) == (file != "__0_0.distcp")
        assert error.rank == 0
        flip(path, place, bit)
    assert verify_checkpoint(copy.path) == []


def test_a_flipped_bit_in_each_tensor_stops_the_load(copy: Saved) -> None:
    for key, tensor in copy.manifest["tensors"].items():
        shard = tensor["shards"][0]
        # Somewhere in the elements: torch.load would not notice.
        place = shard["start"] + shard["length"] // 2
        flip(copy.path / shard["file"], place, 3)
        with pytest.raises(CorruptShard, match=r"fall_back=True would go back to step-1") as caught:
            copy.load()
        assert caught.value.parameter == key
        assert key in str(caught.value)
        assert shard["file"] in str(caught.value)
        flip(copy.path / shard["file"], place, 3)
    assert copy.load() == 2


@pytest.mark.parametrize("file", FILES)
def test_falling_back_is_a_choice_and_a_warning(copy: Saved, file: str) -> None:
    flip(copy.path / file, 100, 0)
    with pytest.raises(CorruptShard):
        copy.load()
    with pytest.warns(UserWarning, match=r"load_latest: going back to step-1: .*" + file):
        assert copy.load(fall_back=True) == 1
    flip(copy.directory / "step-1" / file, 100, 0)
    with pytest.raises(CorruptShard), pytest.warns(UserWarning, match="going back"):
        copy.load(fall_back=True)


@pytest.mark.parametrize("size", [0, 1, 700, -1])
def test_a_short_file(copy: Saved, size: int) -> None:
    path = copy.path / "__0_0.distcp"
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    with pytest.raises(CorruptShard, match="the file ends after") as caught:
        copy.load()
    assert caught.value.parameter is not None


def test_a_long_file(copy: Saved) -> None:
    with (copy.path / "__0_0.distcp").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CorruptShard, match=r"has \d+ bytes, \d+ were written"):
        copy.load()


@pytest.mark.parametrize("file", FILES[:2])
def test_a_missing_file(copy: Saved, file: str) -> None:
    (copy.path / file).unlink()
    with pytest.raises(CorruptShard, match=f"{file}.*the file is missing"):
        copy.load()


def test_without_a_manifest_it_is_no_checkpoint(copy: Saved) -> None:
    (copy.path / "manifest.json").unlink()
    assert copy.load() == 1
    model = tiny_model()
    with pytest.raises(IncompleteCheckpoint, match=r"there is no manifest\.json"):
        load_checkpoint(copy.path, model, tiny_optimizer(model))
    with pytest.raises(IncompleteCheckpoint, match="there is no such directory"):
        verify_checkpoint(copy.directory / "step-9")


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_step(copy: Saved, file: str) -> None:
    """The mix of two steps that a checkpoint written in place can turn into."""
    shutil.copy(copy.directory / "step-1" / file, copy.path / file)
    with pytest.raises(CorruptShard) as caught:
        copy.load()
    assert caught.value.rank == 0
    # A foreign manifest fits itself, but none of the files beside it.
    foreign = "__0_0.distcp" if file == "manifest.json" else file
    assert foreign in str(caught.value)


def test_without_verification_what_is_read_is_read_as_it_is(copy: Saved) -> None:
    shard = copy.manifest["tensors"]["model.0.weight"]["shards"][0]
    flip(copy.path / shard["file"], shard["start"] + shard["length"] // 2, 3)
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    assert load_latest(copy.directory, model, optimizer, verify=False) is not None
    assert digest(model, optimizer) != copy.digests[2]


def test_damage_between_verification_and_reading(
    copy: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read is checked as it is read; what may have been loaded by then, it says."""
    shard = copy.manifest["tensors"]["optimizer.0.weight.exp_avg_absmax"]["shards"][0]
    verify = load_module.find_damage

    def then_damage(*args: Any) -> Any:
        found = verify(*args)
        flip(copy.path / shard["file"], shard["start"] + shard["length"] // 2, 3)
        return found

    monkeypatch.setattr(load_module, "find_damage", then_damage)
    model = tiny_model()
    with pytest.raises(CorruptShard, match="model and optimizer are partly loaded") as caught:
        load_checkpoint(copy.path, model, tiny_optimizer(model))
    assert caught.value.partly_loaded
    assert caught.value.parameter == "optimizer.0.weight.exp_avg_absmax"


def test_loading_and_verifying_write_nothing(copy: Saved) -> None:
    before = file_bytes(copy.directory)
    assert copy.load() == 2
    assert verify_checkpoint(copy.path) == []
    assert file_bytes(copy.directory) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "reads feinwerk-checkpoint version 1, got"),
        (lambda m: m["tensors"]["model.0.weight"].update(shape=[8, 12]), "do not cover it"),
        (lambda m: m["tensors"].pop("model.0.bias"), "leave a gap or overlap at byte"),
        (lambda m: m["tensors"]["model.0.bias"]["shards"][0].update(file="../x"), "unlisted file"),
        (lambda m: m["tensors"]["model.0.bias"].update(dtype="float7"), "unknown dtype float7"),
    ],
)
def test_a_manifest_that_breaks_its_rules(copy: Saved, change: Any, message: str) -> None:
    from feinwerk.distributed.checkpoint.manifest import _seal

    content = json.loads((copy.path / "manifest.json").read_text())
    del content["crc32"]
    change(content)
    (copy.path / "manifest.json").write_bytes(_seal(content))
    with pytest.raises(IncompleteCheckpoint, match=message):
        verify_checkpoint(copy.path)


def test_a_disk_that_fails_while_reading(copy: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.stat

    def failing(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).endswith(".distcp"):
            raise OSError(5, "Input/output error", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", failing)
    with pytest.raises(CheckpointError, match=r"verification failed: OSError: \[Errno 5\]"):
        copy.load()
