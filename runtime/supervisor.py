"""Child processes: started with their own log, restarted with a growing pause, stopped in order, never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from bridge.errors import FieldtuneError

WATCH_STDIN = "FIELDTUNE_WATCH_STDIN"
BAD_USAGE = 2  # exit code of a wrong command line or configuration: starting again would fail again
MAX_FAILURES = 5
FAILURE_WINDOW_S = 60.0


class ChildFailedError(FieldtuneError):
    """A child process failed too often or beyond repair; the message has the end of its log."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        """Exit code of its last failure, where that is what it is about."""


STDERR = 2  # the descriptor; what a child says is no result of this process, so it does not go to its stdout


@dataclass(slots=True)
class Child:
    """One child process. Its output goes to `log`, or to the stderr of this process if `log` is None.

    The child lives no longer than its parent: its stdin is a pipe from here, and it stops when that closes, so even a
    parent killed by SIGKILL leaves nothing behind. Ctrl-C reaches only the parent, which stops its children in order.
    """

    name: str
    command: Sequence[str]
    log: Path | None
    niceness: int = 0
    """Added to this process's own."""
    ends: bool = False
    """Whether it may end by itself. Otherwise exit code 0 is a failure too: somebody has sent it a signal."""
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    _failures: deque[float] = field(default_factory=deque)
    _start_again_s: float = 0.0
    _asked: bool = False
    """This process has been asked to stop."""

    def start(self) -> None:
        """Start the process."""
        self._asked = False
        output: IO[bytes] | None = None
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            output = self.log.open("ab")
        try:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=output or STDERR,
                stderr=subprocess.STDOUT if output else None,
                env={**os.environ, WATCH_STDIN: "1"},
                start_new_session=True,
            )
        finally:
            if output is not None:
                output.close()
        if self.niceness:
            _stand_back(self.process.pid, self.niceness)

    @property
    def runs(self) -> bool:
        """Whether the process is there now."""
        return self.process is not None and self.process.poll() is None

    def keep_alive(self, warn: Callable[[str], None]) -> int | None:
        """Call often: 0 once a process that may end has ended well, else None; restarts it after a failure.

        Raises `ChildFailedError` on exit code 2 and after `MAX_FAILURES` failures within `FAILURE_WINDOW_S`.
        """
        now_s = time.monotonic()
        if self.process is None:
            if now_s >= self._start_again_s:
                self.restarts += 1
                try:
                    self.start()
                except OSError as error:
                    raise ChildFailedError(f"{self.name} cannot be started: {error}") from error
            return None
        code = self.process.poll()
        if code is None or (code == 0 and self.ends):
            return code
        self._failures.append(now_s)
        while now_s - self._failures[0] > FAILURE_WINDOW_S:
            self._failures.popleft()
        how = how_it_ended(code)
        if code == BAD_USAGE or len(self._failures) >= MAX_FAILURES:
            raise ChildFailedError(f"{self.name} {how}{self.tail()}", code)
        pause_s = min(0.25 * 2 ** len(self._failures), 8.0)
        warn(f"{self.name} {how}; starting it again in {pause_s:g} s ({len(self._failures)}/{MAX_FAILURES})")
        self._start_again_s = now_s + pause_s
        self._release()
        return None

    def try_again_after(self, pause_s: float) -> None:
        """`keep_alive` is to start one that has failed for good once more, after a pause."""
        self._failures.clear()
        self._start_again_s = time.monotonic() + pause_s
        self._release()

    def wait(self, stopped: Callable[[], bool]) -> int:
        """Run to the end; if `stopped` comes first, stop the process. Returns the exit code."""
        assert self.process is not None
        while self.process.poll() is None:
            if stopped():
                return self.stop()
            time.sleep(0.05)
        return self.process.returncode

    def ask_to_stop(self) -> None:
        """Send SIGTERM, once: a second one would mean to leave at once, and in no order (`stop_on_signals`)."""
        if self.process is not None and self.process.poll() is None and not self._asked:
            self._asked = True
            self.process.send_signal(signal.SIGTERM)

    def stop(self, timeout_s: float = 15.0) -> int:
        """Ask to stop, then SIGKILL after the deadline; returns the exit code (0 if it never ran)."""
        if self.process is None:
            return 0
        self.ask_to_stop()
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._release()
        return code

    def tail(self, lines: int = 12) -> str:
        """The end of the log, for an error message."""
        if self.log is None or not self.log.exists():
            return ""
        text = self.log.read_text(errors="replace").splitlines()[-lines:]
        return f"; the end of {self.log}:\n  " + "\n  ".join(text) if text else f"; {self.log} is empty"

    def _release(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
        self.process = None


def _stand_back(pid: int, niceness: int) -> None:
    """Make a process that leads a session of its own nicer than this one.

    Linux by default shares the cores among sessions first and looks at niceness only within one, so the session's
    scheduling group is made as nice.
    """
    wanted = min(os.nice(0) + niceness, 19)
    group = Path(f"/proc/{pid}/autogroup")
    # It may have ended already; and /proc cannot be written in some containers, where niceness alone must do.
    with suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, pid, wanted)
    with suppress(OSError):
        if group.exists():
            group.write_text(str(wanted), encoding="ascii")


def how_it_ended(code: int) -> str:
    """A failure's exit code in words; negative ones are signals."""
    if code == 0:
        return "was stopped from outside"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM, SIGINT and the loss of the terminal set, and in a child also the death of its parent. Call
    from the main thread.

    A second SIGTERM or SIGINT ends the process at once, since somebody insists. One that follows the loss of terminal
    or parent does not: whoever shuts a computer down sends both, and a robot has to be stopped first.
    """
    stop = threading.Event()
    asked = False

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os._exit(1)
        asked = True
        stop.set()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        # A robot must be stopped when the connection to its computer is lost. Shell and kernel may both say so.
        signal.signal(signal.SIGHUP, lambda _number, _frame: stop.set())
    if os.environ.pop(WATCH_STDIN, None):
        threading.Thread(target=_watch_stdin, args=(stop,), name="watch-parent", daemon=True).start()
    return stop


def _watch_stdin(stop: threading.Event, grace_s: float = 10.0) -> None:
    """The parent holds the other end of stdin; when it is gone, stop, and after a grace period leave regardless."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    stop.set()
    time.sleep(grace_s)
    os._exit(1)
