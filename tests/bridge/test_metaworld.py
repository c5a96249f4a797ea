"""MetaWorld: determinism, agreement with MetaWorld itself, and what the cameras show. Needs software OpenGL."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from bridge.backend import Backend, BackendError, HasExpert
from bridge.backends import make_backend
from bridge.backends.metaworld import MetaWorld
from bridge.backends.metaworld_tasks import HELD_OUT, MT10, MT40, MT50, TRAINING
from bridge.backends.rendering import Renderer, check_gl
from bridge.config import BackendConfig, ConfigError
from bridge.messages import check_observation, observation_tensors

GL_SETTINGS = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "LP_NUM_THREADS")
ACTIONS = np.random.default_rng(7).uniform(-1.5, 1.5, (25, 4)).astype(np.float32)


def connected(tasks: list[str], **options) -> MetaWorld:
    backend = make_backend(BackendConfig("metaworld", {"tasks": tasks, **options}))
    assert isinstance(backend, MetaWorld)
    backend.connect()
    return backend


def trajectory(backend: MetaWorld, task: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Privileged states `[26, 39]` and rewards `[25]` under fixed actions."""
    backend.reset(task, seed)
    states, rewards = [backend.observe().privileged], []
    for action in ACTIONS:
        backend.apply(action)
        states.append(backend.observe().privileged)
        rewards.append(backend.outcome().reward)
    return np.stack(states), np.array(rewards)


@pytest.fixture(scope="module")
def mt10():
    backend = connected(["mt10"], cameras=[])
    yield backend
    backend.close()


def test_real_time_passes_with_the_steps_and_changes_nothing_else():
    backend = connected(["reach-v3"], cameras=[], real_time=True)
    quick = connected(["reach-v3"], cameras=[])
    assert backend.spec == quick.spec
    backend.reset("reach-v3", 1)
    quick.reset("reach-v3", 1)
    began_s = time.monotonic()
    for action in ACTIONS:
        backend.apply(action)
        quick.apply(action)
    # Each step ends at its deadline or later.
    assert time.monotonic() - began_s >= (len(ACTIONS) - 1) / backend.spec.control_hz
    np.testing.assert_array_equal(backend.observe().privileged, quick.observe().privileged)
    for each in (backend, quick):
        each.close()


def test_tasks_are_those_of_metaworld():
    from metaworld.env_dict import MT10_V3, MT50_V3

    assert list(MT10) == list(MT10_V3)
    assert set(MT50) == set(MT50_V3)
    assert len(MT40) == 40 and set(MT40) | set(MT10) == set(MT50)


def test_spec_is_known_before_connect():
    backend = make_backend(BackendConfig("metaworld", {"tasks": ["mt10", "hammer-v3", "reach-v3"]}))
    assert isinstance(backend, Backend)
    assert isinstance(backend, HasExpert)
    assert tuple(backend.spec.instructions) == (*MT10, "hammer-v3")
    assert backend.spec.privileged is not None
    assert len(backend.spec.privileged.names) == len(backend.spec.privileged.units) == 39
    with pytest.raises(BackendError, match=r"connect\(\)"):
        backend.reset("reach-v3", 0)
    with pytest.raises(BackendError, match=r"reset\(\)"):
        backend.observe()


def test_every_wording_means_one_task_and_the_held_out_ones_are_new_sentences_of_known_words():
    wordings = [text for texts in (*TRAINING.values(), *HELD_OUT.values()) for text in texts]
    assert len(wordings) == len(set(wordings)) == 50 * (6 + 3)
    assert TRAINING.keys() == HELD_OUT.keys()
    assert {len(texts) for texts in TRAINING.values()} == {6} and {len(texts) for texts in HELD_OUT.values()} == {3}
    words = {word for texts in TRAINING.values() for text in texts for word in text.replace(",", "").split()}
    assert {word for texts in HELD_OUT.values() for text in texts for word in text.replace(",", "").split()} <= words


def test_the_option_chooses_the_wordings():
    spec = make_backend(BackendConfig("metaworld", {"tasks": ["mt40"]})).spec
    assert spec.instructions == {task: TRAINING[task] for task in MT40}
    spec = make_backend(BackendConfig("metaworld", {"tasks": ["mt10"], "instructions": "held_out"})).spec
    assert spec.instructions == {task: HELD_OUT[task] for task in MT10}
    with pytest.raises(ConfigError, match=r"\$\.backend\.options\.instructions.*heldout"):
        make_backend(BackendConfig("metaworld", {"instructions": "heldout"}))


def test_control_rate_is_that_of_the_simulation(mt10):
    mt10.reset("reach-v3", 0)
    before = mt10._scene.env.data.time
    mt10.apply(mt10.hold_action())
    assert mt10._scene.env.data.time - before == pytest.approx(1 / mt10.spec.control_hz)


