"""The conformance suite: shipped backends pass it, and each rule finds its own fault and no other."""

import subprocess
import sys
import time
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from test_backends_lerobot import OPTIONS as LEROBOT

from bridge.backend import BackendError, Observation, Outcome
from bridge.backends import BACKENDS, make_backend
from bridge.backends.point import Point, PointOptions
from bridge.backends.remote import Remote, RemoteOptions
from bridge.config import BackendConfig
from bridge.conformance import RULES, Check, check_backend
from bridge.conformance_order import CanBeUnplugged
from bridge.messages import observation_tensors

SEEN_EVERY_STEPS = 4


@pytest.fixture
def far(tmp_path):
    """A process that serves the point; its endpoint."""
    endpoint = f"ipc://{tmp_path}/far/backend.sock"
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("far_robot.py"), "serve", endpoint, "60"], stdin=subprocess.DEVNULL
    )
    Remote(RemoteOptions(endpoint, timeout_s=60.0))  # it is there when it has told its spec
    yield endpoint
    process.kill()
    process.wait()


@pytest.fixture
def log(tmp_path):
    """A log of what the point saw at every fourth of its steps, as a policy that plays four actions leaves it."""
    from runtime.episode import FORMAT, DecisionRecord, EndRecord, EpisodeStart, ExecutedRecord
    from runtime.episodes import EpisodeLog
    from runtime.records import tensor_records

    log, point = EpisodeLog(tmp_path / "log"), Point(PointOptions(size_px=16))
    point.connect()
    actions = np.full((SEEN_EVERY_STEPS, 2), 0.1, np.float32)
    for seed in range(2):
        point.reset("reach", seed)
        episode = f"e{seed}"
        log.start(
            EpisodeStart(
                format=FORMAT, episode=episode, task="reach", instruction="go", seed=seed, source="policy",
                explore=False, client="c", spec=point.spec, started_unix_s=1.0,
            )
        )  # fmt: skip
        for number in range(5):
            seen = {**observation_tensors(point.observe()), "actions": actions}
            step = number * SEEN_EVERY_STEPS
            log.append(
                episode,
                DecisionRecord(decision=number + 1, step=step, version="v", tensors=tensor_records(seen)),
            )
            sent = np.stack([point.apply(action) for action in actions])
            done = {"sent": sent, "reward": np.zeros(SEEN_EVERY_STEPS, np.float32)}
            log.append(episode, ExecutedRecord(decision=number + 1, tensors=tensor_records(done)))
        last = tensor_records(observation_tensors(point.observe()))
        stored = Event()
        log.end(
            episode,
            EndRecord(status="success", steps=5 * SEEN_EVERY_STEPS, reason="", tensors=last),
            lambda error, stored=stored: stored.set(),
        )
        assert stored.wait(30)
    log.close()
    return tmp_path / "log"


@pytest.fixture
def options(request, tmp_path):
    """Options under which a shipped backend is checked."""
    drawn = {"name": "side", "device": "drawn", "height": 32, "width": 32}
    shipped = {
        "point": dict,
        "metaworld": lambda: {"tasks": ["reach-v3"], "cameras": [{"name": "corner", "size_px": 16}]},
        # A plant that stays where it is without an action.
        "gymnasium": lambda: {"id": "Reacher-v5", "cameras": []},
        "lerobot": lambda: LEROBOT,
        "remote": lambda: {"endpoint": request.getfixturevalue("far"), "timeout_s": 1.5},
        "replay": lambda: {"directory": str(request.getfixturevalue("log"))},
        "so101": lambda: {"emulate": True, "timeout_ms": 300.0, "home_speed_deg_s": 180.0, "cameras": [drawn]},
        "so101 absolute": lambda: {**shipped["so101"](), "actions": "absolute"},
    }
    return lambda name: shipped[name]()


SKIPPED = {
    "lerobot": {"hold keeps still", "unplugged"},
    "remote": set(),
    "replay": {"hold keeps still", "unplugged"},
    "so101": {"hold keeps still"},
    "so101 absolute": {"hold keeps still"},
}
"""What cannot be asked of a backend; of the others, what needs a cable."""


def check(make, **arguments) -> dict[str, Check]:
    checks = check_backend(make, samples=3, **arguments)
    assert [row.name for row in checks] == [rule.name for rule in RULES]
    return {row.name: row for row in checks}


def names(checks: dict[str, Check], *states: str) -> set[str]:
    return {name for name, row in checks.items() if row.state in states}


