"""`fieldtune doctor`: what this computer has and lacks, and how to mend it. Needs only what the bridge needs."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro
import zmq
from msgspec import Struct
from rich.table import Table
from rich.text import Text

from bridge.backend import HasExpert
from bridge.backends import make_backend
from bridge.client import SilentError
from bridge.config import ConfigError
from bridge.endpoint import claim_ipc, is_local, require_private, resolve_endpoint
from bridge.errors import FieldtuneError
from bridge.safety import SafetyStage
from fieldtune import __version__
from fieldtune.commands.common import Json, Set, endpoint, out, print_json
from fieldtune.commands.status import runtime_status
from fieldtune.deployment import Deployment, load_deployment
from runtime.index import EpisodeIndex
from runtime.registry import Registry
from runtime.rundir import RunDir

State = Literal["ok", "note", "warn", "bad"]
COLOURS: dict[State, str] = {"ok": "green", "note": "dim", "warn": "yellow", "bad": "red"}
EXTRAS_SHOWN = ("runtime", "trainer", "gymnasium", "metaworld", "cameras")
MODULES = {
    "pyyaml": "yaml",
    "pyzmq": "zmq",
    "opencv-python-headless": "cv2",
}  # where a package is imported by another name
GL_PROBE = "from bridge.backends.rendering import check_gl; print(check_gl())"
GL_TIMEOUT_S = 60.0
ROUND_TRIP_MS = 2000
GB = 1e9


class Check(Struct, frozen=True):
    """One row: what was looked at, how it stands, what was found, and how to mend it where that is needed.

    `note` is something that is not there and need not be; `warn` will do but not well; `bad` must be mended.
    """

    name: str
    state: State
    found: str
    mend: str = ""


def doctor(
    config: Annotated[
        tyro.conf.Positional[str | None],
        tyro.conf.arg(metavar="[CONFIG]", help="also check this deployment: a YAML file or the name of a shipped one"),
    ] = None,
    /,
    *,
    overrides: Set = (),
    as_json: Json = False,
) -> int:
    """Check this computer and say how to mend what is missing; exits with 1 if something needed is broken.

    Examples:
      fieldtune doctor
      fieldtune doctor my_arm.yaml
      fieldtune doctor --json
    """
    checks = [*check_computer(), *check_packages(), *check_drawing(), *check_sockets()]
    if config is not None:
        checks += check_deployment(config, overrides)
    good = all(check.state != "bad" for check in checks)
    if as_json:
        print_json({"good": good, "checks": checks})
        return 0 if good else 1
    table = Table("", "", "found", "what to do", box=None, pad_edge=False)
    for check in checks:
        table.add_row(Text(check.state, COLOURS[check.state]), check.name, check.found, check.mend)
    out.print(table)
    if good:
        out.print("this computer is ready" + ("; `fieldtune backend check` tries the device itself" if config else ""))
    else:
        out.print("mend the rows marked bad", style="red")
    return 0 if good else 1


def check_computer() -> Iterator[Check]:
    """Python, cores, memory, clock."""
    yield Check("fieldtune", "ok", __version__)
    yield Check("python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores >= 2:
        yield Check("cores", "ok", str(cores))
    else:
        yield Check("cores", "warn", str(cores), "give it two: runtime and trainer share them with the simulator")
    yield check_memory(memory_bytes())
    clock = time.get_clock_info("monotonic")
    ticks = [time.monotonic() for _ in range(1000)]
    steady = clock.monotonic and all(a <= b for a, b in itertools.pairwise(ticks))
    found = f"resolution {clock.resolution:g} s"
    yield (
        Check("monotonic clock", "ok", found)
        if steady
        else Check("monotonic clock", "bad", f"it runs backwards; {found}", "mend the clock source of this computer")
    )


def memory_bytes() -> int | None:
    """Memory that this process may have: of the computer, or of its control group if that is less."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def check_memory(total: int | None) -> Check:
    """At least 4 GB; None where the system does not say."""
    if total is None:
        return Check("memory", "note", "this system does not say how much")
    if total >= 4 * GB:
        return Check("memory", "ok", f"{total / GB:.1f} GB")
    return Check(
        "memory", "warn", f"{total / GB:.1f} GB", "training wants 4 GB; the bridge alone needs a tenth of that"
    )


