"""Models that a host must survive, each with what must be said of it, or nothing where it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from onnx import TensorProto, helper
from onnx_specs import NESTED, Spec, make, model_of, node_of, session_of

HUGE = 2**62


@dataclass(frozen=True)
class Case:
    """A node, or something to do with the library, and the words of its rejection."""

    name: str
    node: Spec | Callable[[str], None]
    says: tuple[str, ...] = ()


def cases() -> list[Case]:
    found = [*attributes(), *weights(), *adapters(), *activations(), *embeddings(), *graphs()]
    assert len({case.name for case in found}) == len(found)
    return found


def attributes() -> Iterator[Case]:
    """Wrong types and values of N, K, block_size and to."""
    values = {
        "string": "6",
        "float": 6.0,
        "list": [6, 6],
        "tensor": helper.make_tensor("t", TensorProto.INT64, (1,), [6]),
        "missing": None,
        "zero": 0,
        "negative": -6,
        "int64 lowest": -(2**63),
        "int64 highest": 2**63 - 1,
        "2^62": HUGE,
        "one more": 7,
    }
    for op in ("NF4Linear", "NF4LoraLinear", "NF4Embedding"):
        base = make(op, K=71).fixed().declared("exact")
        for name in ("N", "K"):
            for what, value in values.items():
                if (name, what) == ("K", "one more"):
                    value = 72
                # One more row or column asks for more packed bytes; x may be told of, too.
                about = (
                    r"\b(N|K|packed|x|lora_A|lora_B)\b" if what == "one more" else rf"\b{name}\b"
                )
                yield Case(f"{op}: {name} {what}", base.having(**{name: value}), (op, about))
        for what, sizes in {
            "2^32 both": (2**32, 2**32),
            "2^31 both": (2**31, 2**31),
            "2^62 and 4": (HUGE, 4),
            "2^63 - 1 both": (2**63 - 1, 2**63 - 1),
            "-1 both": (-1, -1),
        }.items():
            both = base.having(N=sizes[0], K=sizes[1])
            yield Case(f"{op}: N and K {what}", both, (op, r"\b(N|K|packed)\b"))
        for what in (0, -64, 1, 48, 63, 8192, HUGE, "64", 64.0, [64]):
            case = base.having(block_size=what)
            yield Case(f"{op}: block_size {what!r}", case, (op, r"\bblock_size\b"))
        yield Case(f"{op}: block_size missing", base.having(block_size=None))
        # 32 has twice as many absmax.
        yield Case(f"{op}: block_size 32", base.having(block_size=32), (op, r"\babsmax\b"))
        yield Case(f"{op}: an attribute that it does not have", base.having(transB=1, other="x"))
    table = make("NF4Embedding").fixed()
    # A type that ONNX has, one that it lacks, and two whose lower 32 bits are a right one's.
    for what in (0, -1, 7, 11, 32, 2**31, 2**32 + 1, 10 - 2**32, HUGE, "float", 1.0, [1]):
        for shapes in ("open", "exact"):
            case = table.having(to=what).declared(shapes)
            says = ("NF4Embedding", r"\bto\b")
            yield Case(f"NF4Embedding: to {what!r}, shapes {shapes}", case, says)
    yield Case("NF4Embedding: to missing", table.having(to=None))


def both(name: str, spec: Spec, *says: str) -> Iterator[Case]:
    """The case with its weights as initializers and as inputs of the run."""
    yield Case(f"{name}, constant", spec.fixed(), says)
    yield Case(f"{name}, at run time", spec, says)
    yield Case(f"{name}, at run time, with shapes", spec.declared("exact"), says)


def weights() -> Iterator[Case]:
    """Buffers of the NF4 weight that do not fit N, K and block_size, or have a wrong type."""
    for op in ("NF4Linear", "NF4LoraLinear", "NF4Embedding"):
        plain, nested = make(op), make(op, double_quant=True)
        packed, absmax = plain.inputs["packed"], plain.inputs["absmax"]
        yield from both(f"{op}: packed in two dimensions", plain.but(packed=packed.reshape(-1, 2)))
        for what, value in {
            "short": packed[:-1],
            "long": torch.cat([packed, packed[:1]]),
            "empty": packed[:0],
            "a scalar": packed[0],
            "int8": packed.view(torch.int8),
            "float": packed.float(),
        }.items():
            yield from both(f"{op}: packed {what}", plain.but(packed=value), op, r"\bpacked\b")
        for what, value in {
            "short": absmax[:-1],
            "long": torch.cat([absmax, absmax[:1]]),
            "empty": absmax[:0],
            "a scalar": absmax[0],
            "fp16": absmax.half(),
            "double": absmax.double(),
            "codes without their tables": nested.inputs["absmax"],
        }.items():
            yield from both(f"{op}: absmax {what}", plain.but(absmax=value), op, r"\babsmax\b")
        about = r"\b(absmax|nested_absmax|nested_codebook|nested_offset)\b"
        yield from both(f"{op}: nested", nested)
        yield from both(f"{op}: nested over fp32 absmax", nested.but(absmax=absmax), op, about)
        for absent in range(1, 7):
            left = {name: None for i, name in enumerate(NESTED) if absent >> i & 1}
            title = f"{op}: nested without {' and '.join(left)}"
            yield from both(title, nested.but(**left), op, about)
        table, offset = nested.inputs["nested_codebook"], nested.inputs["nested_offset"]
        for name, what, value in (
            ("nested_absmax", "long", torch.ones(2)),
            ("nested_absmax", "empty", torch.ones(0)),
            ("nested_absmax", "double", torch.ones(1).double()),
            ("nested_codebook", "short", table[:255]),
            ("nested_codebook", "fp16", table.half()),
            ("nested_offset", "two", torch.ones(2)),
            ("nested_offset", "empty", torch.ones(0)),
        ):
            case = nested.but(**{name: value})
            yield from both(f"{op}: {name} {what}", case, op, rf"\b{name}\b")
        yield from both(f"{op}: nested_offset [1]", nested.but(nested_offset=offset.reshape(1)))
        nan = absmax.clone()
        nan[1] = float("nan")
        yield from both(f"{op}: absmax with a NaN", plain.but(absmax=nan))


def adapters() -> Iterator[Case]:
    """Adapters whose sizes do not fit the weight or each other."""
    for op in ("NF4LoraLinear", "LoraLinear"):
        base = make(op, N=6, K=70, r=3, bias=True)
        A, B = base.inputs["lora_A"], base.inputs["lora_B"]
        none = {"lora_A": A[:0], "lora_B": B[:, :0]}
        yield from both(f"{op}: rank 0", base.but(**none))
        yield from both(f"{op}: gain", base.but(gain=torch.rand(6)))
        yield from both(f"{op}: gain of none", base.but(gain=torch.ones(0)))
        yield from both(f"{op}: gain and rank 0", base.but(**none, gain=torch.rand(6)))
        yield from both(f"{op}: scaling [1]", base.but(scaling=torch.ones(1)))
        for name, what, value in (
            ("lora_A", "of another K", A[:, :-1]),
            ("lora_A", "in one dimension", A[0]),
            ("lora_A", "in three dimensions", A[None]),
            ("lora_A", "a scalar", A[0, 0]),
            ("lora_A", "fp16", A.half()),
            ("lora_A", "rank 0 of another K", A[:0, :-1]),
            ("lora_B", "of another N", B[:-1]),
            ("lora_B", "in one dimension", B[0]),
            ("lora_B", "transposed", B.T),
            ("lora_B", "fp16", B.half()),
            ("scaling", "two", torch.ones(2)),
            ("scaling", "empty", torch.ones(0)),
            ("scaling", "double", torch.ones(()).double()),
            ("gain", "short", torch.ones(5)),
            ("gain", "long", torch.ones(7)),
            ("gain", "one", torch.ones(1)),
            ("gain", "fp16", torch.ones(6).half()),
            ("bias", "short", torch.ones(5)),
            ("bias", "a scalar", torch.ones(())),
            ("bias", "int32", torch.ones(6).int()),
        ):
            says = rf"\b({name}|lora_A|lora_B)\b" if name.startswith("lora") else rf"\b{name}\b"
            yield from both(f"{op}: {name} {what}", base.but(**{name: value}), op, says)
        about = r"\b(lora_A|lora_B)\b"
        yield from both(f"{op}: ranks 3 and 2", base.but(lora_B=B[:, :2]), op, about)
        yield from both(f"{op}: ranks 0 and 3", base.but(lora_A=A[:0]), op, about)
        yield from both(f"{op}: ranks 3 and 0", base.but(lora_B=B[:, :0]), op, about)
    dense = make("LoraLinear", N=6, K=70)
    W = dense.inputs["weight"]
    for what, value in {
        "in one dimension": W[0],
        "in three dimensions": W[None],
        "a scalar": W[0, 0],
        "without rows": W[:0],
        "without columns": W[:, :0],
        "of another K": W[:, :-1],
        "of another N": W[:-1],
        "fp16 beside fp32": W.half(),
    }.items():
        says = r"\b(weight|x|lora_A|lora_B|N|K|no kernel def matches node inputs)\b"
        case = dense.but(weight=value)
        yield from both(f"LoraLinear: weight {what}", case, "LoraLinear", says)


def activations() -> Iterator[Case]:
    """Shapes and types of x, and of the bias beside it."""
    for op in ("NF4Linear", "NF4LoraLinear", "LoraLinear"):
        base = make(op, bias=True).fixed()
        x = base.inputs["x"]
        for what, value in {
            "a vector": x[0],
            "no rows": x[:0],
            "no rows in the middle": x[:0].reshape(3, 0, 70),
            "three dimensions": x.reshape(2, 1, 70),
            "six dimensions": x.reshape(1, 1, 2, 1, 1, 70),
            "one row": x[:1],
            "with NaN and infinity": torch.stack([x[0] * float("nan"), x[1] * float("inf")]),
        }.items():
            yield Case(f"{op}: x {what}", base.but(x=value))
            yield Case(f"{op}: x {what}, declared", base.but(x=value).declared("symbolic"))
        for what, value in {
            "a scalar": x[0, 0],
            "another K": x[:, :-1],
            "an empty vector": x[0, :0],
            "no columns": x[:, :0],
            "transposed": x.T,
            "double": x.double(),
            "int32": x.int(),
            "int64": x.long(),
            "bool": x > 0,
        }.items():
            yield Case(f"{op}: x {what}", base.but(x=value), (op, r"\bx\b"))
        if op != "LoraLinear":
            wide = base.but(bias=base.inputs["bias"].double())
            yield Case(f"{op}: bias double", wide, (op, r"\bbias\b"))
        for name in ("fp16", "bf16"):
            dtype = torch.float16 if name == "fp16" else torch.bfloat16
            for shapes in ("open", "symbolic", "exact"):
                typed = make(op, bias=True, dtype=dtype).fixed().declared(shapes)
                yield Case(f"{op}: {name}, shapes {shapes}", typed)


def embeddings() -> Iterator[Case]:
    """Indices out of range, of other types and of every shape."""
    base = make("NF4Embedding", N=6).fixed()
    says = ("NF4Embedding", r"\bindices\b")
    for what, value in {
        "none": torch.zeros(0, dtype=torch.int64),
        "none in two dimensions": torch.zeros(2, 0, dtype=torch.int64),
        "a scalar": torch.tensor(5),
        "five dimensions": torch.full((1, 1, 2, 1, 1), 5),
    }.items():
        yield Case(f"NF4Embedding: indices {what}", base.but(indices=value))
        known = base.having(to=TensorProto.FLOAT16).but(indices=value).declared("exact")
        yield Case(f"NF4Embedding: indices {what}, declared, fp16", known)
    for wrong in (6, -1, 2**31, 2**40, HUGE, 2**63 - 1, -(2**63)):
        value = torch.tensor([[0, 5], [wrong, 1]])
        yield Case(f"NF4Embedding: index {wrong}", base.but(indices=value), says)
    for dtype in (torch.int32, torch.float32, torch.uint8, torch.bool):
        case = base.but(indices=torch.ones(2).to(dtype))
        yield Case(f"NF4Embedding: indices {dtype}", case, says)


def graphs() -> Iterator[Case]:
    """Nodes with too few or too many inputs and outputs, and other kinds of values."""
    for op in ("NF4Linear", "NF4LoraLinear", "LoraLinear", "NF4Embedding"):
        base = make(op).fixed()

        def edited(change: Callable[[object], None], base: Spec = base) -> Callable[[str], None]:
            def run(library: str) -> None:
                node = node_of(base)
                change(node)
                session_of(model_of(base, [node]), library)

            return run

        first = node_of(base).input[0]
        for what, change in {
            "no input": lambda node: node.ClearField("input"),
            "two inputs": lambda node: node.input.__delitem__(slice(2, None)),
            "twenty inputs": lambda node: node.input.extend([""] * 19 + [node.input[1]]),
            "two outputs": lambda node: node.output.append("z"),
            "an input from nowhere": lambda node: node.input.__setitem__(1, "nowhere"),
            "every input empty": lambda node: node.input.__setitem__(
                slice(None), [""] * len(node.input)
            ),
        }.items():
            says = "nowhere" if what == "an input from nowhere" else f"{op}|node"
            yield Case(f"{op}: {what}", edited(change), (says,))

        def a_sequence(library: str, base: Spec = base, first: str = first) -> None:
            node = node_of(base)
            node.input[0] = "sequence"
            made = helper.make_node("SequenceConstruct", [first], ["sequence"])
            session_of(model_of(base, [made, node]), library)

        yield Case(f"{op}: a sequence for {first}", a_sequence, (op, r"sequence|seq"))
