"""Several ranks train as one: the same update, from gradients that each of them scales as it likes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mn_program
from ada_loss.core.config import METHODS, TIMINGS
from mn_training import Alone, no_norm
from toy import masters, training

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

MPIEXEC = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS))),
    # Open MPI refuses, unless told, to run as root and more processes than there are cores.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


class Ranks:
    """What every case gave on each of several ranks."""

    def __init__(self, size, folder):
        self.size = size
        self._folder = folder
        # `python -m mpi4py` ends all ranks when one of them fails.
        command = [MPIEXEC, "-n", str(size), sys.executable, "-m", "mpi4py", str(TESTS / "mn_program.py")]
        run = subprocess.run(
            [*command, str(folder)],
            env={**os.environ, **ENVIRONMENT},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr

    def __getitem__(self, case):
        """The case's arrays, rank by rank."""
        found = []
        for rank in range(self.size):
            with np.load(self._folder / f"{case}.{rank}.npz") as file:
                found.append(dict(file))
        return found

    def the_same(self, case):
        """The case's arrays, which must be the same on all ranks, bit for bit."""
        first, *others = self[case]
        for other in others:
            assert other.keys() == first.keys()
            for name in first:
                np.testing.assert_array_equal(other[name], first[name], err_msg=name)
        return first


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    if MPIEXEC is None:
        pytest.skip("there is no mpiexec: install the extra `mpich`")
    return Ranks(request.param, tmp_path_factory.mktemp(f"ranks{request.param}"))


@pytest.fixture(scope="module")
def alone():
    results = {}

    def run(case):
        if case not in results:
            results[case] = mn_program.CASES[case](Alone())
        return results[case]

    return run


def assert_same_update(actual, expected, start, tolerance):
    """How far the parameters moved is the same within `tolerance` of how far any of them moved."""
    assert actual.keys() == expected.keys()
    for name in ("scales", "steps"):
        np.testing.assert_array_equal(actual[name], expected[name])
    for path, initial in start.items():
        moved, ought = actual[path] - initial, expected[path] - initial
        assert np.abs(ought).max() > 0, path
        assert np.linalg.norm(moved - ought) <= tolerance * np.linalg.norm(ought), path


TOLERANCE = {"float32": 1e-5, "mixed16": 4e-3}
"""Rounding of some steps: of sums in float32, or of every gradient to float16, to 2**-11 of its size."""


