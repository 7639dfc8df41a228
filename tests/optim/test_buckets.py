"""Tests of the buckets' arithmetic: cuts as torch.chunk makes them, packing there and back."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from feinwerk.optim.buckets import make_buckets

SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=6)


@hypothesis.given(SHAPES, st.integers(1, 5), st.integers(1, 400))
def test_packing_there_and_back(shapes: list[tuple[int, ...]], world: int, capacity: int) -> None:
    buckets = make_buckets(shapes, [0] * len(shapes), [4] * len(shapes), world, capacity)
    seen = []
    for bucket in buckets:
        sections = torch.full((world, bucket.section), torch.nan)
        tensors = {s.index: torch.randn(shapes[s.index]) for s in bucket.slots}
        for slot in bucket.slots:
            slot.pack(tensors[slot.index], sections)
            seen.append(slot.index)
        assert not sections.isnan().any()  # all of it is some slot's
        for slot in bucket.slots:
            whole = tensors[slot.index]
            back = torch.full_like(whole, torch.nan)
            slot.unpack(sections, back)
            assert torch.equal(back, whole)
            chunks = list(whole.chunk(world)) if whole.dim() and whole.shape[0] else []
            for rank in range(world):
                mine = slot.in_section(sections[rank], rank)
                expected = (
                    chunks[rank] if rank < len(chunks) else whole[:0] if whole.dim() else whole
                )
                assert torch.equal(mine, expected)
                assert torch.equal(slot.rows_of(whole, rank), expected)
            parts = torch.full((world, bucket.section), torch.nan)
            cut = len(seen) % world
            slot.pack(whole, parts[:cut], 0)
            slot.pack(whole, parts[cut:], cut)
            room = slice(slot.offset, slot.offset + slot.room)
            assert torch.equal(parts[:, room], sections[:, room])
            back = torch.full_like(whole, torch.nan)
            slot.unpack(parts[:cut], back, 0)
            slot.unpack(parts[cut:], back, cut)
            assert torch.equal(back, whole)
            slot.pack(None, sections)
            assert not slot.in_section(sections[0], 0).any()
        numbers = sum(1 for s in bucket.slots if not s.shape)
        held = sum(bucket.local_numel(rank) for rank in range(world))
        assert held == bucket.numel + numbers * (world - 1)
    assert sorted(seen) == list(range(len(shapes)))


def test_any_strides() -> None:
    (bucket,) = make_buckets([(5, 3, 2, 2)], [0], [4], 2, 1 << 20)
    whole = torch.randn(5, 3, 2, 2).to(memory_format=torch.channels_last)
    sections = torch.empty(2, bucket.section)
    bucket.slots[0].pack(whole, sections)
    back = torch.zeros(5, 3, 2, 2).to(memory_format=torch.channels_last)
    bucket.slots[0].unpack(sections, back)
    assert torch.equal(back, whole)


def test_capacity_kinds_and_order() -> None:
    shapes, kinds = [(10,), (10,), (10,), (100,), (10,)], ["a", "b", "a", "a", "a"]
    buckets = make_buckets(shapes, kinds, [4] * 5, 2, 80)
    found = [(bucket.kind, [slot.index for slot in bucket.slots]) for bucket in buckets]
    # The third fits beside neither: 4 alone, then 3, larger than any bucket, then 2 and 0.
    assert found == [("a", [4]), ("a", [3]), ("b", [1]), ("a", [2, 0])]
    assert sum(bucket.numel for bucket in buckets) == sum(map(math.prod, shapes))


def test_rejections() -> None:
    with pytest.raises(ValueError, match="make_buckets: capacity must be at least 1, got 0"):
        make_buckets([(2,)], [0], [4], 2, 0)
    with pytest.raises(ValueError, match="make_buckets: world_size must be at least 1, got 0"):
        make_buckets([(2,)], [0], [4], 0, 4)
