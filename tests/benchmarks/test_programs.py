"""Every benchmark runs and prints its table; --quick leaves the README alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "benchmarks" / "README.md"


def run(*command: str) -> str:
    """Run a benchmark as a user does; returns what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    before = README.read_bytes()
    done = subprocess.run(
        [sys.executable, f"benchmarks/{command[0]}.py", "--quick", *command[1:]],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert README.read_bytes() == before
    return done.stdout


def column(output: str, heading: str) -> list[float]:
    """The numbers in the table column under a heading."""
    lines = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")]
    header = next(cells for cells in lines if heading in [cell.strip() for cell in cells])
    place = [cell.strip() for cell in header].index(heading)
    rows = [cells for cells in lines if len(cells) == len(header) and re.search(r"\d$", cells[place])]
    return [float(cells[place].replace(",", "")) for cells in rows]


def test_step_time_compares_every_method() -> None:
    from workloads import METHODS

    output = run("step_time", "--models", "mlp100", "--kernels", "numpy")
    assert all(f"| {name} " in output for name in METHODS)
    total, *phases = (
        np.array(column(output, name)) for name in ("ms/iteration", "forward", "backward", "update")
    )
    assert len(total) == len(METHODS)
    np.testing.assert_allclose(sum(phases), total, rtol=0.02, atol=0.2)


def test_memory_measures_every_method_in_processes_of_their_own() -> None:
    output = run("memory", "--models", "small", "--kernels", "numpy")
    traced, whole = column(output, "traced MiB"), column(output, "process MiB")
    assert len(traced) == len(whole) == 2
    assert all(0 < small < large for small, large in zip(traced, whole, strict=True))


def test_scaling_fits_a_line_to_every_series_and_counts_what_ranks_agree_on() -> None:
    output = run("scaling", "--kernels", "numpy")
    assert output.count("Added: ") == 4
    # One number for each of the 8 parameters, and 4 bytes for each element of their gradients.
    assert column(output, "bytes of agreement") == [4 * 9]
    assert column(output, "bytes of gradients") == [4 * (3 * 32 * 32 + 3 * 32 + 10 * 32 + 10)]


def test_mixed16_ratio_compares_with_chainers_own_float32() -> None:
    output = run("mixed16_ratio", "--models", "small", "--kernels", "numpy")
    ratios = column(output, "ratio")
    assert len(ratios) == 4 and ratios[0] == 1 and min(ratios) > 0


def test_data_gives_every_phase_its_share_of_the_iteration(tmp_path: Path) -> None:
    from fidelity_cases import use_ssd_example

    use_ssd_example()
    from data_digits import DigitsSettings, find_digits

    digits = find_digits(tmp_path / "digits", DigitsSettings(train_images=4, test_images=2))
    output = run("data", "--kernels", "numpy", "--dataset-dir", str(digits))
    iteration, *phases, loading, everything = column(output, "ms")
    assert len(phases) == 4 and iteration > 0
    np.testing.assert_allclose([loading, everything], [sum(phases[:3]), sum(phases)], rtol=0.05)
    assert "Evaluation of 2 images: " in output


def test_vs_pytorch_compares_both_frameworks_or_says_what_it_needs() -> None:
    if find_spec("torch"):
        output = run("vs_pytorch", "--models", "resnet20")
        assert len(column(output, "ms")) == 6
        return
    done = subprocess.run(
        [sys.executable, "benchmarks/vs_pytorch.py", "--quick"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "make setup GROUPS=torch" in done.stderr and "Traceback" not in done.stderr
