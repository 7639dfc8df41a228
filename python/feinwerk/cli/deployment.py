"""The quickstart's last step: the fine-tuned model in ONNX Runtime, checked and timed beside torch.

```
   trained model, fp32 --+-- export ----------- onnx/model.onnx ---- ORT, Feinwerk's operators
                         |      +- contrib form -- ORT, MatMulBnb4      (a temporary file)
                         |      +- dense form ---- ORT, dense           (a temporary file)
                         +-- torch, NF4
                         +-- dequantized, merged -- torch, dense
```

All sides hold the same function, so that their logits are compared with one fp64 truth. The traces
of large models take long: the other forms are written from the first file.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import feinwerk
import feinwerk.onnx
from feinwerk.cli import machine, model
from feinwerk.cli.console import Display
from feinwerk.cli.data import Encoded
from feinwerk.cli.settings import Settings
from feinwerk.testing import ulp

FOLDER, FILE = "onnx", "model.onnx"
TITLE = "the ONNX Runtime step"
OURS, CONTRIB, DENSE = "ORT Feinwerk", "ORT MatMulBnb4", "ORT dense"
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# Tokens a side generates before it is another's turn, and turns; the first turn is a warm-up.
TURN, TURNS = 4, 5
LIMIT = 30.0  # seconds after which no further turn begins, on a busy or slow machine
PAUSE = 0.02  # seconds, in which the threads of the side before go to sleep
CHECKED = 5  # positions whose logits are compared: the prompt's last and the answer's first

# One step: ids, mask and positions to the logits of the last position.
Step = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Side:
    """One way to run the model: its bytes (file, or tensors in torch), seconds token by token."""

    name: str
    bytes: int
    seconds: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """By the median."""
        return 1.0 / float(np.median(self.seconds))


@dataclass(frozen=True)
class Deployment:
    """What the step found. Errors are the largest of any logit, against fp64."""

    sides: tuple[Side, ...]
    answers: tuple[str, ...]
    error: float
    torch_error: float
    share_of_budget: float

    @property
    def matches(self) -> bool:
        """Whether ONNX Runtime's logits are those of torch, within the error budget."""
        return self.share_of_budget <= 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, speeds included."""
        return {
            **asdict(self),
            "matches": self.matches,
            "tokens_per_second": {side.name: side.tokens_per_second for side in self.sides},
        }

    def sentences(self) -> list[str]:
        """The check and the speeds in a sentence each."""
        speeds = ", ".join(f"{side.name} {side.tokens_per_second:.1f}" for side in self.sides)
        same = "match" if self.matches else "do not match"
        return [
            f"ONNX Runtime's logits {same} torch's: off by {self.error:.2g} at most, torch's own "
            f"by {self.torch_error:.2g} ({100 * self.share_of_budget:.0f} % of the error budget)",
            f"tokens/s, one text: {speeds}",
        ]


def why_not() -> str | None:
    """Return why the step cannot run on this installation, or None."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (pip install 'feinwerk[onnx]')"
    from feinwerk.onnx import library_path

    try:
        library_path()
    except RuntimeError as error:
        return str(error)
    return None


