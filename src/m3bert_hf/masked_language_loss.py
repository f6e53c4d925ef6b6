"""Masked language modelling beside contrastive fine-tuning, so that a model for search can still fill in words."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from .loss_m3bert import IGNORE_INDEX, MLMLossOptions
from .masking import M3BertDataCollator
from .modeling_m3bert import M3BertForMaskedLM
from .sentence_transformer import M3BertSentenceTransformer


HEAD_FILE = "masked_language_head.safetensors"


class MaskedLanguageLoss(nn.Module):
    """The multigranular pretraining loss of a `SentenceTransformer`'s encoder on texts that are masked here.

    Contrastive training alone leaves the masked-language head behind: the states, and with tied weights the decoder,
    move away from under it. sentence-transformers draws whole batches from one of several datasets, each with a loss
    of its own; one dataset of texts with this loss keeps the head in step.

    Args:
        model: Whose encoder is shared.
        masked_lm: Where the head comes from; its encoder is replaced by the model's.
        mask_ratio: Share of the tokens to predict.
        options: Of the loss; by default, each token is scored at two granularities drawn at random.
        weight: Of this loss against the contrastive one, whose batches share the optimizer: both are sums over all
            granularities, but the terms of this one are an order of magnitude above InfoNCE's.
        untie: Give the model a decoder of its own, which begins as `masked_lm`'s. Contrastive training moves the
            embeddings far from what a tied decoder can read; the checkpoint grows by another matrix of their size.
        autocast_dtype: Of autocast; `None` computes in the weights' type. The Trainer's own mixed precision is part of
            the model that it trains, whose encoder is called directly here.

    Raises:
        ValueError: If the head does not fit the model, or the weight is not above 0.
    """

    def __init__(
        self,
        model: M3BertSentenceTransformer,
        masked_lm: M3BertForMaskedLM,
        mask_ratio: float = 0.2,
        options: MLMLossOptions | None = None,
        autocast_dtype: torch.dtype | None = None,
        weight: float = 1.0,
        untie: bool = False,
    ):
        super().__init__()
        encoder: Any = model.transformers_model
        if not weight > 0:
            raise ValueError(f"weight={weight} must be above 0.")
        for name in ("hidden_size", "vocab_size", "tie_word_embeddings"):
            ours, theirs = getattr(encoder.config, name), getattr(masked_lm.config, name)
            if ours != theirs and not (untie and name == "tie_word_embeddings"):
                remedy = "Untie it." if name == "tie_word_embeddings" else "Take the head that the model had."
                raise ValueError(f"The masked-language head has {name}={theirs}, the model {ours}. {remedy}")
        if untie:
            masked_lm.decoder.weight = nn.Parameter(masked_lm.decoder.weight.detach().clone())
            masked_lm.config.tie_word_embeddings = encoder.config.tie_word_embeddings = False
        self.model = model
        self.weight = weight
        masked_lm.model = encoder
        masked_lm.config = encoder.config
        masked_lm.tie_weights()
        masked_lm.loss_options = options or MLMLossOptions(
            stochastic_granularities=min(
                2, len(encoder.config.exit_layers) * len(encoder.config.matryoshka_dimensions)
            )
        )
        self.masked_lm = masked_lm
        self.autocast_dtype = autocast_dtype
        self.mask = M3BertDataCollator(model.tokenizer, mask_ratio).mask

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Mask each column's texts and return the weighted sum of their losses (a scalar).

        Args:
            sentence_features: Preprocessed texts of each column.
            labels: Not read.
        """
        total: Any = 0.0
        # The Trainer puts the model into training mode, not its losses; without it no granularity is drawn.
        self.masked_lm.train(self.model.training)
        for features in sentence_features:
            ids = features["input_ids"]
            masked, targets = ids.cpu().numpy().copy(), ids.cpu().numpy().copy()
            targets.fill(IGNORE_INDEX)
            for row, length in enumerate(features["attention_mask"].sum(dim=1).tolist()):
                # Drawn from torch's generator, whose state checkpoints keep.
                masked[row, :length], targets[row, :length] = self.mask(masked[row, :length], None)
            with torch.autocast(ids.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                output = self.masked_lm(
                    input_ids=torch.from_numpy(masked).to(ids.device),
                    attention_mask=features["attention_mask"],
                    labels=torch.from_numpy(targets).to(ids.device),
                )
            total = total + output.loss
        return self.weight * total

    def head_state(self) -> dict[str, Tensor]:
        """Return the weights that the encoder does not hold, by their names in `M3BertForMaskedLM`."""
        tied = self.masked_lm.config.tie_word_embeddings
        return {
            name: weight.detach().contiguous()
            for name, weight in self.masked_lm.state_dict().items()
            if not name.startswith("model.") and not (tied and name == "decoder.weight")
        }

    def save(self, directory: str | Path) -> None:
        """Write encoder and head in place of the encoder that a saved `SentenceTransformer` holds.

        The directory then loads as `M3BertForMaskedLM`, as `M3BertModel` and as a `SentenceTransformer`.

        Args:
            directory: Of the saved model.
        """
        self.masked_lm.save_pretrained(directory)


class SaveMaskedLanguageHead(TrainerCallback):
    """Keep the head in every checkpoint: sentence-transformers saves the model there, and not what losses hold."""

    def __init__(self, loss: MaskedLanguageLoss):
        self.loss = loss

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Write the head where the Trainer is about to save: what `trainer_state.json` closes is then complete."""
        if control.should_save and state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            checkpoint.mkdir(parents=True, exist_ok=True)
            save_file(self.loss.head_state(), checkpoint / HEAD_FILE)

    on_epoch_end = on_step_end

    def restore(self, checkpoint: str | Path) -> None:
        """Read the head of a checkpoint.

        Raises:
            FileNotFoundError: If the checkpoint has none.
            ValueError: If the head is another one, such as one with a decoder of its own.
        """
        state = load_file(Path(checkpoint) / HEAD_FILE)
        different = sorted(set(state) ^ set(self.loss.head_state()))
        if different:
            raise ValueError(f"{checkpoint} has another head than this run: they do not share {different}.")
        self.loss.masked_lm.load_state_dict(state, strict=False)


__all__ = ["MaskedLanguageLoss", "SaveMaskedLanguageHead"]
