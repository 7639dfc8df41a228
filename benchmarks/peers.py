"""The peers: what a user would run instead of Feinwerk, each built from the same weight.

Every function returns a `Candidate` that has been checked for sane results, or raises `Unsupported`
with the reason, which the tables show instead of a number.
"""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import feinwerk
from benchmarks.harness import Candidate
from benchmarks.problem import DTYPES, Problem, dense_weight, nf4_weight

ORT_SWEEP_ROWS = 4  # up to this M an ONNX Runtime call walks through copies of the weight
SANE_ERROR = 0.2  # relative: a peer may round more than we do, but must compute the same thing
ONNX_TYPES = {np.dtype(np.float32): 1, np.dtype(np.uint8): 2, np.dtype(np.float16): 10}


class Unsupported(Exception):
    """A peer cannot run this case; the message says why."""


def optional(name: str) -> ModuleType:
    """Import a peer's package, or raise Unsupported."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise Unsupported(f"{name} cannot be imported: {error}") from error


def build(
    factories: Iterable[functools.partial[Candidate]],
) -> tuple[list[Candidate], dict[str, str]]:
    """The candidates that can run, and the reasons of those that cannot."""
    found, missing = [], {}
    for factory in factories:
        try:
            found.append(factory())
        except Unsupported as error:
            words = [str(word) for word in factory.args if isinstance(word, int)]
            missing[" ".join((factory.func.__name__, *words))] = str(error)
    return found, missing


def sane(candidate: Candidate, actual: torch.Tensor, expected: torch.Tensor) -> Candidate:
    """The candidate, unless its result is another one: a wrong result has no speed."""
    expected = expected.float()
    error = (actual.float() - expected).norm() / expected.norm()
    if not float(error) < SANE_ERROR:
        raise Unsupported(f"wrong result: relative error {float(error):.2g}")
    return candidate


def expected(problem: Problem) -> torch.Tensor:
    """The product with the dense weight, which every peer approximates."""
    x, weight = problem.activations()[:4].float(), dense_weight(problem.N, problem.K)
    return x @ weight if problem.backward else x @ weight.t()


def checked(problem: Problem, candidate: Candidate) -> Candidate:
    """A torch candidate whose first rows were compared with the dense product."""
    result = candidate.calls[0]()
    return sane(candidate, result[:4], expected(problem))


def dense(problem: Problem) -> Candidate:
    """F.linear with the weight held in the activations' dtype."""
    weight = dense_weight(problem.N, problem.K).to(problem.dtype)
    count = problem.copies(weight.nbytes)
    layers = [functools.partial(F.linear, weight=weight.clone()) for _ in range(count)]
    return checked(problem, Candidate("dense", problem.calls(layers)))


def quant_state(weight: feinwerk.NF4Weight) -> Any:
    """Bitsandbytes' QuantState of the same weight, read from the same bytes."""
    functional = optional("bitsandbytes.functional")
    entries = weight.to_bitsandbytes()
    packed = entries.pop("weight")
    return packed, functional.QuantState.from_dict(
        {key.removeprefix("weight."): value for key, value in entries.items()}, torch.device("cpu")
    )


def bnb_matmul(problem: Problem) -> Candidate:
    """bitsandbytes.matmul_4bit as installed; its state has the activations' dtype."""
    bnb = optional("bitsandbytes")
    weight = nf4_weight(problem.N, problem.K, problem.blocksize)
    packed, state = quant_state(weight.to(dtype=problem.dtype))
    layers = [
        functools.partial(bnb.matmul_4bit, B=packed.clone(), quant_state=state)
        for _ in range(problem.nf4_copies)
    ]
    return checked(problem, Candidate("bitsandbytes", problem.calls(layers)))


