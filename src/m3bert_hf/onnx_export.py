"""ONNX files of sub-models, in float32 or int8, and their use through onnxruntime alone or as a SentenceTransformer.

One file for each exit: a graph that holds them all would carry, and run, the layers of the deepest one. The graph ends
in the text's vector, pooled, cut to its dimension and normalised as the checkpoint's modules say, so that a server
needs a tokenizer and onnxruntime and nothing else.
"""

import copy
import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from .sentence_transformer import M3BertSentenceTransformer, build_sentence_transformer


logger = logging.getLogger(__name__)

Target = Literal["avx512_vnni", "avx2", "arm64"]
_OUTPUTS = ["sentence_embedding", "last_hidden_state"]


class _Pipeline(nn.Module):
    """The modules of a SentenceTransformer from token ids to the vector, as one graph."""

    def __init__(self, model: M3BertSentenceTransformer, width: int | None):
        super().__init__()
        self.encoder: Any = model.transformers_model
        self.rest = nn.ModuleList(list(model.children())[1:])
        self.width = width

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        features: dict[str, Any] = {"token_embeddings": states, "attention_mask": attention_mask}
        for module in self.rest:
            features = module(features)
        vectors = features["sentence_embedding"]
        return vectors if self.width is None else vectors[:, : self.width], states


def _requirements() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise ImportError("ONNX needs these packages: pip install 'm3bert-hf[onnx]'.") from error
    return onnxruntime


def export_onnx(
    model: str | Path | M3BertSentenceTransformer,
    output_dir: str | Path | None = None,
    exit_layer: int | None = None,
    truncate_dim: int | None = None,
    int8: bool = False,
    target: Target = "avx512_vnni",
) -> Path:
    """Write `onnx/model.onnx`, or `onnx/model_int8.onnx`, for one exit, which is in the name if it is not the deepest.

    The graph takes `input_ids` and `attention_mask` [batch, tokens], int64, of any size, and gives
    `sentence_embedding` [batch, width] and `last_hidden_state` [batch, tokens, hidden_size]. A run that asks for the
    first alone copies nothing else.

    Args:
        model: Directory of a checkpoint, or a loaded model.
        output_dir: Where the folder `onnx` is made; `None` means the directory of the model.
        exit_layer: Exit of the graph; `None` means the model's default.
        truncate_dim: Width of the vectors; `None` means that of the checkpoint.
        int8: Quantise weights, embeddings among them, to int8, and activations as they come (dynamic quantisation).
        target: Processor of int8: `avx2` has no instruction that adds products of 8 bits without overflow, so weights
            get 7 bits there.

    Returns:
        The file.

    Raises:
        ImportError: If onnx, onnxruntime or onnxscript is not installed.
        ValueError: If the exit or dimension does not exist, or the graph does not give the model's vectors.
    """
    runtime = _requirements()
    if target not in ("avx512_vnni", "avx2", "arm64"):
        raise ValueError(f"target={target!r} does not exist: choose 'avx512_vnni', 'avx2' or 'arm64'.")
    if isinstance(model, (str, Path)):
        directory = Path(model) if output_dir is None else Path(output_dir)
        loaded = build_sentence_transformer(str(model), exit_layer=exit_layer, device="cpu")
    else:
        if output_dir is None:
            raise ValueError("Name an output_dir: a loaded model has no directory.")
        # A copy: exporting moves it to the CPU, to float32 and to evaluation.
        directory, loaded = Path(output_dir), copy.deepcopy(model).to("cpu")
    exit_layer = loaded.exit_layer if exit_layer is None else exit_layer
    config = loaded.transformers_model.config
    width = loaded.truncate_dim if truncate_dim is None else truncate_dim
    loaded._check_truncate_dim(width)
    deepest = exit_layer == config.checkpoint_layers
    name = "model" + ("" if deepest else f"_exit{exit_layer}") + ("_int8" if int8 else "") + ".onnx"
    file = directory / "onnx" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    plain = file if not int8 else file.with_suffix(".float32")
    with loaded.early_exit(exit_layer):
        loaded.eval().float()
        _write_graph(_Pipeline(loaded, width), plain, config)
        _verify(loaded, width, plain, runtime)
    if int8:
        _quantize(plain, file, target)
        plain.unlink()
        plain.with_name(plain.name + ".data").unlink(missing_ok=True)
    return file


