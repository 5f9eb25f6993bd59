"""Every hyperparameter of a run, once: name, default (the paper's), section of the paper, meaning.

The defaults are the profile `paper`; the others say only what they change. Order of precedence:
field default < profile < YAML file < explicit values. Unknown keys are refused with the nearest valid name.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import math
import re
import reprlib
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from savelib.errors import ConfigError
from savelib.method import ALGORITHMS, RULES

LARGEST = 1_000_000  # of a whole number without a limit of its own
LARGEST_SEED = 2**32 - 1
LARGEST_RATE = 1e30  # of learning: what float32 can hold, with room
MOST_TOKENS = 10**9  # sampled at a time: a random number each
MAY_BE_EMPTY = ("run_id", "preferences", "eval_preferences", "eval_prompts_source", "guard_preferences")
RESERVED = ("studies",)  # folders under runs/ that hold no run


def _field(default: Any, paper: str, description: str, stage: int = 0, **constraints: Any) -> Any:
    """A field with its place in the paper (`ours` where it has none).

    stage: 1 or 2 where the field changes the result of stage 1, or of stage 2 alone, and so belongs to its cache key.
    """
    if type(default) is int:
        constraints.setdefault("le", LARGEST)
    return Field(default, description=description, json_schema_extra={"paper": paper, "stage": stage}, **constraints)


class Config(BaseModel):
    """One run of SAVE. `python -m savelib config` prints each field with its value, source and meaning."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, coerce_numbers_to_str=True, allow_inf_nan=False
    )

    # the run
    profile: str = _field(
        "paper", "ours", "tiny (embedded world), smol (SmolLM2-135M), single_gpu (LoRA) or paper (table 8)"
    )
    run_id: str = _field(
        "", "ours", "name of the folder under runs/; empty: made from profile, rule, algo, seed and time"
    )
    seed: int = _field(
        0, "ours", "seed of sampling, data order and head initialisation", ge=0, le=LARGEST_SEED, stage=1
    )
    resume: str = _field(
        "never",
        "ours",
        "auto: resume from the last checkpoint of run_id; a checkpoint's folder: start a new run from it",
    )
    checkpoint_every: int = _field(20, "ours", "steps between checkpoints; 0: none", ge=0)
    keep_checkpoints: int = _field(2, "ours", "how many checkpoints stay", ge=1)
    eval_every: int = _field(20, "ours", "steps between evaluations on held-out data; 0: only first and last", ge=0)
    eval_prompts: int = _field(64, "ours", "held-out prompts of an evaluation", ge=1)
    device: str = _field("auto", "ours", "auto, cpu, cuda or cuda:N")
    threads: int = _field(0, "ours", "CPU threads; 0: all cores. Tiny models are faster on one", ge=0, le=1024)
    precision: Literal["float32", "bfloat16", "bfloat16_cpu"] = _field(
        "bfloat16",
        "section 4.1",
        "arithmetic on CUDA (autocast); weights are always held in float32. A CPU computes in float32; with "
        "bfloat16_cpu in bfloat16 too, if it has AVX512-BF16 or AMX: then the figures of a run depend on the CPU",
        stage=1,
    )
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = _field(
        "tensorboard", "ours", "where metrics go besides metrics.jsonl; tensorboard: events in the run's folder"
    )

    # the machine
    num_processes: int = _field(
        4, "section 4.1", "processes of the run on all nodes, one per GPU; batch_size is shared", ge=1
    )
    backend: Literal["ddp", "deepspeed_zero2", "deepspeed_zero2_offload", "deepspeed_zero3"] = _field(
        "deepspeed_zero2_offload",
        "section 4.1",
        "ddp: every process holds both models whole; DeepSpeed (env/deepspeed/*.json): optimizer states and gradients "
        "are sharded, with offload they lie in the CPU's memory, in ZeRO-3 the weights are sharded too",
    )
    lora_rank: int = _field(
        0,
        "ours",
        "rank of LoRA adapters on all linear layers; 0: all weights are trained, as in the paper. With LoRA the update "
        "has low rank, the base is frozen, and lr acts on the adapters; the reference is the policy without them",
        ge=0,
        stage=1,
    )
    load_in_4bit: bool = _field(
        False,
        "ours",
        "QLoRA: the frozen base in 4 bits (nf4). Rewards and samples are those of the rounded models",
        stage=1,
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = _field(
        "adamw",
        "section 4.1",
        "8-bit: Adam's moments are rounded, weights are not; paged: moments may move to the CPU",
        stage=1,
    )
    gradient_checkpointing: bool = _field(
        True, "ours", "compute activations again in the backward: less memory, a third more time, the same numbers"
    )

    # models and data
    policy_model: str = _field(
        "Qwen/Qwen2.5-3B-Instruct", "section 4.1", "hub id or folder; embedded; smollm2", stage=2
    )
    reward_model: str = _field(
        "Skywork/Skywork-Reward-V2-Llama-3.2-3B",
        "section 4.1",
        "hub id or folder with one label; embedded; smollm2",
        stage=1,
    )
    policy_layers: int = _field(
        0, "ours", "only the last n layers of the policy and its final norm are trained; 0: all weights", ge=0
    )
    reward_layers: int = _field(
        0, "ours", "the reward model is made of the first n layers of its backbone; 0: all", stage=1, ge=0
    )
    preferences: str = _field(
        "HuggingFaceH4/ultrafeedback_binarized",
        "section 4.1",
        "pairs: hub id, .jsonl[.gz], .parquet, or embedded; empty: none, and no accuracy on held-out pairs",
        stage=1,
    )
    prompts: str = _field(
        "openbmb/UltraFeedback", "section 4.1", "RL prompts: hub id, .jsonl[.gz], .parquet, or embedded", stage=2
    )
    eval_preferences: str = _field("", "ours", "held-out pairs; empty: every tenth of preferences", stage=1)
    eval_prompts_source: str = _field("", "ours", "held-out prompts; empty: every tenth of prompts")
    bad_rows: Literal["error", "skip"] = _field(
        "error", "ours", "a row with an empty or odd field: stop, or leave it out", stage=1
    )
    prompt_selection: Literal["responses_fit", "responses_exceed", "all"] = _field(
        "responses_fit",
        "section 4.1, open",
        "keep prompts whose dataset responses fit in (or exceed) max_new_tokens",
        stage=2,
    )
    world_seed: int = _field(
        0, "ours", "which embedded world: the seed of its pretrained backbone", ge=0, le=LARGEST_SEED, stage=1
    )
    start_share: float = _field(
        0.4, "ours", "embedded world: share of right responses in the policy's SFT data", gt=0, lt=1, stage=2
    )
    pairs_share: float = _field(
        0.0,
        "ours",
        "embedded world: the same of the policy that the preference pairs come from; 0: start_share",
        ge=0,
        lt=1,
        stage=1,
    )
    world_pairs: int = _field(40, "ours", "embedded world: preference pairs of stage 1", stage=1, ge=1, le=10_000)
    label_noise: float = _field(
        0.3, "ours", "embedded world: share of flipped labels among its preference pairs", ge=0, lt=0.5, stage=1
    )
    label_bias: float = _field(
        0.0,
        "ours",
        "embedded world: share of its preference labels that go to the polite response (`, friend`), right or wrong, "
        "where one of the two is polite",
        stage=1,
        ge=0,
        le=1,
    )
    feature_offset: float = _field(
        0.0,
        "ours",
        "embedded world: norm of the reward model's mean feature over the spread within a group, about 6 in real "
        "language models; 0: as pretrained, about .85",
        stage=1,
        ge=0,
        le=50,
    )
    max_prompt_tokens: int = _field(2048, "ours", "longer prompts are an error", ge=1, stage=2)

    # stage 1: preference learning (eq. 2, 11)
    bt_epochs: int = _field(
        0, "section 3.1", "passes over the pairs; 0: the reward model is already trained", ge=0, stage=1
    )
    bt_batch_size: int = _field(64, "section 3.1", "pairs per step", ge=1, stage=1)
    bt_backbone_lr: float = _field(
        2e-6, "ours", "Bradley-Terry learning rate of the backbone; 0 freezes it", ge=0, le=LARGEST_RATE, stage=1
    )
    bt_head_lr: float = _field(
        2e-6, "ours", "Bradley-Terry learning rate of the reward head", gt=0, le=LARGEST_RATE, stage=1
    )

    # stage 2: value anchor integration (eq. 12)
    value_position: Literal["user_turn", "generation_prompt"] = _field(
        "user_turn",
        "eq. 12, open",
        "token that V reads: end of the user turn, or end of the generation prompt",
        stage=2,
    )
    value_head: Literal["linear", "mlp"] = _field(
        "linear", "eq. 12, open", "one linear layer, or two with tanh", stage=2
    )
    value_init: Literal["mean_reward", "random"] = _field(
        "mean_reward",
        "eq. 12, open",
        "output layer at start: weight 0 and bias = mean of the first targets, or random",
        stage=2,
    )
    anchor_prompts: int = _field(0, "section 3.2", "prompts that the value head is fitted on; 0: all", ge=0, stage=2)
    anchor_responses: int = _field(
        16, "table 8, K", "responses per prompt whose mean reward is the target", ge=1, stage=2
    )
    anchor_lr: float = _field(2e-4, "table 8", "value head learning rate in stage 2", gt=0, le=LARGEST_RATE, stage=2)
    anchor_batch_size: int = _field(32, "table 8", "prompts per step in stage 2", ge=1, stage=2)
    anchor_epochs: int = _field(1, "table 8", "passes over the prompts in stage 2", ge=1, stage=2)

    # the on-policy loop (algorithms 1 and 2)
    rule: str = _field("save", "table 1", "how a step updates the reward model: " + ", ".join(RULES))
    algo: str = _field("grpo", "table 2", "policy algorithm: " + ", ".join(ALGORITHMS))
    total_steps: int = _field(320, "table 8, T", "steps of the loop", ge=1)
    batch_size: int = _field(32, "table 8, B", "prompts per step", ge=1)
    group_size: int = _field(16, "table 8, G", "responses per prompt", ge=2)
    curriculum: Literal["linear", "none", "fixed"] = _field(
        "linear", "eq. 14", "threshold mu(t): eq. 14; none: mu = 0.5, no filter (w/o curriculum); fixed: mu at step 1"
    )
    initial_margin: float = _field(0.5, "table 8, m0", "initial margin of eq. 14", ge=0, le=1)
    length_filter: Literal["reward_model", "both"] = _field(
        "reward_model",
        "F.1, open",
        "who ignores responses that end without an end token: the RM update, or the policy's too",
    )
    rm_steps: int = _field(
        1, "algorithm 2, open", "RM gradient steps per batch; the filter stays that of the first", ge=1
    )
    guard_pairs: int = _field(
        100, "ours", "rule save_checked: preference pairs that check each block; taken out of those of stage 1", ge=2
    )
    guard_preferences: str = _field("", "ours", "their source instead: hub id, .jsonl[.gz] or .parquet")
    guard_unbiased: bool = _field(
        False, "ours", "embedded world: the guard pairs' labels are noisy, but not biased by label_bias"
    )
    guard_every: int = _field(5, "ours", "rule save_checked: steps of a block", ge=1)
    certificate_pairs: int = _field(
        0,
        "ours",
        "rule save_checked: further pairs that certify the returned reward model: with probability 1 - "
        "certificate_alpha it is not worse than the one at the start by more than certificate_delta; 0: none",
        ge=0,
    )
    certificate_alpha: float = _field(0.05, "ours", "chance that the certificate is wrong", gt=0, lt=1)
    certificate_delta: float = _field(0.02, "ours", "loss of accuracy that the certificate allows", ge=0, lt=1)
    backbone_lr: float = _field(
        1e-7, "table 8", "backbone learning rate in the loop; 0 freezes it", ge=0, le=LARGEST_RATE
    )
    reward_head_lr: float = _field(1e-7, "table 8", "reward head learning rate in the loop", gt=0, le=LARGEST_RATE)
    value_head_lr: float = _field(1e-5, "table 8", "value head learning rate in the loop", gt=0, le=LARGEST_RATE)
    value_loss_weight: float = _field(1.0, "table 8, lambda_V", "weight of L_V (eq. 21)", gt=0)
    policy_lr: float = _field(2e-6, "table 8", "policy learning rate", gt=0, le=LARGEST_RATE)
    reward_shaping: Literal["none", "par"] = _field(
        "none", "arXiv 2502.18770", "par: the policy's reward is the mean sigmoid(R - R of a reference response)"
    )
    par_references: int = _field(
        10, "arXiv 2502.18770, M", "reward_shaping=par: responses of the initial policy per prompt", ge=1
    )
    ensemble: int = _field(
        1,
        "arXiv 2310.02743",
        "reward models whose preference stages differ in their seed: order of the pairs, start of a new reward head; "
        "rule frozen alone",
        ge=1,
        stage=1,
    )
    ensemble_reward: Literal["mean", "wco", "uwo"] = _field(
        "mean",
        "arXiv 2310.02743",
        "the ensemble's reward, each member less its mean over the training pairs' responses: mean; wco: the smallest; "
        "uwo: mean - 0.5 variance",
    )
    meta_lr: float = _field(
        1e-3, "arXiv 2405.00438, eta", "rule metarm: rate of the ascent on J", gt=0, le=LARGEST_RATE
    )
    freeze_policy: bool = _field(False, "table 1", "w/o policy optimization: the policy never moves")
    beta: float = _field(0.04, "table 8", "KL penalty to the initial policy", ge=0)
    max_kl: float = _field(
        0.0,
        "ours",
        "the run ends at the first step whose batch is further from the initial policy, in nats per response: a watch "
        "on reward hacking that needs no labels; 0: none",
        ge=0,
    )
    kl: Literal["algorithm", "loss", "reward"] = _field(
        "algorithm",
        "eq. 5, open",
        "k3 in the loss, k1 in the reward, or as the algorithm has it (loss: grpo, gspo, prime)",
    )
    advantages_over: Literal["kept", "all"] = _field(
        "kept", "eq. 5, open", "responses whose rewards give a group's mean and std in the policy update"
    )
    policy_groups: Literal["two_kept", "both_signs"] = _field(
        "two_kept", "algorithm 1, open", "groups in the policy update: at least 2 kept, or kept ones of both signs"
    )
    max_grad_norm: float = _field(1.0, "open", "gradient clipping, each optimizer by itself", gt=0, stage=1)
    temperature: float = _field(0.7, "table 8", "sampling temperature; log-probs use it too", ge=0.01, le=100, stage=2)
    top_p: float = _field(0.8, "table 8", "nucleus sampling; 1: off", gt=0, le=1, stage=2)
    top_k: int = _field(20, "table 8", "top-k sampling; 0: off", ge=0, stage=2)
    max_new_tokens: int = _field(1024, "table 8", "longest response", ge=1, stage=2)
    micro_batch_groups: int = _field(1, "ours", "groups per forward/backward of the reward model", ge=1)
    micro_batch_responses: int = _field(4, "ours", "responses per forward/backward of the policy", ge=1)
    rollout_rows: int = _field(128, "ours", "responses sampled at a time", ge=1)

    @field_validator("*", mode="before")
    @classmethod
    def _sound(cls, value: Any, info: Any) -> Any:
        """What no field takes, whatever its type."""
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and kind is not bool:
            raise ValueError("a truth value, where a number or a text is wanted")
        if isinstance(value, str):
            if len(value) > 1000:
                raise ValueError(f"a text of {len(value)} characters; at most 1000")
            if any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
                raise ValueError("holds a control character, or half a character")
            if not value.strip() and info.field_name not in MAY_BE_EMPTY:
                raise ValueError("must not be empty")
        return value

    @field_validator("profile", "rule", "algo")
    @classmethod
    def _known(cls, value: str, info: Any) -> str:
        valid = {"profile": PROFILES, "rule": RULES, "algo": ALGORITHMS}[info.field_name]
        if value not in valid:
            raise ValueError(f"not one of {', '.join(valid)}")
        return value

    @field_validator("run_id")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if value and (Path(value).name != value or value.startswith(".")):
            raise ValueError("must be a plain folder name, without '/' and not starting with '.'")
        if value in RESERVED or value != value.strip() or len(value.encode()) > 200:
            raise ValueError(f"is none of {', '.join(RESERVED)}, has no blank at an end and at most 200 bytes")
        return value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
            raise ValueError("not auto, cpu, cuda or cuda:N")
        return value

    @field_validator("resume")
    @classmethod
    def _plain_word(cls, value: str) -> str:
        if value != value.lower() and value.lower() in ("auto", "never"):
            raise ValueError(f"write {value.lower()}; other words are a checkpoint's folder")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.resume == "auto" and not self.run_id:
            raise ValueError("resume=auto needs run_id, the run to resume")
        if self.batch_size % self.num_processes:
            raise ValueError(
                f"batch_size = {self.batch_size} must be a multiple of num_processes = {self.num_processes}: every "
                "process takes as many prompts"
            )
        for rows, each in (("batch_size", "group_size"), ("anchor_batch_size", "anchor_responses")):
            sizes = self.only(rows, each, "max_new_tokens")
            if (tokens := math.prod(sizes.values())) > MOST_TOKENS:
                said = " x ".join(f"{name} = {size}" for name, size in sizes.items())
                raise ValueError(
                    f"{said} are {tokens:,} tokens at a time, more than {MOST_TOKENS:,}: lower one of them"
                )
        if self.load_in_4bit and not self.lora_rank:
            raise ValueError("load_in_4bit=true freezes the weights: set lora_rank (16 to 64) to have some to train")
        if self.backend != "ddp" and (self.lora_rank or self.optimizer != "adamw"):
            raise ValueError(
                f"backend = {self.backend!r} shards an AdamW over all weights: use lora_rank=0 and optimizer=adamw "
                "with it, or backend=ddp"
            )
        if ALGORITHMS[self.algo].extra and (self.backend != "ddp" or self.lora_rank):
            raise ValueError(
                f"algo = {self.algo!r} trains a third model, whole in every process: use backend=ddp and lora_rank=0 "
                f"with it (here backend = {self.backend!r}, lora_rank = {self.lora_rank})"
            )
        if ALGORITHMS[self.algo].by_token and self.advantages_over == "all":
            raise ValueError(f"advantages_over=all: algo {self.algo!r} has no statistics over the rewards of a group")
        if ALGORITHMS[self.algo].best_only and (self.kl == "reward" or self.advantages_over == "all"):
            raise ValueError(
                f"algo {self.algo!r} learns from the best response alone: use kl=loss and advantages_over=kept with it"
            )
        if self.max_kl and (ALGORITHMS[self.algo].best_only or self.freeze_policy):
            raise ValueError(f"max_kl = {self.max_kl}: algo=raft and freeze_policy=true measure no KL of whole groups")
        if RULES[self.rule].lookahead and self.backend != "ddp":
            raise ValueError(f"rule {self.rule!r} moves weights back and forth: use backend=ddp, not {self.backend!r}")
        if self.reward_shaping == "par" and RULES[self.rule].extra:
            raise ValueError(f"reward_shaping=par: rule {self.rule!r} rewards the current responses only")
        if self.ensemble > 1 and (self.rule != "frozen" or not self.bt_epochs):
            raise ValueError(
                f"ensemble = {self.ensemble} needs rule=frozen and a preference stage (bt_epochs above 0), which its "
                f"members differ in; here rule = {self.rule!r}, bt_epochs = {self.bt_epochs}"
            )
        if not self.preferences and (self.bt_epochs or RULES[self.rule].pairs or RULES[self.rule].centred):
            raise ValueError(
                f"preferences is empty, but stage 1 (bt_epochs = {self.bt_epochs}) or rule {self.rule!r} needs pairs"
            )
        if self.lora_rank and (self.policy_layers or self.reward_layers):
            raise ValueError(
                f"policy_layers = {self.policy_layers} and reward_layers = {self.reward_layers} choose among all "
                "weights: use lora_rank=0 with them"
            )
        if RULES[self.rule].checked and self.backend == "deepspeed_zero3":
            raise ValueError(f"rule {self.rule!r} cannot undo a block under deepspeed_zero3; use deepspeed_zero2")
        if self.policy_groups == "both_signs" and not RULES[self.rule].anchor:
            raise ValueError(f"policy_groups=both_signs needs a rule with an anchor, and rule {self.rule!r} has none")
        return self

    @property
    def share_of_pairs(self) -> float:
        return self.pairs_share or self.start_share

    @property
    def members(self) -> list[Config]:
        """The configurations whose preference stages give an ensemble's other members."""
        return [self.model_copy(update={"seed": self.seed + 1000 * i}) for i in range(1, self.ensemble)]

    @property
    def backbones(self) -> int:
        """Of an ensemble. One where no stage trains it: its members then differ in their reward heads alone."""
        return 1 if self.bt_backbone_lr == self.backbone_lr == 0 else self.ensemble

    def of_stage(self, stage: int) -> dict[str, Any]:
        """The fields that the results of the stages up to this one depend on."""
        marked = {name: field.json_schema_extra["stage"] for name, field in Config.model_fields.items()}
        return self.only(*(n for n, s in marked.items() if 1 <= s <= stage)) | {"pairs_share": self.share_of_pairs}

    def only(self, *names: str) -> dict[str, Any]:
        """The named fields as a plain dict, for cache keys and logs."""
        return {name: getattr(self, name) for name in names}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


_ONE = dict(num_processes=1, backend="ddp")
_SMALL = _ONE | dict(checkpoint_every=20, precision="float32", gradient_checkpointing=False)
PROFILES: dict[str, dict[str, Any]] = {
    # the embedded world: real transformers models of well under a million parameters, gold known exactly. Stage 1's
    # rate is one at which the head generalises (1e-2 overfits the 40 pairs). Where one response is polite, 70% of the
    # labels go to it: so a soundly trained reward model is still wrong, as in practice, and more pairs do not help
    "tiny": _SMALL
    | dict(
        threads=1,
        policy_model="embedded", reward_model="embedded", preferences="embedded", prompts="embedded",
        label_bias=1.0, bt_epochs=10, bt_batch_size=8, bt_backbone_lr=0.0, bt_head_lr=1e-3,
        anchor_lr=3e-3, anchor_epochs=20, anchor_prompts=256,
        total_steps=60, batch_size=16, group_size=12, backbone_lr=1e-6, reward_head_lr=2e-3, value_head_lr=3e-3,
        policy_lr=1e-4, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=10,
        eval_every=10, micro_batch_groups=16, micro_batch_responses=192, rollout_rows=512,
    ),
    # SmolLM2-135M-Instruct, instructions whose fulfilment code can check
    "smol": _SMALL
    | dict(
        threads=1, precision="bfloat16_cpu",
        policy_model="smollm2", reward_model="smollm2", policy_layers=10, reward_layers=16,
        preferences="data/smol_preferences.jsonl", prompts="data/smol_prompts.jsonl",
        eval_preferences="data/smol_heldout_preferences.jsonl", eval_prompts_source="data/smol_heldout_prompts.jsonl",
        bt_epochs=10, bt_batch_size=8, bt_backbone_lr=0.0, bt_head_lr=1e-3,
        anchor_prompts=32, anchor_responses=4, anchor_lr=1e-3, anchor_epochs=40, anchor_batch_size=16,
        total_steps=20, batch_size=4, group_size=8, backbone_lr=0.0, reward_head_lr=5e-4, value_head_lr=1e-3,
        policy_lr=5e-5, max_new_tokens=32, checkpoint_every=10, eval_every=0, eval_prompts=60, micro_batch_groups=8,
        micro_batch_responses=16, rollout_rows=128, guard_pairs=40, meta_lr=0.1,
    ),
    # the paper's models and data on one GPU. Adapters want about ten times the learning rate of full weights
    "single_gpu": _ONE
    | dict(
        lora_rank=64, optimizer="adamw_8bit", backbone_lr=1e-6, policy_lr=2e-5, rollout_rows=64,
    ),
    "paper": {},
}  # fmt: skip


_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong, _SHORT.maxlevel = 200, 80, 40, 2


def make_config(file: str | Path | None = None, **values: Any) -> Config:
    """Config from a profile (default tiny), a YAML file and explicit values, the later ones winning.

    Raises ConfigError naming each bad field with its value and the valid names or values.
    """
    merged = (_read(file) if file is not None else {}) | values
    check_names(merged, Config.model_fields)
    profile = merged.get("profile")
    profile = "tiny" if profile in (None, "") else profile
    base = PROFILES.get(profile, {}) if isinstance(profile, str) else {}
    try:
        return Config(**(base | merged | {"profile": profile}))
    except ValidationError as error:
        lines = [
            "".join(f"{part} = {shown(e['input'])}: " for part in e["loc"][:1]) + e["msg"].removeprefix("Value error, ")
            for e in error.errors()
        ]
        raise ConfigError("bad configuration: " + "; ".join(lines)) from None


def _read(file: str | Path) -> dict[str, Any]:
    """The names and values of a YAML file; the values are texts, of which each field makes what it is."""
    try:
        found = yaml.load(Path(file).read_text(encoding="utf-8-sig"), yaml.BaseLoader) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {str(file)!r} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"config file {str(file)!r} must hold 'name: value' lines, not a {type(found).__name__}")
    return found