def bnb_eval(problem: Problem) -> Candidate:
    """Linear4bit in eval mode: repacks its weight at the first call, then runs a bf16 kernel.

    Timed from the call that Linear4bit.forward makes then, without the module around it.
    """
    if problem.backward:
        raise Unsupported("Linear4bit in eval mode has no backward")
    functional, bnb = optional("bitsandbytes.functional"), optional("bitsandbytes")
    if not functional.has_avx512bf16():
        raise Unsupported("needs AVX512-BF16")
    weight = nf4_weight(problem.N, problem.K, problem.blocksize).to(dtype=problem.dtype)
    packed, state = quant_state(weight)
    packed, state = functional._convert_weight_packed_for_cpu(packed, state)
    layers = [
        functools.partial(bnb.matmul_4bit, B=packed.clone(), quant_state=state)
        for _ in range(problem.nf4_copies)
    ]
    candidate = Candidate("bitsandbytes eval", problem.calls(layers), note="weight repacked")
    return checked(problem, candidate)


def onnx_model(
    op: str, nodes: int, x_type: int, feeds: dict[str, np.ndarray], N: int, K: int, **attrs: int
) -> bytes:
    """A graph of `nodes` matmuls on one input, each with a weight of its own.

    The bytes of every further node are the first one's, rotated: ONNX Runtime keeps one copy of
    initializers that are equal, and a graph of equal nodes would run from the cache.
    """
    helper = optional("onnx").helper
    weights, body, outputs = [], [], []
    for i in range(nodes):
        for name, array in feeds.items():
            kind, values = ONNX_TYPES[array.dtype], np.roll(array.reshape(-1), i)
            weights.append(
                helper.make_tensor(f"{name}{i}", kind, array.shape, values.tobytes(), raw=True)
            )
        inputs = ["x", *(f"{name}{i}" for name in feeds)]
        body.append(
            helper.make_node(op, inputs, [f"y{i}"], domain="com.microsoft", N=N, K=K, **attrs)
        )
        outputs.append(helper.make_tensor_value_info(f"y{i}", x_type, ["M", N]))
    x = helper.make_tensor_value_info("x", x_type, ["M", K])
    graph = helper.make_graph(body, op, [x], outputs, weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return model


@functools.lru_cache(maxsize=4)
def ort_session(
    op: str,
    nodes: int,
    N: int,
    K: int,
    half: bool,
    threads: int,
    attrs: tuple[tuple[str, int], ...],
) -> tuple[Any, torch.Tensor]:
    """(session, the dense weight that it multiplies with); shared by all M."""
    ort = optional("onnxruntime")
    options = dict(attrs)
    blocksize = options["block_size"]
    real = np.float16 if half else np.float32
    if op == "MatMulBnb4":
        weight = nf4_weight(N, K, blocksize, False)
        truth = weight.dequantize(torch.float32)
        feeds = {
            "packed": weight.packed.flatten().numpy(),
            "absmax": weight.absmax.numpy().astype(real),
        }
    else:
        blocks = -(-K // blocksize)
        padded = np.zeros((N, blocks * blocksize), dtype=np.float32)
        padded[:, :K] = dense_weight(N, K).numpy()
        runs = padded.reshape(N, blocks, blocksize)
        scales = np.abs(runs).max(axis=2, keepdims=True) / 7
        codes = np.clip(np.rint(runs / scales) + 8, 0, 15).astype(np.uint8)
        truth = torch.from_numpy(((codes.astype(np.float32) - 8) * scales).reshape(N, -1)[:, :K])
        feeds = {
            "B": codes[:, :, 0::2] | codes[:, :, 1::2] << 4,
            "scales": scales.reshape(-1).astype(real),
        }
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    # Its threads may spin within a run, but not into the next candidate's turn.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    model = onnx_model(op, nodes, ONNX_TYPES[np.dtype(real)], feeds, N, K, **options)
    try:
        session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise Unsupported(f"{op}: {str(error).splitlines()[0][:120]}") from error
    return session, truth


def ort_candidate(problem: Problem, name: str, op: str, half: bool, **attrs: int) -> Candidate:
    """A session with bound input and outputs, as many threads as torch has.

    ONNX Runtime cannot run one node of many, so up to M = 4, where memory decides, one call runs a
    graph of many nodes, each with its own weight (which also spares it all Python between them);
    above, one node.
    """
    if problem.backward:
        raise Unsupported("no gradients in ONNX Runtime")
    ort = optional("onnxruntime")
    real = torch.float16 if half else torch.float32
    x = problem.activations().to(real)
    nodes = problem.nf4_copies if problem.M <= ORT_SWEEP_ROWS else 1
    session, weight = ort_session(
        op, nodes, problem.N, problem.K, half, torch.get_num_threads(), tuple(attrs.items())
    )
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x.numpy()))
    values = []
    for i in range(nodes):
        shape = [problem.M, problem.N]
        values.append(ort.OrtValue.ortvalue_from_shape_and_type(shape, x.numpy().dtype, "cpu"))
        binding.bind_ortvalue_output(f"y{i}", values[-1])
    call = functools.partial(session.run_with_iobinding, binding)
    note = f"{'fp16' if half else 'fp32'} activations" if real != problem.dtype else ""
    candidate = Candidate(name, [call], per_call=nodes, note=note)
    call()
    truth = x[:4].float() @ weight.t()
    return sane(candidate, torch.from_numpy(values[0].numpy()[:4].copy()), truth)


