"""Networks that every target of `jaxprune.export` must compute as JAX does."""

from flax import nnx

import jaxprune
from jaxprune import models, structure
from tests.support import phones
from tests.support.zoo import filled

FORMS = ["dense", "masked", "compacted"]


def module_of(build):
    """A module whose norms are not trivial, as a function and variables."""
    module = build(rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    module = nnx.merge(graph, filled(state))
    module.eval()
    own = structure.from_nnx(module)
    return own.evaluate, own.variables


def thin_mobilenet(name):
    def build(rngs):
        widths = models.widths.default_widths(name)
        blocks = tuple(tuple(max(4, own // 16) for own in block) for block in widths.blocks)
        head = None if widths.head is None else 64
        widths = widths._replace(stem=8, blocks=blocks, head=head)
        return models.MobileNet(name, num_classes=10, widths=widths, rngs=rngs)

    return build


NETWORKS = {
    "resnet20": (lambda rngs: models.resnet20(num_classes=10, in_channels=1, rngs=rngs), (28, 1)),
    "mobilenet_v1": (thin_mobilenet("mobilenet_v1"), (32, 3)),
    "mobilenet_v2": (thin_mobilenet("mobilenet_v2"), (32, 3)),
    "vit": (
        lambda rngs: models.ViT(
            16, [(2, 32)], head_dim=8, patch=4, image_size=8, num_classes=10, rngs=rngs
        ),
        (8, 3),
    ),
}


def network(name, form, batch):
    """A function, its variables, masks or None, and images, for a name and one of `FORMS`."""
    build, (size, channels) = NETWORKS[name]
    apply, variables = module_of(build)
    x = phones.images(batch, size, channels)
    if form == "masked":
        _, own = jaxprune.prune(variables["params"], 0.9)
        return apply, variables, {key: own if key == "params" else True for key in variables}, x
    if form == "compacted":
        groups = structure.find_groups(apply, variables, x)
        scores = structure.filter_norms(groups, variables, order=2)
        plan = groups.plan(structure.keep_global(groups, scores, 0.5))
        apply, variables = plan.wrap(apply), plan.compact(variables)
    return apply, variables, None, x
