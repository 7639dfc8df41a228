"""The quickstart's numbers: token F1, the paired bootstrap and the verdict drawn from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from feinwerk.cli import evaluation
from feinwerk.cli.evaluation import HeldOut


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Yes.", "yes", 1.0),
        ("", "yes", 0.0),
        ("no", "yes", 0.0),
        ("a a b", "a b b", 2 * (2 / 3) * (2 / 3) / (4 / 3)),
        ("ja det är så", "är det så", 2 * (3 / 4) * 1 / (7 / 4)),
    ],
)
def test_token_f1(answer, reference, expected):
    assert evaluation.token_f1(answer, reference) == pytest.approx(expected)


def test_the_fall_is_weighted_by_tokens():
    before = HeldOut((10.0, 30.0), (5, 10))
    after = HeldOut((8.0, 20.0), (5, 10))
    fall = evaluation.paired_fall(before, after, ["a", "b"], seed=0)
    assert fall.value == pytest.approx(1 - 28 / 40)
    assert fall.value == pytest.approx(1 - after.loss / before.loss)
    assert fall.low == pytest.approx(0.2)
    assert fall.high == pytest.approx(1 / 3)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        old = random.gamma(20, 5, 60)
        new = old * (0.8 + 0.1 * random.standard_normal(60))
        counts = (1,) * 60
        groups = [str(i) for i in range(60)]
        fall = evaluation.paired_fall(
            HeldOut(tuple(old), counts), HeldOut(tuple(new), counts), groups, trial, 400
        )
        covered += fall.low <= 0.2 <= fall.high
    assert 0.88 <= covered / 200 <= 0.99


def test_no_change_gives_an_interval_around_zero():
    random = np.random.default_rng(4)
    old = random.gamma(20, 5, 60)
    new = old * (1.0 + 0.1 * random.standard_normal(60))
    groups = [str(i) for i in range(60)]
    counts = (1,) * 60
    part = HeldOut(tuple(old), counts), HeldOut(tuple(new), counts)
    fall = evaluation.paired_fall(*part, groups, seed=0)
    assert fall.low < 0 < fall.high


def test_translations_are_drawn_together():
    """Doubling every example adds no information, so the interval must not shrink."""
    random = np.random.default_rng(5)
    old = random.gamma(20, 5, 40)
    new = old * (0.8 + 0.2 * random.standard_normal(40))
    groups = [str(i) for i in range(40)]
    once = evaluation.paired_fall(
        HeldOut(tuple(old), (1,) * 40), HeldOut(tuple(new), (1,) * 40), groups, 0
    )
    twice = evaluation.paired_fall(
        HeldOut(tuple(old) * 2, (1,) * 80), HeldOut(tuple(new) * 2, (1,) * 80), groups * 2, 0
    )
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))


def test_a_gain_is_the_mean_difference():
    gain = evaluation.paired_gain([0.1, 0.2, 0.3], [0.3, 0.4, 0.5], ["a", "b", "c"], seed=0)
    assert gain.value == pytest.approx(0.2)
    assert gain.low == pytest.approx(0.2)
    assert gain.high == pytest.approx(0.2)


def test_greedy_answers_are_those_of_transformers(tiny_model, questions):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from feinwerk.cli import data

    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    examples = data.load_dataset(str(questions)).examples[:7]
    encoded = data.encode(tokenizer, examples, 256)
    ours = evaluation.generate_answers(
        model, tokenizer, encoded, new_tokens=12, on_batch=lambda _: None, batch_size=4
    )
    for item, text in zip(encoded, ours, strict=True):
        ids = torch.tensor([item.prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        theirs = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert text == theirs.strip()


def test_questions_for_generation_are_spread_and_distinct():
    assert evaluation.choose_for_generation([None] * 98, 24)[0] == 2
    for count in (1, 5, 24, 200):
        chosen = evaluation.choose_for_generation([None] * 98, count)
        assert len(set(chosen)) == min(count, 98)
        assert max(chosen) < 98
