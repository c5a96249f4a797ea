"""The command line: exit codes, messages, help, and one JSON object where --json asks for it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bridge.client import PolicyClient
from bridge.messages import GetStatus, StatusReply
from fieldtune import __version__
from fieldtune.cli import COMMANDS, run
from fieldtune.commands.common import connect, run_dir
from fieldtune.commands.evaluate import told_in
from fieldtune.commands.status import status_table
from fieldtune.commands.train import announce, runs_since, was_taken
from fieldtune.deployment import Deployment, load_deployment
from runtime.durable import claim
from runtime.index import EpisodeIndex
from runtime.reading import read_episode
from runtime.registry import Registry
from runtime.rundir import RunDir
from runtime.status import Status

if TYPE_CHECKING:
    from conftest import Serving

QUICK = ("--set", "trainer.demos.per_task=2", "--set", "trainer.sft.steps=3")


def fieldtune(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does."""
    command = [sys.executable, "-m", "fieldtune", *arguments]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=90, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def one_object(stdout: str) -> dict[str, Any]:
    """What --json promises."""
    value = json.loads(stdout)
    assert isinstance(value, dict)
    return value


# --- what needs no run ----------------------------------------------------------------------------------------------


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


# --- what needs a run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the run of `point`: two demonstrations and one hardly trained version."""
    directory = tmp_path_factory.mktemp("cli")
    collected = one_object(fieldtune("demos", "point", "--json", *QUICK, cwd=directory).stdout)
    assert collected["kept"] == 2
    assert one_object(fieldtune("sft", "point", "--json", *QUICK, cwd=directory).stdout)["version"]
    return directory


@pytest.fixture(scope="module")
def served(prepared: Path) -> Iterator[Path]:
    """The same with a runtime that serves it, and two episodes driven."""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((prepared / "serve.log").open("wb"))
        runtime = subprocess.Popen(
            [sys.executable, "-m", "fieldtune", "serve", "point"], cwd=prepared, stdout=log, stderr=log
        )
        try:
            driven = fieldtune("drive", "point", "--episodes", "2", "--name", "arm", "--json", cwd=prepared)
            assert one_object(driven.stdout)["episodes"] == 2
            yield prepared
        finally:
            runtime.terminate()
            assert runtime.wait(30) == 0, (prepared / "serve.log").read_text()


def in_process(directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str) -> str:
    """Stdout of a command that ended well."""
    monkeypatch.chdir(directory)
    code = run(line.split())
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_a_runtime_removes_bundles_that_were_never_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    policies = tmp_path / "runs" / "point" / "policies"
    old, now = (policies / f".{'a' * 64}.{number * 12}.tmp" for number in "12")
    for path in (old, now):
        path.mkdir(parents=True)
    os.utime(old, (0, 0))
    assert run(["serve", "point"]) == 1, "there is no version to serve"
    assert list(policies.iterdir()) == [now], "the trainer may be writing it"


