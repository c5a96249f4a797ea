"""A backend in another process or on another computer, where `fieldtune backend serve` runs.

Each method is one message there and one back. A thread beside the control loop tells the far side several times a
second that this process lives; when it does so no longer, the far side stops the robot.
"""

from __future__ import annotations

import itertools
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zmq
from msgspec import Struct
from numpy.typing import NDArray

from bridge.backend import BackendError, BackendSpec, Float32, Observation, Outcome
from bridge.client import RefusedError, SilentError
from bridge.config import ConfigError, Positive
from bridge.endpoint import is_local, resolve_endpoint
from bridge.messages import Arrays, Message, WireError
from bridge.remote.line import Line
from bridge.remote.messages import (
    MAX_NAME,
    REMOTE_PROTOCOL,
    Action,
    Apply,
    Beat,
    Bye,
    Claim,
    Describe,
    Described,
    Done,
    GetExpert,
    GetHold,
    GetOutcome,
    Observe,
    Observed,
    Reset,
    Standing,
    Stop,
    observation_from,
)

BEATS_A_SILENCE = 5
CLAIM_AGAIN_S = 0.25

R = TypeVar("R", bound=Message)


class RemoteOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Options of the backend `remote`."""

    endpoint: str
    """Where `fieldtune backend serve` listens: `tcp://HOST:PORT`, or `ipc://PATH` on this computer."""
    keys: str | None = None
    """This client's directory made by `fieldtune keys`; needed unless the endpoint is on this computer."""
    timeout_s: Positive = 5.0
    """A call that is not answered by then is an error."""
    slow_timeout_s: Positive = 60.0
    """The same for `connect`, `reset` and `close`, which may have to move the robot a long way."""


