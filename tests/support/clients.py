"""One small network in four frameworks, each with the training loop that its users write.

A convolution, a norm, a hidden layer and a head, for images of 6 x 6 pixels and 4 classes. A
`Client` has what `tests/test_clients.py` asks of every framework; nothing in it is particular to
pruning but the calls that users would make.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

from jaxprune import structure

IMAGES = jax.random.normal(jax.random.key(0), (16, 6, 6, 3))
# Classes that can be learnt: the colour that is brightest on average, or none of them.
MEANS = jnp.mean(IMAGES, (1, 2))
LABELS = jnp.where(jnp.max(MEANS, 1) > 0, jnp.argmax(MEANS, 1), 3)


def cross_entropy(logits: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, LABELS))


class Client:
    """A network that trains; `small` makes the same client of fewer channels.

    `variables` is the tree of all arrays, `params` the part that the optimizer sees, which lies at
    the path `under` in the variables.
    """

    under = ""
    variables: Any
    tx: Any
    opt_state: Any
    step: Callable[..., Any]
    evaluate: Callable[..., Any]  # (variables, images) -> logits
    traces: list[structure.Trace]

    @property
    def params(self) -> Any:
        return self.variables[self.under] if self.under else self.variables

    def with_params(self, params: Any) -> Any:
        return self.variables | {self.under: params} if self.under else params

    def fit(self, steps: int) -> list[float]:
        return [float(self.step()) for _ in range(steps)]

    def small(self, plan: structure.Plan, groups: structure.Groups) -> "Client":
        raise NotImplementedError


# ---- Linen: a TrainState with statistics beside the parameters


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.relu(nn.Dense(16)(jnp.mean(x, (1, 2))))
        return nn.Dense(4)(x)


class LinenState(TrainState):
    batch_stats: Any


class Linen(Client):
    under = "params"

    def __init__(self, tx: Any, net: Any = None) -> None:
        model, self.tx = LinenNet(), tx
        self.evaluate = lambda variables, x: model.apply(variables, x, train=False)
        self.train = lambda variables, x: model.apply(
            variables, x, train=True, mutable=["batch_stats"]
        )
        self.traces = [
            structure.Trace(self.evaluate, (IMAGES,)),
            structure.Trace(self.train, (IMAGES,), lambda output: output[1]),
        ]
        self._start(jax.jit(model.init, static_argnums=2)(jax.random.key(1), IMAGES, False))

    def _start(self, variables: Any, opt_state: Any = None, steps: int = 0) -> None:
        state = LinenState.create(
            apply_fn=self.train,
            params=variables["params"],
            tx=self.tx,
            batch_stats=variables["batch_stats"],
        )
        if opt_state is not None:
            state = state.replace(opt_state=opt_state, step=steps)
        self.state, self.step = state, self._train_one
        self._jitted = jax.jit(self._next)

    @staticmethod
    def _next(state: LinenState) -> Any:
        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updates = state.apply_fn(variables, IMAGES)
            return cross_entropy(logits), updates

        (value, updates), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        state = state.apply_gradients(grads=gradients)
        return state.replace(batch_stats=updates["batch_stats"]), value

    def _train_one(self) -> Any:
        self.state, value = self._jitted(self.state)
        return value

    @property
    def variables(self) -> Any:
        return {"params": self.state.params, "batch_stats": self.state.batch_stats}

    @property
    def opt_state(self) -> Any:
        return self.state.opt_state

    def small(self, plan, groups):
        new = object.__new__(Linen)
        new.tx = self.tx
        new.evaluate, new.train = plan.wrap(self.evaluate), plan.wrap(self.train)
        state, restarted = structure.compact_state(
            plan, self.tx, self.opt_state, self.params, under="params", groups=groups
        )
        assert restarted == ()
        new._start(plan.compact(self.variables), state, int(self.state.step))
        return new


# ---- NNX: a module that is updated in place, and its optimizer


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.hidden = nnx.Linear(8, 16, rngs=rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(nnx.relu(self.hidden(jnp.mean(x, (1, 2)))))


@nnx.jit
def nnx_step(model: Any, optimizer: nnx.Optimizer) -> jax.Array:
    value, gradients = nnx.value_and_grad(lambda model: cross_entropy(model(IMAGES)))(model)
    optimizer.update(model, gradients)
    return value


class NNX(Client):
    under = "params"

    def __init__(self, tx: Any) -> None:
        model = NNXNet(nnx.Rngs(1))
        self._start(model, nnx.Optimizer(model, tx, wrt=nnx.Param))

    def _start(self, model: Any, optimizer: Any) -> None:
        self.model, self.optimizer, self.tx = model, optimizer, optimizer.tx
        self.pure = structure.from_nnx(model)
        self.evaluate, self.traces = self.pure.evaluate, self.pure.traces(IMAGES)
        self.step = self._train_one

    def _train_one(self) -> Any:
        self.model.train()
        return nnx_step(self.model, self.optimizer)

    @property
    def variables(self) -> Any:
        return structure.from_nnx(self.model).variables

    @property
    def opt_state(self) -> Any:
        return self.optimizer.opt_state

    def small(self, plan, groups):
        new = object.__new__(NNX)
        model = self.pure.module(plan, self.variables, IMAGES)
        optimizer, restarted = self.pure.optimizer(plan, self.optimizer, model, groups=groups)
        assert restarted == ()
        new._start(model, optimizer)
        return new


# ---- Equinox: a module that is a tree, functions and all


class EquinoxNet(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    hidden: eqx.nn.Linear
    hidden_norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear
    activation: Callable[..., Any]
    dropout: eqx.nn.Dropout

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv2d(3, 8, 3, padding=1, key=keys[0])
        self.norm = eqx.nn.LayerNorm(8)
        self.hidden = eqx.nn.Linear(8, 16, key=keys[1])
        self.hidden_norm = eqx.nn.BatchNorm(16, axis_name="batch", mode="batch", momentum=0.9)
        self.head = eqx.nn.Linear(16, 4, key=keys[2])
        self.activation = jax.nn.relu
        self.dropout = eqx.nn.Dropout(0.5, inference=True)

    def __call__(self, x, state):
        x = self.conv(jnp.moveaxis(x, 2, 0)).reshape(len(self.conv.weight), -1)
        x = self.activation(jax.vmap(self.norm, 1, 1)(x))
        x, state = self.hidden_norm(self.hidden(jnp.mean(x, 1)), state)
        return self.head(self.dropout(self.activation(x))), state


@eqx.filter_jit
def equinox_step(model: Any, state: Any, opt_state: Any, tx: Any, function: Any) -> Any:
    @functools.partial(eqx.filter_value_and_grad, has_aux=True)
    def loss(model):
        arrays = eqx.filter(model, eqx.is_inexact_array)
        logits, new = function({"arrays": arrays, "state": state}, IMAGES)
        return cross_entropy(logits), new["state"]

    (value, state), gradients = loss(model)
    updates, opt_state = tx.update(gradients, opt_state, model)  # the whole module
    return eqx.apply_updates(model, updates), state, opt_state, value


class Equinox(Client):
    under = "arrays"

    def __init__(self, tx: Any) -> None:
        model, state = eqx.nn.make_with_state(EquinoxNet)(jax.random.key(1))
        arrays, static = eqx.partition(model, eqx.is_inexact_array)
        self.tx = tx

        def apply(model, state, x):
            options = {"in_axes": (0, None), "out_axes": (0, None), "axis_name": "batch"}
            return jax.vmap(model, **options)(x, state)

        def evaluate(variables, x):
            model = eqx.nn.inference_mode(eqx.combine(variables["arrays"], static))
            return apply(model, variables["state"], x)[0]

        def train(variables, x):
            model = eqx.combine(variables["arrays"], static)
            logits, state = apply(model, variables["state"], x)
            return logits, {"state": state}

        self.traces = [
            structure.Trace(evaluate, (IMAGES,)),
            structure.Trace(train, (IMAGES,), lambda output: output[1]),
        ]
        self._start(model, state, tx.init(arrays), evaluate, train)

    def _start(self, model: Any, state: Any, opt_state: Any, evaluate: Any, train: Any) -> None:
        self.model, self.state, self.opt_state = model, state, opt_state
        self.evaluate, self.train, self.step = evaluate, train, self._train_one

    def _train_one(self) -> Any:
        new = equinox_step(self.model, self.state, self.opt_state, self.tx, self.train)
        self.model, self.state, self.opt_state, value = new
        return value

    @property
    def variables(self) -> Any:
        return {"arrays": eqx.filter(self.model, eqx.is_inexact_array), "state": self.state}

    def small(self, plan, groups):
        new = object.__new__(Equinox)
        new.tx = self.tx
        # Its LayerNorm reads the width, so the module itself does not fit.
        assert not plan.fits(self.evaluate, self.variables, IMAGES)
        static = eqx.filter(self.model, eqx.is_inexact_array, inverse=True)
        opt_state, restarted = structure.compact_state(
            plan, self.tx, self.opt_state, self.params, under="arrays", groups=groups
        )
        assert restarted == ()
        small = plan.compact(self.variables)
        functions = plan.wrap(self.evaluate), plan.wrap(self.train)
        new._start(eqx.combine(small["arrays"], static), small["state"], opt_state, *functions)
        return new


# ---- Haiku: pure functions of parameters and state


def haiku_net(x: jax.Array, train: bool) -> jax.Array:
    x = hk.Conv2D(8, 3)(x)
    x = jax.nn.relu(hk.BatchNorm(True, True, decay_rate=0.9)(x, train))
    x = jax.nn.relu(hk.Linear(16)(jnp.mean(x, (1, 2))))
    return hk.Linear(4)(x)


class Haiku(Client):
    under = "params"

    def __init__(self, tx: Any) -> None:
        net, self.tx = hk.transform_with_state(haiku_net), tx
        params, state = jax.jit(net.init, static_argnums=2)(jax.random.key(1), IMAGES, True)

        def evaluate(variables, x):
            return net.apply(variables["params"], variables["state"], None, x, False)[0]

        def train(variables, x):
            logits, new = net.apply(variables["params"], variables["state"], None, x, True)
            return logits, {"state": new}

        self.traces = [
            structure.Trace(evaluate, (IMAGES,)),
            structure.Trace(train, (IMAGES,), lambda output: output[1]),
        ]
        self._start(evaluate, train, {"params": params, "state": state}, tx.init(params))

    def _start(self, evaluate: Any, train: Any, variables: Any, opt_state: Any) -> None:
        self.evaluate, self.train = evaluate, train
        self.variables, self.opt_state, self.step = variables, opt_state, self._train_one

        @jax.jit
        def step(variables, opt_state):
            def loss(params):
                logits, updates = train(variables | {"params": params}, IMAGES)
                return cross_entropy(logits), updates

            grad = jax.value_and_grad(loss, has_aux=True)
            (value, new), gradients = grad(variables["params"])
            updates, opt_state = self.tx.update(gradients, opt_state, variables["params"])
            params = optax.apply_updates(variables["params"], updates)
            return {"params": params, "state": new["state"]}, opt_state, value

        self._jitted = step

    def _train_one(self) -> Any:
        self.variables, self.opt_state, value = self._jitted(self.variables, self.opt_state)
        return value

    def small(self, plan, groups):
        new = object.__new__(Haiku)
        new.tx = self.tx
        state, restarted = structure.compact_state(
            plan, self.tx, self.opt_state, self.params, under="params", groups=groups
        )
        assert restarted == ()
        functions = plan.wrap(self.evaluate), plan.wrap(self.train)
        new._start(*functions, plan.compact(self.variables), state)
        return new


CLIENTS: dict[str, Callable[[Any], Client]] = {
    "linen": Linen,
    "nnx": NNX,
    "equinox": Equinox,
    "haiku": Haiku,
}


def flat(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
