"""Facts that must be the same on all ranks: compared by a hash, and by themselves if that differs.

A fact is a name and a value, both text. Ranks that agree send 16 bytes; those that do not send all
their facts, so that the error can name the first one that differs and who holds which value.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from feinwerk.optim.collectives import Collectives
from feinwerk.optim.errors import Disagreement

Facts = Sequence[tuple[str, str]]


def facts_fingerprint(facts: Facts) -> int:
    """A hash of 62 bits, so that it and its negative fit int64."""
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def same_everywhere(highest: int, highest_negative: int) -> bool:
    """Whether a number was the same on all ranks, by the maxima of it and of its negative."""
    return highest == -highest_negative


def agree(collectives: Collectives, op: str, facts: Facts, phase: str) -> None:
    """Make sure that the facts are the same on all ranks; collective.

    Args:
        collectives: of the ranks.
        op: for messages.
        facts: in the order in which a difference is looked for.
        phase: for messages of dead peers.

    Raises:
        Disagreement: on all ranks alike, naming the first fact that differs.
    """
    mine = facts_fingerprint(facts)
    both = collectives.all_reduce(torch.tensor([mine, -mine]), dist.ReduceOp.MAX, phase)
    if not same_everywhere(*both.tolist()):
        compare(collectives, op, lambda: facts, phase)


def compare(collectives: Collectives, op: str, facts: Callable[[], Facts], phase: str) -> None:
    """Exchange all facts and raise where the first one differs; collective.

    Raises:
        Disagreement: on all ranks alike.
    """
    everyone = [json.loads(text) for text in collectives.exchange(json.dumps(facts()), phase)]
    for position in range(max(map(len, everyone))):
        entries = [
            tuple(facts[position]) if position < len(facts) else ("nothing more", "nothing more")
            for facts in everyone
        ]
        if len(set(entries)) == 1:
            continue
        names = list(dict.fromkeys(name for name, _ in entries))
        held: dict[str, list[int]] = {}
        for rank, (name, value) in zip(collectives.ranks, entries, strict=True):
            held.setdefault(value if len(names) == 1 else f"{name} {value}", []).append(rank)
        raise Disagreement(op, names[0], held)
    raise Disagreement(op, "fingerprint", {"another hash of equal facts": collectives.ranks})
