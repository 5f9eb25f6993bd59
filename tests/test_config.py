"""The configuration: one definition of each field, profiles, errors that name field, value and remedy."""

import csv
from pathlib import Path

import pytest
import yaml

from savelib.config import PROFILES, Config, ConfigError, make_config, notebook_config

TABLE8 = {
    "responses per prompt K": "anchor_responses", "value head learning rate": None, "batch size": "anchor_batch_size",
    "epochs": "anchor_epochs", "training steps T": "total_steps", "batch size (prompts)": "batch_size",
    "group size G": "group_size", "initial margin m0": "initial_margin",
    "value loss weight lambda_V": "value_loss_weight",
    "KL penalty beta": "beta", "backbone and reward head learning rate": "backbone_lr",
    "policy learning rate": "policy_lr",
    "max generation length (tokens)": "max_new_tokens", "temperature": "temperature",
    "top-p": "top_p", "top-k": "top_k",
}  # fmt: skip


def test_the_paper_profile_is_table_8():
    config = make_config(profile="paper")
    text = (Path(__file__).parent.parent / "data/paper/table8_hyperparameters.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == 17
    for row in rows:
        name = TABLE8[row["name"]] or ("anchor_lr" if row["stage"].startswith("value") else "value_head_lr")
        assert getattr(config, name) == float(row["value"]), name
    assert config.reward_head_lr == config.backbone_lr
    assert PROFILES["paper"] == {}


def test_every_field_says_where_it_comes_from_and_what_it_is():
    for name, field in Config.model_fields.items():
        assert field.json_schema_extra["paper"] and field.description, name


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_are_valid_and_survive_yaml(profile, tmp_path):
    config = make_config(profile=profile, seed=3)
    path = tmp_path / "c.yaml"
    path.write_text(config.to_yaml())
    assert make_config(path) == config
    assert make_config(path, seed=4).seed == 4
    assert yaml.safe_load(config.to_yaml())["profile"] == profile


@pytest.mark.parametrize(("values", "said"), [
    (dict(algo="rlo"), "algo = 'rlo': not one of grpo, gspo, rloo, reinforce_pp"),
    (dict(profile="big"), "profile = 'big': not one of tiny, smol, single_gpu, paper"),
    (dict(rule="sav"), "rule = 'sav': not one of save"),
    (dict(group_size=1), "group_size = 1: .*greater than or equal to 2"),
    (dict(alg="rloo"), r"'alg' \(did you mean 'algo'\?\); valid names: advantages_over"),
    (dict(run_id="../x"), "plain folder name"),
    (dict(resume="auto"), "resume=auto needs run_id"),
    (dict(policy_groups="both_signs", rule="hl_bt"), "both_signs needs a rule with an anchor"),
    (dict(preferences=""), r"preferences is empty, but stage 1 \(bt_epochs = 10\)"),
    (dict(preferences="", bt_epochs=0, rule="offline_bt"), "rule 'offline_bt' needs pairs"),
    (dict(preferences="", bt_epochs=0, rule="save_checked"), "rule 'save_checked' needs pairs"),
    (dict(temperature=0), "temperature = 0"),
])  # fmt: skip
def test_bad_values_are_named(values, said):
    with pytest.raises(ConfigError, match=said):
        make_config(**values)


def test_a_config_file_must_be_a_mapping(tmp_path):
    (tmp_path / "c.yaml").write_text("- algo\n")
    with pytest.raises(ConfigError, match="must hold 'name: value' lines, not a list"):
        make_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        make_config(tmp_path / "none.yaml")


def test_notebook_parameters_come_from_the_cells_papermill_wrote():
    cells = [
        "# Parameters\nprofile = 'tiny'  # which\nalgo = None\nruns = ''",
        '# Parameters\nalgo = "rloo"\ntotal_steps = 5\n',
        "seed = 9",
    ]
    config = notebook_config(cells, also=("runs",))
    assert (config.algo, config.total_steps, config.seed) == ("rloo", 5, 0)
    with pytest.raises(ConfigError, match="'runs'"):
        notebook_config(cells)
    with pytest.raises(ConfigError, match="did you mean 'algo'"):
        notebook_config([*cells, "# Parameters\nalg = 'rloo'"], also=("runs",))
