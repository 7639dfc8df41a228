"""generate: the tokens of torch's greedy loop, sampling that a seed repeats, clear refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_lms import LENGTHS, VOCABULARY, dense_form, ragged_batch, session_of, tiny_lm

import feinwerk.onnx
from feinwerk.onnx import export_causal_lm, generate
from feinwerk.onnx.file_forms import as_contrib, as_dense
from feinwerk.onnx.generation import _draw

pytest.importorskip("onnxscript")
pytest.importorskip("transformers")
pytest.importorskip("peft")

NEW = 16
WIDTH = max(LENGTHS)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_lm("nf4")


@pytest.fixture(scope="module")
def path(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("lm") / "model.onnx"
    export_causal_lm(model, path, last_logits_only=True)
    return path


@pytest.fixture(scope="module")
def session(path: Path) -> Any:
    return session_of(path)


@pytest.fixture(scope="module")
def prompts() -> tuple[np.ndarray, np.ndarray]:
    ids, mask, _ = ragged_batch()
    return ids[:, :WIDTH].numpy(), mask[:, :WIDTH].numpy()


def greedy_of_torch(model: Any, ids: np.ndarray, mask: np.ndarray, eos: list[int]) -> np.ndarray:
    with torch.no_grad():
        whole = model.generate(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask),
            max_new_tokens=NEW, do_sample=False, eos_token_id=eos or None, pad_token_id=0,
        )  # fmt: skip
    return whole[:, ids.shape[1] :].numpy()


def test_greedy_tokens_are_those_of_torch(model, session, prompts):
    ids, mask = prompts
    ours = generate(session, ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=[])
    theirs = greedy_of_torch(model, ids, mask, [])
    assert len(set(theirs.reshape(-1).tolist())) > NEW  # texts that differ, no loop of one token
    np.testing.assert_array_equal(ours, theirs)
    alone = generate(session, ids[1:2], max_new_tokens=NEW, eos_token_id=[])
    np.testing.assert_array_equal(alone, theirs[1:2])


def test_a_row_ends_at_its_end_token_and_the_loop_when_all_have(model, session, prompts):
    ids, mask = prompts
    free = greedy_of_torch(model, ids, mask, [])
    ends = [int(free[0, 4]), int(free[1, 2]), int(free[2, 6])]
    seen: list[np.ndarray] = []
    ours = generate(
        session, ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=ends,
        on_token=seen.append,
    )  # fmt: skip
    assert ours.shape[1] < NEW
    np.testing.assert_array_equal(np.stack(seen, axis=1), ours)
    for row, tokens in zip(free, ours, strict=True):
        length = 1 + int(np.isin(row, ends).argmax())
        np.testing.assert_array_equal(tokens[:length], row[:length])
        assert (tokens[length:] == ends[0]).all()


def test_a_path_makes_a_session_with_the_library_and_without_it_says_so(
    path, session, prompts, monkeypatch
):
    ids, mask = prompts
    ours = generate(session, ids, attention_mask=mask, max_new_tokens=4)
    np.testing.assert_array_equal(
        generate(str(path), ids, attention_mask=mask, max_new_tokens=4), ours
    )
    monkeypatch.setattr(feinwerk.onnx.library, "_NAME", "missing.so")
    with pytest.warns(UserWarning, match="running without the custom-op library"):
        fallback = generate(path, ids, attention_mask=mask, max_new_tokens=4)
    np.testing.assert_array_equal(fallback, ours)


def test_the_other_forms_of_a_file_say_the_same(model, path, session, prompts, tmp_path):
    ids, mask = prompts
    ours = generate(session, ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=[])
    dense = dense_form(model, torch.float32)
    as_contrib(path, tmp_path / "contrib.onnx")
    as_dense(path, tmp_path / "dense.onnx", lambda name: dense.get_submodule(name).weight)
    for form in ("contrib", "dense"):
        other = session_of(tmp_path / f"{form}.onnx", library=False)
        tokens = generate(other, ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=[])
        np.testing.assert_array_equal(tokens, ours)
    with pytest.raises(ValueError, match='source must be a file of ops="feinwerk"'):
        as_contrib(tmp_path / "dense.onnx", tmp_path / "again.onnx")


def test_an_adapter_is_active_in_every_step(session, prompts, tmp_path):
    ids, mask = prompts
    other = tiny_lm("nf4", seed=0)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.neg_()
    other.save_pretrained(tmp_path, save_embedding_layers=False)
    file = tmp_path / "other.onnx_adapter"
    feinwerk.onnx.save_adapter(tmp_path, file)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": []}
    base = generate(session, ids, **options)
    theirs = greedy_of_torch(other, ids, mask, [])
    assert (base != theirs).any()
    adapter = feinwerk.onnx.load_adapter(file, session)
    np.testing.assert_array_equal(generate(session, ids, adapter=adapter, **options), theirs)
    np.testing.assert_array_equal(generate(session, ids, adapter=file, **options), theirs)
    np.testing.assert_array_equal(generate(session, ids, **options), base)


def test_a_seed_repeats_a_sample(session, prompts):
    ids, mask = prompts
    options = {"attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": []}
    options |= {"do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.95}
    first, again, other = (generate(session, ids, seed=seed, **options) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    greedy = generate(session, ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=[])
    one = generate(session, ids, seed=3, **{**options, "top_k": 1})
    np.testing.assert_array_equal(one, greedy)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, 1.0), (0.5, None, 1.0), (2.0, 3, 1.0), (1.0, None, 0.7)],
)
def test_drawn_tokens_have_the_frequencies_of_the_formula(temperature, top_k, top_p):
    """A chi-squared test of 20,000 draws, of a fixed seed: below its 99.9 % quantile."""
    logits = np.array([1.0, 0.2, 2.0, -1.0, 1.5], dtype=np.float32)
    likely = np.exp(logits.astype(np.float64) / temperature)
    order = np.argsort(-likely)
    if top_k is not None:
        likely[order[top_k:]] = 0
    share = likely / likely.sum()
    before = np.cumsum(share[order]) - share[order]
    share[order[before >= top_p]] = 0
    share /= share.sum()
    draws = 20_000
    random = np.random.default_rng(0)
    tokens = _draw(np.tile(logits, (draws, 1)), temperature, top_k, top_p, random)
    counts = np.bincount(tokens, minlength=5)
    assert (counts[share == 0] == 0).all()
    possible = share > 0
    expected = draws * share[possible]
    chi_squared = ((counts[possible] - expected) ** 2 / expected).sum()
    quantile = {2: 10.83, 3: 13.82, 4: 16.27, 5: 18.47}[int(possible.sum())]
    assert chi_squared < quantile


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"input_ids": np.ones(3, np.int64)}, ValueError, r"input_ids must have shape \(batch"),
        ({"input_ids": np.ones((1, 0), np.int64)}, ValueError, "both at least 1"),
        ({"input_ids": np.ones((1, 3))}, TypeError, "input_ids must hold integers, got float64"),
        ({"input_ids": np.full((1, 3), VOCABULARY)}, ValueError, "input_ids must lie in 0 to 210"),
        ({"input_ids": np.array([[-1]])}, ValueError, "input_ids must lie in 0 to 210"),
        ({"attention_mask": np.ones((1, 2), np.int64)}, ValueError, r"must have shape \(1, 3\)"),
        ({"attention_mask": np.array([[1, 1, 0]])}, ValueError, "must pad on the left alone"),
        ({"attention_mask": np.array([[1, 0, 1]])}, ValueError, "must pad on the left alone"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 62}, ValueError, "must leave room for 3 tokens of prompt within 64"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0 and finite, got 0.0"),
        ({"top_k": 0}, ValueError, "top_k must be None or at least 1, got 0"),
        ({"top_p": 1.5}, ValueError, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"adapter": 3}, TypeError, "adapter must be what load_adapter returned"),
        ({"session_or_path": 3}, TypeError, "must be an onnxruntime.InferenceSession or a path"),
        ({"session_or_path": "/nonexistent"}, FileNotFoundError, "session_or_path must be a file"),
    ],
)
def test_rejections(session, change, error, words):
    given = {"session_or_path": session, "input_ids": np.array([[3, 4, 5]]), "max_new_tokens": 8}
    given |= change
    with pytest.raises(error, match=f"^generate: .*{words}"):
        generate(given.pop("session_or_path"), given.pop("input_ids"), **given)


def test_a_file_of_another_origin_is_refused(tmp_path):
    feinwerk.onnx.export(torch.nn.Linear(4, 4).eval(), (torch.ones(1, 4),), tmp_path / "layer.onnx")
    with pytest.raises(ValueError, match="must be over a file that export_causal_lm wrote"):
        generate(tmp_path / "layer.onnx", np.array([[1]]))
