"""The backend for Gymnasium environments, on real ones and on one that draws."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from hypothesis import given
from hypothesis import strategies as st

from bridge.backend import Backend, BackendError
from bridge.backends import make_backend
from bridge.backends.gymnasium import Gymnasium
from bridge.backends.resizing import Resizer, area_weights
from bridge.config import BackendConfig, ConfigError
from bridge.messages import check_observation, observation_tensors


class Drawing(gym.Env):
    """Dict observation with an image; counts its steps and says in `info` that it is done after five."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}
    observation_space = Dict(
        {
            "wrist": Box(0, 255, (20, 30, 3), np.uint8),
            "joints": Box(-1, 1, (2,), np.float64),
            "mode": Discrete(3),
            "force": Box(-1, 1, (1,), np.float32),
        }
    )
    action_space = Box(np.array([-2.0, 1.0]), np.array([2.0, 3.0]), dtype=np.float64)

    def __init__(self, render_mode=None, ends=8):
        self.render_mode = render_mode
        self.ends = ends

    def _see(self):
        image = np.full((20, 30, 3), self.steps, np.uint8)
        return {"wrist": image, "joints": np.array([0.5, -0.5]), "mode": 0, "force": np.ones(1, np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._see(), {}

    def step(self, action):
        assert action.dtype == np.float64
        assert self.action_space.contains(action)
        self.steps += 1
        return self._see(), float(self.steps), self.steps >= self.ends, False, {"is_success": self.steps == 5}

    def render(self):
        image = np.zeros((40, 60, 3), np.uint8)
        image[:20] = 200  # the upper half is light
        return image


gym.register("Drawing-v0", entry_point=Drawing)

DRAWING = {
    "id": "Drawing-v0",
    "cameras": [{"name": "front", "size_px": 16}, {"name": "wrist", "size_px": 10, "source": "wrist"}],
    "state": ["force", "joints"],
    "success": "is_success",
    "instruction": "draw",
    "task": "drawing",
}


def make(options: dict) -> Gymnasium:
    backend = make_backend(BackendConfig("gymnasium", options))
    assert isinstance(backend, Gymnasium)
    assert isinstance(backend, Backend)
    backend.connect()
    return backend


def test_pendulum_is_state_only_and_times_out():
    backend = make({"id": "Pendulum-v1"})
    spec = backend.spec
    assert (spec.cameras, len(spec.state.names), spec.action.low, spec.action.high) == ((), 3, (-2.0,), (2.0,))
    assert spec.control_hz == 30.0
    assert spec.instructions == {"Pendulum-v1": ("",)}
    backend.reset("Pendulum-v1", 3)
    first = backend.observe()
    check_observation(observation_tensors(first), spec)
    assert backend.apply(np.array([9.0], np.float32)).tolist() == [2.0]
    for _ in range(198):
        backend.apply(backend.hold_action())
        assert backend.outcome().status == "running"
    backend.apply(backend.hold_action())
    assert backend.outcome().status == "timeout"
    backend.reset("Pendulum-v1", 3)
    np.testing.assert_array_equal(backend.observe().state, first.state)
    backend.close()


def test_mountain_car_terminates_as_the_options_say():
    for meaning in ("success", "failure"):
        backend = make({"id": "MountainCarContinuous-v0", "terminated": meaning})
        backend.reset("MountainCarContinuous-v0", 0)
        status = "running"
        while status == "running":
            push = np.sign(backend.observe().state[1]) or 1.0  # with the car's own motion: the known solution
            backend.apply(np.array([push], np.float32))
            status = backend.outcome().status
        assert status == meaning
        backend.close()


def test_dict_observation_and_cameras():
    backend = make(DRAWING)
    spec = backend.spec
    assert spec.state.names == ("force_0", "joints_0", "joints_1")
    assert [(c.name, c.height, c.width) for c in spec.cameras] == [("front", 16, 16), ("wrist", 10, 10)]
    assert spec.control_hz == 12.0
    assert spec.instructions == {"drawing": ("draw",)}
    np.testing.assert_array_equal(backend.hold_action(), [0.0, 1.0])
    backend.reset("drawing", 0)
    backend.apply(np.array([0.0, 0.0], np.float32))
    observation = backend.observe()
    check_observation(observation_tensors(observation), spec)
    np.testing.assert_array_equal(observation.state, np.array([1.0, 0.5, -0.5], np.float32))
    assert (observation.images["front"][:8] == 200).all()
    assert (observation.images["front"][8:] == 0).all()
    assert (observation.images["wrist"] == 1).all()
    backend.close()


def test_success_key_comes_first_and_stays():
    backend = make({**DRAWING, "cameras": []})
    backend.reset("drawing", 0)
    seen = []
    for _ in range(8):
        backend.apply(backend.hold_action())
        seen.append((backend.outcome().status, backend.outcome().reward))
    assert [status for status, _ in seen] == ["running"] * 4 + ["success"] * 4
    assert [reward for _, reward in seen] == [float(i) for i in range(1, 9)]
    backend.reset("drawing", 0)
    assert backend.outcome().status == "running"
    backend.close()


def test_success_key_that_never_comes_is_an_error():
    backend = make({**DRAWING, "cameras": [], "success": "solved", "kwargs": {"ends": 2}})
    backend.reset("drawing", 0)
    backend.apply(backend.hold_action())
    with pytest.raises(BackendError, match=r"'solved'.*is_success"):
        backend.apply(backend.hold_action())
    backend.close()


def test_closed_backend_refuses_and_connects_again():
    backend = make({"id": "Pendulum-v1"})
    with pytest.raises(BackendError, match=r"reset\(\)"):
        backend.observe()
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match=r"connect\(\)"):
        backend.reset("Pendulum-v1", 0)
    backend.connect()
    backend.reset("Pendulum-v1", 0)
    with pytest.raises(BackendError, match="'Pendulum-v1'"):
        backend.reset("push", 0)
    with pytest.raises(BackendError, match="1 finite numbers"):
        backend.apply(np.array([np.inf], np.float32))
    backend.close()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"id": "NoSuchEnv-v0"}, "$.backend.options.id: NoSuchEnv-v0 cannot be made"),
        ({"id": "CartPole-v1"}, "$.backend.options.id: the action of CartPole-v1 is Discrete"),
        ({"id": "Pendulum-v1", "imports": ["no_such_module"]}, "$.backend.options.imports[0]: no_such_module"),
        ({"id": "Pendulum-v1", "kwargs": {"gravy": 1}}, "$.backend.options.kwargs: Pendulum-v1 refuses"),
        ({"id": "Pendulum-v1", "state": ["a"]}, "$.backend.options.state[0]: 'a' is None, expected one of observation"),
        ({**DRAWING, "state": None}, "$.backend.options.state: missing"),
        ({**DRAWING, "state": ["mode"]}, "$.backend.options.state[0]: 'mode' is Discrete"),
        ({**DRAWING, "cameras": [{"name": "a", "source": "joints"}]}, "$.backend.options.cameras[0].source: 'joints'"),
        ({**DRAWING, "cameras": [{"name": "a"}, {"name": "a"}]}, "$.backend.options.cameras[1].name"),
        ({**DRAWING, "terminated": "maybe"}, "$.backend.options.terminated"),
    ],
)
def test_options_that_do_not_fit_the_environment(options, expected):
    with pytest.raises(ConfigError) as error:
        make_backend(BackendConfig("gymnasium", options))
    assert expected in str(error.value)


def test_resize_by_a_whole_factor_is_the_mean_of_blocks():
    image = np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8)
    blocks = image.reshape(12, 2, 12, 3, 3).astype(float).mean(axis=(1, 3))
    np.testing.assert_allclose(Resizer((24, 36), (12, 12))(image), blocks, atol=0.51)


def test_resize_up_by_a_whole_factor_repeats_pixels():
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    np.testing.assert_array_equal(Resizer((4, 4), (8, 8))(image), image.repeat(2, 0).repeat(2, 1))


@given(st.integers(1, 200), st.integers(1, 200))
def test_area_weights_share_out_every_pixel(old, new):
    weights = area_weights(old, new)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(weights.sum(axis=0), new / old, rtol=1e-4)
