"""The report: every figure comes from the logs, the page shows those of the JSON, and it stands alone."""

import json
import re
import threading
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from run_logs import trial_row

from bridge.backends import make_backend
from bridge.config import BackendConfig
from bridge.messages import observation_tensors
from fieldtune.deployment import Deployment
from runtime.episode import FORMAT, DecisionRecord, EndRecord, EpisodeStart, ExecutedRecord
from runtime.episodes import EpisodeLog
from runtime.index import EpisodeIndex
from runtime.records import tensor_records
from runtime.registry import Registry
from runtime.rundir import RunDir
from trainer.report import write_report
from trainer.report_data import Report, _expert, gather, rolling_mean
from trainer.report_page import percent, steps
from trainer.statistics import Evaluation, summarise

HORIZON, CHUNK = 30, 4
BEFORE, AFTER = "a1" * 32, "b2" * 32
DEPLOYMENT = msgspec.to_builtins(Deployment(name="<test & run>", backend=BackendConfig("point"), seed=5))


def drive(directory: Path, version: str, seeds: range, speed: float, *, explore: bool) -> None:
    """Log episodes of a policy that goes `speed` times as fast as the expert; it never finds goals of seeds 0 mod 5."""
    backend = make_backend(BackendConfig("point"))
    log = EpisodeLog(directory)
    stored = threading.Semaphore(0)
    for seed in seeds:
        backend.reset("reach", seed)
        name = f"{version[:4]}-{seed}"
        log.start(
            EpisodeStart(
                format=FORMAT,
                episode=name,
                task="reach",
                instruction="move the dot to the square",
                seed=seed,
                source="policy",
                explore=explore,
                client="test",
                spec=backend.spec,
                started_unix_s=0.0,
            )
        )
        step, decision, status = 0, 0, "running"
        while status == "running" and step < HORIZON:
            decision += 1
            tensors = observation_tensors(backend.observe())
            actions = np.tile(backend.expert_action() * speed * (seed % 5 > 0), (CHUNK, 1)).astype(np.float32)
            record = DecisionRecord(
                decision=decision, step=step, version=version, tensors=tensor_records({**tensors, "actions": actions})
            )
            log.append(name, record)
            sent = []
            for action in actions[: HORIZON - step]:
                sent.append(backend.apply(action))
                status = backend.outcome().status
                if status != "running":
                    break
            step += len(sent)
            tensors = {"sent": np.array(sent), "reward": np.zeros(len(sent), np.float32)}
            log.append(name, ExecutedRecord(decision=decision, tensors=tensor_records(tensors)))
        final = tensor_records(observation_tensors(backend.observe()))
        end = "success" if status == "success" else "timeout"
        log.end(name, EndRecord(status=end, steps=step, reason="", tensors=final), lambda error: stored.release())
    for _ in seeds:
        assert stored.acquire(timeout=30)
    log.close()


