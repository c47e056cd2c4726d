"""Tables, and the sections that they are kept in."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
from readme_tables import table, write_section

PROSE = "# Benchmarks\n\nHow to run them.\n\n## Results\n"


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(PROSE)
    return path


def test_a_table_is_aligned_in_plain_text() -> None:
    assert table(["run", "ms"], [["long name", 1.5], ["b", 10]]) == (
        "| run       |  ms |\n| --------- | --: |\n| long name | 1.5 |\n| b         |  10 |"
    )


def test_sections_come_in_the_order_of_their_titles_whenever_written(readme: Path) -> None:
    written = set()
    for order in permutations(["memory, CPU", "step_time, CPU", "step_time, GPU"]):
        readme.write_text(PROSE)
        for title in order:
            write_section(readme, title, f"body of {title}")
        written.add(readme.read_text())
    (text,) = written
    assert text.startswith(PROSE)
    places = [text.index(f"### {title}") for title in ("memory, CPU", "step_time, CPU", "step_time, GPU")]
    assert places == sorted(places)


@pytest.mark.parametrize("title", ["a", "b", "c"])
def test_a_section_replaces_the_one_with_its_title(readme: Path, title: str) -> None:
    for known in "abc":
        write_section(readme, known, f"old {known}")
    before = readme.read_text()
    write_section(readme, title, "new\n\n| x |")
    assert readme.read_text() == before.replace(f"old {title}", "new\n\n| x |")
    write_section(readme, title, f"old {title}")
    assert readme.read_text() == before


def test_text_around_the_sections_stays(readme: Path) -> None:
    write_section(readme, "b", "body")
    readme.write_text(readme.read_text() + "\nAfterwords.\n")
    write_section(readme, "a", "first")
    write_section(readme, "b", "other body")
    text = readme.read_text()
    assert text.startswith(PROSE) and text.endswith("<!-- end -->\n\nAfterwords.\n")


def test_a_title_may_hold_characters_that_mean_something_in_patterns(readme: Path) -> None:
    title = r"step_time (x*), 2 cores of C++ \d CPU"
    for body in ("one", "two"):
        write_section(readme, title, body)
    assert readme.read_text().count(title) == 2
    assert "one" not in readme.read_text()
