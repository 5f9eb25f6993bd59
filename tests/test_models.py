"""The value-anchored reward model: rendering, positions, scores, files."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import make_policy, make_reward_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from savelib.config import ConfigError, make_config
from savelib.data.chat import load_tokenizer, render
from savelib.data.pairs_and_prompts import Prompt
from savelib.models.adapters import save_merged
from savelib.models.loading import load_policy, load_reward_model
from savelib.models.reward_model import VALUE_HEAD_FILE, Encoded
from savelib.models.rollout import sample

CPU = torch.device("cpu")
CONFIG = make_config()
PROMPT = [{"role": "user", "content": "Say hello."}]
TALK = [(PROMPT, "Hello!"), (PROMPT, "Hello there, how are you today?"), ([{"role": "user", "content": "Hm"}], "No")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(make_reward_model(tmp_path_factory.mktemp("rm")))


@pytest.fixture
def rm(llama):
    return load_reward_model(llama, CONFIG, CPU)


def plain_score(folder, messages, response):
    """R by the model's own forward, one conversation at a time, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = render(tokenizer, [*messages, {"role": "assistant", "content": response}])
    with torch.no_grad():
        return model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item()


def test_scores_equal_the_models_own_whatever_the_batch(rm, llama):
    together = rm.score(rm.encode(TALK)).rewards
    alone = torch.cat([rm.score(rm.encode([c])).rewards for c in TALK])
    own = torch.tensor([plain_score(llama, *c) for c in TALK])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, own, atol=1e-5, rtol=1e-5)


def test_exactly_one_bos_and_a_fixed_date(rm):
    ids = rm.encode(TALK).ids
    assert all(row.count(rm.tokenizer.bos_token_id) == 1 and row[0] == rm.tokenizer.bos_token_id for row in ids)
    assert "26 Jul 2024" in rm.tokenizer.decode(ids[0])


def test_value_reads_the_end_of_the_user_turn(rm):
    encoded = rm.encode(TALK)
    for row, end in zip(encoded.ids, encoded.prompt_ends, strict=True):
        assert row[end] == rm.tokenizer.eos_token_id
        said = rm.tokenizer.decode(row[: end + 1])
        assert said.endswith(("Say hello.<|eot_id|>", "Hm<|eot_id|>"))


def test_value_can_read_the_generation_prompt(llama):
    rm = load_reward_model(llama, make_config(value_position="generation_prompt"), CPU)
    encoded = rm.encode(TALK)
    for row, end in zip(encoded.ids, encoded.prompt_ends, strict=True):
        assert rm.tokenizer.decode(row[: end + 1]).endswith("assistant<|end_header_id|>\n\n")


@pytest.mark.parametrize("position", ["user_turn", "generation_prompt"])
def test_value_from_the_scoring_forward_equals_a_prompt_forward(llama, position):
    rm = load_reward_model(llama, make_config(value_position=position), CPU)
    encoded = rm.encode(TALK)
    shared = rm.score(encoded).prompt_hidden
    for i, (row, end) in enumerate(zip(encoded.ids, encoded.prompt_ends, strict=True)):
        alone = rm.score(Encoded([row[: end + 1]], [end])).prompt_hidden[0]
        torch.testing.assert_close(shared[i], alone, atol=1e-5, rtol=1e-5)


def test_bidirectional_reward_models_keep_the_response_out_of_v(tmp_path):
    rm = load_reward_model(str(make_reward_model(tmp_path, kind="bert")), CONFIG, CPU)
    assert not rm.scorer.causal
    scored = rm.score(rm.encode(TALK))
    torch.testing.assert_close(scored.prompt_hidden[0], scored.prompt_hidden[1], atol=1e-5, rtol=1e-5)
    own = torch.tensor([plain_score(tmp_path, *c) for c in TALK])
    torch.testing.assert_close(scored.rewards, own, atol=1e-5, rtol=1e-5)


