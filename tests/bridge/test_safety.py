"""The safety stage: what each rule makes of a chunk, and that no configuration loosens a limit."""

from typing import Any

import msgspec
import numpy as np
import pytest
from guarded import ROBOT, Clock, Robot, f32
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from msgspec.structs import replace

from bridge.backend import BackendError, Float32
from bridge.config import BridgeConfig, ConfigError, SafetyConfig, parse
from bridge.messages import RULES, WireError
from bridge.safety import FIRST_JUMP, RANGE, RATE, WORKSPACE, SafetyStage, limits_of

DELTA = replace(ROBOT, action=replace(ROBOT.action, kind="delta"))
SIMULATOR = replace(DELTA, paced=False)


def stage(spec: Any = ROBOT, at: Float32 | None = None, clock: Any = None, **config: Any) -> SafetyStage:
    robot = Robot(spec, f32(0, 0)[0:2] if at is None else at)
    return SafetyStage(robot, SafetyConfig(**config), clock=clock or Clock())


def check(stage: SafetyStage, *rows: Any) -> tuple[list[list[float]], list[int]]:
    actions, rules = stage.check(f32(*rows))
    assert actions.dtype == np.float32 and rules.dtype == np.uint8 and len(rules) == len(actions)
    return [[round(float(x), 5) for x in row] for row in actions], list(rules)


# --- the rules --------------------------------------------------------------------------------------------------------


def test_what_is_within_all_limits_is_left_as_it_is() -> None:
    chunk = f32([0.1, -0.2], [0.2, 0.0], [0.15, 0.1])
    actions, rules = stage().check(chunk)
    np.testing.assert_array_equal(actions, chunk)
    assert not rules.any()


