"""What is installed where: imports go one way, the bridge is light, and the wheel works on its own."""

from __future__ import annotations

import ast
import json
import pkgutil
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import bridge

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "bridge": {"runtime", "trainer", "fieldtune"},
    "runtime": {"trainer", "fieldtune"},
    "trainer": {"fieldtune"},
}
HEAVY = ["torch", "onnx", "onnxruntime", "onnxscript", "tokenizers", "safetensors", "matplotlib"]
SIMULATORS = ["mujoco", "metaworld", "gymnasium"]
OPTIONAL_BACKENDS = {"bridge.backends.metaworld", "bridge.backends.gymnasium"}

# Makes this interpreter find what one without these packages would find.
WITHOUT = """
import sys
class Without:
    def __init__(self, finder, packages):
        self.finder, self.packages = finder, packages
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.packages:
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path = [Without(finder, {packages!r}) for finder in sys.meta_path]
"""


def run_without(packages: list[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a Python in which `packages` cannot be found."""
    prelude = WITHOUT.replace("{packages!r}", repr(set(packages)))
    command = [sys.executable, "-c", prelude + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False)


def imported(path: Path) -> Iterator[str]:
    """Top-level packages that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {str(path.relative_to(ROOT)): bad for path in files if (bad := FORBIDDEN[package] & set(imported(path)))}
    assert not wrong


def test_the_bridge_imports_on_a_computer_that_has_only_what_it_needs() -> None:
    modules = [module.name for module in pkgutil.walk_packages(bridge.__path__, "bridge.")]
    assert set(modules) >= OPTIONAL_BACKENDS, "a backend was renamed"
    wanted = [name for name in modules if name not in OPTIONAL_BACKENDS]
    code = f"import importlib\nfor name in {wanted!r}: importlib.import_module(name)\nprint(len(sys.modules))"
    done = run_without([*HEAVY, *SIMULATORS, "rich", "tyro"], code)
    assert done.returncode == 0, done.stderr


def test_a_log_is_played_back_on_a_computer_that_has_only_the_bridge() -> None:
    done = run_without([*HEAVY, *SIMULATORS, "rich", "tyro"], "import runtime.replay")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments", [["doctor"], ["drive", "--help"], ["backend", "serve", "--help"], ["--help"], ["keys", "--help"]]
)
def test_a_bare_installation_runs(arguments: list[str]) -> None:
    done = run_without([*HEAVY, *SIMULATORS], f"from fieldtune.cli import run\nsys.exit(run({arguments!r}))")
    assert done.returncode == 0, done.stdout + done.stderr


def test_doctor_tells_what_a_bare_installation_lacks() -> None:
    code = "from fieldtune.cli import run\nsys.exit(run(['doctor', '--json', 'quickstart']))"
    done = run_without([*HEAVY, *SIMULATORS], code)
    report = json.loads(done.stdout)
    rows = {row["name"]: row for row in report["checks"]}
    assert rows["torch [trainer]"]["state"] == "note" and "fieldtune[trainer]" in rows["torch [trainer]"]["mend"]
    assert rows["numpy"]["state"] == "ok"
    # The quickstart needs a simulator, and that is not there.
    assert rows["backend"]["state"] == "bad" and "fieldtune[metaworld]" in rows["backend"]["found"]
    assert done.returncode == 1 and report["good"] is False


@pytest.mark.parametrize(
    ("command", "extra"),
    [(["bundle", "verify", "nowhere"], "runtime"), (["sft", "point"], "trainer"), (["report", "point"], "trainer")],
)
def test_a_missing_extra_is_named(command: list[str], extra: str, tmp_path: Path) -> None:
    code = f"import os; os.chdir({str(tmp_path)!r})\nfrom fieldtune.cli import run\nsys.exit(run({command!r}))"
    packages = HEAVY if extra == "runtime" else [name for name in HEAVY if name in ("torch", "matplotlib")]
    done = run_without(packages, code)
    assert done.returncode == 1
    assert f"fieldtune[{extra}]" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("torch", ["", "torch==2.12.0"])
def test_make_holds_pip_to_the_constraints_except_for_another_torch(torch: str, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    command = ["make", f"PYTHON={sys.executable}", f"TORCH={torch}", ".venv/constraints.txt"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60, stdin=subprocess.DEVNULL, capture_output=True)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    expected = [line for line in lines if not (torch and line.startswith("torch=="))]
    assert (tmp_path / ".venv" / "constraints.txt").read_text().splitlines() == expected
    assert any(line.startswith("torch==") for line in lines)


SHIPPED_PARTS = ("policy.yaml", "graph.onnx", "weights.safetensors", "tokenizer.json", "probe.safetensors")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what this checkout is built from, with one more policy that ships."""
    path = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, path)
    for name in ("bridge", "runtime", "trainer", "fieldtune", "configs"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests", "docs", "runs"):
        (path / name).mkdir()
        (path / name / "left_out.py").write_text("")
    policies = path / "configs" / "policies"
    (policies / "made_up").mkdir(parents=True)
    (policies / "made_up.md").write_text("what it is")
    for part in SHIPPED_PARTS:
        (policies / "made_up" / part).write_bytes(b"x")
    return path


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the source distribution of the checkout is, and the wheel built from that."""
    out = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(checkout)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    """The wheel."""
    (path,) = built.glob("fieldtune-*.whl")
    return path


def test_the_wheel_holds_the_packages_the_configurations_the_policies_and_the_licence(
    wheel: Path, checkout: Path
) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = [path for path in (checkout / "configs").rglob("*") if path.is_file()]
    assert len(configs) > len(SHIPPED_PARTS)
    for config in configs:
        assert f"fieldtune/{config.relative_to(checkout).as_posix()}" in names
    for package in ("bridge", "runtime", "trainer", "fieldtune"):
        for path in (ROOT / package).rglob("*.py"):
            assert path.relative_to(ROOT).as_posix() in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "docs/", "runs/")) for name in names)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_bare_wheel_drives_a_backend_against_a_runtime(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    probe = [*pip, "download", "--no-deps", "--dest", str(tmp_path), "msgspec"]
    if subprocess.run(probe, capture_output=True, timeout=120, check=False).returncode != 0:
        pytest.skip("no package index can be reached")
    subprocess.run([*pip, "install", "--no-compile", str(wheel)], check=True, timeout=240)

    def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(tmp_path / "venv" / "bin" / "fieldtune"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    absent = "import importlib.util as u, sys; sys.exit(any(u.find_spec(n) for n in ('torch', 'onnxruntime')))"
    subprocess.run([str(python), "-c", absent], check=True, cwd=tmp_path)
    checked = bare("doctor", "point")
    assert checked.returncode == 0, checked.stdout + checked.stderr

    # The runtime runs in the development environment, in the same directory, so both mean the same run.
    def full(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "fieldtune", arguments[0], "point", *arguments[1:]]

    quick = ["--set", "trainer.demos.per_task=2", "--set", "trainer.sft.steps=3"]
    for step in ("demos", "sft"):
        subprocess.run(full(step, *quick), cwd=tmp_path, check=True, timeout=60, capture_output=True)
    runtime = subprocess.Popen(full("serve"), cwd=tmp_path)
    try:
        driven = bare("drive", "point", "--episodes", "3", "--json")
        assert driven.returncode == 0, driven.stderr
        assert json.loads(driven.stdout)["episodes"] == 3
    finally:
        runtime.terminate()
        assert runtime.wait(30) == 0
    listed = subprocess.run(
        [sys.executable, "-m", "fieldtune", "episodes", "list", "point", "--json"],
        cwd=tmp_path,
        check=True,
        timeout=60,
        capture_output=True,
    )
    assert len(json.loads(listed.stdout)["episodes"]) == 3
