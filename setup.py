"""Takes the requirements from ada_loss/requirements/, the only place that has them; the rest is in
pyproject.toml."""

from __future__ import annotations

from pathlib import Path

DIRECTORY = Path(__file__).resolve().parent / "ada_loss" / "requirements"
NOT_EXTRAS = {"base", "build-constraints", "constraints", "pip"}


def requirements(text: str) -> list[str]:
    """The requirements in the text of a requirements file, without comments and without options for pip."""
    lines = (line.partition("#")[0].partition(" --")[0].strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("-")]


def read_all() -> dict[str, list[str]]:
    """Requirements by the name of their file."""
    return {path.stem: requirements(path.read_text(encoding="utf-8")) for path in DIRECTORY.glob("*.txt")}


if __name__ == "__main__":
    from setuptools import find_packages, setup

    groups = read_all()
    setup(
        packages=find_packages(include=["ada_loss", "ada_loss.*"]),
        package_data={"ada_loss": ["py.typed", "requirements/*.txt"], "ada_loss.report": ["page.*"]},
        install_requires=groups["base"],
        extras_require={name: groups[name] for name in sorted(groups.keys() - NOT_EXTRAS)},
    )