def ort_int4(problem: Problem, level: int = 0, blocksize: int = 64) -> Candidate:
    """MatMulNBits: int4 with equal steps and blocks within a row, a simpler format than NF4.

    bf16 is not implemented in ONNX Runtime's CPU kernels; fp32 stands in for it.
    """
    block = "" if blocksize == 64 else f" block {blocksize}"
    half = problem.dtype == torch.float16
    return ort_candidate(
        problem, f"ort int4 level {level}{block}", "MatMulNBits", half,
        bits=4, block_size=blocksize, accuracy_level=level,
    )  # fmt: skip


def ort_int4_fp16(problem: Problem, level: int = 0) -> Candidate:
    """MatMulNBits on fp16 activations, for bf16 problems."""
    return ort_candidate(
        problem, f"ort int4 level {level} fp16", "MatMulNBits", True,
        bits=4, block_size=64, accuracy_level=level,
    )  # fmt: skip


def ort_nf4(problem: Problem) -> Candidate:
    """MatMulBnb4: the same NF4 bytes, absmax expanded and not double-quantized."""
    half = problem.dtype == torch.float16
    if problem.blocksize > 256:
        raise Unsupported("MatMulBnb4 has no blocksize above 256")
    return ort_candidate(
        problem, "ort nf4", "MatMulBnb4", half, block_size=problem.blocksize, quant_type=1
    )


def linear_peers(problem: Problem, what: str, few: bool) -> tuple[list[Candidate], dict[str, str]]:
    """The peers of one matmul: dense and bitsandbytes always, the others where they matter."""
    factories: list[Callable[[Problem], Candidate]] = [dense, bnb_matmul]
    if not few and not problem.backward:
        bf16 = problem.dtype == DTYPES["bf16"]
        if bf16:
            factories.append(bnb_eval)
        if what == "int8 forward":
            factories.append(functools.partial(_at_level, 4, 64))
            if problem.M == 1 and problem.cold:
                factories.append(functools.partial(_at_level, 4, 32))
        elif bf16 or problem.M <= 64:
            factories.append(functools.partial(_at_level, 0, 64))
            if bf16 and problem.M == 1:
                factories.append(ort_int4_fp16)
            if problem.dtype == DTYPES["fp32"] and problem.M in (1, 64):
                factories.append(ort_nf4)
    return build(functools.partial(factory, problem) for factory in factories)


def _at_level(level: int, blocksize: int, problem: Problem) -> Candidate:
    return ort_int4(problem, level, blocksize)


def bnb_quantize(weights: list[torch.Tensor], blocksize: int = 64) -> Candidate:
    """quantize_4bit with double quantization."""
    functional = optional("bitsandbytes.functional")
    quantize = functools.partial(
        functional.quantize_4bit, blocksize=blocksize, quant_type="nf4", compress_statistics=True
    )
    return Candidate("bitsandbytes", [functools.partial(quantize, w) for w in weights])


def bnb_dequantize(weight: feinwerk.NF4Weight, dtype: torch.dtype, copies: int) -> Candidate:
    """dequantize_4bit of a double-quantized weight."""
    functional = optional("bitsandbytes.functional")
    packed, state = quant_state(weight.to(dtype=dtype))
    calls = [
        functools.partial(functional.dequantize_4bit, packed.clone(), state) for _ in range(copies)
    ]
    return sane(Candidate("bitsandbytes", calls), calls[0](), weight.dequantize(torch.float32))
