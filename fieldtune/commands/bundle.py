"""`fieldtune bundle list|make|inspect|verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import tyro

from fieldtune.commands.common import BundleName, Json, list_table, out, print_json
from fieldtune.deployment import find_bundle, shipped_bundles
from runtime.bundle import Bundle, PolicySpec, read_bundle


def list_bundles(*, as_json: Json = False) -> int:
    """List the policies that ship with fieldtune; their names are taken wherever a bundle is asked for.

    Examples:
      fieldtune bundle list
    """
    rows = {name: (read_bundle(path), _size_mb(path)) for name, path in shipped_bundles().items()}
    if as_json:
        print_json({"bundles": [{"name": name, "size_mb": mb, **_summary(read)} for name, (read, mb) in rows.items()]})
        return 0
    table = list_table("name", "version", "sees", "made by", "MB")
    for name, (read, mb) in rows.items():
        table.add_row(name, read.version[:12], _cameras(read.spec), str(read.spec.made.get("command", "")), f"{mb:.1f}")
    out.print(table)
    return 0


def make(
    graph: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="POLICY.onnx")],
    spec: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SPEC.yaml")],
    /,
    *,
    out_dir: Path = Path("policies"),
    tokenizer: Path | None = None,
    as_json: Json = False,
) -> int:
    """Make a bundle from an ONNX policy made elsewhere and a YAML file that says what it sees and gives.

    docs/bundle.md has the names that the graph's inputs and outputs must have.

    Examples:
      fieldtune bundle make policy.onnx policy.yaml --out-dir runs/arm/policies

    Args:
        graph: the ONNX file, weights inside
        spec: the policy's spec, as policy.yaml of a bundle
        out_dir: the bundle is made in OUT_DIR/VERSION
        tokenizer: tokenizer.json, for a policy that reads instructions
    """
    from runtime.make_bundle import make_bundle

    version = make_bundle(graph, spec, tokenizer, out_dir)
    if as_json:
        print_json({"version": version, "path": str(out_dir / version)})
    else:
        out.print(f"{out_dir / version}")
    return 0


def inspect(bundle: BundleName, /, *, as_json: Json = False) -> int:
    """Show what the policy in a bundle sees and gives, and where it comes from.

    Examples:
      fieldtune bundle inspect runs/quickstart/policies/3fa9...
    """
    read = read_bundle(find_bundle(bundle))
    if as_json:
        print_json(_summary(read))
        return 0
    spec = read.spec
    out.print(f"version   {read.version}")
    out.print(f"name      {spec.name}, parent {spec.parent[:12] or '-'}")
    out.print(f"sees      {_cameras(spec)}")
    out.print(f"          state {', '.join(map(' '.join, zip(spec.state.names, spec.state.units, strict=True)))}")
    out.print(f"          instruction of at most {spec.tokens} tokens" if spec.tokens else "          no instruction")
    action = spec.action
    out.print(f"gives     {spec.horizon} actions at {spec.control_hz:g} Hz, {action.kind}:")
    for name, unit, low, high in zip(action.names, action.units, action.low, action.high, strict=True):
        out.print(f"          {name} {unit} in [{low:g}, {high:g}]")
    out.print(f"weights   {sum(w.size for w in read.weights.values()):,} numbers in {len(read.weights)} tensors")
    for key, value in spec.made.items():
        out.print(f"made      {key}: {value}")
    return 0


def verify(bundle: BundleName, /, *, as_json: Json = False) -> int:
    """Check a bundle as the runtime does before it serves it: parts, hash, weights, shapes, probe replay.

    Examples:
      fieldtune bundle verify runs/quickstart/policies/3fa9...
    """
    from runtime.policy import Policy

    policy = Policy.load(find_bundle(bundle))
    if as_json:
        print_json({"version": policy.version, "good": True})
    else:
        out.print(f"{policy.version} is good: hash, weights, shapes and probe agree")
    return 0


def _cameras(spec: PolicySpec) -> str:
    return ", ".join(f"{camera.name} {camera.height}x{camera.width}" for camera in spec.cameras) or "no camera"


def _size_mb(path: Path) -> float:
    return sum(part.stat().st_size for part in path.iterdir()) / 1e6


def _summary(read: Bundle) -> dict[str, object]:
    return {
        "version": read.version,
        "spec": msgspec.to_builtins(read.spec),
        "weights": {name: list(array.shape) for name, array in read.weights.items()},
    }
