"""Policy losses against TRL's own trainers, OpenRLHF's definition in naive loops, and analytic KL divergences."""

import math

import pytest
import torch

from savelib.method import (
    ALGORITHMS,
    kl_k1,
    kl_k3,
    kl_penalized_rewards,
    loss_weight,
    policy_advantages,
    policy_loss,
    prime_advantages,
    reinforce_pp_advantages,
)

BETA = 0.04


def random_rows(seed=0, rows=8, tokens=6, spread=0.3):
    """Log-probs of three policies and a mask with rows of every length from 1 on, float64."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -2 * torch.rand(rows, tokens, generator=generator, dtype=torch.float64) - 0.1
    old = logprobs + spread * torch.randn(rows, tokens, generator=generator, dtype=torch.float64)
    ref = logprobs + spread * torch.randn(rows, tokens, generator=generator, dtype=torch.float64)
    lengths = torch.arange(rows) % tokens + 1
    mask = torch.arange(tokens) < lengths[:, None]
    return logprobs.requires_grad_(), old, ref, mask


def random_advantages(algo, logprobs, mask, seed=1):
    generator = torch.Generator().manual_seed(seed)
    advantages = torch.randn(logprobs.shape, generator=generator, dtype=logprobs.dtype)
    return advantages * mask if ALGORITHMS[algo].by_token else advantages[:, 0]


# --- KL estimators -------------------------------------------------------------------------------------------------


def categorical_pair():
    logits = torch.tensor([[1.5, 0.0, -1.0, 0.3, -2.0], [-0.5, 0.8, 0.1, -1.2, 0.4]], dtype=torch.float64)
    return logits.log_softmax(1)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_kl_estimators_have_the_analytic_mean(estimator):
    policy, ref = categorical_pair()
    analytic = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=policy), torch.distributions.Categorical(logits=ref)
    )
    assert analytic > 0.5
    expectation = (policy.exp() * estimator(policy, ref)).sum()  # over every token, weighted by the policy
    torch.testing.assert_close(expectation, analytic)
    other_way = (policy.exp() * estimator(ref, policy)).sum()
    assert (other_way - analytic).abs() > 0.1  # turned round, the mean is another number


def test_k1_is_signed_and_k3_is_not():
    policy, ref = categorical_pair()
    assert (kl_k1(policy, ref) < 0).any() and (kl_k1(policy, ref) > 0).any()
    assert (kl_k3(policy, ref) > 0).all()
    assert not kl_k3(policy, policy).any()


def test_gradients_of_the_estimators_on_samples():
    """The mean over samples of the gradient is not the gradient of the mean: k1's is 0, k3's is KL(ref || pi)'s."""
    logits, ref = categorical_pair()
    logits.requires_grad_()
    policy = logits.log_softmax(0)
    sampled = policy.detach().exp()  # the probability of each token in the samples
    ratio = (policy - policy.detach()).exp()

    def gradient(scalar):
        return torch.autograd.grad(scalar, logits, retain_graph=True)[0]

    k1, k3 = kl_k1(policy, ref), kl_k3(policy, ref)
    torch.testing.assert_close(gradient((sampled * k1).sum()), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(gradient((sampled * k3).sum()), gradient((ref.exp() * (ref - policy)).sum()))
    torch.testing.assert_close(gradient((sampled * k3 * ratio).sum()), gradient((policy.exp() * k1).sum()))


def test_kl_in_the_reward_is_a_sum_over_the_response():
    logprobs, _, ref, mask = random_rows()
    rewards = torch.arange(8, dtype=torch.float64)
    expected = [
        rewards[n].item() - BETA * sum((logprobs[n, t] - ref[n, t]).item() for t in range(6) if mask[n, t])
        for n in range(8)
    ]
    penalized = kl_penalized_rewards(rewards, logprobs, ref, mask, BETA)
    assert penalized.tolist() == pytest.approx(expected) and not penalized.requires_grad
    grouped = kl_penalized_rewards(rewards.view(2, 4), logprobs, ref, mask, BETA)
    assert torch.equal(grouped, penalized.view(2, 4))


# --- advantages ----------------------------------------------------------------------------------------------------


def naive_advantages(algo, row, kept, over):
    """One group, in plain Python."""
    counted = [r for r, k in zip(row, kept, strict=True) if k or over == "all"]
    if sum(kept) < 2:
        return [0.0] * len(row)
    mean = sum(counted) / len(counted)
    if algo == "rloo":
        values = [r - (sum(counted) - r) / (len(counted) - 1) for r in row]
    else:
        std = math.sqrt(sum((r - mean) ** 2 for r in counted) / (len(counted) - 1))
        values = [(r - mean) / (std + 1e-4) for r in row]
    return [v if k else 0.0 for v, k in zip(values, kept, strict=True)]


@pytest.mark.parametrize("over", ["kept", "all"])
@pytest.mark.parametrize("algo", ["grpo", "gspo", "rloo"])
def test_policy_advantages_of_partly_kept_groups(algo, over):
    rewards = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    result = policy_advantages(algo, rewards, kept, over=over)
    for row, row_kept, got in zip(rewards.tolist(), kept.tolist(), result.tolist(), strict=True):
        assert got == pytest.approx(naive_advantages(algo, row, row_kept, over), abs=1e-12)
    assert result[1].any() and not result[3:].any()


@pytest.mark.parametrize("algo", ["grpo", "gspo", "rloo"])
def test_equal_rewards_give_no_advantage(algo):
    assert not policy_advantages(algo, torch.full((2, 4), 3.0), torch.ones(2, 4, dtype=torch.bool)).any()


def naive_reinforce_pp(rewards, logprobs, ref, mask, beta):
    """OpenRLHF 0.11: compute_approx_kl (k1), compute_reward, get_cumulative_returns, then the global whitening."""
    rows, tokens = mask.shape
    returns = [[0.0] * tokens for _ in range(rows)]
    for n in range(rows):
        token_rewards = [0.0] * tokens
        for t in range(tokens):
            token_rewards[t] = -beta * min(max((logprobs[n, t] - ref[n, t]).item(), -10), 10)
        for t in reversed(range(tokens)):
            if mask[n, t]:
                token_rewards[t] += rewards[n].item()
                break
        running = 0.0
        for t in reversed(range(tokens)):
            running = token_rewards[t] * mask[n, t].item() + running
            returns[n][t] = running
    flat = [returns[n][t] for n in range(rows) for t in range(tokens) if mask[n, t]]
    mean = sum(flat) / len(flat)
    std = math.sqrt(max(sum((x - mean) ** 2 for x in flat) / len(flat), 1e-8))
    return [[(returns[n][t] - mean) / std if mask[n, t] else 0.0 for t in range(tokens)] for n in range(rows)]


@pytest.mark.parametrize("spread", [0.3, 20.0])  # the second reaches the clamp of k1
def test_reinforce_pp_advantages_are_openrlhfs(spread):
    logprobs, _, ref, mask = random_rows(spread=spread)
    rewards = torch.randn(8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    result = reinforce_pp_advantages(rewards, logprobs, ref, mask, beta=0.3)
    for got, expected in zip(result.tolist(), naive_reinforce_pp(rewards, logprobs, ref, mask, 0.3), strict=True):
        assert got == pytest.approx(expected, abs=1e-12)
    assert not result.requires_grad
    assert result[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert result[mask].std(correction=0).item() == pytest.approx(1)


def naive_prime(process, outcomes, kept, mask):
    """PRIME's advantage in loops: prompts, responses, tokens; then the global whitening."""
    prompts, size = kept.shape
    tokens, returns = mask.shape[1], {}
    for b in range(prompts):
        group = [g for g in range(size) if kept[b, g]]
        mean = {}
        for g in group:
            here = [process[b * size + g, t].item() for t in range(tokens) if mask[b * size + g, t]]
            mean[g] = sum(here) / len(here)
        for g in group if len(group) > 1 else []:
            others = [j for j in group if j != g]
            baseline = sum(mean[j] for j in others) / len(others)
            outcome = outcomes[b, g].item() - sum(outcomes[b, j].item() for j in others) / len(others)
            here = [t for t in range(tokens) if mask[b * size + g, t]]
            for t in here:
                later = [process[b * size + g, s].item() - baseline for s in here if s >= t]
                returns[b * size + g, t] = sum(later) + outcome
    mean = sum(returns.values()) / len(returns)
    std = math.sqrt(sum((x - mean) ** 2 for x in returns.values()) / len(returns))
    return [
        [(returns[n, t] - mean) / std if (n, t) in returns else 0.0 for t in range(tokens)] for n in range(len(mask))
    ]


def test_prime_advantages_against_loops():
    process, _, _, mask = random_rows()
    process = process.detach()
    outcomes = torch.tensor([[1.0, 0, 1, 0], [1, 0, 0, 0]], dtype=torch.float64)
    for kept in ([[1, 1, 1, 1], [1, 1, 1, 1]], [[1, 0, 1, 1], [0, 1, 0, 0]]):
        kept = torch.tensor(kept, dtype=torch.bool)
        result = prime_advantages(process, outcomes, kept, mask)
        wild = process.masked_fill(~(mask & kept.flatten()[:, None]), 1e9)  # what is not learnt from counts for nothing
        assert torch.equal(prime_advantages(wild, outcomes, kept, mask), result)
        for got, expected in zip(result.tolist(), naive_prime(process, outcomes, kept, mask), strict=True):
            assert got == pytest.approx(expected, abs=1e-12)
    assert result[[0, 2, 3]].any() and not result[[1, 4, 5, 6, 7]].any()


def test_prime_without_process_rewards_is_whitened_rloo_on_the_outcome():
    _, _, _, mask = random_rows()
    outcomes, kept = torch.tensor([[1.0, 0, 1, 0], [1, 0, 0, 0]]), torch.ones(2, 4, dtype=torch.bool)
    rloo = policy_advantages("rloo", outcomes, kept).flatten()[:, None].expand(mask.shape)
    flat = rloo[mask]
    expected = (flat - flat.mean()) / flat.std(correction=0)
    result = prime_advantages(torch.zeros(mask.shape), outcomes, kept, mask)
    torch.testing.assert_close(result[mask], expected)
    assert result[0][mask[0]].unique().numel() == 1 and result[0, 0] > 0 > result[1, 0]


# --- losses --------------------------------------------------------------------------------------------------------


def naive_loss(algo, logprobs, old, ref, advantages, mask, beta):
    """Every algorithm in loops over rows and tokens."""
    low, high = ALGORITHMS[algo].clip
    per_row, per_token = [], []
    for n in range(len(logprobs)):
        here = [t for t in range(logprobs.shape[1]) if mask[n, t]]
        deltas = {t: logprobs[n, t] - old[n, t] for t in here}
        kl = {t: (ref[n, t] - logprobs[n, t]).exp() - 1 - (ref[n, t] - logprobs[n, t]) for t in here}
        losses = []
        for t in here:
            if algo == "gspo":
                ratio = (sum(deltas.values()) / len(here)).exp()
            elif algo == "rloo":
                ratio = sum(deltas.values()).exp()
            else:
                ratio = deltas[t].exp()
            advantage = advantages[n, t] if ALGORITHMS[algo].by_token else advantages[n]
            losses.append(-torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage))
            if algo != "rloo":
                losses[-1] = losses[-1] + beta * kl[t]
        row = sum(losses) / len(here)
        if algo == "rloo":
            row = row + beta * sum(kl.values())
        per_row.append(row)
        per_token += losses
    terms = per_token if ALGORITHMS[algo].by_token else per_row
    return sum(terms) / len(terms)


@pytest.mark.parametrize("beta", [BETA, 0.0])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_policy_loss_against_loops(algo, beta):
    logprobs, old, ref, mask = random_rows()
    advantages = random_advantages(algo, logprobs, mask)
    expected = naive_loss(algo, logprobs, old, ref, advantages, mask, beta)
    (expected_grad,) = torch.autograd.grad(expected, logprobs)
    loss = policy_loss(algo, logprobs, old, ref, advantages, mask, beta=beta)
    (grad,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)
    if not beta:
        assert torch.equal(policy_loss(algo, logprobs, old, None, advantages, mask, beta=0.0), loss)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_slices_combine_to_the_whole(algo):
    logprobs, old, ref, mask = random_rows()
    advantages = random_advantages(algo, logprobs, mask)
    whole = policy_loss(algo, logprobs, old, ref, advantages, mask, beta=BETA)
    weighted, weights = 0.0, 0.0
    for rows in (slice(0, 1), slice(1, 4), slice(4, 8)):
        weight = loss_weight(algo, mask[rows])
        loss = policy_loss(algo, logprobs[rows], old[rows], ref[rows], advantages[rows], mask[rows], beta=BETA)
        weighted, weights = weighted + weight * loss, weights + weight
    torch.testing.assert_close(weighted / weights, whole)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_padding_has_no_influence(algo):
    logprobs, old, ref, mask = random_rows()
    advantages = random_advantages(algo, logprobs, mask)
    loss = policy_loss(algo, logprobs, old, ref, advantages, mask, beta=BETA)
    (grad,) = torch.autograd.grad(loss, logprobs)
    wild = logprobs.detach().masked_fill(~mask, -1e4).requires_grad_()  # e^1e4 overflows where it is not masked first
    again = policy_loss(algo, wild, old, ref.masked_fill(~mask, 0.0), advantages, mask.long(), beta=BETA)
    (wild_grad,) = torch.autograd.grad(again, wild)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(wild_grad, grad)
    assert not grad[~mask].any()


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_clipping_stops_the_gradient(algo):
    logprobs = torch.full((1, 2), -1.0, dtype=torch.float64, requires_grad=True)
    old, mask = torch.full((1, 2), -1.5, dtype=torch.float64), torch.ones(1, 2)
    advantages = torch.ones((1, 2) if ALGORITHMS[algo].by_token else 1, dtype=torch.float64)
    arguments = (algo, logprobs, old, None, advantages, mask)
    clipped = policy_loss(*arguments, beta=0.0)
    assert clipped.item() == pytest.approx(-(1 + ALGORITHMS[algo].clip[1]))
    assert not torch.autograd.grad(clipped, logprobs)[0].any()
    free = policy_loss(algo, logprobs, old, None, -advantages, mask, beta=0.0)  # the worse of the two, not clipped
    assert free.item() == pytest.approx(math.exp(1.0 if algo == "rloo" else 0.5))
    assert torch.autograd.grad(free, logprobs)[0].all()
    floor = policy_loss(algo, old, logprobs, None, -advantages, mask, beta=0.0)
    assert floor.item() == pytest.approx(1 - ALGORITHMS[algo].clip[0])


@pytest.mark.parametrize("algo", ["reinforce_pp", "prime"])
def test_losses_by_token_bound_the_log_ratio(algo):
    logprobs, old, mask = torch.zeros(1, 1), torch.full((1, 1), -500.0), torch.ones(1, 1)
    loss = policy_loss(algo, logprobs, old, None, -torch.ones(1, 1), mask, beta=0.0)
    assert loss.item() == pytest.approx(math.exp(20))


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_old_policy_gets_no_gradient(algo):
    logprobs, _, ref, mask = random_rows()
    advantages = random_advantages(algo, logprobs, mask)
    policy_loss(algo, logprobs, logprobs, ref, advantages, mask, beta=0.0).backward()
    assert logprobs.grad[mask].all()


def test_bad_input_names_what_is_wrong():
    rows, mask = torch.zeros(2, 3), torch.ones(2, 3)
    for call in (
        lambda: policy_loss("ppo", rows, rows, rows, rows[:, 0], mask, beta=BETA),
        lambda: policy_advantages("ppo", rows, mask),
        lambda: loss_weight("ppo", mask),
    ):
        with pytest.raises(ValueError, match="'ppo'.*grpo, gspo, rloo, reinforce_pp"):
            call()
    for algo in ("reinforce_pp", "prime"):
        with pytest.raises(ValueError, match=f"{algo}_advantages"):
            policy_advantages(algo, rows, mask)
    with pytest.raises(ValueError, match="'some'.*kept, all"):
        policy_advantages("grpo", rows, mask, over="some")
    with pytest.raises(ValueError, match="advantages: shape"):
        policy_loss("reinforce_pp", rows, rows, rows, rows[:, 0], mask, beta=BETA)
    with pytest.raises(ValueError, match="advantages: shape"):
        policy_loss("grpo", rows, rows, rows, rows, mask, beta=BETA)
    with pytest.raises(ValueError, match="no rows"):
        policy_loss("grpo", rows[:0], rows[:0], rows[:0], rows[:0, 0], mask[:0], beta=BETA)


# --- TRL's own trainers on a tiny random Llama ---------------------------------------------------------------------

WORDS = ["the", "a", "red", "green", "apple", "pear", "plum", "good", "bad", "very", "fruit"]
GROUP, PROMPTS = 4, ["the red", "a green", "very good fruit"]


def completion_logprobs(model, batch):
    """Log-probs of the completion tokens, [N, T], from the model's plain forward."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)
    return logits.gather(2, ids[:, 1:, None]).squeeze(2)[:, -batch["completion_ids"].shape[1] :]


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """A folder with a random Llama of one layer and a word-level tokenizer."""
    import tokenizers
    import transformers
    from accelerate.state import AcceleratorState

    folder = tmp_path_factory.mktemp("tiny_llama")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    yield folder
    AcceleratorState._reset_state(reset_partial_state=True)  # TRL's trainers leave accelerate on the CPU


def trl_rollout(algo, folder, out):
    """A real TRL trainer, a batch that it sampled and scored itself, and the rewards that it was given."""
    import datasets
    import trl

    trainer_class, config, own = trl.GRPOTrainer, trl.GRPOConfig, {}
    if algo == "rloo":
        trainer_class, config = trl.RLOOTrainer, trl.RLOOConfig
    else:
        own = {"loss_type": "grpo", "use_bias_correction_kl": False, "num_iterations": 2}
    if algo == "gspo":
        own |= {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
    given = []

    def reward(completions, **_):
        given.extend(sum(len(word) for word in text.split()) + 0.1 * i for i, text in enumerate(completions))
        return given

    trainer = trainer_class(
        model=str(folder),
        reward_funcs=reward,
        args=config(
            output_dir=str(out),
            per_device_train_batch_size=GROUP * len(PROMPTS),
            num_generations=GROUP,
            max_completion_length=16,
            beta=BETA,
            use_cpu=True,
            bf16=False,
            report_to=[],
            **own,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS}),
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():  # away from the reference, so that the KL is not 0
            parameter += 0.1 * torch.randn_like(parameter)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # what Trainer.train sets before the first step
    batch = trainer._generate_and_score_completions([{"prompt": p} for p in PROMPTS for _ in range(GROUP)])
    return trainer, batch, torch.tensor(given).view(-1, GROUP)


@pytest.mark.parametrize("algo", ["grpo", "gspo", "rloo"])
def test_advantages_loss_and_gradient_are_trls(algo, tiny_llama, tmp_path):
    trainer, batch, rewards = trl_rollout(algo, tiny_llama, tmp_path)
    mask = batch["completion_mask"]
    assert len(set(mask.sum(1).tolist())) > 1  # responses of several lengths
    with torch.no_grad():
        sampled = completion_logprobs(trainer.model, batch)
        ref_logprobs = completion_logprobs(trainer.ref_model, batch)
    assert (sampled - ref_logprobs)[mask.bool()].abs().max() > 0.01

    if algo == "rloo":
        rewards = kl_penalized_rewards(rewards, sampled, ref_logprobs, mask, BETA)
    advantages = policy_advantages(algo, rewards, torch.ones_like(rewards, dtype=torch.bool)).flatten()
    torch.testing.assert_close(advantages, batch["advantages"], rtol=1e-4, atol=1e-5)
    assert advantages.any()

    # The policy has moved since it sampled, so that some ratios are clipped and some are not.
    moved = {"grpo": 0.3, "gspo": 1e-3, "rloo": 0.1}[algo]
    old_logprobs = sampled + moved * torch.randn(sampled.shape, generator=torch.Generator().manual_seed(2))
    if algo == "rloo":
        batch["old_logps"] = (old_logprobs * mask).sum(1)
    else:
        batch["old_per_token_logps"] = old_logprobs
    expected = trainer._compute_loss(trainer.model, batch)
    expected.backward()
    expected_grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    assert 0 < trainer._metrics["train"]["clip_ratio/region_mean"][-1] < 1

    trainer.model.zero_grad()
    logprobs = completion_logprobs(trainer.model, batch)
    arguments = (algo, logprobs, old_logprobs, ref_logprobs, advantages, mask)
    loss = policy_loss(*arguments, beta=0.0 if algo == "rloo" else BETA)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_grads[name], rtol=1e-3, atol=1e-4)
    assert sum(grad.abs().sum() for grad in expected_grads.values()) > 0.01
