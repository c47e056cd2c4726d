"""Records come back from their lines as they were, from any run, whole or broken."""

import json
import logging
import os

import numpy as np
import pytest

from ada_loss.core.histogram import Histogram
from ada_loss.core.record_file import FILE_NAME, RecordError, RecordFile, read
from ada_loss.core.recorder import OFF, RunRecorder
from ada_loss.core.records import (
    ACTIVATION,
    BIAS_GRADIENT,
    INPUT_GRADIENT,
    VERSION,
    WEIGHT_GRADIENT,
    EndRecord,
    Place,
    PlaceRecord,
    RunHeader,
    Shift,
    StepRecord,
    from_line,
    to_line,
)

HEADER = RunHeader(
    name="auto", method="auto", model="Net", framework="Chainer", adaptive=True, settings={"n": 1}
)

HISTOGRAM = Histogram(-3, (1,), largest=0.2)


def random_histogram(rng):
    values = np.exp2(rng.normal(-20, 5, 100)).astype(np.float16)
    return Histogram.of(values, int(rng.integers(-9, 9)))


def place_record(rng, step, path="/conv1", **fields):
    return PlaceRecord(step, Place(path, INPUT_GRADIENT), random_histogram(rng), **fields)


def written(tmp_path, rng, steps=6, places=3, **options):
    with_places = [
        [*(place_record(rng, step, f"/{n}") for n in range(places)), StepRecord(step, 1.5)]
        for step in range(steps)
    ]
    file = RecordFile(tmp_path, HEADER, **options)
    for records in with_places:
        file.write(records)
    file.close()
    return [record for records in with_places for record in records]


@pytest.mark.parametrize(
    "record",
    [
        HEADER,
        RunHeader(name="x", method="none", total=10, started="2026-01-01T00:00:00", versions={"numpy": "2"}),
        PlaceRecord(3, Place("/a/W", WEIGHT_GRADIENT), Histogram(zeros=4), 7, lost=2, reference=HISTOGRAM),
        PlaceRecord(3, Place("/a", ACTIVATION), Histogram(nonfinite=4), shift=Shift(3, 5, 4, 4)),
        StepRecord(9, 0.25, -3, True, 4, Place("/a/b", BIAS_GRADIENT), {"mAP": 0.5}),
        StepRecord(0),
        EndRecord(10, "diverged"),
    ],
)  # fmt: skip
def test_a_record_is_one_line_and_comes_back(record):
    line = to_line(record)
    assert line.count("\n") == 1 and line.endswith("\n")
    assert from_line(line) == record


def test_lines_are_json_that_every_reader_takes():
    record = StepRecord(
        np.int64(1), np.float32("nan"), np.int32(3), metrics={"a": float("inf"), "b": np.float32(0.5)}
    )
    line = to_line(record)
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    assert from_line(line) == StepRecord(1, None, 3, metrics={"b": 0.5})
    assert json.loads(
        to_line(PlaceRecord(0, Place("/", ACTIVATION), Histogram(), shift=Shift(-float("inf"))))
    )


def test_settings_of_any_kind_are_written():
    line = to_line(
        RunHeader(name="x", method="y", settings={"dtype": np.dtype("float16"), "n": np.float32(2)})
    )
    assert from_line(line).settings == {"dtype": "float16", "n": 2.0}


@pytest.mark.parametrize(
    "path, layer", [("/a/conv/W", "/a/conv"), ("b.0.weight", "b.0"), ("/W", "/"), ("weight", "/")]
)
def test_a_parameter_belongs_to_its_module(path, layer):
    assert Place(path, WEIGHT_GRADIENT).layer == layer
    assert Place(path, INPUT_GRADIENT).layer == path


def test_what_was_written_is_read(tmp_path, rng):
    records = written(tmp_path, rng)
    run = read(tmp_path)
    assert run.header == HEADER and run.end is None and run.damaged == 0
    assert [*run.places, *run.steps] == sorted(records, key=lambda record: isinstance(record, StepRecord))
    assert read(tmp_path / FILE_NAME).places == run.places


