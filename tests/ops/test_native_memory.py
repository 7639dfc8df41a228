"""The native path and memory: the workspace that each thread keeps, and where outputs live."""

from __future__ import annotations

import threading

import pytest
import torch

from feinwerk import _native
from feinwerk.testing import assert_same_bits, make_weight, make_x

pytestmark = pytest.mark.skipif(not _native.available(), reason="needs the native extension")


def test_workspace_is_kept_and_grows() -> None:
    scratch = _native._Scratch()
    address = scratch.at_least(1000)
    assert address % 64 == 0
    assert scratch.at_least(500) == address
    scratch.at_least(1 << 20)
    assert scratch.buffer is not None
    assert scratch.buffer.numel() >= 1 << 20


def test_threads_have_workspaces_of_their_own() -> None:
    weight, x = make_weight(96, 256, double_quant=True), make_x((40, 256), torch.float32)
    want = weight.linear(x)
    results: list[torch.Tensor] = []
    addresses = set()

    def work() -> None:
        for _ in range(20):
            results.append(weight.linear(x))
        addresses.add(_native._scratch.at_least(1))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    here = _native._scratch.at_least(1)
    for thread in threads:
        thread.join()
    assert here not in addresses
    assert len(results) == 80
    for result in results:
        assert_same_bits(result, want)


def test_results_ignore_the_default_device() -> None:
    weight, x = make_weight(8, 64, double_quant=True), make_x((3, 64), torch.float32)
    want = weight.linear(x)
    with torch.device("meta"):
        assert_same_bits(weight.linear(x), want)
