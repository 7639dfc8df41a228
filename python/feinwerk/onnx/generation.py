"""generate: text from an exported causal LM, with onnxruntime and numpy alone.

```
   prompt --> session --> logits[:, -1] --> choose --> token --+--> result
                ^   |                                          |
                |   +-- present (OrtValues) --+                |
                +--------- past <-------------+                |
                +----------------- ids <-----------------------+
```

The cache stays in OrtValues: what one step returns is the next step's input, without a copy in
Python.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from feinwerk import _checks

_OP = "generate"
METADATA_KEY = "feinwerk.causal_lm"  # of what export_causal_lm writes


def generate(
    session_or_path: Any,
    input_ids: Any,
    *,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    attention_mask: Any = None,
    adapter: Any = None,
    on_token: Callable[[np.ndarray], object] | None = None,
) -> np.ndarray:
    """Continue prompts by the model's likeliest tokens, or by drawn ones.

    Sampling draws from softmax(logits / temperature) after leaving out all but the `top_k`
    likeliest tokens, then all but the fewest whose probabilities add up to `top_p`.

    Args:
        session_or_path: an onnxruntime.InferenceSession over what `export_causal_lm` wrote, or the
            file's path: then a session is made for this call, with the custom-op library where
            the installation has one.
        input_ids: integers [batch, length]; prompts of different lengths are padded on the left.
        max_new_tokens: the most tokens to add.
        do_sample: draw tokens instead of taking the likeliest.
        temperature: above 0; below 1 makes likely tokens likelier.
        top_k: how many of the likeliest tokens may be drawn; None for all.
        top_p: in (0, 1].
        seed: the same seed draws the same tokens; None draws anew at every call.
        eos_token_id: one or several tokens that end a text; default those in the file. An empty
            list never ends.
        attention_mask: [batch, length], 0 where input_ids is padding, 1 elsewhere; default all 1.
        adapter: what `load_adapter` returned, or the path of an `.onnx_adapter` file: active in
            every run of this call.
        on_token: called after every step with the new tokens, int64 [batch].

    Returns:
        int64 [batch, at most max_new_tokens]: the new tokens alone. A row that has ended is filled
        with the first token that ends a text.

    Raises:
        ImportError: if onnxruntime is not installed.
        TypeError: if a value is of another type than named here.
        ValueError: if the session's model was not written by `export_causal_lm`, or a value breaks
            its rule.

    Source:
        The nucleus (top_p): Holtzman et al., arXiv 1904.09751.

    Example:
        See docs/onnx_generation.md.
    """
    session = _session(session_or_path)
    facts = _facts(session)
    ids = _token_array("input_ids", input_ids, facts["vocab_size"])
    mask = _mask_array(attention_mask, ids)
    _check_numbers(max_new_tokens, temperature, top_k, top_p)
    length = ids.shape[1] + max_new_tokens
    if length > facts["max_length"]:
        rule = f"leave room for {ids.shape[1]} tokens of prompt within {facts['max_length']}"
        _checks.reject(ValueError, _OP, "max_new_tokens", rule, max_new_tokens)
    ends = _ends(facts["eos_token_id"] if eos_token_id is None else eos_token_id)
    random = np.random.default_rng(seed)
    step = CachedSession(session, len(ids), _run_options(adapter, session))
    position = np.maximum(mask.cumsum(axis=1) - 1, 0)
    ended = np.zeros(len(ids), dtype=bool)
    output: list[np.ndarray] = []
    while len(output) < max_new_tokens and not ended.all():
        logits = step(ids, mask, position)
        if do_sample:
            tokens = _draw(logits, temperature, top_k, top_p, random)
        else:
            tokens = logits.argmax(axis=-1)
        if ends:
            tokens = np.where(ended, ends[0], tokens)
            ended |= np.isin(tokens, ends)
        output.append(tokens.astype(np.int64))
        if on_token is not None:
            on_token(output[-1])
        ids, position = output[-1][:, None], position[:, -1:] + 1
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
    return np.stack(output, axis=1)


class CachedSession:
    """One run of a session after another, with the cache between them: what `generate` loops over.

    Args:
        session: over a file of `export_causal_lm`.
        batch: rows of every run.
        run_options: onnxruntime.RunOptions, for adapters.

    Attributes:
        cache: the OrtValues that the next run reads, key and value of each layer in turn.
    """

    def __init__(self, session: Any, batch: int, run_options: Any = None) -> None:
        """Start with an empty cache."""
        from onnxruntime import OrtValue

        facts = _facts(session)
        self._session = session
        self._options = run_options
        self._value = OrtValue.ortvalue_from_numpy
        layers = range(facts["layers"])
        self._past = [f"past_key_values.{i}.{part}" for i in layers for part in ("key", "value")]
        self._outputs = ["logits"]
        self._outputs += [f"present.{i}.{part}" for i in layers for part in ("key", "value")]
        shape = (batch, facts["kv_heads"], 0, facts["head_size"])
        self.cache = [self._value(np.zeros(shape, dtype=np.float32)) for _ in self._past]

    def __call__(self, ids: np.ndarray, mask: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Feed new tokens and return the logits of the last of them.

        Args:
            ids: int64 [batch, rows].
            mask: int64 [batch, all rows so far], 0 where padding is.
            position: int64 [batch, rows], of each token in its text.

        Returns:
            fp32 [batch, vocab].
        """
        feeds = dict(zip(self._past, self.cache, strict=True))
        feeds["input_ids"] = self._value(np.ascontiguousarray(ids))
        feeds["attention_mask"] = self._value(np.ascontiguousarray(mask))
        feeds["position_ids"] = self._value(np.ascontiguousarray(position))
        logits, *self.cache = self._session.run_with_ort_values(self._outputs, feeds, self._options)
        rows: np.ndarray = logits.numpy()
        return rows[:, -1]


