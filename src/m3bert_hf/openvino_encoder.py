"""ONNX files of sub-models on OpenVINO, behind the interface of [`OnnxEncoder`]."""

import threading
from pathlib import Path
from typing import Any, Literal

import torch

from .onnx_export import OnnxEncoder, require_file


Precision = Literal["float32", "bfloat16"]
_HINTS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVinoEncoder(OnnxEncoder):
    """Runs an ONNX file of [`export_onnx`] on OpenVINO's CPU device; the graph is compiled for any batch and length.

    Args:
        file: ONNX file, in float32 or int8.
        config: Configuration of the model.
        threads: Threads of a run; `None` leaves it to OpenVINO.
        precision: Of what is not int8. OpenVINO's own default is bfloat16 wherever the processor has it; here that is
            to be asked for.

    Raises:
        FileNotFoundError: If the file does not exist.
        ImportError: If openvino is not installed.
        ValueError: If the precision is none of these.
    """

    def _open(self, file: str | Path, threads: int | None, precision: str = "float32") -> None:
        try:
            import openvino
        except ImportError as error:
            raise ImportError("OpenVINO needs a package: pip install 'm3bert-hf[openvino]'.") from error
        if precision not in _HINTS:
            raise ValueError(f"precision={precision!r} must be one of {', '.join(_HINTS)}.")
        require_file(file)
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": _HINTS[precision]}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        compiled = openvino.Core().compile_model(str(file), "CPU", options)
        self.ports = {name: port for port in compiled.outputs for name in port.names}
        self.compiled, self.requests = compiled, threading.local()

    @property
    def width(self) -> int:
        return self.ports["sentence_embedding"].partial_shape[-1].get_length()

    def _run(self, output: str, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        # A request serves one caller at a time.
        if not hasattr(self.requests, "own"):
            self.requests.own = self.compiled.create_infer_request()
        found = self.requests.own.infer(inputs, share_inputs=True, share_outputs=True)
        # A copy of the one that is wanted: the request writes its next answer where this one lies.
        return torch.from_numpy(found[self.ports[output]].copy())


__all__ = ["OpenVinoEncoder"]
