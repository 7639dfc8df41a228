"""Decoding with a chat model in ONNX Runtime: our operators beside MatMulBnb4 and dense MatMul.

SmolLM2-135M-Instruct in NF4 with a LoRA adapter on every layer is exported once; the peers' files
are written from that graph (feinwerk.onnx.file_forms), with the adapter as constants or merged. A
sample is one token after PAST others, at a cache that does not grow, so that all samples do the
same work. The head and the embedding are dense on every side.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import feinwerk.onnx
from benchmarks import machine
from benchmarks.harness import Candidate, paired
from feinwerk.cli import model as chat
from feinwerk.cli.deployment import dense_form, open_session
from feinwerk.cli.settings import DEFAULT_MODEL, Settings
from feinwerk.onnx.file_forms import as_contrib, as_dense
from feinwerk.onnx.generation import CachedSession

OURS, CONTRIB, DENSE = "NF4LoraLinear", "MatMulBnb4", "MatMul"
PAST = 64
BAR = ">= 3"


def write_files(folder: Path) -> dict[str, Path]:
    """Export the model and write its peers."""
    chat.quiet_libraries()
    settings = Settings(dtype="float32")
    source = chat.find_model(DEFAULT_MODEL)
    loaded, _ = chat.load_model(source, cache=True)
    chat.hold(loaded, settings, lambda done, total, name: None)
    adapted = chat.attach_adapters(loaded, settings, source).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)  # it is zero before training
    files = {side: folder / f"{side}.onnx" for side in (OURS, CONTRIB, DENSE)}
    feinwerk.onnx.export_causal_lm(adapted, files[OURS], last_logits_only=True)
    as_contrib(files[OURS], files[CONTRIB])
    dense = dense_form(adapted, torch.float32)
    as_dense(files[OURS], files[DENSE], lambda path: dense.get_submodule(path).weight)
    return files


def one_token(path: Path) -> tuple[Any, np.ndarray]:
    """A call that decodes a token, and the logits it finds."""
    session = open_session(path)
    ids = np.random.default_rng(0).integers(0, 1000, (1, PAST))
    step = CachedSession(session, 1)
    token = step(ids, np.ones_like(ids), np.arange(PAST)[None]).argmax(axis=-1)[:, None]
    cache, mask, position = step.cache, np.ones((1, PAST + 1), np.int64), np.array([[PAST]])

    def call() -> np.ndarray:
        step.cache = cache
        return step(token, mask, position)

    return call, call()


def measure(seconds: float) -> list[dict[str, Any]]:
    """A record for each peer."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder))
        sizes = {
            side: sum(part.stat().st_size for part in Path(folder).glob(f"{path.name}*"))
            for side, path in files.items()
        }
        calls, logits = {}, {}
        for side, path in files.items():
            calls[side], logits[side] = one_token(path)
    for side in (CONTRIB, DENSE):
        if not np.allclose(logits[side], logits[OURS], atol=1e-2):
            raise AssertionError(f"onnx_decode: {side} and {OURS} compute different logits")
    candidates = [Candidate(side, [calls[side]]) for side in (OURS, CONTRIB, DENSE)]
    machine.wait_until_quiet(60)
    load = machine.OtherLoad()
    result = paired(*candidates, seconds=seconds, min_rounds=9, max_rounds=201)
    return [
        {
            "peer": peer,
            "tokens_s": 1 / result.times(OURS)["median"],
            "peer_tokens_s": 1 / result.times(peer)["median"],
            "bytes": sizes[OURS],
            "peer_bytes": sizes[peer],
            "ratio": result.ratio(peer).as_dict(),
            "others_share": load.share(),
        }
        for peer in (CONTRIB, DENSE)
    ]