def check_packages() -> Iterator[Check]:
    """What fieldtune itself needs (bad if broken), then what its extras bring (a note where it is absent)."""
    try:
        wanted = requirements()
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", "bad", "fieldtune runs from its source and is not installed", "make install")
        return
    for name, minimum, extra in wanted:
        install = f"pip install 'fieldtune[{extra}]'" if extra else "pip install --force-reinstall fieldtune"
        label = f"{name} [{extra}]" if extra else name
        module = MODULES.get(name.lower(), name)
        try:
            importlib.import_module(module)
            version = importlib.metadata.version(name)
        # A package with a broken library raises whatever it stumbles over, and the table is for seeing that.
        except Exception as error:  # noqa: BLE001
            if isinstance(error, ModuleNotFoundError) and error.name == module and extra:
                yield Check(label, "note", "not installed", f"{install}, if this computer is to need it")
            else:
                yield Check(label, "bad", f"cannot be imported: {type(error).__name__}: {error}", install)
            continue
        if numbers(version) < numbers(minimum):
            yield Check(label, "bad", version, f"{install}: {minimum} or newer is needed")
        else:
            yield Check(label, "ok", version)


def requirements() -> list[tuple[str, str, str | None]]:
    """(package, least version, extra or None) from fieldtune's own metadata; a package of several extras comes once."""
    found: dict[str, tuple[str, str, str | None]] = {}
    for line in importlib.metadata.requires("fieldtune") or []:
        match = re.match(r"([A-Za-z0-9_.-]+)(\[.*?\])?(?:>=([0-9.]+))?", line)
        extra = re.search(r"""extra == ['"](.+?)['"]""", line)
        name = extra[1] if extra else None
        if match is None or match[1] == "fieldtune" or (name is not None and name not in EXTRAS_SHOWN):
            continue
        earlier = found.get(match[1])
        if earlier is None or _rank(name) < _rank(earlier[2]):
            found[match[1]] = (match[1], match[3] or "0", name)
    return sorted(found.values(), key=lambda row: _rank(row[2]))


