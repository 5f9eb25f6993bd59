"""SAVE inside TRL: GRPOTrainer and RLOOTrainer whose reward model improves itself while they train the policy."""

from savelib.trl.settings import grpo_args, rloo_args, save_config
from savelib.trl.trainers import SaveGRPOTrainer, SaveRLOOTrainer

__all__ = ["SaveGRPOTrainer", "SaveRLOOTrainer", "grpo_args", "rloo_args", "save_config"]