def _write_graph(pipeline: nn.Module, file: Path, config: Any) -> None:
    # Two texts of different length, so that no axis is taken for a constant.
    ids = torch.full((2, 9), config.bos_token_id or 0)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", min=2, max=config.max_input_length)
    with torch.no_grad():
        torch.onnx.export(
            pipeline,
            (ids, mask),
            str(file),
            input_names=["input_ids", "attention_mask"],
            output_names=_OUTPUTS,
            dynamic_shapes={"input_ids": {0: batch, 1: tokens}, "attention_mask": {0: batch, 1: tokens}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _verify(model: M3BertSentenceTransformer, width: int | None, file: Path, runtime: Any) -> None:
    texts = ["a short text", "ein etwas längerer Text, der aufgefüllt wird, damit die Maske zählt", "x"]
    features = model.tokenizer(
        texts, padding=True, truncation=True, max_length=model.max_seq_length, return_tensors="np"
    )
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    inputs = {name: features[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    got = session.run(_OUTPUTS[:1], inputs)[0]
    wanted = model.encode(texts, prompt="", truncate_dim=width)
    difference = float(np.abs(got - wanted).max() / np.abs(wanted).max())
    if not difference <= 1e-4:
        file.unlink()
        raise ValueError(
            f"The ONNX graph differs from the model by {difference:.2g} of its largest value: not written."
        )


def _quantize(source: Path, file: Path, target: Target) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = source.with_suffix(".prepared")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    try:
        quantize_dynamic(
            str(prepared),
            str(file),
            weight_type=QuantType.QUInt8 if target == "arm64" else QuantType.QInt8,
            per_channel=target != "arm64",
            reduce_range=target == "avx2",
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        )
    finally:
        prepared.unlink()


def require_file(file: str | Path) -> None:
    """Raise a `FileNotFoundError` that says how to write the file, if it does not exist."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist: write it with export_onnx or `m3bert_hf export --onnx`.")


class OnnxEncoder(nn.Module):
    """Stands in for the encoder within a SentenceTransformer and runs an ONNX file of [`export_onnx`].

    Args:
        file: ONNX file.
        config: Configuration of the model.
        threads: Threads of a run; `None` leaves it to onnxruntime.
    """

    def __init__(self, file: str | Path, config: Any, threads: int | None = None, **options: Any):
        super().__init__()
        self._open(file, threads, **options)
        self.config = config
        self.dtype = torch.float32
        self.device = torch.device("cpu")

    def _open(self, file: str | Path, threads: int | None) -> None:
        runtime = _requirements()
        require_file(file)
        options = runtime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        self.session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    @property
    def width(self) -> int:
        """Width of the vectors."""
        return {output.name: output.shape[-1] for output in self.session.get_outputs()}["sentence_embedding"]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs) -> Any:
        """Return `last_hidden_state` [batch, tokens, hidden_size]."""
        return BaseModelOutput(last_hidden_state=self._run("last_hidden_state", input_ids, attention_mask))

    def embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the texts' vectors [batch, width]."""
        return self._run("sentence_embedding", input_ids, attention_mask)

    def _run(self, output: str, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return torch.from_numpy(self.session.run([output], inputs)[0])


class _OnnxModule(nn.Module):
    """First and only module of [`load_onnx`]: tokenizes as the checkpoint does and runs the whole graph."""

    def __init__(self, transformer: Any, encoder: OnnxEncoder, width: int):
        super().__init__()
        # In a tuple: the checkpoint's module lends its tokenizer and settings, its weights are gone.
        self._transformer = (transformer,)
        self.encoder = encoder
        self.width = width
        self.modalities = ["text"]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_transformer"][0], name)

    @property
    def max_seq_length(self) -> int | None:
        return self._transformer[0].max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        # On the module that tokenizes, not on this one.
        self._transformer[0].max_seq_length = value

    def get_embedding_dimension(self) -> int:
        return self.width

    def forward(self, features: dict[str, Any], **kwargs) -> dict[str, Any]:
        return {
            **features,
            "sentence_embedding": self.encoder.embed(features["input_ids"], features["attention_mask"]),
        }


def load_onnx(
    model: str | Path,
    file_name: str = "onnx/model.onnx",
    threads: int | None = None,
    runtime: Literal["onnxruntime", "openvino"] = "onnxruntime",
    precision: str | None = None,
    **kwargs,
) -> SentenceTransformer:
    """Load an ONNX file of [`export_onnx`] as a `SentenceTransformer` that runs on onnxruntime or OpenVINO.

    sentence-transformers' own `backend="onnx"` needs the optimum-onnx package, whose releases up to 0.1.0 require
    transformers below 4.58; this loader needs the runtime alone.

    Args:
        model: Directory of the checkpoint.
        file_name: File within it.
        threads: Threads of a run; `None` leaves it to the runtime.
        runtime: `docs/deployment.md` has what each measured.
        precision: Of OpenVINO, see [`OpenVinoEncoder`]; onnxruntime computes in what the file holds.
        **kwargs: What `SentenceTransformer` takes, but for what is fixed in the file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If `exit_layer`, `pooling_mode` or `device` is asked for: they are fixed in the file. If the
            runtime is neither, or cannot choose its precision.
        ImportError: If the runtime is not installed.
    """
    file = Path(model) / file_name
    require_file(file)
    if runtime not in ("onnxruntime", "openvino"):
        raise ValueError(f"runtime={runtime!r} must be onnxruntime or openvino.")
    if precision is not None and runtime != "openvino":
        raise ValueError(f"precision={precision!r} is OpenVINO's: onnxruntime computes in what the file holds.")
    fixed = sorted({"exit_layer", "pooling_mode", "device", "backend"} & set(kwargs))
    if fixed:
        raise ValueError(f"{', '.join(fixed)} cannot be chosen here: an ONNX file has its own. Export another one.")
    loaded = build_sentence_transformer(str(model), device="cpu", **kwargs)
    transformer: Any = loaded[0]
    config = loaded.transformers_model.config
    if runtime == "openvino":
        from .openvino_encoder import OpenVinoEncoder

        encoder: OnnxEncoder = OpenVinoEncoder(file, config, threads, precision=precision or "float32")
    else:
        encoder = OnnxEncoder(file, config, threads)
    # The graph holds the weights: those of the checkpoint are let go.
    transformer.model = encoder
    return SentenceTransformer(
        modules=[_OnnxModule(transformer, encoder, encoder.width)],
        prompts={name: prompt for name, prompt in loaded.prompts.items() if prompt is not None},
        default_prompt_name=loaded.default_prompt_name,
        similarity_fn_name=loaded.similarity_fn_name,
        truncate_dim=loaded.truncate_dim,
        device="cpu",
    )


__all__ = ["OnnxEncoder", "export_onnx", "load_onnx"]
