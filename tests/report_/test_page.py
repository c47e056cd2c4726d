"""The page: complete without a network, small, right, and readable by everybody."""

import base64
import csv
import gzip
import json
import re
from dataclasses import replace

import pytest

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from ada_loss.report.facts import RunFacts, load
from ada_loss.report.page import charts, make_page, titles
from ada_loss.report.pictures import to_png, write_pictures
from report_.browser import dom_after, needs_browser, open_page
from report_.training import Task, train


@pytest.fixture(scope="module")
def page(runs):
    return make_page(runs)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A run of 500 layers."""
    task = Task(layers=500, width=8, batch=4, gain=0.3)
    return load([train(tmp_path_factory.mktemp("deep"), "auto", task, steps=3, every=2)])[0]


def specs(page):
    """The charts that a page holds."""
    packed = re.search(r'id="specs">([^<]*)<', page)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def table_with(column, spec):
    """The rows of the one table of a chart that has such a column."""
    tables = [list(csv.DictReader(text.splitlines())) for text in spec["datasets"].values()]
    (found,) = [rows for rows in tables if column in rows[0]]
    return found


def markup(page):
    """The page without its scripts and its data."""
    return re.sub(r"<script.*?</script>", "", page, flags=re.S)


def test_it_begins_with_the_sentence(page, runs):
    best = next(run for run in runs if run.name == "auto")
    text = re.sub(r"<sup>\u2212?", "^", markup(page)).replace("</sup>", "")
    assert best.sentence.replace("2^-", "2^") in text
    assert page.index("<h1>") < page.index('data-chart="windows.3"')


def test_it_asks_for_nothing_else(page):
    assert not re.search(r'\b(src|href)="(?!#)', markup(page))
    assert "@import" not in page and "url(" not in markup(page)
    assert "<script src" not in page


@pytest.mark.slow
def test_ten_runs_of_500_layers_stay_below_5_mb(deep):
    page = make_page([RunFacts(f"run {number}", deep.run) for number in range(10)])
    assert len(page.encode()) < 5e6


def test_every_chart_is_valid_vega_lite(runs):
    for chart in charts(runs).values():
        chart.to_dict()


def test_the_windows_in_the_picture_are_those_of_the_layers(page, runs):
    drawn = specs(page)
    for number, run in enumerate(runs):
        table = table_with("text", drawn[f"windows.{number}"])
        assert [row["layer"] for row in table] == [layer.path for layer in run.layers]
        for row, layer in zip(table, run.layers, strict=True):
            assert row["text"] == f"2^{layer.window.lowest} to 2^{layer.window.highest}"
            assert float(row["low"]) < layer.window.lowest < layer.window.highest < float(row["high"])


def test_the_losses_in_the_picture_are_those_of_the_runs(page, runs):
    table = table_with("lost", specs(page)["underflow"])
    shown = {(row["method"], row["layer"]): float(row["lost"]) for row in table}
    for run in runs:
        for layer in run.layers:
            assert shown[run.name, layer.path] == pytest.approx(layer.lost, rel=1e-4)
    best = next(run for run in runs if run.name == "auto")
    for layer in best.layers:
        assert shown["fixed 128 *", layer.path] == pytest.approx(layer.underflow(7), rel=1e-4)


def test_the_history_of_scales_is_what_the_places_carried(page, runs):
    number = [run.name for run in runs].index("auto")
    table = table_with("exponent", specs(page)[f"shifts.{number}"])
    for record in runs[number].run.places:
        if record.place.kind == "input gradient":
            (piece,) = [
                row
                for row in table
                if row["layer"] == record.place.path and float(row["from"]) <= record.step < float(row["to"])
            ]
            assert float(piece["exponent"]) == record.exponent


def test_shares_of_a_histogram_add_up_to_all(page):
    totals = {}
    for row in table_with("share", specs(page)["histograms.3"]):
        key = row["place"], row["state"]
        totals[key] = totals.get(key, 0) + float(row["share"])
    assert len(totals) > 10 and all(total == pytest.approx(1, abs=5e-3) for total in totals.values())


def test_every_skipped_step_is_there_with_its_origin(page, runs):
    table = table_with("where", specs(page)["skips"])
    expected = [(run.name, step.step, str(step.began)) for run in runs for step in run.skips]
    assert [(row["run"], int(row["step"]), row["where"]) for row in table] == expected and expected


def test_names_that_look_like_html_stay_text(runs):
    header = replace(runs[0].run.header, model="<script>alert(1)</script>")
    page = make_page([RunFacts("</script><img src=x>", replace(runs[0].run, header=header))])
    assert "<script>alert" not in page and "<img" not in markup(page)


def test_a_broken_run_has_a_page(broken):
    page = make_page(load([broken]))
    assert "The forward pass overflows" in page and "no end recorded" in page


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    page = make_page(load([train(tmp_path, "none", steps=0)]))
    assert "No gradient has been recorded yet" in page


def test_pictures_are_png_of_every_chart(runs, tmp_path):
    drawn = charts(runs[:1])
    written = write_pictures(drawn, titles(runs[:1], drawn), tmp_path)
    assert len(written) == len(drawn) == len(set(written))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_a_picture_of_500_layers_is_drawn(deep):
    assert to_png(charts([deep])["windows.0"]).startswith(b"\x89PNG")


@needs_browser
class TestInBrowser:
    def test_every_chart_is_drawn_and_nothing_fails(self, page, runs, tmp_path):
        dom = dom_after(page, "", tmp_path)
        states = re.findall(r'data-chart="([^"]+)"[^>]*data-drawn="(\w+)"', dom)
        assert len(states) > 6 and {state for _, state in states} == {"done"}
        assert "could not be drawn" not in markup(dom)

    def test_another_run_can_be_chosen(self, page, tmp_path):
        script = """
            const choice = document.getElementById("run");
            choice.value = "0"; choice.dispatchEvent(new Event("change"));
            while (!document.querySelector('[data-chart="windows.0"][data-drawn="done"]'))
                await new Promise(f => setTimeout(f, 50));
            const shown = [...document.querySelectorAll("h1")].filter(h => h.offsetParent);
            document.title = shown.length + " sentence";
        """
        assert "<title>1 sentence</title>" in dom_after(page, script, tmp_path)

    def test_arrow_keys_read_the_marks_of_a_chart(self, page, runs, tmp_path):
        script = """
            const chart = document.querySelector('[data-chart="windows.3"]');
            chart.focus();
            for (const key of ["ArrowDown", "ArrowDown"])
                chart.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
            document.title = "read: " + document.getElementById("reading").textContent;
        """
        read = re.search("<title>read: (.*?)</title>", dom_after(page, script, tmp_path))[1]
        layer = next(run for run in runs if run.name == "auto").layers[1]
        assert layer.path in read and f"2^{layer.window.lowest} to 2^{layer.window.highest}" in read

    def test_the_theme_can_be_switched(self, page, tmp_path):
        script = """
            const page = () => getComputedStyle(document.body).backgroundColor;
            const before = page(); document.getElementById("theme").click();
            document.title = before + " then " + page();
        """
        dom = dom_after(page, script, tmp_path)
        assert "<title>rgb(255, 255, 255) then rgb(15, 21, 28)</title>" in dom

    def test_500_layers_are_drawn_and_can_be_searched(self, deep, tmp_path):
        script = """
            const chart = document.querySelector('[data-chart="windows.0"]');
            const bars = () => chart.querySelectorAll(".mark-rect.role-mark path").length;
            const all = bars(), field = chart.querySelector("input");
            field.value = "block49"; field.dispatchEvent(new Event("input"));
            await new Promise(f => setTimeout(f, 1000));
            document.title = all + " " + bars();
        """
        found = re.search(r"<title>(\d+) (\d+)</title>", dom_after(make_page([deep]), script, tmp_path))
        assert int(found[1]) >= 450 and 8 <= int(found[2]) <= 16

    def test_it_prints(self, page, tmp_path):
        (tmp_path / "page.html").write_text(page)
        open_page(tmp_path / "page.html", tmp_path / "profile", f"--print-to-pdf={tmp_path / 'page.pdf'}")
        assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
