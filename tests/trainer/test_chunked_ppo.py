import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from ppo_episodes import TASKS, episode, policy_spec, tokens
from scipy.stats import multivariate_normal

from runtime.inference import sample_after
from runtime.policy import sample_chunk
from trainer.batch import Batch, build_batch
from trainer.buffer import DemoBuffer
from trainer.chunked_ppo import (
    adapted_lr,
    advantages,
    anchor_loss,
    approximate_kl,
    cloning_loss,
    executed_log_prob,
    next_values,
    normalise_by_task,
    ppo_loss,
    reduced_precision,
    update,
)
from trainer.config import BufferConfig, PPOConfig, SFTConfig, VLAConfig
from trainer.finite import NotFiniteError
from trainer.samples import cloning_samples, random_prefix, random_shift, random_wording
from trainer.vla import VLA

torch.set_num_threads(1)


def gae(
    reward: list[float],
    discount: list[float],
    terminated: list[bool],
    last: list[bool],
    value: list[float],
    final: list[float],
    episodes: list[int],
    lam: float,
) -> list[float]:
    v, ends = np.array(value), np.array(last)
    following = next_values(v, np.array(final), ends, np.array(episodes))
    made = advantages(np.array(reward), np.array(discount), np.array(terminated), ends, v, following, lam)
    return [round(x, 10) for x in made.tolist()]


def test_gae_by_hand_with_early_success_truncation_and_cut_chunks() -> None:
    # gamma = 0.5, lambda = 0.5. Episode 0: chunks of 2 and 1 actions, success. Episode 1: 2 and 2, time-out with V = 8.
    got = gae(
        reward=[1.0, 2.0, 0.0, 4.0],
        discount=[0.25, 0.5, 0.25, 0.25],
        terminated=[False, True, False, False],
        last=[False, True, False, True],
        value=[1.0, 4.0, 2.0, 8.0],
        final=[100.0, 8.0],
        episodes=[0, 0, 1, 1],
        lam=0.5,
    )
    # Episode 0: delta = 1 + .25 * 4 - 1 = 1 and 2 - 4 = -2; A = 1 + .25 * .5 * -2 = .75 and -2.
    # Episode 1: delta = 0 + .25 * 8 - 2 = 0 and 4 + .25 * 8 - 8 = -2; A = 0 + .125 * -2 = -.25 and -2.
    assert got == [0.75, -2.0, -0.25, -2.0]


def test_single_step_chunks_give_the_ordinary_estimator() -> None:
    rng = np.random.default_rng(0)
    reward, value, final = rng.normal(size=6), rng.normal(size=6), rng.normal(size=1)
    gamma, lam = 0.9, 0.8
    v = np.append(value, final)
    delta = reward + gamma * v[1:] - v[:-1]
    expected = [sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, 6)) for i in range(6)]
    got = gae(
        reward.tolist(), [gamma] * 6, [False] * 6, [False] * 5 + [True], value.tolist(), final.tolist(), [0] * 6, lam
    )
    assert got == pytest.approx(expected)


@given(
    executed=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    status=st.sampled_from(["success", "failure", "timeout"]),
    gamma=st.floats(0.1, 0.999),
    final=st.floats(-5, 5),
)
def test_lambda_one_is_the_discounted_return_of_the_steps_minus_the_value(
    executed: list[int], status: str, gamma: float, final: float
) -> None:
    config = PPOConfig(gamma=gamma, success_reward=3.0, step_cost=0.25)
    batch = build_batch(
        [episode(executed, status)], policy_spec(), TASKS, config, tokens=tokens, age=lambda _: 0, max_age=0
    )
    value = np.random.default_rng(1).normal(size=len(executed))
    following = next_values(value, np.array([final]), batch.last, batch.episode)
    got = advantages(batch.reward, batch.discount, batch.terminated, batch.last, value, following, 1.0)
    steps = [-0.25] * sum(executed)
    if status == "success":
        steps[-1] += 3.0
    # After a failure it goes on, in thought, for ever.
    returns = [{"success": 0.0, "failure": -0.25 / (1 - gamma), "timeout": final}[status]]
    for r in reversed(steps):
        returns.append(r + gamma * returns[-1])
    returns.reverse()
    starts = np.cumsum([0, *executed])[:-1]
    assert got + value == pytest.approx([returns[i] for i in starts], abs=1e-8)


