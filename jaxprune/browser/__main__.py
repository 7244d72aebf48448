"""Converts saved networks for the page, where the extra `litert` is installed.

python -m jaxprune.browser FOLDER NAME [NAME ...]
"""

import argparse
import sys
from collections.abc import Sequence

from jaxprune.browser._networks import convert


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m jaxprune.browser", description=__doc__, formatter_class=form
    )
    parser.add_argument("folder", help="folder of `browser.save`")
    parser.add_argument("names", nargs="+", metavar="NAME", help="saved networks, in order")
    parser.add_argument("--values", default="float32", choices=("float32", "int8"))
    parser.add_argument("--classes", nargs="*", default=[], help="names of the classes")
    options = parser.parse_args(args)
    try:
        convert(options.folder, options.names, values=options.values, classes=options.classes)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