def test_a_cut_last_line_is_left_out_wherever_it_is_cut(tmp_path, rng):
    records = written(tmp_path, rng, steps=2)
    path = tmp_path / FILE_NAME
    text = path.read_bytes()
    last = text.rstrip(b"\n").rfind(b"\n") + 1
    for length in rng.integers(last + 1, len(text), 10):
        path.write_bytes(text[:length])
        run = read(path)
        assert run.damaged == 0
        assert len(run.places) + len(run.steps) == len(records) - 1


def test_damage_in_the_middle_costs_its_lines_only(tmp_path, rng):
    records = written(tmp_path, rng)
    path = tmp_path / FILE_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2:4] = [b"\xff\xfe\x00 no text\n", b"[1, 2]\n"]
    path.write_bytes(b"".join([*lines, b'{"record":"of the future","x":1}\n']))
    run = read(path)
    assert run.damaged == 2
    assert len(run.places) + len(run.steps) == len(records) - 2


def test_a_resumed_run_goes_on_behind_the_last_whole_line_and_counts_what_it_did_again(tmp_path, rng):
    written(tmp_path, rng, steps=4)
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:-5])
    again = [place_record(rng, 2, "/0"), StepRecord(2, 9.0), StepRecord(4, 8.0)]
    file = RecordFile(tmp_path, HEADER, resume=True)
    file.write(again)
    file.close()
    run = read(path)
    assert run.damaged == 0
    assert [step.step for step in run.steps] == [0, 1, 2, 4]
    assert again[0] in run.places and again[1] in run.steps


def test_a_new_run_replaces_an_older_one(tmp_path, rng):
    written(tmp_path, rng)
    RecordFile(tmp_path, HEADER).close()
    assert read(tmp_path).places == []


def test_a_file_stays_below_its_size_and_covers_the_run_evenly(tmp_path, rng):
    most = 1 << 16
    file = RecordFile(tmp_path, HEADER, most_bytes=most)
    recorder = RunRecorder(file, every=2)
    histograms = [random_histogram(rng) for _ in range(8)]
    for step in range(2000):
        for number, histogram in enumerate(histograms):
            recorder.observe(Place(f"/{number}", INPUT_GRADIENT), histogram)
        recorder.end_step(loss=float(step), skipped=step == 777)
        assert os.path.getsize(tmp_path / FILE_NAME) <= most
    recorder.end()
    run = read(tmp_path)
    sampled = sorted({record.step for record in run.places})
    assert set(np.diff(sampled)) == {2 * file.thinned} and file.thinned > 1
    assert sampled[0] == 0 and sampled[-1] >= 2000 - 2 * file.thinned
    assert [step.step for step in run.steps if step.skipped] == [777]
    assert run.end == EndRecord(2000, "finished")


def test_one_line_of_pandas_reads_it(tmp_path, rng):
    pandas = pytest.importorskip("pandas")
    records = written(tmp_path, rng)
    table = pandas.read_json(tmp_path / FILE_NAME, lines=True)
    assert len(table) == len(records) + 1
    assert list(table[table.record == "step"].loss) == [1.5] * 6
    assert table.version[0] == VERSION


@pytest.mark.parametrize(
    "text", [b"", b"\n", b"hello\n", b"{}\n", b'{"record":"step"}\n', b"\x00\xff" * 50 + b"\n"]
)
def test_what_holds_no_records_is_refused_in_one_sentence(tmp_path, text):
    (tmp_path / FILE_NAME).write_bytes(text)
    with pytest.raises(RecordError, match="holds no records"):
        read(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecordError, match="nowhere.*cannot be read"):
        read(tmp_path / "nowhere")


