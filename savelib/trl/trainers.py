"""TRL's trainers with SAVE.

To TRL the reward model is one reward function. Asked for a batch's rewards, it first takes block 2 of the step
(`update_reward_model`, the same code as in our own loop) and then gives the updated model's R, and None for responses
that the policy does not learn from: TRL's baselines leave them out. They leave TRL's loss too, its KL and its divisor.
The rest, how responses are sampled, how the policy is trained, sharded, logged and saved, is TRL's.
The reward model is whole in every process. Under DeepSpeed a step in which no response is kept is not left out.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations import deepspeed
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from savelib.config import Config, ConfigError
from savelib.data.pairs_and_prompts import Prompt
from savelib.models.adapters import save_merged
from savelib.models.rollout import Responses, end_tokens
from savelib.processes import say, summed
from savelib.training.algorithm import update_reward_model
from savelib.training.metrics import Clock, describe
from savelib.training.reward_side import RewardSide
from savelib.training.scoring import encode_groups, learned_from, score_groups
from savelib.training.stages import anchor_stage, preference_stage
from savelib.training.trainer import load_data
from savelib.trl.files import loaded_side, save_side
from savelib.trl.settings import MEAN_OVER_ROWS, grpo_args, refuse_inexact, rloo_args, whole_config

if tuple(map(int, trl.__version__.split(".")[:2])) < (1, 6):
    raise ImportError(f"savelib.trl needs trl>=1.6, where a reward of None is left out; found {trl.__version__}")


class _Save:
    """What both trainers share; TRL's trainer comes next in the order of bases.

    model: as TRL takes it; the reference, and stage 2, take the model from its name or folder.
    save: from `save_config`. args: TRL's, by default table 8's. others: TRL's further parameters.
    Raises ConfigError for arguments with which the result would not be that of our own step.
    """

    def __init__(
        self, model: Any, save: Config, args: Any = None, train_dataset: Dataset | IterableDataset = None, **others: Any
    ):
        args = args or self._default_args()
        refuse_inexact(args, others)
        config = whole_config(save, model, args, self._algo(args))
        prompts = [_prompt(row) for row in _rows(train_dataset, config)]
        with _models_are_whole():
            data = load_data(config, prompts)
            source = preference_stage(config, data.pairs)
            self.reward_side = RewardSide(config, data, source, anchor_stage(config, source, prompts))
        self.reward_source = source

        def reward_model(**batch: Any) -> list[float | None]:  # TRL logs the rewards under this name
            return self._rewards(**batch)

        super().__init__(model, reward_funcs=reward_model, args=args, train_dataset=train_dataset, **others)
        if getattr(self, "aux_loss_enabled", False):
            raise ConfigError(
                "router_aux_loss_coef: the auxiliary loss of a mixture of experts counts rows that are left out; use 0"
            )
        self._ends = set(end_tokens(self.model, self.processing_class))
        self._learned, self._rows_per_learned = torch.zeros(0), 0.0
        self.add_callback(_NobodyKept(self))
        for trainer in (GRPOTrainer, RLOOTrainer):
            logging.getLogger(trainer.__module__).addFilter(_not_about_none)

    # TRL's reward function

    def _rewards(
        self, prompts: list, completion_ids: list[list[int]], log_metric: Any = None, **columns: Any
    ) -> list[float | None]:
        """R of the responses; in training that of the model which they have updated, and None where one is left out."""
        side, c = self.reward_side, self.reward_side.config
        if not self.model.training:
            groups = encode_groups(side.reward_model, self._responses(prompts, completion_ids, columns, 1))
            size = c.micro_batch_groups * c.group_size
            return score_groups(side.reward_model, groups, c, size).rewards.flatten().tolist()
        step = self.state.global_step + 1
        threshold = side.threshold(step)
        responses = self._responses(prompts, completion_ids, columns, c.group_size)
        with torch.enable_grad():
            before, after, metrics = update_reward_model(side, responses, threshold, step, Clock())
        self._learned = learned_from(after, c).flatten()  # [N]
        (learned,) = summed(int(self._learned.sum()))
        self._rows_per_learned = c.batch_size * c.group_size / learned if learned else 0.0
        for name, value in ({"threshold": threshold} | metrics | describe(before, after, responses)).items():
            log_metric(name, value)
        rewards = after.rewards.flatten().tolist()
        return [r if kept else None for r, kept in zip(rewards, self._learned.tolist(), strict=True)]

    def _responses(self, prompts: list, completion_ids: list[list[int]], columns: dict, size: int) -> Responses:
        """TRL's rows as groups of `size`."""
        device, starts = self.reward_side.device, range(0, len(prompts), size)
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        rows = [
            {"prompt": prompts[i]} | {k: v[i] for k, v in columns.items() if k in ("id", "embedded")} for i in starts
        ]
        return Responses(
            prompts=[_prompt(row) for row in rows],
            texts=[texts[i : i + size] for i in starts],
            completion_lengths=torch.tensor([len(ids) for ids in completion_ids], device=device).view(-1, size),
            finished=torch.tensor([ids[-1] in self._ends for ids in completion_ids], device=device).view(-1, size),
        )

    # TRL's loss, of the rows that are left in

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.model.training and "num_items_in_batch" in output:  # GRPO. In RLOO advantage 0 is no loss already
            mask = output["completion_mask"]
            output["tool_mask"] = output.get("tool_mask", torch.ones_like(mask)) * self._learned[:, None]
            output["num_items_in_batch"] = self.accelerator.gather((mask * output["tool_mask"]).sum()).sum()
        return output

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        over_rows = getattr(self, "loss_type", "grpo") in MEAN_OVER_ROWS
        return loss * self._rows_per_learned if self.model.training and over_rows else loss

    # files

    def train(self, resume_from_checkpoint: str | bool | None = None, *more: Any, **others: Any) -> Any:
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            with _models_are_whole():
                self.reward_side = loaded_side(Path(folder) / "reward_model", self.reward_side, self.reward_source)
        result = super().train(resume_from_checkpoint, *more, **others)
        if self.reward_side.guard:
            say(self.reward_side.guard.finish(self.state.global_step))
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """TRL's, and reward_model/ beside the policy, which plain from_pretrained loads; in checkpoints, to resume."""
        if self.args.should_save:
            folder, rm = Path(output_dir or self.args.output_dir) / "reward_model", self.reward_side.reward_model
            if _internal_call:
                save_side(self.reward_side, folder)
            else:
                save_merged(rm.model, self.reward_source, folder)
                rm.tokenizer.save_pretrained(folder)
                rm.save_value_head(folder)
        super().save_model(output_dir, _internal_call)


