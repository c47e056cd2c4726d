"""`python -m ada_loss.report`: what it writes, and one sentence for what it cannot do."""

import subprocess
import sys

import pytest

from ada_loss.report.__main__ import main
from ada_loss.report.facts import load
from ada_loss.report.table import table
from report_.training import Task, train


def test_the_table_fits_80_columns_and_names_every_layer(runs):
    for run in runs:
        text = table(run, runs)
        assert max(map(len, text.splitlines())) <= 80
        assert all(layer.path in text for layer in run.layers)
        assert run.sentence in text.replace("\n", " ")


def test_long_paths_and_broken_runs_fit_as_well(broken, tmp_path):
    (run,) = load([broken])
    assert max(map(len, table(run).splitlines())) <= 80
    path = train(tmp_path, "none", Task(layers=3), steps=2)
    text = (path / "records.jsonl").read_text().replace("/body/", "/backbone/" + "stage/very_long_name/" * 4)
    (path / "records.jsonl").write_text(text)
    assert max(map(len, table(load([path])[0]).splitlines())) <= 80


def test_a_table_of_few_shows_the_layers_that_suit_least(runs):
    text = table(runs[0], most=2)
    assert "... and 6 layers" in text and "/aux " in text and "/body/block1 " not in text


def test_text_needs_no_other_package(trained, tmp_path):
    block = "import sys; sys.modules.update(dict.fromkeys(['altair', 'vl_convert', 'jinja2']));"
    run = f"from ada_loss.report.__main__ import main; sys.exit(main({['--text', str(trained['auto'])]}))"
    result = subprocess.run([sys.executable, "-c", block + run], capture_output=True, text=True)
    assert result.returncode == 0 and "No single scale fits" in result.stdout


def test_without_its_packages_the_page_says_what_to_install(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "altair", None)
    for name in [name for name in sys.modules if name.startswith("ada_loss.report.") and "chart" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "ada_loss.report.page", raising=False)
    assert main([str(trained["auto"]), "--out", str(tmp_path)]) == 2
    assert "ada-loss[report]" in capsys.readouterr().err


def test_page_and_pictures_are_written(trained, tmp_path, capsys):
    pytest.importorskip("altair")
    assert main([str(trained["auto"]), "--out", str(tmp_path / "a" / "b")]) == 0
    assert {"index.html", "windows-0.png"} <= {path.name for path in (tmp_path / "a" / "b").iterdir()}
    assert "No single scale fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "required"),
        (["nowhere"], "cannot be read"),
        (["--what"], "--help"),
        (["RUN", "--out", "FILE/x"], "another place"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, says, trained, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    named = {"RUN": str(trained["auto"]), "FILE/x": f"{file}/x"}
    if "RUN" in arguments:
        pytest.importorskip("altair")
    try:
        status = main([named.get(argument, argument) for argument in arguments])
    except SystemExit as error:
        status = error.code
    message = capsys.readouterr().err
    assert status == 2 and says in message and message.count("\n") == 1


def test_a_reader_that_has_seen_enough_is_no_error(trained):
    command = (
        f"{sys.executable} -m ada_loss.report --text {trained['auto']} | head -1; exit ${{PIPESTATUS[0]}}"
    )
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.returncode == 0 and "Traceback" not in result.stderr


@pytest.mark.slow
def test_tensorboard_receives_what_the_records_hold(trained, tmp_path):
    pytest.importorskip("tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert main([str(trained["dynamic"]), "--tensorboard", str(tmp_path)]) == 0
    (run,) = load([trained["dynamic"]])
    events = accumulator.EventAccumulator(str(tmp_path / "dynamic"), {"histograms": 0, "scalars": 0})
    events.Reload()
    record = next(record for record in run.run.places if record.place.path == "/head/W")
    exponents = events.Scalars("head/W/weight_gradient/exponent")
    assert exponents[0].value == record.exponent
    histogram = events.Histograms("head/W/weight_gradient")[0].histogram_value
    assert histogram.num == record.reference.nonzero
    assert list(histogram.bucket) == list(record.reference.counts)
    assert [event.step for event in events.Scalars("skipped")][-1] == run.run.steps[-1].step