@pytest.mark.parametrize("task", MT10)
def test_episode_depends_on_task_and_seed_alone(mt10, task):
    fresh = connected([task], cameras=[])
    states, rewards = trajectory(fresh, task, 11)
    fresh.close()
    trajectory(mt10, "push-v3", 2)
    other, _ = trajectory(mt10, task, 12)
    mt10.reset(task, 13)
    for _ in range(60):  # leave objects moved, doors open and buttons pressed
        mt10.apply(mt10.expert_action())
    again, again_rewards = trajectory(mt10, task, 11)
    np.testing.assert_array_equal(again, states)
    np.testing.assert_array_equal(again_rewards, rewards)
    assert not np.array_equal(other[0], states[0])


@pytest.mark.parametrize("task", ["push-v3", "window-open-v3", "drawer-close-v3", "peg-insert-side-v3"])
def test_agrees_with_metaworld_itself(mt10, task):
    """The short reset and the changed model must not make another task of it."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    env = ALL_V3_ENVIRONMENTS[task]()
    env._partially_observable = False
    del env.sawyer_observation_space
    env._set_task_called = env.seeded_rand_vec = True
    env._freeze_rand_vec = False
    env.seed(21)
    env.reset_model()
    env._freeze_rand_vec = True
    env.reset()
    mt10.reset(task, 21)
    for action in ACTIONS:
        theirs, reward, _, _, info = env.step(np.clip(action, -1, 1))
        mt10.apply(action)
        # All but the previous frame, which is theirs from before the simulator had caught up at the first step.
        kept = np.r_[0:18, 36:39]
        np.testing.assert_allclose(mt10.observe().privileged[kept], theirs[kept], atol=2e-3)
        assert mt10.outcome().reward == pytest.approx(float(reward), abs=2e-2)
        assert (mt10.outcome().status == "success") == (info["success"] > 0)
    env.close()


def test_first_observation_is_not_stale(mt10):
    for task in MT10:
        mt10.reset(task, 5)
        first = mt10.observe().privileged
        np.testing.assert_array_equal(first[18:36], first[:18])
        mt10.apply(mt10.hold_action())
        # One step without a command moves nothing far; a stale object would jump by centimetres.
        np.testing.assert_allclose(mt10.observe().privileged[4:7], first[4:7], atol=0.01, err_msg=task)


def test_expert_succeeds_and_success_stays(mt10):
    for task in ("drawer-open-v3", "button-press-topdown-v3", "window-close-v3", "pick-place-v3"):
        mt10.reset(task, 1)
        steps = 0
        while mt10.outcome().status == "running":
            action = mt10.expert_action()
            assert action.dtype == np.float32
            np.testing.assert_array_equal(mt10.apply(action), action)
            steps += 1
            assert steps < 200, task
        for _ in range(30):
            mt10.apply(np.array([0, -1, 1, -1], np.float32))
        assert mt10.outcome().status == "success"
        mt10.reset(task, 2)
        assert (mt10.outcome().status, mt10.outcome().reward) == ("running", 0.0)


def test_actions_are_clipped_and_checked(mt10):
    mt10.reset("reach-v3", 0)
    np.testing.assert_array_equal(mt10.hold_action(), [0, 0, 0, -1])
    np.testing.assert_array_equal(mt10.apply(np.array([3, -3, 0.5, 2], np.float32)), [1, -1, 0.5, 1])
    np.testing.assert_array_equal(mt10.hold_action(), [0, 0, 0, 1])
    for bad in (np.array([0, 0, np.nan, 0]), np.zeros(3)):
        with pytest.raises(BackendError, match="4 finite numbers"):
            mt10.apply(bad)
    with pytest.raises(BackendError, match="no task 'hammer-v3'"):
        mt10.reset("hammer-v3", 0)
    with pytest.raises(BackendError, match="negative"):
        mt10.reset("reach-v3", -1)


def test_no_horizon_of_its_own(mt10):
    mt10.reset("reach-v3", 0)
    for _ in range(505):
        mt10.apply(mt10.hold_action())
    assert mt10.outcome().status == "running"


def test_cameras_show_hand_and_goal_and_leave_physics_alone(mt10):
    tasks = ["reach-v3", "push-v3", "pick-place-v3"]
    backend = connected(
        tasks,
        cameras=[
            {"name": "corner"},
            {"name": "far", "size_px": 48, "view": {"azimuth": 270, "elevation": -35}},
        ],
    )
    for task in tasks:
        seen, _ = trajectory(backend, task, 3)
        np.testing.assert_array_equal(seen, trajectory(mt10, task, 3)[0])
        backend.reset(task, 3)
        observation = backend.observe()
        check_observation(observation_tensors(observation), backend.spec)
        model = backend._scene.env.model
        goal, before = model.site("goal").id, observation.images
        model.site_rgba[goal, 3] = 0.0
        without = backend.observe().images
        model.site_rgba[goal, 3] = 1.0
        for camera, image in before.items():
            assert image.std() > 20
            assert (image != without[camera]).any(axis=2).sum() >= 8, f"the goal of {task} cannot be seen by {camera}"
        for _ in range(15):
            backend.apply(np.array([1, 1, 0, -1], np.float32))
        moved = (backend.observe().images["corner"] != before["corner"]).any(axis=2).mean()
        assert 0.02 < moved < 0.6
    backend.close()
    backend.close()
    backend.connect()
    backend.reset("push-v3", 3)
    assert backend.observe().images["far"].shape == (48, 48, 3)
    backend.close()


def test_pictures_do_not_depend_on_history():
    backend = connected(["drawer-open-v3", "reach-v3"])
    backend.reset("drawer-open-v3", 4)
    first = backend.observe().images["corner"]
    backend.reset("reach-v3", 1)
    reach = backend.observe().images["corner"]
    assert not np.array_equal(reach, first)
    backend.reset("drawer-open-v3", 9)  # drawn in a context that another task has used since
    assert not np.array_equal(backend.observe().images["corner"], first)
    backend.reset("drawer-open-v3", 4)
    np.testing.assert_array_equal(backend.observe().images["corner"], first)
    backend.close()


def test_a_plane_of_few_squares_looks_like_one_of_many():
    backend = connected(["reach-v3"], cameras=[{"name": "corner"}, {"name": "low", "view": {"elevation": -12}}])
    backend.reset("reach-v3", 4)
    few = backend.observe().images
    scene = backend._scene
    model = scene.env.model
    planes = model.geom_type == 0  # mjGEOM_PLANE
    assert planes.any()
    model.geom_size[planes, 2] = 0.1
    many = Renderer(model, backend._cameras, backend._gl)
    pictures = many.render(scene.env.data)
    model.geom_rgba[planes, 3] = 0.0
    without = many.render(scene.env.data)
    many.close()
    backend.close()
    for camera, image in pictures.items():
        np.testing.assert_array_equal(few[camera], image)
        assert not np.array_equal(without[camera], image), f"no plane can be seen by {camera}"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_software_rendering_starts_no_threads():
    code = """
