"""One table of colours: the same rule, remedy, side or metric has the same colour in every figure."""

COLOURS = {
    "save": "#1b6ca8", "save_checked": "#2f4b7c", "mean_reward": "#d1495b", "hl_bt": "#edae49", "offline_bt": "#8d6a9f",
    "ser": "#a05c3b", "r2m": "#5b8e3e", "frozen": "#6c757d", "frozen_filtered": "#b5838d",
    "save_either_way": "#e0592a", "save_zero_net_force": "#12908e", "spread": "#7a5195",  # in shipped results
    "metarm": "#00a5cf", "par": "#f06595", "save_par": "#7fb2dd", "raft": "#b5179e", "oracle": "#111111",
    "ensemble_mean": "#8fd694", "ensemble_wco": "#1b7f5c", "ensemble_uwo": "#4caf7d",
    "positive": "#2a9d4a", "negative": "#c8553d", "left out": "#b8b8b8", "kept": "#333333",
}  # fmt: skip
LINES = {  # metric -> colour, where several metrics of one run are in a figure
    "filter/positive": COLOURS["positive"], "filter/negative": COLOURS["negative"], "filter/kept": "#333333",
    "force/pull": COLOURS["positive"], "force/push": COLOURS["negative"], "threshold": "#1b6ca8",
    "reward/mean": "#1b6ca8", "value/mean": "#edae49", "gold/success_rate": "#333333",
    "eval/rm_accuracy": "#1b6ca8", "eval/rm_accuracy_current": "#12908e", "eval/gold": "#333333",
    "eval/reward": "#12908e", "value/error": "#edae49", "eval/value_error": "#a05c3b",
    "gold/pseudo_label_accuracy": "#2a9d4a", "policy/kl": "#7a5195",
    "time/rollout": "#edae49", "time/reward_model": "#1b6ca8", "time/policy": "#7a5195",
}  # fmt: skip