@pytest.mark.parametrize("name", [*BACKENDS, "so101 absolute"])
def test_every_shipped_backend_passes(name, options):
    for package in {"metaworld": ("metaworld",), "gymnasium": ("gymnasium", "mujoco")}.get(name, ()):
        pytest.importorskip(package)
    given = options(name)
    checks = check(lambda: make_backend(BackendConfig(name.split()[0], given)), moves=True)
    # A machine that is busy with other tests keeps no time.
    late = {name for name, row in checks.items() if "too slow for" in row.found}
    bad = {row for name, row in checks.items() if row.state in ("failed", "warned") and name not in late}
    assert bad == set()
    assert names(checks, "skipped") == SKIPPED.get(name, {"unplugged"})


class Good(Point):
    """What the broken ones are made of."""

    def __init__(self) -> None:
        super().__init__(PointOptions())

    def with_spec(self, **changes):
        self._spec = msgspec.structs.replace(self._spec, **changes)


def with_action(**changes):
    class Changed(Good):
        def __init__(self):
            super().__init__()
            self.with_spec(action=msgspec.structs.replace(self._spec.action, **changes))

    return Changed


class NumpyInSpec(Good):
    def __init__(self):
        super().__init__()
        self.with_spec(control_hz=np.float32(10))


class NoRate(Good):
    def __init__(self):
        super().__init__()
        self.with_spec(control_hz=0.0)


class NoTask(Good):
    def __init__(self):
        super().__init__()
        self.with_spec(instructions={})


class TwoOfAName(Good):
    def __init__(self):
        super().__init__()
        self.with_spec(state=msgspec.structs.replace(self._spec.state, names=("x", "x")))


class StopNeedsConnect(Good):
    port = None

    def connect(self):
        self.port = SimpleNamespace(write=lambda data: None)

    def stop(self):
        self.port.write(b"stop")


class CrashesBeforeConnect(Good):
    seen = None

    def reset(self, task, seed):
        super().reset(task, seed)
        self.seen = super().observe()

    def observe(self):
        return super().observe() if self.seen.images else None


class SaysItSent(Good):
    def apply(self, action):
        if not self._running:
            return action
        return super().apply(action)


class NoDevice(Good):
    def connect(self):
        raise BackendError("/dev/ttyACM0 is not there; plug it in")


class LearnsItsRateInConnect(Good):
    def connect(self):
        self.with_spec(control_hz=25.0)


class TaskThatCannotStart(Good):
    def __init__(self):
        super().__init__()
        self.with_spec(instructions={"reach": "go", "dance": "dance"})

    def reset(self, task, seed):
        if task == "dance":
            raise BackendError("the music is missing")
        super().reset(task, seed)


class TakesAnyTask(Good):
    def reset(self, task, seed):
        super().reset("reach", seed)


class DoubleState(Good):
    def observe(self):
        seen = super().observe()
        return Observation(seen.images, seen.state.astype(np.float64), seen.privileged)


class NotFinite(Good):
    def observe(self):
        seen = super().observe()
        return Observation(seen.images, np.full(2, np.nan, np.float32), seen.privileged)


class CameraIsGone(Good):
    def observe(self):
        raise BackendError("the camera is gone")


class CappedCamera(Good):
    def observe(self):
        seen = super().observe()
        return Observation({"top": np.zeros_like(seen.images["top"])}, seen.state, seen.privileged)


class OneBuffer(Good):
    buffer = None

    def observe(self):
        seen = super().observe()
        if self.buffer is None:
            self.buffer = seen.images["top"]
        self.buffer[:] = seen.images["top"]
        return Observation({"top": self.buffer}, seen.state, seen.privileged)


class IgnoresTheSeed(Good):
    starts = 0

    def reset(self, task, seed):
        self.starts += 1
        super().reset(task, self.starts)


class HoldOutside(Good):
    def hold_action(self):
        return np.full(2, 1.5, np.float32)


class HoldDrifts(Good):
    def hold_action(self):
        return np.full(2, 0.5, np.float32)


class SentIsDouble(Good):
    def apply(self, action):
        return super().apply(action).astype(np.float64)


class WritesIntoTheAction(Good):
    def apply(self, action):
        sent = super().apply(action)
        action *= 0
        return sent


class HalvesActions(Good):
    def apply(self, action):
        return super().apply(action / 2)


class ClipsInSecret(Good):
    def apply(self, action):
        super().apply(action)
        return action


class TakesNaN(Good):
    def apply(self, action):
        return super().apply(np.nan_to_num(action)[:2])


class RefusesByCrashing(Good):
    def apply(self, action):
        if not np.isfinite(action).all():
            raise ZeroDivisionError("no")
        return super().apply(action)


class StatusDone(Good):
    def outcome(self):
        return Outcome("done", 0.0) if super().outcome() else None


class RewardIsNumpy(Good):
    def outcome(self):
        return Outcome(super().outcome().status, np.float32(0))