def test_normalised_by_task_over_the_fresh_decisions_only() -> None:
    advantage = np.array([1.0, 3.0, 100.0, 500.0, 900.0, 5.0])
    task = np.array([0, 0, 0, 1, 1, 2])
    used = np.array([True, True, False, True, True, True])
    # Task 0 has one episode and a spread of 1, the geometric mean with task 1's 200 counts as two; 1 is its own third.
    small = 1.0 / np.sqrt(200) ** (2 / 3)
    assert normalise_by_task(advantage, task, task, used) == pytest.approx([-small, small, 0.0, -1.0, 1.0, 0.0])


@given(st.integers(0, 1000), st.floats(1e-3, 1e3), st.integers(1, 30))
def test_one_task_alone_is_standardised_whatever_its_scale(seed: int, scale: float, episodes: int) -> None:
    advantage = scale * np.random.default_rng(seed).normal(3.0, 1.0, 60)
    task, episode = np.zeros(60, np.int64), np.arange(60) % episodes
    normal = normalise_by_task(advantage, task, episode, np.ones(60, bool))
    assert normal.mean() == pytest.approx(0.0, abs=1e-9) and normal.std() == pytest.approx(1.0)


def test_a_lone_episode_that_hardly_differs_stays_small_and_many_of_them_do_not() -> None:
    rng = np.random.default_rng(0)

    def spread(own_episodes: int) -> tuple[float, float]:
        """Standard deviation after normalisation of a task of scale 0.01, beside one of scale 1 with 20 episodes."""
        task = np.repeat([0, 1], [12 * own_episodes, 12 * 20])
        advantage = rng.normal(0.0, np.where(task == 0, 0.01, 1.0))
        normal = normalise_by_task(advantage, task, np.arange(len(task)) // 12, np.ones(len(task), bool))
        return float(normal[task == 0].std()), float(normal[task == 1].std())

    lone, other = spread(1)
    assert lone < 0.1 and other == pytest.approx(1.0)
    many, other = spread(40)
    assert many > 0.8 and other == pytest.approx(1.0)


@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_actions_never_executed_get_no_gradient(rho: float) -> None:
    torch.manual_seed(0)
    actions, log_std = torch.randn(3, 4, 2), torch.full((3, 4, 2), -1.0)
    mean = torch.randn(3, 4, 2, requires_grad=True)
    executed = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    torch.autograd.backward(executed_log_prob(actions, mean, log_std, executed, rho).sum())
    assert mean.grad is not None
    moved = (mean.grad != 0).all(dim=2)
    assert (moved == (executed > 0)).all()
    target_mean = torch.randn(3, 4, 2, requires_grad=True)
    torch.autograd.backward(cloning_loss(actions, target_mean, log_std, executed, torch.ones(3)))
    assert target_mean.grad is not None
    assert ((target_mean.grad != 0).all(dim=2) == (executed > 0)).all()


def test_executed_log_prob_is_the_sum_of_the_first_k() -> None:
    torch.manual_seed(0)
    actions, mean, log_std = torch.randn(2, 4, 3), torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(dim=2)
    got = executed_log_prob(actions, mean, log_std, torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]]), 0.0)
    assert got.tolist() == pytest.approx([expected[0, :3].sum().item(), expected[1, 0].item()], rel=1e-5)


@pytest.mark.parametrize("rho", [0.4, 0.9])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_executed_log_prob_is_that_of_the_prefix_under_the_explicit_covariance(rho: float, k: int) -> None:
    torch.manual_seed(0)
    actions, mean, log_std = torch.randn(1, 4, 1), torch.randn(1, 4, 1), torch.randn(1, 4, 1)
    executed = (torch.arange(4) < k).float()[None]
    std = log_std[0, :k, 0].exp().double().numpy()
    correlation = rho ** np.abs(np.subtract.outer(np.arange(k), np.arange(k)))
    expected = multivariate_normal(mean[0, :k, 0].numpy(), correlation * np.outer(std, std)).logpdf(actions[0, :k, 0])
    got = executed_log_prob(actions, mean, log_std, executed, rho)
    assert got.item() == pytest.approx(float(expected), rel=1e-3)