def run(
    adapted: Any,
    tokenizer: Any,
    prompts: Sequence[Encoded],
    settings: Settings,
    display: Display,
    *,
    new_tokens: int,
) -> Deployment | None:
    """Export, generate, time and check.

    Args:
        adapted: the trained model; left as it is.
        tokenizer: its tokenizer.
        prompts: the questions to answer, at least one.
        settings: of the run; the file goes to its output folder.
        display: shows the phases.
        new_tokens: the most tokens of an answer.

    Returns:
        What was found; None, after one sentence, where the step cannot run.
    """
    reason = why_not()
    if reason is not None:
        display.line(f"no ONNX Runtime step: {reason}")
        return None
    folder = Path(settings.output) / FOLDER
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as place:
        work = Path(place)
        with display.phase("exporting to ONNX", total=4) as bar:
            live = copy.deepcopy(adapted).float().eval()
            live.config.use_cache = True
            bar.advance(note="tracing the model")
            try:
                feinwerk.onnx.export_causal_lm(live, work / FILE, last_logits_only=True)
            except (TypeError, ValueError, NotImplementedError) as refusal:
                display.line(f"no ONNX Runtime step: {refusal}")
                return None
            bar.advance(note="merging the adapter")
            dense = dense_form(live, torch.float32)
            bar.advance(note="writing the peers' files")
            files = _write_forms(work, dense, settings)
            bar.advance()
        gc.collect()
        machine.return_free_memory()
        prompt = prompts[0].prompt
        with display.phase("answering from ONNX Runtime", total=len(prompts)) as bar:
            sessions = {name: open_session(path) for name, path in files.items()}
            tokens = _answers(sessions[OURS], tokenizer, prompts, new_tokens, bar.advance)
        sides = _time_sides(live, dense, sessions, files, prompt, settings, display)
        with display.phase("checking ONNX Runtime's logits"):
            checked = (*prompt, *tokens[0][: CHECKED - 1].tolist())
            ours = _logits_in_steps(sessions[OURS], checked, len(prompt))
            peer = _torch_logits(dense, checked)[len(prompt) - 1 :]
            sessions.clear()
            del dense
            gc.collect()
            error, torch_error, share = _compare(live, checked, len(prompt), ours, peer)
        os.replace(work / FILE, folder / FILE)
    texts = tuple(tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens)
    return Deployment(sides, texts, error, torch_error, share)


def dense_form(live: Any, dtype: torch.dtype) -> Any:
    """Return a dense copy with the adapter merged in by stock PEFT, in `dtype`."""
    from feinwerk.integrations.peft import unfuse

    copied = copy.deepcopy(live)
    unfuse(copied)
    feinwerk.dequantize_model(copied)
    return copied.to(dtype).merge_and_unload().eval()


def _write_forms(work: Path, dense: Any, settings: Settings) -> dict[str, Path]:
    """Write the peers' files beside ours; return all."""
    from feinwerk.onnx.file_forms import as_contrib, as_dense

    files = {DENSE: work / "dense.onnx", OURS: work / FILE}
    as_dense(work / FILE, files[DENSE], lambda path: dense.get_submodule(path).weight)
    if settings.quantized:
        files = {DENSE: files[DENSE], CONTRIB: work / "contrib.onnx", OURS: files[OURS]}
        as_contrib(work / FILE, files[CONTRIB])
    return files


