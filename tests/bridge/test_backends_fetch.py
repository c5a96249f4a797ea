"""Fetch of gymnasium-robotics by YAML alone: on a stand-in that has its spaces, and on the real one where it is."""

import importlib.util
import sys
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict

from bridge.backend import BackendError
from bridge.backends import make_backend
from bridge.config import BackendConfig, ConfigError, load_yaml
from bridge.conformance import check_backend

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FETCH = {"fetch_reach": 10, "fetch_push": 25}
"""Configuration -> elements of `observation`."""


class StandIn(gym.Env):
    """Spaces, dtypes, info, arguments and rate of gymnasium-robotics 1.4.2; a ball and a gripper, no physics."""

    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": 25}
    elements = 10

    def __init__(
        self, reward_type="sparse", render_mode=None, width=480, height=480, default_camera_config=None, draws=True
    ):
        goal = Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = Box(-1.0, 1.0, (4,), np.float32)
        self.observation_space = Dict(
            desired_goal=goal, achieved_goal=goal, observation=Box(-np.inf, np.inf, (self.elements,), np.float64)
        )
        self.render_mode, self.size, self.draws = render_mode, (height, width), draws
        self.camera = default_camera_config

    def _see(self):
        rest = np.arange(3, self.elements, dtype=np.float64)
        return {
            "observation": np.concatenate([self.gripper, rest]),
            "achieved_goal": self.gripper.copy(),
            "desired_goal": self.goal.copy(),
        }

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.gripper = np.array([1.34, 0.75, 0.53])
        self.goal = self.gripper + self.np_random.uniform(-0.15, 0.15, 3)
        return self._see(), {}

    def step(self, action):
        assert action.shape == (4,) and action.dtype == np.float32
        self.gripper = self.gripper + 0.05 * action[:3]
        distance = np.linalg.norm(self.gripper - self.goal)
        info = {"is_success": (distance < 0.05).astype(np.float32)}
        return self._see(), -(distance > 0.05).astype(np.float32), False, False, info

    def render(self):
        if not self.draws:
            raise RuntimeError("No OpenGL backend could be imported")
        assert self.render_mode == "rgb_array"
        image = np.zeros((*self.size, 3), np.uint8)
        row, column = (int(self.size[i] * (0.5 + 2 * (self.goal - [1.34, 0.75, 0.53])[i])) for i in (0, 1))
        image[row - 2 : row + 2, column - 2 : column + 2, 0] = 255
        return image


class StandInPush(StandIn):
    elements = 25


@pytest.fixture
def stand_in(monkeypatch):
    """A module `gymnasium_robotics` whose ids are those of the stand-in."""
    ids = {"FetchReach-v4": StandIn, "FetchPush-v4": StandInPush}
    for name, kind in ids.items():
        monkeypatch.setitem(
            gym.registry, name, gym.envs.registration.EnvSpec(name, entry_point=kind, max_episode_steps=50)
        )
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", types.ModuleType("gymnasium_robotics"))


def make(name: str, **changes):
    read = load_yaml(CONFIGS / f"{name}.yaml")["backend"]
    return make_backend(BackendConfig(read["name"], {**read["options"], **changes}))


@pytest.mark.parametrize(("name", "elements"), FETCH.items())
def test_the_configuration_is_all_it_needs(stand_in, name, elements):
    spec = make(name).spec
    assert (spec.control_hz, spec.action.kind, spec.action.low) == (25.0, "delta", (-1.0,) * 4)
    assert spec.state.names == ("observation_0", "observation_1", "observation_2")
    assert len(spec.privileged.names) == elements + 3 and spec.privileged.names[-1] == "desired_goal_2"
    assert len(spec.instructions[name.replace("_", "-")]) == 3
    checks = check_backend(lambda: make(name), samples=3)
    assert [row for row in checks if row.state in ("failed", "warned")] == []
    assert [row.name for row in checks if row.state == "skipped"] == ["unplugged"]