def test_clipping_by_hand() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0])
    log_ratio = ratio.log().requires_grad_()
    loss = ppo_loss(log_ratio, advantage, 0.2)
    # A gain is worth no more than 1.2 A, a loss is felt in full; and the other way round below 1.
    assert loss.tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.6, -2.2])
    torch.autograd.backward(loss.sum())
    assert log_ratio.grad is not None
    assert log_ratio.grad.tolist() == pytest.approx([0.0, 3.0, -1.0, 0.0, -2.2])


def test_kl_estimate_is_right_on_average_and_never_negative() -> None:
    torch.manual_seed(0)
    old, new = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.3, 1.1)
    x = old.sample((200_000,))
    estimate = approximate_kl(new.log_prob(x) - old.log_prob(x))
    assert (estimate >= 0).all()
    assert estimate.mean().item() == pytest.approx(torch.distributions.kl_divergence(old, new).item(), rel=0.05)


def test_cloning_loss_is_the_mean_over_executed_actions_and_leaves_sigma_alone() -> None:
    target = torch.zeros(2, 2, 1)
    mean = torch.tensor([[[1.0], [50.0]], [[2.0], [3.0]]], requires_grad=True)
    log_std = torch.zeros(2, 2, 1, requires_grad=True)
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    loss = cloning_loss(target, mean, log_std, mask, torch.tensor([1.0, 0.5]))
    half_log_2pi = 0.5 * np.log(2 * np.pi)
    expected = ((0.5 + half_log_2pi) + 0.5 * (2.0 + half_log_2pi) + 0.5 * (4.5 + half_log_2pi)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    torch.autograd.backward(loss)
    assert log_std.grad is None


def test_anchor_loss_is_the_kl_to_the_frozen_policy_and_leaves_sigma_alone() -> None:
    torch.manual_seed(0)
    mean, frozen = torch.randn(2, 3, 2, requires_grad=True), torch.randn(2, 3, 2)
    log_std = torch.full((2, 3, 2), -0.7, requires_grad=True)
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    scale = torch.tensor([1.0, 0.5])
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, log_std.exp()), normal(frozen, log_std.exp())).sum(-1)
    loss = anchor_loss(mean, frozen, log_std, mask, scale)
    assert loss.item() == pytest.approx(((kl[0, 0] + kl[0, 1] + 0.5 * kl[1, 0]) / 3).item(), rel=1e-5)
    torch.autograd.backward(loss)
    assert log_std.grad is None
    assert mean.grad is not None and ((mean.grad != 0).all(dim=2) == (mask > 0)).all()


# --- the whole update, on a problem with a known answer ---------------------------------------------------------------

SPEC = policy_spec()
CONFIG = PPOConfig(lr=3e-3, epochs=4, minibatch=64, target_kl=1.0)


def tiny_vla(noise_correlation: float = 0.0, prefix_steps: int = 0) -> VLA:
    torch.manual_seed(0)
    config = VLAConfig(4, (4, 4), width=32, text_width=8, vocabulary=300, max_tokens=8, prefix_steps=prefix_steps)
    vla = VLA(config, replace(SPEC, noise_correlation=noise_correlation, prefix_steps=prefix_steps))
    vla.set_state_statistics(torch.zeros(2), torch.ones(2))
    return vla


def sampled_batch(vla: VLA, executed: list[int], seed: int) -> Batch:
    """A batch of one-decision episodes whose actions the policy has just sampled."""
    episodes = [episode([k], "failure", name=f"e{i}", seed=1000 * seed + i) for i, k in enumerate(executed)]
    batch = build_batch(episodes, SPEC, TASKS, CONFIG, tokens=tokens, age=lambda _: 0, max_age=0)
    seen = batch.observations
    with torch.no_grad():
        mean, log_std = vla(seen.images, seen.state, seen.tokens)
        rng, rho = np.random.default_rng(seed), vla.spec.noise_correlation
        chunks = zip(mean.numpy(), log_std.numpy(), strict=True)
        batch.actions = torch.from_numpy(np.stack([sample_chunk(m, s, rho, rng) for m, s in chunks]))
        batch.log_prob = executed_log_prob(batch.actions, mean, log_std, batch.executed, rho)
    return batch


