"""Where the files of one run lie. Nothing else in fieldtune builds these paths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunDir:
    """`runs/NAME`. Directories are made by whoever writes into them."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved deployment, as JSON."""
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        """Libraries and computer of the run, as JSON."""
        return self.path / "environment.json"

    @property
    def demos(self) -> Path:
        """Episode log of the demonstrations."""
        return self.path / "demos"

    @property
    def sft(self) -> Path:
        """Checkpoint and curves of supervised fine-tuning."""
        return self.path / "sft"

    @property
    def policies(self) -> Path:
        """One bundle directory for each version, named by its id."""
        return self.path / "policies"

    @property
    def registry(self) -> Path:
        """SQLite file: versions, lineage, which one is live."""
        return self.path / "registry.sqlite"

    @property
    def episodes(self) -> Path:
        """Episode log of the deployment."""
        return self.path / "episodes"

    @property
    def trainer(self) -> Path:
        """Trainer checkpoint and metrics."""
        return self.path / "trainer"

    @property
    def metrics(self) -> Path:
        """One JSON object a line for each trainer iteration."""
        return self.trainer / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        """Event files of TensorBoard, where `trainer.tensorboard` asks for them."""
        return self.trainer / "tensorboard"

    @property
    def evaluations(self) -> Path:
        """One directory for each `evaluation`."""
        return self.path / "eval"

    def evaluation(self, version: str, variant: str = "") -> Path:
        """Episode log and result of the evaluation of one version; a `variant` is one under other conditions."""
        return self.evaluations / (f"{version}-{variant}" if variant else version)

    @property
    def page_url(self) -> Path:
        """Where the operator's page is, while it is served."""
        return self.path / "page.url"

    @property
    def logs(self) -> Path:
        """What each process printed."""
        return self.path / "logs"
