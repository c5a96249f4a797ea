"""The network sees all that it is given, and gives actions in their own units."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from vla_samples import CONFIG, SPEC, TOLD_CONFIG, TOLD_SPEC, arguments, observations, small_vla, told_vla

from bridge.backend import CameraSpec, VectorSpec
from runtime import policy
from trainer.vla import VLA, ImageEncoder, VLAError, committed, log_prob

torch.set_num_threads(1)


def test_outputs_are_in_units_of_the_action() -> None:
    vla = small_vla()
    with torch.no_grad():
        vla.head.weight.zero_()
        vla.head.bias.copy_(torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, 0.0]))
        mean, log_std = vla(*arguments(observations(4)))
    assert mean.shape == log_std.shape == (4, 3, 2)
    assert mean.dtype == log_std.dtype == torch.float32
    # Limits [-1, 1] and [0, 10]: centers 0 and 5, half ranges 1 and 5; beyond the limits nothing is squashed.
    assert mean[3].tolist() == [[0, 10], [-1, 7.5], [2, 5]]
    assert torch.allclose(log_std.exp(), torch.tensor([0.2, 1.0]).expand(4, 3, 2))


def test_a_fresh_policy_starts_near_the_middle() -> None:
    vla = VLA(CONFIG, SPEC)
    vla.set_state_statistics(torch.zeros(3), torch.ones(3))
    mean, _ = vla(*arguments(observations(8)))
    assert ((mean - vla.center) / vla.half_range).abs().max() < 0.3


@pytest.mark.parametrize("vla", [small_vla(), told_vla()])
def test_every_weight_matters(vla: VLA) -> None:
    mean, log_std = vla(*arguments(observations(16, vla.spec)))
    (mean.square().sum() + log_std.sum()).backward()
    for name, parameter in vla.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", ["image/wrist", "image/corner", "state", "tokens", "prefix", "prefix_mask"])
def test_every_input_matters_to_its_own_row_only(name: str) -> None:
    vla = told_vla()
    before = observations(3, TOLD_SPEC)
    after = {key: array.copy() for key, array in before.items()}
    after[name][1] = before[name][2] if name != "tokens" else before[name][0]
    with torch.no_grad():
        change = (vla(*arguments(after))[0] - vla(*arguments(before))[0]).abs().amax((1, 2))
    assert change[1] > 1e-4
    assert change[0] < 1e-5 and change[2] < 1e-5


def test_what_is_committed_counts_in_half_ranges_and_only_where_the_mask_is() -> None:
    center, half_range = torch.tensor([0.0, 5.0]), torch.tensor([1.0, 5.0])
    prefix = torch.tensor([[[0.5, 10.0], [-1.0, 2.5], [0.0, 0.0]]])
    read = committed(prefix, torch.tensor([[1.0, 1.0, 0.0]]), center, half_range)
    assert read.tolist() == [[0.5, 1.0, -1.0, -0.5, 0.0, 0.0, 1.0, 1.0, 0.0]]
    # The middle of the range is committed in one row, nothing in the other.
    arrays = observations(2, TOLD_SPEC)
    arrays["prefix"][:] = [[[0, 5], [0, 5]], [[0, 0], [0, 0]]]
    arrays["prefix_mask"][:] = [[1, 1], [0, 0]]
    for name in ("image/wrist", "image/corner", "state", "tokens"):
        arrays[name][1] = arrays[name][0]
    vla = told_vla()
    with torch.no_grad():
        mean, _ = vla(*arguments(arrays))
        none, _ = vla(*arguments(arrays)[:3])
    assert (mean[0] - mean[1]).abs().max() > 1e-3
    assert torch.allclose(mean[1], none[1], atol=1e-6)


def test_at_first_what_is_told_changes_nothing() -> None:
    vla, never, arrays = small_vla(TOLD_SPEC, TOLD_CONFIG), small_vla(), observations(8, TOLD_SPEC)
    never.load_state_dict(vla.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(vla(*arguments(arrays))[0], never(*arguments(arrays)[:3])[0])


def test_where_a_thing_is_matters() -> None:
    vla = small_vla()
    arrays = observations(4)
    arrays["image/corner"][:] = 0
    for i in range(4):
        arrays["image/corner"][i, 4 * i : 4 * i + 4, 4:8] = 255
        for other in ("image/wrist", "state", "tokens"):
            arrays[other][i] = arrays[other][0]
    with torch.no_grad():
        mean, _ = vla(*arguments(arrays))
    assert torch.pdist(mean.flatten(1)).min() > 1e-3


def test_padding_says_nothing() -> None:
    vla = small_vla()
    arrays = observations(2)
    assert (arrays["tokens"] == 0).any()
    with torch.no_grad():
        before, _ = vla(*arguments(arrays))
        vla.embedding.weight[0] = 100.0
        after, _ = vla(*arguments(arrays))
        assert torch.equal(before, after)
        arrays["tokens"][:] = 0
        assert torch.isfinite(vla(*arguments(arrays))[0]).all()


def test_without_state_statistics_there_is_no_output() -> None:
    mean, _ = VLA(CONFIG, SPEC)(*arguments(observations(2)))
    assert mean.isnan().all()


def test_state_statistics() -> None:
    vla = small_vla()
    vla.set_state_statistics(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.0, 1e-6]))
    assert vla.state_std.tolist() == [2, 1, 1]
    arrays = observations(2)
    arrays["state"][0], arrays["state"][1] = 1e6, 1e9  # both beyond what is let through
    for name in ("image/wrist", "image/corner", "tokens"):
        arrays[name][1] = arrays[name][0]
    mean, _ = vla(*arguments(arrays))
    assert torch.allclose(mean[0], mean[1], atol=1e-5)
    with pytest.raises(VLAError, match=r"expected \[3\] \(x, y, grip\)"):
        vla.set_state_statistics(torch.zeros(2), torch.ones(2))
    with pytest.raises(VLAError, match="finite"):
        vla.set_state_statistics(torch.zeros(3), torch.full((3,), math.nan))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 4}, "horizon 4"),
        ({"tokens": 9}, "9 tokens"),
        ({"prefix_steps": 1}, "prefix_steps 1"),
        ({"action": replace(SPEC.action, high=(1.0, math.inf))}, "finite limits"),
        ({"action": replace(SPEC.action, high=(1.0, 0.0))}, "low < high"),
        ({"cameras": (CameraSpec("tiny", 3, 16),)}, "images of 3x16"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(VLAError, match=message):
        VLA(CONFIG, replace(SPEC, **changes))


def test_no_camera_and_no_state() -> None:
    spec = replace(SPEC, cameras=(), state=VectorSpec((), ()))
    mean, _ = small_vla(spec)(*arguments(observations(2, spec)))
    assert torch.isfinite(mean).all()


@settings(max_examples=30)
@given(height=st.integers(4, 90), width=st.integers(4, 90))
def test_an_encoder_is_as_large_as_it_says_whatever_the_camera(height: int, width: int) -> None:
    encoder = ImageEncoder(height, width, (2, 3), 4)
    with torch.no_grad():
        out = encoder(torch.zeros(2, height, width, 3, dtype=torch.uint8), torch.zeros(2, 4))
    assert out.shape == (2, encoder.size)
    assert encoder.size <= 3 * 8 * 8


def test_it_can_learn_where_a_thing_is_as_the_instruction_asks() -> None:
    """One instruction asks for the row of a dot, the other for its column: it takes images, text and precision."""
    vla = small_vla()
    rng = np.random.default_rng(0)
    arrays = observations(256)
    for name in ("image/wrist", "image/corner", "state"):
        arrays[name][:] = 0
    at = rng.integers(0, 15, (256, 2))
    for i, (y, x) in enumerate(at):
        arrays["image/corner"][i, y : y + 2, x : x + 2] = 255
    asked = np.where(np.arange(256) % 2 == 0, at[:, 0], at[:, 1]) / 7 - 1
    target = torch.from_numpy(asked.astype(np.float32))
    optimiser = torch.optim.Adam(vla.parameters(), lr=5e-3)
    error = torch.tensor(0.0)
    for _ in range(250):
        mean, _ = vla(*arguments(arrays))
        error = (mean[:, 0, 0] - target).square().mean()
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
    # The variance of the target is 0.37; without text the best would be half of that.
    assert error.item() < 0.03


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_log_prob_is_torchs_and_the_runtimes(rho: float) -> None:
    generator = torch.Generator().manual_seed(0)
    actions, mean = (torch.randn(5, 3, 2, generator=generator) for _ in range(2))
    log_std = torch.randn(5, 3, 2, generator=generator) * 0.5 - 1
    mine = log_prob(actions, mean, log_std, rho)
    steps = torch.arange(3)
    covariance = rho ** (steps[:, None] - steps).abs() * torch.eye(2)[:, :, None, None]
    std = log_std.exp().permute(0, 2, 1).flatten(1)  # all steps of the first element, then those of the second
    covariance = covariance.permute(0, 2, 1, 3).reshape(6, 6) * std[:, :, None] * std[:, None]
    flat = [x.permute(0, 2, 1).flatten(1) for x in (actions, mean)]
    theirs = torch.distributions.MultivariateNormal(flat[1], covariance).log_prob(flat[0])
    assert mine.shape == (5, 3)
    assert torch.allclose(mine.sum(1), theirs, atol=1e-3)
    runtimes = policy.log_prob(actions.numpy(), mean.numpy(), log_std.numpy(), rho)
    assert np.allclose(mine, runtimes, rtol=1e-4, atol=1e-4)


def test_an_action_that_counts_by_itself_has_its_marginal() -> None:
    generator = torch.Generator().manual_seed(0)
    actions, mean, log_std = (torch.randn(2, 4, 3, generator=generator) for _ in range(3))
    first = torch.tensor([[True, False, False, True], [True, False, True, False]])
    got = log_prob(actions, mean, log_std, 0.6, first)
    given = policy.log_prob(actions.numpy(), mean.numpy(), log_std.numpy(), 0.6)
    alone = policy.first_log_prob(actions.numpy(), mean.numpy(), log_std.numpy())
    assert np.allclose(got, np.where(first, alone, given), rtol=1e-4, atol=1e-4)


def test_log_prob_has_the_gradients_of_a_gaussian() -> None:
    mean = torch.tensor([[[1.0]]], requires_grad=True)
    log_std = torch.tensor([[[math.log(0.5)]]], requires_grad=True)
    log_prob(torch.tensor([[[2.0]]]), mean, log_std, 0.0).sum().backward()  # type: ignore[no-untyped-call]
    # d/dm = (a - m) / s^2 = 4, d/dlog s = z^2 - 1 = 3.
    assert mean.grad is not None and mean.grad.item() == pytest.approx(4.0)
    assert log_std.grad is not None and log_std.grad.item() == pytest.approx(3.0)


def test_correlated_noise_makes_the_mean_of_the_action_before_count() -> None:
    mean = torch.zeros(1, 2, 1, requires_grad=True)
    actions = torch.tensor([[[1.0], [2.0]]])
    by_action = log_prob(actions, mean, torch.zeros(1, 2, 1), 0.6)
    by_action[0, 1].backward()  # type: ignore[no-untyped-call]
    # xi = (2 - .6) / .8 = 1.75; d/dm_1 = xi / .8 and d/dm_0 = -.6 xi / .8.
    assert mean.grad is not None and mean.grad.flatten().tolist() == pytest.approx([-1.3125, 2.1875])
