"""Runs the listed cases from one on, in a process of its own: a crash is a case's, not pytest's.

    python case_run.py LIBRARY MODULE FIRST

Prints a line of JSON before a case and one after it, so that the last line names what crashed.
"""

from __future__ import annotations

import importlib
import json
import sys

import torch
from malformed_cases import Case
from onnx_rules import expected, offenders
from onnx_specs import Spec, run, same_bits


def outcome(case: Case, library: str) -> dict[str, str]:
    """Run one case; a Spec that works must give the bits of Python's operation."""
    try:
        if not isinstance(case.node, Spec):
            case.node(library)
            return {"outcome": "works"}
        y = run(case.node, library)
    except AssertionError as error:
        return {"outcome": "wrong", "text": str(error) or "an assertion"}
    except Exception as error:
        return {"outcome": "rejected", "text": str(error)}
    # What is wrong by the rules has no expected value.
    if not offenders(case.node) and not same_bits(y, expected(case.node)):
        return {"outcome": "wrong", "text": "other bits than Python's operation"}
    return {"outcome": "works"}


def main(library: str, module: str, first: str) -> None:
    torch.set_num_threads(1)
    for case in importlib.import_module(module).cases()[int(first) :]:
        print(json.dumps({"start": case.name}), flush=True)
        print(json.dumps({"name": case.name, **outcome(case, library)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
