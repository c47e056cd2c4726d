"""Checkpoints that a run can resume, and those that it can not."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from runs import assert_one_sentence, assert_same_weights, read, status_of, train

import train_multi


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--seed", "1"), "--seed 0 and this is 1"),
        (("--dtype", "float16"), "--dtype float32 and this is float16"),
        (("--batchsize", "4"), "--batchsize 2 and this is 4"),
    ],
)
def test_a_checkpoint_of_another_run_is_one_sentence(digits, finished, capsys, change, words):
    assert (
        status_of(digits, finished, "--iteration", 3, "--dtype", "float32", "--resume", "auto", *change) == 2
    )
    assert_one_sentence(capsys, words)


def test_a_checkpoint_of_another_model_is_one_sentence(devkit, finished, tmp_path, capsys):
    arguments = [
        "--model",
        "ssd300",
        "--dataset",
        "voc",
        "--dataset-dir",
        str(devkit),
        "--pretrained",
        "none",
    ]
    status = train_multi.main([*arguments, "--resume", str(finished), "--out", str(tmp_path / "other")])
    assert status == 2
    assert_one_sentence(capsys, "--model small and this is ssd300")


@pytest.fixture
def finished(digits, tmp_path):
    """A run of two iterations in float32, with a checkpoint after each."""
    out = tmp_path / "finished"
    train(digits, out, "--iteration", 2, "--dtype", "float32", "--checkpoint-interval", 1)
    return out


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copied")


@pytest.mark.parametrize("name", ["rank-0.npz", "checkpoint.json"])
def test_a_torn_checkpoint_is_passed_over_with_a_warning(digits, copied, finished, name):
    newest = copied / "checkpoints" / "iteration-00000002"
    content = (newest / name).read_bytes()
    (newest / name).write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="iteration-00000002 is incomplete or damaged and is passed over"):
        status = train(
            digits,
            copied,
            "--iteration",
            2,
            "--dtype",
            "float32",
            "--checkpoint-interval",
            1,
            "--resume",
            "auto",
        )
    assert status == 0
    assert_same_weights(copied, finished)


def test_a_half_written_checkpoint_is_not_seen(digits, copied):
    folder = copied / "checkpoints"
    (folder / "iteration-00000002").rename(folder / ".iteration-00000002.partial")
    arguments = ("--iteration", 2, "--dtype", "float32", "--checkpoint-interval", 1, "--resume", "auto")
    assert train(digits, copied, *arguments) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["iteration-00000001", "iteration-00000002"]


def test_only_the_newest_checkpoints_are_kept(digits, tmp_path):
    out = tmp_path / "run"
    train(digits, out, "--iteration", 3, "--dtype", "float32", "--checkpoint-interval", 1)
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == ["iteration-00000002", "iteration-00000003"]


@pytest.mark.parametrize("whole", [False, True], ids=["auto", "path"])
def test_scales_of_another_version_are_one_sentence(digits, tmp_path, capsys, whole):
    out = tmp_path / "run"
    train(digits, out, "--iteration", 1)
    checkpoint = out / "checkpoints" / "iteration-00000001"
    forget_entry_of_scales(checkpoint)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert status_of(digits, out, "--iteration", 2, "--resume", checkpoint if whole else "auto") == 2
    assert_one_sentence(
        capsys,
        f"{checkpoint} can't be loaded: The scales in this snapshot are of another version of ada_loss",
    )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["updater/iteration", "updater/model:main/model/multibox/conf/0/b"])
def test_a_checkpoint_that_lacks_an_array_is_one_sentence(digits, copied, capsys, name):
    checkpoint = copied / "checkpoints" / "iteration-00000002"
    rewrite(checkpoint, lambda arrays: arrays.pop(name))
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    capsys.readouterr()
    arguments = ("--iteration", 3, "--dtype", "float32", "--checkpoint-interval", 1, "--resume", "auto")
    assert status_of(digits, copied, *arguments) == 2
    assert_one_sentence(
        capsys, f"{checkpoint} can't be loaded, since it lacks {name} and so is of another version"
    )
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def forget_entry_of_scales(checkpoint: Path) -> None:
    def forget(arrays: dict[str, np.ndarray]) -> None:
        (name,) = (name for name in arrays if name.endswith("ada_loss/state"))
        scales = json.loads(arrays[name].tobytes())
        del scales["entry"]
        arrays[name] = np.frombuffer(json.dumps(scales).encode(), np.uint8)

    rewrite(checkpoint, forget)


def rewrite(checkpoint: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """A checkpoint of another version, whole as its digests say."""
    with np.load(checkpoint / "rank-0.npz") as file:
        arrays = dict(file)
    change(arrays)
    np.savez(checkpoint / "rank-0.npz", **arrays)
    manifest = read(checkpoint / "checkpoint.json")
    manifest["digests"] = [hashlib.sha256((checkpoint / "rank-0.npz").read_bytes()).hexdigest()]
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest))
