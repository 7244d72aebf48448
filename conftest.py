"""What the docstring examples of jaxprune.rewinding train: a linear model, in milliseconds."""

import pytest


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
