"""Adapters over slabs of an NF4 weight, which the interpreter's numbers leave to large products."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from feinwerk import _library

if not _library.interpreting():  # not collected there, unless somebody names this file
    pytest.skip("runs where TRITON_INTERPRET=1 is set", allow_module_level=True)

from feinwerk import testing, triton_tuning
from feinwerk.testing.adapters import make_adapters
from feinwerk.triton_tuning import ANY_ROWS, SlabChoice

KEY = ("interpreter", "none")


@pytest.fixture
def slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve every number of rows by slabs, several in either direction of a [300, 600] weight."""
    small = dataclasses.replace(
        triton_tuning.linear_tuning(*KEY), decode_rows=0, tile_rows=0, tile_rows_transposed=0,
        tile_rows_fp32=0, slabs=(SlabChoice(ANY_ROWS, 1 << 14, 1 << 14),),
    )  # fmt: skip
    monkeypatch.setitem(triton_tuning._LINEAR, KEY, small)


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("kind", ["lora", "dora", "grouped"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(dtype: torch.dtype, dropout_p: float, kind: str) -> None:
    options: dict[str, Any] = {"dtype": dtype, "base": "nested", "dropout_p": dropout_p}
    options["bias"] = torch.float32
    index = (2, 0, -1, 1, 1, 2, 0, -1, 0, 1)
    with testing.use_backend("triton-interpret"):
        if kind == "grouped":
            options |= {"dora": (False, True, True), "index": index}
            make_adapters(300, 600, len(index), (3, 40, 5), **options).check()
        else:
            make_adapters(300, 600, 20, (5,), dora=(kind == "dora",), **options).check()
