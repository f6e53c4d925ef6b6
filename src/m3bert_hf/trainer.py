"""transformers' Trainer for masked pretraining at every granularity."""

import json
import math
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from .loss_m3bert import IGNORE_INDEX, MLMLossOptions
from .throughput import backbone_operations, decoder_operations, matrix_rate
from .training_plan import PlannedRows


_PLAN_FILE = "training_plan.json"


@dataclass
class M3BertTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments`, and what the multigranular loss sums.

    `label_smoothing_factor` is the loss's own. With `lr_scheduler_type="warmup_stable_decay"` (the trapezoidal
    schedule), `decay_ratio` of the steps are the decay, unless `lr_scheduler_kwargs` says otherwise. The fields below
    `granularities` are those of [`MLMLossOptions`].
    """

    granularities: list[str] | None = field(
        default=None, metadata={"help": "Pairs exit:dimension to train, such as 4:64 12:768; all by default."}
    )
    granularity_weights: list[float] | None = field(default=None, metadata={"help": "A weight for each granularity."})
    stochastic_granularities: int | None = field(
        default=None, metadata={"help": "Granularities drawn for each token; all by default."}
    )
    distillation_weight: float = field(
        default=0.0, metadata={"help": "Share of the smaller granularities' loss that comes from the largest."}
    )
    z_loss_weight: float = field(default=0.0, metadata={"help": "Weight of the squared log normaliser."})
    loss_backend: str = field(default="auto", metadata={"help": "auto, torch or inductor."})
    decay_ratio: float = field(
        default=0.1, metadata={"help": "Share of the steps that warmup_stable_decay decays over."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Columns belong to the collator here."})

    def __post_init__(self):
        # Where there is no accelerator, bf16 is refused unless the CPU is asked for.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        # Every parameter is used in every step, unless exits were left out on purpose.
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = self.granularities is not None
        super().__post_init__()

    def loss_options(self) -> MLMLossOptions:
        """Return the loss's options.

        Raises:
            ValueError: If a granularity is not written as exit:dimension, or a value is out of its range.
        """
        pairs: list[Any] | None = None
        if self.granularities is not None:
            try:
                pairs = [tuple(int(part) for part in str(pair).split(":")) for pair in self.granularities]
            except ValueError:
                pairs = [()]
            if any(len(pair) != 2 for pair in pairs):
                raise ValueError(
                    f"`granularities` must be pairs exit:dimension, such as 4:64 12:768; got {self.granularities}."
                )
        return MLMLossOptions(
            granularities=pairs,
            granularity_weights=self.granularity_weights,
            stochastic_granularities=self.stochastic_granularities,
            distillation_weight=self.distillation_weight,
            label_smoothing=self.label_smoothing_factor,
            z_loss_weight=self.z_loss_weight,
            backend=cast(Any, self.loss_backend),
        )


def last_complete_checkpoint(output_dir: str | Path | None) -> str | None:
    """Return the newest checkpoint whose saving came to its end, or `None`.

    The Trainer writes `trainer_state.json` last: without it, the process was ended while it saved.

    Args:
        output_dir: Of the run.
    """
    complete = {}
    for path in Path(output_dir or ".").glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            complete[int(path.name.rpartition("-")[2])] = path
        except (OSError, ValueError):
            continue
    return str(complete[max(complete)]) if complete else None


class _Totals:
    """Figures of the steps since the last log, on the device until they are read."""

    def __init__(self):
        self.losses: torch.Tensor | None = None
        self.steps = 0
        self.counts: torch.Tensor | None = None
        self.begin, self.paused = time.perf_counter(), 0.0

    def add(self, losses: torch.Tensor, counts: torch.Tensor) -> None:
        """Add a batch's granularity losses, already divided by the whole batch's tokens, and its token counts."""
        self.losses = losses if self.losses is None else self.losses + losses
        self.counts = counts if self.counts is None else self.counts + counts
        self.steps += 1

    def seconds(self) -> float:
        """Return the time spent training, without evaluation and saving."""
        return max(time.perf_counter() - self.begin - self.paused, 1e-9)


class _StartOfTraining(TrainerCallback):
    """Begins the figures anew with every attempt, of which `auto_find_batch_size` makes several."""

    def __init__(self, trainer: "M3BertTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._totals = _Totals()


class M3BertTrainer(Trainer):
    """transformers' `Trainer` for [`M3BertForMaskedLM`].

    - Logs `loss_L{exit}D{dimension}` of each granularity beside the loss, exact under accumulation and several
      processes; evaluation gives `eval_loss_...`, `eval_accuracy_...` (share of masked tokens that are predicted) and
      `eval_perplexity_...`, averaged over tokens.
    - Logs `tokens_per_second` of all processes and `matrix_rate_share`: the operations of the model's matrix products
      as a share of what the machine reaches in large products of the same dtype, measured at the beginning.
    - Reads the training set in its own order, which a plan has shuffled, so that a resumed run goes on in it.
    - Does not decay norms, biases and embeddings.
    - Stops with a message before a loss that is not finite reaches a checkpoint, keeps the last complete checkpoint
      when saving fails, and refuses to resume on a plan that has changed.

    Takes what [`~transformers.Trainer`] takes, with [`M3BertTrainingArguments`], and `eval_data_collator` for
    evaluation, which had better mask the same way throughout a run.
    """

    def __init__(self, model=None, args: M3BertTrainingArguments | None = None, eval_data_collator=None, **kwargs):
        args = args if args is not None else M3BertTrainingArguments(output_dir="tmp_trainer")
        self._decay_ratio = args.decay_ratio
        super().__init__(model=model, args=args, **kwargs)
        # The Trainer's smoother would take the labels away from the model, which smooths by itself.
        self.label_smoother = None
        self.eval_data_collator = eval_data_collator or self.data_collator
        core = self.accelerator.unwrap_model(self.model)
        options = args.loss_options()
        options.resolve(core.config.exit_layers, core.config.matryoshka_dimensions)
        core.loss_options = options
        self._core_config, self._options = core.config, options
        self._totals = _Totals()
        self._evaluated: torch.Tensor | None = None
        self._finite = torch.ones((), dtype=torch.bool, device=args.device)
        self._matrix_rate: float | None = None
        self.add_callback(_StartOfTraining(self))

    # ------------------------------------------------------------------ data and optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, PlannedRows):
            return super()._get_train_sampler(train_dataset)
        return SequentialSampler(dataset)

    def get_eval_dataloader(self, eval_dataset=None):
        """Return the batches of the evaluation, made by its own collator."""
        before, self.data_collator = self.data_collator, self.eval_data_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = before

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the parameters that weight decay acts on: matrices, without embeddings."""
        embeddings = {
            f"{name}.{own}" if name else own
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding)
            for own, _ in module.named_parameters(recurse=False)
        }
        return [name for name in super().get_decay_parameter_names(model) if name not in embeddings]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Create the schedule; `warmup_stable_decay` decays over `decay_ratio` of the steps."""
        given: Any = self.args.lr_scheduler_kwargs
        arguments = dict(given or {})
        if self.args.lr_scheduler_type == "warmup_stable_decay" and "num_decay_steps" not in arguments:
            arguments["num_decay_steps"] = max(1, round(self._decay_ratio * num_training_steps))
            self.args.lr_scheduler_kwargs = arguments
        return super().create_scheduler(num_training_steps, optimizer)

    # ------------------------------------------------------------------ training

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """Train; `resume_from_checkpoint=True` goes on from the last checkpoint that was saved completely.

        Raises:
            ValueError: If there is no complete checkpoint, or the training set is not the one of the checkpoint.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"There is no complete checkpoint in {self.args.output_dir} to resume from. Start the run without "
                    "resume_from_checkpoint."
                )
        if resume_from_checkpoint:
            self._check_plan(resume_from_checkpoint)
        if self._matrix_rate is None:
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
            self._matrix_rate = matrix_rate(self.args.device, dtype)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _plan(self) -> dict[str, Any] | None:
        dataset = self.train_dataset
        if not isinstance(dataset, PlannedRows):
            return None
        return {"rows": len(dataset), "fingerprint": dataset.fingerprint()}

    def _check_plan(self, checkpoint: str) -> None:
        path, plan = Path(checkpoint) / _PLAN_FILE, self._plan()
        if plan is None or not path.exists():
            return
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved != plan:
            raise ValueError(
                f"The training set is not the one that {checkpoint} was trained on: {plan['rows']} rows in an order "
                f"with fingerprint {plan['fingerprint']}, then {saved['rows']} with {saved['fingerprint']}. Resume "
                "with the same files, tokenizer, lengths, sampling, batch sizes, steps and seed, or start a new run "
                "from its weights with --init_from."
            )

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        attention = self._core_config._attn_implementation or ""
        if "flash" in attention and "position_ids" in inputs and "attention_mask" not in inputs:
            # Flash attention takes packed documents in one row; positions begin again with every row.
            inputs = {key: value.reshape(1, -1) for key, value in inputs.items()}
        return inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the model's loss, and keep its parts and the batch's size for the next log.

        Raises:
            FloatingPointError: If the loss is not finite (on a GPU, at the next log or checkpoint).
        """
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self._finite &= torch.isfinite(loss.detach())
            if loss.device.type == "cpu":
                self._check_finite()
            self._totals.add(outputs.granularity_losses, self._count(inputs))
        return (loss, outputs) if return_outputs else loss

    def _count(self, inputs) -> torch.Tensor:
        """Return tokens, pairs of tokens that attend to one another, and labelled tokens, padding left out [3]."""
        ids = inputs["input_ids"]
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is None:
            mask = ids != self._core_config.pad_token_id
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        # Over a document of n tokens, 2 p + 1 adds up to n squared.
        pairs = ((2 * positions + 1) * mask).sum()
        return torch.stack([mask.sum(), pairs, (inputs["labels"] != IGNORE_INDEX).sum()]).double()

    def _check_finite(self) -> None:
        if bool(self._finite):
            return
        last = last_complete_checkpoint(self.args.output_dir)
        kept = f"The last checkpoint, {last}, is untouched" if last else "No checkpoint was written yet"
        raise FloatingPointError(
            f"The loss became NaN or infinite by step {self.state.global_step + 1}. {kept}. Lower learning_rate, "
            "lengthen the warmup, clip gradients (max_grad_norm), or use bf16 in place of fp16; then start again or "
            "resume."
        )

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the granularities' losses and the throughput to what is logged in training."""
        if "loss" in logs and self._totals.steps:
            self._check_finite()
            totals = self._totals
            seconds = totals.seconds()
            # Each part was divided by the whole batch's tokens: over accumulation and processes, the parts add up.
            steps = max(totals.steps / self.args.gradient_accumulation_steps, 1.0)
            losses = self.accelerator.reduce(totals.losses.double(), "sum") / steps
            tokens, pairs, labelled = self.accelerator.reduce(totals.counts, "sum").tolist()
            logs.update(self._by_granularity("loss", losses))
            logs["tokens_per_second"] = round(tokens / seconds, 1)
            if self._matrix_rate:
                operations: float = backbone_operations(self._core_config, int(tokens), int(pairs))
                operations += decoder_operations(self._core_config.vocab_size, labelled * self._scored_width())
                rate = self._matrix_rate * self.args.world_size
                logs["matrix_rate_share"] = round(operations / seconds / rate, 4)
            self._totals = _Totals()
        super().log(logs, *args, **kwargs)

    def _scored_width(self) -> float:
        """Return the decoder's columns that one labelled token is multiplied with, on average."""
        pairs = self._options.resolve(self._core_config.exit_layers, self._core_config.matryoshka_dimensions)
        drawn = self._options.stochastic_granularities
        width = sum(dimension for _, dimension in pairs)
        if drawn is None:
            return width
        if not self._options.distillation_weight:
            return width * drawn / len(pairs)
        teacher = max(pairs)[1]
        return teacher + (width - teacher) * min(drawn / max(len(pairs) - 1, 1), 1.0)

    def _by_granularity(self, name: str, grid: torch.Tensor) -> dict[str, float]:
        config = self._core_config
        return {
            f"{name}_L{layer}D{dimension}": round(value, 6)
            for layer, row in zip(config.exit_layers, grid.tolist(), strict=True)
            for dimension, value in zip(config.matryoshka_dimensions, row, strict=True)
            if not math.isnan(value)
        }

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, *args, **kwargs):
        """Evaluate as the Trainer does; its time does not count in the training throughput."""
        start = time.perf_counter()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._totals.paused += time.perf_counter() - start

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Score a batch; its sums are gathered at the end of the evaluation, over all processes."""
        if "labels" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = dict(inputs)
        state, rows = self.accelerator.gradient_state, inputs["labels"].shape[0]
        if state.end_of_dataloader and state.remainder > 0:
            # Processes get equally many rows; those that only fill up the last batch must not count twice.
            own = torch.arange(rows, device=inputs["labels"].device) + self.args.process_index * rows
            inputs["labels"] = inputs["labels"].masked_fill((own >= state.remainder)[:, None], IGNORE_INDEX)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        count = (inputs["labels"] != IGNORE_INDEX).sum()
        grids = torch.stack([outputs.granularity_losses, outputs.granularity_accuracies]).double() * count
        sums = torch.cat([grids.flatten(), count[None].double()])
        self._evaluated = sums if self._evaluated is None else self._evaluated + sums
        return outputs.loss.detach(), None, None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Evaluate, and add loss, accuracy and perplexity of each granularity, averaged over masked tokens."""
        self._evaluated = None
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._evaluated is None:
            return output
        sums = self.accelerator.reduce(self._evaluated, "sum")
        config = self._core_config
        grids = (sums[:-1] / sums[-1].clamp(min=1)).view(2, len(config.exit_layers), len(config.matryoshka_dimensions))
        pairs = self._options.resolve(config.exit_layers, config.matryoshka_dimensions)
        weights = self._options.granularity_weights or [1.0] * len(pairs)
        places = [(config.exit_layers.index(layer), config.matryoshka_dimensions.index(d)) for layer, d in pairs]
        total = sum(w * grids[0][place].item() for w, place in zip(weights, places, strict=True))
        output.metrics[f"{metric_key_prefix}_loss"] = total
        for name, grid in (("loss", grids[0]), ("accuracy", grids[1]), ("perplexity", grids[0].exp())):
            output.metrics.update(self._by_granularity(f"{metric_key_prefix}_{name}", grid))
        return output

    # ------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model, trial):
        self._check_finite()
        start = time.perf_counter()
        path = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        before = last_complete_checkpoint(path.parent)
        try:
            plan = self._plan()
            if plan is not None and self.args.should_save:
                path.mkdir(parents=True, exist_ok=True)
                (path / _PLAN_FILE).write_text(json.dumps(plan), encoding="utf-8")
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not isinstance(error, OSError) and "write" not in str(error) and "I/O" not in str(error):
                raise
            # What is half written would only take the space that the next attempt needs.
            shutil.rmtree(path, ignore_errors=True)
            kept = f"the last complete one is {before}" if before else "there is no earlier one"
            free = shutil.disk_usage(path.parent).free / 2**20 if os.path.isdir(path.parent) else 0.0
            raise OSError(
                f"Saving {path} failed ({error}); {kept}. {free:.0f} MiB are free there: free some or change "
                "output_dir, then go on with --resume_from_checkpoint true."
            ) from error
        self._totals.paused += time.perf_counter() - start


__all__ = ["M3BertTrainer", "M3BertTrainingArguments", "last_complete_checkpoint"]
