"""results/nature: problems are what their page says, float16 fails there, the page follows from the runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import chainer
import numpy as np
import pytest

NATURE = Path(__file__).resolve().parents[2] / "results" / "nature"
sys.path.insert(0, str(NATURE))

import make_nature  # noqa: E402
from methods import (  # noqa: E402
    AUTO,
    DYNAMIC,
    FLOAT32,
    PAPER,
    Adaptive,
    Plain,
    all_methods,
    fixed,
    some_methods,
    train,
)
from nature_page import finding, page, ratio  # noqa: E402
from regressions import BEAM, beams  # noqa: E402

TRAININGS = (*make_nature.SEPARATED, *make_nature.OTHERS)
by_name = pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.name)


@by_name
def test_a_problem_follows_from_its_seed_and_can_be_trained(training):
    errors = []
    for _ in range(2):
        np.random.seed(3)
        problem = training.draw(3)
        scaler = Plain(problem.models, training.optimizers(), 1.0)
        assert all(scaler.step(number, loss) for number, loss in problem.steps(0))
        with chainer.using_config("train", False):
            errors.append(problem.error())
    assert errors[0] == errors[1] and np.isfinite(errors[0])


def test_states_of_beams_are_those_of_the_handbook():
    inputs, states = beams(0, 400)
    length = 4 + 2 * inputs[:, 1]
    load, x = 5.5e3 + 4.5e3 * inputs[:, 2], (inputs[:, 0] + 1) / 2 * length
    stiffness = 6.3e6 * np.exp(inputs[:, 3])
    deflection, rotation, moment, shear = states.T
    np.testing.assert_allclose(moment, load * x * (length - x) / 2)
    np.testing.assert_allclose(shear, load * (length - 2 * x) / 2, atol=1e-6)
    largest = 5 * load * length**4 / (384 * stiffness)
    assert (deflection >= 0).all() and (deflection <= largest * (1 + 1e-9)).all()
    assert (np.sign(rotation) == np.sign(shear)).all()


@pytest.mark.parametrize("method", [FLOAT32, AUTO, PAPER, DYNAMIC, fixed(4)], ids=lambda method: method.name)
def test_a_run_says_what_it_did(method):
    run = train(replace(BEAM, iterations=10), method, seed=0)
    assert run["method"] == method.name and run["outcome"] == "finished"
    assert [iteration for iteration, _ in run["curve"]] == list(range(1, 11))
    assert run["error"] == run["curve"][-1][1]


def test_no_fixed_scale_holds_the_gradients_of_all_heads_of_the_beam():
    few = replace(BEAM, iterations=10)
    # What is small enough for moment and shear force is nothing of deflection and rotation.
    assert train(few, fixed(-8), seed=0)["skipped"] == 10
    low = train(few, fixed(-12), seed=0)
    assert low["skipped"] == 0
    with chainer.using_config("dtype", chainer.mixed16):
        np.random.seed(0)
        problem = BEAM.draw(0)
        Plain(problem.models, BEAM.optimizers(), 2.0**-12).step(*next(problem.steps(0)))
        lost = [not head.W.grad.any() for head in problem.models[0].heads]
        assert lost == [True, True, False, False]

        np.random.seed(0)
        problem = BEAM.draw(0)
        Adaptive(problem.models, BEAM.optimizers()).step(*next(problem.steps(0)))
        assert all(head.W.grad.any() for head in problem.models[0].heads)
    assert train(few, AUTO, seed=0)["skipped"] == 0


def made_up(errors: dict[str, float | None]) -> list[dict]:
    return [
        {
            "training": BEAM.name,
            "method": name,
            "seed": seed,
            "error": error,
            "skipped": 0,
            "curve": [(1, error)],
        }
        for name, error in errors.items()
        for seed in (0, 1)
    ]


def test_findings_follow_from_the_errors():
    runs = made_up({"float32": 0.1, "auto": 0.1, "dynamic": None, "fixed 2^0": 0.2, "fixed 2^-8": 0.15})
    assert ratio(runs, BEAM, fixed(0)) == pytest.approx(2) and ratio(runs, BEAM, DYNAMIC) is None
    text = finding(runs=runs, training=BEAM)
    assert "No fixed scale of those tried" in text and "the best, 2^-8, has 1.50 times" in text
    assert "with `auto` 1.00 times" in text
    text = finding(BEAM, made_up({"float32": 0.1, "auto": 0.1, "fixed 2^0": 0.102, "fixed 2^4": 0.101}))
    assert "those from 2^0 to 2^4 are as good" in text


def test_the_committed_runs_are_those_that_the_command_makes():
    runs = make_nature.read_runs(make_nature.RUNS)
    ran = sorted((run["training"], run["method"], run["seed"]) for run in runs)
    methods = {training: all_methods(training) for training in make_nature.SEPARATED}
    methods |= {training: some_methods(training) for training in make_nature.OTHERS}
    assert ran == sorted(
        (training.name, method.name, seed)
        for training, by in methods.items()
        for method in by
        for seed in make_nature.SEEDS
    )
    lengths = {training.name: training.iterations for training in TRAININGS}
    assert all(run["curve"][-1][0] == lengths[run["training"]] for run in runs)


def test_the_committed_page_follows_from_the_committed_runs():
    runs = make_nature.read_runs(make_nature.RUNS)
    assert make_nature.PAGE.read_text(encoding="utf-8") == page(
        make_nature.SEPARATED, make_nature.OTHERS, runs
    )
