"""Swapping weights under load, with real bundles in onnxruntime: every chunk is of one version, and bad bundles change
nothing.
"""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from safetensors.numpy import load, save

from bridge.backend import Backend
from bridge.client import RefusedError
from bridge.messages import Announce, Assignment, Govern, Serving
from runtime.bundle import BundleError, PolicySpec
from runtime.registry import Registry, RegistryError
from runtime.rundir import RunDir
from runtime.swap import Live

ENOUGH_S = 60.0

TinyBundle = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


@pytest.fixture
def started(run: RunDir, tiny_bundle: TinyBundle) -> str:
    """A run with a first version that is live."""
    version = tiny_bundle(run.policies, 1.0)
    registry = Registry(run.registry)
    registry.add(version, parent="", made={})
    registry.set_live(version, why="sft")
    registry.close()
    return version


def live(run: RunDir, keep_versions: int = 20, version: str | None = None) -> Live:
    return Live(run, threads=1, keep_versions=keep_versions, version=version)


def value_of(live: Live) -> float:
    mean, _ = live().infer({"state": np.zeros((1, 2), np.float32)})
    return float(mean[0, 0, 0])


def test_under_load_every_chunk_is_of_one_version_and_none_is_lost(
    serve: Any, point: Backend, run: RunDir, started: str, tiny_bundle: TinyBundle, tmp_path: Path
) -> None:
    values = {started: 1.0}
    for i in range(2, 14):
        values[tiny_bundle(tmp_path / "new", float(i), parent=started)] = float(i)
    serving = serve(live=live(run), explore=False, horizon_steps=1_000_000)
    stop = threading.Event()
    errors: list[BaseException] = []
    asked = [0] * 4
    seen: list[set[str]] = [set() for _ in asked]

    def work(i: int) -> None:
        try:
            rng = np.random.default_rng(i)
            robot = serving.robot(point.spec, f"robot-{i}")
            assert isinstance(robot.next(), Assignment)
            while not stop.is_set():
                observation = robot.observation(point.spec)
                state = rng.uniform(-1, 1, 2).astype(np.float32)
                chunk, tensors = robot.infer({**observation, "state": state})
                asked[i] += 1
                expected = values[chunk.version] * (1 + float(state.sum()))
                np.testing.assert_allclose(tensors["actions"], np.full((4, 2), expected), atol=1e-4)
                seen[i].add(chunk.version)
                robot.executed()
            robot.end(robot.observation(point.spec))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    tool = serving.client("trainer")
    previous = started
    for version in [*values][1:]:
        answer, _ = tool.request(Announce(path=str(tmp_path / "new" / version)), Serving)
        assert (answer.version, answer.previous) == (version, previous)
        previous = version
        # A chunk that is asked for after the answer is of the new version.
        probe = serving.robot(point.spec, "probe")
        probe.next()
        chunk, _ = probe.infer(probe.observation(point.spec))
        assert chunk.version == version
    stop.set()
    for thread in threads:
        thread.join(ENOUGH_S)
    assert not errors, errors
    status = serving.status()
    assert status["swaps"] == 12 and status["dropped"] == 0 and status["refused"] == {}
    assert status["decisions"] == sum(asked) + 12
    assert status["episodes"]["timeout"] == 4
    assert len(set.union(*seen)) > 3
    row = serving.log.index.list(limit=1, status="timeout")[0]
    assert len(row.versions) > 1


Damage = Callable[[Path, Path], object]
"""What is done to a bundle; the second path is the live version's bundle."""
WEIGHTS = "weights.safetensors"


