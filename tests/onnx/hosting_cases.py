"""What a host does around a session: files cut short, registration, threads, nested graphs."""

from __future__ import annotations

import gc
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnxruntime
from malformed_cases import Case
from onnx import TensorProto, helper
from onnx_rules import expected
from onnx_specs import (
    feed_of,
    make,
    model_of,
    node_of,
    options_with,
    same_bits,
    session_of,
    to_ort,
    to_torch,
)

THREADS = 4
RUNS = 20


def cases() -> list[Case]:
    return [*files(), *registration(), *threads(), *nested_graphs()]


def external(folder: Path, length: int | None) -> Path:
    """A model whose packed codes lie in a file of their own, cut to `length` bytes or absent."""
    spec = make("NF4Linear", N=64, K=64).fixed("absmax")
    model = model_of(spec)
    # The codes become an initializer of two kilobytes in a file.
    packed = TensorProto(name="packed", data_type=TensorProto.UINT8, dims=[2048])
    packed.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "codes.bin"), ("offset", "0"), ("length", "2048")):
        packed.external_data.add(key=key, value=value)
    model.graph.initializer.append(packed)
    del model.graph.input[[value.name for value in model.graph.input].index("packed")]
    data = bytes(spec.inputs["packed"].numpy())
    if length is not None:
        (folder / "codes.bin").write_bytes(data[:length])
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def files() -> Iterator[Case]:
    """External data that is whole, cut short or absent, and a model file cut short."""

    def opened(length: int | None) -> Callable[[str], None]:
        def run(library: str) -> None:
            with tempfile.TemporaryDirectory() as folder:
                path = external(Path(folder), length)
                session = onnxruntime.InferenceSession(
                    str(path), options_with(library), providers=["CPUExecutionProvider"]
                )
                spec = make("NF4Linear", N=64, K=64)
                y = to_torch(session.run_with_ort_values(["y"], {"x": to_ort(spec.inputs["x"])})[0])
                assert same_bits(y, expected(spec))
                del session

        return run

    yield Case("files: external data", opened(2048))
    # ONNX Runtime reads the file and speaks of it.
    yield Case("files: external data one byte short", opened(2047), ("codes.bin|packed",))
    yield Case("files: external data empty", opened(0), ("codes.bin|packed",))
    yield Case("files: external data absent", opened(None), ("codes.bin|packed",))

    def cut(library: str) -> None:
        data = model_of(make("NF4Linear").fixed()).SerializeToString()
        session_of(data[: len(data) // 2], library)

    yield Case("files: a model cut in half", cut, (r"(?i)protobuf|invalid|failed",))


def run_once(options: onnxruntime.SessionOptions) -> None:
    spec = make("NF4LoraLinear", bias=True).fixed("packed", "absmax")
    session = onnxruntime.InferenceSession(
        model_of(spec).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    y = to_torch(session.run_with_ort_values(["y"], feed_of(spec))[0])
    assert same_bits(y, expected(spec))


def registration() -> Iterator[Case]:
    """The library once, twice, on many options, from other threads; and not at all."""

    def twice(library: str) -> None:
        options = options_with(library)
        options.register_custom_ops_library(library)
        run_once(options)

    def two_options(library: str) -> None:
        first, second = options_with(library), options_with(library)
        run_once(second)
        run_once(first)
        del first
        gc.collect()
        run_once(second)

    def one_options_two_sessions(library: str) -> None:
        options = options_with(library)
        run_once(options)
        run_once(options)

    def dropped_options(library: str) -> None:
        spec = make("NF4Linear")
        session = session_of(model_of(spec), library)
        gc.collect()  # the options are gone, the session is not
        y = to_torch(session.run_with_ort_values(["y"], feed_of(spec))[0])
        assert same_bits(y, expected(spec))

    def another_thread(library: str) -> None:
        with ThreadPoolExecutor(1) as pool:
            options = pool.submit(options_with, library).result()
        run_once(options)

    def many_threads(library: str) -> None:
        start = threading.Barrier(THREADS)

        def register_and_run() -> None:
            start.wait()
            run_once(options_with(library))

        with ThreadPoolExecutor(THREADS) as pool:
            for done in [pool.submit(register_and_run) for _ in range(THREADS)]:
                done.result()

    def absent(library: str) -> None:
        onnxruntime.InferenceSession(
            model_of(make("NF4Linear")).SerializeToString(), providers=["CPUExecutionProvider"]
        )

    def no_file(library: str) -> None:
        options_with(library + ".absent")

    def unknown(library: str) -> None:
        node = node_of(make("NF4Linear"))
        node.op_type = "NF4Convolution"
        session_of(model_of(make("NF4Linear"), [node]), library)

    yield Case("registration: twice on one options object", twice)
    yield Case("registration: two options objects", two_options)
    yield Case("registration: two sessions of one options object", one_options_two_sessions)
    yield Case("registration: the options dropped before the run", dropped_options)
    yield Case("registration: from another thread", another_thread)
    yield Case("registration: from many threads at once", many_threads)
    yield Case("registration: none", absent, ("NF4Linear|feinwerk",))
    yield Case("registration: no such file", no_file, (r"\.absent",))
    yield Case("registration: an unknown operation", unknown, ("NF4Convolution",))


def at_once(work: list[Callable[[], None]]) -> None:
    """Start all of it at the same time, one thread each; the first failure is raised."""
    start = threading.Barrier(len(work))

    def begin(function: Callable[[], None]) -> None:
        start.wait()
        function()

    with ThreadPoolExecutor(len(work)) as pool:
        for done in [pool.submit(begin, function) for function in work]:
            done.result()


def must_fail(
    session: onnxruntime.InferenceSession, feed: dict[str, onnxruntime.OrtValue], says: str
) -> None:
    """The run is rejected with these words."""
    try:
        session.run_with_ort_values(["y"], feed)
    except Exception as error:
        if says in str(error):
            return
        raise
    raise AssertionError("a run that had to fail did not")


def threads() -> Iterator[Case]:
    """Sessions and runs side by side, each with the bits it gives alone."""
    # Enough rows and columns for several units of work, so that ONNX Runtime's pool takes part.
    sizes = {"N": 200, "K": 192, "rows": (9,), "bias": True}

    def runs_of(
        op: str, session: onnxruntime.InferenceSession, times: int = RUNS, **more: object
    ) -> Callable[[], None]:
        spec = make(op, **(sizes | more))
        y, feed = expected(spec), feed_of(spec)

        def work() -> None:
            for _ in range(times):
                got = to_torch(session.run_with_ort_values(["y"], feed)[0])
                assert same_bits(got, y), f"{op} gave other bits beside other threads"

        return work

    def opened(
        op: str, library: str, pool: int = 2, **more: object
    ) -> onnxruntime.InferenceSession:
        options = options_with(library)
        options.intra_op_num_threads = pool
        model = model_of(make(op, **(sizes | more)))
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def one_session(library: str) -> None:
        session = opened("NF4LoraLinear", library)
        # Other numbers of rows in every thread: workspaces of different sizes at the same time.
        at_once([runs_of("NF4LoraLinear", session, rows=(2 * i + 1,)) for i in range(THREADS)])

    def many_sessions(library: str) -> None:
        ops = ("NF4Linear", "NF4LoraLinear", "LoraLinear", "NF4Linear")
        at_once([runs_of(op, opened(op, library)) for op in ops])

    def come_and_go(library: str) -> None:
        stays = opened("NF4Linear", library)

        def others() -> None:
            for _ in range(RUNS):
                runs_of("NF4LoraLinear", opened("NF4LoraLinear", library), times=1)()
                gc.collect()

        at_once([runs_of("NF4Linear", stays, times=5 * RUNS), others, others])

    def errors_beside_runs(library: str) -> None:
        session = opened("NF4Linear", library)
        bad = feed_of(make("NF4Linear", **(sizes | {"K": 191})))

        def fail() -> None:
            for _ in range(RUNS):
                must_fail(session, bad, "NF4Linear: x must")

        at_once([runs_of("NF4Linear", session), fail, runs_of("NF4Linear", session), fail])

    def same_bits_for_any_pool(library: str) -> None:
        for op in ("NF4Linear", "NF4LoraLinear"):
            for pool in (1, 2, 3):
                runs_of(op, opened(op, library, pool=pool), times=2)()

    def after_an_error(library: str) -> None:
        spec = make("NF4Linear", bias=True)
        session = session_of(model_of(spec), library)
        for _ in range(3):
            short = spec.but(packed=spec.inputs["packed"][:-1])
            must_fail(session, feed_of(short), "NF4Linear: packed must")
            y = to_torch(session.run_with_ort_values(["y"], feed_of(spec))[0])
            assert same_bits(y, expected(spec))

    yield Case("threads: one session run from many", one_session)
    yield Case("threads: many sessions at once", many_sessions)
    yield Case("threads: sessions come and go beside one that runs", come_and_go)
    yield Case("threads: errors beside runs", errors_beside_runs)
    yield Case("threads: the same bits for any pool", same_bits_for_any_pool)
    yield Case("threads: a session goes on after an error", after_an_error)


def nested_graphs() -> Iterator[Case]:
    """The operation inside an If, where its weights are the outer graph's."""

    def inside_if(library: str) -> None:
        spec = make("NF4LoraLinear", bias=True).fixed("packed", "absmax")
        made = helper.make_tensor_value_info("y_inside", TensorProto.FLOAT, None)
        node = node_of(spec)
        node.output[0] = "y_inside"
        branch = helper.make_graph([node], "branch", [], [made])
        flag = helper.make_tensor("flag", TensorProto.BOOL, (), [True])
        choose = helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)
        constant = helper.make_node("Constant", [], ["flag"], value=flag)
        session = session_of(model_of(spec, [constant, choose]), library)
        y = to_torch(session.run_with_ort_values(["y"], feed_of(spec))[0])
        assert same_bits(y, expected(spec))

    def every_optimization(library: str) -> None:
        # All inputs are constants: nothing may fold the node away or run it with the wrong ones.
        spec = make("NF4Linear", bias=True)
        model = model_of(spec.fixed(*spec.inputs))
        levels = onnxruntime.GraphOptimizationLevel
        for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_ALL):
            options = options_with(library)
            options.graph_optimization_level = level
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            y = to_torch(session.run_with_ort_values(["y"], {})[0])
            assert same_bits(y, expected(spec))

    def a_chain(library: str) -> None:
        # Two nodes of one kind with weights of other sizes: kernels keep their own.
        first, second = make("NF4Linear", N=6, K=70), make("NF4Linear", N=9, K=6)
        parts = {f"{name}_2": value for name, value in second.inputs.items() if name != "x"}
        nodes = [node_of(first), node_of(second)]
        nodes[0].output[0], nodes[1].name = "between", "second"
        nodes[1].input[:] = ["between", *parts]
        both = first.but(**parts)
        session = session_of(model_of(both, nodes), library)
        y = to_torch(session.run_with_ort_values(["y"], feed_of(both))[0])
        assert same_bits(y, expected(second.but(x=expected(first))))

    yield Case("graphs: inside an If", inside_if)
    yield Case("graphs: all inputs constant, with and without optimization", every_optimization)
    yield Case("graphs: two nodes of one operation", a_chain)
