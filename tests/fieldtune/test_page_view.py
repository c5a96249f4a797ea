"""What the page reads: running episodes as they grow, and versions summed up."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette

from bridge.backends.point import Point, PointOptions
from bridge.config import BackendConfig
from fieldtune.deployment import Deployment
from fieldtune.page import app
from fieldtune.page.logged import read_logged
from fieldtune.page.running import OpenEpisodes
from fieldtune.page.view import RunView, Shared, jpeg, version_line
from runtime.episode import FORMAT, DecisionRecord, EndRecord, EpisodeStart, ExecutedRecord
from runtime.episode_file import EpisodeError, EpisodeFile
from runtime.index import Tally
from runtime.records import frame, tensor_records


def start(episode: str, client: str, at_s: float = 1.0) -> EpisodeStart:
    return EpisodeStart(
        format=FORMAT,
        episode=episode,
        task="reach",
        instruction="move the dot",
        seed=1,
        source="policy",
        explore=True,
        client=client,
        spec=Point(PointOptions(size_px=8)).spec,
        started_unix_s=at_s,
    )


def decision(number: int, value: int) -> DecisionRecord:
    image = np.full((8, 8, 3), value, np.uint8)
    tensors = tensor_records({"image/top": image, "state": np.zeros(2, np.float32)})
    return DecisionRecord(decision=number, step=4 * (number - 1), version="v", tensors=tensors)


def log_in(directory: Path) -> Path:
    for name in ("open", "done"):
        (directory / name).mkdir()
    return directory


def test_a_running_episode_is_followed_record_by_record(tmp_path: Path) -> None:
    episodes = OpenEpisodes(tmp_path)
    assert episodes.look() == {}
    file = EpisodeFile(log_in(tmp_path), start("a", "arm"))
    assert episodes.look() == {}, "it has not seen anything yet"
    for number in (1, 2):
        file.write(decision(number, 10 * number))
        running = episodes.look()["arm"]
        assert (running.decision, running.step, running.version) == (number, 4 * (number - 1), "v")
        assert running.images["top"].shape == (8, 8, 3) and running.images["top"][0, 0, 0] == 10 * number
    later = EpisodeFile(tmp_path, start("b", "arm", 2.0))
    assert episodes.look()["arm"].start.episode == "a", "until the new one has seen something"
    later.write(decision(1, 30))
    assert episodes.look()["arm"].start.episode == "b"
    later.discard()
    file.discard()
    assert episodes.look()["arm"].start.episode == "b", "the last picture stays"


def test_evaluations_are_followed_too_and_not_every_client_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fieldtune.page.running.MOST_CLIENTS", 2)
    evaluation = tmp_path / "eval" / "3fa9"
    evaluation.mkdir(parents=True)
    log_in(evaluation)
    episodes = OpenEpisodes(tmp_path / "episodes", tmp_path / "eval")
    for i, client in enumerate(("arm-1", "arm-2", "arm-3")):
        file = EpisodeFile(evaluation, start(client, client, float(i)))
        file.write(decision(1, 1))
        assert client in episodes.look()
        file.discard()
    assert list(episodes.look()) == ["arm-2", "arm-3"]


def test_half_a_record_is_read_when_the_rest_has_come(tmp_path: Path) -> None:
    log_in(tmp_path)
    header, payload = frame(decision(1, 50))
    path = tmp_path / "open" / "a.ep"
    path.write_bytes(b"".join(frame(start("a", "arm"))) + header + payload[:100])
    episodes = OpenEpisodes(tmp_path)
    assert episodes.look() == {}
    with path.open("ab") as file:
        file.write(payload[100:])
    assert episodes.look()["arm"].images["top"][0, 0, 0] == 50


def test_what_was_read_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = EpisodeFile(log_in(tmp_path), start("a", "arm"))
    file.write(decision(1, 1))
    seen: list[int] = []
    from fieldtune.page import running

    scan = running.scan_records

    def counted(file: Any, offset: int = 0) -> Any:
        for record, end in scan(file, offset):
            seen.append(end)
            yield record, end

    monkeypatch.setattr(running, "scan_records", counted)
    episodes = OpenEpisodes(tmp_path)
    for _ in range(3):
        episodes.look()
    file.write(decision(2, 2))
    episodes.look()
    assert len(seen) == len(set(seen)) == 3


def test_a_logged_episode_is_shown_without_its_pictures_in_memory(tmp_path: Path) -> None:
    file = EpisodeFile(log_in(tmp_path), start("a", "arm"))
    first = tensor_records({"sent": np.full((3, 2), 0.5, np.float32), "reward": np.zeros(3, np.float32)})
    rules = np.array([0, 1], np.uint8)
    more = tensor_records({"sent": np.ones((2, 2), np.float32), "reward": np.zeros(2, np.float32), "rules": rules})
    file.write(decision(1, 10))
    file.write(ExecutedRecord(decision=1, tensors=first))
    file.write(decision(2, 20))
    file.write(ExecutedRecord(decision=1, start=3, tensors=more))
    file.finish(EndRecord(status="timeout", steps=5, reason="", tensors={}))
    path = tmp_path / "done" / "a.ep"
    logged = read_logged(path)
    assert [(seen.number, seen.step) for seen in logged.decisions] == [(1, 0), (2, 4)]
    assert logged.sent == [(0, [0.5, 0.5]), (1, [0.5, 0.5]), (2, [0.5, 0.5]), (3, [1.0, 1.0]), (4, [1.0, 1.0])]
    assert logged.changed == {"range": [4]}
    assert [logged.picture(at, "top")[0, 0, 0] for at in (0, 1)] == [10, 20]
    with pytest.raises(LookupError):
        logged.picture(0, "side")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(EpisodeError, match="damaged"):
        read_logged(path)
    path.unlink()
    with pytest.raises(EpisodeError, match="cannot be read"):
        logged.picture(0, "top")


def test_curves_are_thinned_out_and_read_anew_only_when_there_is_more(tmp_path: Path) -> None:
    view = RunView(Deployment(name="x", backend=BackendConfig("point"), runs=str(tmp_path)))
    assert view._curves() == []
    view.run.trainer.mkdir(parents=True)
    view.run.metrics.write_text("")
    assert view._curves() == []
    view.run.metrics.write_text("".join(f'{{"iteration": {i}}}\n' for i in range(1, 800)) + '{"torn')
    found = view._curves()
    assert 100 < len(found) <= 401 and found[0] == {"iteration": 1}
    assert view._curves() is found


def test_a_version_is_summed_up_without_what_was_aborted_or_not_judged() -> None:
    def tally(status: Any, episodes: int, steps: list[int]) -> Tally:
        squared = sum(n * n for n in steps)
        return Tally(version="v", status=status, episodes=episodes, steps=sum(steps), steps_squared=squared)

    tallies = [tally("success", 4, [10, 12, 14, 16]), tally("timeout", 6, [20] * 6), tally("aborted", 9, [1] * 9)]
    line = version_line(
        [*tallies, tally("unjudged", 3, [5] * 3)], version="v", number=1, live=True, change=None, since_unix_s=0.0
    )
    assert (line.episodes, line.success, line.steps, line.stage) == (10, 0.4, 13.0, "live")
    half = 1.96 * np.std([10, 12, 14, 16], ddof=1) / 2
    assert line.steps_interval == pytest.approx((13 - half, 13 + half))
    assert line.success_interval == pytest.approx((0.1682, 0.6873), abs=1e-4), "Wilson, 4 of 10"
    nothing = version_line([], version="v", number=1, live=False, change=None, since_unix_s=0.0)
    assert (nothing.success, nothing.steps, nothing.steps_interval) == (None, None, None)


def test_those_who_ask_at_the_same_time_share_one_answer() -> None:
    made: list[int] = []

    def make() -> int:
        made.append(1)
        return len(made)

    kept = Shared(make, fresh_s=1e9)
    assert [kept() for _ in range(3)] == [1, 1, 1]
    anew = Shared(make, fresh_s=-1.0)
    assert [anew() for _ in range(2)] == [2, 3]


def test_pictures_are_jpeg() -> None:
    from io import BytesIO

    from PIL import Image

    image = np.zeros((8, 16, 3), np.uint8)
    image[:, :8] = 200
    back = np.asarray(Image.open(BytesIO(jpeg(image))))
    assert back.shape == (8, 16, 3) and abs(back.astype(int) - image).max() < 8


def test_the_page_is_served_although_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    view = RunView(Deployment(name="full", backend=BackendConfig("point"), runs=str(tmp_path)))
    monkeypatch.setattr(app, "make_app", lambda view: Starlette())
    monkeypatch.setattr(app, "write_atomic", full)
    said: list[str] = []
    app.serve(view, view.deployment.page, lambda: True, said.append)
    assert said[0] == f"{view.run.page_url} cannot be written: No space left on device"
    assert said[1].startswith("page: http://127.0.0.1:")
