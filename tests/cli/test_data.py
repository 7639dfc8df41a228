"""The quickstart's data: the split never leaks, batches are reproducible, only answers count."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feinwerk.cli import data
from feinwerk.cli.answer_loss import answer_nll
from feinwerk.cli.errors import CommandError


@pytest.fixture(scope="module")
def faq():
    pytest.importorskip("zaragoza_construction_faq")
    return data.load_dataset("construction-faq")


@pytest.fixture
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def words(text):
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def test_no_held_out_question_or_answer_is_trained_on_in_either_language(faq):
    import zaragoza_construction_faq as package

    train, held_out = data.split(faq.examples, 48)
    assert len({e.group for e in held_out}) == 48
    assert not {e.group for e in train} & {e.group for e in held_out}
    assert not {words(e.question) for e in train} & {words(e.question) for e in held_out}
    assert not {words(e.answer) for e in train} & {words(e.answer) for e in held_out}
    # Through the ids of the package itself: an entry's translation is on the entry's side.
    side = {words(e.question): "train" for e in train}
    side |= {words(e.question): "held out" for e in held_out}
    swedish = {item["id"]: item["q"] for item in package.load(lang="sv")}
    for item in package.load(lang="en"):
        assert side[words(item["q"])] == side[words(swedish[item["id"]])]


def test_the_split_of_one_language_is_that_of_both(faq):
    english = data.load_dataset("construction-faq-en")
    held_out = {e.group for e in data.split(faq.examples, 48)[1]}
    assert {e.group for e in data.split(english.examples, 48)[1]} == held_out


def test_attribution_and_licence_are_known(faq):
    assert "CC BY 4.0" in faq.licence
    assert "Zaragoza AB" in faq.attribution


def test_chitchat_never_splits_a_conversation():
    pytest.importorskip("chitchat_dataset")
    dataset = data.load_dataset("chitchat")
    train, held_out = data.split(dataset.examples, 48)
    assert len(train) > 500
    assert not {e.group for e in train} & {e.group for e in held_out}
    assert all(e.messages[-1][0] == "user" for e in dataset.examples)


@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.randoms())
def test_the_split_is_by_group_and_ignores_order(groups, random):
    examples = [data.Example(str(g), "en", (("user", f"q{i}"),), "a") for i, g in enumerate(groups)]
    count = len(set(groups)) // 2
    if count == 0:
        return
    train, held_out = data.split(examples, count)
    assert len({e.group for e in held_out}) == count
    assert not {e.group for e in train} & {e.group for e in held_out}
    assert len(train) + len(held_out) == len(examples)
    shuffled = list(examples)
    random.shuffle(shuffled)
    assert {e.group for e in data.split(shuffled, count)[1]} == {e.group for e in held_out}


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=120), st.integers(1, 9), st.integers(0, 3)
)
def test_an_epoch_visits_every_example_once(lengths, size, epoch):
    batches = data.epoch_batches(lengths, size, seed=5, epoch=epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size)
    assert batches == data.epoch_batches(lengths, size, seed=5, epoch=epoch)


def test_padding_is_little_and_epochs_differ(faq):
    lengths = [len(e.question) + len(e.answer) for e in faq.examples]
    batches = data.epoch_batches(lengths, 8, seed=0, epoch=0)
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert sum(lengths) / padded > 0.93
    assert batches != data.epoch_batches(lengths, 8, seed=0, epoch=1)
    assert batches != data.epoch_batches(lengths, 8, seed=1, epoch=0)


def test_only_answer_tokens_count_and_padding_changes_nothing(tiny_model, tokenizer, questions):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager").eval()
    examples = data.load_dataset(str(questions)).examples[:6]
    encoded = data.encode(tokenizer, examples, 256)
    with torch.no_grad():
        together = answer_nll(model, data.collate(encoded, pad=0))
        rows = []
        for item in encoded:
            ids = torch.tensor([item.prompt + item.answer])
            logp = model(ids).logits[0].log_softmax(-1)
            start = len(item.prompt)
            rows.append(-logp[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0])
    assert torch.allclose(together, torch.cat(rows), atol=2e-5)
    assert all(item.answer[-1] == tokenizer.eos_token_id for item in encoded)
    assert tokenizer.decode(encoded[0].answer) == examples[0].answer + tokenizer.eos_token


def test_long_answers_are_cut_and_hopeless_prompts_dropped(tokenizer):
    long = data.Example("1", "en", (("user", "why"),), "because " * 50)
    hopeless = data.Example("2", "en", (("user", "why " * 100),), "so")
    encoded = data.encode(tokenizer, [long, hopeless], 100)
    assert [item.example for item in encoded] == [long]
    assert encoded[0].truncated
    assert encoded[0].length == 100
    assert encoded[0].answer[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("line", "words"),
    [("{}", "line 1"), ("nonsense", "line 1"), (json.dumps({"question": "q"}), "line 1")],
)
def test_a_malformed_line_is_named(tmp_path, line, words):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(CommandError, match=words):
        data.load_dataset(str(path))


@pytest.mark.parametrize("name", ["no-such-set", "missing.jsonl"])
def test_an_unknown_dataset_is_named(name):
    with pytest.raises(CommandError, match="--dataset must"):
        data.load_dataset(name)


def test_too_few_groups_is_an_error():
    example = data.Example("1", "en", (("user", "q"),), "a")
    with pytest.raises(CommandError, match="--held-out must be below"):
        data.split([example], 1)
