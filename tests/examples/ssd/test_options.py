"""Options: what is wrong, what has no effect, what the paper's flags became."""

from __future__ import annotations

import re

import pytest
from runs import assert_one_sentence, status_of, train

import evaluate
import predict
from arguments import parse_settings
from cautions import cautions
from errors import as_input_error
from options import FORMER, training_parser


def cautions_of(*argv: str) -> list[str]:
    return list(cautions(parse_settings(argv), training_parser().given(argv)))


WITHOUT_EFFECT = [
    (("--dtype", "float32", "--init-scale", "128"), ["--init-scale"]),
    (("--dtype", "float32", "--dynamic-interval", "10"), ["--dynamic-interval"]),
    (("--dtype", "float32", "--loss-scale-method", "auto"), ["--loss-scale-method"]),
    (("--dtype", "float32", "--timing", "delayed", "--n-uf", "0.01"), ["--timing", "--n-uf"]),
    (("--dtype", "float32", "--loss-multiplier", "2**-4"), ["--loss-multiplier"]),
    (("--loss-scale-method", "fixed", "--scale-upper-bound", "8"), ["--scale-upper-bound"]),
    (("--loss-scale-method", "fixed", "--update-per-n-iteration", "10"), ["--update-per-n-iteration"]),
    (("--loss-scale-method", "fixed", "--timing", "current"), ["--timing"]),
    (
        ("--scale-upper-bound", "8", "--accum-upper-bound", "none"),
        ["--scale-upper-bound", "--accum-upper-bound"],
    ),
    (("--loss-scale-method", "auto", "--n-uf", "0.01"), ["--n-uf"]),
    (("--iteration", "10", "--step", "5", "10", "20"), ["--step 10 20"]),
    (("--iteration", "10", "--warm-up", "11"), ["--warm-up 11"]),
    (("--model-dir", "weights"), ["--model-dir"]),
    (("--communicator", "naive"), ["--communicator"]),
]


@pytest.mark.parametrize(
    ("argv", "named"), WITHOUT_EFFECT, ids=[" ".join(argv) for argv, _ in WITHOUT_EFFECT]
)
def test_options_without_effect_are_named(argv, named):
    found = cautions_of(*argv)
    assert len(found) == len(named)
    for sentence, words in zip(sorted(found), sorted(named), strict=True):
        assert sentence.startswith(f"{words} ")
        assert sentence.endswith(".")


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("--dtype", "float32"),
        ("--dtype", "float32", "--iteration", "10"),
        ("--loss-scale-method", "fixed", "--init-scale", "128", "--dynamic-interval", "10"),
        ("--loss-scale-method", "approx_range", "--scale-upper-bound", "none", "--n-uf", "0.01"),
        (
            "--loss-scale-method",
            "auto",
            "--init-scale",
            "8",
            "--timing",
            "delayed",
            "--dynamic-interval",
            "9",
        ),
        ("--iteration", "10", "--step", "9", "--warm-up", "10"),
        ("--iteration", "10", "--step"),
        ("--iteration", "2"),
        ("--model", "ssd512", "--model-dir", "weights"),
    ],
)
def test_options_with_an_effect_are_not(argv):
    assert cautions_of(*argv) == []


def test_behind_mpiexec_the_communicator_has_an_effect(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    assert cautions_of("--communicator", "naive") == []


def test_what_is_named_is_printed_once_and_training_goes_on(digits, tmp_path, capsys):
    arguments = ("--dtype", "float32", "--init-scale", "128", "--iteration", 1, "--batchsize", 14)
    assert train(digits, tmp_path / "run", *arguments) == 0
    assert capsys.readouterr().err.splitlines() == [
        "warning: --batchsize 14 is more than the 12 training images: a batch holds some of them several "
        "times.",
        "warning: --init-scale has no effect with --dtype float32, which trains without loss scaling.",
    ]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--init-scale", "much"], "argument --init-scale: 'much' is not a number"),
        (["--init-scale", "2**x"], "argument --init-scale: '2**x' is not a number"),
        (["--scale-upper-bound", "much"], "argument --scale-upper-bound: 'much' is not a number or none"),
        (["--n-uf", "little"], "argument --n-uf: 'little' is not a number"),
        (["--dynamic-interval", "1.5"], "argument --dynamic-interval: '1.5' is not a whole number"),
        (["--update-per-n-iteration", "x"], "argument --update-per-n-iteration: 'x' is not a whole number"),
        (["--lr", "fast"], "argument --lr: 'fast' is not a positive number"),
        (["--step", "5", "x"], "argument --step: 'x' is not a whole number of at least 1"),
        (["--device", "-1"], "argument --device: '-1' is not auto, cpu, gpu or the number of a GPU"),
        (["--device", "cuda:0"], "argument --device: 'cuda:0' is not auto, cpu, gpu or the number of a GPU"),
        (["--variances", "0.1"], "argument --variances: expected 2 arguments"),
        (["--variances", "0.1", "0"], "argument --variances: '0' is not a positive number"),
        (["--match-threshold", "2"], "argument --match-threshold: '2' is not a number from 0 to 1"),
        (["--top-k", "0"], "argument --top-k: '0' is not a whole number of at least 1"),
        (["--test-batchsize", "0"], "argument --test-batchsize: '0' is not a whole number of at least 1"),
    ],
)
def test_errors_of_types_speak_of_the_option(digits, tmp_path, capsys, argv, words):
    assert status_of(digits, tmp_path / "run", *argv) == 2
    printed = capsys.readouterr().err
    assert printed == f"error: {words}; see --help.\n"


