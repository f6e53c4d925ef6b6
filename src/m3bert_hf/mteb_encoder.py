"""m3BERT in MTEB: every (exit, dimension) as an encoder of its own, with its own name in the results."""

from typing import Any

from .granularity_evaluator import model_size
from .sentence_transformer import M3BertSentenceTransformer, build_sentence_transformer


def mteb_encoder(
    model: M3BertSentenceTransformer | str, exit_layer: int | None = None, truncate_dim: int | None = None
) -> Any:
    """Make what `mteb.evaluate` takes, for one granularity.

        for exit_layer in model.exit_layers:
            mteb.evaluate(mteb_encoder(model, exit_layer, 64), tasks=tasks)

    All encoders of a model share its weights. Results are filed under the model's name with the exit and the dimension
    as the experiment, so that granularities do not overwrite one another.

    Args:
        model: A model, or the directory or Hub name of one.
        exit_layer: Exit to encode at; `None` means the model's default.
        truncate_dim: Width of the vectors; `None` means the model's default.

    Returns:
        An encoder of mteb with `mteb_model_meta`.

    Raises:
        ImportError: If mteb is not installed.
        ValueError: If the exit or the dimension does not exist.
    """
    try:
        from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
    except ImportError as error:
        raise ImportError("This needs mteb: pip install mteb.") from error

    core = build_sentence_transformer(model) if isinstance(model, str) else model
    config = core.transformers_model.config
    depth = config.resolve_exit_layer(core.exit_layer if exit_layer is None else exit_layer)
    width = config.resolve_truncate_dim(core.truncate_dim if truncate_dim is None else truncate_dim)

    class GranularityEncoder(SentenceTransformerEncoderWrapper):
        """mteb's wrapper, encoding at one exit and width."""

        def encode(self, inputs, **kwargs):
            granularity: Any = {"exit_layer": depth, "truncate_dim": width}
            return super().encode(inputs, **granularity, **kwargs)

    encoder = GranularityEncoder(core)
    parameters, size = model_size(core, depth)
    meta = encoder.mteb_model_meta
    name = meta.name or (model if isinstance(model, str) else config.name_or_path) or "m3bert"
    encoder.mteb_model_meta = meta.model_copy(
        update={
            "loader": lambda *_, **__: encoder,
            # mteb files results under organisation/name.
            "name": "/".join(["local", *str(name).strip("/").split("/")][-2:]),
            "revision": meta.revision or "no_revision_available",
            "embed_dim": width,
            "n_parameters": parameters,
            "memory_usage_mb": size / 2**20,
            "experiment_kwargs": {"exit_layer": depth, "truncate_dim": width},
        }
    )
    return encoder


__all__ = ["mteb_encoder"]
