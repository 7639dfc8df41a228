"""FeinwerkNF4Export: an Olive pass that turns a torch model into an ONNX model with NF4 weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler, ONNXModelHandler, PyTorchModelHandler
from olive.model.utils import resolve_onnx_path
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam
from olive.resource_path import LocalFile, LocalFolder

from feinwerk import _checks
from feinwerk.integrations.olive.bitsandbytes_layers import take_over
from feinwerk.nn import load_adapter, quantize_model
from feinwerk.nn.nf4_module import NF4Module
from feinwerk.onnx import AdapterRoom, export, export_causal_lm, write_genai_config

_OP = "FeinwerkNF4Export"


class FeinwerkNF4Export(Pass):  # type: ignore[misc]
    """Quantize the linear layers to NF4, then export; a model that holds NF4 is exported as it is.

    NF4 layers of bitsandbytes count: their codes and scales go into the file unchanged.

    A causal LM out of transformers is exported with its key/value cache, with its adapter if the
    handler names one, and with its config and tokenizer beside it. Any other torch model is
    exported with the handler's dummy inputs, and with the dynamic_shapes of its io_config.

    With `ops="feinwerk"` the file runs in every session by its standard-op bodies, and by the
    native kernels where `feinwerk.onnx.register(session_options)` was called. Olive's own sessions
    do not register the library.

    Source:
        Olive 0.13, olive.passes.Pass; QLoRA (arXiv 2305.14314), section 3.

    Example:
        See docs/guides/olive.md.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return {
            "ops": PassConfigParam(
                type_=str,
                default_value="feinwerk",
                description='"feinwerk", "contrib" or "portable": see feinwerk.onnx.export.',
            ),
            "blocksize": PassConfigParam(
                type_=int, default_value=64, description="Elements per absmax, 32 to 4096."
            ),
            "double_quant": PassConfigParam(
                type_=bool, default_value=True, description="Also quantize absmax, to 8 bits."
            ),
            "skip": PassConfigParam(
                type_=list[str],
                default_value=["lm_head"],
                description="Layers that stay dense, as feinwerk.quantize_model names them.",
            ),
            "embeddings": PassConfigParam(
                type_=bool, default_value=False, description="Also quantize embeddings."
            ),
            "adapter_targets": PassConfigParam(
                type_=list[str],
                default_value=[],
                description="Layers with room for adapters, as feinwerk.onnx.AdapterRoom has it.",
            ),
            "adapter_dora": PassConfigParam(
                type_=bool, default_value=False, description="That room is for DoRA as well."
            ),
            "genai_config": PassConfigParam(
                type_=bool,
                default_value=False,
                description="Write genai_config.json beside a causal LM, for onnxruntime-genai.",
            ),
        }

    @classmethod
    def validate_config(
        cls, config: type[BasePassConfig], accelerator_spec: AcceleratorSpec
    ) -> bool:
        """Say no to what `feinwerk` refuses, before a model is loaded."""
        options: Any = config
        if options.ops not in ("feinwerk", "contrib", "portable"):
            rule = 'be "feinwerk", "contrib" or "portable"'
            _checks.reject(ValueError, _OP, "ops", rule, repr(options.ops))
        _checks.blocksize(_OP, options.blocksize)
        return bool(super().validate_config(config, accelerator_spec))

    def _run_for_config(
        self, model: Any, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        if not isinstance(model, HfModelHandler | PyTorchModelHandler):
            rule = "be an HfModelHandler or a PyTorchModelHandler"
            _checks.reject(TypeError, _OP, "model", rule, type(model).__name__)
        options: Any = config
        path = Path(resolve_onnx_path(output_model_path))
        network = model.load_model(cache_model=False).eval()
        adapter = model.adapter_path if isinstance(model, HfModelHandler) else None
        if adapter:
            network = network.unload()  # PEFT's layers go, and come back over NF4
        take_over(network)
        if not any(isinstance(module, NF4Module) for module in network.modules()):
            quantize_model(
                network, blocksize=options.blocksize, double_quant=options.double_quant,
                skip=options.skip, embeddings=options.embeddings,
            )  # fmt: skip
        if adapter:
            load_adapter(network, adapter)
            network.eval()
        room = AdapterRoom(tuple(options.adapter_targets), dora=options.adapter_dora)
        adapters = room if options.adapter_targets else None
        files: list[str] = []
        if isinstance(model, HfModelHandler) and model.task.startswith("text-generation"):
            # Past transformers' float(), which refuses for every model that was loaded quantized.
            export_causal_lm(
                torch.nn.Module.float(network), path, ops=options.ops, adapters=adapters
            )
            files = model.save_metadata(str(path.parent))
            if options.genai_config:
                files.append(str(write_genai_config(path, network)))
                files += map(str, path.parent.glob("libfeinwerk_onnx.*"))
        else:
            io_config = model.io_config or {}
            arguments, keywords = _example_inputs(network, model.get_dummy_inputs())
            export(
                network, arguments, path, kwargs=keywords, ops=options.ops, adapters=adapters,
                dynamic_shapes=io_config.get("dynamic_shapes"),
                input_names=io_config.get("input_names"),
                output_names=io_config.get("output_names"),
            )  # fmt: skip
        attributes = {**(model.model_attributes or {}), "additional_files": sorted(files)}
        alone = not files and not path.with_name(f"{path.name}.data").exists()
        return ONNXModelHandler(
            model_path=LocalFile({"path": path}) if alone else LocalFolder({"path": path.parent}),
            onnx_file_name=None if alone else path.name,
            model_attributes=attributes,
        )


def _example_inputs(
    network: torch.nn.Module, inputs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Olive's dummy inputs as positional and keyword arguments.

    Olive names them after the graph's inputs; names that forward does not know are places.
    """
    if not isinstance(inputs, Mapping):
        return (tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)), {}
    known = inspect.signature(network.forward).parameters
    if all(name in known for name in inputs):
        return (), dict(inputs)
    return tuple(inputs.values()), {}
