"""What lies in memory from the first step to the last: weights, adapters, gradients, states.

All by shapes and by what others define: the optimizer's own `new_state` makes the tensors of a
state (without memory, on the meta device), and its own buckets say where gradients are summed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from feinwerk.codebook import NESTED_BLOCKSIZE
from feinwerk.optim.buckets import make_buckets
from feinwerk.optim.state import new_state, row_range
from feinwerk.plan.architecture import Architecture, Linear
from feinwerk.plan.settings import DTYPES, Settings

FP32 = 4
_TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# optim.sharded_step keeps so many buckets under way at most.
_BUCKETS_UNDER_WAY = 4


@dataclass(frozen=True)
class Tensor:
    """A tensor of the model: its name in a layer (or in the model), shape and where it is.

    `layer` is None for what stands outside the layers: embedding, last norm, head.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    linear: Linear | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def dense_tensors(model: Architecture) -> Iterator[Tensor]:
    """Every parameter of the model as it is without adapters, a tied head once, in its order."""
    table = (model.vocab_size, model.hidden_size)
    yield Tensor("embed_tokens", table, None)
    for i in range(model.layers):
        yield from layer_tensors(model, i)
    yield Tensor("norm", (model.hidden_size,), None)
    if not model.tied:
        yield Tensor("lm_head", table, None)


def layer_tensors(model: Architecture, layer: int) -> Iterator[Tensor]:
    """The parameters of one decoder layer."""
    for linear in model.linears:
        yield Tensor(linear.name, (linear.N, linear.K), layer, linear)
        if linear.bias:
            yield Tensor(f"{linear.name}.bias", (linear.N,), layer)
    for name, width in model.norms.items():
        yield Tensor(name, (width,), layer)


def adapter_tensors(model: Architecture, settings: Settings, layer: int) -> Iterator[Tensor]:
    """The trained tensors of the adapters of one layer."""
    targeted = settings.targeted(model)
    for linear in model.linears:
        if linear.name in targeted:
            yield Tensor(f"{linear.name}.lora_A", (settings.r, linear.K), layer)
            yield Tensor(f"{linear.name}.lora_B", (linear.N, settings.r), layer)
            if settings.dora:
                yield Tensor(f"{linear.name}.magnitude", (linear.N,), layer)


def trained_tensors(model: Architecture, settings: Settings) -> Iterator[Tensor]:
    """The trained tensors of the model, in its order."""
    if not settings.adapted:
        yield from dense_tensors(model)
        return
    for i in range(model.layers):
        yield from adapter_tensors(model, settings, i)


def trained_size(settings: Settings) -> int:
    """Bytes an element of trained tensors, and of their gradients."""
    return DTYPES[settings.adapter_dtype] if settings.adapted else settings.size


