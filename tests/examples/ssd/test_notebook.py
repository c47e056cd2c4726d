"""The notebook: its cells run one after the other, as a kernel runs them."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

from processes import EXAMPLE, environment

NOTEBOOK = EXAMPLE / "adaptive_ssd.ipynb"
# Runs the cells of a notebook in one namespace, and prints what the last expression of each shows.
KERNEL = """
import ast, json, sys
cells, parameters = json.load(open(sys.argv[1]))["cells"], json.loads(sys.argv[2])
names = {"__name__": "__main__"}
for number, cell in enumerate(cells):
    if cell["cell_type"] != "code":
        continue
    tree = ast.parse("".join(cell["source"]))
    shown = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"cell {number}", "exec"), names)
    if "parameters" in cell["metadata"].get("tags", ()):
        assert names.keys() >= parameters.keys()
        names.update(parameters)
    if shown:
        value = eval(compile(ast.Expression(shown.value), f"cell {number}", "eval"), names)
        if value is not None:
            print("SHOWN", type(value).__name__, value.size)
"""


def test_it_is_a_notebook_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    identities = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identities)) == len(identities)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            ast.parse("".join(cell["source"]))


def test_its_cells_run_and_show_what_they_say(digits: Path, tmp_path: Path):
    parameters = {"ITERATIONS": 2, "DATASET_DIR": str(digits), "OUT": str(tmp_path / "run")}
    result = subprocess.run(
        [sys.executable, "-c", KERNEL, str(NOTEBOOK), json.dumps(parameters)],
        cwd=EXAMPLE,
        env=environment(MPLBACKEND="Agg", PATH=os.environ["PATH"]),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    shown = [line for line in result.stdout.splitlines() if line.startswith("SHOWN")]
    assert shown == ["SHOWN PngImageFile (600, 400)", "SHOWN Image (1192, 304)"]
    # The report, a meeting of gradients, the decisions, the gradients that float16 would lose.
    for words in ("/extractor/conv1", "shifted by 2^", "of it zero in float16", "0 steps skipped"):
        assert words in result.stdout
    assert (tmp_path / "run" / "result.json").exists()