def evaluation(run: RunDir, version: str) -> Evaluation:
    rows = EpisodeIndex(run.evaluation(version)).after(0)
    return summarise(rows, version=version, horizon_steps=HORIZON)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("run"))
    registry = Registry(run.registry)
    registry.add(BEFORE, parent="", made={})
    registry.add(AFTER, parent=BEFORE, made={})
    drive(run.evaluation(BEFORE), BEFORE, range(1000, 1010), 1.0, explore=False)
    drive(run.evaluation(AFTER), AFTER, range(1000, 1010), 1.8, explore=False)
    drive(run.episodes, BEFORE, range(20), 1.0, explore=True)
    drive(run.episodes, AFTER, range(20, 40), 1.5, explore=True)
    run.trainer.mkdir()
    lines = [
        {"iteration": i, "env_steps": 100 * i, "minutes": 0.5 * i, "weight": 0.1 * i, "kl": 0.01, "value_loss": None}
        for i in range(1, 5)
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 5, "env')
    return run


class Page(HTMLParser):
    """Collects the text of the page and all that a browser would load for it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.loads = "", [], []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_the_figures_of_the_json(run: RunDir) -> None:
    before, after = evaluation(run, BEFORE), evaluation(run, AFTER)
    path = write_report(run, DEPLOYMENT, before, after)
    assert path == run.path / "report.html"
    report = msgspec.json.decode((run.path / "report.json").read_bytes(), type=Report)
    assert (report.before, report.after) == (before, after)
    rows = EpisodeIndex(run.episodes).after(0)
    assert report.env_steps == sum(row.steps for row in rows) and report.episodes == 40 and report.minutes == 2.0
    assert report.versions == {BEFORE: 1, AFTER: 2}
    assert report.comparison is not None and report.comparison.goals == 10
    assert report.comparison.steps_ratio is not None and report.comparison.steps_ratio < 0.9
    page = Page(path.read_text(encoding="utf-8"))
    for result in (before.overall, after.overall):
        for figure in (percent(result.success), steps(result.steps), steps(result.steps_all)):
            assert figure in page.text
    assert f"{report.env_steps:,} environment steps in 40 training episodes in 2.0 minutes" in page.text
    for text in ("<test & run>", BEFORE, AFTER, f"p = {report.comparison.mcnemar_p:.3g}", "max_staleness_versions: 2"):
        assert text in page.text
    for name, version in report.libraries.items():
        assert f"{name} {version}" in page.text


def test_the_page_stands_alone(run: RunDir) -> None:
    html = write_report(run, DEPLOYMENT, evaluation(run, BEFORE), evaluation(run, AFTER)).read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.loads and all(load.startswith(("data:image/png;base64,", "#")) for load in page.loads)
    assert not re.search(r"@import|url\((?!#)", html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) and all(load[1:] in ids for load in page.loads if load[0] == "#")
    assert page.tags.count("img") >= 4 and "#010203" not in html


def test_plots_are_those_of_the_logs(run: RunDir) -> None:
    before, after = evaluation(run, BEFORE), evaluation(run, AFTER)
    plots = {plot.name: plot for plot in gather(run, DEPLOYMENT, before, after).plots}
    rows = EpisodeIndex(run.episodes).after(0)
    total = float(sum(row.steps for row in rows))
    success = plots["success"]
    assert success.lines[0].x[-1] == total and len(success.lines[0].x) == 31  # windows of 10 of 40 episodes
    assert success.lines[0].y[-1] == pytest.approx(np.mean([row.status == "success" for row in rows[-10:]]))
    assert success.marks == [rows[0].steps, sum(row.steps for row in rows[:21])]
    assert [(p.x, p.y) for p in success.points] == [(0, before.overall.success), (total, after.overall.success)]
    assert plots["weight"].lines[0].y == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert "value_loss" not in plots and "explained_variance" not in plots  # null or absent in the metrics
    write_report(run, DEPLOYMENT, before, after)
    for name in plots:
        assert (run.path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_training_still_has_a_report(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    nothing = summarise([], version=BEFORE, horizon_steps=HORIZON)
    page = Page(write_report(run, {}, nothing, nothing).read_text(encoding="utf-8"))
    assert "cannot be paired" in page.text and "0 environment steps" in page.text


def test_what_nobody_has_judged_is_no_failure(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    rows = [trial_row("reach", i, True, 20, i) for i in range(40)]
    waiting = [i for i in range(40) if i % 4 == 0]
    rows = [replace(row, status="unjudged") if i in waiting else row for i, row in enumerate(rows)]
    EpisodeIndex(run.episodes).add(rows)
    before = summarise(rows, version=BEFORE, horizon_steps=HORIZON)
    after = summarise([rows[0]], version=AFTER, horizon_steps=HORIZON)
    report = gather(run, DEPLOYMENT, before, after)
    success = next(plot for plot in report.plots if plot.name == "success")
    assert report.env_steps == 800 and success.lines[0].x[0] == 14 * 20  # its steps count
    assert set(success.lines[0].y) == {1.0} and "10 episodes that nobody has judged are left out" in success.caption
    assert [point.label for point in success.points] == ["before"]  # nothing is known of the other
    page = Page(write_report(run, DEPLOYMENT, before, after).read_text(encoding="utf-8"))
    assert "Left out before: episodes 10 that nobody has judged. Left out after: episodes 1 that nobody" in page.text
    assert "100.0 % → -" in page.text


def test_rolling_mean() -> None:
    assert rolling_mean([1, 2, 3, 4], [0, 1, 1, 0], 2) == ([2, 3, 4], [0.5, 1, 0.5])
    assert rolling_mean([1], [1], 2) == ([], [])
    x, y = rolling_mean(list(map(float, range(5000))), [1.0] * 5000, 10)
    assert len(x) == len(y) == 300 and (x[0], x[-1]) == (9, 4999) and set(y) == {1.0}


def test_the_scripted_expert_is_not_credited_with_what_people_showed(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    found = []
    for client in ("demos", "import"):
        row = trial_row("reach", 12, True, 20)
        row = replace(row, source="expert", client=client, episode=client, file=f"{client}.ep", steps=20)
        EpisodeIndex(run.demos).add([row])
        found.append(_expert(run, HORIZON, first_seed=10))
    assert found[0] is not None and (found[0].n, found[0].successes) == (3, 1)  # 10 and 11 were passed over
    assert found[1] is None
