"""Print the lower bounds of pyproject.toml as pip's constraints: `python .ci/oldest.py`."""

import pathlib
import re
import tomllib

project = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())[
    "project"
]
requirements = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
for requirement in requirements:
    if bound := re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement):
        print("{}=={}".format(*bound.groups()))