def _session(session_or_path: Any) -> Any:
    """Return the session, made here when a path was given."""
    import onnxruntime

    if not isinstance(session_or_path, (str, os.PathLike)):
        if not hasattr(session_or_path, "run_with_ort_values"):
            rule = "be an onnxruntime.InferenceSession or a path"
            got = type(session_or_path).__name__
            _checks.reject(TypeError, _OP, "session_or_path", rule, got)
        return session_or_path
    from feinwerk.onnx.library import register

    path = Path(session_or_path)
    if not path.is_file():
        raise FileNotFoundError(f"{_OP}: session_or_path must be a file, got {str(path)!r}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # below, it names every input that has a default
    try:
        register(options)
    except RuntimeError as error:
        warnings.warn(f"{_OP}: running without the custom-op library: {error}", stacklevel=3)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _facts(session: Any) -> dict[str, Any]:
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        rule = "be over a file that export_causal_lm wrote"
        _checks.reject(ValueError, _OP, "session_or_path", rule, "one without its metadata")
    facts: dict[str, Any] = json.loads(text)
    return facts


def _token_array(name: str, value: Any, below: int) -> np.ndarray:
    """Return `value` as int64 [batch, length] with every element in [0, below)."""
    array = np.asarray(value)
    if array.dtype.kind not in "iub":
        _checks.reject(TypeError, _OP, name, "hold integers", array.dtype)
    if array.ndim != 2 or 0 in array.shape:
        rule = "have shape (batch, length), both at least 1"
        _checks.reject(ValueError, _OP, name, rule, array.shape)
    if array.min() < 0 or array.max() >= below:
        got = f"{array.min()} to {array.max()}"
        _checks.reject(ValueError, _OP, name, f"lie in 0 to {below - 1}", got)
    return array.astype(np.int64)


def _mask_array(value: Any, ids: np.ndarray) -> np.ndarray:
    if value is None:
        return np.ones_like(ids)
    mask = _token_array("attention_mask", value, 2)
    if mask.shape != ids.shape:
        _checks.reject(ValueError, _OP, "attention_mask", f"have shape {ids.shape}", mask.shape)
    # New tokens are appended on the right, so that padding there would come to lie inside.
    if (np.diff(mask, axis=1) < 0).any() or not mask[:, -1].all():
        rule = "pad on the left alone and leave a token in each row"
        _checks.reject(ValueError, _OP, "attention_mask", rule, "another form")
    return mask


def _check_numbers(new_tokens: int, temperature: float, top_k: int | None, top_p: float) -> None:
    if new_tokens < 1:
        _checks.reject(ValueError, _OP, "max_new_tokens", "be at least 1", new_tokens)
    if not (math.isfinite(temperature) and temperature > 0):
        _checks.reject(ValueError, _OP, "temperature", "be above 0 and finite", temperature)
    if top_k is not None and top_k < 1:
        _checks.reject(ValueError, _OP, "top_k", "be None or at least 1", top_k)
    if not 0 < top_p <= 1:
        _checks.reject(ValueError, _OP, "top_p", "lie in (0, 1]", top_p)


def _ends(value: int | Sequence[int]) -> list[int]:
    return [int(value)] if isinstance(value, (int, np.integer)) else [int(v) for v in value]


def _run_options(adapter: Any, session: Any) -> Any:
    """Return the RunOptions that make `adapter` active; None for none."""
    if adapter is None:
        return None
    if isinstance(adapter, (str, os.PathLike)):
        from feinwerk.onnx.adapter_session import load_adapter

        adapter = load_adapter(Path(adapter), session)
    if not hasattr(adapter, "run_options"):
        rule = "be what load_adapter returned, or a path"
        _checks.reject(TypeError, _OP, "adapter", rule, type(adapter).__name__)
    return adapter.run_options()


def _draw(
    logits: np.ndarray,
    temperature: float,
    top_k: int | None,
    top_p: float,
    random: np.random.Generator,
) -> np.ndarray:
    """Draw one token a row from fp32 logits [batch, vocab], in fp64."""
    order = np.argsort(-logits, axis=-1, kind="stable")
    scores = np.take_along_axis(logits, order, axis=-1).astype(np.float64) / temperature
    likely = np.exp(scores - scores[:, :1])
    if top_k is not None:
        likely[:, top_k:] = 0.0
    sums = likely.cumsum(axis=-1)
    # A token stays while those before it have not reached top_p: the first one always does.
    before = sums - likely
    likely[before >= top_p * sums[:, -1:]] = 0.0
    sums = likely.cumsum(axis=-1)
    point = random.random((len(logits), 1)) * sums[:, -1:]
    rank = (sums <= point).sum(axis=-1)
    return np.take_along_axis(order, rank[:, None], axis=-1)[:, 0]
