"""NF4Weight: its bytes, its checks, its round trips, and every way to spoil a checkpoint."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from feinwerk import NF4Weight, blockwise_quantize, nf4_quantize, slabs, weight
from feinwerk.codebook import BLOCKSIZES, dynamic_map, nf4_codebook
from feinwerk.testing import DTYPES, assert_same_bits, assert_within_budget, make_x, use_backend

FIELDS = ("packed", "absmax", "nested_absmax", "nested_codebook", "nested_offset")
STATE = "weight.quant_state.bitsandbytes__nf4"


def dense(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(double_quant: bool = True, **kwargs: Any) -> NF4Weight:
    return NF4Weight.from_dense(dense(12, 33), double_quant=double_quant, **kwargs)


def assert_same_weight(got: NF4Weight, expected: NF4Weight) -> None:
    assert (got.shape, got.blocksize, got.dtype) == (
        expected.shape, expected.blocksize, expected.dtype,
    )  # fmt: skip
    for name in FIELDS:
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert_same_bits(a.reshape(-1), b.reshape(-1), name)


class TestFromDense:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("rule", ["cpu", "cuda"])
    def test_is_the_ops_composed(self, dtype: torch.dtype, rule: str) -> None:
        w = dense(30, 70, dtype=dtype)
        got = NF4Weight.from_dense(w, blocksize=32, rule=rule)
        packed, absmax = nf4_quantize(w, blocksize=32, rule=rule)
        codes, nested_absmax, offset = blockwise_quantize(
            absmax, dynamic_map(), center=True, rule=rule
        )
        expected = NF4Weight(
            packed, codes, (30, 70), 32, dtype, nested_absmax, dynamic_map(), offset
        )
        assert_same_weight(got, expected)

    def test_given_offset_replaces_the_mean(self) -> None:
        mean = make()
        plain = make(double_quant=False)
        assert mean.nested_offset is not None
        assert_same_weight(make(nested_offset=mean.nested_offset), mean)
        assert_same_weight(make(nested_offset=mean.nested_offset.item()), mean)
        other = make(nested_offset=0.5)
        assert other.nested_offset is not None
        assert other.nested_offset.item() == 0.5
        codes, _, _ = blockwise_quantize(plain.absmax - 0.5, dynamic_map())
        assert_same_bits(other.absmax, codes)

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("shape", [(37, 111), (2100,), (7, 30, 10)])
    def test_slabs_do_not_change_a_bit(
        self, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], transposed: bool
    ) -> None:
        w = dense(*shape)
        if transposed:
            w = dense(*reversed(shape)).permute(*reversed(range(len(shape))))
        whole = NF4Weight.from_dense(w)
        monkeypatch.setattr(slabs, "_SLAB", 256)
        sizes = []

        def counting(slab: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            sizes.append(slab.numel())
            return nf4_quantize(slab, **kwargs)

        monkeypatch.setattr(weight, "nf4_quantize", counting)
        with use_backend("reference"):
            assert_same_weight(NF4Weight.from_dense(w), whole)
        assert max(sizes) == 256
        assert sum(sizes) == w.numel()
        assert_same_weight(NF4Weight.from_dense(w), whole)
        packed, _ = nf4_quantize(w.contiguous())
        assert_same_bits(whole.packed, packed)

    def test_rejections(self) -> None:
        w = dense(2, 64)
        for call, error, message in [
            (lambda: NF4Weight.from_dense([1.0]), TypeError, "weight must be a torch.Tensor"),
            (lambda: NF4Weight.from_dense(w.double()), TypeError, "weight must be torch.float32"),
            (lambda: NF4Weight.from_dense(w[:0]), ValueError, "weight must have at least 1"),
            (lambda: NF4Weight.from_dense(w[0, 0]), ValueError, "weight must have at least 1"),
            (lambda: NF4Weight.from_dense(w, blocksize=48), ValueError, "blocksize must be one"),
            (lambda: NF4Weight.from_dense(w, rule="gpu"), ValueError, 'rule must be "cpu"'),
            (lambda: NF4Weight.from_dense(w / 0), ValueError, "must be finite"),
            (
                lambda: NF4Weight.from_dense(w, nested_offset=float("nan")),
                ValueError,
                "nested_offset must be one finite number",
            ),
            (
                lambda: NF4Weight.from_dense(w, double_quant=False, nested_offset=0.0),
                ValueError,
                "nested_offset must be None without double_quant",
            ),
        ]:
            with pytest.raises(error, match=message):
                call()

    def test_takes_no_gradient_and_leaves_the_source(self) -> None:
        w = dense(4, 64).requires_grad_()
        before = w.detach().clone()
        got = NF4Weight.from_dense(w)
        assert not got.dequantize().requires_grad
        assert_same_bits(w.detach(), before)


class TestUse:
    @pytest.mark.parametrize("double_quant", [False, True])
    def test_linear_and_embedding_use_the_dequantized_rows(self, double_quant: bool) -> None:
        w = make(double_quant)
        x, bias = make_x((5, 33), torch.float32), make_x((12,), torch.float32)
        assert_within_budget(w.linear(x, bias), x, w.dequantize(), bias)
        indices = torch.tensor([[3, 0], [11, 3]])
        assert_same_bits(w.embedding(indices), w.dequantize()[indices])
        half = w.to(dtype=torch.bfloat16)
        assert_same_bits(half.embedding(indices), w.dequantize(torch.bfloat16)[indices])
        assert half.packed is w.packed

    def test_int8_is_near(self) -> None:
        w, x = make(), make_x((3, 33), torch.float32)
        assert torch.allclose(w.linear(x, compute="int8"), w.linear(x), atol=0.1)

    def test_only_matrices_multiply(self) -> None:
        w = NF4Weight.from_dense(dense(2, 3, 4))
        assert w.dequantize().shape == (2, 3, 4)
        with pytest.raises(ValueError, match=r"linear: shape must be \(N, K\), got \(2, 3, 4\)"):
            w.linear(torch.ones(4))
        with pytest.raises(ValueError, match="embedding: shape must be"):
            w.embedding(torch.tensor([0]))

    def test_nbytes_and_repr(self) -> None:
        w = NF4Weight.from_dense(dense(64, 64))
        assert w.nbytes == 64 * 64 // 2 + 64 + 4 * 1 + 4 * 256 + 4
        assert repr(w) == (
            "NF4Weight(shape=(64, 64), dtype=torch.float32, blocksize=64, "
            f"absmax=double-quantized, nbytes={w.nbytes}, device='cpu')"
        )
        assert NF4Weight.from_dense(dense(64, 64), double_quant=False).nbytes == 2048 + 256

    def test_to_moves_every_tensor(self) -> None:
        moved = make().to("meta", dtype=torch.float16)
        assert {getattr(moved, name).device.type for name in FIELDS} == {"meta"}
        assert moved.dtype == torch.float16
        assert moved.dequantize().shape == (12, 33)


class TestCopies:
    @pytest.mark.parametrize("double_quant", [False, True])
    def test_every_way_keeps_every_bit(self, double_quant: bool) -> None:
        w = make(double_quant)

        def saved(weights_only: bool) -> NF4Weight:
            file = io.BytesIO()
            torch.save(w, file)
            file.seek(0)
            return torch.load(file, weights_only=weights_only)

        ways: dict[str, Callable[[], NF4Weight]] = {
            "deepcopy": lambda: copy.deepcopy(w),
            "pickle": lambda: pickle.loads(pickle.dumps(w)),
            "torch.save": lambda: saved(False),
            "torch.save, weights_only": lambda: saved(True),
            "safetensors": lambda: NF4Weight.from_bitsandbytes(
                safetensors.torch.load(safetensors.torch.save(w.to_bitsandbytes("a.b."))), "a.b."
            ),
        }
        for way in ways.values():
            assert_same_weight(way(), w)
        assert copy.deepcopy(w).packed.data_ptr() != w.packed.data_ptr()

    def test_pickle_is_checked(self) -> None:
        w = make()
        rebuild, fields = w.__reduce__()
        with pytest.raises(ValueError, match="NF4Weight: packed must have 198 elements, got 197"):
            rebuild(fields[0][1:], *fields[1:])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"packed": torch.zeros(197, dtype=torch.uint8)}, ValueError, "packed must have 198"),
        ({"packed": torch.zeros(198)}, TypeError, "packed must be torch.uint8"),
        ({"packed": None}, TypeError, "packed must be a torch.Tensor"),
        ({"absmax": torch.zeros(7)}, TypeError, "absmax must be torch.uint8"),
        ({"absmax": torch.zeros(8, dtype=torch.uint8)}, ValueError, "absmax must have 7 elements"),
        ({"nested_absmax": None}, ValueError, "nested_absmax must be given together"),
        ({"nested_offset": torch.zeros(1)}, ValueError, "nested_offset must be a 0-dim tensor"),
        ({"nested_codebook": torch.zeros(255)}, ValueError, "nested_codebook must have 256"),
        ({"nested_absmax": torch.zeros(1, device="meta")}, ValueError, "must be on cpu"),
        ({"shape": (12, 34)}, ValueError, "packed must have 204"),
        ({"shape": (12, -33)}, ValueError, "shape must be sizes of at least 1"),
        ({"shape": ()}, ValueError, "shape must be sizes of at least 1"),
        ({"blocksize": 65}, ValueError, "blocksize must be one of"),
        ({"dtype": torch.float64}, TypeError, "dtype must be torch.float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_constructor_rejects(change: dict[str, Any], error: type[Exception], message: str) -> None:
    w = make()
    fields = {name: getattr(w, name) for name in (*FIELDS, "shape", "blocksize", "dtype")}
    with pytest.raises(error, match="NF4Weight: .*" + message):
        NF4Weight(**{**fields, **change})


def json_state(**changes: Any) -> torch.Tensor:
    """The JSON of `make()` with fields changed; a field set to ... is left out."""
    original = bytes(make().to_bitsandbytes()[STATE].tolist())
    state = {**json.loads(original), **changes}
    text = json.dumps({key: value for key, value in state.items() if value is not ...})
    return raw_state(text.encode())


def raw_state(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


FP4_KEY = "weight.quant_state.bitsandbytes__fp4"
SPOILED: list[tuple[str, Any, str]] = [
    # key, what it becomes (... for: removed), the rule in the message
    ("weight", ..., "be present"),
    ("weight.absmax", ..., "be present"),
    ("weight.quant_map", ..., "be present"),
    ("weight.nested_quant_map", ..., "be present"),
    ("weight.nested_absmax", ..., "be one of the 4 keys"),
    (STATE, ..., "be present"),
    (FP4_KEY, raw_state(b"{}"), "not be present: only quant_type nf4 is read"),
    ("weight.scale", torch.zeros(1), "be one of the 6 keys"),
    ("weight", [1, 2], "be a torch.Tensor"),
    ("weight", torch.zeros(197, 1, dtype=torch.uint8), r"have 198 bytes as \[198, 1\]"),
    ("weight", torch.zeros(199, 1, dtype=torch.uint8), r"have 198 bytes as \[198, 1\]"),
    ("weight", torch.zeros(1, 198, dtype=torch.uint8), r"have 198 bytes as \[198, 1\]"),
    ("weight", torch.zeros(198, 1), r"have 198 bytes as \[198, 1\]"),
    ("weight", torch.zeros(198, 1, dtype=torch.int64), "be torch.uint8"),
    ("weight.absmax", torch.zeros(6, dtype=torch.uint8), r"have shape \[7\]"),
    ("weight.absmax", torch.zeros(7, 1, dtype=torch.uint8), r"have shape \[7\]"),
    ("weight.absmax", torch.zeros(7), "be torch.uint8"),
    ("weight.nested_absmax", torch.zeros(2), r"have shape \[1\]"),
    ("weight.nested_absmax", torch.zeros(1, dtype=torch.float16), "be torch.float32"),
    ("weight.nested_absmax", torch.zeros(1, device="meta"), "be on cpu like up.weight"),
    ("weight.nested_quant_map", torch.zeros(255), r"have shape \[256\]"),
    ("weight.nested_quant_map", torch.full((256,), torch.nan), "be finite"),
    ("weight.quant_map", nf4_codebook().flip(0), "be the NF4 codebook"),
    ("weight.quant_map", torch.nextafter(nf4_codebook(), torch.ones(16)), "be the NF4 codebook"),
    ("weight.quant_map", torch.zeros(15), r"have shape \[16\]"),
    (STATE, json_state().float(), "be torch.uint8 with 1 dimension"),
    (STATE, json_state()[None], "be torch.uint8 with 1 dimension"),
    (STATE, torch.full((5000,), 32, dtype=torch.uint8), "at most 4096 bytes"),
    (STATE, torch.zeros(200, dtype=torch.uint8, device="meta"), "hold data"),
    (STATE, raw_state(b""), "hold one JSON object in UTF-8"),
    (STATE, json_state()[:-1], "hold one JSON object in UTF-8"),
    (STATE, raw_state(b"\xff\xfe{}"), "hold one JSON object in UTF-8"),
    (STATE, raw_state(b"[" * 4000), "hold one JSON object in UTF-8"),
    (STATE, raw_state(b"[1]"), "hold one JSON object, got list"),
    (STATE, json_state(shape=...), "have the fields quant_type, blocksize, dtype, shape, nested"),
    (STATE, json_state(nested_offset=...), "have the fields"),
    (STATE, json_state(extra=1), "have the fields"),
    (STATE, json_state(quant_type="fp4"), "field quant_type, must be 'nf4', got 'fp4'"),
    (STATE, json_state(quant_type=["nf4"]), "field quant_type, must be 'nf4'"),
    (STATE, json_state(blocksize=63), "field blocksize, must be one of 32, 64"),
    (STATE, json_state(blocksize=64.0), "field blocksize, must be one of"),
    (STATE, json_state(blocksize=True), "field blocksize, must be one of"),
    (STATE, json_state(blocksize=0), "field blocksize, must be one of"),
    (STATE, json_state(blocksize=128), r"absmax must have shape \[4\]"),
    (STATE, json_state(dtype="float64"), "field dtype, must be one of float32, bfloat16"),
    (STATE, json_state(dtype="__class__"), "field dtype, must be one of"),
    (STATE, json_state(dtype={}), "field dtype, must be one of"),
    (STATE, json_state(shape=[12, 34]), "weight must have 204 bytes"),
    (STATE, json_state(shape=[33, 2**62]), "weight must have"),
    (STATE, json_state(shape=[-12, -33]), "field shape, must be a list of positive integers"),
    (STATE, json_state(shape=[]), "field shape, must be a list of positive integers"),
    (STATE, json_state(shape=[12, 33.0]), "field shape, must be a list of positive integers"),
    (STATE, json_state(shape=None), "field shape, must be a list of positive integers"),
    (STATE, json_state(shape="12"), "field shape, must be a list of positive integers"),
    (STATE, json_state(nested_blocksize=128), "field nested_blocksize, must be 256"),
    (STATE, json_state(nested_dtype="float16"), "field nested_dtype, must be 'float32'"),
    (STATE, json_state(nested_offset="0.5"), "field nested_offset, must be a finite number"),
    (STATE, json_state(nested_offset=float("nan")), "nested_offset, must be a finite number"),
    (STATE, json_state(nested_offset=float("inf")), "nested_offset, must be a finite number"),
    (STATE, json_state(nested_offset=10**400), "field nested_offset, must be a finite number"),
    (STATE, json_state(nested_offset=3.49e38), "nested_offset that is finite in fp32"),
]


class TestCheckpointKeys:
    @pytest.mark.parametrize(("key", "value", "message"), SPOILED)
    def test_spoiled_keys_are_named(self, key: str, value: Any, message: str) -> None:
        state = make().to_bitsandbytes("up.")
        if value is ...:
            del state["up." + key]
        else:
            state["up." + key] = value
        named = "up.weight" if key == "weight.nested_absmax" and value is ... else "up." + key
        if message.startswith(("weight must", "absmax must")):
            named = "up.weight"
        with pytest.raises(ValueError, match=message) as caught:
            NF4Weight.from_bitsandbytes(state, "up.")
        assert named in str(caught.value)

    def test_nothing_there(self) -> None:
        with pytest.raises(ValueError, match=r"up\.weight must be present"):
            NF4Weight.from_bitsandbytes({"down.weight": torch.zeros(1)}, "up.")

    def test_plain_absmax_is_told_from_nested(self) -> None:
        state = make(double_quant=False).to_bitsandbytes()
        assert len(state) == 4
        state["weight.absmax"] = state["weight.absmax"].byte()
        with pytest.raises(ValueError, match=r"weight\.absmax must be torch\.float32, got .*uint8"):
            NF4Weight.from_bitsandbytes(state)

    def test_neighbours_are_left_alone(self) -> None:
        state = {**make().to_bitsandbytes("a."), **make(False).to_bitsandbytes("ab.")}
        state["a.weight_norm"] = torch.zeros(3)
        state["a.bias"] = torch.zeros(12)
        assert_same_weight(NF4Weight.from_bitsandbytes(state, "a."), make())
        assert_same_weight(NF4Weight.from_bitsandbytes(state, "ab."), make(False))

    @pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_codes_stored_as_a_float_view(self, storage: torch.dtype) -> None:
        w = NF4Weight.from_dense(dense(8, 64))
        state = w.to_bitsandbytes()
        state["weight"] = state["weight"].view(-1).view(storage).view(-1, 1)
        assert_same_weight(NF4Weight.from_bitsandbytes(state), w)

    def test_reading_shares_memory_and_accepts_an_integer_offset(self) -> None:
        state = make().to_bitsandbytes()
        state[STATE] = json_state(nested_offset=0)
        got = NF4Weight.from_bitsandbytes(state)
        assert got.packed.data_ptr() == state["weight"].data_ptr()
        assert got.nested_offset is not None
        assert got.nested_offset.item() == 0.0

    def test_an_offset_json_cannot_hold_is_refused(self) -> None:
        w = NF4Weight.from_dense(dense(2, 64) / 0, allow_non_finite=True)
        with pytest.raises(ValueError, match="nested_offset must be finite"):
            w.to_bitsandbytes()


@given(
    rows=st.integers(1, 40), columns=st.integers(1, 70), blocksize=st.sampled_from(BLOCKSIZES),
    double_quant=st.booleans(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_weight_round_trips(
    rows: int, columns: int, blocksize: int, double_quant: bool, dtype: torch.dtype, seed: int
) -> None:
    w = dense(rows, columns, dtype=dtype, seed=seed)
    held = NF4Weight.from_dense(w, blocksize=blocksize, double_quant=double_quant)
    assert_same_weight(NF4Weight.from_bitsandbytes(held.to_bitsandbytes("x."), "x."), held)
    # Half a step of the widest gap of the codebook, times the largest absmax there can be; with
    # double quantization one absmax step more.
    error = (held.dequantize(torch.float32) - w.float()).abs().max()
    assert error <= w.float().abs().max() * (0.16 + 0.1 * double_quant)


@given(st.binary(max_size=300))
def test_any_bytes_as_quant_state_are_an_error(data: bytes) -> None:
    state = make().to_bitsandbytes()
    state[STATE] = raw_state(data)
    with pytest.raises(ValueError, match="quant_state"):
        NF4Weight.from_bitsandbytes(state)
