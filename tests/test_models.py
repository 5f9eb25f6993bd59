"""The value-anchored reward model: rendering, positions, scores, files."""

import pytest
import torch
from tiny_models import make_policy, make_reward_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from savelib.config import ConfigError, make_config
from savelib.data.chat import render
from savelib.models.adapters import save_merged
from savelib.models.loading import load_policy, load_reward_model
from savelib.models.reward_model import VALUE_HEAD_FILE, Encoded

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