class StopsOnce(Good):
    stops = 0

    def connect(self):
        self.stops = 1

    def stop(self):
        self.stops += self.stops > 0
        if self.stops > 2:
            raise RuntimeError("is stopped already")


class StopsForGood(Good):
    stopped = False

    def connect(self):
        self.connected = True

    def stop(self):
        self.stopped = hasattr(self, "connected")

    def reset(self, task, seed):
        if self.stopped:
            raise BackendError("is stopped")
        super().reset(task, seed)


class ClosesOnce(Good):
    closes = 0

    def connect(self):
        self.closes = 1

    def close(self):
        self.closes += self.closes > 0
        if self.closes > 2:
            raise OSError("bad file descriptor")
        super().close()


class StopsNothingWhenClosed(Good):
    device = SimpleNamespace(halt=lambda: None)

    def close(self):
        super().close()
        if hasattr(self, "opened"):
            self.device = None

    def connect(self):
        self.opened = True

    def stop(self):
        self.device.halt()


class ActsWhenClosed(Good):
    closed = False

    def close(self):
        super().close()
        self.closed = True

    def apply(self, action):
        return action if self.closed else super().apply(action)


class Cut(Good):
    """Notices that it was unplugged."""

    cut = False

    def unplug_for_test(self):
        self.cut = True

    def _check_running(self):
        if self.cut:
            raise BackendError("the cable is out")
        super()._check_running()


class FreezesWhenCut(Cut):
    def observe(self):
        cut, self.cut = self.cut, False
        seen = super().observe()
        self.cut = cut
        return seen


class CrashesWhenCut(Cut):
    def apply(self, action):
        if self.cut:
            raise OSError("input/output error")
        return super().apply(action)


@pytest.mark.parametrize(
    ("broken", "rule", "words"),
    [
        (NumpyInSpec, "spec types", "cannot be sent"),
        (with_action(units=("cm",)), "spec names and units", "2 names and 1 units"),
        (with_action(low=(-1.0,)), "spec names and units", "1 limits in `low`"),
        (TwoOfAName, "spec names and units", "'x' 2 times"),
        (with_action(high=(1.0, np.inf)), "spec limits", "not finite"),
        (with_action(low=(1.0, -1.0)), "spec limits", "action vx goes from 1.0 up to 1.0"),
        (NoRate, "spec rate and tasks", "control_hz is 0.0"),
        (NoTask, "spec rate and tasks", "no task"),
        (StopNeedsConnect, "stop and close before connect", "AttributeError"),
        (CrashesBeforeConnect, "calls before connect", "observe() before connect() raises AttributeError"),
        (NoDevice, "connect", "plug it in"),
        (LearnsItsRateInConnect, "spec after connect", "control_hz"),
        (TaskThatCannotStart, "reset", "the music is missing"),
        (TakesAnyTask, "unknown task", "is taken"),
        (DoubleState, "observe", "tensors.state: is <f8[2], expected <f4[2]"),
        (NotFinite, "observe", "not finite"),
        (CameraIsGone, "observe", "the camera is gone"),
        (OneBuffer, "fresh arrays", "image/top"),
        (IgnoresTheSeed, "equal seeds", "starts differ"),
        (HoldOutside, "hold action", "outside the limits"),
        (HoldDrifts, "hold keeps still", "x drifts by 0.25 in 5 steps"),
        (SentIsDouble, "apply", "float64[2], expected float32[2]"),
        (WritesIntoTheAction, "apply", "writes into"),
        (ClipsInSecret, "beyond the limits", "outside the limits"),
        (TakesNaN, "bad actions", "NaN is taken"),
        (RefusesByCrashing, "bad actions", "ZeroDivisionError"),
        (StatusDone, "outcome", "'done'"),
        (RewardIsNumpy, "outcome", "reward is"),
        (StopsOnce, "stop", "is stopped already"),
        (StopsForGood, "reset after stop", "is stopped"),
        (ClosesOnce, "close", "bad file descriptor"),
        (StopsNothingWhenClosed, "stop after close", "AttributeError"),
        (ActsWhenClosed, "calls after close", "says that it sent something"),
        (FreezesWhenCut, "unplugged", "observe() went on"),
        (CrashesWhenCut, "unplugged", "OSError"),
    ],
)
def test_a_fault_is_found_by_its_rule_alone(broken, rule, words, monkeypatch):
    monkeypatch.setattr("bridge.conformance_order.UNPLUGGED_S", 0.05)
    checks = check(broken)
    assert names(checks, "failed", "warned") == {rule}, checks
    assert words in checks[rule].found
    assert checks[rule].mend


