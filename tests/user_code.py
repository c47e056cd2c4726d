"""Functions as users write them: with passes of their own, and gradients written or changed by hand."""

import chainer
import numpy as np


def by_backward(y, gy):
    y.grad = gy
    y.backward()


def by_function(y, gy):
    y.grad = gy
    chainer.backward([y])


def by_function_with_gradients(y, gy):
    chainer.backward([y], [chainer.Variable(gy)])


WAYS = [by_backward, by_function, by_function_with_gradients]


class Again(chainer.FunctionNode):
    """Computes `f` again on the way back, in a pass of its own."""

    def __init__(self, f, go_back=by_backward):
        self.f, self.go_back = f, go_back

    def forward(self, inputs):
        self.retain_inputs(tuple(range(len(inputs))))
        with chainer.no_backprop_mode():
            return (self.f(*map(chainer.Variable, inputs)).array,)

    def backward(self, targets, gys):
        xs = [chainer.Variable(x.array) for x in self.get_retained_inputs()]
        with chainer.force_backprop_mode():
            y = self.f(*xs)
        self.go_back(y, gys[0].array)
        return tuple(xs[target].grad_var for target in targets)


class AgainInOldStyle(chainer.Function):
    """The same as a `Function`."""

    def __init__(self, f, go_back=by_backward):
        self.f, self.go_back = f, go_back

    def forward(self, inputs):
        with chainer.no_backprop_mode():
            return (self.f(*map(chainer.Variable, inputs)).array,)

    def backward(self, inputs, gys):
        xs = [chainer.Variable(x) for x in inputs]
        with chainer.force_backprop_mode():
            y = self.f(*xs)
        self.go_back(y, gys[0])
        return tuple(x.grad for x in xs)


def again(f, *xs, **keywords):
    return Again(f, **keywords).apply(xs)[0]


class ByHand(chainer.FunctionNode):
    """x @ W.T, that gives W its gradient by itself."""

    def __init__(self, W, write):
        self.W, self.write = W, write

    def forward(self, inputs):
        self.retain_inputs((0,))
        return ((inputs[0].astype("f") @ self.W.array.astype("f").T).astype(inputs[0].dtype),)

    def backward(self, targets, gys):
        (x,), gy = self.get_retained_inputs(), gys[0].array
        gW = (gy.astype("f").T @ x.array.astype("f")).astype(gy.dtype)
        self.write(self.W, gW)
        return (chainer.Variable((gy.astype("f") @ self.W.array.astype("f")).astype(gy.dtype)),)


def assign_or_add(W, gW):
    if W.grad is None:
        W.grad = gW
    else:
        W.grad += gW


def add_in_place(W, gW):
    if W.grad is None:
        W.grad = np.zeros_like(W.array)
    W.grad[...] += gW


def add_a_new_array(W, gW):
    W.grad = gW if W.grad is None else W.grad + gW


def add_by_method(W, gW):
    W.addgrad(chainer.Variable(np.zeros_like(gW), grad=gW))


def add_as_variable(W, gW):
    W.grad_var = chainer.Variable(gW if W.grad_var is None else W.grad_var.array + gW)


WRITES = [assign_or_add, add_in_place, add_a_new_array, add_by_method, add_as_variable]


class Changing(chainer.FunctionNode):
    """Its input, with a gradient that is changed on the way back."""

    def __init__(self, change):
        self.change = change
        self.calls = 0

    def forward(self, inputs):
        return inputs

    def backward(self, targets, gys):
        self.calls += 1
        return (chainer.Variable(self.change(gys[0].array).astype(gys[0].dtype)),)


def changing(change, x):
    return Changing(change).apply((x,))[0]
