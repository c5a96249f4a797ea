"""The registry of backends, and the toy backend `point`."""

import subprocess
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.backend import Backend, BackendError, BackendSpec, HasExpert, all_instructions, instruction_of
from bridge.backends import BACKENDS, make_backend
from bridge.backends.point import MIN_START_DISTANCE, RADIUS, STEP, Point, PointOptions
from bridge.config import BackendConfig, ConfigError
from bridge.messages import check_observation, observation_tensors


class OwnArm(Point):
    """A backend as a user would write it, with keyword arguments."""

    def __init__(self, port: str, speed: float = 1.0) -> None:
        if speed <= 0:
            raise ValueError("speed must be above 0")
        super().__init__(PointOptions())
        self.port = port


class NoStop(OwnArm):
    stop = None


class NoSpec(OwnArm):
    @property
    def spec(self) -> BackendSpec:
        return "an arm"


def refused(name: str, options: dict | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        make_backend(BackendConfig(name, options or {}))
    return str(error.value)


def test_names_of_shipped_backends():
    assert BACKENDS == ("metaworld", "gymnasium", "lerobot", "so101", "point", "remote", "replay")
    backend = make_backend(BackendConfig("point", {"size_px": 48}))
    assert isinstance(backend, Backend)
    assert isinstance(backend, HasExpert)
    assert backend.spec.cameras[0].height == 48


SPEC = Point(PointOptions()).spec


def test_each_task_has_one_wording_or_several_and_an_episode_gets_that_of_its_seed():
    spec = msgspec.structs.replace(SPEC, instructions={"a": "go", "b": ("one", "two", "three"), "c": [""]})
    assert spec.instructions == {"a": ("go",), "b": ("one", "two", "three"), "c": ("",)}
    assert [instruction_of(spec, "b", seed) for seed in range(4)] == ["one", "two", "three", "one"]
    assert {instruction_of(spec, "a", seed) for seed in range(4)} == {"go"}
    assert all_instructions(spec) == ["go", "one", "two", "three", ""]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=BackendSpec) == spec


def test_a_spec_with_plain_texts_can_be_read():
    written = {**msgspec.to_builtins(SPEC), "instructions": {"a": "go"}}
    assert msgspec.convert(written, BackendSpec).instructions == {"a": ("go",)}


@pytest.mark.parametrize("given", [(), [], 5, None, ("go", 5), {"go": 1}])
def test_a_task_without_a_text_is_refused_and_named(given):
    with pytest.raises(ValueError, match=r"instructions\['b'\] must be a text"):
        msgspec.structs.replace(SPEC, instructions={"a": "go", "b": given})
    with pytest.raises(msgspec.ValidationError, match="instructions"):
        msgspec.convert({**msgspec.to_builtins(SPEC), "instructions": {"a": "go", "b": given}}, BackendSpec)


def test_unknown_name_is_refused_with_the_nearest():
    message = refused("metawrld")
    assert message.startswith("$.backend.name:")
    assert "did you mean 'metaworld'" in message


@pytest.mark.parametrize(
    ("name", "options", "path"),
    [
        ("point", {"sizepx": 32}, "$.backend.options.sizepx: unknown key; did you mean `size_px`?"),
        ("point", {"size_px": "big"}, "$.backend.options.size_px: Expected `int`"),
        ("point", {"size_px": 2}, "$.backend.options.size_px: Expected `int` >= 8"),
        ("gymnasium", {}, "$.backend.options: Object missing required field `id`"),
        ("gymnasium", {"id": "Pendulum-v1", "cameras": [{"nam": "x"}]}, "nam: unknown key"),
        ("metaworld", {"tasks": ["drawer-opn-v3"]}, "did you mean 'drawer-open-v3'"),
        ("metaworld", {"tasks": []}, "$.backend.options.tasks: is empty"),
        ("metaworld", {"cameras": [{"name": "a"}, {"name": "a"}]}, "$.backend.options.cameras[1].name"),
        ("metaworld", {"cameras": [{"name": "a", "view": {"azimut": 1}}]}, "azimut: unknown key"),
    ],
)
def test_options_are_refused_by_path(name, options, path):
    assert path in refused(name, options)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    message = refused("metaworld")
    assert message.startswith("$.backend.name:")
    assert "pip install 'fieldtune[metaworld]'" in message


