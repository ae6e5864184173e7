"""The README runs: its Python block as it stands, its commands one after the other, and its file tree is true."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from skipwise import cli

ROOT = Path(__file__).parent.parent


def blocks(file: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)


def test_python(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("README.md", "python")
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "skip model.layers:" in out
    assert "s3141592=1123459" in out
    assert "value=" in out


LONG = ("schedule front", "plan --front", "schedule search", "bench")  # commands that take minutes together


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_commands(
    long: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other, in one folder; the quick tests leave out the long ones."""
    monkeypatch.chdir(tmp_path)
    for line in "".join(blocks("README.md", "bash")).splitlines():
        if not long and line.removeprefix("skipwise ").startswith(LONG):
            continue
        monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, line
    assert (tmp_path / "runs" / "report.html").exists()
    assert (tmp_path / "runs" / "best.json").exists() == long
    assert "18.75%" in capsys.readouterr().out


def test_tree_is_true() -> None:
    (tree,) = re.findall(r"```\n(src/skipwise/.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for name in re.findall(r"^  (\S+?)/?(?:,|\s)", tree, re.MULTILINE):
        assert (ROOT / "src" / "skipwise" / name).exists(), name
    source = {path.name for path in (ROOT / "src" / "skipwise").iterdir() if not path.name.startswith("_")}
    missing = {name for name in source if name not in tree} - {"errors.py", "files.py", "versions.py", "presets"}
    assert not missing


def test_the_planner_in_contributing_is_all_there_is_to_it() -> None:
    """The example in CONTRIBUTING registers and plans."""
    import skipwise as sw
    from skipwise.planners import base
    from tests.test_planners import analysis

    (code,) = blocks("CONTRIBUTING.md", "python")
    try:
        exec(compile(code, "CONTRIBUTING.md", "exec"), {})
        assert len(sw.make_plan(analysis(), "smallest_update", skip=2).phases[0].skip["model.layers"]) == 2
    finally:
        base._planners.pop("smallest_update", None)


def test_files_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