def test_two_tokenizers_that_disagree(rm, tmp_path):
    """The policy's text, not its ids, reaches the reward model."""
    _, policy_tokenizer = load_policy(str(make_policy(tmp_path)), CPU)
    text = "Grüße, 你好!"
    ids = policy_tokenizer(text, add_special_tokens=False)["input_ids"]
    back = policy_tokenizer.decode(ids, skip_special_tokens=True)
    encoded = rm.encode([(PROMPT, back)])
    assert encoded.ids[0][-1 - len(ids) : -1] != ids
    assert rm.tokenizer.decode(encoded.ids[0]).endswith(text + "<|eot_id|>")


def save(rm, folder):
    save_merged(rm.model, "", folder)
    rm.tokenizer.save_pretrained(folder)
    rm.save_value_head(folder)


def test_saved_model_loads_plainly_and_again_with_its_value_head(rm, tmp_path):
    with torch.no_grad():
        rm.value_head[-1].weight.normal_()
        rm.value_head[-1].bias.fill_(0.7)
        rm.model.score.weight.add_(0.1)
    save(rm, tmp_path)
    assert (tmp_path / VALUE_HEAD_FILE).is_file()
    again = load_reward_model(str(tmp_path), CONFIG, CPU)
    encoded = rm.encode(TALK)
    a, b = rm.score(encoded), again.score(encoded)
    torch.testing.assert_close(a.rewards, b.rewards)
    torch.testing.assert_close(rm.values(a.prompt_hidden), again.values(b.prompt_hidden))
    torch.testing.assert_close(a.rewards, torch.tensor([plain_score(tmp_path, *c) for c in TALK]), atol=1e-5, rtol=1e-5)


def test_a_value_head_of_another_kind_is_refused(rm, tmp_path):
    save(rm, tmp_path)
    with pytest.raises(ConfigError, match="value head was made with"):
        load_reward_model(str(tmp_path), make_config(value_head="mlp"), CPU)


def test_a_causal_lm_becomes_a_reward_model_that_starts_at_zero(tmp_path):
    rm = load_reward_model(str(make_policy(tmp_path, "qwen3")), CONFIG, CPU)
    assert rm.score(rm.encode(TALK)).rewards.tolist() == [0, 0, 0]


def edited(folder, file, **values):
    """The folder, with values of a JSON file in it changed."""
    made = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(made | values))
    return str(folder)