def rows_held(rows: int, settings: Settings) -> int:
    """Rows of a parameter that a rank has room for: all of them, or with stage 3 its share.

    fully_shard pads: every rank has as many as the first.
    """
    return -(-rows // settings.world_size) if settings.stage == 3 else rows


def local_rows(rows: int, settings: Settings) -> int:
    """Rows of a parameter that a rank steps: all of them, or with sharding its own."""
    if settings.stage == 0:
        return rows
    return row_range(rows, settings.world_size, settings.rank)[1]


def local_numel(tensor: Tensor, settings: Settings) -> int:
    """Elements of a parameter that a rank steps."""
    return local_rows(tensor.shape[0], settings) * math.prod(tensor.shape[1:])


def nf4_bytes(N: int, K: int, settings: Settings, *, rows: int | None = None) -> int:
    """Bytes of an NF4 weight: codes, absmax, and the nested tables of double quantization.

    Args:
        N: out_features.
        K: in_features.
        settings: `nf4_blocksize` and `double_quant`.
        rows: of which codes and absmax are here; default all. The nested tables are on every rank.
    """
    blocks = -(-N * K // settings.nf4_blocksize)
    nested = 0
    if settings.double_quant:
        nested = (-(-blocks // NESTED_BLOCKSIZE) + 256 + 1) * FP32
    absmax = blocks * (1 if settings.double_quant else FP32)
    if rows is None or rows == N:
        return (N * K + 1) // 2 + absmax + nested
    return rows * K // 2 + absmax // N * rows + nested


def weight_bytes(tensor: Tensor, settings: Settings, *, whole: bool = False) -> int:
    """Bytes of one of the model's own parameters on a rank, or of all of it."""
    rows = tensor.shape[0] if whole else rows_held(tensor.shape[0], settings)
    if settings.quantized and tensor.linear is not None:
        N, K = tensor.shape
        if K % settings.nf4_blocksize:  # blocks cross rows: it stays on every rank
            rows = N
        return nf4_bytes(N, K, settings, rows=rows)
    return rows * math.prod(tensor.shape[1:]) * settings.size


def weights(model: Architecture, settings: Settings) -> int:
    """Bytes of the model's own parameters and rotary tables on a rank."""
    layer = sum(weight_bytes(tensor, settings) for tensor in layer_tensors(model, 0))
    outside = sum(weight_bytes(t, settings) for t in dense_tensors(model) if t.layer is None)
    rotary = 2 * (model.rotary_dim // 2) * FP32
    return model.layers * layer + outside + rotary


def adapters(model: Architecture, settings: Settings) -> int:
    """Bytes of adapters on a rank, and with DoRA the norms of the frozen rows, kept in fp32."""
    size = DTYPES[settings.adapter_dtype]
    layer = sum(
        rows_held(t.shape[0], settings) * math.prod(t.shape[1:]) * size
        for t in adapter_tensors(model, settings, 0)
    )
    if settings.dora:
        targeted = settings.targeted(model)
        layer += sum(linear.N * FP32 for linear in model.linears if linear.name in targeted)
    return model.layers * layer


def states(model: Architecture, settings: Settings) -> int:
    """Bytes of the optimizer's states on a rank: exactly those of `feinwerk.optim`."""
    dtype = _TORCH_DTYPES[settings.adapter_dtype if settings.adapted else settings.dtype]
    shapes = Counter(tensor.shape for tensor in trained_tensors(model, settings))
    total = 0
    for shape, count in shapes.items():
        rows = local_rows(shape[0], settings)
        local = torch.empty((rows, *shape[1:]), dtype=dtype, device="meta")
        state = new_state(local, shape, settings.group)
        total += count * sum(tensor.nbytes for tensor in state.values())
    return total


@dataclass(frozen=True)
class GradientSizes:
    """Bytes of the gradients that parameters have after the backward, in the order they come.

    Attributes:
        head: of the last norm, and of the head where it is not tied.
        layer: of one layer.
        layers: number of layers.
        embedding: of the embedding.
    """

    head: int
    layer: int
    layers: int
    embedding: int

    @property
    def total(self) -> int:
        """Of all parameters."""
        return self.head + self.layer * self.layers + self.embedding


def gradient_sizes(model: Architecture, settings: Settings) -> GradientSizes:
    """Return the sizes of a rank's gradients; with stage 2 they are dropped as they come."""
    if settings.stage == 2:
        return GradientSizes(0, 0, 0, 0)
    size = trained_size(settings)

    def of(tensors: Iterable[Tensor]) -> int:
        return sum(rows_held(t.shape[0], settings) * math.prod(t.shape[1:]) * size for t in tensors)

    if settings.adapted:
        return GradientSizes(0, of(adapter_tensors(model, settings, 0)), model.layers, 0)
    outside = {t.name: of([t]) for t in dense_tensors(model) if t.layer is None}
    embedding = outside.pop("embed_tokens")
    layer = of(layer_tensors(model, 0))
    return GradientSizes(sum(outside.values()), layer, model.layers, embedding)


@dataclass(frozen=True)
class Transfers:
    """What it takes to talk to the other ranks, in bytes.

    Attributes:
        sums: averaged gradients of a rank's rows, kept from step to step.
        buffers: what is sent and received, kept as well.
        root: with stage 3, what the model itself gathers, whole from the forward to the end of the
            backward: all but the layers.
        layer: with stage 3, one whole layer. While it is used, the next one comes in: the buffer
            that both went through, and the weights that are taken out of it.
        reduced: with stage 3, gradients of the layer before on their way to the ranks.
        reduced_root: likewise, of the rest of the model.
    """

    sums: int = 0
    buffers: int = 0
    root: int = 0
    layer: int = 0
    reduced: int = 0
    reduced_root: int = 0


def transfers(model: Architecture, settings: Settings) -> Transfers:
    """Return what a stage needs to talk to the other ranks."""
    if settings.world_size == 1:
        return Transfers()
    if settings.stage == 0:  # DDP copies gradients into buckets
        return Transfers(buffers=gradient_sizes(model, settings).total)
    if settings.stage == 3:
        return _fully_sharded(model, settings)
    size, shapes = trained_size(settings), [t.shape for t in trained_tensors(model, settings)]
    capacity = int(settings.bucket_mb * 2**20)
    kinds, sizes = [0] * len(shapes), [size] * len(shapes)
    buckets = make_buckets(shapes, kinds, sizes, settings.world_size, capacity)
    sections = [bucket.section * size for bucket in buckets]
    N = settings.world_size
    # Sections that a bucket takes: N to be reduced, and what arrives; then own rows out and the
    # others' in, partly in the same buffers. gloo gets the others' parts, NCCL their sum.
    each = 3 * N - 2 if settings.device == "cpu" else N + 1
    most, limit = sum(sections) * each, _BUCKETS_UNDER_WAY * capacity
    under_way = max(limit * each // N, max(sections) * each)
    # As much again may be in stock: buffers of other sizes, for other buckets.
    buffers = min(most, under_way + 2 * limit)
    return Transfers(sums=sum(bucket.section for bucket in buckets) * FP32, buffers=buffers)


def _fully_sharded(model: Architecture, settings: Settings) -> Transfers:
    """Stage 3: fully_shard over every layer, and over the model, which holds what is left.

    The buffer that a layer's gradients are sent from lives until the next layer's are sent.
    """
    size = DTYPES[settings.adapter_dtype]
    own = sum(weight_bytes(t, settings, whole=True) for t in layer_tensors(model, 0))
    added = sum(t.numel * size for t in adapter_tensors(model, settings, 0))
    outside = [t for t in dense_tensors(model) if t.layer is None]
    root = sum(weight_bytes(t, settings, whole=True) for t in outside)
    return Transfers(
        root=root, layer=own + added, reduced=added if settings.adapted else own,
        reduced_root=0 if settings.adapted else root,
    )  # fmt: skip
