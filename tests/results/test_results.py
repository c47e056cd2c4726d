"""results/make_results.py: what it runs, what it keeps, what it writes."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "results"), str(ROOT / "examples" / "ssd"), str(ROOT / "examples" / "common")]

import make_results  # noqa: E402
from duration import in_words, seconds_of  # noqa: E402
from experiments import SCALES, Row, Scale, Table, row  # noqa: E402
from plot import mean_curve, plot, plot_curves  # noqa: E402
from report import (  # noqa: E402
    Difference,
    difference,
    finding,
    precision_text,
    readme_text,
    significant,
    summarize,
    table_text,
)
from scipy.stats import t as student  # noqa: E402

from data_digits import DigitsSettings, find_digits  # noqa: E402

TINY = Scale(
    ("--model", "small", "--dataset", "digits", "--log-interval", "1"),
    (
        Table(
            "tiny",
            "Tiny",
            ("--batchsize", "2", "--iteration", "1"),
            (
                row("float32", "FP32", "fixed", dtype="float32", published="0.7894"),
                row("adaptive", "adaptive", "approx_range"),
            ),
        ),
    ),
)


def result(precision: float | None, outcome: str = "finished", skipped: int = 0, seed: int = 0) -> dict:
    return {
        "map": precision,
        "seed": seed,
        "outcome": outcome,
        "skipped_steps": skipped,
        "seconds": 10.0,
        "iterations": 5,
        "kernels": "numpy",
    }


@pytest.fixture
def table() -> Table:
    return Table("t", "A table", (), (Row("a", "A", (), "0.79"), Row("b", "B", ()), Row("c", "C", ())))


def test_mean_and_spread_are_those_of_the_finished_runs():
    summary = summarize([result(0.6), result(0.8), result(None, "diverged", skipped=6)])
    assert summary.mean == pytest.approx(0.7)
    assert summary.spread == pytest.approx(0.1 * 2**0.5)
    assert summary.skipped == 2
    assert precision_text(summary) == "0.7000 ± 0.1414 (1 of 3 diverged)"


def test_a_row_of_diverged_runs_says_so():
    assert precision_text(summarize([result(None, "diverged")] * 3)) == "diverged"


def test_a_run_that_found_nothing_counts_as_zero():
    assert summarize([result(None), result(0.5)]).mean == 0.25


def test_the_table_holds_ours_beside_the_published_figures(table):
    a, b, _ = table.rows
    lines = table_text(table, {a: [result(0.5), result(0.7)], b: [result(None, "diverged")]}).splitlines()
    assert lines[0].endswith("| published, SSD512 on VOC |")
    assert lines[2] == "| A | 0.6000 ± 0.1414 |  | 2 | 0.0 | 10 | 0.79 |"
    assert lines[3] == "| B | diverged |  | 1 | 0.0 | 10 |  |"
    assert len(lines) == 4


def test_without_published_figures_there_is_no_such_column(table):
    plain = Table("t", "A table", (), table.rows[1:])
    assert "published" not in table_text(plain, {table.rows[1]: [result(0.5)]})


def seeds(*precisions: float | None) -> list[dict]:
    return [
        result(precision, "diverged" if precision is None else "finished", seed=seed)
        for seed, precision in enumerate(precisions)
    ]


@pytest.fixture
def against_float32() -> Table:
    names = ("float32", "same", "worse", "noise", "diverged")
    return Table("t", "A table", (), tuple(Row(name, name.upper(), ()) for name in names))


BASELINE = (0.88, 0.90, 0.86)


def results_against(table: Table) -> dict[Row, list[dict]]:
    runs = (BASELINE, BASELINE, (0.80, 0.821, 0.779), (0.89, 0.87, 0.88), (None, None, None))
    return {row: seeds(*precisions) for row, precisions in zip(table.rows, runs, strict=True)}


def test_differences_are_those_of_the_same_seed():
    gap = difference(seeds(0.5, 0.7, 0.6)[::-1], seeds(0.4, 0.6, 0.5))
    assert gap.mean == pytest.approx(0.1)
    gap = difference(seeds(0.80, 0.821, 0.779), seeds(*BASELINE))
    assert gap.mean == pytest.approx(-0.08)
    # t = mean / (deviation / sqrt(3)), with two degrees of freedom.
    t = -0.08 / (0.001 / 3**0.5)
    assert gap.p == pytest.approx(2 * student(2).cdf(t))


@pytest.mark.parametrize("ours, p", [((0.5, 0.6), 1.0), ((0.7, 0.8), None), ((0.5,), None)])
def test_without_any_spread_nothing_is_tested(ours, p):
    assert difference(seeds(*ours), seeds(0.5, 0.6)).p == p
    assert difference(seeds(0.5), [result(0.5, seed=7)]) is None


def test_many_methods_are_tested_together(against_float32):
    rows = against_float32.rows
    gaps = {row: Difference(0.1, p) for row, p in zip(rows, (0.01, 0.02, 0.04, 0.04, None), strict=True)}
    assert significant(gaps) == {rows[0]}
    assert significant({rows[0]: Difference(0.1, 0.04)}) == {rows[0]}
    assert significant({}) == set()


def test_the_finding_names_the_methods_that_differ(against_float32):
    results = results_against(against_float32)
    baseline = results[against_float32.rows[0]]
    assert finding(against_float32, results, baseline) == (
        "Of 4 methods, WORSE, DIVERGED differ from FP32 (paired t-test over 3 seeds, Holm's correction, 5%)."
    )
    few = {row: runs for row, runs in results.items() if row.name in ("float32", "noise")}
    assert "Of 1 methods, no method differs from FP32" in finding(against_float32, few, baseline)
    assert "| -0.0800 (p = 0.00) |" in table_text(against_float32, results, baseline)


def test_without_a_baseline_of_several_seeds_nothing_is_found(against_float32):
    results = results_against(against_float32)
    assert finding(against_float32, results, ()) == ""
    assert finding(against_float32, results, seeds(0.9)) == ""


def test_a_table_without_a_baseline_takes_anothers(against_float32):
    other = Table("u", "Another table", (), against_float32.rows[1:], baseline="t")
    results = results_against(against_float32)
    text = readme_text("converged", {against_float32: results, other: results})
    assert text.count("WORSE, DIVERGED differ from FP32") == 2


def test_the_readme_holds_every_table_and_the_plot(table, tmp_path):
    results = {table: {table.rows[0]: [result(0.5)]}}
    text = readme_text("converged", results)
    assert "## A table, 5 iterations" in text
    assert "| A | 0.5000 |" in text
    assert "](converged.png)" in text
    assert "](converged-curves.png)" in text
    plot(tmp_path / "runs.png", results)
    plot_curves(tmp_path / "curves.png", {table: {table.rows[0]: [[{"iteration": 5, "map": 0.5}]]}})
    for name in ("runs", "curves"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_means_of_the_runs_that_came_so_far():
    logs = [
        [{"iteration": 5, "main/loss": 2.0}, {"iteration": 10, "map": 0.2}, {"iteration": 20, "map": 0.6}],
        [{"iteration": 10, "map": 0.4}],
    ]
    assert mean_curve(logs) == {10: pytest.approx(0.3), 20: 0.6}
    assert mean_curve([]) == {}


@pytest.mark.parametrize("scale", SCALES)
def test_every_published_row_is_there_and_its_command_line_makes_sense(scale):
    runs = make_results.list_runs(SCALES[scale], 1, (), Path("records"))
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        make_results.parse_settings(run.arguments)
    published = [
        [r.published for r in table.rows if r.published]
        for table in SCALES[scale].tables
        if table.name[:5] == "batch"
    ]
    assert published == [
        ["0.7894", "diverged", "0.7883", "0.7871", "0.7836", "0.7504", "0.7927", "0.7924"],
        ["diverged", "0.8001", "0.8017", "0.8030"],
    ]


def test_runs_are_trained_once_and_their_records_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(make_results.SCALES, "converged", TINY)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    digits = find_digits(tmp_path / "digits", DigitsSettings(train_images=4, test_images=2))
    out = tmp_path / "results"
    command = [
        "--folder",
        str(out),
        "--seeds",
        "1",
        "--jobs",
        "2",
        "--yes",
        "--",
        "--dataset-dir",
        str(digits),
    ]
    assert make_results.main(command) == 0
    records = sorted(path.relative_to(out / "converged") for path in (out / "converged").rglob("*.json"))
    assert [str(path) for path in records] == [
        f"tiny/{name}/seed-0/{file}"
        for name in ("adaptive", "float32")
        for file in ("log.json", "result.json")
    ]
    assert (
        str(tmp_path) not in (out / "converged" / "tiny" / "adaptive" / "seed-0" / "result.json").read_text()
    )
    assert "| FP32 | 0." in (out / "README.md").read_text()

    monkeypatch.setattr(make_results, "train", lambda *args: pytest.fail("trained again"))
    assert make_results.main(command) == 0
    assert "2 of 2 runs have ended before" in capsys.readouterr().out


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> list[str]:
    """A command line of make_results.py for two runs of an iteration each."""
    monkeypatch.setitem(make_results.SCALES, "converged", TINY)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    digits = find_digits(tmp_path / "set", DigitsSettings(train_images=4, test_images=2))
    return ["--folder", str(tmp_path / "results"), "--seeds", "1", "--", "--dataset-dir", str(digits)]


def test_the_page_stays_until_all_runs_have_ended(tiny, tmp_path, capsys):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "README.md").write_text("the page of all runs")
    assert make_results.main(["--yes", *tiny]) == 0
    whole = (folder / "README.md").read_text()
    assert "# Results" in whole
    (folder / "converged" / "tiny" / "adaptive" / "seed-0" / "result.json").unlink()
    (folder / "README.md").write_text("the page of all runs")
    capsys.readouterr()
    assert make_results.main(["--tables-only", *tiny]) == 0
    assert (folder / "README.md").read_text() == "the page of all runs"
    assert "1 of 2 runs have ended" in capsys.readouterr().out
    assert "from 1 runs" in (folder / "runs" / "converged" / "README.md").read_text()


@pytest.mark.parametrize(("answer", "begun"), [("y", True), ("", False), ("n", False)])
def test_it_says_how_long_it_takes_and_asks(tiny, tmp_path, monkeypatch, capsys, answer, begun):
    monkeypatch.setattr(make_results, "seconds_of", lambda runs, jobs, start: 60.0 * len(runs))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    monkeypatch.setattr(make_results, "train_all", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert make_results.main(tiny) == (130 if begun else 2)
    printed = capsys.readouterr()
    assert "2 runs, 1 at a time, will take about 2 minutes on this machine." in printed.out
    assert ("Nothing was trained" in printed.err) == (not begun)


def test_without_anybody_to_ask_nothing_begins(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_results, "train_all", lambda *args: pytest.fail("trained"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert make_results.main(tiny) == 2
    printed = capsys.readouterr()
    assert re.search(r"2 runs, 1 at a time, will take about \d+ minutes on this machine\.", printed.out)
    assert "say so with --yes" in printed.err


def test_the_time_is_that_of_all_images_at_a_trials_pace(tmp_path):
    def start(more) -> None:
        out = Path(more[more.index("--out") + 1])
        out.mkdir()
        rows = [{"elapsed_time": seconds} for seconds in (9.0, 13.0, 90.0)]
        (out / "log.json").write_text(json.dumps(rows))
        (out / "result.json").write_text(json.dumps({"settings": {"batchsize": 2}}))

    runs = [SimpleNamespace(iteration=100, batchsize=8), SimpleNamespace(iteration=50, batchsize=32)]
    # Four seconds for eight iterations of two images.
    assert seconds_of(runs, 2, start) == pytest.approx(2400 * 0.25 / 2)
    assert in_words(300) == "5 minutes"
    assert in_words(9000) == "2.5 hours"


def test_a_record_of_another_run_is_not_taken(tmp_path):
    (run, _) = make_results.list_runs(TINY, 1, (), tmp_path)
    settings = make_results.parse_settings(run.arguments).as_json()
    run.records.mkdir(parents=True)
    path = run.records / "result.json"
    path.write_text(json.dumps(result(0.5) | {"settings": settings}))
    assert run.result()["map"] == 0.5
    path.write_text(json.dumps(result(0.5) | {"settings": settings | {"iteration": 7}}))
    with pytest.raises(make_results.InputError, match="of a run with other settings .iteration."):
        run.result()


def test_a_run_that_can_not_be_trained_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(make_results.SCALES, "converged", TINY)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = ["--folder", str(tmp_path), "--seeds", "1", "--yes", "--", "--pretrained", "/nowhere.npz"]
    assert make_results.main(command) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "tiny/float32/seed-0 could not be trained: The weights /nowhere.npz can't be read" in printed


def test_tables_without_any_run_are_one_sentence(tmp_path, capsys):
    assert make_results.main(["--folder", str(tmp_path), "--tables-only"]) == 2
    assert "No run of the scale converged has ended yet" in capsys.readouterr().err


def test_mpiexec_is_the_one_beside_python_or_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    with pytest.raises(make_results.InputError, match="--ranks needs mpiexec: install an MPI"):
        make_results.find_mpiexec()
    for folder in ("path", "bin"):
        (tmp_path / folder).mkdir()
        program = tmp_path / folder / "mpiexec"
        program.touch(mode=0o755)
        assert make_results.find_mpiexec() == str(program)
