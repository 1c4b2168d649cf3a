"""Print the lower bounds that pyproject.toml promises, as pip's constraints."""

import pathlib
import re
import tomllib

PYPROJECT = pathlib.Path(__file__).parents[1] / "pyproject.toml"
NOT_FOR_USERS = ("test", "test-all", "docs", "dev")

project = tomllib.loads(PYPROJECT.read_text())["project"]
requirements = list(project["dependencies"])
for extra, more in project["optional-dependencies"].items():
    if extra not in NOT_FOR_USERS:
        requirements += more
for requirement in requirements:
    if bound := re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement):
        print("{}=={}".format(*bound.groups()))
