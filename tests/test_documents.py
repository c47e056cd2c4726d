"""What the documents show works: Python runs, commands exist with their options, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

import ada_loss.chainer as ada
from helpers import dtype

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md", "benchmarks/*.md", "results/*.md")
    for path in ROOT.glob(pattern)
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: str, *languages: str) -> list[str]:
    return [code for language, code in BLOCK.findall((ROOT / document).read_text()) if language in languages]


# Python


class Net(chainer.Chain):
    """What stands for the reader's model."""

    def __init__(self) -> None:
        super().__init__(body=L.Linear(6, 8), head=L.Linear(8, 3))

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        return self.head(F.relu(self.body(x)))


def trained(model: chainer.Chain, optimizer: chainer.Optimizer) -> None:
    """One step of the reader's training."""
    model.cleargrads()
    F.sum(model(np.ones((4, 6), np.float16)) ** 2).backward()
    optimizer.update()


def run(code: str, names: dict[str, object]) -> None:
    exec(compile(code, "document", "exec"), names)


def test_the_lines_of_the_readme_train_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chainer.global_config, "dtype", chainer.global_config.dtype)
    (code,) = (code for code in blocks("README.md", "python") if "ada.prepare(" in code)
    names: dict[str, object] = {"Net": Net}
    run(code, names)
    model, optimizer = names["model"], names["optimizer"]
    before = model.head.W.array.copy()  # type: ignore[attr-defined]
    trained(model, optimizer)  # type: ignore[arg-type]
    assert model.head.W.dtype == np.float16  # type: ignore[attr-defined]
    assert (model.head.W.array != before).any()  # type: ignore[attr-defined]


def lines_that_scale(code: str) -> list[str]:
    return [line for line in code.splitlines() if re.match(r"ada\.AdaLossScaled\(", line)]


def test_what_the_readme_shows_of_a_scaled_model_can_be_read() -> None:
    with dtype("mixed16"):
        model = ada.AdaLossScaled(Net())
        optimizer = ada.prepare(chainer.optimizers.SGD().setup(model))
        trained(model, optimizer)
    shown = [code for code in blocks("README.md", "python") if "model.ada_loss.decisions" in code]
    assert shown, "the README shows what can be read"
    for code in shown:
        lines = [line for line in code.splitlines() if line not in lines_that_scale(code)]
        if any("torch" in line for line in lines) and sys.modules.get("torch") is None:
            lines = [line for line in lines if "torch" not in line]
        trainer = SimpleNamespace(extend=lambda extension: None)
        run("\n".join(lines), {"ada": ada, "model": model, "optimizer": optimizer, "trainer": trainer})


def test_every_way_of_scaling_that_the_readme_shows_is_one() -> None:
    lines = [line for code in blocks("README.md", "python") for line in lines_that_scale(code)]
    assert len(lines) >= 4
    for line in lines:
        with dtype("mixed16"):
            names = {"ada": ada, "model": Net()}
            run(line, names)
            assert isinstance(names["model"], ada.AdaLossScaled)


# Commands


def commands(document: str) -> list[list[str]]:
    """The programs of ours that a document runs, with their arguments."""
    found = []
    for code in blocks(document, "sh", "shell"):
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            starts = [index for index, word in enumerate(words) if re.search(r"(^|/)python3?$", word)]
            if starts and words[starts[0] + 1].endswith(".py"):
                found.append(words[starts[0] + 1 :])
    return found


def folder_of(document: str, program: str) -> Path:
    """Where a document's commands run: at the root, or beside the document."""
    beside = (ROOT / document).parent
    for folder in (beside, ROOT, ROOT / "examples" / "ssd"):
        if (folder / program).is_file():
            return folder
    pytest.fail(f"{document} runs {program}, which is not there")


@cache
def help_of(program: Path) -> str:
    done = subprocess.run([sys.executable, str(program), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


WITH_COMMANDS = [document for document in DOCUMENTS if commands(document)]


@pytest.mark.parametrize("document", WITH_COMMANDS)
def test_commands_exist_with_every_option_that_is_shown(document: str) -> None:
    for program, *arguments in commands(document):
        said = help_of(folder_of(document, program) / program)
        for option in arguments:
            if option.startswith("-"):
                assert re.search(rf"(^|[\s,\[]){re.escape(option)}\b", said), f"{program} has no {option}"


@pytest.mark.parametrize("document", WITH_COMMANDS)
def test_commands_say_which_python_runs_them(document: str) -> None:
    bare = [
        line
        for code in blocks(document, "sh", "shell")
        for line in code.splitlines()
        if re.match(r"(python3?|mpiexec) ", line)
    ]
    if bare:
        assert re.search(r"\.venv/bin/(activate|python)", (ROOT / document).read_text()), bare[0]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document: str) -> None:
    targets = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for code in blocks(document, "sh", "shell"):
        for target in re.findall(r"^make ([a-z]+)", code, re.MULTILINE):
            assert target in targets


# Links


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        file = (ROOT / document).parent / name if name else ROOT / document
        assert file.exists(), f"{target} is not there"
        if heading and file.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", each).lower().replace(" ", "-") for each in headings}
