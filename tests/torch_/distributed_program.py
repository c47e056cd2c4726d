"""One of several processes that train together by PyTorch's own engines; writes what came of every scenario.

    python distributed_program.py RANK WORLD_SIZE FOLDER PREFIX

Scenarios whose names begin with the prefix run one after the other.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import nullcontext
from inspect import signature
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional_collectives
from torch.distributed import checkpoint
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import ada_loss.torch
from torch_.nets import cross_entropy, loss_of, make

SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def my_part(tensor):
    """The rank's part of a batch."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def problem():
    """The same network and batch in every process, and in the test that checks what came of them."""
    torch.manual_seed(5)
    return make("transformer")


def train_step(net, *, exponent=-30, hook=None, inputs=None):
    """A backward pass of the rank's part; the scaler that made it."""
    _, x, target = problem()
    ddp = DistributedDataParallel(net)
    if hook is not None:
        ddp.register_comm_hook(None, hook)
    scaler = ada_loss.torch.GradScaler("cpu")
    scaler.scale(loss_of(ddp, my_part(x), my_part(target), exponent)).backward()
    return scaler


def gradients(net):
    return {name: parameter.grad for name, parameter in net.named_parameters()}


@scenario
def ddp():
    net, _, _ = problem()
    train_step(net)
    return gradients(net)


@scenario
def ddp_with_a_hook():
    net, _, _ = problem()
    train_step(net, hook=default_hooks.allreduce_hook)
    return gradients(net)


@scenario
def ddp_with_float16_between_processes():
    net, _, _ = problem()
    train_step(net, hook=default_hooks.fp16_compress_hook)
    return gradients(net)


@scenario
def ddp_of_float16_parameters():
    net, _, _ = problem()
    train_step(net.half())
    return gradients(net)


@scenario
def ddp_that_accumulates():
    net, x, target = problem()
    ddp = DistributedDataParallel(net)
    scaler = ada_loss.torch.GradScaler("cpu")
    for last in (False, True):
        with nullcontext() if last else ddp.no_sync():
            scaler.scale(loss_of(ddp, my_part(x), my_part(target), -30)).backward()
    return gradients(net)


