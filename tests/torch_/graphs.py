"""Random graphs: every value is a matrix of ROWS by COLUMNS, so that any operation can follow any other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

ROWS, COLUMNS = 4, 16


class Square(torch.autograd.Function):
    """Differentiates itself by what it saved."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Clipping(torch.autograd.Function):
    """Its backward pass is not linear in the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-0.01, 0.01) / gradient.norm().clamp(min=1.0)


class Recomputing(torch.autograd.Function):
    """Starts a backward pass within backward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.tanh(x @ weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            y = torch.tanh(x @ weight)
        return torch.autograd.grad(y, (x, weight), gradient)


def images(x):
    return x.reshape(ROWS, 1, 4, 4)


def heads(x):
    return x.reshape(ROWS, 2, 2, 4)


def inside(x, change):
    """A copy of x, changed in place."""
    copy = x.clone()
    change(copy)
    return copy


UNARY = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "exp": lambda x: torch.exp(-x.abs()),
    "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, (COLUMNS,)),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "group_norm": lambda x: F.group_norm(images(x).expand(-1, 2, -1, -1), 2)[:, 1].reshape(ROWS, COLUMNS),
    "max_pool": lambda x: F.max_pool2d(images(x), 3, 1, 1).reshape(ROWS, COLUMNS),
    "avg_pool": lambda x: F.avg_pool2d(images(x), 3, 1, 1).reshape(ROWS, COLUMNS),
    "mean": lambda x: x - x.mean(0, keepdim=True),
    "sum": lambda x: x + x.sum(-1, keepdim=True),
    "norm": lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1.0),
    "times": lambda x: x * 0.3,
    "by_zero": lambda x: x + 0.0 * x,
    "divided": lambda x: x / 7,
    "negative": lambda x: -x,
    "squared": lambda x: x.pow(2) * 0.1,
    "cumsum": lambda x: x.cumsum(-1),
    "transposed": lambda x: x.t().reshape(ROWS, COLUMNS),
    "rolled": lambda x: torch.roll(x, 3, -1),
    "sorted": lambda x: x.sort(-1).values,
    "gathered": lambda x: x[:, [3] * 4 + list(range(12))],
    "sliced": lambda x: torch.cat([x[:, 8:], x[:, :8] * 2], 1),
    "stacked": lambda x: torch.stack(x.unbind(0)[::-1]),
    "split": lambda x: torch.cat([part.sin() for part in x.split(5, 1)], 1),
    "unfolded": lambda x: F.unfold(images(x), 3, padding=1).sum(1),
    "padded": lambda x: F.pad(x, (2, 2))[:, :COLUMNS],
    "upsampled": lambda x: F.interpolate(images(x), scale_factor=2, mode="bilinear")[..., ::2, ::2].reshape(
        ROWS, COLUMNS
    ),
    "in_place": lambda x: inside(x, lambda y: y[:, 2:5].mul_(3)),
    "overwritten": lambda x: inside(x, lambda y: y[1].copy_(x[0] * 2)),
    "filled": lambda x: inside(x, lambda y: y[:, 0].zero_()),
    "masked": lambda x: x.masked_fill(x > 1, 0.5),
    "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "detached": lambda x: x + x.detach(),
    "attention": lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x)).reshape(
        ROWS, COLUMNS
    ),
    "checkpoint": lambda x: checkpoint(lambda y: torch.tanh(y * 2), x, use_reentrant=False),
    "reentrant": lambda x: checkpoint(lambda y: torch.tanh(y * 2), x, use_reentrant=True),
    "custom": Square.apply,
    "clipping": Clipping.apply,
}

BINARY = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - 2 * y,
    "multiply": lambda x, y: x * y,
    "divide": lambda x, y: x / (1 + y * y),
    "maximum": torch.maximum,
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "matrix": lambda x, y: x @ y.t() @ x * 0.1,
    "cat": lambda x, y: torch.cat([x, y], 1)[:, ::2],
    "stack": lambda x, y: torch.stack([x, y]).mean(0),
    "accumulate": lambda x, y: inside(x, lambda z: z.add_(y)),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "outer": lambda x, y: torch.einsum("bi,bj->bij", x, y).mean(1),
    "index_put": lambda x, y: x.index_put((torch.tensor([1, 1, 2]),), y[:3], accumulate=True),
    "scatter": lambda x, y: x.scatter_add(1, torch.zeros(ROWS, 3, dtype=torch.long), y[:, :3]),
}

WEIGHTED = {
    "linear": lambda x, w: F.linear(x, w),
    "matmul": lambda x, w: x @ w,
    "batched": lambda x, w: torch.bmm(x.reshape(2, 2, COLUMNS), w.expand(2, -1, -1)).reshape(ROWS, COLUMNS),
    "conv": lambda x, w: F.conv2d(images(x), w[:3, :9].reshape(3, 1, 3, 3), padding=1)[:, 1].reshape(
        ROWS, COLUMNS
    ),
    "grouped": lambda x, w: F.conv1d(
        x.reshape(ROWS, 4, 4), w[:4, :3].reshape(4, 1, 3), w[0, :4], padding=1, groups=4
    ).reshape(ROWS, COLUMNS),
    "transposed_conv": lambda x, w: F.conv_transpose2d(images(x), w[:2, :9].reshape(1, 2, 3, 3), padding=1)[
        :, 0
    ].reshape(ROWS, COLUMNS),
    "embedding": lambda x, w: x + F.embedding(torch.tensor([1, 3, 3, 0]), w),
    "affine_norm": lambda x, w: F.layer_norm(x, (COLUMNS,), w[0], w[1]),
    "affine_batch": lambda x, w: F.batch_norm(x, None, None, w[0], w[1], training=True),
    "scaled": lambda x, w: x * w[2],
    "recomputing": Recomputing.apply,
    "bilinear": lambda x, w: F.bilinear(x, x, w.expand(COLUMNS, -1, -1)) * 0.1,
}


@dataclass(frozen=True)
class Graph:
    """Operations, each with the values that it takes, by index, and the parameter that it uses."""

    steps: tuple[tuple[str, str, int, int, int], ...]
    parameters: int

    def __call__(self, x, parameters):
        """The sum of the last values, those that nothing else uses among them."""
        values = [x]
        for kind, name, first, second, parameter in self.steps:
            left, right = values[first % len(values)], values[second % len(values)]
            if kind == "unary":
                values.append(UNARY[name](left))
            elif kind == "binary":
                values.append(BINARY[name](left, right))
            else:
                values.append(WEIGHTED[name](left, parameters[parameter % len(parameters)]))
        return sum(value.square().mean() for value in values[-3:])


def _steps(kind, names):
    index = st.integers(0, 20)
    return st.tuples(st.just(kind), st.sampled_from(sorted(names)), index, index, index)


graphs = st.builds(
    Graph,
    st.lists(
        _steps("unary", UNARY) | _steps("binary", BINARY) | _steps("weighted", WEIGHTED),
        min_size=1,
        max_size=12,
    ).map(tuple),
    st.integers(1, 3),
)