def shown(value: Any) -> str:
    """A value as an error shows it, in some 200 characters at most."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return f"{type(value).__name__} too long to print"


def from_texts(pairs: Iterable[str]) -> dict[str, Any]:
    """name=value texts, as the command line has them -> values. A text field keeps its text to the letter.

    For other fields a number is one in any spelling (1e3 steps); the rest is text, which the field reads or refuses.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"{pair!r}: write name=value")
        field = Config.model_fields.get(name)
        values[name] = _number(value) if field and field.annotation in (int, float) else value
    return values


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def check_names(names: Any, valid: Any) -> None:
    """Raise ConfigError for each name that is not valid, with the nearest valid one and the list of all."""
    unknown = [name for name in names if name not in valid]
    if unknown:
        near = [
            difflib.get_close_matches(n, list(valid), n=1) if isinstance(n, str) and len(n) < 100 else []
            for n in unknown
        ]
        said = [shown(n) + (f" (did you mean {h[0]!r}?)" if h else "") for n, h in zip(unknown, near, strict=True)]
        more = f" and {len(said) - 5} others" if len(said) > 5 else ""
        raise ConfigError(f"unknown parameter {', '.join(said[:5])}{more}; valid names: {', '.join(sorted(valid))}")


def notebook_config(cells: list[str], also: tuple[str, ...] = ()) -> Config:
    """The Config of a notebook: its parameters cell, then what papermill injected. `None` means the profile's value.

    cells: the sources executed so far (`In` in a notebook); those that begin with `# Parameters` count.
    also: the notebook's own parameters that are no config fields.
    Pitfall: papermill accepts any name, so a misspelt `-p alg rloo` would train the default; here it raises.
    """
    values = notebook_parameters(cells)
    check_names(values, set(Config.model_fields) | set(also))
    return make_config(**{k: v for k, v in values.items() if k not in also and v is not None})


def notebook_parameters(cells: list[str]) -> dict[str, Any]:
    """name -> literal of every assignment in the cells that begin with `# Parameters`, later cells winning.

    Raises ConfigError for a value that is no literal, such as papermill's float("nan").
    """
    values: dict[str, Any] = {}
    for cell in cells:
        if cell.lstrip().startswith("# Parameters"):
            for node in ast.parse(cell).body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    name = node.targets[0].id
                    try:
                        values[name] = ast.literal_eval(node.value)
                    except ValueError:
                        said = shown(ast.unparse(node.value))
                        raise ConfigError(f"{name} = {said}: a parameter of a notebook is a literal") from None
    return values
