"""What the keys in the terminal of `fieldtune drive` mean. None waits for another, nor for the robot or the runtime."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from bridge.client import PolicyClient, RefusedError, SilentError
from bridge.guard import Guard
from bridge.messages import Command, Judge, Judged, Label, Operate, Operated

HELP = "keys: space or esc stop all robots, r reset, p pause or resume, e end, s success, f failure, d discard"
STOP_KEYS = (" ", "\x1b")
LABEL_KEYS: dict[str, Label] = {"s": "success", "f": "failure", "d": "discard"}
STORED_S = 20.0  # for an episode to be on the disk, once it was ended
AGAIN_S = 0.2


class RobotKeys:
    """Carries out the keys for one robot; `with` waits until the last label is given."""

    def __init__(
        self, guard: Guard, connect: Callable[[], PolicyClient], *, name: str, who: str, warn: Callable[[str], None]
    ) -> None:
        """`connect` makes a client of the runtime, of its own for each call: the robot's is busy. `name` is that of the
        robot, `who` the person whose word a label is.
        """
        self._guard, self._connect, self._warn = guard, connect, warn
        self._name, self._who = name, who
        self._apart: dict[str, threading.Thread] = {}
        self._labels = ThreadPoolExecutor(1, "labels")  # in the order of the keys: the last word counts
        self._last_label: tuple[str, Label] | None = None
        self._last_given: Future[None] | None = None

    def __enter__(self) -> RobotKeys:
        return self

    def __exit__(self, *_: object) -> None:
        self._labels.shutdown()

    def handle(self, key: str) -> None:
        """Do what a key means; one that means nothing is passed over."""
        guard = self._guard
        if key in STOP_KEYS:
            why = f"by a key at {self._name}"
            # Neither waits for the other: this robot needs no runtime for it, and the others not this robot.
            self._beside("stop all", self._tell, "stop", why)
            self._beside("stop", guard.stop, why)
        elif key == "r":
            self._beside("reset all", self._tell, "reset")
        elif key == "p":
            guard.pause(not guard.paused)
        elif key == "e":
            guard.finish("end")
        elif key in LABEL_KEYS:
            self._judge(LABEL_KEYS[key])

    def _judge(self, label: Label) -> None:
        """End the running episode so, or else label the one before."""
        ends = self._guard.finish("end" if label == "discard" else label)
        if ends and label != "discard":
            return
        episode = ends or self._guard.ended
        if not episode:
            self._warn(f"{label}: no episode has ended here that could be judged")
        elif (episode, label) != self._last_label or self._last_given is None or self._last_given.done():
            # Not once more while the same is under way: a key that is held down says it many times a second.
            self._last_label = episode, label
            self._last_given = self._labels.submit(self._label, episode, label)

    def _label(self, episode: str, label: Label) -> None:
        """Label an episode that has ended, or is about to."""
        give_up_s = time.monotonic() + STORED_S
        while True:
            try:
                with self._connect() as client:
                    reply, _ = client.request(Judge(episode=episode, label=label, who=self._who), Judged)
            except Exception as error:  # noqa: BLE001 - nobody else on this thread would say so
                unstored = isinstance(error, RefusedError) and error.refused.code == "episode"
                if not unstored or time.monotonic() > give_up_s:
                    self._warn(f"{label}: {error}; `fieldtune episodes list` says whether episode {episode} has it")
                    return
                time.sleep(AGAIN_S)
            else:
                counts_as = "discarded" if label == "discard" else reply.status
                self._warn(f"episode {episode[:8]} counts as {counts_as}, says {self._who}")
                return

    def _tell(self, command: Command, why: str = "") -> None:
        """To all robots of the runtime."""
        try:
            with self._connect() as client:
                client.request(Operate(command=command, why=why), Operated)
        except SilentError as error:
            self._warn(f"{command}: {error}")

    def _beside(self, name: str, call: Callable[..., None], *arguments: str) -> None:
        """Make a call on a thread of its own, unless the last one of its name still goes on."""
        if name not in self._apart or not self._apart[name].is_alive():
            self._apart[name] = threading.Thread(target=call, args=arguments, name=name, daemon=True)
            self._apart[name].start()
