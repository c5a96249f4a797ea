"""`fieldtune doctor`: it sees what is broken, says how to mend it, and says nothing is broken where nothing is."""

from __future__ import annotations

import json
import socket
import types
from pathlib import Path

import pytest

from bridge.endpoint import claim_ipc
from fieldtune.cli import run
from fieldtune.commands import doctor
from fieldtune.commands.doctor import Check


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory and a runtime directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rt").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "rt"))


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing has tests of its own."""
    monkeypatch.setattr(doctor, "check_drawing", lambda: iter(()))


def rows(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def deployment(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nbackend: {name: point}\n" + text)
    return str(path)


def test_a_whole_deployment_on_a_good_computer(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "point", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = {row["name"]: row for row in report["checks"]}
    assert report["good"] is True
    for name in ("python", "cores", "numpy", "torch [trainer]", "ipc", "tcp loopback", "configuration", "backend"):
        assert found[name]["state"] == "ok", found[name]
    assert "reach" not in found["backend"]["mend"] and "point: top 32x32" in found["backend"]["found"]
    assert "is free" in found["endpoint"]["found"]


def test_the_table_names_every_check(no_drawing: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "torch [trainer]" in printed and "this computer is ready" in printed


def test_every_requirement_of_the_package_is_looked_at() -> None:
    found = {name: extra for name, _, extra in doctor.requirements()}
    assert found["numpy"] is None and found["onnxruntime"] == "runtime" and found["torch"] == "trainer"
    assert found["metaworld"] == "metaworld" and "pytest" not in found


@pytest.mark.parametrize(
    ("version", "expected"), [("2.13.0+cpu", (2, 13, 0)), ("1.5rc1", (1, 5)), ("4", (4,)), ("dev", ())]
)
def test_numbers_of_a_version(version: str, expected: tuple[int, ...]) -> None:
    assert doctor.numbers(version) == expected


def test_a_package_that_is_too_old_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requirements", lambda: [("numpy", "99.1", None)])
    (check,) = doctor.check_packages()
    assert check.state == "bad" and "99.1 or newer" in check.mend


def test_a_package_that_cannot_be_imported_is_bad_and_an_absent_extra_is_a_note(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "brokenlib.py").write_text("raise OSError('libfoo.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    wanted = [("brokenlib", "1", "runtime"), ("nosuchlib", "1", "trainer"), ("nosuchlib", "1", None)]
    monkeypatch.setattr(doctor, "requirements", lambda: wanted)
    broken, absent, needed = doctor.check_packages()
    assert broken.state == "bad" and "libfoo.so.1" in broken.found and "fieldtune[runtime]" in broken.mend
    assert absent.state == "note" and "fieldtune[trainer]" in absent.mend
    assert needed.state == "bad"


def test_source_that_is_not_installed_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> list[tuple[str, str, str | None]]:
        raise doctor.importlib.metadata.PackageNotFoundError("fieldtune")

    monkeypatch.setattr(doctor, "requirements", missing)
    (check,) = doctor.check_packages()
    assert check.state == "bad" and check.mend == "make install"


def test_a_driver_that_takes_the_process_with_it_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "GL_PROBE", "import os; os.kill(os.getpid(), 11)")
    (check,) = doctor.check_drawing()
    assert check.state == "bad" and "-11" in check.found and "libegl1" in check.mend


def test_a_driver_that_hangs_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "GL_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "GL_TIMEOUT_S", 0.2)
    (check,) = doctor.check_drawing()
    assert check.state == "bad" and "no picture" in check.found


def test_without_mujoco_drawing_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    (check,) = doctor.check_drawing()
    assert check.state == "note"


def test_a_runtime_directory_that_is_open_to_others_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_to_all(address: str) -> object:
        directory = Path(address.removeprefix("ipc://")).parent
        directory.mkdir(parents=True)
        directory.chmod(0o777)
        return claim_ipc(address)

    monkeypatch.setattr(doctor, "claim_ipc", open_to_all)
    (check,) = doctor.check_sockets()
    assert check.state == "bad" and "0700" in check.found


def test_sockets_leave_nothing_behind(tmp_path: Path) -> None:
    assert [check.state for check in doctor.check_sockets()] == ["ok", "ok", "ok"]
    assert not [path for path in (tmp_path / "rt").rglob("*") if not path.is_dir()]


def test_a_bad_configuration_is_a_row_with_its_path(tmp_path: Path, no_drawing: None) -> None:
    config = deployment(tmp_path, "trainer: {ppo: {learning_rate: 1}}")
    (check,) = doctor.check_deployment(config, ())
    assert check.state == "bad" and "$.trainer.ppo.learning_rate" in check.found
    assert run(["doctor", config]) == 1


def test_a_backend_that_cannot_be_made_is_bad(tmp_path: Path) -> None:
    checks = rows(list(doctor.check_deployment("point", ("backend.name=pont",))))
    assert checks["backend"].state == "bad" and "point" in checks["backend"].found


def test_a_port_that_something_else_holds_is_bad(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        checks = rows(
            list(doctor.check_deployment(deployment(tmp_path, f"runtime: {{serve: {{endpoint: '{address}'}}}}"), ()))
        )
    assert checks["endpoint"].state == "bad" and address in checks["endpoint"].found


def test_an_address_that_others_can_reach_needs_keys(tmp_path: Path) -> None:
    config = deployment(tmp_path, "runtime: {serve: {endpoint: 'tcp://0.0.0.0:5555'}}")
    checks = rows(list(doctor.check_deployment(config, ())))
    assert checks["endpoint"].state == "bad" and "fieldtune keys" in checks["endpoint"].mend


def test_a_runtime_of_this_run_holds_its_address(tmp_path: Path) -> None:
    from fieldtune.commands.common import endpoint
    from fieldtune.deployment import load_deployment

    with claim_ipc(endpoint(load_deployment("point"))):
        checks = rows(list(doctor.check_deployment("point", ())))
    assert checks["endpoint"].state == "bad" and "another runtime" in checks["endpoint"].found


def test_too_small_a_disk_warns_and_an_unwritable_one_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = rows(list(doctor.check_deployment("point", ("runtime.log.keep_gb=1e9",))))
    assert checks["disk"].state == "warn" and "keep_gb" in checks["disk"].mend
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    checks = rows(list(doctor.check_deployment("point", ())))
    assert checks["disk"].state == "bad"


def test_little_memory_warns() -> None:
    assert doctor.check_memory(1_000_000_000).state == "warn"
    assert doctor.check_memory(8_000_000_000).state == "ok"
    assert doctor.check_memory(None).state == "note"


def test_a_clock_that_is_not_steady_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000, 0, -1))
    clock = types.SimpleNamespace(
        get_clock_info=lambda name: types.SimpleNamespace(monotonic=True, resolution=1e-9),
        monotonic=lambda: next(ticks),
    )
    monkeypatch.setattr(doctor, "time", clock)
    assert rows(list(doctor.check_computer()))["monotonic clock"].state == "bad"
