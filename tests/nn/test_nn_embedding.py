"""NF4Embedding: rows, output dtype, construction, copies and state dict."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from feinwerk import NF4Weight
from feinwerk.nn import NF4Embedding
from feinwerk.testing import DTYPES, assert_same_bits

INDICES = torch.tensor([[3, 0, 9], [9, 9, 1]])


def make(**kwargs: int) -> NF4Embedding:
    torch.manual_seed(0)
    return NF4Embedding.from_embedding(nn.Embedding(10, 33, **kwargs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_the_output_dtype(dtype: torch.dtype) -> None:
    table = make().to(dtype)
    rows = table(INDICES)
    assert rows.shape == (2, 3, 33)
    assert_same_bits(rows, table.dequantize(dtype)[INDICES])
    assert_same_bits(table(INDICES.int()), rows)
    assert not rows.requires_grad


def test_from_embedding_is_from_dense() -> None:
    source = nn.Embedding(10, 33, padding_idx=-2, dtype=torch.bfloat16).eval()
    table = NF4Embedding.from_embedding(source, blocksize=32, double_quant=False)
    expected = NF4Weight.from_dense(source.weight, blocksize=32, double_quant=False)
    assert_same_bits(table.weight.detach().view(-1), expected.packed)
    assert isinstance(table, nn.Embedding)
    assert table.padding_idx == 8
    assert not table.training
    assert not table(torch.tensor([8])).any()
    assert repr(table) == (
        "NF4Embedding(10, 33, padding_idx=8, blocksize=32, double_quant=False, "
        "dtype=torch.bfloat16)"
    )
    dense = table.to_embedding()
    assert type(dense) is nn.Embedding
    assert dense.padding_idx == 8
    assert_same_bits(dense(INDICES).detach(), table(INDICES))


def test_a_cast_written_around_the_module_sets_the_output_dtype() -> None:
    table = make()
    expected = table.dequantize(torch.bfloat16)[INDICES]
    for p in table.parameters():
        p.data = p.data.to(torch.bfloat16)
    assert_same_bits(table(INDICES), expected)
    assert table.weight.dtype == torch.uint8


def test_copies_state_dict_and_compile() -> None:
    table = make(padding_idx=1).bfloat16()
    rows = table(INDICES)
    empty = NF4Embedding(10, 33, double_quant=False)
    empty.load_state_dict(table.state_dict())
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
    for other in (copy.deepcopy(table), pickle.loads(pickle.dumps(table)), empty, compiled):
        assert_same_bits(other(INDICES), rows)


def test_rejections() -> None:
    with pytest.raises(ValueError, match="max_norm must be None"):
        NF4Embedding.from_embedding(nn.Embedding(10, 33, max_norm=1.0))
    with pytest.raises(TypeError, match=r"be a dense torch\.nn\.Embedding"):
        NF4Embedding.from_embedding(nn.Linear(3, 3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"be a dense torch\.nn\.Embedding"):
        NF4Embedding.from_embedding(make())
    with pytest.raises(ValueError, match="padding_idx must be within the 10 rows, got 10"):
        NF4Embedding(10, 33, padding_idx=10)
    with pytest.raises(ValueError, match=r"weight must have shape \(N, K\)"):
        NF4Embedding.from_weight(NF4Weight.from_dense(torch.ones(5)))
    with pytest.raises(IndexError, match="indices"):
        make()(torch.tensor([10]))
    with pytest.raises(TypeError, match="indices"):
        make()(torch.tensor([1.0]))
