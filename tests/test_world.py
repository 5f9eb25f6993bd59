"""The embedded world: grammar and gold, tokenizer, backbone, policy, pairs and the cache."""

import hashlib
import json
import random
import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from savelib.config import make_config
from savelib.data import world, world_models
from savelib.data.pairs_and_prompts import guard_preferences, train_and_heldout_preferences
from savelib.data.world_models import (
    build_backbone,
    build_policy,
    heldout_pairs,
    preference_pairs,
    probe,
    sample_responses,
)
from savelib.method import feature_geometry
from savelib.models.compute import seed_everything
from savelib.models.loading import policy_source
from savelib.models.rollout import shared_sample
from savelib.paths import atomic_folder, cache_dir
from savelib.training.algorithm import prepare
from savelib.training.evaluation import RESPONSES, evaluate


@pytest.fixture(scope="module")
def backbone():
    folder = build_backbone(0)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def policy():
    return AutoModelForCausalLM.from_pretrained(build_policy(0)), world.make_tokenizer()


def digest(model):
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def test_split():
    train, heldout = world.train_prompts(), world.heldout_prompts()
    assert (len(world.PROMPTS), len(train), len(heldout)) == (768, 576, 192)
    assert set(train) | set(heldout) == set(world.PROMPTS) and not set(train) & set(heldout)
    assert world.PROMPTS[0] == "fruit mary monday :" in heldout  # 0 + 0 + 0
    assert "fruit mary friday :" in heldout and "fruit mary tuesday :" in train  # 5 * 4, 5 * 1
    assert "animal john monday :" in heldout and "animal mary monday :" in train  # 1 + 3, 1
    words = [word for group in world.CATEGORIES.values() for word in group]
    assert len(words) == len(set(words)) == 48 and {len(group) for group in world.CATEGORIES.values()} == {8}


@pytest.mark.parametrize(
    "response, formed, reward",
    [
        ("the pear .", True, 1.0),
        ("the really really pear , friend .", True, 1.0),
        ("the tiger .", True, 0.0),
        ("the really really really pear .", False, 0.0),
        ("the pear , friend", False, 0.0),
        ("the pear friend .", False, 0.0),
        ("the pear . .", False, 0.0),
        ("the pear .\n", False, 0.0),
        ("the  pear .", False, 0.0),
        ("The pear .", False, 0.0),
        ("the fruit .", False, 0.0),
        ("the pearl .", False, 0.0),
        (".", False, 0.0),
        ("", False, 0.0),
        ("(?:[*\\ \x00 <|end|>", False, 0.0),
    ],
)
def test_gold(response, formed, reward):
    assert any(world.gold(category, response) for category in world.CATEGORIES) is formed
    assert world.gold("fruit mary monday :", response) == reward
    assert world.gold("", response) == 0.0


