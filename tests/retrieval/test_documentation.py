"""docs/evaluation.md does what it says: every command and example in it is run."""

import inspect
import pathlib
import re
import shlex
import shutil
import types

import pytest

from mros_jax import compare, evaluate, parallel
from mros_jax import config as configs
from mros_jax.retrieval import descriptors

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "evaluation.md").read_text()


def read_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.slow
def test_commands_and_examples(tmp_path, monkeypatch, capsys):
    demo = tmp_path / "runs" / "demo"
    demo.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "data" / "retrieval_b.npz", demo / "features.npz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        evaluate,
        "load_run_features",
        lambda run, **options: (
            descriptors.load_features(demo / "features.npz"),
            {"dataset": "demo"},
        ),
    )
    saved = types.SimpleNamespace(config={"eval": configs.base().eval.to_dict()})
    monkeypatch.setattr(evaluate, "Run", types.SimpleNamespace(open=lambda run: saved))
    assert evaluate.main(
        ["--features", str(demo / "features.npz"), "--out", str(demo / "results.json")]
    ) == 0  # fmt: skip
    commands = "".join(read_blocks("bash")).strip().splitlines()
    assert len(commands) == 10
    for command in commands:
        words = shlex.split(command.partition(" > ")[0])
        program = {"mros_jax.evaluate": evaluate, "mros_jax.compare": compare}[words[2]]
        assert program.main(words[3:]) == 0, command
        assert capsys.readouterr().out
    for code in read_blocks("python"):
        exec(compile(code, "docs/evaluation.md", "exec"), {})
    assert "mAP" in capsys.readouterr().out


def test_every_flag_exists():
    flags = set(re.findall(r"`(--[a-z_]+)", TEXT))
    known = {
        flag
        for program in (evaluate, compare, parallel)
        for flag in re.findall(r'"(--[a-z_]+)"', inspect.getsource(program))
    }
    assert flags <= known, flags - known
    assert len(flags) > 15
