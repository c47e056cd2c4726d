"""train_multi.py from the command line to result.json, in this process."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest
from chainer.serializers import save_npz
from PIL import Image
from runs import (
    assert_one_sentence,
    assert_same_end,
    assert_same_weights,
    read,
    rows_without_times,
    status_of,
    train,
    weights,
)

import evaluate
import train_multi
from models import build_model

METHODS = {
    "float32": ["--dtype", "float32"],
    "no loss scale": ["--loss-scale-method", "fixed", "--init-scale", "1"],
    "fixed 128": ["--loss-scale-method", "fixed", "--init-scale", "128"],
    "dynamic, interval 10": ["--loss-scale-method", "fixed", "--dynamic-interval", "10"],
    "approx_range": ["--loss-scale-method", "approx_range"],
    "approx_range, chosen every 10 iterations": [
        *("--loss-scale-method", "approx_range", "--update-per-n-iteration", "10")
    ],
    "approx_range, delayed": ["--loss-scale-method", "approx_range", "--timing", "delayed"],
    "auto, delayed": ["--timing", "delayed"],
    "abs_range": ["--loss-scale-method", "abs_range"],
    "element_wise_range": ["--loss-scale-method", "element_wise_range"],
    "auto": ["--loss-scale-method", "auto"],
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_a_result(digits, tmp_path, capsys, method):
    assert train(digits, tmp_path / "run", "--iteration", 2, "--seed", 5, *METHODS[method]) == 0
    result = read(tmp_path / "run" / "result.json")
    assert result["method"] == method
    assert result["outcome"] == "finished"
    assert result["iterations"] == 2
    assert result["seed"] == 5
    assert result["skipped_steps"] == 0
    assert 0 <= result["map"] <= 1
    assert result["seconds"] > 0
    assert result["settings"]["model"] == "small"
    assert result["kernels"] == "numpy"
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert f"mAP {result['map']:.4f}" in last_line
    assert method in last_line
    expected = np.float32 if method == "float32" else np.float16
    assert all(array.dtype == expected for array in weights(tmp_path / "run").values())


def test_mixed_precision_learns_what_float32_learns(digits, tmp_path):
    losses = {}
    for method in ("float32", "fixed 128", "approx_range", "auto"):
        out = tmp_path / method
        assert train(digits, out, "--iteration", 4, *METHODS[method]) == 0
        losses[method] = [row["main/loss"] for row in read(out / "log.json")]
    assert losses["float32"][-1] < losses["float32"][0]
    for method, values in losses.items():
        np.testing.assert_allclose(values, losses["float32"], rtol=0.02, err_msg=method)


def test_the_logs_agree_and_report_map_at_steps_and_at_the_end(digits, tmp_path):
    out = tmp_path / "run"
    assert train(digits, out, "--iteration", 4, "--step", 2, "--dtype", "float32") == 0
    rows = read(out / "log.json")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    assert [row["iteration"] for row in rows if "map" in row] == [2, 4]
    assert read(out / "result.json")["map"] == rows[-1]["map"]
    np.testing.assert_allclose([row["lr"] for row in rows], [6e-3, 6e-3, 6e-4, 6e-4])
    with open(out / "log.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["main/loss"] for row in table] == [str(row["main/loss"]) for row in rows]
    assert [row["map"] for row in table] == [str(row.get("map", "")) for row in rows]


def test_evaluations_come_as_often_as_asked_for(digits, tmp_path):
    out = tmp_path / "run"
    arguments = ("--iteration", 5, "--step", 3, "--evaluation-interval", 2, "--dtype", "float32")
    assert train(digits, out, *arguments) == 0
    assert ["map" in row for row in read(out / "log.json")] == [False, True, True, True, True]


def test_an_evaluation_between_rows_gets_a_row_of_its_own(digits, tmp_path, capsys):
    out = tmp_path / "run"
    more = (
        "--iteration",
        5,
        "--step",
        3,
        "--warm-up",
        5,
        "--log-interval",
        4,
        "--lr",
        "0.01",
        "--kernels",
        "auto",
    )
    assert train(digits, out, *more) == 0
    rows = read(out / "log.json")
    assert [row["iteration"] for row in rows] == [3, 4, 5]
    assert ["map" in row for row in rows] == [True, False, True]
    # Not means over the iterations since the last row.
    np.testing.assert_allclose([row["lr"] for row in rows], [0.0046, 0.00064, 0.00082])
    capsys.readouterr()
    assert evaluate.main([str(out / "model.npz"), "--dataset-dir", str(digits)]) == 0
    assert f"mAP  {read(out / 'result.json')['map']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("multiplier", ["2**-18", "2**6"])
def test_in_float32_the_loss_multiplier_changes_nothing(digits, tmp_path, multiplier):
    arguments = ("--iteration", 2, "--dtype", "float32")
    train(digits, tmp_path / "plain", *arguments)
    train(digits, tmp_path / "multiplied", *arguments, "--loss-multiplier", multiplier)
    assert_same_weights(tmp_path / "plain", tmp_path / "multiplied")
    assert rows_without_times(tmp_path / "plain") == rows_without_times(tmp_path / "multiplied")


def test_a_tiny_loss_underflows_without_a_scale_and_not_with_one(digits, tmp_path):
    moved = {}
    start = tmp_path / "start.npz"
    save_npz(start, build_model("small", 10, "lecun-uniform", seed=0))
    for name in ("float32", "no loss scale", "approx_range"):
        out = tmp_path / name
        train(
            digits,
            out,
            "--iteration",
            1,
            "--loss-multiplier",
            "2**-22",
            "--pretrained",
            start,
            *METHODS[name],
        )
        before, after = np.load(start), weights(out)
        name_of_first = "extractor/conv1/W"
        moved[name] = np.abs(after[name_of_first].astype(np.float32) - before[name_of_first]).mean()
    # What is left without a scale is weight decay and rounding.
    assert moved["approx_range"] == pytest.approx(moved["float32"], rel=0.1)
    assert moved["no loss scale"] < 0.2 * moved["float32"]


def test_a_diverged_run_ends_with_a_message_and_a_result(digits, tmp_path, capsys):
    arguments = ("--iteration", 50, "--dtype", "float32", "--lr", "1e30")
    assert train(digits, tmp_path / "run", *arguments) == 3
    result = read(tmp_path / "run" / "result.json")
    assert result["outcome"] == "diverged"
    assert result["map"] is None
    assert result["iterations"] < 50
    printed = capsys.readouterr()
    assert "Training diverged" in printed.out
    assert "diverged after" in printed.out.splitlines()[-1]
    assert "Traceback" not in printed.out + printed.err
    assert "model.npz holds the last good weights, those after 0 iterations." in printed.out
    start = {path.lstrip("/"): p for path, p in build_model("small", 10, "lecun-uniform", 0).namedparams()}
    kept = weights(tmp_path / "run")
    assert kept.keys() == start.keys()
    for name, array in kept.items():
        np.testing.assert_array_equal(array, start[name].array)


def test_mixed_precision_that_keeps_overflowing_is_diverged(digits, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(digits, out, "--iteration", 200, "--lr", "1e30", *METHODS["fixed 128"]) == 3
    result = read(out / "result.json")
    assert result["outcome"] == "diverged"
    assert result["skipped_steps"] > 0
    assert "Training diverged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ("--loss-scale-method", "fixed", "--init-scale", "4096", "--dynamic-interval", "2"),
        ("--loss-scale-method", "approx_range", "--update-per-n-iteration", "3"),
        ("--loss-scale-method", "auto", "--timing", "delayed", "--update-per-n-iteration", "2"),
        ("--dtype", "float32"),
    ],
    ids=["dynamic", "adaptive", "delayed", "float32"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(digits, tmp_path, arguments):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    # The log's interval is not the checkpoint's: sums between rows have to be saved as well.
    arguments = (*arguments, "--iteration", 6, "--step", 4, "--log-interval", 2, "--checkpoint-interval", 3)
    assert train(digits, whole, *arguments) == 0
    checkpoint = whole / "checkpoints" / "iteration-00000003"
    assert train(digits, resumed, *arguments, "--resume", checkpoint) == 0
    assert_same_end(whole, resumed)
    theirs, ours = (read(out / "result.json") for out in (whole, resumed))
    for name in ("map", "average_precision", "skipped_steps", "final_scale"):
        assert ours[name] == theirs[name]


def test_resuming_a_finished_run_changes_nothing(digits, tmp_path):
    out = tmp_path / "run"
    arguments = ("--iteration", 2, "--dtype", "float32")
    train(digits, out, *arguments)
    before = weights(out), rows_without_times(out), read(out / "result.json")["map"]
    assert train(digits, out, *arguments, "--resume", "auto") == 0
    after = weights(out), rows_without_times(out), read(out / "result.json")["map"]
    assert before[1:] == after[1:]
    assert all((before[0][name] == after[0][name]).all() for name in before[0])


def test_resume_auto_starts_a_run_that_has_no_checkpoint_yet(digits, tmp_path):
    assert train(digits, tmp_path / "run", "--iteration", 1, "--dtype", "float32", "--resume", "auto") == 0


# What is wrong, and words of the sentence that says so.
BAD = [
    (["--model", "ssd9000"], "ssd9000"),
    (["--loss-scale-method", "magic"], "magic"),
    (["--init-scale", "-1"], "--init-scale must be a positive power of two"),
    (["--init-scale", "3"], "--init-scale must be a positive power of two"),
    (["--init-scale", "much"], "much"),
    (["--dynamic-interval", "0"], "--dynamic-interval must be an integer of at least 1"),
    (["--update-per-n-iteration", "0"], "--update-per-n-iteration must be an integer of at least 1"),
    (["--scale-upper-bound", "0.5"], "--scale-upper-bound must be a number of at least 1"),
    (["--accum-upper-bound", "0"], "--accum-upper-bound must be a number of at least 1"),
    (["--n-uf", "0.7"], "--n-uf must be a share between 0 and 0.5"),
    (["--batchsize", "0"], "--batchsize: '0' is not a whole number of at least 1"),
    (["--iteration", "many"], "'many' is not a whole number"),
    (["--lr", "-0.1"], "'-0.1' is not a positive number"),
    (["--lr", "nan"], "'nan' is not a positive number"),
    (["--step", "0"], "'0' is not a whole number of at least 1"),
    (["--seed", "-1"], "'-1' is not a whole number of at least 0"),
    (["--loss-multiplier", "3"], "'3' is not a power of two"),
    (["--loss-multiplier", "2**9999"], "is not a power of two"),
    (["--loss-norm", "image"], "image"),
    (["--pretrained", "imagenet"], "There are no ImageNet weights for --model small"),
    (["--pretrained", "/nowhere/weights.npz"], "The weights /nowhere/weights.npz can't be read"),
    (["--dataset", "voc"], "VOC2012"),
    (["--dataset", "coco"], "coco"),
    (["--resume", "/nowhere"], "no complete checkpoint in /nowhere"),
    (["--communicator", "flat"], "flat needs a GPU and CuPy: use --communicator naive"),
    (["--communicator", "pure_nccl"], "pure_nccl needs a GPU and CuPy"),
    (["--communicator", "smoke"], "smoke"),
    (["--timing", "never"], "never"),
    (["--frobnicate"], "--frobnicate"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_one_sentence(digits, tmp_path, capsys, arguments, words):
    out = tmp_path / "run"
    assert status_of(digits, out, *arguments) == 2
    assert_one_sentence(capsys, words)
    assert not any(out.rglob("*"))


def test_a_missing_voc_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data_voc.get_dataset_root", lambda: str(tmp_path))
    assert train_multi.main(["--dataset", "voc", "--out", str(tmp_path / "run")]) == 2
    assert_one_sentence(capsys, "--dataset digits")


def test_weights_of_another_model_are_one_sentence(digits, tmp_path, capsys):
    other = tmp_path / "other.npz"
    save_npz(other, build_model("small", 20, "lecun-uniform", seed=0))
    assert status_of(digits, tmp_path / "run", "--pretrained", other) == 2
    assert_one_sentence(capsys, "multibox/conf/0/W has shape")


def test_an_earlier_run_is_not_overwritten(digits, tmp_path, capsys):
    out = tmp_path / "run"
    train(digits, out, "--iteration", 1, "--dtype", "float32")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert status_of(digits, out, "--iteration", 2, "--dtype", "float32") == 2
    assert_one_sentence(capsys, "holds an earlier run")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_options_of_the_seeds_reach_training_and_what_it_saves(digits, tmp_path, capsys):
    out = tmp_path / "run"
    options = ("--alpha", 0.5, "--negative-ratio", 5, "--match-threshold", 0.4, "--match-ties")
    options += ("--variances", 0.2, 0.3, "--nms-threshold", 0.5, "--top-k", 100, "--initializer", "normal")
    assert train(digits, out, "--iteration", 2, "--kernels", "auto", *options, "--test-batchsize", 3) == 0
    result = read(out / "result.json")
    assert result["outcome"] == "finished"
    settings = result["settings"]
    assert (settings["alpha"], settings["negative_ratio"], settings["match_ties"]) == (0.5, 5, True)
    assert weights(out)["variances"].tolist() == [0.2, 0.3]
    capsys.readouterr()
    detection = ("--nms-threshold", "0.5", "--top-k", "100")
    assert evaluate.main([str(out / "model.npz"), "--dataset-dir", str(digits), *detection]) == 0
    assert f"mAP  {result['map']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option",
    [
        ("--alpha", 0.5),
        ("--negative-ratio", 1),
        ("--match-threshold", 0.3),
        ("--variances", 0.2, 0.2),
        ("--initializer", "normal"),
    ],
    ids=lambda option: option[0],
)
def test_each_of_them_changes_what_is_learned(digits, tmp_path, option):
    first, second = tmp_path / "usual", tmp_path / "other"
    train(digits, first, "--iteration", 1, "--dtype", "float32")
    train(digits, second, "--iteration", 1, "--dtype", "float32", *option)
    losses = [read(out / "log.json")[0]["main/loss"] for out in (first, second)]
    assert losses[0] != losses[1]


def test_a_run_with_variances_is_resumed(digits, tmp_path):
    arguments = (
        "--dtype",
        "float32",
        "--variances",
        0.2,
        0.2,
        "--checkpoint-interval",
        1,
        "--resume",
        "auto",
    )
    for iterations in (1, 2):
        assert train(digits, tmp_path / "run", *arguments, "--iteration", iterations) == 0


def test_photographs_that_a_camera_turned_are_learned_and_evaluated_as_they_were_seen(
    digits, tmp_path, capsys
):
    """Images, and the same images as cameras store them that are held in any way."""
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    turned = shutil.copytree(digits, tmp_path / "turned")
    seen = shutil.copytree(digits, tmp_path / "seen")
    for i, name in enumerate(sorted(path.name for path in (digits / "VOC2007" / "JPEGImages").iterdir())):
        image = Image.open(digits / "VOC2007" / "JPEGImages" / name)
        # Without loss, or turned pixels would be others.
        image.save(seen / "VOC2007" / "JPEGImages" / name, "png")
        exif = Image.Exif()
        exif[0x112] = orientation = 2 + i % 7
        stored = image.transpose(Image.Transpose(turns[orientation]))
        stored.save(turned / "VOC2007" / "JPEGImages" / name, "png", exif=exif)
    for folder in (seen, turned):
        assert train(folder, tmp_path / "runs" / folder.name, "--iteration", 2, "--dtype", "float32") == 0
    assert_same_end(tmp_path / "runs" / "seen", tmp_path / "runs" / "turned")