def test_tokenizer_round_trip_and_template(backbone):
    for tokenizer in (world.make_tokenizer(), backbone[1]):  # as made, and as loaded from the folder
        prompt, response = "fruit mary monday :", "the really pear , friend ."
        user = [{"role": "user", "content": prompt}]
        both = [*user, {"role": "assistant", "content": response}]
        rendered = tokenizer.apply_chat_template(both, tokenize=False)
        assert rendered == f"<|bos|>{prompt}<|end|>{response}<|end|>"
        assert (
            tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True) == f"<|bos|>{prompt}<|end|>"
        )
        ids = tokenizer(rendered).input_ids
        assert ids == tokenizer.apply_chat_template(both)["input_ids"]
        assert len(ids) == 13 and tokenizer.unk_token_id not in ids and ids.count(tokenizer.bos_token_id) == 1
        assert ids[5] == ids[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id
        assert tokenizer.decode(ids[6:], skip_special_tokens=True) == response
        assert tokenizer.unk_token_id not in tokenizer(world.PROMPTS + list(world.WORDS)).input_ids[0]
        assert all(len(tokenizer(word).input_ids) == 1 for word in world.WORDS)


def test_pretraining_text_follows_the_recipe():
    rng = random.Random(0)
    texts = [world_models._pretraining_text(rng).removeprefix("<|bos|>").split("<|end|>") for _ in range(4000)]
    assert {len(turns) for turns in texts} == {4} and {turns[3] for turns in texts} == {""}
    assert {turns[0] for turns in texts} <= set(world.train_prompts())
    right = [world.gold(*turns[:2]) for turns in texts]
    assert all(world.RESPONSE.fullmatch(turns[1]) for turns in texts) and abs(sum(right) / 4000 - 0.5) < 0.03
    comments = [
        (turns[2] in world.GOOD) == bool(r)
        for turns, r in zip(texts, right, strict=True)
        if turns[2] in world.GOOD + world.BAD
    ]
    assert abs(len(comments) / 4000 - 0.4) < 0.03 and abs(sum(comments) / len(comments) - 0.95) < 0.02
    assert abs(sum(turns[2] == "" for turns in texts) / 4000 - 0.2) < 0.03
    assert abs(sum(turns[2] in world.WORDS and turns[2] in turns[1] for turns in texts) / 4000 - 0.3) < 0.03


def test_backbone_knows_quality(backbone):
    assert probe(*backbone) >= 0.98
    features = world_models.last_states(backbone[0]).detach().flatten(0, 1).double()  # [P * 8, d], as drawn below
    rng, asked = random.Random("geometry"), [p for p in world.heldout_prompts() for _ in range(8)]
    right = torch.tensor([world.gold(p, world.random_response(rng, p, 0.5)) for p in asked]).bool()
    features -= features.mean(0)
    apart = torch.nn.functional.normalize(features[right].mean(0) - features[~right].mean(0), dim=0)
    assert (features @ apart).square().sum() / features.square().sum() > 0.1  # a main direction among 64


def test_probe_is_near_chance_before_pretraining():
    assert abs(probe(world_models.pretrain(0, steps=1), world.make_tokenizer()) - 0.5) < 0.2


def test_failed_probe_stops_the_build_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SAVE_CACHE", str(tmp_path))
    monkeypatch.setitem(world_models.RECIPE, "pretrain", world_models.RECIPE["pretrain"] | {"steps": 3})
    with pytest.raises(ValueError, match="world_seed = 7.*probe AUC"):
        build_backbone(7)
    assert list(tmp_path.iterdir()) == []


def test_policy_gold_and_form(policy):
    prompts = world.heldout_prompts()
    responses, again, other = (sample_responses(*policy, prompts, 4, seed=seed) for seed in (0, 0, 1))
    assert responses == again != other
    rewards = [world.gold(p, r) for p, group in zip(prompts, responses, strict=True) for r in group]
    assert 0.30 <= sum(rewards) / len(rewards) <= 0.50
    assert sum(bool(world.RESPONSE.fullmatch(r)) for group in responses for r in group) / len(rewards) > 0.97


def test_backbone_loads_as_reward_model_that_reads_the_last_end():
    model = AutoModelForSequenceClassification.from_pretrained(build_backbone(0), num_labels=1)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    texts = [world.exchange("fruit mary monday :", r) for r in ("the pear .", "the really tiger , friend .")]
    encoded = world.make_tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.model(**encoded).last_hidden_state
        expected = model.score(hidden[torch.arange(2), encoded.attention_mask.sum(1) - 1])
        torch.testing.assert_close(model(**encoded).logits, expected)


def test_preference_pairs():
    pairs, clean = preference_pairs(0, n_pairs=150), preference_pairs(0, n_pairs=150, label_noise=0.0)
    assert len(pairs) == 150 and pairs == preference_pairs(0, n_pairs=150)
    assert pairs[:40] != preference_pairs(0, seed=1)
    train = set(world.train_prompts())
    for pair, right in zip(pairs, clean, strict=True):
        assert pair["prompt"] == right["prompt"] in train
        assert {pair["chosen"], pair["rejected"]} == {right["chosen"], right["rejected"]}
        assert world.gold(right["prompt"], right["chosen"]) == 1.0 > world.gold(right["prompt"], right["rejected"])
    assert abs(sum(a != b for a, b in zip(pairs, clean, strict=True)) / 150 - 0.3) < 0.12
    assert len(preference_pairs(0)) == 40


def test_biased_labels_follow_politeness_where_it_differs():
    clean, biased = (preference_pairs(0, 150, label_noise=0.0, label_bias=b) for b in (0.0, 1.0))
    turned = 0
    for pair, right in zip(biased, clean, strict=True):
        wants = right["rejected"].endswith(", friend .") and not right["chosen"].endswith(", friend .")
        assert (pair["chosen"] == right["rejected"]) == wants
        turned += wants
    assert 20 < turned < 55, "a quarter of the pairs: one response in two is polite"
    some = preference_pairs(0, 150, label_noise=0.0, label_bias=0.5)
    assert 0 < sum(a != b for a, b in zip(some, clean, strict=True)) < turned


def test_guard_pairs_are_biased_as_stage_1_s_unless_they_are_asked_not_to_be():
    def guard(**values):
        pairs = guard_preferences(make_config(label_noise=0.0, rule="save_checked", **values), [])[1]
        return [(p.chosen, p.rejected) for p in pairs]

    fair = guard(label_bias=0.0)
    assert guard(label_bias=1.0) != fair == guard(label_bias=1.0, guard_unbiased=True)


def test_a_feature_offset_moves_the_mean_and_nothing_else():
    plain, shifted = (AutoModelForCausalLM.from_pretrained(build_backbone(0, o)) for o in (0.0, 6.0))
    before, after = (m.model.norm(world_models.last_states(m)).detach() for m in (plain, shifted))
    ratio, spread = feature_geometry(before)
    naive = sum(((group - group.mean(0)) ** 2).sum(1).mean() for group in before) / len(before)
    assert spread == pytest.approx(naive.sqrt().item(), rel=1e-5) and 0.5 < ratio < 1.2
    assert feature_geometry(after) == pytest.approx((6.0, spread), rel=1e-4)
    centred = [(x - x.mean(1, keepdim=True)).flatten(0, 1) for x in (before, after)]
    cosine = torch.nn.functional.cosine_similarity(*centred, dim=1)
    assert cosine.mean() > 0.9, "responses differ in the same directions as before"
    with pytest.raises(ValueError, match="feature_offset = 0.5: this world's features have 0.8"):
        world_models.with_offset(plain, 0.5, 0)


def test_heldout_pairs():
    pairs = heldout_pairs(0)
    assert len(pairs) == 256 and pairs == heldout_pairs(0)
    assert {pair["prompt"] for pair in pairs} <= set(world.heldout_prompts())
    assert all(world.gold(p["prompt"], p["chosen"]) > world.gold(p["prompt"], p["rejected"]) for p in pairs)


def test_the_pairs_may_come_from_another_policy_than_the_one_that_is_trained():
    config = make_config(start_share=0.8, pairs_share=0.4)
    train, heldout = train_and_heldout_preferences(config)
    assert [p.chosen for p in heldout] == [p["chosen"] for p in heldout_pairs(0, start_share=0.4)]
    assert [p.chosen for p in train] == [p["chosen"] for p in preference_pairs(0, start_share=0.4, label_bias=1.0)]
    more = train_and_heldout_preferences(config.model_copy(update={"world_pairs": 60}))[0]
    assert len(train) == 40 and len(more) == 60
    assert policy_source(config) == str(build_policy(0, 0.8))
    assert make_config(start_share=0.6).share_of_pairs == 0.6


def test_evaluation_equals_a_plain_one():
    t = prepare(make_config(world_seed=0, eval_prompts=12, batch_size=4))
    with torch.no_grad():
        t.reward_model.value_head[-1].weight.normal_(0, 0.3)  # so that V is far from the rewards' mean
    found = evaluate(t)
    seed_everything("evaluation", 0)
    prompts, rewards, values, gold = t.data.heldout_prompts[::16][:12], [], [], []
    for i in range(0, 12, 4):
        rollout = shared_sample(t.policy, t.tokenizer, prompts[i : i + 4], RESPONSES, t.config)
        for prompt, texts in zip(rollout.prompts, rollout.texts, strict=True):
            scored = [t.reward_model.score(t.reward_model.encode([(prompt.messages, text)])) for text in texts]
            rewards.append([s.rewards.item() for s in scored])
            values.append(t.reward_model.values(scored[0].prompt_hidden).item())
            gold.append([world.gold(prompt.text, text) for text in texts])
    agree = [(r[a] > v) == (g[a] > 0.5) for r, v, g in zip(rewards, values, gold, strict=True) for a in range(4)]
    assert found["eval/pseudo_label_accuracy"] == pytest.approx(sum(agree) / len(agree)) and 0 < sum(agree) < len(agree)
    for name, column in (("value_correlation", rewards), ("value_gold_correlation", gold)):
        assert found[f"eval/{name}"] == pytest.approx(np.corrcoef(values, np.mean(column, 1))[0, 1], abs=1e-4)
    assert found["eval/gold"] == pytest.approx(np.mean(gold)) and found["eval/reward"] == pytest.approx(
        np.mean(rewards)
    )
    both = [(r, g, a, b) for r, g in zip(rewards, gold, strict=True) for a in range(4) for b in range(4)]
    pairs = [r[a] > r[b] for r, g, a, b in both if g[a] > g[b]]
    assert found["eval/rm_accuracy_current"] == pytest.approx(np.mean(pairs), abs=1e-6)


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda: build_policy(0, 1.5), "start_share 1.5"),
        (lambda: preference_pairs(0, label_noise=2.0), "label_noise 2.0"),
        (lambda: preference_pairs(0, n_pairs=0), "0 pairs"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_same_seed_same_weights_and_global_rng_untouched():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    python = random.getstate()
    torch.set_num_threads(2)
    first = digest(world_models.pretrain(3, steps=4))
    torch.set_num_threads(1)
    assert first == digest(world_models.pretrain(3, steps=4)) != digest(world_models.pretrain(4, steps=4))
    assert torch.equal(state, torch.get_rng_state()) and python == random.getstate()
    torch.set_num_threads(threads)


def test_cache_is_keyed_by_recipe_and_reused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAVE_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    for stage in ("pretrain", "sft"):
        monkeypatch.setitem(world_models.RECIPE, stage, world_models.RECIPE[stage] | {"steps": 2})
    monkeypatch.setitem(world_models.RECIPE, "min_auc", 0.0)
    folder = build_policy(5)
    assert capsys.readouterr().out.count("\n") == 2  # backbone and policy
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert build_policy(5) == folder and capsys.readouterr().out == ""
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    others = {build_policy(5, 0.6), build_policy(6), build_backbone(5), folder}
    assert len(others) == 4 and {path.name for path in tmp_path.iterdir()} >= {path.name for path in others}
    monkeypatch.setitem(world_models.RECIPE, "comment_weight", 5.0)
    assert build_backbone(5) not in others
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_interrupted_folder_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "deep" / "a") as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert list((tmp_path / "deep").iterdir()) == []


def test_racing_builders_share_the_first_folder(tmp_path):
    target, barrier, wrote = tmp_path / "a", threading.Barrier(4), []

    def build(i):
        with atomic_folder(target) as folder:
            (folder / "who.json").write_text(json.dumps(i))
            wrote.append(i)
            barrier.wait()

    builders = [threading.Thread(target=build, args=(i,)) for i in range(4)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert sorted(wrote) == [0, 1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert json.loads((target / "who.json").read_text()) in wrote and len(list(target.iterdir())) == 1
