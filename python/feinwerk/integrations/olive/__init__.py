"""Olive runs Feinwerk: a package config with one more pass, FeinwerkNF4Export.

Olive knows passes by a package config. `package_config()` is Olive's own with ours added; nothing
of Olive's installation is changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PASS = "FeinwerkNF4Export"


def package_config() -> dict[str, Any]:
    """Return Olive's own package config with the pass FeinwerkNF4Export added.

    Returns:
        What `olive.workflows.run(config, package_config=...)` takes.

    Raises:
        ImportError: if Olive is not installed.

    Source:
        Olive 0.13, olive_config.json.

    Example:
        >>> "FeinwerkNF4Export" in package_config()["passes"]
        True
    """
    from olive.package_config import OlivePackageConfig

    own = Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(own)
    config["passes"][PASS] = {
        "module_path": f"feinwerk.integrations.olive.nf4_export.{PASS}",
        "supported_providers": ["CPUExecutionProvider"],
        "supported_accelerators": ["cpu"],
        "supported_precisions": ["nf4"],
        "supported_algorithms": ["rtn"],
        "supported_quantization_encodings": [],
    }
    return config


def write_package_config(path: str | Path) -> Path:
    """Write `package_config()` as JSON, for `olive run --package-config`.

    Args:
        path: the file.

    Returns:
        The path.

    Raises:
        ImportError: if Olive is not installed.

    Source:
        Olive 0.13, `olive run`.

    Example:
        See docs/guides/olive.md.
    """
    path = Path(path)
    path.write_text(json.dumps(package_config(), indent=2) + "\n", encoding="utf-8")
    return path