def test_a_whole_spec_is_needed_for_the_rest():
    checks = check(NoRate)
    assert names(checks, "passed") == {"spec types", "spec names and units", "spec limits"}


@pytest.mark.parametrize(
    ("odd", "rule", "words"),
    [(CappedCamera, "pictures", "one value everywhere: top"), (HalvesActions, "apply", "changed by")],
)
def test_what_may_be_right_is_a_warning(odd, rule, words):
    checks = check(odd)
    assert names(checks, "failed") == set()
    assert names(checks, "warned") == {rule}
    assert words in checks[rule].found


def test_a_cut_cable_that_is_noticed_passes():
    assert isinstance(Cut(), CanBeUnplugged) and not isinstance(Good(), CanBeUnplugged)
    assert check(Cut)["unplugged"].state == "passed"


class Arm(Good):
    """A robot of two joints with absolute targets: it records what was asked of it."""

    def __init__(self, log, hz=1000.0):
        super().__init__()
        self.log = log
        action = msgspec.structs.replace(self._spec.action, kind="absolute")
        self.with_spec(action=action, paced=True, control_hz=hz, privileged=None)
        self._point = np.array([0.2, -0.7])
        self._goal = np.array([0.9, 0.9])

    def reset(self, task, seed):
        self.log.append("reset")
        if task != "reach":
            raise BackendError(f"no task {task!r}")
        self._running = True

    def _check_running(self):
        """It is seen without an episode, too."""

    def observe(self):
        seen = super().observe()
        seen.privileged = None
        return seen

    def apply(self, action):
        if not self._running:
            raise BackendError("not connected")
        if np.shape(action) != (2,) or not np.isfinite(action).all():
            raise BackendError("two finite numbers")
        self.log.append(np.array(action))
        self._point = np.clip(action, -1, 1).astype(np.float32)
        return self._point.copy()

    def hold_action(self):
        return self._point.astype(np.float32)


def test_a_robot_is_not_moved_unless_it_may_be():
    log = []
    checks = check(lambda: Arm(log))
    assert log == []
    assert names(checks, "failed") == set()
    moving = {rule.name for rule in RULES if rule.moves}
    assert names(checks, "skipped") == moving
    assert "--moves" in checks["apply"].mend


def test_a_robot_that_observes_in_an_episode_only_is_not_reset_for_it():
    class Shy(Arm):
        def _check_running(self):
            if not self._running:
                raise BackendError("no episode")

    log = []
    checks = check(lambda: Shy(log))
    assert log == [] and names(checks, "failed") == set()
    assert "in an episode only" in checks["observe"].found and checks["close"].state == "passed"


def test_a_robot_is_moved_gently():
    log = []
    checks = check(lambda: Arm(log), moves=True)
    assert names(checks, "failed") == set(), checks
    assert names(checks, "skipped") == {"hold keeps still", "unplugged"}
    targets = [np.array([0.2, -0.7])] + [entry for entry in log if not isinstance(entry, str)]
    steps = np.abs(np.diff(np.clip(targets, -1, 1), axis=0))
    assert steps.max() <= 0.04 + 1e-6  # 2 % of the range
    assert np.min(targets) < -1.0  # the joint that was nearest to a limit has been asked to go beyond it


class UnevenStarts(Arm):
    def reset(self, task, seed):
        super().reset(task, seed)
        self._point = self._point + 0.001


def test_starts_of_a_robot_are_reported_and_not_failed():
    row = check(lambda: UnevenStarts([]), moves=True)["equal seeds"]
    assert row.state == "passed" and "differ" in row.found


class SlowCamera(Arm):
    def observe(self):
        time.sleep(0.01)
        return super().observe()


def test_a_robot_that_cannot_keep_its_rate_is_warned_of():
    checks = check(lambda: SlowCamera([]), moves=True)
    assert names(checks, "warned") >= {"time of observe", "time of apply"}
    assert "too slow for 1000 Hz" in checks["time of observe"].found


def test_a_simulator_takes_the_time_that_it_takes():
    class Slow(Good):
        def __init__(self):
            super().__init__()
            self.with_spec(control_hz=1000.0)

        def observe(self):
            time.sleep(0.01)
            return super().observe()

    assert check(Slow)["time of observe"].state == "passed"


def test_the_backend_is_closed_when_the_user_leaves():
    closed = []

    class Hangs(Good):
        def observe(self):
            raise KeyboardInterrupt

        def close(self):
            closed.append(self)

    with pytest.raises(KeyboardInterrupt):
        check_backend(Hangs, samples=1)
    assert closed


def test_rows_come_as_they_are_judged():
    rows = []
    assert check_backend(Good, samples=1, report=rows.append) == rows