@scenario
def ddp_where_one_process_overflows():
    net, _, _ = problem()
    before = [parameter.clone() for parameter in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scaler = train_step(net, exponent=200 if dist.get_rank() == 0 else 0)
    scaler.step(optimizer)
    scaler.update()
    same = all(map(torch.equal, before, net.parameters()))
    return {"skipped": scaler.skipped, "unchanged": same}


def sharded(net, param_dtype=torch.float16, reduce_dtype=None):
    policy = MixedPrecisionPolicy(param_dtype, reduce_dtype)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in net.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(net, mesh=mesh, mp_policy=policy)


def fsdp_step(net, *, exponent=-30):
    """A backward pass of the rank's part; the scaler that made it."""
    _, x, target = problem()
    scaler = ada_loss.torch.GradScaler("cpu")
    loss = cross_entropy(net(my_part(x)), my_part(target)) * 2.0**exponent
    scaler.scale(loss).backward()
    return scaler


def whole(tensors):
    return {name: tensor.detach().full_tensor() for name, tensor in tensors.items()}


@scenario
def fsdp():
    net = sharded(problem()[0], reduce_dtype=torch.float32)
    fsdp_step(net)
    return whole(gradients(net))


@scenario
def fsdp_that_accumulates():
    net = sharded(problem()[0], reduce_dtype=torch.float32)
    for last in (False, True):
        net.set_requires_gradient_sync(last)
        fsdp_step(net)
    return whole(gradients(net))


@scenario
def fsdp_that_goes_on_from_a_checkpoint(folder):
    """A run of two steps, and one that stops after the first, is saved and loaded elsewhere, and goes on."""

    def parts():
        net = sharded(problem()[0], reduce_dtype=torch.float32)
        return net, torch.optim.AdamW(net.parameters(), lr=1e-3), ada_loss.torch.GradScaler("cpu")

    def step(net, optimizer, scaler):
        _, x, target = problem()
        optimizer.zero_grad()
        scaler.scale(cross_entropy(net(my_part(x)), my_part(target))).backward()
        scaler.step(optimizer)
        scaler.update()

    def state_of(net, optimizer, scaler):
        model, optimizer = get_state_dict(net, optimizer)
        return {"model": model, "optimizer": optimizer, "scaler": scaler.state_dict()}

    straight = parts()
    step(*straight)
    checkpoint.save(state_of(*straight), checkpoint_id=folder / "saved")
    step(*straight)
    resumed = parts()
    state = state_of(*resumed)
    checkpoint.load(state, checkpoint_id=folder / "saved")
    net, optimizer, scaler = resumed
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    step(*resumed)
    return [whole(dict(run[0].named_parameters())) for run in (straight, resumed)]


@scenario
def fsdp_that_clips_and_steps():
    net = sharded(problem()[0], reduce_dtype=torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scaler = fsdp_step(net, exponent=10)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.25)
    scaler.step(optimizer)
    scaler.update()
    return {
        "norm": norm.full_tensor(),
        "skipped": scaler.skipped,
        "after": whole(dict(net.named_parameters())),
    }


@scenario
def fsdp_where_one_process_overflows():
    net = sharded(problem()[0], reduce_dtype=torch.float32)
    before = whole(dict(net.named_parameters()))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scaler = fsdp_step(net, exponent=0)
    # In one process only, where no reduction would tell the others.
    if dist.get_rank() == 0:
        net.out.weight.grad.to_local().fill_(float("inf"))
    scaler.step(optimizer)
    scaler.update()
    after = whole(dict(net.named_parameters()))
    return {"skipped": scaler.skipped, "unchanged": all(torch.equal(before[n], after[n]) for n in before)}


@scenario
def fsdp_asked_to_reduce_in_float16():
    """Parameters are of float16 as well, so that FSDP2 reduces in the gradients' own dtype, float32."""
    net = sharded(problem()[0], reduce_dtype=torch.float16)
    fsdp_step(net)
    return whole(gradients(net))


def summed_backward(add_up):
    """A function of autograd's whose gradient is added up over processes, as synchronized layers do it."""

    class Summed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return add_up(gradient)

    return Summed.apply


def step_with(add_up):
    net, x, _ = problem()
    weight = net.out.weight
    with torch.autocast("cpu", torch.float16):
        output = summed_backward(add_up)(net.embedding(my_part(x)).half() @ weight.t())
        loss = output.float().sum() * 2.0**-30
    ada_loss.torch.GradScaler("cpu").scale(loss).backward()
    return {"weight": weight.grad}


@scenario
def ddp_with_a_functional_collective():
    return step_with(lambda gradient: functional_collectives.all_reduce(gradient, "sum", dist.group.WORLD))


@scenario
def ddp_with_a_collective_in_place():
    def add_up(gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient

    return step_with(add_up)


@scenario
def ddp_with_a_buffer_in_float16():
    def add_up(gradient):
        buffer = torch.empty(gradient.shape, dtype=torch.float16)
        dist.all_gather([buffer] * dist.get_world_size(), gradient)
        return buffer

    return step_with(add_up)


@scenario
def fsdp_that_reduces_float32_in_float16():
    fsdp_step(sharded(problem()[0], torch.float32, torch.float16))


@scenario
def fsdp_of_float16_parameters():
    net = sharded(problem()[0].half(), reduce_dtype=torch.float32)
    scaler = fsdp_step(net)
    scaler.step(torch.optim.SGD(net.parameters(), lr=1.0))


def main(rank, world_size, folder, prefix):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world_size)
    for name in filter(lambda name: name.startswith(prefix), SCENARIOS):
        try:
            function = SCENARIOS[name]
            result = function(folder) if signature(function).parameters else function()
        except RuntimeError as error:
            traceback.print_exc()
            result = str(error)
        torch.save(result, folder / f"{name}-{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
