"""Which extra brings a package that is missing."""

from __future__ import annotations

EXTRAS = {
    "onnxruntime": "runtime",
    "safetensors": "runtime",
    "tokenizers": "runtime",
    "torch": "trainer",
    "onnx": "trainer",
    "onnxscript": "trainer",
    "matplotlib": "trainer",
    "cv2": "cameras",
    "av": "data",
    "mcap": "data",
    "pyarrow": "data",
    "rerun": "viz",
    "nicegui": "dashboard",
    "PIL": "dashboard",
    "fastapi": "dashboard",
    "starlette": "dashboard",
    "uvicorn": "dashboard",
    "prometheus_client": "metrics",
    "tensorboard": "metrics",
    "gymnasium": "gymnasium",
    "gymnasium_robotics": "gymnasium-robotics",
    "metaworld": "metaworld",
    "mujoco": "metaworld",
    "scipy": "metaworld",
}


def missing_package(error: ModuleNotFoundError) -> str | None:
    """What to install when an optional package is missing; None if it is not one of ours."""
    package = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(package)
    if extra is None:
        return None
    return f"this needs the package `{package}`, which is not installed; pip install 'fieldtune[{extra}]'"