class SaveGRPOTrainer(_Save, GRPOTrainer):
    """GRPO, or GSPO with importance_sampling_level="sequence", and SAVE."""

    @staticmethod
    def _default_args() -> GRPOConfig:
        return GRPOConfig(**grpo_args())

    @staticmethod
    def _algo(args: GRPOConfig) -> str:
        return "gspo" if args.importance_sampling_level == "sequence" else "grpo"


class SaveRLOOTrainer(_Save, RLOOTrainer):
    """RLOO and SAVE."""

    @staticmethod
    def _default_args() -> RLOOConfig:
        return RLOOConfig(**rloo_args())

    @staticmethod
    def _algo(args: RLOOConfig) -> str:
        return "rloo"


class _NobodyKept(TrainerCallback):
    """No optimizer step where no response is kept: Adam's moments would move the policy with gradients of zero, too."""

    def __init__(self, trainer: _Save):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **more: Any) -> None:
        if not self.trainer._rows_per_learned:
            optimizer.zero_grad(set_to_none=True)


def _not_about_none(record: logging.LogRecord) -> bool:
    return "All reward functions returned None" not in record.getMessage()


# rows, models


def _rows(dataset: Dataset | IterableDataset, config: Config) -> Any:
    """The rows that stage 2 takes prompts from."""
    if not isinstance(dataset, IterableDataset):
        return dataset
    if not config.anchor_prompts:
        raise ConfigError("anchor_prompts = 0: a stream has no end; say how many prompts stage 2 takes from it")
    return itertools.islice(dataset, config.anchor_prompts)


def _prompt(row: dict[str, Any]) -> Prompt:
    """A row of TRL's data set. Columns `id` and `embedded` (of the embedded world, with known gold) are optional."""
    messages = row["prompt"]
    if isinstance(messages, str) or not all(isinstance(m["content"], str) for m in messages):
        raise ConfigError(
            f"train_dataset: the prompt {str(messages)[:60]!r} is not a list of messages of text, which both models "
            "render by their own chat templates"
        )
    messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    return Prompt(str(row.get("id", messages[-1]["content"][:40])), messages, embedded=bool(row.get("embedded")))


@contextmanager
def _models_are_whole() -> Iterator[None]:
    """from_pretrained without the hooks of ZeRO-3, which shards, and FSDP, which leaves some processes' weights out."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    hook, loading = deepspeed._hf_deepspeed_config_weak_ref, os.environ.pop(name, None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = hook
        if loading is not None:
            os.environ[name] = loading