def test_pixels_show_the_goal_the_state_does_not_and_success_comes_from_info(stand_in):
    backend = make("fetch_reach")
    backend.connect()
    backend.reset("fetch-reach", 4)
    seen = backend.observe()
    position, goal = seen.state.copy(), seen.privileged[-3:]
    np.testing.assert_allclose(position, [1.34, 0.75, 0.53], atol=1e-6)
    rows, columns = np.nonzero(seen.images["front"][..., 0])
    expected = 96 * (0.5 + 2 * (goal - position)[:2])
    np.testing.assert_allclose([rows.mean(), columns.mean()], expected, atol=1.6)  # the ball is 4 px wide
    for _ in range(20):
        assert backend.outcome().status == "running"
        backend.apply(np.append(np.clip(20 * (goal - backend.observe().state), -1, 1), 0).astype(np.float32))
        if backend.outcome().status == "success":
            break
    assert backend.outcome().status == "success" and backend.outcome().reward == 0.0
    assert np.linalg.norm(backend.observe().state - goal) < 0.05


def test_fifty_steps_without_success_are_a_timeout(stand_in):
    backend = make("fetch_push")
    backend.connect()
    backend.reset("fetch-push", 1)
    away = np.array([1, 1, 1, 0], np.float32)
    for _ in range(50):
        assert backend.outcome().status == "running"
        backend.apply(away)
    assert (backend.outcome().status, backend.outcome().reward) == ("timeout", -1.0)


def test_the_camera_and_the_size_reach_the_environment(stand_in):
    env = make("fetch_reach")._env.unwrapped
    assert env.size == (96, 96) and env.camera["lookat"] == [1.3, 0.75, 0.5]


def test_a_picture_that_cannot_be_drawn_says_what_to_do(stand_in):
    backend = make("fetch_reach", kwargs={"draws": False})
    backend.reset("fetch-reach", 0)
    with pytest.raises(BackendError, match=r"cannot draw: RuntimeError: No OpenGL backend.*fieldtune doctor"):
        backend.observe()


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(ConfigError, match=r"imports\[0\].*pip install 'fieldtune\[gymnasium-robotics\]'"):
        make("fetch_reach")


@pytest.mark.slow
@pytest.mark.parametrize("name", FETCH)
@pytest.mark.skipif(importlib.util.find_spec("gymnasium_robotics") is None, reason="gymnasium-robotics is not there")
def test_the_real_fetch_passes(name):
    checks = check_backend(lambda: make(name), samples=3)
    assert [row for row in checks if row.state in ("failed", "warned")] == []


class Picture(gym.Env):
    """An environment whose whole observation is a picture, as CarRacing's is."""

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = Box(0, 255, (20, 30, 3), np.uint8)
    action_space = Box(-1, 1, (2,), np.float32)

    def __init__(self, render_mode=None, limit=1.0):
        self.action_space = Box(-limit, limit, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.image = self.np_random.integers(0, 256, (20, 30, 3), np.uint8)
        return self.image, {}

    def step(self, action):
        return self.image, 0.0, False, False, {}


gym.register("Picture-v0", entry_point=Picture)


def gymnasium_backend(**options):
    return make_backend(BackendConfig("gymnasium", options))


def test_an_observation_that_is_a_picture_is_a_camera_and_no_state():
    backend = gymnasium_backend(id="Picture-v0", cameras=[{"name": "front", "size_px": 20, "source": "observation"}])
    assert backend.spec.state.names == () and backend.spec.privileged is None
    backend.reset("Picture-v0", 3)
    seen = backend.observe()
    assert seen.state.shape == (0,) and seen.images["front"].shape == (20, 20, 3)
    assert abs(seen.images["front"].mean() - backend._env.unwrapped.image.mean()) < 1.0


def test_parts_of_a_box_observation():
    backend = gymnasium_backend(id="Pendulum-v1", state=["observation[:2]"], privileged=["observation"])
    assert backend.spec.state.names == ("observation_0", "observation_1")
    backend.reset("Pendulum-v1", 0)
    seen = backend.observe()
    np.testing.assert_array_equal(seen.state, seen.privileged[:2])
    assert seen.privileged.shape == (3,)


@pytest.mark.parametrize("entry", ["observation[2:9]", "observation[2:2]", "observation[3:]"])
def test_a_part_that_is_not_there_is_refused(entry):
    with pytest.raises(ConfigError, match=r"options.privileged\[0\]: .* which has 3 elements"):
        gymnasium_backend(id="Pendulum-v1", privileged=[entry])


def test_limits_that_do_not_limit_are_refused():
    with pytest.raises(ConfigError, match=r"options.id: the action of Picture-v0 .* expected finite limits"):
        gymnasium_backend(id="Picture-v0", kwargs={"limit": np.inf})
