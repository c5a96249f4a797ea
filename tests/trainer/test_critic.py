import numpy as np
import pytest
import torch
from msgspec.structs import replace
from ppo_episodes import TASKS, episode, policy_spec, tokens

from trainer.batch import Batch, build_batch
from trainer.config import PPOConfig
from trainer.critic import Critic, explained_variance, fit, values
from trainer.finite import NotFiniteError

torch.set_num_threads(1)


def batch_of(episodes: int) -> Batch:
    made = [episode([4, 4, 2], task=TASKS[i % 2], name=f"e{i}", seed=i) for i in range(episodes)]
    return build_batch(made, policy_spec(), TASKS, PPOConfig(), tokens=tokens, age=lambda _: 0, max_age=0)


@pytest.mark.parametrize("privileged", [1, 0])
def test_learns_from_privileged_state_or_from_images(privileged: int) -> None:
    batch = batch_of(60)
    if privileged:
        assert batch.observations.privileged is not None
        target = np.tanh(batch.observations.privileged[:, 0].numpy().astype(np.float64))
    else:
        # Something that only the images know.
        bright = torch.from_numpy(np.random.default_rng(0).integers(0, 2, len(batch)).astype(np.uint8))
        batch.observations.images["top"] = (bright * 255)[:, None, None, None].expand(-1, 16, 16, 3).contiguous()
        target = bright.numpy().astype(np.float64)
    torch.manual_seed(0)
    critic = Critic(policy_spec(), privileged, len(TASKS))
    critic.set_statistics(batch.observations)
    optimiser = torch.optim.Adam(critic.parameters(), lr=1e-3)
    fit(critic, optimiser, batch, target, epochs=30, rng=np.random.default_rng(0), stopped=lambda: False)
    assert explained_variance(values(critic, batch.observations), target) > 0.8


def test_tells_tasks_apart() -> None:
    batch = batch_of(40)
    target = batch.observations.task.numpy().astype(np.float64)
    torch.manual_seed(0)
    critic = Critic(policy_spec(), 1, len(TASKS))
    optimiser = torch.optim.Adam(critic.parameters(), lr=1e-3)
    loss = fit(critic, optimiser, batch, target, epochs=30, rng=np.random.default_rng(0), stopped=lambda: False)
    assert loss < 0.05


def test_a_target_that_is_not_finite_is_not_learned() -> None:
    batch = batch_of(4)
    critic = Critic(policy_spec(), 1, len(TASKS))
    optimiser = torch.optim.Adam(critic.parameters(), lr=1e-3)
    target = np.full(len(batch), np.nan)
    with pytest.raises(NotFiniteError, match=r"the gradient is nan \(value loss nan\)"):
        fit(critic, optimiser, batch, target, epochs=1, rng=np.random.default_rng(0), stopped=lambda: False)
    assert all(torch.isfinite(parameter).all() for parameter in critic.parameters())


def test_sees_what_is_committed() -> None:
    spec = replace(policy_spec(), prefix_steps=2)
    made = [episode([4, 4, 2], name=f"e{i}", seed=i) for i in range(40)]
    for one in made:
        for decision in one.decisions[1:]:
            # The second and third were asked for two steps before the end of the one before.
            decision.step, decision.start = decision.step - 2, 2
            decision.sent, decision.rules = np.resize(decision.sent, (2, 2)), None
        one.decisions[2].step = 4
        one.decisions[1].prefix, one.decisions[2].prefix = (one.decisions[i].sent[-2:] for i in (0, 1))
    batch = build_batch(made, spec, TASKS, PPOConfig(), tokens=tokens, age=lambda _: 0, max_age=0)
    seen = batch.observations
    assert seen.prefix is not None and seen.prefix_mask is not None
    target = (seen.prefix[:, 1, 1] + seen.prefix_mask[:, 1]).double().numpy()
    torch.manual_seed(0)
    critic = Critic(spec, 1, len(TASKS))
    critic.set_statistics(seen)
    optimiser = torch.optim.Adam(critic.parameters(), lr=1e-3)
    fit(critic, optimiser, batch, target, epochs=30, rng=np.random.default_rng(0), stopped=lambda: False)
    assert explained_variance(values(critic, seen), target) > 0.8
    assert len(values(critic, batch.finals)) == 40


def test_statistics_are_those_of_the_first_batch_and_travel_with_the_weights() -> None:
    first, second = batch_of(10), batch_of(3)
    critic = Critic(policy_spec(), 1, len(TASKS))
    critic.set_statistics(first.observations)
    assert critic.mean[:2].numpy() == pytest.approx(first.observations.state.mean(dim=0).numpy(), abs=1e-6)
    kept = critic.mean.clone()
    critic.set_statistics(second.observations)
    assert torch.equal(critic.mean, kept)
    again = Critic(policy_spec(), 1, len(TASKS))
    again.load_state_dict(critic.state_dict())
    again.set_statistics(second.observations)
    assert torch.equal(again.mean, kept)
    assert values(again, first.observations) == pytest.approx(values(critic, first.observations))


def test_a_stop_ends_it_at_once() -> None:
    critic = Critic(policy_spec(), 1, len(TASKS))
    before = {name: tensor.clone() for name, tensor in critic.state_dict().items()}
    optimiser = torch.optim.Adam(critic.parameters())
    batch = batch_of(2)
    loss = fit(
        critic, optimiser, batch, np.ones(len(batch)), epochs=5, rng=np.random.default_rng(0), stopped=lambda: True
    )
    assert np.isnan(loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in critic.state_dict().items())


def test_explained_variance_by_hand() -> None:
    target = np.array([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(target, target) == 1.0
    assert explained_variance(np.full(4, 7.0), target) == 0.0
    assert explained_variance(np.array([2.0, 1.0, 4.0, 3.0]), target) == pytest.approx(1 - 1.0 / 1.25)
    assert explained_variance(target, np.ones(4)) == 0.0
