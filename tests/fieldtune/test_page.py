"""The operator's page in a browser, against a running loop: a robot that cannot judge itself, runtime and trainer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from fieldtune.cli import run as command
from fieldtune.page.password import write_password
from runtime.index import EpisodeIndex, EpisodeRow
from runtime.registry import Registry
from runtime.rundir import RunDir

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(150),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; apt-get install chromium"),
]
ENOUGH_S = 60.0
BROWSER_MS = 30_000
ROBOT = "arm"


class Scene:
    """A run whose robot waits for somebody to say how its episodes went."""

    def __init__(self, directory: Path) -> None:
        self.run = RunDir(directory / "page")
        self.index = EpisodeIndex(self.run.episodes)
        self.registry = Registry(self.run.registry)
        self.config = str(directory / "page.yaml")
        self.directory = directory
        self.running: list[subprocess.Popen[bytes]] = []
        self._write(judges=True)
        # Demonstrations and the first version are made where success can be told.
        assert command(["demos", self.config]) == 0
        assert command(["sft", self.config]) == 0
        self._write(judges=False)
        for arguments in (["serve"], ["page"], ["train"], ["drive", "--name", ROBOT]):
            self.start(*arguments)
        self.until(self.run.page_url.exists, "page")
        self.url = self.run.page_url.read_text()
        self.until(lambda: self.index.count() > 0, "episode")

    def _write(self, *, judges: bool) -> None:
        deployment = {
            "name": "page",
            "runs": str(self.directory),
            "backend": {"name": "slow_point:SlowPoint", "options": {"judges": judges}},
            "bridge": {"horizon_steps": 40 if judges else 24},
            "trainer": {
                "demos": {"per_task": 10},
                "vla": {
                    "horizon_steps": 4,
                    "channels": [8],
                    "width": 16,
                    "text_width": 8,
                    "max_tokens": 16,
                    "vocabulary": 300,
                },
                "sft": {"steps": 20, "batch": 16},
                "episodes_per_iteration": 4,
                "ppo": {"critic_warmup_iterations": 1},
                "stop": {"minutes": 60},
            },
            "page": {"port": 18710},
        }
        Path(self.config).write_text(yaml.safe_dump(deployment))

    def start(self, *arguments: str) -> None:
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        with (self.directory / "log").open("ab") as log:
            line = [sys.executable, "-m", "fieldtune", arguments[0], self.config, *arguments[1:]]
            self.running.append(
                subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
            )

    def until(self, condition: Callable[[], Any], what: str) -> None:
        deadline_s = time.monotonic() + ENOUGH_S
        while not condition():
            assert time.monotonic() < deadline_s, f"no {what}:\n{(self.directory / 'log').read_text()[-4000:]}"
            time.sleep(0.1)

    def judge_until(self, condition: Callable[[], Any], what: str) -> None:
        """The same while somebody says of every episode that it went well."""

        def judge() -> Any:
            for row in self.index.list(limit=12, status="unjudged"):
                self.index.label(row.episode, "success", "somebody")
            return condition()

        self.until(judge, what)

    def row(self, episode: str) -> EpisodeRow:
        row = self.index.get(episode)
        assert row is not None
        return row

    def robot(self) -> str:
        """What the robot says of itself."""
        return str(json.loads(self._status())["runtime"]["robots"].get(ROBOT, ""))

    def _status(self) -> str:
        line = [sys.executable, "-m", "fieldtune", "status", self.config, "--json"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=True, timeout=30).stdout

    def metrics(self) -> list[dict[str, Any]]:
        if not self.run.metrics.exists():
            return []
        return [json.loads(line) for line in self.run.metrics.read_text().splitlines() if line.endswith("}")]

    def close(self) -> None:
        for process in self.running:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    sys.path.insert(0, str(Path(__file__).parent))
    made = Scene(tmp_path_factory.mktemp("page"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without a sandbox, since the tests may run as root; it opens nothing but our own page.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, scene: Scene) -> Iterator[Any]:
    opened = browser.new_page(viewport={"width": 390, "height": 844})
    opened.set_default_timeout(BROWSER_MS)
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    yield opened
    opened.close()
    assert errors == []


def test_labels_given_on_the_page_are_in_the_log_and_are_what_the_trainer_takes(scene: Scene, page: Any) -> None:
    def ended() -> list[EpisodeRow]:
        return [row for row in scene.index.after(0) if row.status != "aborted"]

    scene.until(lambda: len(ended()) >= 5, "episodes")
    rows = ended()[:5]
    assert {row.status for row in rows} == {"unjudged"}
    assert scene.metrics() == [], "nothing is learned from what nobody has judged"
    page.goto(f"{scene.url}/episodes?status=unjudged")
    page.get_by_text("to judge").wait_for()
    page.goto(f"{scene.url}/episodes/{rows[0].episode}?status=unjudged")
    page.get_by_text("unjudged").wait_for()
    page.keyboard.press("o")
    page.get_by_text("no older one of unjudged").wait_for()
    page.get_by_role("button", name="success (s)").click()
    page.get_by_text("labelled by").wait_for()
    given = {rows[0].episode: "success"}
    for row, key, status in ((rows[1], "s", "success"), (rows[2], "f", "failure"), (rows[3], "d", "aborted")):
        page.goto(f"{scene.url}/episodes/{row.episode}")
        page.get_by_text("unjudged").wait_for()
        page.keyboard.press(key)
        page.get_by_text("labelled by").wait_for()
        given[row.episode] = status
    for episode, status in given.items():
        scene.until(lambda e=episode, s=status: scene.row(e).status == s, f"{status} in the log")  # type: ignore[misc]
        assert scene.row(episode).labelled_by
    assert scene.metrics() == [], "three are not enough for an iteration"
    # On from the list of what is to be judged: what has been judged meanwhile is passed over.
    page.goto(f"{scene.url}/episodes/{rows[2].episode}?status=unjudged")
    page.get_by_text("labelled by").wait_for()
    page.keyboard.press("n")
    page.wait_for_url(f"**/episodes/{rows[4].episode}?status=unjudged")
    page.get_by_text("unjudged").wait_for()
    page.keyboard.press("s")
    page.get_by_text("labelled by").wait_for()
    scene.until(scene.metrics, "iteration of the trainer")
    first = scene.metrics()[0]
    # Four were judged, and one discarded.
    assert (first["episodes"], first["success"]) == (4, 3 / 4)
    # A button that was clicked does not keep the space bar, which plays.
    page.goto(f"{scene.url}/episodes/{rows[1].episode}")
    page.get_by_text("success", exact=True).wait_for()
    page.get_by_role("button", name="failure (f)").click()
    page.get_by_text("failure", exact=True).wait_for()
    page.keyboard.press("s")
    page.get_by_text("success", exact=True).wait_for()
    page.keyboard.press(" ")
    page.locator(".q-btn:has-text('pause')").or_(page.get_by_text("decision 2")).first.wait_for()
    assert scene.row(rows[1].episode).status == "success"
    # What was said once may be said again.
    page.goto(f"{scene.url}/episodes/{rows[2].episode}")
    page.get_by_text("failure", exact=True).wait_for()
    page.keyboard.press("s")
    page.get_by_text("success", exact=True).wait_for()
    assert scene.row(rows[2].episode).status == "success"
    # What is typed while the browser is on its way to the next episode is not said of the last one.
    page.keyboard.press("n")
    page.keyboard.press("f")
    page.wait_for_url(f"**/episodes/{rows[3].episode}")
    page.get_by_text(rows[3].episode).wait_for()
    assert scene.row(rows[2].episode).status == "success"


def test_the_robot_is_seen_and_obeys(scene: Scene, page: Any) -> None:
    page.goto(scene.url)
    page.get_by_text(ROBOT, exact=True).wait_for()
    picture = page.locator(".camera img").first
    picture.wait_for()
    page.wait_for_function("document.querySelector('.camera img').naturalWidth == 32")
    page.get_by_text("driving", exact=True).wait_for()
    page.keyboard.press("p")
    page.get_by_text("paused", exact=True).wait_for()
    assert scene.robot().startswith("paused")
    page.get_by_role("button", name="resume (p)").click()
    page.get_by_text("driving", exact=True).wait_for()

    def marked() -> bool:
        # A word that comes when the episode is over is refused, and said again for the next.
        page.get_by_role("button", name="success (s)").click()
        return any("operator" in row.reason and row.status == "success" for row in scene.index.list(limit=5))

    scene.until(marked, "episode that somebody ended as a success")
    page.get_by_role("button", name="Stop all").click()
    page.get_by_text("STOPPED: by").wait_for()
    assert scene.robot().startswith("stopped")
    page.get_by_role("button", name="Reset").click()
    scene.until(lambda: scene.robot().startswith("driving"), "robot that drives again")


def test_versions_are_rolled_back_by_who_confirms_it(scene: Scene, page: Any) -> None:
    scene.judge_until(lambda: len(scene.registry.served()) >= 2, "second version")
    page.goto(f"{scene.url}/versions")
    page.get_by_role("cell", name=scene.registry.first().version[:12]).wait_for()

    def rolled_back() -> list[str]:
        return [change.why for change in scene.registry.history() if change.why.startswith("rolled back by")]

    page.get_by_role("button", name="Roll back").click()
    page.get_by_role("button", name="No").click()
    page.get_by_role("button", name="Promote").click()
    page.get_by_text("select a version").wait_for()
    assert rolled_back() == []
    page.get_by_role("button", name="Roll back").click()
    page.get_by_role("button", name="Yes").click()
    page.get_by_text("done: rollback").wait_for()
    assert len(rolled_back()) == 1


def test_learning_is_drawn(scene: Scene, page: Any) -> None:
    scene.judge_until(scene.metrics, "iteration of the trainer")
    page.goto(f"{scene.url}/learning")
    page.get_by_text("iteration", exact=False).first.wait_for()
    page.locator("canvas").first.wait_for()


def test_health_and_metrics(scene: Scene) -> None:
    with urllib.request.urlopen(f"{scene.url}/healthz", timeout=10) as answer:
        assert answer.status == 200
    with urllib.request.urlopen(f"{scene.url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert "fieldtune_up 1" in text


def test_what_is_not_there_is_said(scene: Scene, page: Any) -> None:
    page.goto(f"{scene.url}/episodes/none")
    page.get_by_text("There is no episode none").wait_for()
    for path in ("/camera.jpg?client=no/body&camera=top", "/frame.jpg?episode=none&at=0&camera=top"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(scene.url + path, timeout=10)
        assert caught.value.code == 404


def test_with_a_password_a_name_comes_with_each_label(scene: Scene, browser: Any) -> None:
    password = scene.directory / "password"
    write_password(password, "correct horse")
    url = "http://127.0.0.1:18730"
    scene.start("page", "--set", f"page.password={password}", "--set", "page.port=18730")

    def answers() -> bool:
        with suppress(OSError):
            return bool(urllib.request.urlopen(f"{url}/healthz", timeout=10).status == 200)
        return False

    scene.until(answers, "second page")
    row = scene.index.list(limit=1)[0]
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(BROWSER_MS)
    page.goto(f"{url}/episodes/{row.episode}")
    page.get_by_label("name").fill("Ada")
    page.get_by_label("password").fill("correct horse")
    page.keyboard.press("Enter")
    page.get_by_text(row.episode).wait_for()
    page.get_by_text(row.status, exact=True).wait_for()
    page.keyboard.press("f")
    page.get_by_text("labelled by Ada").wait_for()
    assert (scene.row(row.episode).status, scene.row(row.episode).labelled_by) == ("failure", "Ada")
    page.get_by_role("button", name="log out").click()
    page.get_by_label("password").wait_for()
    context.close()
