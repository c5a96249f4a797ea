"""The command line: exit codes, messages, help, and one JSON object where --json asks for it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from commands import fieldtune, one_object

from fieldtune import __version__
from fieldtune.cli import COMMANDS, run
from fieldtune.commands.common import run_dir
from fieldtune.commands.status import status_table
from fieldtune.commands.train import announce, runs_since, was_taken
from fieldtune.deployment import Deployment, load_deployment
from runtime.registry import Registry
from runtime.status import Status

if TYPE_CHECKING:
    from conftest import Serving


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run([*name.split(), "--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert "Examples" in printed and f"fieldtune {name}" in printed


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["policies", "--help"], ["bundle", "-h"]])
def test_help_lists_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    expected = [name for name in COMMANDS if arguments[0].startswith("-") or name.startswith(arguments[0])]
    assert expected and all(f"  {name} " in printed for name in expected)


@pytest.mark.parametrize("arguments", [[], ["episodes"]])
def test_no_command_is_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert "usage: fieldtune" in capsys.readouterr().out


def test_goals_that_only_this_evaluation_has_are_not_trained_on_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ask = ["eval", "point", "--set", "trainer.evaluate.first_seed=9000", "--episodes"]
    assert run([*ask, "1001"]) == 2
    assert "goals from seeds 9000 to 10000 are trained on" in " ".join(capsys.readouterr().err.split())
    assert run([*ask, "1000"]) == 1
    assert "has no version yet" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"fieldtune {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [(["statsu"], "status"), (["policies", "lsit"], "policies list"), (["episodes", "shwo"], "episodes show")],
)
def test_an_unknown_command_is_answered_with_the_nearest(
    typed: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(typed) == 2
    assert f"did you mean `fieldtune {meant}`?" in capsys.readouterr().err


def test_an_unknown_option_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run(["status", "point", "--jsno"])
    assert left.value.code == 2
    assert "--jsno" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "path", "hint"),
    [
        ("trainer.ppo.learning_rate=1", "$.trainer.ppo.learning_rate", "known: gamma"),
        ("trainer.sft.stpes=1", "$.trainer.sft.stpes", "did you mean `steps`?"),
        ("bridge.workers=-1", "$.bridge.workers", "found -1"),
        ("name=a/b", "$.name", "a/b"),
    ],
)
def test_a_wrong_key_or_value_names_its_path(
    override: str, path: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["status", "point", "--set", override]) == 2
    message = capsys.readouterr().err
    assert path in message and hint in message


def test_a_misspelt_key_in_a_file_ends_a_real_process_with_2(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\nbackend: {name: point}\nbrigde: {workers: 2}\n")
    done = fieldtune("up", "mine.yaml", cwd=tmp_path, code=2)
    assert "mine.yaml: $.brigde: unknown key; did you mean `bridge`?" in done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_missing_file_is_bad_usage_and_names_what_ships(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "nowhere.yaml"]) == 2
    message = capsys.readouterr().err
    assert "nowhere.yaml: no such file" in message and "quickstart" in message


def test_a_runtime_that_is_not_there_fails_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["status", "point"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("fieldtune: ")


@pytest.mark.parametrize(
    ("command", "extra", "package"),
    [
        ("bundle verify x", "runtime", "onnxruntime"),
        ("sft point", "trainer", "torch"),
        ("page point", "dashboard", "uvicorn"),
        ("page point", "dashboard", "fastapi"),
    ],
)
def test_a_missing_extra_is_named(command: str, extra: str, package: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None; from fieldtune.cli import run; sys.exit(run({command.split()}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert f"`{package}`, which is not installed; pip install 'fieldtune[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_import_that_is_not_an_extra_is_a_bug_and_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "status", ("fieldtune.commands.no_such_module:x", ""))
    with pytest.raises(ModuleNotFoundError):
        run(["status"])


@pytest.mark.parametrize("line", ["up point", "pretrain point", "policies rollback point", "keys FILE/keys arm"])
def test_a_place_that_cannot_be_written_is_named(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.touch()
    words = line.replace("FILE", str(path)).split()
    assert run([*words, *(() if words[0] == "keys" else ("--set", f"runs={path}"))]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"fieldtune: {path}/") and told.endswith(": Not a directory\n")


def test_a_full_disk_is_said_and_other_failures_of_the_system_are_bugs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(code: int) -> None:
        def command() -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("fieldtune.commands.status.status", command)

    fail(errno.ENOSPC)
    assert run(["status"]) == 1
    assert capsys.readouterr().err == "fieldtune: No space left on device\n"
    fail(errno.EBADF)
    with pytest.raises(OSError, match="Bad file descriptor"):
        run(["status"])


def test_what_was_post_trained_and_the_other_tasks_are_summed_up_apart() -> None:
    from fieldtune.commands.evaluate import evaluation_table
    from trainer.statistics import summarise

    @dataclass
    class Row:
        task: str
        seed: int
        status: Any
        steps: int

    rows = [
        Row("a", 1, "success", 10),
        Row("b", 1, "success", 20),
        Row("b", 2, "timeout", 99),
        Row("c", 1, "timeout", 99),
    ]
    evaluation = summarise(rows, version="v", horizon_steps=99)

    def printed(*post_trained: str) -> dict[str, list[str]]:
        table = evaluation_table([("", evaluation)], post_trained)
        columns = [list(column.cells) for column in table.columns]
        return {str(row[0]): [str(cell).partition(" ")[0] for cell in row[1:]] for row in zip(*columns, strict=True)}

    assert list(printed()) == list(printed("a", "b", "c")) == ["a", "b", "c", "overall"]
    table = printed("a", "b")
    assert list(table) == ["a", "b", "c", "post-trained", "others", "overall"]
    assert table["post-trained"] == ["0.67", "15.0"] and table["others"] == ["0.00", "-"]


def test_a_bundle_that_takes_long_to_load_is_announced_once(
    serve: Callable[..., Serving], fake_policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fieldtune.commands.train.ANNOUNCE_TIMEOUT_S", 3.0)
    warnings: list[str] = []
    monkeypatch.setattr("fieldtune.commands.train.warn", warnings.append)
    deployment = load_deployment("quickstart")
    registry = Registry(run_dir(deployment).registry)
    version = "b" * 64
    registry.add(version, parent="", made={})
    loaded: list[str] = []
    asked_whether_it_runs = threading.Event()

    def load(bundle: str) -> Any:
        # Until after the announcement has been given up: how long it takes does not depend on the machine.
        assert asked_whether_it_runs.wait(30.0)
        loaded.append(bundle)
        registry.set_live(version, why="announced")
        return fake_policy(version=version)

    serving = serve(policy=fake_policy())
    serving.live.change = load
    deployment = load_deployment("quickstart", [f"bridge.endpoint={serving.endpoint}"])

    def asked(deployment: Deployment, asked_s: float) -> bool:
        try:
            return runs_since(deployment, asked_s)
        finally:
            asked_whether_it_runs.set()

    monkeypatch.setattr("fieldtune.commands.train.runs_since", asked)
    announce(deployment, Path(version))
    assert len(loaded) == 1 and warnings == []
    assert runs_since(deployment, time.monotonic())
    assert not runs_since(deployment, time.monotonic() - 3600.0), "it was started after that"
    serving.stop()
    assert not runs_since(deployment, time.monotonic())


def test_an_announcement_that_was_taken_and_not_answered_is_not_made_again(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry.sqlite")
    first, second, third = "a1" * 32, "b2" * 32, "c3" * 32
    for version in (first, second, third):
        registry.add(version, parent="", made={})
    registry.set_live(first, why="announced")
    assert was_taken(registry, first, lambda: False)
    assert not was_taken(registry, second, lambda: False), "the runtime that was asked has ended"
    registry.enter(second, "candidate", why="announced")
    judged = threading.Timer(0.5, registry.enter, [second, "rejected"], {"why": "gate"})
    judged.start()
    assert was_taken(registry, second, lambda: False), "it was at the gate, which has an answer by now"
    judged.join()
    loads = iter([True, True])

    def still_at_it() -> bool:
        if not next(loads, False):
            registry.set_live(third, why="announced")
        return True

    assert was_taken(registry, third, still_at_it), "a large bundle takes long to load"


def test_a_warning_that_cannot_be_written_stops_nobody() -> None:
    code = "from fieldtune.commands.common import warn\nwarn('one')\nwarn('two')\nprint('goes on', flush=True)"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=full, text=True, timeout=60)
    assert done.stdout == "goes on\n"


@pytest.mark.parametrize("line", ["--help", "status --help", "keys made arm --json"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_error(line: str, unbuffered: str, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as nobody:
        done = subprocess.run(
            [sys.executable, "-m", "fieldtune", *line.split()],
            cwd=tmp_path,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=nobody,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1 and done.stderr == ""


def test_keys_as_json_and_bad_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keys", str(tmp_path / "keys"), "arm1", "arm2", "--json"]) == 0
    made = one_object(capsys.readouterr().out)
    assert [Path(path).name for path in made["clients"]] == ["arm1", "arm2"] and Path(made["server"]).is_dir()
    assert run(["keys", str(tmp_path / "keys"), "../arm"]) == 2


def test_the_status_names_the_tasks_with_the_largest_and_the_smallest_share() -> None:
    def shown(shares: dict[str, float]) -> list[str]:
        counters = dict.fromkeys(("uptime_s", "inference_share", "inference_cpu_s", "episodes_per_min"), 0.0)
        counts = dict.fromkeys(("sessions", "decisions", "batches", "swaps", "refused_swaps"), 0)
        empty: dict[str, Any] = {"episodes": {}, "refused": {}, "latency_ms": {}, "log": {}, "recent": ()}
        rest: dict[str, Any] = {"version": "a", "previous": "", "undeliverable": 0, "dropped": 0, "finished": False}
        table = status_table(Status(shares=shares, **counters, **counts, **empty, **rest), {})
        return [
            str(value)
            for key, value in zip(table.columns[0].cells, table.columns[1].cells, strict=True)
            if key == "shares"
        ]

    assert shown({"a": 1.0}) == []
    assert shown({"a": 0.25, "b": 0.75}) == ["b 0.750, a 0.250"]
    (text,) = shown({f"t{i}": i / 45 for i in range(10)})
    assert text == "t9 0.200, t8 0.178, t7 0.156, ..., t2 0.044, t1 0.022, t0 0.000"
