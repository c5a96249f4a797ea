"""The guarding thread: its own connection to the runtime, so that a stop does not wait for the control loop.

It says several times a second what the robot does, obeys what the runtime answers or sends unasked, and ticks the
dead-man of `bridge.guard` every control period.
"""

from __future__ import annotations

import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path

import zmq

from bridge.client import connect_dealer
from bridge.guard import Guard
from bridge.messages import Orders, Watch, WireError, decode_reply, encode

BEAT_S = 0.25  # at most; a robot's beat is four times in what it may be without a sign of life
BEATS_BEFORE_HOLD = 4
SEND_HWM = 4  # beats that nobody takes are worth nothing
CLOSE_S = 5.0  # for the thread to end; it makes no call that hangs but that of a terminal that takes no warning


class Watcher:
    """Guards one robot from `start` to `close`, whatever its control loop does."""

    def __init__(self, guard: Guard, endpoint: str, *, client: str, keys: Path | None) -> None:
        """Nothing is opened yet."""
        self.session = ""
        """The control loop's session; empty while it has none."""
        self.told = threading.Event()
        """Set once orders were obeyed; whoever wants to know of later ones clears it."""
        self._guard, self._endpoint, self._client, self._keys = guard, endpoint, client, keys
        self._bridge = secrets.token_hex(8)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)

    def start(self) -> None:
        """Begin, once the backend is connected."""
        self._thread.start()

    def close(self) -> None:
        """Stop guarding; idempotent."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        guard = self._guard
        beat_s = min(BEAT_S, guard.config.hold_after_s / BEATS_BEFORE_HOLD)
        # A simulator has no dead-man: time stands still between two of its steps.
        wait_ms = max(1, int(1000 * (min(beat_s, guard.period_s) if guard.paced else beat_s)))
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            socket = connect_dealer(context, self._endpoint, self._keys)
            socket.sndhwm = SEND_HWM
            next_s, said = 0.0, False
            last: tuple[str, ...] = ()
            while not self._closing.is_set():
                # What nobody took yet goes out as soon as somebody does: the first orders may be to stay paused.
                socket.poll(wait_ms, zmq.POLLIN if said else zmq.POLLIN | zmq.POLLOUT)
                self._read(socket)
                guard.tick()
                (state, why), session = guard.state, self.session
                now_s = time.monotonic()
                if now_s >= next_s or not said or (state, session) != last:
                    beat = Watch(
                        bridge=self._bridge,
                        client=self._client,
                        session=session,
                        state=state,
                        why=why,
                        paused=guard.told_to_pause,
                    )
                    said = self._say(socket, beat)
                    next_s, last = now_s + beat_s, (state, session)
        except Exception as error:  # noqa: BLE001 - nothing may run unguarded, whatever it was
            guard.stop(f"its guard has failed ({type(error).__name__}: {error}); start the bridge again")
            while guard.state[0] == "stopping" and not self._closing.wait(guard.period_s):
                guard.tick()
        finally:
            context.destroy(linger=0)

    def _read(self, socket: zmq.Socket[bytes]) -> None:
        """Obey all that has come."""
        while socket.poll(0):
            try:
                reply, _ = decode_reply(socket.recv_multipart(zmq.NOBLOCK))
            except WireError:
                continue  # what cannot be read is no order and no sign of life
            if isinstance(reply, Orders):
                self._guard.obey(reply)
                self.told.set()

    def _say(self, socket: zmq.Socket[bytes], beat: Watch) -> bool:
        """Whether somebody took it; the dead-man counts from what was heard last."""
        with suppress(zmq.Again):
            socket.send_multipart(encode(beat), zmq.NOBLOCK)
            return True
        return False