def changed(part: str) -> Damage:
    def damage(bundle: Path, live: Path) -> None:
        data = bytearray((bundle / part).read_bytes())
        data[len(data) // 2] ^= 1
        (bundle / part).write_bytes(data)

    return damage


def missing(part: str) -> Damage:
    return lambda bundle, live: (bundle / part).unlink()


def weights_of_another_version(bundle: Path, live: Path) -> None:
    shutil.copyfile(live / WEIGHTS, bundle / WEIGHTS)
    bundle.rename(bundle.with_name("renamed"))


def spoiled(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Other weights, in a directory whose name promises nothing."""

    def damage(bundle: Path, live: Path) -> None:
        weights = load((bundle / WEIGHTS).read_bytes())
        change(weights)
        (bundle / WEIGHTS).write_bytes(save(weights))
        bundle.rename(bundle.with_name("renamed"))

    return damage


BAD: list[tuple[str, Damage, str]] = [
    *[(f"missing {part}", missing(part), part) for part in ("policy.yaml", "graph.onnx", WEIGHTS)],
    ("missing probe", missing("probe.safetensors"), "probe.safetensors"),
    *[(f"changed {part}", changed(part), "version") for part in ("graph.onnx", WEIGHTS, "probe.safetensors")],
    ("extra part", lambda bundle, live: (bundle / "notes.txt").touch(), "notes.txt"),
    ("nan weights", spoiled(lambda weights: weights["bias"].fill(np.nan)), WEIGHTS),
    ("wrong shape", spoiled(lambda weights: weights.update(bias=np.zeros((5, 2), np.float32))), WEIGHTS),
    ("missing weight", spoiled(lambda weights: weights.pop("bias")), WEIGHTS),
    ("weights of another version", weights_of_another_version, "probe.safetensors"),
    ("no bundle", lambda bundle, live: shutil.rmtree(bundle), "bundle"),
]


@pytest.mark.parametrize(("damage", "part"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_a_bad_bundle_is_refused_by_name_and_the_live_version_stays(
    run: RunDir, started: str, tiny_bundle: TinyBundle, tmp_path: Path, damage: Damage, part: str
) -> None:
    bundle = tmp_path / "new" / tiny_bundle(tmp_path / "new", 2.0)
    damage(bundle, run.policies / started)
    renamed = bundle.with_name("renamed")
    the_live = live(run)
    with pytest.raises(BundleError) as caught:
        the_live.announce(renamed if renamed.exists() else bundle)
    assert caught.value.part == part, caught.value
    assert the_live().version == started and value_of(the_live) == 1.0
    assert [path.name for path in run.policies.iterdir()] == [started]
    assert [row.version for row in Registry(run.registry).list()] == [started]
    assert live(run)().version == started


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("horizon", {"horizon": 5}),
        ("control_hz", {"control_hz": 50.0}),
    ],
)
def test_another_interface_is_refused_by_field(
    run: RunDir, started: str, tiny_bundle: TinyBundle, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    version = tiny_bundle(tmp_path / "new", 2.0, **changes)
    the_live = live(run)
    with pytest.raises(BundleError, match=name):
        the_live.announce(tmp_path / "new" / version)
    assert the_live().version == started
    assert not (run.policies / version).exists()


def test_another_action_is_refused_by_field(
    run: RunDir, started: str, tiny_bundle: TinyBundle, tmp_path: Path, point_policy_spec: PolicySpec
) -> None:
    for action in (
        replace(point_policy_spec.action, low=(-2.0, -2.0)),
        replace(point_policy_spec.action, kind="absolute"),
    ):
        version = tiny_bundle(tmp_path / "new", 2.0, action=action)
        with pytest.raises(BundleError, match="action is"):
            live(run).announce(tmp_path / "new" / version)


def test_a_probe_that_does_not_replay_is_refused(
    run: RunDir, started: str, tiny_bundle: TinyBundle, tmp_path: Path
) -> None:
    version = tiny_bundle(tmp_path / "new", 2.0, claimed=2.01)
    with pytest.raises(BundleError) as caught:
        live(run).announce(tmp_path / "new" / version)
    assert caught.value.part == "probe.safetensors"


def test_announcing_again_changes_nothing(run: RunDir, started: str, tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    version = tiny_bundle(tmp_path / "new", 2.0, parent=started)
    the_live = live(run)
    for _ in range(2):
        assert the_live.announce(tmp_path / "new" / version) == version
    # From where the run keeps it as well: that is what a local trainer does.
    assert the_live.announce(run.policies / version) == version
    assert the_live.previous == started
    assert [change.version for change in Registry(run.registry).history()] == [started, version]
    # The run's copy is its own.
    shutil.rmtree(tmp_path / "new")
    assert live(run)().version == version


def test_rolling_back_and_forth(run: RunDir, started: str, tiny_bundle: TinyBundle) -> None:
    versions = [started, *(tiny_bundle(run.policies, float(i), parent=started) for i in (2, 3))]
    the_live = live(run)
    with pytest.raises(BundleError, match="no version before"):
        the_live.rollback()
    for version in versions[1:]:
        the_live.announce(run.policies / version)
    assert the_live.rollback() == versions[1]
    assert value_of(the_live) == 2.0 and the_live.previous == started
    assert the_live.rollback() == started
    with pytest.raises(BundleError, match="no version before"):
        the_live.rollback()
    assert the_live.rollback(versions[2][:8]) == versions[2]
    assert value_of(the_live) == 3.0 and the_live.previous == started
    assert the_live.rollback(versions[2]) == versions[2]
    with pytest.raises(RegistryError):
        the_live.rollback("ffffffff" if not any(v.startswith("ffffffff") for v in versions) else "eeeeeeee")
    assert the_live().version == versions[2]


def test_a_rollback_over_the_wire(
    serve: Any, point: Backend, run: RunDir, started: str, tiny_bundle: TinyBundle
) -> None:
    second = tiny_bundle(run.policies, 2.0, parent=started)
    serving = serve(live=live(run))
    tool = serving.client()
    tool.request(Announce(path=str(run.policies / second)), Serving)
    assert serving.status()["previous"] == started
    answer, _ = tool.request(Govern(command="rollback", who="test"), Serving)
    assert (answer.version, answer.previous) == (started, second)
    answer, _ = tool.request(Govern(command="rollback", who="test", version=second[:6]), Serving)
    assert answer.version == second
    for request, code in (
        (Govern(command="rollback", who="test", version="none such"), "version"),
        (Announce(path="/no/such/place"), "bundle"),
        (Announce(path="\0"), "bundle"),
    ):
        with pytest.raises(RefusedError) as caught:
            tool.request(request, Serving)
        assert caught.value.refused.code == code
    assert serving.status()["version"] == second
    serving.robot(point.spec).run_episode(point.spec)


def test_the_version_that_was_promised_comes_up_again(run: RunDir, started: str, tiny_bundle: TinyBundle) -> None:
    second = tiny_bundle(run.policies, 2.0, parent=started)
    one = live(run)
    one.announce(run.policies / second)
    again = live(run)
    assert again().version == second and again.previous == started
    assert again.rollback() == started
    assert live(run)().version == started


def test_a_crash_before_the_flip_comes_up_with_the_version_that_was_promised(
    run: RunDir, started: str, tiny_bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = tiny_bundle(run.policies, 2.0, parent=started)
    the_live = live(run)
    monkeypatch.setattr(Registry, "previous", lambda self: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        the_live.announce(run.policies / second)
    monkeypatch.undo()
    assert live(run)().version == second


def test_a_registry_that_fails_keeps_the_old_version_live(
    run: RunDir, started: str, tiny_bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = tiny_bundle(run.policies, 2.0, parent=started)
    the_live = live(run)

    def fail(self: Registry, version: str, *, why: str) -> None:
        raise RegistryError("disk full")

    monkeypatch.setattr(Registry, "set_live", fail)
    with pytest.raises(RegistryError):
        the_live.announce(run.policies / second)
    assert the_live().version == started


def test_a_pinned_version_is_served_without_being_live_and_takes_no_other(
    run: RunDir, started: str, tiny_bundle: TinyBundle
) -> None:
    second = tiny_bundle(run.policies, 2.0, parent=started)
    Registry(run.registry).add(second, parent=started, made={})
    pinned = live(run, version=second[:8])
    assert pinned().version == second
    assert Registry(run.registry).live() == started
    with pytest.raises(BundleError, match="fixed version"):
        pinned.announce(run.policies / started)
    with pytest.raises(BundleError, match="fixed version"):
        pinned.rollback(started)


def test_an_empty_run_says_what_to_do(run: RunDir) -> None:
    with pytest.raises(BundleError, match="`fieldtune up` or `sft`"):
        live(run)


def test_old_bundles_are_pruned_but_never_root_live_or_previous(
    run: RunDir, started: str, tiny_bundle: TinyBundle
) -> None:
    the_live = live(run, keep_versions=2)
    versions = [started]
    for i in range(2, 9):
        versions.append(tiny_bundle(run.policies, float(i), parent=versions[-1]))
        the_live.announce(run.policies / versions[-1])
    kept = {path.name for path in run.policies.iterdir()}
    assert kept == {started, *versions[-4:]}
    assert len(Registry(run.registry).list()) == len(versions)
    # Long ago, but before the live one now.
    the_live.rollback(started)
    late = tiny_bundle(run.policies, 20.0, parent=started)
    the_live.announce(run.policies / late)
    assert the_live.previous == started
    assert {started, late} <= {path.name for path in run.policies.iterdir()}
    with pytest.raises(BundleError):
        the_live.rollback(versions[1])
    assert the_live().version == late


def test_a_bundle_made_elsewhere_is_a_root_and_not_pruned(run: RunDir, tiny_bundle: TinyBundle) -> None:
    imported = tiny_bundle(run.policies, 1.0, parent="e" * 64)
    registry = Registry(run.registry)
    registry.add(imported, parent="e" * 64, made={"command": "import"})
    registry.set_live(imported, why="test")
    the_live = live(run, keep_versions=1)
    versions = [imported]
    for i in range(2, 6):
        versions.append(tiny_bundle(run.policies, float(i), parent=versions[-1]))
        the_live.announce(run.policies / versions[-1])
    assert {path.name for path in run.policies.iterdir()} == {imported, *versions[-3:]}


def test_a_promotion_by_hand_needs_a_version_where_nothing_is_staged(
    run: RunDir, started: str, tiny_bundle: TinyBundle
) -> None:
    now = live(run)
    second = tiny_bundle(run.path / "made", 2.0, parent=started)
    now.announce(run.path / "made" / second)
    with pytest.raises(BundleError, match="say which version"):
        now.govern("promote", "", "ada")
    assert now().version == second
    assert now.govern("promote", started[:8], "ada") == started
    assert Registry(run.registry).history()[-1].why == "promoted by ada"
    with pytest.raises(BundleError, match="staged"):
        now.govern("pin", "", "ada")