def run_update(
    vla: VLA,
    batch: Batch,
    advantage: np.ndarray,
    *,
    w: float | tuple[float, float] = 1.0,
    c: float = 0.0,
    buffer: DemoBuffer | None = None,
    frozen: VLA | None = None,
    config: PPOConfig = CONFIG,
    optimiser: torch.optim.Optimizer | None = None,
):
    return update(
        vla,
        optimiser or torch.optim.Adam(vla.parameters(), lr=config.lr),
        batch,
        advantage,
        buffer or DemoBuffer(BufferConfig(), TASKS),
        np.broadcast_to(np.array(w, np.float32), 2).copy(),
        config,
        cloning_scale=c,
        frozen=frozen,
        sft=SFTConfig(shift_px=1),
        rng=np.random.default_rng(0),
        generator=torch.Generator().manual_seed(0),
        stopped=lambda: False,
    )


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_update_moves_the_executed_actions_to_where_the_advantage_is(rho: float) -> None:
    vla = tiny_vla(rho)
    optimiser = torch.optim.Adam(vla.parameters(), lr=CONFIG.lr)
    goal = torch.tensor([0.5, -0.8])

    def distance(batch: Batch) -> torch.Tensor:
        return ((batch.actions - goal).square().sum(dim=2) * batch.executed).sum(dim=1)

    first = float(distance(sampled_batch(vla, [4] * 128, 0)).mean())
    for i in range(25):
        batch = sampled_batch(vla, [4, 2] * 64, i)
        result = run_update(vla, batch, -distance(batch).double().numpy(), optimiser=optimiser)
        assert result is not None
        assert result.gradient_steps > 0
    last = float(distance(sampled_batch(vla, [4] * 128, 99)).mean())
    assert last < 0.5 * first


def test_update_learns_what_follows_from_what_is_committed() -> None:
    vla = tiny_vla(0.5, prefix_steps=2)
    optimiser = torch.optim.Adam(vla.parameters(), lr=CONFIG.lr)

    def drawn(seed: int) -> tuple[Batch, torch.Tensor]:
        """Slices of the last two actions, and how far they are from the first action that was told."""
        batch = sampled_batch(tiny_vla(), [4] * 128, seed)
        rng = np.random.default_rng(seed)
        seen = batch.observations
        seen.prefix = torch.from_numpy(rng.choice([-0.5, 0.5], (128, 2, 2)).astype(np.float32))
        seen.prefix_mask = torch.ones(128, 2)
        batch.executed[:, :2] = 0
        with torch.no_grad():
            mean, log_std = vla(*seen.inputs)
            chunks = zip(seen.prefix.numpy(), mean.numpy(), log_std.numpy(), strict=True)
            batch.actions = torch.from_numpy(np.stack([sample_after(p, m, s, 0.5, rng) for p, m, s in chunks]))
            batch.log_prob = executed_log_prob(batch.actions, mean, log_std, batch.executed, 0.5)
        return batch, (batch.actions[:, 2:] - seen.prefix[:, :1]).square().sum(dim=(1, 2))

    first = float(drawn(0)[1].mean())
    for i in range(25):
        batch, distance = drawn(i)
        assert run_update(vla, batch, -distance.double().numpy(), optimiser=optimiser) is not None
    # Whoever ignored what was told could at best stay in the middle.
    assert float(drawn(99)[1].mean()) < 0.75 * first


@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_first_gradient_step_starts_at_ratio_one_and_kl_zero(rho: float) -> None:
    vla = tiny_vla(rho)
    batch = sampled_batch(vla, [4] * 32, 0)
    config = PPOConfig(lr=1e-9, epochs=1, minibatch=32)
    result = run_update(vla, batch, np.random.default_rng(0).normal(size=32), config=config)
    assert result is not None
    assert result.kl == pytest.approx(0.0, abs=1e-6)
    assert result.clip_fraction == 0.0


