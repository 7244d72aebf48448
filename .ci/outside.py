"""Uses the installed jaxprune, where there is no checkout; `make wheel` runs it."""

import sys
from importlib import metadata, resources

import jaxprune

[where] = jaxprune.__path__
assert where.startswith(sys.prefix), f"{where} is not the wheel's: it is outside of {sys.prefix}"
assert metadata.version("jaxprune") == jaxprune.__version__
for name in jaxprune.__all__:  # the lazy modules, too
    getattr(jaxprune, name)
assert resources.files(jaxprune).joinpath("py.typed").is_file()
installed = metadata.distribution("jaxprune").files or []
strangers = {file.parts[0] for file in installed} - {"jaxprune", "..", "__pycache__"}
assert all(name.endswith(".dist-info") for name in strangers), f"{strangers} in the wheel"
print(f"jaxprune {jaxprune.__version__}: {len(jaxprune.__all__)} names work in {where}")
