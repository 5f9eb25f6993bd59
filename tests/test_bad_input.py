"""Bad values of fields, config files, models and templates: each ends in one ConfigError with field and value."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import make_policy, make_reward_model

from savelib.config import Config, ConfigError, check_names, make_config, notebook_config
from savelib.models.loading import load_policy, load_reward_model

CPU = torch.device("cpu")
FIELDS = {kind: [n for n, f in Config.model_fields.items() if f.annotation is kind] for kind in (int, float, bool, str)}
CHOICES = [n for n, f in Config.model_fields.items() if f.annotation not in FIELDS]
BAD = {
    int: (
        math.nan,
        math.inf,
        -math.inf,
        -1,
        10**7,
        2**63,
        10**30,
        1.5,
        True,
        "x",
        "1e3",
        "",
        None,
        [],
        {"a": 1},
        "a\0b",
    ),
    float: (math.nan, math.inf, -math.inf, "nan", "inf", True, "x", "1,5", "", None, [1.0], {}, "\ud800", 10**400),
    bool: (2, -1, math.nan, "maybe", "", None, [True], "yes\n"),
    str: (None, ["x"], {"a": 1}, True, b"\xff", "a\nb", "a\0", "\x1b[31m", "x" * 1001, "\ud800"),
}
EMPTY_ALLOWED = ("run_id", "preferences", "eval_preferences", "eval_prompts_source", "guard_preferences")


def said(call, *args, **values):
    """The message of the ConfigError that a call must end in: one line or a few, short enough to read."""
    with pytest.raises(ConfigError) as caught:
        call(*args, **values)
    message = str(caught.value)
    assert len(message) < 2500 and "Traceback" not in message, message
    message.encode()  # what a terminal cannot show would be an error of its own
    return message


def refused(field, value):
    """The error names the field and shows the value."""
    message = said(make_config, **{field: value})
    shown = repr(value) if len(repr(value)) < 40 else repr(value)[:8]
    assert message.startswith(f"bad configuration: {field} = {shown}") or message.startswith("unknown"), message
    assert message.count(f"{field} = ") == 1


@pytest.mark.parametrize("field", FIELDS[int])
def test_no_field_takes_what_is_no_whole_number_within_reason(field):
    for value in BAD[int]:
        if not (field == "checkpoint_every" and value == 0) and not (field.endswith("seed") and value == 10**7):
            refused(field, value)


@pytest.mark.parametrize("field", FIELDS[float])
def test_no_field_takes_what_is_no_finite_number(field):
    for value in BAD[float]:
        refused(field, value)


@pytest.mark.parametrize("field", FIELDS[bool])
def test_no_field_takes_what_is_neither_true_nor_false(field):
    for value in BAD[bool]:
        refused(field, value)


@pytest.mark.parametrize("field", FIELDS[str])
def test_no_field_takes_what_is_no_plain_text(field):
    for value in BAD[str] + (() if field in EMPTY_ALLOWED else ("", "  ")):
        if field != "profile" or value not in (None, ""):  # which mean tiny
            refused(field, value)


@pytest.mark.parametrize("field", CHOICES)
def test_no_choice_takes_another_word(field):
    for value in ("nope", "", None, 1, True, [], "GRPO", "a\nb"):
        refused(field, value)


@pytest.mark.parametrize(("field", "value"), [
    ("run_id", "studies"), ("run_id", "a/b"), ("run_id", ".."), ("run_id", ".hidden"), ("run_id", "x" * 201),
    ("run_id", " a"), ("run_id", "é" * 101), ("device", "meta"), ("device", "cpu:0x"), ("device", "CUDA"),
    ("device", "cuda:1000"), ("resume", "AUTO"), ("resume", "Never"), ("profile", "Tiny"), ("profile", 0),
    ("rule", "SAVE"), ("algo", "ppo"), ("seed", 2**32), ("threads", 1025), ("temperature", 1e-3), ("top_p", 0),
    ("label_noise", 0.5), ("start_share", 1.0), ("initial_margin", 1.01), ("policy_lr", 1e31), ("total_steps", 10**7),
    ("certificate_alpha", 0), ("world_seed", -1), ("group_size", 1), ("beta", -1e-300),
])  # fmt: skip
def test_values_beyond_the_fields_limits(field, value):
    refused(field, value)


@pytest.mark.parametrize(("values", "words"), [
    (dict(batch_size=10**6, group_size=10**6), "batch_size = 1000000 x group_size = 1000000 x max_new_tokens = 10"),
    (dict(anchor_batch_size=10**6, anchor_responses=10**6), "anchor_batch_size = 1000000 x anchor_responses = 1000000"),
    (dict(resume="auto"), "resume=auto needs run_id"),
    (dict(batch_size=3, num_processes=2), "batch_size = 3 must be a multiple of num_processes = 2"),
    (dict(load_in_4bit=True), "load_in_4bit=true .* lora_rank"),
    (dict(batchsize=4), r"'batchsize' \(did you mean 'batch_size'\?\)"),
    ({"x" * 5000: 1}, "unknown parameter 'xxx"),
    ({f"x{i}": 1 for i in range(300)}, "'x4' and 295 others; valid names"),
])  # fmt: skip
def test_values_that_do_not_go_together(values, words):
    message = said(make_config, **values)
    assert re.search(words, message), message


FILES = {
    "a list": b"- a\n",
    "a text": b"just words\n",
    "a number": b"3\n",
    "unfinished": b"seed: [1,\n",
    "an unknown alias": b"seed: *jsonl\n",
    "a tab": b"seed:\n\t- 1\n",
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "UTF-16": "seed: 1\n".encode("utf-16"),
    "Latin-1": "run_id: Grüße\n".encode("latin-1"),
    "binary": bytes(range(256)),
    "a null byte": b"run_id: a\0b\n",
    "nested too deep": b"seed: " + b"[" * 600 + b"]" * 600,
    "a bomb": b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(8)
    ) + b"run_id: *i\n",
    "a key that is a number": b"1: 2\n",
    "a key that is a list": b"? [a]\n: 2\n",
    "a value that is null": b"seed: null\n",
    "a value that is missing": b"seed:\n",
    "a value that is infinite": b"beta: .inf\n",
    "a Python object": b"run_id: !!python/object/apply:os.system ['true']\n",
    "a misspelt name": b"sed: 3\n",
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_config_files(tmp_path, name):
    file = tmp_path / "config.yaml"
    file.write_bytes(FILES[name])
    message = said(make_config, file)
    about_value = ("bad configuration: ", "unknown parameter ")
    assert message.startswith(about_value) or message.startswith(f"config file '{file}'"), message


def test_config_files_that_are_none(tmp_path):
    for path in (tmp_path, tmp_path / "none.yaml", "a\0b.yaml", "x" * 300):
        assert said(make_config, path).startswith("config file ")


def test_a_text_in_a_config_file_keeps_its_letters(tmp_path):
    file = tmp_path / "config.yaml"
    for text in ("0123", "1_000", "12:30:00", "1e3", "yes", "null", "2026-01-01", "0x10", "~x"):
        file.write_text(f"run_id: {text}\nbeta: 1e-6\nfreeze_policy: yes\nseed: 7\n")
        made = make_config(file)
        assert (made.run_id, made.beta, made.freeze_policy, made.seed) == (text, 1e-6, True, 7)


@pytest.mark.parametrize(("cell", "words"), [
    ("# Parameters\nbeta = float('nan')", "beta = "),
    ("# Parameters\nseed = len('abc')", "seed = "),
    ("# Parameters\nseed = other", "seed = 'other'"),
    ("# Parameters\nalg = 'rloo'", "did you mean 'algo'"),
    ("# Parameters\nseed = 1e400", "seed = inf"),
])  # fmt: skip
def test_parameters_of_notebooks(cell, words):
    assert words in said(notebook_config, [cell])


def test_names_that_are_no_texts():
    assert "unknown parameter 1, None" in said(check_names, [1, None], Config.model_fields)


# models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"policy_model": make_policy(folder / "policy"), "reward_model": make_reward_model(folder / "reward")}


def config_with(**values):
    return lambda f: (f / "config.json").write_text(json.dumps(json.loads((f / "config.json").read_text()) | values))


def cut(name, size):
    return lambda f: (f / name).write_bytes((f / name).read_bytes()[:size])


def text_of(name, text):
    return lambda f: (f / name).write_text(text)


def gone(*names):
    return lambda f: [(f / name).unlink() for name in names]


DAMAGE = {
    "no files": lambda f: [p.unlink() for p in f.iterdir()],
    "no config.json": gone("config.json"),
    "config.json is empty": text_of("config.json", ""),
    "config.json is cut": cut("config.json", 40),
    "config.json is a list": text_of("config.json", "[]"),
    "config.json is null": text_of("config.json", "null"),
    "an unknown kind of model": config_with(model_type="nope"),
    "no kind of model": config_with(model_type=None),
    "another kind of model": config_with(model_type="bert"),
    "another vocabulary": config_with(vocab_size=70),
    "another width": config_with(hidden_size=48),
    "no width": config_with(hidden_size=0),
    "a width that is a text": config_with(hidden_size="wide"),
    "heads that do not divide": config_with(num_attention_heads=7),
    "no heads": config_with(num_attention_heads=0),
    "more layers": config_with(num_hidden_layers=4, layer_types=None),
    "an unknown activation": config_with(hidden_act="nope"),
    "no weights": gone("model.safetensors"),
    "weights are empty": text_of("model.safetensors", ""),
    "weights are cut": cut("model.safetensors", 5000),
    "weights are a text": text_of("model.safetensors", "hello " * 50),
    "weights have no names": lambda f: save_file({}, f / "model.safetensors", {"format": "pt"}),
    "weights of another model": lambda f: save_file({"x": torch.ones(2)}, f / "model.safetensors", {"format": "pt"}),
    "no tokenizer": gone("tokenizer.json", "tokenizer_config.json"),
    "tokenizer.json is cut": cut("tokenizer.json", 200),
    "tokenizer.json is empty": text_of("tokenizer.json", ""),
    "tokenizer.json is a list": text_of("tokenizer.json", "[]"),
    "tokenizer_config.json is cut": cut("tokenizer_config.json", 30),
    "template: constant": text_of("chat_template.jinja", "Hello!"),
    "template: no syntax": text_of("chat_template.jinja", "{% for m in messages %}{{ m.content"),
    "template: raises": text_of("chat_template.jinja", "{{ raise_exception('no') }}"),
    "template: divides by 0": text_of("chat_template.jinja", "{{ messages[0].content }}{{ 1 / 0 }}"),
    "template: an unknown filter": text_of("chat_template.jinja", "{{ messages | nope }}"),
    "template: an unknown name": text_of("chat_template.jinja", "{{ nothing.at.all }}"),
    "template: reaches out": text_of("chat_template.jinja", "{{ messages.__class__.__mro__[1].__subclasses__() }}"),
    "template: empty": text_of("chat_template.jinja", ""),
}  # fmt: skip


WORDS = {
    "an unknown activation": "its config.json, or the weights beside it, cannot be used (KeyError: ",
    "a width that is a text": "'hidden_size':",
    "config.json is null": "its config.json or tokenizer files cannot be used (TypeError: ",
    "tokenizer.json is cut": "its config.json or tokenizer files cannot be used (JSONDecodeError: ",
    "weights are cut": "its weights are no whole safetensors file",
}


@pytest.mark.parametrize("field", ["policy_model", "reward_model"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_models(models, tmp_path, field, damage):
    folder = tmp_path / "model"
    shutil.copytree(models[field], folder)
    DAMAGE[damage](folder)
    load = (
        (lambda s: load_policy(s, CPU))
        if field == "policy_model"
        else lambda s: load_reward_model(s, make_config(), CPU)
    )
    message = said(load, str(folder))
    assert message.startswith(f"{field} = '{folder}'"), message
    part = next(word for word in ("template", "tokenizer", "config", "weights", "") if damage.startswith(word))
    assert part in message.replace(str(folder), ""), message
    if damage in WORDS:
        assert WORDS[damage] in message


@pytest.mark.parametrize(
    "source", ["/no/such", "./no", "~/no-such", "no-such-model", "a/b/c", "owner/no-such", "x" * 900, "~nobody/x"]
)
def test_models_that_are_not_there(source):
    assert said(load_policy, source, CPU).startswith(f"policy_model = '{source}'")
    assert said(load_reward_model, source, make_config(), CPU).startswith(f"reward_model = '{source}'")
