"""Environments and robots that ship with fieldtune. Each module is imported only when its backend is asked for."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from typing import Any

import msgspec

from bridge.backend import Backend, BackendSpec
from bridge.config import BackendConfig, ConfigError, parse


@dataclass(frozen=True)
class _Shipped:
    """Where a backend lies, and what must be installed for it. `CLASS` takes one argument, a `CLASSOptions`."""

    module: str
    class_name: str
    packages: tuple[str, ...] = ()
    extra: str = ""


_SHIPPED = {
    "metaworld": _Shipped("bridge.backends.metaworld", "MetaWorld", ("metaworld", "mujoco"), "metaworld"),
    "gymnasium": _Shipped("bridge.backends.gymnasium", "Gymnasium", ("gymnasium",), "gymnasium"),
    "lerobot": _Shipped("bridge.backends.lerobot", "LeRobot"),
    "so101": _Shipped("bridge.backends.so101.arm", "SO101"),
    "point": _Shipped("bridge.backends.point", "Point"),
    "remote": _Shipped("bridge.backends.remote", "Remote"),
    # Above the bridge, as a class of a user is: it reads the episode log. A name here is no import.
    "replay": _Shipped("runtime.replay", "Replay"),
}

BACKENDS = tuple(_SHIPPED)
"""Names of the backends that ship with fieldtune."""

_METHODS = ("connect", "reset", "observe", "apply", "outcome", "hold_action", "stop", "close")


def make_backend(config: BackendConfig) -> Backend:
    """The backend that a deployment names: one that ships with fieldtune, or `module:Class` with keyword arguments.

    Nothing is connected. Raises `ConfigError` naming `$.backend.name` or `$.backend.options.KEY`, and `BackendError` if
    `remote` cannot fetch its spec.
    """
    made = _make_own(config) if ":" in config.name else _make_shipped(config)
    return _checked(made, config.name)


def _make_shipped(config: BackendConfig) -> Any:
    shipped = _SHIPPED.get(config.name)
    if shipped is None:
        near = difflib.get_close_matches(config.name, BACKENDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"$.backend.name: there is no backend {config.name!r}{hint} "
            f"(expected {', '.join(BACKENDS)}, or module:Class)"
        )
    missing = [package for package in shipped.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"$.backend.name: {config.name} needs {' and '.join(missing)}, which cannot be imported; "
            f"run pip install 'fieldtune[{shipped.extra}]'"
        )
    module = importlib.import_module(shipped.module)
    kind = getattr(module, f"{shipped.class_name}Options")
    # The options are read inside the structure of the file, so that an error names the whole path.
    backend = msgspec.defstruct("Backend", [("options", kind)])
    deployment = msgspec.defstruct("Deployment", [("backend", backend)])
    read: Any = parse({"backend": {"options": config.options}}, deployment, f"backend {config.name}")
    return getattr(module, shipped.class_name)(read.backend.options)


def _make_own(config: BackendConfig) -> Any:
    """An object of a class outside fieldtune."""
    module_name, _, class_name = config.name.partition(":")
    # A module beside the configuration, wherever the command itself lies; last, so that it hides nothing installed.
    if "" not in sys.path:
        sys.path.append("")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"$.backend.name: the module of {config.name!r} cannot be imported: {error}; "
            "give the command from its directory, install it in this environment, or add its directory to PYTHONPATH"
        ) from error
    except ValueError as error:
        raise ConfigError(f"$.backend.name: {config.name!r} is not module:Class") from error
    kind = getattr(module, class_name, None)
    if not isinstance(kind, type):
        raise ConfigError(f"$.backend.name: {module_name} has no class {class_name!r}")
    _check_arguments(kind, config.options)
    try:
        return kind(**config.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"$.backend.options: {config.name} refuses its options: {error}") from error


def _check_arguments(kind: type, options: dict[str, Any]) -> None:
    """Compare the options with the constructor's arguments, so that an error can name the key."""
    parameters = inspect.signature(kind).parameters
    named = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for key in options:
            if key not in named:
                known = ", ".join(named) or "none"
                raise ConfigError(f"$.backend.options.{key}: unknown key for {kind.__name__} (known: {known})")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in options:
            raise ConfigError(f"$.backend.options.{name}: missing; {kind.__name__} needs it")


def _checked(backend: Any, name: str) -> Backend:
    """The object itself if it is a `Backend`; one that is not is refused, naming what it lacks."""
    for method in _METHODS:
        if not callable(getattr(backend, method, None)):
            raise ConfigError(f"$.backend.name: {name} has no method {method}(); see bridge.backend.Backend")
    spec = getattr(backend, "spec", None)
    if not isinstance(spec, BackendSpec):
        raise ConfigError(
            f"$.backend.name: {name} has no property spec of type BackendSpec (found {type(spec).__name__}); "
            "see bridge.backend.Backend"
        )
    checked: Backend = backend
    return checked