def test_bfloat16_is_not_used_where_it_would_blur_the_ratio() -> None:
    vla = tiny_vla()
    torch.nn.init.normal_(vla.head.weight)
    with torch.no_grad():
        vla.log_sigma.fill_(-7.0)
    assert not reduced_precision(vla, sampled_batch(vla, [4] * 32, 0), 0.2)


def test_the_target_kl_ends_the_update() -> None:
    vla = tiny_vla()
    batch = sampled_batch(vla, [4] * 128, 0)
    config = PPOConfig(lr=0.05, epochs=20, minibatch=64, target_kl=0.05)
    result = run_update(vla, batch, np.random.default_rng(0).normal(size=128), config=config)
    assert result is not None
    assert result.kl_stop
    assert result.gradient_steps < 40


def test_the_learning_rate_follows_the_kl() -> None:
    config = PPOConfig(lr=1e-4, target_kl=0.04)
    assert adapted_lr(1e-4, 0.04, config) == pytest.approx(1e-4)
    assert adapted_lr(1e-4, 0.04 * 1.1**2, config) == pytest.approx(1e-4 / 1.1)
    assert adapted_lr(1e-4, 4.0, config) == pytest.approx(1e-4 / 1.2)
    assert adapted_lr(1e-4, 0.0, config) == pytest.approx(1.2e-4)
    assert adapted_lr(0.99e-3, 0.0, config) == 1e-3 and adapted_lr(1.01e-5, 9.0, config) == 1e-5


def test_decisions_of_an_older_policy_are_weighted_and_do_not_spend_the_trust_region() -> None:
    vla = tiny_vla()
    batch = sampled_batch(vla, [4] * 64, 0)
    # As if a policy had acted under which half of the chunks were likelier by 3 than they are now, the others less so.
    batch.log_prob += torch.tensor([math.log(3.0), -math.log(1.5)]).repeat(32)
    config = PPOConfig(lr=1e-9, epochs=1, minibatch=64)
    result = run_update(vla, batch, np.tile([1.0, -1.0], 32), config=config)
    assert result is not None and result.gradient_steps == 1
    assert result.kl == pytest.approx(0.0, abs=1e-6) and result.clip_fraction == 0.0
    # L = -mean(rho A), A is 1 and -1: rho is 1/3 and 3/2.
    assert result.policy_loss == pytest.approx((3 / 2 - 1 / 3) / 2, rel=1e-3)
    assert result.effective_share == pytest.approx((1 / 3 + 3 / 2) ** 2 / (2 * (1 / 9 + 9 / 4)), rel=1e-3)


def test_the_weight_of_an_older_decision_is_bounded() -> None:
    vla = tiny_vla()
    batch = sampled_batch(vla, [4] * 64, 0)
    batch.log_prob -= torch.tensor([50.0, 0.0]).repeat(32)
    result = run_update(vla, batch, np.tile([1.0, -1.0], 32), config=PPOConfig(lr=1e-9, epochs=1, minibatch=64))
    assert result is not None
    assert result.policy_loss == pytest.approx((1.0 - 2.0) / 2, rel=1e-3)


def test_stale_decisions_are_not_learned_from() -> None:
    vla = tiny_vla()
    batch = sampled_batch(vla, [4] * 64, 0)
    batch.fresh[:32] = False
    batch.log_prob[:32] = -1e4  # a ratio of infinity, were it used
    result = run_update(vla, batch, np.random.default_rng(0).normal(size=64))
    assert result is not None
    assert np.isfinite(result.policy_loss)
    assert all(torch.isfinite(parameter).all() for parameter in vla.parameters())