import pathlib
from bridge.backends.rendering import check_gl
print(check_gl())
print(*(thread.read_text().strip() for thread in pathlib.Path("/proc/self/task").glob("*/comm")))
"""
    _, threads = run(code).stdout.splitlines()
    assert threads and "llvmpipe" not in threads
    driver, threads = run(code, LP_NUM_THREADS="2").stdout.splitlines()  # a setting of the user is kept
    assert ("llvmpipe-1" in threads) == ("llvmpipe" in driver)


def test_check_gl_names_the_driver():
    assert ": " in check_gl()


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key not in GL_SETTINGS}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=clean | env, check=False)


CONNECT = """
from bridge.backend import BackendError
from bridge.backends import make_backend
from bridge.config import BackendConfig
backend = make_backend(BackendConfig("metaworld", {"tasks": ["reach-v3"], "cameras": CAMERAS}))
try:
    backend.connect()
    backend.reset("reach-v3", 0)
    print(sorted(backend.observe().images))
except BackendError as error:
    print(error)
"""


def test_without_opengl_the_message_says_what_to_install():
    # MuJoCo's EGL refuses to be loaded beside another PyOpenGL platform, with or without a driver.
    done = run(CONNECT.replace("CAMERAS", "[{'name': 'a'}]"), MUJOCO_GL="egl", PYOPENGL_PLATFORM="osmesa")
    assert done.returncode == 0, done.stderr
    for word in ("libegl1", "libosmesa6", "fieldtune doctor", "MUJOCO_GL=egl"):
        assert word in done.stdout


def test_a_setting_of_the_user_is_kept():
    done = run("from bridge.backends.rendering import check_gl; check_gl()", MUJOCO_GL="disable")
    assert "MUJOCO_GL=disable" in done.stderr


def test_no_cameras_need_no_opengl():
    done = run(CONNECT.replace("CAMERAS", "[]"), MUJOCO_GL="disable")
    assert done.stdout.strip() == "[]", done.stderr


def test_mujoco_may_have_been_imported_before():
    done = run("import mujoco\n" + CONNECT.replace("CAMERAS", "[{'name': 'a'}]"))
    assert done.stdout.strip() == "['a']", done.stderr