def reweighted(folder, name, change):
    """The folder, with one of its weights changed, or left out for a change to None."""
    weights = load_file(folder / "model.safetensors")
    weights = {k: change(v) if k == name else v for k, v in weights.items()}
    save_file({k: v for k, v in weights.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_weights_that_a_folder_lacks_are_named_and_never_made_up(llama, tmp_path):
    with pytest.raises(ConfigError, match=f"policy_model = '{llama}' lacks weights .*: lm_head.weight; give"):
        load_policy(llama, CPU)
    with pytest.raises(ConfigError, match=r"reward_model = .* lacks weights: score.weight; .* \(here 0\), which train"):
        load_reward_model(str(make_policy(tmp_path / "lm")), make_config(bt_epochs=0), CPU)
    norm = reweighted(make_reward_model(tmp_path / "no_norm"), "model.norm.weight", lambda w: None)
    with pytest.raises(ConfigError, match="lacks weights: model.norm.weight"):
        load_reward_model(norm, CONFIG, CPU)
    bert = reweighted(make_reward_model(tmp_path / "bert", kind="bert"), "classifier.bias", lambda w: None)
    assert load_reward_model(bert, CONFIG, CPU).model.classifier.bias.item() == 0
    some = reweighted(make_policy(tmp_path / "some"), "lm_head.weight", lambda w: w.clone().fill_(float("nan")))
    with pytest.raises(ConfigError, match="holds weights that are not finite: lm_head.weight; get it again"):
        load_policy(some, CPU)


def test_configs_tokenizers_and_weights_that_do_not_fit_are_named(tmp_path):
    other = edited(make_policy(tmp_path / "vocab"), "config.json", vocab_size=300)
    with pytest.raises(ConfigError, match=r"lm_head.weight has the shape \[259, 32\] in its files, and \[300, 32\]"):
        load_policy(other, CPU)
    small = make_reward_model(tmp_path / "small")
    edited(small, "config.json", vocab_size=100, pad_token_id=0)
    reweighted(small, "model.embed_tokens.weight", lambda w: w[:100].clone())
    with pytest.raises(ConfigError, match="its tokenizer has 261 tokens, but the model has embeddings of 100"):
        load_reward_model(str(small), CONFIG, CPU)
    policy, tokenizer = load_policy(str(make_policy(tmp_path / "added")), CPU)
    tokenizer.add_tokens(["colour"])
    with pytest.raises(ConfigError, match="policy_model: its tokenizer gives token 259, .* embeddings of 259 tokens"):
        sample(policy, tokenizer, [Prompt("p", [{"role": "user", "content": "a colour"}])], 2, CONFIG)


@pytest.mark.parametrize("change", ["cut", "no file", "shape", "nan", "names"])
def test_a_damaged_value_head_is_named(rm, tmp_path, change):
    save(rm, tmp_path)
    file = tmp_path / VALUE_HEAD_FILE
    with safe_open(file, "pt") as opened:
        metadata, whole = opened.metadata(), file.read_bytes()
    if change in ("cut", "no file"):
        file.write_bytes(whole[:-20] if change == "cut" else b"")
    else:
        weights = load_file(file)
        weights |= {"shape": {"0.weight": torch.zeros(1, 31)}, "nan": {"0.bias": torch.full((1,), float("nan"))}}.get(
            change, {"1.bias": torch.zeros(1)}
        )
        save_file(weights, file, metadata)
    with pytest.raises(ConfigError, match=f"{file} (is damaged|holds .*needs)"):
        load_reward_model(str(tmp_path), CONFIG, CPU)


@pytest.mark.parametrize(("template", "said"), [
    ("Hello!", "leaves out what the prompt says: 'a plain question' is not in 'Hello!'"),
    ("{{ messages[0].content }}", "leaves out what the response says: 'a plain answer' is not in"),
    ("{{ raise_exception('only assistants') }}", "refuses the conversation that begins .*: only assistants"),
    ("{% for m in messages %}{{ m.content", "refuses the conversation that begins .*: unexpected"),
    ("{{ messages[7].content.strip() }}", "refuses the conversation that begins .*: .*undefined|has no element"),
    ("", "has no chat template"),
])  # fmt: skip
@pytest.mark.parametrize("field", ["policy_model", "reward_model"])
def test_a_template_that_fails_or_leaves_out_the_text_is_named(tmp_path, field, template, said):
    folder = make_policy(tmp_path / "p")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match=f"^{field} = '{folder}'.*{said}"):
        load_tokenizer(str(folder), field)


def test_a_conversation_that_a_template_refuses_is_shown(tmp_path):
    folder = make_policy(tmp_path)
    template = (folder / "chat_template.jinja").read_text()
    system = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(system + template)
    tokenizer = load_tokenizer(str(folder), "policy_model")
    with pytest.raises(ConfigError, match="refuses the conversation .*Be kind.*: System role not supported"):
        render(tokenizer, [{"role": "system", "content": "Be kind."}, *PROMPT])


def test_bad_models_are_named(tmp_path):
    with pytest.raises(ConfigError, match="2 labels"):
        load_reward_model(str(make_reward_model(tmp_path / "two", num_labels=2)), CONFIG, CPU)
    with pytest.raises(ConfigError, match="policy_model = .*no chat template"):
        load_policy(str(make_policy(tmp_path / "bare", chat_template=False)), CPU)
    with pytest.raises(ConfigError, match="reward_model = '/no/such': no such folder"):
        load_reward_model("/no/such", CONFIG, CPU)
    with pytest.raises(ConfigError, match="policy_model = 'no-such-owner/no-such-model'"):
        load_policy("no-such-owner/no-such-model", CPU)
    with pytest.raises(ConfigError, match="context of 512"):
        rm = load_reward_model(str(make_reward_model(tmp_path / "short")), CONFIG, CPU)
        rm.encode([(PROMPT, "x" * 600)])
