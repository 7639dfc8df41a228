"""The quickstart's data: loaded from an installed package, grouped, split, encoded, batched.

```
   package or file -> Example (group, language, messages, answer)
                        |  split: whole groups, by a hash of the group's name
              training examples | held-out examples
                        |  encode: chat template; loss on the answer's tokens only
                   Encoded -> batches of similar length
```
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from feinwerk.cli.errors import CommandError, require


@dataclass(frozen=True)
class Example:
    """One conversation so far and the answer to learn; a group is never split."""

    group: str
    language: str
    messages: tuple[tuple[str, str], ...]  # (role, text), the last one the user's
    answer: str

    @property
    def question(self) -> str:
        """What the user said last."""
        return self.messages[-1][1]


@dataclass(frozen=True)
class Dataset:
    """Examples with what must be said about where they come from."""

    name: str
    examples: tuple[Example, ...]
    source: str
    licence: str
    attribution: str

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len({example.group for example in self.examples})


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example; the answer ends with the end-of-turn token."""

    example: Example
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    truncated: bool

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids, and where the next token is one to learn.

    Args:
        tokens: int64 [batch, length].
        predicts: bool [batch, length]; True where position t + 1 belongs to the answer.
        targets: int64 [predicts.sum()], the tokens at those t + 1, in row-major order.
        counts: answer tokens of each row.
    """

    tokens: torch.Tensor
    predicts: torch.Tensor
    targets: torch.Tensor
    counts: tuple[int, ...]


def load_dataset(name: str) -> Dataset:
    """Load a dataset by name, or a JSON-lines file by path.

    Args:
        name: construction-faq, construction-faq-en, chitchat, or the path of a .jsonl file with
            question, answer and optionally group and language in each line.

    Raises:
        CommandError: if there is no such dataset, its package is missing or a line is malformed.
    """
    if name == "construction-faq":
        return _construction_faq(name, ("en", "sv"))
    if name == "construction-faq-en":
        return _construction_faq(name, ("en",))
    if name == "chitchat":
        return _chitchat()
    if name.endswith(".jsonl"):
        return _json_lines(Path(name))
    raise CommandError(
        "quickstart: --dataset must be construction-faq, construction-faq-en, chitchat or the path "
        f"of a .jsonl file, got {name}"
    )


def _construction_faq(name: str, languages: Sequence[str]) -> Dataset:
    require("zaragoza_construction_faq", command="feinwerk quickstart")
    import zaragoza_construction_faq as package

    entries = {language: package.load(lang=language) for language in ("en", "sv")}
    # The same question is asked in two categories at times: those entries are one group.
    joined = _Groups()
    for language, items in entries.items():
        for item in items:
            joined.add(item["id"], f"{language} q {_normalized(item['q'])}")
            joined.add(item["id"], f"{language} a {_normalized(item['a'])}")
    examples = [
        Example(joined.name(item["id"]), language, (("user", item["q"]),), item["a"])
        for language in languages
        for item in entries[language]
    ]
    meta = package.meta(lang="en")
    return Dataset(
        name=name,
        examples=tuple(examples),
        source=f"zaragoza-construction-faq {package.__version__} on PyPI, {meta['repository']}",
        licence="CC BY 4.0, https://creativecommons.org/licenses/by/4.0/",
        attribution=f"{meta['attribution_required']} Used unchanged; DOI {package.__doi__}.",
    )


def _chitchat(conversations: int = 1500, replies: Sequence[int] = (1, 3)) -> Dataset:
    require("chitchat_dataset", command="feinwerk quickstart")
    import chitchat_dataset as package

    chosen = sorted(package.Dataset().items(), key=lambda item: _rank(item[0]))
    examples: list[Example] = []
    for key, conversation in chosen[:conversations]:
        turns = [" ".join(m["text"].strip() for m in turn) for turn in conversation["messages"]]
        for reply in replies:
            if reply < len(turns) and all(turns[: reply + 1]):
                roles = ("user", "assistant")
                opened = [f"{conversation.get('prompt', '')} {turns[0]}".strip(), *turns[1:]]
                said = tuple((roles[i % 2], opened[i]) for i in range(reply))
                examples.append(Example(key, "en", said, turns[reply]))
    return Dataset(
        name="chitchat",
        examples=tuple(examples),
        source="chitchat-dataset on PyPI, https://github.com/BYU-PCCL/chitchat-dataset",
        licence="MIT",
        attribution="BYU PCCL Chitchat Dataset by BYU Perception, Control and Cognition Lab.",
    )


def _json_lines(path: Path) -> Dataset:
    examples: list[Example] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CommandError(f"quickstart: --dataset must be a readable file: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            question, answer = str(item["question"]), str(item["answer"])
        except (ValueError, KeyError, TypeError) as error:
            raise CommandError(
                f"quickstart: --dataset must hold question and answer in each line, "
                f"line {number} of {path} does not"
            ) from error
        group = str(item.get("group", _normalized(question)))
        language = str(item.get("language", ""))
        examples.append(Example(group, language, (("user", question),), answer))
    return Dataset(path.name, tuple(examples), str(path), "as stated by its owner", "")


class _Groups:
    """Union of ids that share a text."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}
        self._owner: dict[str, str] = {}

    def name(self, key: str) -> str:
        """Return the group's name: its smallest id."""
        while self._parent.setdefault(key, key) != key:
            key = self._parent[key]
        return key

    def add(self, key: str, text: str) -> None:
        """Put `key` into the group of every id that has `text`."""
        first, second = sorted((self.name(key), self.name(self._owner.setdefault(text, key))))
        self._parent[second] = first