class Remote:
    """Calls go to the far side. They may come from any thread, and `stop` does not wait for another call's answer.

    Images and vectors of an observation cannot be written: they lie where the network put them.

    Once a call was not answered, the session is lost: the far side hears no more signs of life and stops the robot, and
    every later call but `stop` is an error until `connect`, or `reset`, which connects anew.
    """

    def __init__(self, options: RemoteOptions) -> None:
        """Fetch the spec; nothing is connected there, and the robot may be somebody else's.

        Raises `ConfigError` for the options, and `BackendError` if nobody answers.
        """
        if options.endpoint == "ipc":
            raise ConfigError("$.backend.options.endpoint: expected `ipc://PATH` or `tcp://HOST:PORT` (found 'ipc')")
        resolve_endpoint(options.endpoint, Path())
        if options.keys is None and not is_local(options.endpoint):
            raise ConfigError(
                f"$.backend.options.keys: missing; {options.endpoint} is not on this computer "
                "(fieldtune keys makes them)"
            )
        self._options = options
        self._keys = Path(options.keys) if options.keys else None
        self._client = f"{socket.gethostname()}-{os.getpid()}"[-MAX_NAME:]
        self._numbers = itertools.count(1)
        self._session: _Session | None = None
        self._stop_asked = threading.Event()
        with _Session(self._line) as session:
            self._described, _ = self._ask(session, session.loop, Describe(protocol=REMOTE_PROTOCOL), Described)
        if self._described.expert:
            self.expert_action: Callable[[], Float32] = self._expert_action

    @property
    def spec(self) -> BackendSpec:
        """The far backend's, as it was when this object was made."""
        return self._described.spec

    def connect(self) -> None:
        """Become the robot's owner, and have the far backend connect.

        An owner that has died is waited for until the far side notices; raises `BackendError` with the name of one that
        lives. If connected already, does nothing.
        """
        old = self._session
        if old is not None and not old.lost:
            return
        session = _Session(self._line)
        try:
            self._claim(session)
        except BaseException:
            session.close()
            raise
        # Not before: where nobody can be connected to, a stop is still asked of the lost session, and not confirmed.
        self._session = session
        if old is not None:
            old.close()

    def reset(self, task: str, seed: int) -> None:
        """Reset the far backend. If the session is lost it is connected anew before; raises `BackendError` where a stop
        comes meanwhile.
        """
        if self._session is not None and self._session.lost:
            self._stop_asked.clear()
            self.connect()
            if self._stop_asked.is_set():
                raise BackendError("remote was stopped while it connected anew")
        self._call(Reset, Done, slow=True, task=task, seed=seed)

    def observe(self) -> Observation:
        """What the far backend sees; raises `BackendError` also where that does not fit its spec."""
        _, tensors = self._call(Observe, Observed)
        try:
            return observation_from(tensors, self.spec)
        except WireError as error:
            raise BackendError(f"{self._options.endpoint}: the observation does not fit the spec: {error}") from error

    def apply(self, action: Float32) -> Float32:
        """Have the action `[d]` sent; returns what the far backend really sent."""
        return self._action(*self._call(Apply, Action, {"action": np.asarray(action, np.float32)}))

    def outcome(self) -> Outcome:
        """Status and reward from the far backend."""
        standing, _ = self._call(GetOutcome, Standing)
        return Outcome(standing.status, standing.reward)

    def hold_action(self) -> Float32:
        """The far backend's hold action `[d]`."""
        return self._action(*self._call(GetHold, Action))

    def stop(self) -> None:
        """Stop the robot over a connection of its own.

        Raises `BackendError` where the far side does not say that it has. It is asked also when the session is lost:
        whether it has stopped the robot by itself is not known here.
        """
        self._stop_asked.set()
        session = self._session
        if session is None:
            return
        timeout_s = self._options.timeout_s
        if session.lost:
            timeout_s = min(timeout_s, self._described.silence_s)
        self._ask(session, session.stop, Stop(session=session.name), Done, timeout_s=timeout_s)

    def close(self) -> None:
        """Stop and close the far backend, and leave it to others; idempotent."""
        session = self._session
        try:
            if session is not None and not session.lost:
                timeout_s = self._options.slow_timeout_s
                self._ask(session, session.loop, Bye(session=session.name), Done, timeout_s=timeout_s)
        finally:
            self._drop()

    def unplug_for_test(self) -> None:
        """Cut the connections of the session, as if the network cable had been pulled; nobody is told."""
        if self._session is not None:
            self._session.cut()

    def _expert_action(self) -> Float32:
        return self._action(*self._call(GetExpert, Action))

    def _claim(self, session: _Session) -> None:
        # From before the claim is heard: connecting may take longer than a silence.
        session.begin_beats(self._described.silence_s / BEATS_A_SILENCE)
        claim = Claim(protocol=REMOTE_PROTOCOL, session=session.name, client=self._client)
        give_up_s = time.monotonic() + self._described.silence_s + 1.0
        while True:
            try:
                described, _ = session.loop.ask(claim, Described, timeout_s=self._options.slow_timeout_s)
            except RefusedError as error:
                if error.refused.field != "owner" or time.monotonic() > give_up_s:
                    raise BackendError(f"{self._options.endpoint}: {error.refused.message}") from error
                time.sleep(CLAIM_AGAIN_S)
            except (SilentError, WireError) as error:
                raise BackendError(str(error)) from error
            else:
                break
        if described.spec != self.spec:
            session.loop.ask(Bye(session=session.name), Done, timeout_s=self._options.slow_timeout_s)
            raise BackendError(
                f"{self._options.endpoint}: the backend there has another spec than when this process asked for it "
                f"({described.spec.name}); start this process again"
            )

    def _call(
        self,
        message: Callable[..., Message],
        kind: type[R],
        arrays: Arrays | None = None,
        *,
        slow: bool = False,
        **fields: Any,
    ) -> tuple[R, dict[str, NDArray[Any]]]:
        """One call of the running session."""
        session = self._session
        if session is None:
            raise BackendError("remote is not connected; call connect() first")
        if session.lost:
            raise BackendError(f"{session.lost}; the robot stops by itself; call connect() again")
        timeout_s = self._options.slow_timeout_s if slow else None
        return self._ask(
            session, session.loop, message(session=session.name, **fields), kind, arrays, timeout_s=timeout_s
        )

    def _ask(
        self,
        session: _Session,
        line: Line,
        message: Message,
        kind: type[R],
        arrays: Arrays | None = None,
        *,
        timeout_s: float | None = None,
    ) -> tuple[R, dict[str, NDArray[Any]]]:
        """Ask. Whatever goes wrong is a `BackendError`; all but an error of the backend itself, and a stop that was
        quicker, loses the session.
        """
        try:
            return line.ask(message, kind, arrays, timeout_s=timeout_s or self._options.timeout_s)
        except RefusedError as error:
            refused = error.refused
            text = f"{self._options.endpoint}: {refused.message}"
            if refused.code not in ("internal", "replayed"):
                session.lose(text)
            raise BackendError(text) from error
        except SilentError as error:
            text = (
                f"{error}; is `fieldtune backend serve` running there, is it the right address, "
                "and are the keys the right ones?"
            )
            session.lose(text)
            raise BackendError(text) from error
        except WireError as error:
            session.lose(f"{self._options.endpoint}: {error}")
            raise BackendError(session.lost) from error

    def _action(self, _message: Action, tensors: Arrays) -> Float32:
        """The action `[d]` of an answer, a copy of its own."""
        action = tensors.get("action")
        d = len(self.spec.action.names)
        if action is None or action.shape != (d,) or action.dtype != np.float32:
            raise BackendError(f"{self._options.endpoint}: an action of the far backend is not float32 [{d}]")
        return np.array(action)

    def _line(self, context: zmq.Context[zmq.Socket[bytes]]) -> Line:
        options = self._options
        return Line(
            context, options.endpoint, self._keys, number=lambda: next(self._numbers), reach_s=options.timeout_s
        )

    def _drop(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None


class _Session:
    """The connections of one owner: for the loop, for a stop that must not wait, and for the signs of life."""

    def __init__(self, line: Callable[[zmq.Context[zmq.Socket[bytes]]], Line]) -> None:
        """Connect, which waits for nobody; sessions of the same process differ in their name."""
        self.name = secrets.token_hex(16)
        self.lost = ""
        """Why the session is over; empty while it is not."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        with ExitStack() as undo:
            undo.callback(self._context.destroy, linger=0)
            self.loop, self.stop, self._beats = line(self._context), line(self._context), line(self._context)
            undo.pop_all()
        self._silent = threading.Event()
        self._thread: threading.Thread | None = None

    def begin_beats(self, every_s: float) -> None:
        """Say that this process lives until the session is lost or closed."""

        def beat() -> None:
            with closing(self._beats):
                while not self._silent.wait(every_s):
                    self._beats.tell(Beat(session=self.name))

        self._thread = threading.Thread(target=beat, name="beats", daemon=True)
        self._thread.start()

    def lose(self, why: str) -> None:
        """Fall silent, so that the far side stops the robot."""
        self.lost = self.lost or why
        self._silent.set()

    def cut(self) -> None:
        """Nothing reaches the far side from now on."""
        for line in (self.loop, self.stop, self._beats):
            line.cut()

    def close(self) -> None:
        """Fall silent and close the connections; idempotent."""
        self._silent.set()
        if self._thread is not None:
            self._thread.join()
        for line in (self.loop, self.stop):
            line.close()  # when no other thread asks on it
        self._context.destroy(linger=0)

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