def test_a_later_version_says_what_to_do(tmp_path):
    line = json.loads(to_line(HEADER)) | {"version": VERSION + 1, "something": "new"}
    (tmp_path / FILE_NAME).write_text(json.dumps(line) + "\n")
    with pytest.raises(RecordError, match="update"):
        read(tmp_path)


def test_a_full_disk_ends_the_recording_and_not_the_training(tmp_path, monkeypatch, caplog, rng):
    file = RecordFile(tmp_path, HEADER)
    recorder = RunRecorder(file, every=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ada_loss.core.record_file.os.write", full)
    with caplog.at_level(logging.WARNING, "ada_loss"):
        recorder.end_step(loss=1.0)
    assert "No space left" in caplog.text
    assert not recorder.sampling
    recorder.end_step(loss=1.0)
    recorder.end()


class TestRecorder:
    def observed(self, tmp_path, **options):
        return RunRecorder(RecordFile(tmp_path, HEADER), **options)

    def test_only_sampled_steps_are_observed(self, tmp_path, rng):
        recorder = self.observed(tmp_path, every=3)
        for _ in range(7):
            recorder.observe(Place("/", ACTIVATION), random_histogram(rng))
            recorder.end_step(loss=1.0)
        run = read(tmp_path)
        assert [record.step for record in run.places] == [0, 3, 6] == [step.step for step in run.steps]

    def test_skipped_steps_are_recorded_whenever_they_come(self, tmp_path):
        recorder = self.observed(tmp_path, every=100)
        for step in range(10):
            recorder.end_step(exponent=-step, skipped=step in (4, 7), began=Place("/x", ACTIVATION))
        steps = read(tmp_path).steps[1:]
        assert [(step.step, step.skipped_so_far, step.exponent) for step in steps] == [(4, 1, -4), (7, 2, -7)]

    def test_an_overflow_begins_at_the_first_place_that_is_not_finite(self, tmp_path):
        recorder = self.observed(tmp_path)
        for path, value in [("/a", 1.0), ("/b", np.inf), ("/c", np.nan)]:
            recorder.observe(Place(path, INPUT_GRADIENT), Histogram.of(np.array([value])))
        recorder.end_step(skipped=True)
        assert read(tmp_path).steps[0].began == Place("/b", INPUT_GRADIENT)

    def test_a_place_that_comes_up_twice_is_one(self, tmp_path, rng):
        recorder = self.observed(tmp_path)
        first, second = random_histogram(rng), random_histogram(rng)
        recorder.observe(Place("/", ACTIVATION), first, lost=2, reference=second)
        recorder.observe(Place("/", ACTIVATION), second, lost=lambda: 3, reference=lambda: first)
        recorder.end_step()
        (record,) = read(tmp_path).places
        assert record.histogram == first.merged(second) == record.reference
        assert record.lost == 5

    def test_what_is_still_being_counted_is_asked_for_at_the_end_of_the_step(self, tmp_path, rng):
        recorder, asked = self.observed(tmp_path), []
        recorder.observe(Place("/", ACTIVATION), lambda: asked.append(1) or random_histogram(rng))
        assert not asked
        recorder.end_step()
        assert asked == [1]

    @pytest.mark.parametrize("every", [0, -1, 1.5, True, "7"])
    def test_a_bad_interval_is_refused(self, tmp_path, every):
        with pytest.raises(ValueError, match="every"):
            self.observed(tmp_path, every=every)

    def test_nothing_is_wanted_after_the_end(self, tmp_path):
        recorder = self.observed(tmp_path)
        recorder.end()
        recorder.end("again")
        assert not recorder.sampling
        assert read(tmp_path).end == EndRecord(0, "finished")


def test_off_takes_everything_and_wants_nothing():
    assert not OFF.sampling
    OFF.observe(Place("/", ACTIVATION), Histogram(), exponent=3)
    OFF.end_step(loss=1.0, skipped=True)
    OFF.end()