def _normalized(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _rank(group: str) -> str:
    return hashlib.sha256(f"feinwerk split 1 {group}".encode()).hexdigest()


def split(examples: Iterable[Example], held_out: int) -> tuple[list[Example], list[Example]]:
    """Split by whole groups: no question of the held-out part is trained on in any language.

    The `held_out` groups of the smallest hash are held out: the split is the same for every seed
    and does not depend on the order of the data.

    Args:
        examples: all examples.
        held_out: number of groups to hold out.

    Returns:
        (training examples, held-out examples), each in the given order.

    Raises:
        CommandError: if fewer than `held_out` + 1 groups are there.
    """
    items = list(examples)
    ordered = sorted({example.group for example in items}, key=_rank)
    if len(ordered) <= held_out:
        raise CommandError(
            f"quickstart: --held-out must be below the dataset's {len(ordered)} groups, "
            f"got {held_out}"
        )
    chosen = set(ordered[:held_out])
    train = [example for example in items if example.group not in chosen]
    return train, [example for example in items if example.group in chosen]


def encode(tokenizer: Any, examples: Iterable[Example], max_length: int) -> list[Encoded]:
    """Put examples through the chat template and cut them to `max_length` tokens.

    An answer that does not fit is cut and has no end-of-turn token; an example whose prompt leaves
    no room for 8 answer tokens is dropped.
    """
    encoded: list[Encoded] = []
    for example in examples:
        messages = [{"role": role, "content": text} for role, text in example.messages]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        answer = tuple(tokenizer(example.answer, add_special_tokens=False)["input_ids"])
        answer = (*answer, tokenizer.eos_token_id)
        room = max_length - len(prompt)
        if room >= min(8, len(answer)):
            encoded.append(Encoded(example, prompt, answer[:room], len(answer) > room))
    return encoded


def fingerprint(*parts: Sequence[Encoded]) -> str:
    """Return a hash of all token ids: a resumed run must see the same data."""
    digest = hashlib.sha256()
    for part in parts:
        for item in part:
            digest.update(repr((item.example.group, item.prompt, item.answer)).encode())
        digest.update(b"|")
    return digest.hexdigest()


def collate(items: Sequence[Encoded], pad: int) -> Batch:
    """Pad to the longest on the right: under causal attention no real token sees the padding."""
    width = max(item.length for item in items)
    tokens = torch.full((len(items), width), pad, dtype=torch.int64)
    predicts = torch.zeros(len(items), width, dtype=torch.bool)
    for row, item in enumerate(items):
        tokens[row, : item.length] = torch.tensor(item.prompt + item.answer)
        predicts[row, len(item.prompt) - 1 : item.length - 1] = True
    targets = tokens[:, 1:][predicts[:, :-1]]
    return Batch(tokens, predicts, targets, tuple(len(item.answer) for item in items))


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """Return one epoch's batches of example indices; a pure function of its arguments.

    Shuffled, then sorted by length within windows of 16 batches, then the batches are shuffled:
    random enough to train on, and little padding.
    """
    draw = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    draw.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), 16 * batch_size):
        window = sorted(order[start : start + 16 * batch_size], key=lambda i: lengths[i])
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    draw.shuffle(batches)
    return batches


def length_sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return all indices once, in batches of similar length, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