def test_an_action_is_clipped_to_the_range_of_each_element() -> None:
    assert check(stage(SIMULATOR), [1.5, 1.5], [0, 0], [0.5, -2.5]) == (
        [[1, 1.5], [0, 0], [0.5, -2]],
        [RANGE, 0, RANGE],
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("spec", [ROBOT, SIMULATOR])
def test_a_chunk_that_is_not_finite_is_refused_whole(bad: float, spec: Any) -> None:
    with pytest.raises(WireError, match="not finite"):
        stage(spec).check(f32([0, 0], [0, bad]))


def test_a_robot_moves_through_its_range_in_no_less_than_a_second() -> None:
    # 2 rad and 4 rad at 20 Hz: 0.1 and 0.2 a step, each from where the step before really led.
    assert check(stage(), [0.5, 0], [0.5, 0.9], [0.25, 0.9]) == (
        [[0.1, 0], [0.2, 0.2], [0.25, 0.4]],
        [RATE, RATE, RATE],
    )


def test_steps_are_counted_from_what_was_sent_last_and_not_from_what_was_planned() -> None:
    s = stage()
    check(s, [0.1, 0], [0.2, 0], [0.3, 0])
    s.sent(f32(0.1, 0))  # one action of the chunk was played
    assert check(s, [0.3, 0]) == ([[0.2, 0]], [RATE])


def test_after_a_hold_steps_are_counted_from_where_the_robot_is() -> None:
    s = stage(at=f32(0.4, 0))
    s.sent(f32(-1, 0))
    s.restart()
    assert check(s, [0.45, 0.1]) == ([[0.45, 0.1]], [0])


def test_a_step_and_a_rate_can_be_limited_by_name_and_the_smaller_counts() -> None:
    limited = stage(SIMULATOR, max_step={"a": 0.3}, max_rate={"a": 2.0, "b": 4.0})
    # 2 / 20 Hz = 0.1 for a, 4 / 20 Hz = 0.2 for b.
    assert check(limited, [1, 1]) == ([[0.1, 0.2]], [RATE])
    assert check(stage(SIMULATOR, max_step={"a": 0.3}), [1, 1]) == ([[0.3, 1]], [RATE])


def test_the_specs_own_rate_stands_in_the_place_of_the_range() -> None:
    assert check(stage(replace(ROBOT, max_rate=(4.0, 1.0))), [0.5, 0.5]) == ([[0.2, 0.05]], [RATE])


def test_a_first_target_far_from_the_robot_is_not_approached_at_all() -> None:
    s = stage(at=f32(-0.3, 0.5))
    assert check(s, [0.25, 0.5], [0, 0], [0, 0]) == ([[-0.3, 0.5]], [FIRST_JUMP])
    assert check(stage(at=f32(-0.3, 0.5)), [0.15, 0.5]) == ([[-0.2, 0.5]], [RATE])
    assert check(stage(at=f32(-0.3, 0.5), first_jump=0.05), [-0.15, 0.5]) == ([[-0.3, 0.5]], [FIRST_JUMP])


def test_after_a_first_target_that_was_too_far_the_next_is_a_first_one() -> None:
    s = stage()
    assert check(s, [0.9, 0]) == check(s, [0.9, 0]) == ([[0, 0]], [FIRST_JUMP])
    assert check(s, [0.1, 0]) == ([[0.1, 0]], [0])
    s.sent(f32(0.1, 0))
    assert check(s, [0.9, 0]) == ([[0.2, 0]], [RATE])


def test_only_the_first_target_is_one() -> None:
    s = stage()
    check(s, [0, 0])
    assert check(s, [0.9, 0]) == ([[0.1, 0]], [RATE])


def test_a_velocity_has_no_first_jump_and_no_rate_of_its_own() -> None:
    assert check(stage(DELTA), [1, 2], [-1, -2]) == ([[1, 2], [-1, -2]], [0, 0])


def test_a_simulator_of_absolute_actions_is_not_slowed() -> None:
    assert check(stage(replace(ROBOT, paced=False)), [1, 2], [-1, -2]) == ([[1, 2], [-1, -2]], [0, 0])


def test_rules_add_up() -> None:
    assert check(stage(), [0.05, 0], [3, 0]) == ([[0.05, 0], [0.15, 0]], [0, RANGE | RATE])


def test_a_chunk_is_too_old_after_its_time_and_never_in_a_simulator() -> None:
    clock = Clock()
    robot, simulator = stage(clock=clock, chunk_age_s=1.0), stage(SIMULATOR, clock=clock, chunk_age_s=1.0)
    observed_s = clock()
    clock.work(0.99)
    assert not robot.too_old(observed_s)
    clock.work(0.02)
    assert robot.too_old(observed_s) and not simulator.too_old(observed_s)


class Tip(Robot):
    """Its tip is at (a, b, 0)."""

    def tip_after(self, action: Float32) -> Float32:
        return np.array([*action, 0], np.float32)


BOX = {"workspace_low": (-0.5, -0.5, -1), "workspace_high": (0.5, 0.5, 1)}


def test_the_tip_stays_in_its_box_and_may_come_back_into_it() -> None:
    inside = SafetyStage(Tip(at=f32(0.4, 0)), SafetyConfig(**BOX))
    for action, sent, rule in [
        ([0.5, 0], [0.5, 0], 0),
        ([0.51, 0], [0.4, 0], WORKSPACE),
        ([0.4, 9], [0.4, 0], WORKSPACE),
    ]:
        kept, bit = inside.keep_inside(f32(*action))
        assert kept.tolist() == f32(*sent).tolist() and bit == rule
    outside = SafetyStage(Tip(at=f32(0.8, 0)), SafetyConfig(**BOX))
    assert outside.keep_inside(f32(0.7, 0))[1] == 0
    assert outside.keep_inside(f32(0.9, 0))[1] == outside.keep_inside(f32(0.8, 0))[1] == WORKSPACE


def test_a_robot_that_was_held_at_the_wall_does_not_jump_to_where_the_chunk_has_got_to() -> None:
    s = SafetyStage(Tip(at=f32(0.45, 0)), SafetyConfig(**BOX))
    chunk, rules = s.check(f32([0.55, 0.2], [0.6, 0.4], [0.5, 0.45]))
    assert not rules.any()
    assert s.keep_inside(chunk[0])[1] == s.keep_inside(chunk[1])[1] == WORKSPACE
    kept, rule = s.keep_inside(chunk[2])
    assert kept.tolist() == f32(0.5, 0.2).tolist() and rule == RATE


def test_a_tip_that_is_nowhere_is_outside() -> None:
    robot = Tip()
    robot.tip_after = lambda action: np.full(3, np.nan, np.float32)  # type: ignore[method-assign]
    assert SafetyStage(robot, SafetyConfig(**BOX)).keep_inside(f32(0, 0))[1] == WORKSPACE


@pytest.mark.parametrize("hold", [[0.0], [0.0, np.nan], [[0.0, 0.0]]])
def test_a_hold_action_that_is_none_is_an_error(hold: Any) -> None:
    robot = Robot()
    robot.hold_action = lambda: f32(*hold)  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="hold_action"):
        SafetyStage(robot, SafetyConfig()).hold_action()


chunks = arrays(np.float32, (5, 2), elements=st.floats(-4, 4, width=32))


