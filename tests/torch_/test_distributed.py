"""Training by PyTorch's own engines in several processes: true gradients, and steps that all of them skip."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_.asserts import assert_close, assert_same_bits, float32_gradients
from torch_.nets import loss_of, make

PROGRAM = Path(__file__).with_name("distributed_program.py")
ROOT = PROGRAM.parents[2]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no distributed"
)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def came_of(request, tmp_path_factory):
    """What every process got of a scenario; `ddp` and `fsdp` scenarios run in one program each."""

    @functools.cache
    def run(prefix):
        folder = tmp_path_factory.mktemp(prefix)
        _run_processes(request.param, folder, prefix)
        return folder

    def results(scenario):
        folder = run(scenario.partition("_")[0])
        return [torch.load(folder / f"{scenario}-{rank}.pt") for rank in range(request.param)]

    return results


def _run_processes(count, folder, prefix):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    logs = [(folder / f"log-{rank}").open("w") for rank in range(count)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), str(count), str(folder), prefix],
            env=environment,
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(count)
    ]
    try:
        statuses = [process.wait(timeout=240) for process in processes]
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    assert not any(statuses), "\n".join((folder / f"log-{rank}").read_text() for rank in range(count))


def one_process(exponent=-30):
    """The network, and its gradients for the whole batch in float32."""
    torch.manual_seed(5)
    net, x, target = make("transformer")
    return net, float32_gradients(net, lambda: loss_of(net, x, target, exponent, float16=False).backward())


@pytest.mark.parametrize(
    "scenario",
    [
        "ddp",
        "ddp_with_a_hook",
        "ddp_with_float16_between_processes",
        "fsdp",
        "fsdp_asked_to_reduce_in_float16",
    ],
)
def test_gradients_are_those_of_one_process(came_of, scenario):
    _, plain = one_process()
    for gradients in came_of(scenario):
        assert_close(gradients, plain, db=50)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_passes_without_reduction_add_up(came_of, engine):
    _, plain = one_process()
    for gradients in came_of(f"{engine}_that_accumulates"):
        assert_close(gradients, {name: 2 * gradient for name, gradient in plain.items()}, db=50)


@pytest.mark.parametrize("scenario", ["ddp_with_a_functional_collective", "ddp_with_a_collective_in_place"])
def test_a_collective_on_the_way_back_adds_true_gradients(came_of, scenario):
    net, x, _ = (torch.manual_seed(5), make("transformer"))[1]
    results = came_of(scenario)
    for result, part in zip(results, x.chunk(len(results)), strict=True):
        row = net.embedding(part).detach().sum((0, 1)) * 2.0**-30 * len(results)
        assert_close(result, {"weight": row.expand(50, -1)}, db=50)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_all_skip_the_step_in_which_one_overflows(came_of, engine):
    for result in came_of(f"{engine}_where_one_process_overflows"):
        assert result == {"skipped": 1, "unchanged": True}


def test_sharded_gradients_are_clipped_by_the_norm_of_all_of_them(came_of):
    net, plain = one_process(exponent=10)
    norm = torch.nn.utils.get_total_norm(plain.values())
    moved = {name: -0.25 * gradient / norm for name, gradient in plain.items()}
    for result in came_of("fsdp_that_clips_and_steps"):
        torch.testing.assert_close(result["norm"], norm, rtol=1e-2, atol=0)
        assert result["skipped"] == 0
        changes = {name: result["after"][name] - p.detach() for name, p in net.named_parameters()}
        assert_close(changes, moved, db=40)


def test_a_distributed_checkpoint_goes_on_as_if_nothing_had_happened(came_of):
    for straight, resumed in came_of("fsdp_that_goes_on_from_a_checkpoint"):
        assert_same_bits(resumed, straight)


@pytest.mark.parametrize(
    ("scenario", "advice"),
    [
        ("ddp_of_float16_parameters", "torch.autocast"),
        ("ddp_with_a_buffer_in_float16", "give it float32"),
        ("fsdp_that_reduces_float32_in_float16", "reduce_dtype=torch.float32"),
        ("fsdp_of_float16_parameters", "param_dtype=torch.float16"),
    ],
)
def test_what_would_lose_gradients_is_refused(came_of, scenario, advice):
    for message in came_of(scenario):
        assert isinstance(message, str) and advice in message
