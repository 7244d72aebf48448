"""The arms of `study.py headline`: what each is, what it needs, and its options of train.py."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# Every layer alike: a global ranking keeps most weights of the layers that take most time.
KERNELS = "--granularity weights --kernels auto --budget uniform".split()
SHRINKS = ["--granularity", "channels", "--compact"]
# Of a ResNet's narrowest groups half are 4 channels.
GROWS = "--granularity channels --multiple 4 --grow-from 0.5 --grow-at 0.1".split()

Summaries = Mapping[str, Mapping[str, Any]]  # name of an arm -> summary.json of its run


class Arm(NamedTuple):
    """One way to train."""

    about: str
    needs: tuple[str, ...]  # arms that must be finished before
    options: Callable[[Summaries], list[str]]
    levers: bool = False


def arms(*, levers: bool, timed: bool = False) -> dict[str, Arm]:
    """Returns all arms in the order of the table; names with a + are those with levers."""
    found: dict[str, Arm] = {}
    for plus in ["", "+"] if levers else [""]:
        found |= _main_arms(plus, timed)
        if timed and plus == ("+" if levers else ""):
            found |= _variants(plus)
        if not plus and not timed:
            found |= _others("")
            found["agip, masks only"] = Arm(
                "as agip, and nothing is removed", (), lambda _: [*method("agip"), *SHRINKS[:2]]
            )
    return found


def _main_arms(plus: str, timed: bool) -> dict[str, Arm]:
    """Returns the arms of both sets, those with levers and those without."""
    agip, dense = f"agip{plus}", f"dense{plus}"
    found = {
        dense: Arm("the dense network", (), lambda _: method("none"), bool(plus)),
        agip: Arm(
            "channels are removed while it trains",
            (),
            lambda _: [*method("agip"), *SHRINKS],
            bool(plus),
        ),
        f"narrow{plus}": Arm(
            "a network with the final widths of agip, from scratch",
            (agip,),
            lambda done: [*method("none"), *widths(done[agip])],
            bool(plus),
        ),
    }
    if not timed:
        found[f"dense{plus}, time of {agip}"] = Arm(
            "the dense network, stopped when agip is done",
            (dense, agip),
            lambda done: [*method("none"), *steps_in_time(done, plus)],
            bool(plus),
        )
    elif not plus:
        found["dense, same time"] = Arm(
            "the dense network in the time of all other arms", (), lambda _: method("none")
        )
    return found


def _others(plus: str) -> dict[str, Arm]:
    """Returns the controls that rank channels in a different way."""
    return {
        f"{name}{plus}": Arm(
            f"as agip{plus}, {how}", (), lambda _, name=name: [*method(name), *SHRINKS], bool(plus)
        )
        for name, how in {"magnitude": "by magnitude", "random": "at random"}.items()
    }


def _variants(plus: str) -> dict[str, Arm]:
    """Returns what else is tried at equal time, each beside what it changes."""
    shrinks, on = [*method("agip"), *SHRINKS], bool(plus)
    single = ["--granularity", "weights", "--sparsity", "0.76"]
    wide, agip = f"agip global{plus}", f"agip{plus}"
    return _others(plus) | {
        f"grow{plus}": Arm(
            f"a network with the final widths of {agip}, which has half of its channels at first",
            (agip,),
            lambda done: [*method("none"), *GROWS, *widths(done[agip])],
            on,
        ),
        wide: Arm(
            "one ranking of all channels, so that groups keep different fractions",
            (),
            lambda _: [*shrinks, "--budget", "global", "--multiple", "4"],
            on,
        ),
        f"narrow global{plus}": Arm(
            f"a network with the final widths of {wide}, from scratch",
            (wide,),
            lambda done: [*method("none"), *widths(done[wide])],
            on,
        ),
        f"agip regrow{plus}": Arm(
            "as agip, and masked channels may come back",
            (),
            lambda _: [*shrinks, "--regrow", "0.3"],
            on,
        ),
        f"agip teacher{plus}": Arm(
            f"as {agip}, and the wide network teaches the narrow one; averages of the parameters "
            "teach and are evaluated",
            (),
            lambda _: [*shrinks, "--teacher", "0.5", "--ema", "0.99"],
            on,
        ),
        f"agip early{plus}": Arm(
            "as agip, with a wide phase of half the length",
            (),
            lambda _: [*shrinks, "--prune-start", "0.015", "--prune-stop", "0.05"],
            on,
        ),
        f"agip fine{plus}": Arm(
            "fewer channels go, then single weights of what is left",
            (),
            lambda _: [*shrinks, *"--sparsity 0.25 --multiple 4 --fine-sparsity 0.5".split()],
            on,
        ),
        **{
            f"agip kernels {share}{plus}": Arm(
                f"{share} % of single weights are pruned early, and sparse kernels skip them",
                (),
                lambda _, share=share: [*method("agip"), *KERNELS, "--sparsity", f"0.{share}"],
                on,
            )
            for share in (80, 90)
        },
        f"agip slow kernels 80{plus}": Arm(
            "80 % of single weights are pruned by 45 % of the run, and sparse kernels skip them",
            (),
            lambda _: [*method("agip"), *KERNELS, "--sparsity", "0.8", "--prune-stop", "0.45"],
            on,
        ),
        f"agip weights{plus}": Arm(
            "single weights are pruned, 76 % of them", (), lambda _: [*method("agip"), *single], on
        ),
    }


def method(name: str) -> list[str]:
    """Returns the options of a method."""
    return ["--method", name]


def widths(summary: Mapping[str, Any]) -> list[str]:
    """Returns the options of a network as wide as that of a finished run."""
    return ["--widths", json.dumps(summary["widths"])]


def steps_in_time(done: Summaries, plus: str) -> list[str]:
    """Returns the options of a dense run that takes as long as agip did, with compilation."""
    dense, agip = done[f"dense{plus}"], done[f"agip{plus}"]
    clock = clock_of(dense)
    each = (dense[clock] - dense["startup"]) / dense["steps"]
    return ["--steps", str(max(1, round((agip[clock] - dense["startup"]) / each)))]


def known_arms() -> dict[str, Arm]:
    """Returns the arms of all kinds of studies, in the order of the tables."""
    kinds = [arms(levers=on, timed=timed) for on in (True, False) for timed in (False, True)]
    found: dict[str, Arm] = {}
    for kind in kinds:
        found |= {name: arm for name, arm in kind.items() if name not in found}
    return found


def clock_of(summary: Mapping[str, Any]) -> str:
    """Returns what time is measured by: on CPU that of the process, whatever else is running."""
    return "cpu_seconds" if summary["device"].endswith("cpu") else "seconds"