def open_session(model: Path | bytes) -> Any:
    """Open a session to be timed beside others, with Feinwerk's operators and torch's threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin after a run would take the cores from the side whose turn is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    feinwerk.onnx.register(options)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _answers(
    session: Any,
    tokenizer: Any,
    prompts: Sequence[Encoded],
    new_tokens: int,
    advance: Callable[[int], None],
) -> list[np.ndarray]:
    """Answer each prompt greedily; the tokens."""
    found = []
    for example in prompts:
        tokens = feinwerk.onnx.generate(
            session, np.array([example.prompt]), max_new_tokens=new_tokens,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        found.append(tokens[0])
        advance(1)
    return found


class _TorchSteps:
    """A torch model and its cache, fed and asked as a CachedSession is."""

    def __init__(self, tested: Any) -> None:
        from transformers import DynamicCache

        causal = tested.get_base_model() if hasattr(tested, "get_base_model") else tested
        self._decoder, self._head = causal.get_decoder(), causal.get_output_embeddings()
        self._cache = DynamicCache(config=causal.config)

    @torch.no_grad()
    def __call__(self, ids: np.ndarray, mask: np.ndarray, position: np.ndarray) -> np.ndarray:
        hidden = self._decoder(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(position),
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        logits: np.ndarray = self._head(hidden[:, -1].contiguous()).numpy()
        return logits


class _Greedy:
    """One text that grows by the likeliest token, at each call by one."""

    def __init__(self, step: Step, prompt: Sequence[int]) -> None:
        self._step = step
        self._length = len(prompt)
        positions = np.arange(self._length)[None]
        ids = np.array([prompt], dtype=np.int64)
        self._next = step(ids, np.ones_like(ids), positions).argmax(axis=-1)[:, None]

    def advance(self) -> float:
        """Generate a token; its seconds."""
        started = time.perf_counter()
        mask = np.ones((1, self._length + 1), dtype=np.int64)
        logits = self._step(self._next, mask, np.array([[self._length]]))
        self._next = logits.argmax(axis=-1)[:, None]
        self._length += 1
        return time.perf_counter() - started


def _time_sides(
    live: Any,
    dense: Any,
    sessions: dict[str, Any],
    files: dict[str, Path],
    prompt: Sequence[int],
    settings: Settings,
    display: Display,
) -> tuple[Side, ...]:
    """Let all sides go on with one prompt in turn, and time every token."""
    from feinwerk.onnx.generation import CachedSession

    kind = "torch NF4" if settings.quantized else "torch with adapter"
    steps: dict[str, Step] = {"torch dense": _TorchSteps(dense), kind: _TorchSteps(live)}
    sizes = {"torch dense": model.tensor_bytes(dense), kind: model.tensor_bytes(live)}
    for name, session in sessions.items():
        steps[name] = CachedSession(session, 1)
        sizes[name] = _file_bytes(files[name])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with display.phase("measuring tokens/s in turn", total=TURNS * len(steps)) as bar:
        texts = {name: _Greedy(step, prompt) for name, step in steps.items()}
        started = time.perf_counter()
        for turn in range(TURNS):
            if turn >= 2 and time.perf_counter() - started > LIMIT:
                break
            for name, text in texts.items():
                time.sleep(PAUSE)
                spent = [text.advance() for _ in range(TURN)]
                seconds[name] += spent if turn else []
                bar.advance(note=f"{name}: {1 / min(spent):.1f} tokens/s")
    return tuple(Side(name, sizes[name], tuple(seconds[name])) for name in steps)


def _file_bytes(path: Path) -> int:
    """The size of a file with its external data."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))


def _logits_in_steps(session: Any, tokens: Sequence[int], prompt: int) -> torch.Tensor:
    """Feed the prompt at once, what follows token by token; logits from its last position on."""
    from feinwerk.onnx.generation import CachedSession

    step = CachedSession(session, 1)
    rows = []
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, len(tokens)))]:
        ids = np.array([tokens[start:end]], dtype=np.int64)
        rows.append(step(ids, np.ones((1, end), dtype=np.int64), np.arange(start, end)[None]))
    return torch.from_numpy(np.concatenate(rows))


@torch.no_grad()
def _torch_logits(tested: Any, tokens: Sequence[int]) -> torch.Tensor:
    logits: torch.Tensor = tested(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def _compare(
    live: Any, tokens: Sequence[int], prompt: int, ours: torch.Tensor, peer: torch.Tensor
) -> tuple[float, float, float]:
    """Return the largest errors of ours and of torch's, and the share of the budget (numerics.md).

    The budget of a logit: 2 max|torch - y64| + ulp(y64) + 4 sqrt(K) 2^-24 (|x| |W|^T).
    """
    wide = dense_form(live, torch.float64)
    head = wide.get_output_embeddings()
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    truth = _torch_logits(wide, tokens)[prompt - 1 :]
    hook.remove()
    x = seen[0][0, prompt - 1 :]
    sums = x.abs() @ head.weight.detach().abs().t()
    torch_error = (peer - truth).abs().max()
    rounding = 4 * x.shape[-1] ** 0.5 * 2.0**-24 * sums
    budget = 2 * torch_error + ulp(truth, torch.float32) + rounding
    error = (ours - truth).abs()
    return float(error.max()), float(torch_error), float((error / budget).max())
