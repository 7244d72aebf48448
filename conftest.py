"""What docstring examples need: small trainings, and packages that may not be installed."""

import pytest

# Files of jaxprune/export/ -> the package that their examples need.
_EXPORT = {
    "_tflite": "litert_converter",
    "_litert": "litert_converter",
    "_conditions": "litert_converter",
    "_onnx": "jax2onnx",
    "_jax": "flatbuffers",
    "_safetensors": "safetensors",
}


@pytest.fixture(autouse=True)
def rewinding_example(request, tmp_path):
    """The names `task` and `workdir`."""
    if not request.node.nodeid.startswith("jaxprune/rewinding/"):
        return
    # Not above: tests/conftest.py sets flags that JAX reads when it is imported.
    import jax
    import jax.numpy as jnp
    import optax

    import jaxprune
    from jaxprune import rewinding

    schedule = rewinding.hold(optax.cosine_decay_schedule(0.1, decay_steps=20), 20)
    optimizer = jaxprune.chain(optax.sgd(schedule), jaxprune.fixed_mask_transform())

    def init(number):
        params = {"kernel": jax.random.normal(jax.random.key(number), (10, 10))}
        return {"params": params, "opt_state": optimizer.init(params)}

    def train(state, start, stop, number):
        del number  # the data are always the same
        for _ in range(start, stop):
            grads = jax.tree.map(lambda weight: weight - jnp.eye(10), state["params"])
            updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
            params = optax.apply_updates(state["params"], updates)
            state = {"params": params, "opt_state": opt_state}
        return state

    def evaluate(state):
        return -float(jnp.abs(state["params"]["kernel"] - jnp.eye(10)).mean())

    task = rewinding.Task(
        init, train, evaluate, schedule, steps=20, description={"data": "the identity"}
    )
    names = request.getfixturevalue("doctest_namespace")
    names.update(task=task, workdir=tmp_path)


@pytest.fixture(autouse=True)
def search_example(request):
    """The names `problem` and `evaluate`: a network whose first layer has free channels."""
    if not request.node.nodeid.startswith("jaxprune/search/"):
        return
    import jax
    import jax.numpy as jnp

    from jaxprune import search, structure

    def apply(weights, x):
        hidden = jax.nn.relu(x @ weights["first"])
        return jax.nn.relu(hidden @ weights["second"]) @ weights["third"]

    keys = jax.random.split(jax.random.key(0), 4)
    weights = {
        "first": jax.random.normal(keys[0], (4, 16)) * (jnp.arange(16) < 8)[None],
        "second": jax.random.normal(keys[1], (16, 16)),
        "third": jax.random.normal(keys[2], (16, 3)),
    }
    x = jax.random.normal(keys[3], (32, 4))
    dense = apply(weights, x)

    @jax.jit
    def evaluate(weights):
        return -jnp.mean((apply(weights, x) - dense) ** 2)

    groups = structure.find_groups(apply, weights, x)
    problem = search.channels(
        groups,
        weights,
        search.find_layers(apply, weights, x[:1]),
        cost=structure.count_parameters,
        budget=0.6,
    )
    names = request.getfixturevalue("doctest_namespace")
    names.update(problem=problem, evaluate=evaluate, within=search.within)


@pytest.fixture(autouse=True)
def export_example(request):
    """Skips the examples of targets that are not installed; `make litert-check` has one."""
    module, _, name = request.node.nodeid.partition("::")
    needed = _EXPORT.get(module.removeprefix("jaxprune/export/").removesuffix(".py"))
    if module.startswith("jaxprune/export/") and needed and not name.endswith("Report"):
        pytest.importorskip(needed, reason=f"{needed} is not installed; see the Makefile")
