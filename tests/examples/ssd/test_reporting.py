"""What goes to pictures, and to TensorBoard through a recorder in the place of the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from runs import meanwhile, press_ctrl_c, read, train

from batches import Schedule
from pictures import draw_pictures

# tensorboardX, with lines of JSON for events.
RECORDER = """
import json
from pathlib import Path

class SummaryWriter:
    def __init__(self, logdir, purge_step):
        Path(logdir).mkdir(parents=True, exist_ok=True)
        self._file = open(Path(logdir) / "events", "a")
        self._write(dict(purge_step=purge_step))

    def add_scalar(self, tag, value, step):
        self._write(dict(tag=tag, value=value, step=step))

    def flush(self):
        self._file.flush()

    def close(self):
        self._write(dict(closed=True))
        self._file.close()

    def _write(self, event):
        self._file.write(json.dumps(event) + "\\n")
"""


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    (tmp_path / "tensorboardX.py").write_text(RECORDER)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("tensorboardX", None)
    yield
    sys.modules.pop("tensorboardX", None)


def events(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "tensorboard" / "events").read_text().splitlines()]


def shown(out: Path) -> list[tuple[int, str, float]]:
    """What TensorBoard shows: it forgets a step when a writer begins at it again."""
    scalars: list[tuple[int, str, float]] = []
    for event in events(out):
        if "purge_step" in event:
            scalars = [scalar for scalar in scalars if scalar[0] < event["purge_step"]]
        elif "tag" in event:
            scalars.append((event["step"], event["tag"], event["value"]))
    return sorted(scalars)


def in_the_log(out: Path) -> list[tuple[int, str, float]]:
    rows = read(out / "log.json")
    return sorted((row["iteration"], name, row[name]) for row in rows for name in row.keys() - {"iteration"})


def test_tensorboard_gets_every_row_of_the_log(digits, tmp_path, recorder):
    out = tmp_path / "run"
    assert train(digits, out, "--iteration", 3, "--log-interval", 2, "--step", 1, "--tensorboard") == 0
    assert shown(out) == in_the_log(out)
    names = {step: {name for at, name, _ in shown(out) if at == step} for step in (1, 2, 3)}
    assert names[2] >= {"main/loss", "main/loss/loc", "main/loss/conf", "lr", "scale", "skipped", "epoch"}
    assert ["map" in names[step] for step in (1, 2, 3)] == [True, False, True]
    assert events(out)[-1] == {"closed": True}


def test_a_resumed_run_shows_no_step_twice(digits, tmp_path, recorder, monkeypatch):
    out = tmp_path / "run"
    arguments = ("--dtype", "float32", "--iteration", 4, "--checkpoint-interval", 2, "--tensorboard")
    with monkeypatch.context() as patched:
        patched.setattr(Schedule, "share", meanwhile(press_ctrl_c, after=3))
        assert train(digits, out, *arguments) == 130
    assert {step for step, *_ in shown(out)} == {1, 2, 3}
    assert train(digits, out, *arguments, "--resume", "auto") == 0
    # The third iteration was repeated from the checkpoint after the second.
    assert shown(out) == in_the_log(out)
    assert {step for step, *_ in shown(out)} == {1, 2, 3, 4}


def test_a_run_resumed_at_its_end_shows_what_it_showed(digits, tmp_path, recorder):
    out = tmp_path / "run"
    arguments = ("--dtype", "float32", "--iteration", 1, "--tensorboard")
    train(digits, out, *arguments)
    before = shown(out)
    assert train(digits, out, *arguments, "--resume", "auto") == 0
    assert shown(out) == before == in_the_log(out)


def test_pictures_show_the_log(digits, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "reporting.draw_pictures", lambda rows, folder: drawn.append([dict(row) for row in rows])
    )
    out = tmp_path / "run"
    assert train(digits, out, "--iteration", 3, "--step", 2, "--dtype", "float32") == 0
    assert drawn == [read(out / "log.json")[:2], read(out / "log.json")]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"iteration": 1}],
        [
            {"iteration": 1, "main/loss": 3.0},
            {"iteration": 2, "map": 0.5},
            {"iteration": 3, "main/loss": 1.0},
        ],
    ],
)
def test_any_log_can_be_drawn(tmp_path, rows):
    for _ in range(2):
        draw_pictures(rows, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "map.png"]
    assert all(Image.open(path).size == (600, 400) for path in tmp_path.iterdir())
