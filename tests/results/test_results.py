"""results/make_results.py: what it runs, what it keeps, what it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "results"), str(ROOT / "examples" / "ssd"), str(ROOT / "examples" / "common")]

import make_results  # noqa: E402
from experiments import SCALES, Row, Scale, Table, row  # noqa: E402
from plot import plot  # noqa: E402
from report import finding, precision_text, readme_text, summarize, table_text  # noqa: E402

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


def result(precision: float | None, outcome: str = "finished", skipped: int = 0) -> dict:
    return {
        "map": precision,
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
    assert lines[2] == "| A | 0.6000 ± 0.1414 | 2 | 0.0 | 10 | 0.79 |"
    assert lines[3] == "| B | diverged | 1 | 0.0 | 10 |  |"
    assert len(lines) == 4


def test_without_published_figures_there_is_no_such_column(table):
    plain = Table("t", "A table", (), table.rows[1:])
    assert "published" not in table_text(plain, {table.rows[1]: [result(0.5)]})


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [((0.70, 0.72), (0.71, 0.73), "no more than"), ((0.10, 0.12), (0.71, 0.73), "far more than")],
)
def test_the_finding_compares_the_rows_with_the_seeds(table, first, second, verdict):
    results = {table.rows[0]: [result(value) for value in first], table.rows[1]: [result(v) for v in second]}
    assert verdict in finding(table, results)
    assert finding(table, results).startswith("From A (")


def test_one_seed_finds_nothing(table):
    assert finding(table, {table.rows[0]: [result(0.1)], table.rows[1]: [result(0.9)]}) == ""


def test_the_readme_holds_every_table_and_the_plot(table, tmp_path):
    results = {table: {table.rows[0]: [result(0.5)]}}
    text = readme_text("digits", results)
    assert "## A table, 5 iterations" in text
    assert "| A | 0.5000 |" in text
    assert "](digits.png)" in text
    plot(tmp_path / "digits.png", results)
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


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
    monkeypatch.setitem(make_results.SCALES, "digits", TINY)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    digits = find_digits(tmp_path / "digits", DigitsSettings(train_images=4, test_images=2))
    out = tmp_path / "results"
    command = ["--folder", str(out), "--seeds", "1", "--jobs", "2", "--", "--dataset-dir", str(digits)]
    assert make_results.main(command) == 0
    records = sorted(path.relative_to(out / "digits") for path in (out / "digits").rglob("*.json"))
    assert [str(path) for path in records] == [
        f"tiny/{name}/seed-0/{file}"
        for name in ("adaptive", "float32")
        for file in ("log.json", "result.json")
    ]
    assert str(tmp_path) not in (out / "digits" / "tiny" / "adaptive" / "seed-0" / "result.json").read_text()
    assert "| FP32 | 0." in (out / "README.md").read_text()

    monkeypatch.setattr(make_results, "train", lambda *args: pytest.fail("trained again"))
    assert make_results.main(command) == 0
    assert "2 of 2 runs have ended before" in capsys.readouterr().out


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
    monkeypatch.setitem(make_results.SCALES, "digits", TINY)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = ["--folder", str(tmp_path), "--seeds", "1", "--", "--pretrained", "/nowhere.npz"]
    assert make_results.main(command) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "tiny/float32/seed-0 could not be trained: The weights /nowhere.npz can't be read" in printed


def test_tables_without_any_run_are_one_sentence(tmp_path, capsys):
    assert make_results.main(["--folder", str(tmp_path), "--tables-only"]) == 2
    assert "No run of the scale digits has ended yet" in capsys.readouterr().err


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