def test_no_type_shows_the_name_of_a_function(capsys):
    parser = training_parser()
    for action in parser._actions:
        if action.type is not None and action.option_strings and action.dest not in PATHS:
            values = ["a mistake"] * (action.nargs if isinstance(action.nargs, int) else 1)
            with pytest.raises(SystemExit):
                parser.parse_args([action.option_strings[0], *values])
            assert re.fullmatch(
                rf"error: argument {action.option_strings[0]}: 'a mistake' is not [^_]+; see --help\.\n",
                capsys.readouterr().err,
            )


PATHS = ("dataset_dir", "model_dir", "out")


@pytest.mark.parametrize("form", ["{0}", "{0}=8", "--no{1}"])
@pytest.mark.parametrize("name", FORMER)
def test_flags_of_the_paper_are_answered_by_what_to_write(digits, tmp_path, capsys, name, form):
    flag = form.format(name, name.removeprefix("--"))
    assert status_of(digits, tmp_path / "run", flag) == 2
    assert_one_sentence(
        capsys, f"{flag.split('=')[0]} is a flag of the paper's code: {FORMER[name]}; see --help."
    )


def test_flags_of_the_paper_that_are_still_there_work(digits, tmp_path):
    for flag in (
        "--nosanity-check",
        "--nouse-fp32-update",
        "--np",
        "--profiling",
        "--snapshot-per-n-iteration",
    ):
        assert any(flag in (name, name.replace("--", "--no", 1)) for name in FORMER), flag
    assert parse_settings(["--test-batchsize", "5"]).test_batchsize == 5


def test_a_run_does_not_resume_behind_its_end(digits, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ("--dtype", "float32", "--checkpoint-interval", 1, "--resume", "auto", "--iteration")
    assert train(digits, out, *arguments, 3) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train(digits, out, *arguments, 2) == 2
    assert_one_sentence(capsys, f"The checkpoint in {out} is of a run that is 3 iterations long already")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_gpu_that_is_not_there_is_one_sentence(digits, tmp_path, capsys):
    for name in ("gpu", "0", "7"):
        assert status_of(digits, tmp_path / "run", "--device", name) == 2
        assert_one_sentence(capsys, f"--device {name} needs a GPU and CuPy")


@pytest.mark.parametrize("script", [evaluate, predict])
def test_other_scripts_speak_of_the_option_as_well(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["model.npz", "image.jpg", "--top-k", "many"][: 4 if script is predict else None])
    assert end.value.code == 2
    assert "argument --top-k: 'many' is not a whole number of at least 1" in capsys.readouterr().err


LONG = "a" * 300


@pytest.mark.parametrize("option", ["--dataset-dir", "--out", "--pretrained", "--resume"])
@pytest.mark.parametrize("place", [LONG, f"/dev/null/{LONG}", "/proc/nothing/here"])
def test_places_that_the_system_refuses_are_one_sentence(digits, tmp_path, capsys, option, place):
    assert status_of(digits, tmp_path / "run", option, place) == 2
    assert_one_sentence(capsys, place)


def test_a_model_folder_that_the_system_refuses_is_one_sentence(devkit, tmp_path, capsys):
    arguments = ("--model", "ssd300", "--model-dir", LONG, "--dataset-dir", devkit)
    assert status_of(devkit, tmp_path / "run", *arguments) == 2
    assert_one_sentence(capsys, LONG)


def test_a_full_disk_is_one_sentence(digits, tmp_path, capsys, monkeypatch):
    def full(file) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("files.flush_to_disk", full)
    assert train(digits, tmp_path / "run", "--iteration", 1, "--dtype", "float32") == 2
    assert_one_sentence(capsys, "A file can't be read or written (No space left on device)")


def test_other_errors_of_the_system_are_not_hidden():
    assert as_input_error(OSError(5, "Input/output error")) is None
    assert as_input_error(ValueError("a mistake")) is None
    assert str(as_input_error(OSError(13, "Permission denied", "a.txt"))).startswith("a.txt can't be read or")


@pytest.mark.parametrize("script", [evaluate, predict])
def test_other_scripts_refuse_such_places_as_well(script, capsys, tmp_path):
    assert script.main([LONG, LONG][: 2 if script is predict else 1]) == 2
    assert_one_sentence(capsys, LONG)