def _rank(extra: str | None) -> int:
    """The bare install first, then the extras from the smallest to the largest."""
    return EXTRAS_SHOWN.index(extra) if extra else -1


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparing: `2.13.0+cpu` is (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def check_drawing() -> Iterator[Check]:
    """Whether MuJoCo can draw without a screen. In a process of its own: a broken driver can take a process with it."""
    if importlib.util.find_spec("mujoco") is None:
        yield Check("drawing (OpenGL)", "note", "not needed: mujoco is not installed")
        return
    mend = "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri (Debian, Ubuntu), and leave MUJOCO_GL unset"
    try:
        probe = subprocess.run(
            [sys.executable, "-c", GL_PROBE],
            capture_output=True,
            text=True,
            timeout=GL_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        yield Check("drawing (OpenGL)", "bad", f"no picture within {GL_TIMEOUT_S:g} s", mend)
        return
    if probe.returncode == 0:
        yield Check("drawing (OpenGL)", "ok", probe.stdout.strip())
        return
    last = (probe.stderr.strip().splitlines() or [f"the process ended with {probe.returncode}"])[-1]
    yield Check("drawing (OpenGL)", "bad", last.rpartition("BackendError: ")[2], mend)


def check_sockets() -> Iterator[Check]:
    """The private directory of ipc sockets, and a message there and back over ipc and tcp."""
    with tempfile.TemporaryDirectory(prefix="fieldtune-doctor-") as nowhere:
        try:
            address = resolve_endpoint("ipc", Path(nowhere))
            directory = Path(address.removeprefix("ipc://")).parent
            lock = claim_ipc(address)
        except (ConfigError, OSError) as error:
            yield Check(
                "runtime directory", "bad", str(error), "set XDG_RUNTIME_DIR to a directory that is yours alone"
            )
            return
        try:
            yield Check("runtime directory", "ok", f"{directory.parent}, only for you")
            yield round_trip("ipc", address)
        finally:
            lock.close()
            shutil.rmtree(directory)
    yield round_trip("tcp loopback", "tcp://127.0.0.1:*")


def round_trip(name: str, address: str) -> Check:
    """A message there and back on `address`."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        with context.socket(zmq.ROUTER) as server, context.socket(zmq.DEALER) as client:
            server.linger = client.linger = 0
            server.bind(address)
            client.connect(server.get_string(zmq.LAST_ENDPOINT))
            client.send(b"there")
            if not server.poll(ROUND_TRIP_MS):
                return Check(
                    name, "bad", f"nothing arrived within {ROUND_TRIP_MS} ms", "see what filters local sockets"
                )
            server.send_multipart(server.recv_multipart())
            if not client.poll(ROUND_TRIP_MS):
                return Check(name, "bad", f"no answer within {ROUND_TRIP_MS} ms", "see what filters local sockets")
            return Check(name, "ok", "a message went there and back")
    except zmq.ZMQError as error:
        return Check(name, "bad", f"{address}: {error}", "allow this user to open local sockets")
    finally:
        context.destroy(linger=0)


def check_deployment(config: str, overrides: tuple[str, ...]) -> Iterator[Check]:
    """The file, its backend, its address, and the disk where its run will lie."""
    try:
        deployment = load_deployment(config, overrides)
    except ConfigError as error:
        yield Check("configuration", "bad", str(error), "mend the file; docs/configuration.md has every key")
        return
    yield Check("configuration", "ok", f"{config}: deployment {deployment.name}")
    try:
        backend = make_backend(deployment.backend)
        SafetyStage(backend, deployment.bridge.safety)
        spec = backend.spec
    except FieldtuneError as error:
        yield Check("backend", "bad", str(error), "mend $.backend or $.bridge.safety of the file")
    else:
        cameras = ", ".join(f"{camera.name} {camera.height}x{camera.width}" for camera in spec.cameras) or "no camera"
        found = f"{spec.name}: {cameras}, {len(spec.action.names)} actions at {spec.control_hz:g} Hz"
        yield Check("backend", "ok", f"{found}, {len(spec.instructions)} tasks")
        yield check_policy(deployment, scripted=isinstance(backend, HasExpert))
    yield check_endpoint(deployment)
    yield check_disk(deployment)


def check_policy(deployment: Deployment, *, scripted: bool) -> Check:
    """A version is live, or there are demonstrations to make one from, or a scripted expert makes them."""
    run = RunDir(deployment.run_dir)
    try:
        live = Registry(run.registry).live()
        demos = EpisodeIndex(run.demos).count(status="success")
    except FieldtuneError as error:
        return Check("policy", "note", f"cannot be looked for: {error}")
    if live is not None:
        return Check("policy", "ok", f"version {live[:12]} is live")
    if demos or scripted or deployment.trainer.policy is not None:
        found = f"{demos} demonstrations" if demos else "a scripted expert shows the tasks"
        return Check("policy", "ok", f"none yet; {deployment.trainer.policy or found}")
    mend = "fieldtune policies add CONFIG BUNDLE, or fieldtune demos import DATASET CONFIG"
    return Check("policy", "warn", "none yet, and no demonstrations", mend)


def check_endpoint(deployment: Deployment) -> Check:
    """A runtime answers there, or one could be started there."""
    serve = deployment.runtime.serve
    try:
        address = endpoint(deployment)
        now = runtime_status(deployment, timeout_s=1.0)
        return Check("endpoint", "ok", f"{address}: a runtime answers, version {now.version[:12]}")
    except SilentError:
        pass
    except (FieldtuneError, zmq.ZMQError) as error:
        return Check("endpoint", "bad", str(error), "mend runtime.serve and bridge.endpoint of the file")
    if deployment.bridge.endpoint is not None:
        return Check(
            "endpoint", "warn", f"{address}: nobody answers", "start the runtime there; compare keys and address"
        )
    if not is_local(address):
        if serve.keys is None:
            mend = "give runtime.serve.keys (fieldtune keys makes them), or listen on ipc or tcp://127.0.0.1"
            return Check("endpoint", "bad", f"{address} can be reached from other computers and has no keys", mend)
        return Check("endpoint", "note", f"{address}: nobody answers; it is not tried from here")
    return check_free(address)


def check_free(address: str) -> Check:
    """Bind the address of this computer for a moment."""
    taken = "stop what holds it, or choose another runtime.serve.endpoint"
    try:
        if address.startswith("ipc://"):
            require_private(address)
            directory = Path(address.removeprefix("ipc://")).parent
            if directory.is_dir():
                claim_ipc(address).close()
            return Check("endpoint", "ok", f"{address} is free")
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            with context.socket(zmq.ROUTER) as server:
                server.bind(address)
        finally:
            context.destroy(linger=0)
    except (ConfigError, OSError, zmq.ZMQError) as error:
        return Check("endpoint", "bad", f"{address}: {error}", taken)
    return Check("endpoint", "ok", f"{address} is free")


def check_disk(deployment: Deployment) -> Check:
    """Room for the episode log where the run will lie, and the right to write there."""
    place = deployment.run_dir.resolve()
    while not place.exists():
        place = place.parent
    free, wanted = shutil.disk_usage(place).free / GB, deployment.runtime.log.keep_gb
    found = f"{place}: {free:.1f} GB free"
    if not os.access(place, os.W_OK | os.X_OK):
        return Check("disk", "bad", f"{place} cannot be written", "choose another `runs` in the file")
    if free < 1:
        return Check("disk", "bad", found, "free some, or choose another `runs` in the file")
    if free < wanted:
        return Check("disk", "warn", f"{found}, the log may take {wanted:g}", "lower runtime.log.keep_gb, or free some")
    return Check("disk", "ok", found)