def test_own_class():
    backend = make_backend(BackendConfig(f"{__name__}:OwnArm", {"port": "/dev/arm"}))
    assert isinstance(backend, OwnArm)
    assert backend.port == "/dev/arm"


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("OwnArm", {"prt": "x"}, "$.backend.options.prt: unknown key for OwnArm (known: port, speed)"),
        ("OwnArm", {}, "$.backend.options.port: missing"),
        ("OwnArm", {"port": "x", "speed": -1}, "$.backend.options: "),
        ("OwnAr", {}, "has no class 'OwnAr'"),
        ("NoStop", {"port": "x"}, "has no method stop()"),
        ("NoSpec", {"port": "x"}, "has no property spec of type BackendSpec (found str)"),
    ],
)
def test_own_class_is_refused(name, options, expected):
    assert expected in refused(f"{__name__}:{name}", options)


def test_own_module_is_refused():
    assert refused("no_such_module_here:Arm").startswith("$.backend.name:")
    assert refused(":Arm").startswith("$.backend.name:")


def test_registry_imports_no_simulator():
    code = (
        "import sys, bridge.backends as b; from bridge.config import BackendConfig as C;"
        "b.make_backend(C('metaworld')); b.make_backend(C('point'));"
        "print([m for m in ('metaworld', 'mujoco', 'gymnasium', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def start(seed: int) -> Point:
    point = Point(PointOptions())
    point.connect()
    point.reset("reach", seed)
    return point


@given(st.integers(0, 2**63 - 1))
def test_point_expert_arrives(seed):
    point = start(seed)
    distance = np.linalg.norm(point.observe().privileged[:2] - point.observe().privileged[2:])
    assert distance >= MIN_START_DISTANCE
    steps = 0
    while point.outcome().status == "running":
        action = point.expert_action()
        assert np.linalg.norm(action) <= 0.5 + 1e-6
        np.testing.assert_array_equal(point.apply(action), action)
        steps += 1
        assert steps < 60
    assert steps == pytest.approx((distance - RADIUS) / (0.5 * STEP), abs=1.01)


def test_point_depends_on_the_seed_alone():
    one, two = start(5), start(4)
    two.apply(np.ones(2, np.float32))
    two.reset("reach", 5)
    np.testing.assert_array_equal(one.observe().privileged, two.observe().privileged)
    np.testing.assert_array_equal(one.observe().images["top"], two.observe().images["top"])
    assert not np.array_equal(start(6).observe().privileged, one.observe().privileged)


@given(st.integers(0, 1000), st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), max_size=40))
def test_point_stays_inside_and_fits_its_spec(seed, actions):
    point = start(seed)
    for action in actions:
        sent = point.apply(np.array(action, np.float32))
        assert np.abs(sent).max() <= 1.0
    observation = point.observe()
    assert np.abs(observation.state).max() <= 1.0
    check_observation(observation_tensors(observation), point.spec)
    image = observation.images["top"]
    assert (image == (255, 255, 255)).all(axis=2).sum() >= 4  # the dot shows, even in a corner
    assert (image == (0, 200, 0)).all(axis=2).sum() >= 4


def test_point_draws_up_as_up():
    point = start(0)
    for _ in range(30):
        point.apply(np.array([0.0, 1.0], np.float32))
    rows = np.argwhere((point.observe().images["top"] == (255, 255, 255)).all(axis=2))[:, 0]
    assert rows.min() == 0


def test_point_refuses():
    point = Point(PointOptions())
    for call in (point.observe, point.outcome, point.expert_action):
        with pytest.raises(BackendError, match=r"reset\(\)"):
            call()
    with pytest.raises(BackendError, match="'reach'"):
        point.reset("push", 0)
    point.reset("reach", 0)
    for bad in (np.array([np.nan, 0.0]), np.zeros(3)):
        with pytest.raises(BackendError, match="2 finite numbers"):
            point.apply(bad)