def test_a_gradient_that_is_not_finite_is_not_followed() -> None:
    vla = tiny_vla()
    batch = sampled_batch(vla, [4] * 64, 0)
    batch.log_prob[3] = math.nan
    with pytest.raises(NotFiniteError, match=r"the gradient is nan \(policy loss nan, cloning loss 0\)"):
        run_update(vla, batch, np.random.default_rng(0).normal(size=64))
    assert all(torch.equal(now, old) for now, old in zip(vla.parameters(), tiny_vla().parameters(), strict=True))


def test_w_zero_clones_the_buffer_and_nothing_else() -> None:
    vla = tiny_vla()
    buffer = DemoBuffer(BufferConfig(), TASKS)
    demonstrations = []
    for i in range(8):
        one = episode([1] * 6, name=f"d{i}", seed=i)
        for decision in one.decisions:
            decision.sent = np.array([[0.5, -0.5]], np.float32)
        samples = cloning_samples(one, 4, tokens("")[None])
        demonstrations.append(samples)
        buffer.seed("left", f"d{i}", 6, ("expert",), samples)

    def error() -> float:
        with torch.no_grad():
            s = demonstrations[0]
            images = {name: torch.from_numpy(pixels) for name, pixels in s.images.items()}
            mean, _ = vla(images, torch.from_numpy(s.state), torch.from_numpy(s.tokens[:, 0].copy()))
        return float((mean[:, 0] - torch.tensor([0.5, -0.5])).abs().mean())

    before = error()
    correlated = tiny_vla(0.8)
    batch = sampled_batch(vla, [4] * 64, 0)
    config = PPOConfig(lr=3e-3, epochs=40, minibatch=64, target_kl=1e9)
    result = run_update(
        vla, batch, np.random.default_rng(0).normal(size=64), w=0.0, c=1.0, buffer=buffer, config=config
    )
    assert result is not None
    assert error() < 0.3 * before
    # A demonstration is no draw of the policy's noise, so how that is correlated changes nothing.
    run_update(correlated, batch, np.zeros(64), w=0.0, c=1.0, buffer=buffer, config=config)
    for mine, other in zip(vla.parameters(), correlated.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


def two_task_buffer() -> DemoBuffer:
    buffer = DemoBuffer(BufferConfig(), TASKS)
    for i, task in enumerate(TASKS * 3):
        samples = cloning_samples(episode([1] * 6, task=task, name=f"d{i}", seed=i), 4, tokens("")[None])
        buffer.seed(task, f"d{i}", 6, ("expert",), samples)
    return buffer


def gradient(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


@pytest.mark.parametrize("anchored", [False, True])
def test_what_cloning_is_said_to_cost_does_not_depend_on_w(anchored: bool) -> None:
    config = PPOConfig(lr=1e-9, epochs=1, minibatch=64)
    losses = []
    for w in (0.0, 0.9, 1.0, (0.2, 0.7)):
        vla, frozen = tiny_vla(), None
        if anchored:
            frozen = tiny_vla()
            with torch.no_grad():
                frozen.head.bias += 0.5
        batch = sampled_batch(vla, [4] * 64, 0)
        result = run_update(
            vla, batch, np.zeros(64), w=w, c=1.0, buffer=two_task_buffer(), frozen=frozen, config=config
        )
        assert result is not None
        losses.append(result.cloning_loss)
    assert losses[0] > 0.1 and losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_cloning_pulls_at_each_task_by_its_own_weight() -> None:
    vla, w, c = tiny_vla(), (0.2, 0.7), 0.3
    batch = sampled_batch(vla, [4] * 64, 0)
    config = PPOConfig(epochs=1, minibatch=64, max_grad_norm=1e9)
    still = torch.optim.SGD(vla.parameters(), lr=0.0)
    result = run_update(vla, batch, np.zeros(64), w=w, c=c, buffer=two_task_buffer(), config=config, optimiser=still)
    assert result is not None and result.gradient_steps == 1
    found = [gradient(parameter) for parameter in vla.parameters()]
    # The same samples again, drawn as the update has drawn them.
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    rng.permutation(64)
    samples, task = two_task_buffer().sample(32, rng)
    images = {name: random_shift(torch.from_numpy(pixels), 1, generator) for name, pixels in samples.images.items()}
    target, executed = torch.from_numpy(samples.target), torch.from_numpy(samples.mask)
    *_, mask = random_prefix(target, executed, 0, generator)
    words = random_wording(torch.from_numpy(samples.tokens), SFTConfig().word_dropout, generator)
    vla.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=result.bfloat16):
        mean, log_std = vla(images, torch.from_numpy(samples.state), words)
    scale = (1 - torch.tensor(w))[torch.from_numpy(task)]
    torch.autograd.backward(c * cloning_loss(target, mean.float(), log_std.float(), mask, scale))
    assert any(mine.any() for mine in found)
    assert all(torch.equal(mine, gradient(other)) for mine, other in zip(found, vla.parameters(), strict=True))


def test_a_demonstration_is_cloned_after_the_part_of_it_that_is_told() -> None:
    """Demonstrations go on as they begin, whatever is seen; only who is told how they begin can do as they do."""
    vla, buffer = tiny_vla(prefix_steps=2), DemoBuffer(BufferConfig(), TASKS)
    rng = np.random.default_rng(0)
    for i in range(40):
        one = episode([1] * 4, name=f"d{i}", seed=i)
        action = rng.choice([-0.5, 0.5], 2).astype(np.float32)
        for decision in one.decisions:
            decision.sent = action[None]
        buffer.seed("left", f"d{i}", 4, ("expert",), cloning_samples(one, 4, tokens("")[None]))
    batch = sampled_batch(tiny_vla(), [4] * 64, 0)
    batch.observations.prefix, batch.observations.prefix_mask = torch.zeros(64, 2, 2), torch.zeros(64, 2)
    config = PPOConfig(lr=1e-2, epochs=60, minibatch=64, target_kl=1e9)
    assert run_update(vla, batch, np.zeros(64), w=0.0, c=1.0, buffer=buffer, config=config) is not None
    told = torch.from_numpy(rng.choice([-0.5, 0.5], (64, 1, 2)).astype(np.float32)).expand(-1, 2, -1)
    seen = batch.observations
    with torch.no_grad():
        mean, _ = vla(seen.images, seen.state, seen.tokens, told, torch.ones(64, 2))
    assert float((mean[:, 2:] - told).abs().mean()) < 0.25  # 0.5 in the middle


def test_an_anchor_holds_the_policy_where_the_frozen_one_is() -> None:
    vla, frozen = tiny_vla(), tiny_vla()
    with torch.no_grad():
        frozen.head.bias += 0.5
    batch = sampled_batch(vla, [4] * 64, 0)

    def distance() -> float:
        seen = batch.observations
        with torch.no_grad():
            ours, theirs = (policy(seen.images, seen.state, seen.tokens)[0] for policy in (vla, frozen))
        return float((ours - theirs).abs().mean())

    before = distance()
    config = PPOConfig(lr=3e-3, epochs=40, minibatch=64, target_kl=1e9)
    kept = [parameter.clone() for parameter in frozen.parameters()]
    result = run_update(
        vla, batch, np.random.default_rng(0).normal(size=64), w=0.0, c=1.0, frozen=frozen, config=config
    )
    assert result is not None
    assert distance() < 0.3 * before
    assert all(torch.equal(now, old) for now, old in zip(frozen.parameters(), kept, strict=True))
    # From where the frozen policy is there is nothing to pull at.
    there = tiny_vla()
    run_update(there, batch, np.zeros(64), w=0.0, c=1.0, frozen=tiny_vla(), config=config)
    assert all(torch.equal(now, old) for now, old in zip(there.parameters(), tiny_vla().parameters(), strict=True))


def test_a_stop_ends_it() -> None:
    vla = tiny_vla()
    batch = sampled_batch(vla, [4] * 8, 0)
    made = update(
        vla,
        torch.optim.Adam(vla.parameters()),
        batch,
        np.zeros(8),
        DemoBuffer(BufferConfig(), TASKS),
        np.ones(2, np.float32),
        CONFIG,
        cloning_scale=0.0,
        sft=SFTConfig(shift_px=0),
        rng=np.random.default_rng(0),
        generator=torch.Generator(),
        stopped=lambda: True,
    )
    assert made is None
