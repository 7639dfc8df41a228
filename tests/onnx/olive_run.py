"""Runs Olive's engine in a process of its own: `python olive_run.py <names of run configs>`.

Olive takes many seconds to import and sets up logging and telemetry for its whole process, so the
tests share this one. The last line it prints is JSON of all that they ask about.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from olive.hardware import DEFAULT_CPU_ACCELERATOR
from olive.package_config import OlivePackageConfig
from olive.workflows import run

from feinwerk.integrations.olive import package_config
from feinwerk.integrations.olive.nf4_export import FeinwerkNF4Export


def merged() -> dict[str, Any]:
    """How our package config differs from Olive's."""
    ours = OlivePackageConfig.parse_file_or_obj(package_config())
    theirs = OlivePackageConfig.load_default_config()
    return {
        "more": sorted(ours.passes.keys() - theirs.passes.keys()),
        "changed": [name for name, value in theirs.passes.items() if ours.passes[name] != value],
        "same_extras": ours.extra_dependencies == theirs.extra_dependencies,
        "class": ours.import_pass_module("FeinwerkNF4Export").__name__,
    }


def refusal(options: dict[str, Any]) -> str:
    """The message with which the pass refuses its options."""
    cpu = DEFAULT_CPU_ACCELERATOR
    config = FeinwerkNF4Export.generate_config(cpu, options, disable_search=True)
    try:
        FeinwerkNF4Export.validate_config(config, cpu)
    except ValueError as error:
        return str(error)
    return ""


def model_of(workflow: str) -> str:
    """Run a workflow; return the path of the model that comes out."""
    output = run(workflow, package_config=package_config())
    return str(output.get_output_models()[0].model_path)


if __name__ == "__main__":
    found = {
        "merged": merged(),
        "refusals": [refusal(options) for options in ({"ops": "best"}, {"blocksize": 48}, {})],
        "models": {name: model_of(f"{name}.json") for name in sys.argv[1:]},
    }
    print(json.dumps(found))
