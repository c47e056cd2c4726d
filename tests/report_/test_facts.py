"""Facts of a run are what its own arrays say, recomputed here in other ways."""

import json

import numpy as np
import pytest

from ada_loss.core.record_file import RecordError
from ada_loss.core.records import INPUT_GRADIENT, WEIGHT_GRADIENT
from ada_loss.core.windows import Window
from ada_loss.report.facts import best_of, best_single, line_sentence, lines, load
from report_.training import Backward, Task, train


def by_name(runs):
    return {run.name: run for run in runs}


def test_losses_of_a_run_are_those_that_its_float16_really_had(tmp_path, monkeypatch):
    """Every array that was rounded is looked at again, next to float32's."""
    seen = {}
    keep = Backward.keep

    def watched(self, place, true, kept, carried):
        found = keep(self, place, true, kept, carried)
        if self.recorder.sampling:
            gone, present = seen.get(place, (0, 0))
            seen[place] = gone + np.sum((found[0] == 0) & (true != 0)), present + np.sum(true != 0)
        return found

    monkeypatch.setattr(Backward, "keep", watched)
    (run,) = load([train(tmp_path, "fixed", Task(batch=16, width=12), steps=10, every=3)])
    assert len(seen) == len(run.gradients)
    for summary in run.gradients:
        gone, present = seen[summary.place]
        assert summary.lost == gone / present
    assert any(summary.lost for summary in run.gradients)


def test_layers_hold_their_parameters_and_stand_in_their_order(runs):
    for run in runs:
        assert [layer.path for layer in run.layers][:2] == ["/body/block1", "/body/block2"]
        assert all(len(layer.places) == 3 for layer in run.layers)


def test_a_layer_s_window_suits_each_of_its_places(runs):
    layer = runs[0].layers[-1]
    for exponent in range(-40, 60):
        assert (exponent in layer.window) == all(exponent in place.window for place in layer.places)
    assert layer.needs.window.lowest == layer.window.lowest
    assert layer.bears.window.highest == layer.window.highest


def test_only_a_run_that_is_adaptive_loses_nothing_of_two_tasks(runs):
    named = by_name(runs)
    most = {name: max(layer.lost for layer in run.layers) for name, run in named.items()}
    assert most["auto"] < 1e-3 < most["dynamic"]
    assert most["none"] == 1 and most["fixed 128"] > 0.9


def test_the_best_run_is_the_one_that_lost_least(runs):
    assert best_of(runs).name == "auto"


def test_a_dynamic_scale_settles_where_its_second_half_was(runs):
    named = by_name(runs)
    dynamic = named["dynamic"]
    exponents = sorted(step.exponent for step in dynamic.run.steps[len(dynamic.run.steps) // 2 :])
    assert dynamic.settled in exponents
    assert exponents[0] <= dynamic.settled <= exponents[-1]
    assert named["none"].settled is None and named["auto"].settled is None


def test_lines_are_the_usual_scales_and_where_dynamic_ones_settled_or_would(runs):
    named = by_name(runs)
    assert [(line.exponent, line.kind) for line in lines(named["auto"], runs)] == [
        (0, "none"),
        (7, "fixed"),
        (named["dynamic"].settled, "dynamic"),
    ]
    alone = lines(named["auto"], [named["auto"]])[-1]
    assert (alone.kind, alone.exponent) == ("predicted", named["auto"].window.highest)
    assert "would climb to" in line_sentence(named["auto"], alone)


def test_the_best_single_scale_fails_the_fewest_layers(runs):
    best, missed = best_single(runs[0])
    windows = [layer.window for layer in runs[0].layers]
    assert missed == sum(best not in window for window in windows)
    assert missed == min(sum(k not in window for window in windows) for k in range(-60, 90))


def test_the_summary_has_five_lines_and_names_the_worst(runs):
    summary = by_name(runs)["fixed 128"].summary()
    assert len(summary) == 5
    assert "/aux" in summary[0] and "/aux" in summary[1]


def test_runs_of_one_name_are_told_apart(trained):
    names = [run.name for run in load([trained["auto"], trained["auto"], trained["none"]])]
    assert len(set(names)) == 3 and names[2] == "none"


def test_a_broken_run_tells_what_it_knows(broken):
    (run,) = load([broken])
    assert (
        run.sentence.startswith("The forward pass overflows, first in /body/block")
        and "step 20" in run.sentence
    )
    assert "no end recorded" in run.outcome
    assert run.skipped > 0 and run.skips[0].step == 20


def test_a_run_of_nothing_but_a_header_has_facts_too(tmp_path):
    (run,) = load([train(tmp_path, "auto", steps=0)])
    assert run.layers == [] and run.window == Window() and run.settled is None
    assert len(run.summary()) == 5
    assert best_single(run) == (0, 0)


def test_a_run_without_reference_says_that_its_losses_are_unknown(tmp_path, trained):
    path = tmp_path / "records.jsonl"
    lines_ = (trained["none"] / "records.jsonl").read_text().splitlines(keepends=True)

    def without(line):
        fields = json.loads(line)
        return (
            json.dumps(fields | {"reference": None, "lost": None} if fields["record"] == "place" else fields)
            + "\n"
        )

    path.write_text("".join(map(without, lines_)))
    (run,) = load([path])
    assert not run.measured
    assert "unknown" in run.summary()[2]
    assert all(layer.lost is None for layer in run.layers)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RecordError):
        load([tmp_path])


def test_kinds_of_places_are_kept_apart(runs):
    kinds = {summary.place.kind for summary in runs[0].gradients}
    assert {INPUT_GRADIENT, WEIGHT_GRADIENT} < kinds