@given(chunks, arrays(np.float32, 2, elements=st.floats(-1, 1, width=32)), st.floats(0.125, 1.0))
def test_nothing_ever_leaves_the_limits_and_every_change_is_marked(chunk: Float32, at: Float32, share: float) -> None:
    s = stage(at=at, first_jump=share)
    actions, rules = s.check(chunk)
    low, high, step = s.limits.low, s.limits.high, s.limits.step
    assert step is not None
    assert ((actions >= low) & (actions <= high)).all()
    assert (np.abs(np.diff(np.concatenate([at[None], actions]), axis=0)) <= step + 1e-6).all()
    if rules[0] & FIRST_JUMP:
        assert len(actions) == 1 and (actions[0] == at).all()
    else:
        assert len(actions) == 5
        assert ((actions != chunk).any(1) == (rules > 0)).all()


def test_every_rule_has_a_bit_in_a_byte() -> None:
    assert len(RULES) <= 8


# --- limits come from the spec and are only ever tightened ------------------------------------------------------------


def test_limits_are_tightened_by_name() -> None:
    limits = limits_of(ROBOT, SafetyConfig(low={"b": -0.5}, high={"a": 0.25}, max_rate={"a": 0.5}))
    assert limits.low.tolist() == [-1, -0.5] and limits.high.tolist() == [0.25, 2]
    assert limits.step is not None and limits.step.tolist() == f32(0.025, 0.2).tolist()


def test_limits_are_not_widened_by_rounding() -> None:
    spec = replace(ROBOT, action=replace(ROBOT.action, low=(-0.1, -0.2), high=(0.1, 0.7)))
    limits = limits_of(spec, SafetyConfig())
    assert (limits.low.astype(np.float64) >= (-0.1, -0.2)).all()
    assert (limits.high.astype(np.float64) <= (0.1, 0.7)).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"low": {"a": -1.5}}, r"\$\.bridge\.safety\.low\.a: -1\.5 is below the backend's own limit -1"),
        ({"high": {"b": 2.5}}, r"\$\.bridge\.safety\.high\.b: 2\.5 is above the backend's own limit 2"),
        ({"max_rate": {"a": 2.5}}, r"max_rate\.a: 2\.5 is above the backend's own limit 2; limits can only be tight"),
        ({"low": {"a": float("nan")}}, r"low\.a: nan is no limit"),
        ({"high": {"a": float("inf")}}, r"high\.a: inf is no limit"),
        ({"low": {"a": 0.5}, "high": {"a": 0.5}}, r"low\.a: 0\.5 is not below the highest value 0\.5"),
        ({"low": {"c": 0.0}}, r"low\.c: the action has no such element .*\(it has a, b\)"),
        (
            {"workspace_low": (1.0, 0.0, 0.0), "workspace_high": (0.0, 1.0, 1.0)},
            "workspace_low: is not below workspace_high",
        ),
        (BOX, "backend fake cannot say where its tip is"),
    ],
)
def test_a_limit_that_loosens_or_names_nothing_is_an_error(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage(**config)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        ((-np.inf, -2.0), (1.0, 2.0), "gives no limits for a .*a robot needs them"),
        ((-1.0, -2.0), (1.0, np.nan), "gives no limits for b"),
        ((-1.0,), (1.0,), "2 elements in its action, but 1 and 1 limits"),
        ((-1.0, 2.0), (1.0, 2.0), "has limits 2 to 2 for b"),
    ],
)
def test_a_robot_without_limits_is_not_driven(low: Any, high: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage(replace(ROBOT, action=replace(ROBOT.action, low=low, high=high)))


def test_a_simulator_may_be_without_limits() -> None:
    free = replace(SIMULATOR, action=replace(ROBOT.action, low=(-np.inf, -2.0), high=(np.inf, 2.0)))
    assert check(stage(free), [50, 50]) == ([[50, 2]], [RANGE])


@pytest.mark.parametrize("rate", [(1.0,), (1.0, 0.0), (1.0, float("nan"))])
def test_a_spec_with_a_wrong_rate_is_an_error(rate: Any) -> None:
    with pytest.raises(ConfigError, match="max_rate of fake"):
        stage(replace(ROBOT, max_rate=rate))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"max_rat": {}}, r"\$\.bridge\.safety\.max_rat: unknown key; did you mean `max_rate`"),
        ({"max_step": {"a": 0}}, r"\$\.bridge\.safety\.max_step"),
        ({"first_jump": 1.5}, r"\$\.bridge\.safety\.first_jump"),
        ({"chunk_age_s": 200}, r"\$\.bridge\.safety\.chunk_age_s"),
        ({"hold_after_s": 2.0}, r"stop_after_s 2 must be above hold_after_s 2"),
        ({"workspace_low": [0, 0, 0]}, "workspace_low and workspace_high belong together"),
    ],
)
def test_a_typo_in_the_configuration_is_an_error(section: Any, message: str) -> None:
    kind = msgspec.defstruct("Deployment", [("bridge", BridgeConfig)])
    with pytest.raises(ConfigError, match=message):
        parse({"bridge": {"safety": section}}, kind, "x.yaml")