class TestRanksTrainAsOne:
    @pytest.mark.parametrize("precision", TOLERANCE)
    @pytest.mark.parametrize("method", METHODS)
    def test_with_any_method(self, ranks, alone, method, precision):
        start = masters(training(precision, norm=no_norm))
        case = f"average {method} {precision}"
        assert_same_update(ranks.the_same(case), alone(case), start, TOLERANCE[precision])

    @pytest.mark.parametrize("method", ["approx_range", "auto"])
    def test_with_delayed_timing(self, ranks, alone, method):
        start = masters(training("mixed16", norm=no_norm))
        case = f"average delayed {method} mixed16"
        assert_same_update(ranks.the_same(case), alone(case), start, TOLERANCE["mixed16"])

    @pytest.mark.parametrize("precision", TOLERANCE)
    @pytest.mark.parametrize("method", METHODS)
    def test_with_batch_normalization_over_all_ranks(self, ranks, alone, method, precision):
        start = masters(training(precision))
        # A bias in front of a normalization has no gradient but rounding errors.
        del start["/model/first/b"]
        case = f"normalization {method} {precision}"
        # Their variance is E[x^2] - E[x]^2, which costs digits in any precision.
        assert_same_update(ranks.the_same(case), alone(case), start, 3 * TOLERANCE[precision])

    @pytest.mark.parametrize("method", METHODS)
    def test_over_a_communicator_that_adds_in_float16(self, ranks, alone, method):
        start = masters(training("mixed16", norm=no_norm))
        case = f"on the wire {method}"
        assert_same_update(ranks.the_same(case), alone(case), start, TOLERANCE["mixed16"])

    @pytest.mark.parametrize("zero_fill", [True, False])
    def test_where_a_rank_has_no_gradient_and_another_a_tiny_one(self, ranks, alone, zero_fill):
        case = f"branches {zero_fill}"
        actual, expected = ranks.the_same(case), alone(case)
        for path in expected:
            np.testing.assert_allclose(actual[path], expected[path], rtol=2e-3, err_msg=path)
        assert 0 < np.abs(actual["/second/W"]).max() < 2.0**-14

    def test_with_a_layer_that_is_registered_twice(self, ranks, alone):
        actual, expected = ranks.the_same("sharing"), alone("sharing")
        for path, moved in expected.items():
            np.testing.assert_allclose(actual[path], moved, rtol=5e-3, atol=1e-5, err_msg=path)

    def test_an_overflow_on_one_rank_skips_the_step_on_all(self, ranks, alone):
        results = ranks["overflow"]
        assert [bool(result.pop("unchanged")) for result in results] == [True] * ranks.size
        assert [int(result.pop("logged")) for result in results] == [1] + [0] * (ranks.size - 1)
        for result in results:
            np.testing.assert_array_equal(result["scales"], alone("overflow")["scales"])
            for name, array in results[0].items():
                np.testing.assert_array_equal(result[name], array, err_msg=name)

    @pytest.mark.parametrize("timing", TIMINGS)
    @pytest.mark.parametrize("norm", ["multi-node", "own"])
    def test_a_bad_batch_on_one_rank_leaves_no_trace_on_any_and_rank_0_says_where_it_began(
        self, ranks, norm, timing
    ):
        results = ranks[f"one bad rank, {norm}, {timing}"]
        for result in results:
            np.testing.assert_array_equal(result["after"], result["before"])
            assert np.isfinite(result["later"]).all() and (result["later"] != result["after"]).all()
            assert result["steps"].tolist() == [3, 1]
        (message,) = results[0]["reason"]
        assert message.startswith(f"Skipped a step, 1 so far: on rank {ranks.size - 1} the loss is nan")
        assert "on the forward pass, at /model/first (LinearFunction): those that went in" in message
        assert not any(result["reason"].size for result in results[1:])

    def test_a_bad_batch_in_the_first_update_leaves_statistics_finite(self, ranks):
        for result in ranks["bad start"]:
            assert np.isfinite(result["statistics"]).all()

    def test_divergence_ends_all_ranks_at_the_same_step(self, ranks, alone):
        np.testing.assert_array_equal(ranks.the_same("divergence")["scales"], alone("divergence")["scales"])


class TestAgreement:
    def test_takes_one_reduction_of_one_integer_per_parameter_and_model_a_step(self, ranks):
        result = ranks.the_same("communication")
        assert result["sizes"].tolist() == [result["parameters"] + 1] * 3

    def test_with_delayed_timing_all_ranks_decide_by_what_all_have_measured(self, ranks):
        first, *others = results = ranks["delayed"]
        own = np.array([result["own"] for result in results])
        for other in others:
            np.testing.assert_array_equal(other["shifts"], first["shifts"])
        assert first["shifts"].any() and (own[0] != own[-1]).any()
        for result in results:
            np.testing.assert_array_equal(result["safe"], own.min(axis=0))

    def test_with_delayed_timing_includes_all_backward_passes_of_a_step(self, ranks):
        ranks.the_same("accumulation")

    def test_includes_what_a_layer_with_a_timing_of_its_own_has_measured(self, ranks):
        result = ranks.the_same("own timing")
        assert np.diff(result["shifts"]).tolist() == [4, 4, 4]

    def test_lends_gradients_that_can_be_added_in_float16(self, ranks):
        for result in ranks["exponents"]:
            for name in ("large", "tiny", "different", "zero here", "missing here", "zero"):
                assert np.abs(result[name]).max() * 64 <= np.finfo(np.float16).max

    def test_leaves_no_range_unused(self, ranks):
        results = ranks["exponents"]
        for name in ("large", "tiny", "different", "zero here", "missing here"):
            largest = max(np.abs(result[name]).max() for result in results)
            assert largest * 64 * 2 > np.finfo(np.float16).max, name

    def test_is_the_same_on_all_ranks(self, ranks):
        first, *others = (result["agreed"].tolist() for result in ranks["exponents"])
        assert all(other == first for other in others)

    def test_lends_zeros_where_only_other_ranks_have_a_gradient(self, ranks):
        first, *_ = ranks["exponents"]
        assert first["missing here"].tolist() == [0, 0, 0]

    def test_lends_nothing_where_no_rank_has_a_gradient(self, ranks):
        assert all(result["missing"].size == 0 for result in ranks["exponents"])

    def test_keeps_an_overflow_visible(self, ranks):
        first, *_ = ranks["exponents"]
        assert np.isinf(first["infinite"]).all()


