"""Two runs that would write to the same folder, and what a killed one leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from processes import EXAMPLE, environment, run_script
from runs import BRIEF, assert_one_sentence, meanwhile, read, rows_without_times, status_of, train

import demo
from batches import Schedule
from files import locked
from output import LOCK_FILE

BRIEFLY = ("--dtype", "float32", "--checkpoint-interval", 1, "--iteration")
HOLDER = """
import sys, time
from pathlib import Path
from files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def run_in_progress(tmp_path):
    """The folder of a run, and the process that holds it."""
    pytest.importorskip("fcntl")
    out = tmp_path / "run"
    out.mkdir()
    command = [sys.executable, "-c", HOLDER, str(out / LOCK_FILE)]
    holder = subprocess.Popen(command, cwd=EXAMPLE, env=environment(), stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout.readline() == "held\n"
        yield out, holder
        holder.kill()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_that_would_write_to_the_same_folder_is_refused(digits, tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    out, alone, second = tmp_path / "run", tmp_path / "alone", []
    place = (*BRIEF, "--dataset-dir", digits, "--out", out)

    def start_second() -> None:
        before = contents(out)
        second.append(run_script("train_multi.py", *place, *BRIEFLY, 2, "--resume", "auto"))
        assert contents(out) == before

    with monkeypatch.context() as patched:
        patched.setattr(Schedule, "share", meanwhile(start_second, after=1))
        assert train(digits, out, *BRIEFLY, 2) == 0
    assert second[0].returncode == 2
    assert second[0].stderr == (
        f"error: Another run is writing to {out} now: wait for its end, or write to another folder.\n"
    )
    assert read(out / "result.json")["outcome"] == "finished"
    train(digits, alone, *BRIEFLY, 2)
    assert rows_without_times(out) == rows_without_times(alone)
    assert not (out / LOCK_FILE).exists()


@pytest.mark.parametrize("resume", [(), ("--resume", "auto")], ids=["afresh", "resume"])
def test_a_killed_run_is_in_nobodys_way(digits, run_in_progress, capsys, resume):
    out, holder = run_in_progress
    assert status_of(digits, out, *BRIEFLY, 1, *resume) == 2
    assert_one_sentence(capsys, f"Another run is writing to {out} now")
    assert [path.name for path in out.iterdir()] == [LOCK_FILE]
    holder.kill()
    holder.wait()
    assert (out / LOCK_FILE).exists(), "as a killed run leaves it"
    assert train(digits, out, *BRIEFLY, 1, *resume) == 0
    assert not (out / LOCK_FILE).exists()


def test_a_second_demonstration_leaves_the_first_alone(
    digits, run_in_progress, tmp_path, monkeypatch, capsys
):
    out, _ = run_in_progress
    (out / "log.json").write_text("[]")
    monkeypatch.setattr(demo, "OUT", out)
    picture = tmp_path / "demo.png"
    brief = ["--iteration", "1", "--dataset-dir", str(digits), "--picture", str(picture)]
    assert demo.main(brief) == 2
    assert_one_sentence(capsys, "Another run is writing")
    assert (out / "log.json").read_text() == "[]"
    assert not picture.exists()


def test_a_lock_that_was_deleted_while_it_was_waited_for_is_not_taken(tmp_path, monkeypatch):
    """Between opening the file and locking it its holder ends, and a third process makes a new one."""
    fcntl = pytest.importorskip("fcntl")
    path, flock, third = tmp_path / LOCK_FILE, fcntl.flock, []

    def late(file, operation) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        third.append(open(path, "w"))
        flock(third[0], operation)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(BlockingIOError), locked(path):
        pass
    third[0].close()


def test_where_files_cannot_be_locked_nobody_is_kept_out(tmp_path, monkeypatch):
    monkeypatch.setattr("files.fcntl", None)
    with locked(tmp_path / LOCK_FILE), locked(tmp_path / LOCK_FILE):
        assert not (tmp_path / LOCK_FILE).exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(digits, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert status_of(digits, tmp_path / "file" / "run", *BRIEFLY, 1) == 2
    assert_one_sentence(capsys, "can't be made (Not a directory): name another folder with --out")
