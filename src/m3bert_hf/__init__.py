"""m3BERT for Hugging Face: one encoder, every (exit layer, dimension) a model by itself."""

import importlib

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_m3bert import M3BertConfig
from .conversion import convert_released_checkpoint
from .export import export_submodel
from .granularity_evaluator import GranularityEvaluator
from .grid_report import GridReport
from .loss_m3bert import MLMLossOptions
from .modeling_m3bert import (
    M3BertForMaskedLM,
    M3BertForMultipleChoice,
    M3BertForQuestionAnswering,
    M3BertForSequenceClassification,
    M3BertForTokenClassification,
    M3BertModel,
    M3BertPreTrainedModel,
)
from .multigranular_loss import MultigranularLoss
from .sentence_transformer import (
    M3BertSentenceTransformer,
    M3BertTransformer,
    build_sentence_transformer,
    early_exit,
)
from .vocabulary_trimming import trim_vocabulary


__version__ = "0.1.0"

AutoConfig.register("m3bert", M3BertConfig)
AutoModel.register(M3BertConfig, M3BertModel)
AutoModelForMaskedLM.register(M3BertConfig, M3BertForMaskedLM)
AutoModelForSequenceClassification.register(M3BertConfig, M3BertForSequenceClassification)
AutoModelForTokenClassification.register(M3BertConfig, M3BertForTokenClassification)
AutoModelForQuestionAnswering.register(M3BertConfig, M3BertForQuestionAnswering)
AutoModelForMultipleChoice.register(M3BertConfig, M3BertForMultipleChoice)

# Training needs packages that the encoder does not: they are imported when one of these is asked for.
_TRAINING = {
    "M3BertDataCollator": "masking",
    "M3BertTrainer": "trainer",
    "M3BertTrainingArguments": "trainer",
}


def __getattr__(name: str):
    if name not in _TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{_TRAINING[name]}", __name__), name)
    except ImportError as error:
        raise ImportError(
            f"{name} needs the packages for training: pip install 'm3bert-hf[train]' ({error})."
        ) from error


__all__ = [
    "GranularityEvaluator",
    "GridReport",
    "M3BertConfig",
    "M3BertDataCollator",
    "M3BertForMaskedLM",
    "M3BertForMultipleChoice",
    "M3BertForQuestionAnswering",
    "M3BertForSequenceClassification",
    "M3BertForTokenClassification",
    "M3BertModel",
    "M3BertPreTrainedModel",
    "M3BertSentenceTransformer",
    "M3BertTrainer",
    "M3BertTrainingArguments",
    "M3BertTransformer",
    "MLMLossOptions",
    "MultigranularLoss",
    "build_sentence_transformer",
    "convert_released_checkpoint",
    "early_exit",
    "export_submodel",
    "trim_vocabulary",
]
