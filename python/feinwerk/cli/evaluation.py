"""Measures a model on the held-out questions: loss, generated answers, and the fall's interval."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from feinwerk.cli.answer_loss import answer_nll
from feinwerk.cli.data import Encoded, collate, length_sorted_batches

EVALUATION_BATCH = 8
RESAMPLES = 10_000


@dataclass(frozen=True)
class HeldOut:
    """Held-out loss example by example, in the examples' order, and the generated answers."""

    nll: tuple[float, ...]  # nats, summed over the answer's tokens
    tokens: tuple[int, ...]
    answers: tuple[str, ...] = ()  # of the first len(answers) examples chosen for generation

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of an answer token, in nats."""
        return sum(self.nll) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the checkpoint."""
        return {"nll": list(self.nll), "tokens": list(self.tokens), "answers": list(self.answers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HeldOut:
        """Read what `to_dict` wrote."""
        return cls(tuple(values["nll"]), tuple(values["tokens"]), tuple(values["answers"]))


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@torch.no_grad()
def held_out_nll(
    model: Any, examples: Sequence[Encoded], on_batch: Callable[[int], None]
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Return (summed negative log-likelihood, answer tokens) of every example.

    Args:
        model: the model to measure; left in evaluation mode.
        examples: the held-out examples.
        on_batch: told how many examples each batch had.
    """
    model.eval()
    nll = [0.0] * len(examples)
    for indices in length_sorted_batches([e.length for e in examples], EVALUATION_BATCH):
        batch = collate([examples[i] for i in indices], pad=0)
        rows = torch.split(answer_nll(model, batch).double(), list(batch.counts))
        for index, row in zip(indices, rows, strict=True):
            nll[index] = row.sum().item()
        on_batch(len(indices))
    return tuple(nll), tuple(len(e.answer) for e in examples)


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Encoded],
    *,
    new_tokens: int,
    on_batch: Callable[[int], None],
    batch_size: int = 16,
) -> tuple[str, ...]:
    """Answer the questions greedily: no sampling, so the same model gives the same answers.

    Args:
        model: the model to ask.
        tokenizer: its tokenizer.
        examples: whose prompts to answer.
        new_tokens: the most tokens an answer may have.
        on_batch: told how many answers each batch had.
        batch_size: prompts answered at once.
    """
    model.eval()
    answers = [""] * len(examples)
    for indices in length_sorted_batches([len(e.prompt) for e in examples], batch_size):
        prompts = [examples[i].prompt for i in indices]
        width = max(len(prompt) for prompt in prompts)
        tokens = torch.full((len(prompts), width), tokenizer.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        output = _greedy(model, tokens, mask, new_tokens, tokenizer.eos_token_id)
        for index, row_tokens in zip(indices, output, strict=True):
            answers[index] = tokenizer.decode(row_tokens, skip_special_tokens=True).strip()
        on_batch(len(indices))
    return tuple(answers)


def _greedy(
    model: Any, tokens: torch.Tensor, mask: torch.Tensor, new_tokens: int, end: int
) -> torch.Tensor:
    """Extend left-padded prompts by the likeliest token until all have ended.

    transformers' generate does the same, but hands the head a strided view of the last position,
    for which torch copies the head's weight once for every prompt (0.9 GB for 16).

    Args:
        model: a causal language model, with or without adapters.
        tokens: int64 [batch, length].
        mask: int64 [batch, length], 0 where `tokens` is padding.
        new_tokens: the most tokens to add.
        end: the end-of-turn token; a row that has ended is filled with it.

    Returns:
        int64 [batch, at most new_tokens].
    """
    from transformers import DynamicCache

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder, head = causal.get_decoder(), causal.get_output_embeddings()
    cache = DynamicCache(config=causal.config)
    position = (mask.cumsum(dim=1) - 1).clamp_min(0)
    ended = torch.zeros(len(tokens), dtype=torch.bool)
    output: list[torch.Tensor] = []
    step = tokens
    while len(output) < new_tokens and not bool(ended.all()):
        hidden = decoder(
            input_ids=step,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        chosen = head(hidden[:, -1].contiguous()).argmax(dim=-1)
        chosen = torch.where(ended, end, chosen)
        output.append(chosen)
        ended |= chosen == end
        step, position = chosen[:, None], position[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(step)], dim=1)
    return torch.stack(output, dim=1)


def choose_for_generation(examples: Sequence[Encoded], count: int) -> list[int]:
    """Return `count` indices spread evenly over the examples: chosen before any answer is seen."""
    count = min(count, len(examples))
    return [(2 * i + 1) * len(examples) // (2 * count) for i in range(count)]


def token_f1(answer: str, reference: str) -> float:
    """Return the F1 of the words that answer and reference share, as in SQuAD, in 0..1."""
    ours, theirs = _words(answer), _words(reference)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    if shared == 0:
        return float(not ours and not theirs)
    precision, recall = shared / len(ours), shared / len(theirs)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def paired_fall(
    before: HeldOut, after: HeldOut, groups: Sequence[str], seed: int, resamples: int = RESAMPLES
) -> Interval:
    """Return by which share the loss fell, with its 95 % paired-bootstrap interval.

    fall = 1 - loss_after / loss_before, both over the same resampled questions. Whole groups are
    drawn, because a question and its translation do not vary independently.

    Args:
        before: the model without adapter.
        after: the same with adapter, on the same examples.
        groups: the group of each example.
        seed: of the resampling.
        resamples: how many times to draw.
    """
    sums = _group_sums(groups, np.array([before.nll, after.nll]))
    drawn = _draw(sums.shape[1], seed, resamples)
    totals = sums[:, drawn].sum(axis=2)
    falls = 1.0 - totals[1] / totals[0]
    low, high = np.percentile(falls, [2.5, 97.5])
    return Interval(1.0 - sum(after.nll) / sum(before.nll), float(low), float(high))


def paired_gain(
    before: Sequence[float],
    after: Sequence[float],
    groups: Sequence[str],
    seed: int,
    resamples: int = RESAMPLES,
) -> Interval:
    """Return the mean gain of a score over the same examples, with its 95 % interval."""
    gains = np.array([np.array(after) - np.array(before), np.ones(len(before))])
    sums = _group_sums(groups, gains)
    totals = sums[:, _draw(sums.shape[1], seed, resamples)].sum(axis=2)
    low, high = np.percentile(totals[0] / totals[1], [2.5, 97.5])
    return Interval(float(gains[0].mean()), float(low), float(high))


def _group_sums(groups: Sequence[str], values: np.ndarray) -> np.ndarray:
    """Sum the columns of `values` [rows, examples] within each group."""
    _, index = np.unique(np.array(groups), return_inverse=True)
    sums = np.zeros((values.shape[0], int(index.max()) + 1))
    for row, per_example in zip(sums, values, strict=True):
        np.add.at(row, index, per_example)
    return sums


def _draw(count: int, seed: int, resamples: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, count, size=(resamples, count))
