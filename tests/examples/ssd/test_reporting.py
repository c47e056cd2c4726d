"""What goes to pictures, and to TensorBoard through a recorder in the place of the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from runs import meanwhile, press_ctrl_c, read, train

from ada_loss.report.facts import load as load_records
from batches import Schedule
from pictures import draw_pictures
from reporting import Pace, duration, heading, table_row

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
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert picture.size == (600, 400)


def test_the_table_fits_80_columns_and_its_time_has_a_unit():
    row = {
        "iteration": 120000,
        "main/loss": 1234.56789,
        "lr": 1.23456e-05,
        "scale/min": 2.0**-24,
        "scale/max": 2.0**50,
        "underflow": 1e-5,
        "skipped": 1234,
        "map": 0.12345,
        "time_left": 98765,
    }
    assert len(heading()) == len(table_row(row)) <= 80
    assert "2^-24..2^50" in table_row(row) and "<0.1 %" in table_row(row)
    assert duration(4000) == "1:06:40" and table_row(row | {"time_left": 59}).endswith("0:00:59")
    assert table_row(row).endswith(" 27:26:05")
    assert len(table_row({"iteration": 1, "time_left": 0})) == len(heading())


def test_time_left_is_what_the_recent_pace_makes_of_it(monkeypatch):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("reporting.time.monotonic", lambda: next(clock))
    pace, trainer = Pace(), SimpleNamespace(updater=SimpleNamespace(iteration=10))
    pace.initialize(trainer)
    for _ in range(20):
        trainer.updater.iteration += 1
        pace(trainer)
    assert pace.seconds_left(80) == 100


def test_a_run_records_its_gradients_and_ends_with_five_lines(digits, tmp_path, capsys):
    options = ("--dtype", "mixed16", "--iteration", "4", "--record-interval", "2", "--log-interval", "2")
    train(digits, tmp_path / "run", *options)
    records = load_records([tmp_path / "run"])[0]
    assert records.sampled == [0, 2] and records.run.end.outcome == "finished"
    assert records.layers
    said = capsys.readouterr().out.replace("\n", " ")
    assert all(line in said for line in records.summary())
    rows = read(tmp_path / "run" / "log.json")
    assert all({"scale/min", "scale/max", "underflow", "skipped"} <= row.keys() for row in rows)


def test_recording_can_be_left_out(digits, tmp_path):
    train(digits, tmp_path / "run", "--iteration", "1", "--record-interval", "0")
    assert not (tmp_path / "run" / "records.jsonl").exists()