@pytest.mark.slow
def test_versions_and_bundles(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(line: str) -> dict[str, Any]:
        return one_object(in_process(prepared, monkeypatch, capsys, line + " --json"))

    (row,) = ask("policies list point")["policies"]
    version = row["version"]
    assert row["live"] and row["on_disk"] and row["made"]["command"] == "sft"
    assert ask(f"policies show point {version[:6]}")["lineage"] == [version]
    bundle = f"runs/point/policies/{version}"
    assert ask(f"bundle inspect {bundle}")["spec"]["horizon"] == 4
    assert ask(f"bundle verify {bundle}") == {"version": version, "good": True}
    # A run of its own starts from a bundle that was made elsewhere.
    assert ask(f"policies add point {bundle} --set runs=elsewhere") == {"version": version}
    (added,) = ask("policies list point --set runs=elsewhere")["policies"]
    assert added["version"] == version and added["live"] and added["on_disk"]
    for line in ("policies list point", f"policies show point {version}", f"bundle inspect {bundle}"):
        assert version[:8] in in_process(prepared, monkeypatch, capsys, line)


@pytest.mark.slow
def test_demonstrations(prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line = "episodes list point --log demos --json"
    rows = one_object(in_process(prepared, monkeypatch, capsys, line))["episodes"]
    assert len(rows) == 2 and {row["status"] for row in rows} == {"success"}
    line = f"episodes show point {rows[0]['episode']} --log demos --json"
    shown = one_object(in_process(prepared, monkeypatch, capsys, line))
    assert sum(decision["executed"] for decision in shown["decisions"]) == rows[0]["steps"]


@pytest.mark.slow
def test_failures_of_a_run_say_why_and_end_with_1(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(prepared)
    for line, word in {
        "episodes show point nosuch": "no episode nosuch",
        "policies show point ffffffff": "ffffffff",
        "report point": "was not evaluated",
        "stop point": "NOTHING WAS STOPPED",
    }.items():
        assert run(line.split()) == 1, line
        captured = capsys.readouterr()
        assert captured.err.startswith("fieldtune: ") and word in captured.err, line
        assert captured.out == ""


@pytest.mark.slow
def test_nobody_goes_back_beside_a_runtime_that_is_coming_up(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may have read what is live, and would go on with that, whatever the registry says by then."""
    monkeypatch.chdir(prepared)
    registry = Registry(RunDir(prepared / "runs/point").registry)
    before = registry.history()
    RunDir(prepared / "runs/point").episodes.mkdir(exist_ok=True)
    with claim(RunDir(prepared / "runs/point").episodes):
        for line in (
            f"policies rollback point {registry.live()}",
            f"policies add point runs/point/policies/{registry.live()}",
        ):
            assert run(line.split()) == 1
            assert "is at work here already" in capsys.readouterr().err
    assert registry.history() == before


@pytest.mark.slow
def test_a_running_deployment(
    served: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(line: str) -> dict[str, Any]:
        return one_object(in_process(served, monkeypatch, capsys, line + " --json"))

    now = ask("status point")
    assert sum(now["runtime"]["episodes"].values()) == 2 and now["trainer"] == {}
    assert now["runtime"]["shares"] == {"reach": 1.0}
    rows = ask("episodes list point")["episodes"]
    assert [row["client"] for row in rows] == ["arm", "arm"]
    shown = ask(f"episodes show point {rows[0]['episode']}")
    assert {decision["version"] for decision in shown["decisions"]} == {now["runtime"]["version"]}
    doctor = {row["name"]: row for row in ask("doctor point")["checks"]}
    assert "a runtime answers" in doctor["endpoint"]["found"]
    assert "version" in in_process(served, monkeypatch, capsys, "status point")


def connected(deployment: Deployment, client: str, timeout_s: float) -> PolicyClient:
    """A client that has its connection already, and next to no time for what comes."""
    made = connect(deployment, client, timeout_s)
    made.request(GetStatus(), StatusReply)
    made.timeout_s = 1e-4
    return made


@pytest.mark.slow
def test_what_a_runtime_has_not_judged_yet_is_not_made_live_beside_it(
    served: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(served)
    monkeypatch.setattr("fieldtune.commands.policies.connect", connected)
    registry = Registry(RunDir(served / "runs/point").registry)
    assert run(["policies", "add", "point", f"runs/point/policies/{registry.live()}"]) == 1
    assert "no answer to Announce" in " ".join(capsys.readouterr().err.split())
    assert all(change.why != "added by hand" for change in registry.history())


@pytest.mark.slow
def test_an_evaluation_beside_a_running_deployment(served: Path) -> None:
    done = fieldtune("eval", "point", "--episodes", "2", "--json", cwd=served)
    assert one_object(done.stdout)["overall"]["n"] == 2
    other = ("--set", "bridge.play_steps=1")
    refused = fieldtune("eval", "point", "--episodes", "2", "--json", *other, cwd=served, code=1)
    assert "has episodes with bridge.play_steps = None, not 1" in " ".join(refused.stderr.split())


ROBOT = """
from bridge.backend import Outcome
from bridge.backends.point import Point, PointOptions
from msgspec.structs import replace


class Robot(Point):
    def __init__(self):
        super().__init__(PointOptions(size_px=32))
        self._spec = replace(self._spec, paced=True, judges=False)

    def outcome(self):
        return Outcome(status="running", reward=0.0)
"""


@pytest.mark.slow
def test_the_operator_has_the_last_word_in_the_evaluation_of_a_robot(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (prepared / "robot.py").write_text(ROBOT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(prepared), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.chdir(prepared)
    version = Registry(RunDir(prepared / "runs/point").registry).live()
    settings = ("name=robot", "backend={name: 'robot:Robot'}", "bridge.workers=1", "bridge.horizon_steps=60")
    ask = ["eval", "point", "--policy", f"runs/point/policies/{version}", "--episodes", "2", "--json"]
    ask += [argument for setting in settings for argument in ("--set", setting)]

    def until_told(*line: str) -> str:
        deadline_s = time.monotonic() + 60
        while True:
            code, said = run([*line, "--set", "name=robot", "--json"]), capsys.readouterr().out
            if code == 0 and "eval-0" in said:
                return said
            assert time.monotonic() < deadline_s, f"{line}: {said}"
            time.sleep(0.1)

    with subprocess.Popen([sys.executable, "-m", "fieldtune", *ask], stdout=-1, stderr=-1, text=True) as process:
        try:
            assert "stopped" in until_told("stop", "point")
            until_told("operator", "point", "reset")
            until_told("operator", "point", "success")
            printed, said = process.communicate(timeout=60)
        finally:
            process.kill()
    first = one_object(printed)
    assert (first["overall"]["n"], first["overall"]["successes"], first["unjudged"]) == (1, 1, 1)
    assert "1 of 2 episodes wait for somebody to say how they went" in " ".join(said.split())

    log = ("--set", "name=robot", "--json", "--log", f"eval/{version[:8]}")
    assert run(["episodes", "list", "point", "--status", "unjudged", *log]) == 0
    (waiting,) = one_object(capsys.readouterr().out)["episodes"]
    assert run(["episodes", "label", "point", waiting["episode"], "failure", *log]) == 0
    capsys.readouterr()
    again = one_object(fieldtune(*ask, cwd=prepared).stdout)
    assert (again["overall"]["n"], again["overall"]["successes"], again["unjudged"]) == (2, 1, 0)
    for wrong in ("eval/ffff", "eval/", "demonstrations"):
        assert run(["episodes", "list", "point", "--set", "name=robot", "--log", wrong]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"--log {wrong}: there is no such log" in said and f"eval/{version}" in said.replace(" ", "")


WORDED = """
from bridge.backends.point import Point, PointOptions
from msgspec.structs import replace


class Worded(Point):
    def __init__(self, instructions="training"):
        super().__init__(PointOptions(size_px=32))
        texts = ("move the dot to the square", "go") if instructions == "training" else ("reach", "get to it")
        self._spec = replace(self._spec, instructions={"reach": texts})
"""


@pytest.mark.slow
def test_an_evaluation_with_held_out_wordings_has_a_log_of_its_own(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = Registry(RunDir(prepared / "runs/point").registry).live()
    ask = ["eval", "point", "--policy", f"runs/point/policies/{version}", "--json", "--set", "name=worded"]
    ask += ["--set", "trainer.evaluate={first_seed: 3000000, episodes_per_task: 2}"]
    held_out = ("--instructions", "held_out")
    refused = fieldtune(*ask, *held_out, cwd=prepared, code=2)
    assert "$.backend.options.instructions: unknown key" in refused.stderr
    (prepared / "worded.py").write_text(WORDED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(prepared), os.environ.get("PYTHONPATH", "")]))
    told = []
    for extra in ((), ("--instructions", "training"), held_out):
        done = fieldtune(*ask, *extra, "--set", "backend={name: 'worded:Worded'}", cwd=prepared)
        assert one_object(done.stdout)["version"] == version
        directory = RunDir(prepared / "runs/worded").evaluation(version, "held_out" if extra == held_out else "")
        assert (directory / "result.json").exists()
        index = EpisodeIndex(directory)
        rows = [row for row in index.after(0) if row.seed >= 3_000_000]
        told.append(sorted(read_episode(index.path(row)).start.instruction for row in rows))
    training = ["go", "move the dot to the square"]
    assert told == [training, training, ["get to it", "reach"]]
    # Where the configuration tells other wordings, those of training have to be asked for.
    monkeypatch.syspath_prepend(str(prepared))
    options = ("backend={name: 'worded:Worded', options: {instructions: held_out}}",)
    asked = "backend.options.instructions=training"
    assert told_in("point", options, "training") == (*options, asked)
    assert told_in("point", ("backend={name: 'worded:Worded'}",), "training") == ("backend={name: 'worded:Worded'}",)
