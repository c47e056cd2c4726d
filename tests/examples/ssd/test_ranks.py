"""Training on several MPI ranks, and what happens when it goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from chainer.serializers import save_npz
from processes import EXAMPLE, environment, launcher, run_script
from runs import assert_same_end

from batches import Schedule
from errors import InputError, SharedInputError, launched_rank
from models import build_model
from ranks import Alone, Together, choose_communicator, launched_size, start_ranks


def arguments(digits: Path, out: Path, *more: object) -> list[str]:
    fixed = ("--device", "cpu", "--kernels", "numpy", "--batchsize", "4", "--warm-up", "0")
    return [*fixed, "--log-interval", "1", "--dataset-dir", str(digits), "--out", str(out), *map(str, more)]


def weights(out: Path) -> dict[str, np.ndarray]:
    with np.load(out / "model.npz") as file:
        return {name: array.astype(np.float32) for name, array in file.items()}


def rows(out: Path) -> list[dict[str, float]]:
    return json.loads((out / "log.json").read_text())


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [
        (("--dtype", "float32"), 1e-5),
        (("--dtype", "mixed16", "--loss-scale-method", "approx_range"), 0.02),
        (("--dtype", "mixed16", "--loss-scale-method", "fixed", "--dynamic-interval", "1"), 0.02),
    ],
    ids=["float32", "adaptive", "dynamic"],
)
def test_two_ranks_train_as_one_does(digits, tmp_path, method, tolerance):
    ours, theirs = tmp_path / "two", tmp_path / "one"
    two = run_script("train_multi.py", *arguments(digits, ours, "--iteration", 3, *method), ranks=2)
    one = run_script("train_multi.py", *arguments(digits, theirs, "--iteration", 3, *method))
    assert (two.returncode, one.returncode) == (0, 0), two.stderr + one.stderr
    assert two.stdout.count("| mAP") == 1, "only rank 0 reports"
    assert json.loads((ours / "result.json").read_text())["ranks"] == 2

    start = {
        name.lstrip("/"): p.array for name, p in build_model("small", 10, "lecun-uniform", 0).namedparams()
    }
    of_two, of_one = weights(ours), weights(theirs)
    for name in start:
        # Norm of the difference over that of what training did to the weights.
        moved = np.linalg.norm(of_one[name] - start[name])
        assert np.linalg.norm(of_two[name] - of_one[name]) <= tolerance * moved + 1e-6, name
    losses = [[row["main/loss"] for row in rows(out)] for out in (ours, theirs)]
    np.testing.assert_allclose(*losses, rtol=tolerance)


def test_killed_ranks_resume_and_end_as_if_nothing_had_happened(digits, tmp_path):
    method = ("--loss-scale-method", "approx_range", "--update-per-n-iteration", "3", "--iteration", "14")
    ours, theirs = tmp_path / "killed", tmp_path / "whole"
    more = (*method, "--checkpoint-interval", "2")
    whole = run_script("train_multi.py", *arguments(digits, theirs, *more), ranks=2)
    assert whole.returncode == 0, whole.stderr

    command = [sys.executable, "train_multi.py", *arguments(digits, ours, *more, "--resume", "auto")]
    streams = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    job = subprocess.Popen([*launcher(2), *command], cwd=EXAMPLE, env=environment(), **streams)
    wait_for(lambda: any((ours / "checkpoints").glob("iteration-*")), job)
    os.kill(process_of_rank(1, str(ours)), signal.SIGKILL)
    killed = time.monotonic()
    job.communicate(timeout=60)
    assert job.returncode != 0
    assert time.monotonic() - killed < 30
    assert not (ours / "result.json").exists()

    again = run_script("train_multi.py", *arguments(digits, ours, *more, "--resume", "auto"), ranks=2)
    assert again.returncode == 0, again.stderr
    assert "Goes on after iteration" in again.stdout
    assert_same_end(ours, theirs)

    alone = run_script("train_multi.py", *arguments(digits, ours, *more, "--resume", "auto"))
    assert alone.returncode == 2
    assert "was written by 2 ranks and this is 1: use mpiexec -n 2" in alone.stderr


def test_one_failing_rank_ends_all_with_its_error(digits, tmp_path):
    """An image is damaged that only rank 1 reads, in the third iteration."""
    schedule = {rank: Schedule(12, 4, 0, rank, 2) for rank in range(2)}
    read_before = {i for rank in range(2) for t in range(2) for _, i in schedule[rank].share(t)}
    (index, *_) = (i for _, i in schedule[1].share(2) if i not in read_before)
    broken = shutil.copytree(digits, tmp_path / "digits")
    path = broken / "VOC2007" / "JPEGImages" / f"{index + 1:06d}.jpg"
    path.write_bytes(path.read_bytes()[:200])
    more = ("--iteration", 9, "--dtype", "float32", "--no-check")
    result = run_script("train_multi.py", *arguments(broken, tmp_path / "run", *more), ranks=2)
    assert result.returncode == 2
    assert "rank 1 of 2 failed, ending all: error: " in result.stderr
    assert path.name in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "result.json").exists()


def test_bad_input_is_one_sentence_also_from_two_ranks(digits, tmp_path):
    for package in ("tensorboard", "tensorboardX"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('not installed')")
    paths = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    for more, words in (
        (("--batchsize", "3"), "--batchsize 3 does not divide among 2 ranks"),
        (("--init-scale", "-2"), "--init-scale must be a positive power of two"),
        (("--pretrained", "/nowhere.npz"), "/nowhere.npz can't be read"),
        (("--frobnicate",), "unrecognized arguments: --frobnicate"),
        (("--tensorboard",), "--tensorboard needs a package that is not there: pip install tensorboardX"),
    ):
        result = run_script(
            "train_multi.py", *arguments(digits, tmp_path / "run", *more), ranks=2, PYTHONPATH=paths
        )
        assert result.returncode == 2, result.stderr
        assert result.stderr.count("error: ") == 1, result.stderr
        assert words in result.stderr
        assert "Traceback" not in result.stderr


def test_a_damaged_image_ends_the_evaluation_on_all_ranks(digits, tmp_path):
    model = tmp_path / "model.npz"
    save_npz(model, build_model("small", 10, "lecun-uniform", seed=0))
    broken = shutil.copytree(digits, tmp_path / "digits")
    # The second test image, which rank 1 reads.
    path = broken / "VOC2007" / "JPEGImages" / "000014.jpg"
    path.write_bytes(path.read_bytes()[:200])
    result = run_script("evaluate.py", model, "--dataset-dir", broken, ranks=2)
    assert result.returncode == 2
    assert "rank 1 of 2 failed, ending all: error: " in result.stderr
    assert path.name in result.stderr


@pytest.mark.parametrize("loaders", [0, 1])
def test_ctrl_c_behind_mpiexec_is_one_line(digits, tmp_path, loaders):
    out = tmp_path / "run"
    more = ("--iteration", 9999, "--dtype", "float32", "--loaders", loaders)
    command = [*launcher(2), sys.executable, "train_multi.py", *arguments(digits, out, *more)]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    job = subprocess.Popen(command, cwd=EXAMPLE, env=environment(), start_new_session=True, **streams)
    wait_for((out / "log.json").exists, job)
    os.killpg(job.pid, signal.SIGINT)
    _, printed = job.communicate(timeout=60)
    assert job.returncode == 130
    assert printed.split() == ["interrupted"]
    assert not (out / "result.json").exists()


def test_ctrl_c_is_one_line_alone_as_well(digits, tmp_path):
    out = tmp_path / "run"
    more = ("--iteration", 9999, "--dtype", "float32", "--loaders", 1)
    command = [sys.executable, "train_multi.py", *arguments(digits, out, *more)]
    streams = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    job = subprocess.Popen(command, cwd=EXAMPLE, env=environment(), start_new_session=True, **streams)
    wait_for((out / "log.json").exists, job)
    os.killpg(job.pid, signal.SIGINT)
    _, printed = job.communicate(timeout=60)
    assert job.returncode == 130
    assert printed.split() == ["interrupted"]


class RecordedRanks(Together):
    """Rank 1 of 3, which only notes with which status it ended all."""

    def __init__(self) -> None:
        self.aborted: list[int] = []
        mpi_comm = SimpleNamespace(Abort=self.aborted.append)
        super().__init__(SimpleNamespace(rank=1, size=3, intra_rank=1, mpi_comm=mpi_comm))


@pytest.mark.parametrize(
    ("error", "statuses", "words"),
    [
        (InputError("Nothing there."), [2], "rank 1 of 3 failed, ending all: error: Nothing there.\n"),
        (ZeroDivisionError("by 0"), [1], "rank 1 of 3 failed, ending all: Traceback"),
        (SharedInputError("Said by all."), [], ""),
    ],
)
def test_an_error_on_one_rank_ends_all_unless_they_all_have_it(capsys, error, statuses, words):
    ranks = RecordedRanks()
    with pytest.raises(type(error)), ranks.ending_together():
        raise error
    assert ranks.aborted == statuses
    assert words in capsys.readouterr().err


def test_alone_an_error_is_just_raised(capsys):
    with pytest.raises(ZeroDivisionError), Alone().ending_together():
        raise ZeroDivisionError
    assert capsys.readouterr().err == ""


def test_communicators_are_chosen_by_what_the_machine_has(monkeypatch):
    for there in (True, False):
        nccl = SimpleNamespace(available=there)
        monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
        monkeypatch.setitem(sys.modules, "cupy.cuda", SimpleNamespace(nccl=nccl))
        assert choose_communicator("auto", on_gpu=False) == "naive"
        assert choose_communicator("auto", on_gpu=True) == ("pure_nccl" if there else "flat")
        for name in ("naive", "flat"):
            assert choose_communicator(name, on_gpu=True) == name
    with pytest.raises(InputError, match="pure_nccl needs a CuPy with NCCL: use --communicator flat"):
        choose_communicator("pure_nccl", on_gpu=True)
    for name in ("flat", "pure_nccl"):
        with pytest.raises(InputError, match=f"{name} needs a GPU and CuPy: use --communicator naive"):
            choose_communicator(name, on_gpu=False)


def test_a_launcher_without_its_mpi_is_one_sentence(digits, tmp_path):
    result = run_script("train_multi.py", *arguments(digits, tmp_path / "run"), OMPI_COMM_WORLD_SIZE="2")
    assert result.returncode == 2
    assert "The launcher started 2 processes but MPI sees 1" in result.stderr
    assert "Traceback" not in result.stderr


def test_without_mpi4py_a_launcher_is_one_sentence(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setitem(sys.modules, "chainermn", None)
    with pytest.raises(InputError, match="An MPI launcher started 2 processes but MPI can't be used"):
        start_ranks()


def test_one_process_needs_no_mpi(digits, tmp_path):
    """With MPI's Python package made unimportable, training still works."""
    (tmp_path / "mpi4py.py").write_text("raise ImportError('no MPI here')")
    paths = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    out = tmp_path / "run"
    result = run_script(
        "train_multi.py", *arguments(digits, out, "--iteration", 1, "--dtype", "mixed16"), PYTHONPATH=paths
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("prefix", ["PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD"])
def test_launchers_are_known_by_their_variables(monkeypatch, prefix):
    for name in ("PMI_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launched_size() is None
    assert launched_rank() == 0
    monkeypatch.setenv(f"{prefix}_SIZE", "4")
    monkeypatch.setenv(f"{prefix}_RANK", "3")
    assert launched_size() == 4
    assert launched_rank() == 3


def wait_for(condition, job: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert job.poll() is None, job.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def process_of_rank(rank: int, words: str) -> int:
    """The process of a rank of the job that has these words on its command line."""
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().decode().replace("\0", " ")
            variables = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, UnicodeDecodeError):
            continue
        if "train_multi.py" in command and words in command and f"PMI_RANK={rank}".encode() in variables:
            return int(entry.name)
    raise AssertionError(f"rank {rank} is not there")
