"""The README and the pages on adding parts and on reports do what they say: all of it is run.

A fenced block is not run only where the comment before it gives one of a few reasons. Links are
followed on every page.
"""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import pytest

from scripts import chromium
from tests.runs import make_run
from tests.training import JAX_CONFIG, TINY

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REASONS = {
    "run by CI",
    "not run: changes the shell",
    "not run: needs the network",
    "not run: needs Market-1501",
    "not run: needs a GPU",
    "not run: needs several machines",
    "not run: needs your own data",
    "not run: needs the extra export",
}
_BLOCK = re.compile(
    r"(?:<!-- (?P<note>.*?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)```", re.DOTALL
)


@dataclasses.dataclass(frozen=True)
class Block:
    note: str | None
    language: str
    code: str


def read_blocks(page, language):
    found = (Block(**match.groupdict()) for match in _BLOCK.finditer(page.read_text()))
    return [block for block in found if block.language == language]


def split_commands(code):
    """Commands of a bash block, each on one line, without comments."""
    lines = re.sub(r"\\\n\s*", "", code).splitlines()
    return [line for line in (re.sub(r"(^|\s+)# .*", "", line).strip() for line in lines) if line]


def shorten(command):
    """The same command on the smallest data, for one epoch."""
    command = command.replace("--preset demo", "--preset small")
    if "mros_jax.train" in command:
        values = {**TINY, "num_epochs": 1}
        command += "".join(f" --config.{name}={value}" for name, value in values.items())
    return command


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, cache_dir):
    """A directory like a fresh checkout after `make demo`."""
    path = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "scripts"):
        (path / name).symlink_to(ROOT / name)
    make_run(path / "runs" / "demo", cache_dir)
    run("python -m mros_jax.report runs/demo", path)
    return path


def run(command, directory):
    environment = {
        **os.environ,
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(directory / "cache"),
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": JAX_CONFIG.jax_compilation_cache_dir,
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def write_pictures(directory):
    """Those that the README's commands write, where no test has run them."""
    if not (directory / "data" / "synthetic").exists():
        run("python -m mros_jax.data.synthetic --out data/synthetic --preset small", directory)


@pytest.mark.slow
def test_readme_commands(workspace):
    for block in read_blocks(ROOT / "README.md", "bash"):
        if block.note is None:
            for command in split_commands(block.code):
                run(shorten(command), workspace)
    assert (workspace / "runs" / "demo-III" / "results.json").exists()
    assert (workspace / "found.png").exists()
    assert (workspace / "scores.json").read_text().startswith("{")


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/adding.md", "docs/exactness.md"])
def test_python_examples(page, workspace, tmp_path):
    blocks = read_blocks(ROOT / page, "python")
    assert blocks
    assert all(block.note is None for block in blocks)
    if page == "README.md":
        write_pictures(workspace)
    script = tmp_path / "example.py"
    script.write_text("\n".join(block.code for block in blocks))
    run(f"python {script}", workspace)


@pytest.mark.slow
def test_index_page(workspace, tmp_path):
    page = ROOT / "docs" / "index_search.md"
    write_pictures(workspace)
    for block in read_blocks(page, "bash"):
        for command in split_commands(block.code):
            run(command.replace("gallery.index", "page.index"), workspace)
    blocks = read_blocks(page, "python")
    assert len(list(filter(None, blocks[0].code.splitlines()))) == 5
    script = tmp_path / "example.py"
    script.write_text("\n".join(block.code for block in blocks))
    run(f"python {script}", workspace)


@pytest.mark.slow
@pytest.mark.skipif(
    chromium.find_chromium() is None, reason=f"none of {chromium.NAMES} on the PATH"
)
def test_report_page(workspace, tmp_path):
    page = ROOT / "docs" / "report.md"
    for block in read_blocks(page, "bash"):
        for command in split_commands(block.code):
            run(command, workspace)
    script = tmp_path / "example.py"
    script.write_text("\n".join(block.code for block in read_blocks(page, "python")))
    run(f"python {script}", workspace)


@pytest.mark.slow
def test_export_page(workspace, tmp_path):
    page = ROOT / "docs" / "export.md"
    for block in read_blocks(page, "bash"):
        for command in split_commands(block.code) if block.note is None else ():
            run(command, workspace)
    blocks = [block for block in read_blocks(page, "python") if block.note is None]
    script = tmp_path / "example.py"
    script.write_text("\n".join(block.code for block in blocks))
    assert "last-" in run(f"python {script}", workspace)


def test_python_in_five_lines():
    block = next(b for b in read_blocks(ROOT / "README.md", "python") if "embed" in b.code)
    assert len([line for line in block.code.splitlines() if line.strip()]) == 5


def test_what_is_not_run_says_why():
    for page in PAGES:
        for block in read_blocks(page, "bash") + read_blocks(page, "python"):
            assert block.note is None or block.note in REASONS, (page, block.code)


def test_ci_runs_what_the_readme_leaves_to_it():
    ci = (ROOT / ".ci" / "run").read_text()
    notes = [b for b in read_blocks(ROOT / "README.md", "bash") if b.note == "run by CI"]
    commands = [command for block in notes for command in split_commands(block.code)]
    assert commands == ["make demo", "make test"]
    # `make test-all` contains `make test`.
    for command in commands:
        assert re.search(rf"^{command}\b", ci, re.MULTILINE), f".ci/run lacks {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = _BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert file.is_relative_to(ROOT)
        if anchor and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
            assert anchor in slugs, f"{page.name}: {target}"


def test_commands_are_read_as_a_shell_reads_them():
    code = "a --b \\\n    --c   # why\n\n# only a comment\nd\n"
    assert split_commands(code) == ["a --b --c", "d"]
