"""Child processes, with real ones: restarted with a growing pause, stopped in order, never left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime import supervisor
from runtime.supervisor import MAX_FAILURES, WATCH_STDIN, Child, ChildFailedError

ENOUGH_S = 20.0
SLEEP = "import time; print('up', flush=True); time.sleep(60)"
OBEDIENT = """
import sys
from runtime.supervisor import stop_on_signals
stop = stop_on_signals()
print("up", flush=True)
stop.wait(60)
print("stopped in order", flush=True)
"""
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"

Make = Callable[..., Child]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Child] = []

    def child(code: str, name: str = "child", log: bool = True) -> Child:
        made.append(Child(name, [sys.executable, "-c", code], tmp_path / "logs" / f"{name}.log" if log else None))
        return made[-1]

    yield child
    for each in made:
        if each.process is not None:
            each.process.kill()
            each.process.wait()


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + ENOUGH_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {ENOUGH_S} s for {what}"
        time.sleep(0.01)


def text(child: Child) -> str:
    assert child.log is not None
    return child.log.read_text() if child.log.exists() else ""


def up(child: Child) -> None:
    until(lambda: "up" in text(child), f"{child.name} to come up")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def never(message: str) -> None:
    raise AssertionError(message)


def test_a_child_that_ends_well_is_not_started_again(make: Make) -> None:
    child = make("print('done')")
    child.ends = True
    child.start()
    until(lambda: child.keep_alive(never) == 0, "the child to end")
    assert child.keep_alive(never) == 0
    assert child.restarts == 0
    assert text(child) == "done\n"


def test_a_killed_child_is_started_again(make: Make) -> None:
    child = make(SLEEP)
    child.start()
    up(child)
    assert child.process is not None
    first = child.process.pid
    os.kill(first, signal.SIGKILL)
    warnings: list[str] = []
    until(lambda: child.keep_alive(warnings.append) is None and bool(warnings), "the failure to be seen")
    assert "was killed by SIGKILL" in warnings[0] and f"(1/{MAX_FAILURES})" in warnings[0]
    until(lambda: child.keep_alive(never) is None and child.process is not None, "the restart")
    assert child.process.pid != first
    assert child.restarts == 1
    until(lambda: text(child) == "up\nup\n", "the log to go on")


def test_pauses_grow_and_failures_are_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # Waiting for real seconds would be most of this suite's time: only the supervisor's clock is moved on.
    clock = Clock()
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    child = make("import sys; print('no camera on /dev/video0'); sys.exit(3)")
    child.start()
    pauses: list[float] = []
    warnings: list[str] = []
    with pytest.raises(ChildFailedError) as caught:
        for _ in range(MAX_FAILURES + 1):
            assert child.process is not None
            child.process.wait(ENOUGH_S)
            died_s = clock.now_s
            child.keep_alive(warnings.append)
            while child.process is None:
                clock.now_s += 0.05
                child.keep_alive(warnings.append)
            pauses.append(clock.now_s - died_s)
    assert len(pauses) == len(warnings) == MAX_FAILURES - 1
    assert all(later >= 1.5 * earlier for earlier, later in pairwise(pauses))
    message = str(caught.value)
    assert "child failed with exit code 3" in message
    assert "no camera on /dev/video0" in message and str(child.log) in message


def test_one_that_has_failed_for_good_is_tried_again_when_told(make: Make, tmp_path: Path) -> None:
    child = make("raise SystemExit(2)")
    child.start()
    while child.runs:
        time.sleep(0.01)
    with pytest.raises(ChildFailedError):
        child.keep_alive(lambda message: None)
    child.command = [sys.executable, "-c", SLEEP]
    child.try_again_after(0.0)
    assert child.keep_alive(lambda message: None) is None and child.runs and child.restarts == 1
    child.stop()
    child.command = [str(tmp_path / "nothing")]
    child.try_again_after(0.0)
    with pytest.raises(ChildFailedError, match=r"cannot be started: .*No such file"):
        child.keep_alive(lambda message: None)


def test_one_that_is_to_go_on_is_started_again_however_it_ended(make: Make) -> None:
    """A runtime and a robot's worker that somebody stops by a signal leave in order, with exit code 0."""
    child = make("print('left in order')")
    child.start()
    warnings: list[str] = []
    until(lambda: child.keep_alive(warnings.append) is None and bool(warnings), "the end to be seen")
    assert "was stopped from outside" in warnings[0]
    until(lambda: child.keep_alive(never) is None and child.restarts == 1, "the restart")


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_failures_long_ago_are_forgiven(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    child = make("raise SystemExit(3)")
    child.start()
    for _ in range(MAX_FAILURES + 2):
        assert child.process is not None
        child.process.wait(ENOUGH_S)
        child.keep_alive(lambda _: None)
        clock.now_s += supervisor.FAILURE_WINDOW_S + 1
        child.keep_alive(never)
    assert child.restarts == MAX_FAILURES + 2


def test_wrong_usage_is_not_tried_again(make: Make) -> None:
    child = make("import sys; print('fieldtune: $.name: wrong'); sys.exit(2)")
    child.start()
    assert child.process is not None
    child.process.wait(ENOUGH_S)
    with pytest.raises(ChildFailedError, match=r"exit code 2(.|\n)*\$\.name: wrong"):
        child.keep_alive(never)
    assert child.restarts == 0


def test_the_log_in_the_message_is_only_its_end(make: Make) -> None:
    child = make("print('\\n'.join(map(str, range(1000))))")
    child.start()
    assert child.process is not None
    child.process.wait(ENOUGH_S)
    tail = child.tail(lines=3)
    assert "999" in tail and "997" in tail and "996" not in tail
    silent = make("", "silent")
    assert silent.tail() == ""
    silent.start()
    assert silent.process is not None
    silent.process.wait(ENOUGH_S)
    assert silent.tail().endswith("silent.log is empty")


def test_a_process_whose_terminal_is_gone_stops_in_order_unless_it_was_to_outlive_it(make: Make) -> None:
    began = "import signal; signal.signal(signal.SIGHUP, signal.{})"  # whatever these tests were started with
    child, kept = make(began.format("SIG_DFL") + OBEDIENT), make(began.format("SIG_IGN") + OBEDIENT, "kept")
    for each in (child, kept):
        each.start()
        up(each)
        assert each.process is not None
        each.process.send_signal(signal.SIGHUP)
        each.process.send_signal(signal.SIGHUP)
    assert child.process is not None and child.process.wait(ENOUGH_S) == 0
    assert "stopped in order" in text(child)
    assert kept.process is not None and kept.process.poll() is None
    assert kept.stop(ENOUGH_S) == 0


def test_a_signal_that_follows_the_loss_of_the_terminal_does_not_cut_the_stop_short(make: Make) -> None:
    slow = OBEDIENT.replace('print("stopped', 'import time; time.sleep(1); print("stopped')
    assert slow != OBEDIENT
    child = make("import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)" + slow)
    child.start()
    up(child)
    assert child.process is not None
    child.process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    child.process.send_signal(signal.SIGTERM)
    assert child.process.wait(ENOUGH_S) == 0 and "stopped in order" in text(child)


def test_stop_asks_first_and_the_child_may_finish(make: Make) -> None:
    child = make(OBEDIENT)
    child.start()
    up(child)
    assert child.stop(ENOUGH_S) == 0
    assert "stopped in order" in text(child)
    assert child.stop() == 0


def test_a_child_that_was_asked_already_may_finish_too(make: Make) -> None:
    waits = 'print("asked", flush=True); import time; time.sleep(1); print("stopped'
    child = make(OBEDIENT.replace('print("stopped', waits))
    for _ in range(2):  # each process of it is asked anew
        child.start()
        up(child)
        child.ask_to_stop()
        until(lambda: "asked" in text(child), "the signal to be seen")
        assert child.stop(ENOUGH_S) == 0
        assert child.log is not None and "stopped in order" in text(child)
        child.log.unlink()


def test_a_child_that_does_not_stop_is_killed_after_the_deadline(make: Make) -> None:
    child = make(STUBBORN)
    child.start()
    up(child)
    assert child.process is not None
    pid = child.process.pid
    assert child.stop(timeout_s=0.3) == -signal.SIGKILL
    assert not alive(pid)


def test_a_nicer_child_is_so_within_its_session_and_among_sessions(make: Make) -> None:
    child = make(OBEDIENT)
    child.niceness = 3
    child.start()
    up(child)
    assert child.process is not None
    wanted = min(os.nice(0) + 3, 19)
    assert os.getpriority(os.PRIO_PROCESS, child.process.pid) == wanted
    group = Path(f"/proc/{child.process.pid}/autogroup")
    if group.exists() and os.access(group, os.W_OK):
        assert group.read_text().split()[-1] == str(wanted)


def test_stopping_what_never_ran(make: Make) -> None:
    child = make(SLEEP)
    child.ask_to_stop()
    assert child.stop() == 0


def test_wait_gives_the_exit_code_or_stops(make: Make) -> None:
    child = make("raise SystemExit(7)")
    child.start()
    assert child.wait(lambda: False) == 7
    child = make(OBEDIENT, "second")
    child.start()
    up(child)
    assert child.wait(lambda: True) == 0


def test_ctrl_c_reaches_only_the_parent(make: Make) -> None:
    child = make(SLEEP)
    child.start()
    up(child)
    assert child.process is not None
    assert os.getpgid(child.process.pid) != os.getpgid(0)


PARENT = """
import sys, time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from runtime.supervisor import Child
child = Child("child", [sys.executable, "-c", sys.argv[1]], Path(sys.argv[2]))
child.start()
print(child.process.pid, flush=True)
time.sleep(60)
"""


def test_children_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, OBEDIENT, str(log)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        until(lambda: log.exists() and "up" in log.read_text(), "the child to come up")
        assert alive(child)
        parent.kill()
    until(lambda: not alive(child), "the child to die")
    assert "stopped in order" in log.read_text()


def test_a_child_that_hangs_dies_with_its_parent_too(tmp_path: Path) -> None:
    hangs = """
import time
from runtime import supervisor
supervisor._watch_stdin.__defaults__ = (0.3,)
supervisor.stop_on_signals()
print("up", flush=True)
time.sleep(60)
"""
    log = tmp_path / "child.log"
    with subprocess.Popen([sys.executable, "-c", PARENT, hangs, str(log)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        until(lambda: log.exists() and "up" in log.read_text(), "the child to come up")
        parent.kill()
    until(lambda: not alive(child), "the child to die")


def test_a_second_signal_ends_the_process_at_once(make: Make) -> None:
    child = make(
        OBEDIENT.replace("stop.wait(60)", "stop.wait(60); print('up again', flush=True)\nimport time; time.sleep(60)")
    )
    child.start()
    up(child)
    assert child.process is not None
    os.kill(child.process.pid, signal.SIGTERM)
    until(lambda: "up again" in text(child), "the first signal to be seen")
    os.kill(child.process.pid, signal.SIGTERM)
    assert child.process.wait(ENOUGH_S) == 1


def test_a_process_that_is_no_child_does_not_watch_its_stdin() -> None:
    environment = {name: value for name, value in os.environ.items() if name != WATCH_STDIN}
    code = "from runtime.supervisor import stop_on_signals; s = stop_on_signals(); print(s.wait(0.3))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        env=environment,
        capture_output=True,
        text=True,
        timeout=ENOUGH_S,
        check=True,
    )
    assert done.stdout == "False\n"
