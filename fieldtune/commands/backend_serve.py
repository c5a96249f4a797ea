"""`fieldtune backend serve`. Runs on the robot's computer: imports neither torch nor onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from bridge.backends import BACKENDS, make_backend
from bridge.config import BackendConfig, ConfigError, parse
from bridge.endpoint import resolve_endpoint
from bridge.remote.server import BackendServer
from fieldtune.commands.common import Set, warn
from fieldtune.deployment import Deployment, config_names, load_deployment
from runtime.supervisor import stop_on_signals

MIN_SILENCE_S = 0.1


def serve(
    source: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="BACKEND", help="module:Class, the name of a backend, or a configuration whose backend is served"
        ),
    ],
    /,
    *,
    bind: str,
    keys: Path | None = None,
    silence_s: float = 2.0,
    overrides: Set = (),
) -> int:
    """Serve a backend to a fieldtune on another computer, where the configuration says `backend: {name: remote}`.

    One client drives it at a time. Ctrl-C stops the robot and closes the backend.

    Examples:
      fieldtune backend serve my_robot:Arm --bind tcp://127.0.0.1:5556 --set backend.options.port=/dev/ttyACM0
      fieldtune backend serve my_arm.yaml --bind tcp://0.0.0.0:5556 --keys keys/server

    Args:
        bind: where to listen: tcp://HOST:PORT or ipc://PATH
        keys: this side's keys, DIRECTORY/server of `fieldtune keys`; needed where other computers can reach it
        silence_s: a client that is not heard for so long has the robot stopped, and owns it no longer
    """
    if not silence_s >= MIN_SILENCE_S:
        raise ConfigError(f"--silence-s: expected at least {MIN_SILENCE_S} (found {silence_s})")
    if bind == "ipc":
        raise ConfigError("--bind: expected `ipc://PATH` or `tcp://HOST:PORT` (found 'ipc')")
    resolve_endpoint(bind, Path())
    backend = make_backend(backend_config(source, overrides))
    stop = stop_on_signals()
    server = BackendServer(backend, bind, keys=str(keys) if keys else None, silence_s=silence_s, say=warn)
    warn(f"serving {backend.spec.name} on {server.endpoint}; Ctrl-C ends it")
    server.run(stop.is_set)
    warn("the robot was stopped and the backend closed")
    return 0


def backend_config(source: str, overrides: tuple[str, ...] = ()) -> BackendConfig:
    """The backend that `source` means: that of a configuration, or one named alone. Raises `ConfigError`."""
    alone = (":" in source or source in BACKENDS) and source not in config_names() and not Path(source).is_file()
    if not alone:
        return load_deployment(source, overrides).backend
    return parse({"name": "backend", "backend": {"name": source}}, Deployment, source, overrides).backend
