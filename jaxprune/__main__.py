"""The commands of scripts/ where there is no clone: `python -m jaxprune train --help`."""

import importlib
import sys

# Command -> module of jaxprune.experiments, and what it does
COMMANDS = {
    "demo": ("demo", "train a small network twice, dense and pruned, and compare them"),
    "demo_browser": ("browser_demo", "run sparse networks in your browser and measure them"),
    "train": ("train", "train a network and prune it while it learns"),
    "study": ("studies.methods", "compare methods, sparsities and seeds at equal steps or time"),
    "rewind": ("studies.rewinding", "prune and train again in rounds, with controls"),
    "compact": ("studies.compaction", "remove channels of trained networks, by several scores"),
    "search": ("studies.search", "search how much each layer of trained networks keeps"),
    "elastic": ("studies.elastic", "train one elastic network, and cut it to any budget"),
    "export": ("export", "write a finished run as files for phones, browsers and servers"),
    "compile_for_tpu": ("ahead.compile", "compile the step for TPUs or GPUs that are not here"),
}


def main(args: list[str] | None = None) -> None:
    """Runs a command with the rest of the command line."""
    args = sys.argv[1:] if args is None else args
    lines = "\n".join(f"  {name:16} {about}" for name, (_, about) in COMMANDS.items())
    usage = f"usage: python -m jaxprune COMMAND [options], or COMMAND --help\n\n{lines}"
    if not args or args[0] in ("-h", "--help"):
        print(usage)
        return
    if args[0] not in COMMANDS:
        print(f"error: {args[0]!r} is no command of jaxprune.\n\n{usage}", file=sys.stderr)
        sys.exit(2)
    name, *rest = args
    try:
        module = importlib.import_module(f"jaxprune.experiments.{COMMANDS[name][0]}")
    except ModuleNotFoundError as error:
        print(
            f"error: `python -m jaxprune {name}` needs {error.name}, which is not installed; "
            "`pip install 'jaxprune[train]'` installs it.",
            file=sys.stderr,
        )
        sys.exit(1)
    sys.argv[0] = f"python -m jaxprune {name}"
    module.main(rest)


if __name__ == "__main__":
    main()