class TestStatisticsOverRanks:
    """What batch normalization averages: gradients at one exponent, no lower than it has to be."""

    def test_have_one_exponent(self, ranks):
        first, *others = ranks["statistics"]
        for name in [name for name in first if name.endswith(" exponent")]:
            assert all(other[name] == first[name] for other in others), name

    def test_take_the_largest_exponent_that_a_rank_brings(self, ranks):
        for rank, result in enumerate(ranks["statistics"]):
            assert (result["equal exponent"], result["equal"].tolist()) == (7, [1, 2])
            assert result["different exponent"] == 3 * (ranks.size - 1)
            assert result["different"][0] == 2.0 ** (3 * (ranks.size - 1 - rank))

    def test_take_a_lower_one_where_a_rank_has_no_room(self, ranks):
        for rank, result in enumerate(ranks["statistics"]):
            assert result["no room exponent"] == 0
            assert result["no room"][0] == (6e4 if rank == 0 else 2.0 ** (-8 * rank))

    def test_do_not_ask_ranks_with_nothing_but_zeros(self, ranks):
        for result in ranks["statistics"]:
            assert result["zero here exponent"] == -5 and result["zero exponent"] == 0

    def test_show_an_overflow(self, ranks):
        *_, last = ranks["statistics"]
        assert np.isinf(last["infinite"][0])


class TestStart:
    def test_the_first_update_only_spreads_the_first_ranks_values(self, ranks):
        results = ranks["start"]
        assert [bool(result.pop("changed")) for result in results] == [False] + [True] * (ranks.size - 1)
        for result in results:
            assert (result["scales"].tolist(), result["steps"]) == ([-1, 1, 1], 0)
            for name, array in results[0].items():
                np.testing.assert_array_equal(result[name], array, err_msg=name)

    def test_an_unprepared_optimizer_fails_at_its_first_real_update(self, ranks):
        result = ranks.the_same("unprepared")
        assert "prepare(optimizer)" in str(result["error"]) and not result["changed"]

    @pytest.mark.parametrize("which", ["all", "first"])
    def test_a_resumed_training_is_the_uninterrupted_one(self, ranks, which):
        result = ranks.the_same(f"resumption {which}")
        for name in [name for name in result if not name.startswith("whole ")]:
            np.testing.assert_array_equal(result[name], result[f"whole {name}"], err_msg=name)


def test_double_buffering_is_refused():
    program = """
import ada_loss.chainer
import chainer
from chainermn.optimizers import _DoubleBufferingOptimizer
optimizer = object.__new__(_DoubleBufferingOptimizer)
model = ada_loss.chainer.AdaLossScaled(chainer.links.Linear(2, 2))
vars(optimizer)["actual_optimizer"] = chainer.optimizers.SGD().setup(model)
try:
    ada_loss.chainer.prepare(optimizer)
except ValueError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "double_buffering=False" in run.stdout, run.stderr


def test_one_process_needs_no_mpi():
    program = "import sys, ada_loss.chainer, toy; toy.prepared(toy.training());"
    run = subprocess.run(
        [sys.executable, "-c", program + "sys.exit('mpi4py' in sys.modules)"],
        env={**os.environ, **ENVIRONMENT},
        timeout=100,
    )
    assert run.returncode == 0
