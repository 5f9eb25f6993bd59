"""The paper's method in torch alone. Rewards, masks and RM advantages are [B, G], values [B].

| paper | here |
|---|---|
| eq. 4, the reward model's advantage | `rm_advantages` |
| eq. 11, Bradley-Terry (stage 1) | `bradley_terry_loss` |
| eq. 12, 21, value loss (stage 2, loop) | `value_loss` |
| eq. 14, curriculum | `curriculum_threshold` |
| eq. 15-17, filter and sides | `partition`, `Partition` |
| eq. 18-19, L+ and L- of a prompt | `contrastive_terms`; their forces: `net_forces` |
| eq. 20, L_R | `save_loss` |
| table 1, baselines | `hl_bt_loss`, `self_labelled` (SER), `r2m_loss`; as rows: `RULES` |
| table 2, policy algorithms | `ALGORITHMS`, `policy_loss`; `policy_advantages`, `reinforce_pp_advantages`, ... |
| eq. 5, KL | `kl_k1`, `kl_k3`, `kl_penalized_rewards` |
| other remedies | `par_rewards`, `combined_rewards`, `metarm_difference`, `best_of_group` (RAFT), `oracle_loss` |
| ours | `mirrored_save_loss`, `skewness`, `feature_geometry` |
"""

from savelib.method.equations import (
    Partition,
    bradley_terry_loss,
    contrastive_terms,
    curriculum_threshold,
    net_forces,
    partition,
    rm_advantages,
    save_loss,
    value_loss,
)
from savelib.method.policy import (
    ALGORITHMS,
    Algorithm,
    kl_k1,
    kl_k3,
    kl_penalized_rewards,
    loss_weight,
    outcome_logits,
    outcomes,
    policy_advantages,
    policy_loss,
    prime_advantages,
    process_rewards,
    reinforce_pp_advantages,
)
from savelib.method.remedies import best_of_group, combined_rewards, metarm_difference, oracle_loss, par_rewards
from savelib.method.rules import RULES, GroupLoss, PairLabels, Rule, as_labelled
from savelib.method.variants import (
    feature_geometry,
    group_reward_entropy,
    hl_bt_loss,
    mirrored_save_loss,
    own_weight,
    r2m_loss,
    self_labelled,
    skewness,
)

__all__ = [
    "ALGORITHMS", "Algorithm", "GroupLoss", "PairLabels", "Partition", "RULES", "Rule", "as_labelled",
    "best_of_group", "bradley_terry_loss", "combined_rewards", "contrastive_terms", "curriculum_threshold",
    "feature_geometry", "group_reward_entropy", "hl_bt_loss", "kl_k1", "kl_k3", "kl_penalized_rewards",
    "loss_weight", "metarm_difference", "mirrored_save_loss", "net_forces", "oracle_loss", "outcome_logits",
    "outcomes", "own_weight", "par_rewards", "partition", "policy_advantages", "policy_loss", "prime_advantages",
    "process_rewards", "r2m_loss", "reinforce_pp_advantages", "rm_advantages", "save_loss", "self_labelled",
    "skewness", "value_loss",
]  # fmt: skip
