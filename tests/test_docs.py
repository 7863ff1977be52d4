"""The documentation: it builds without a warning, is complete, and what it says to type can be typed."""

import html.parser
import importlib.util
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from conftest import ROOT

import masa
import masa.compression
from masa.cli import make_parser
from masa.study import artefacts, config, experiments

DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "notebooks" not in p.relative_to(DOCS).parts)
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "config" / "README.md"]
BLOCK = re.compile(r"^( *)(?P<mark><!-- run -->\n)? *```(?P<kind>\w+)\n(?P<body>.*?)^\1```$", re.M | re.S)


def modules():
    return [m.name for m in pkgutil.walk_packages(masa.__path__, "masa.") if not m.name.endswith("__main__")]


def name_of(page):
    return str(page.relative_to(ROOT))


class Page(html.parser.HTMLParser):
    """What a built page refers to, its anchors, and its text."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.anchors, self.words = [], [], set(), []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") not in ("next", "prev", "index", "search", "genindex", "author"):
            self.loaded.append(found.get("href", ""))
        elif tag != "a":
            self.loaded += [found[key] for key in ("src", "srcset", "data", "poster", "href") if found.get(key)]

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The built site."""
    for package in ("sphinx", "myst_nb", "furo", "ziamath"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (pip install '.[docs]')")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-d", out / ".doctrees"]
    built = subprocess.run([*command, DOCS, out], cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return out


@pytest.fixture(scope="session")
def pages(site):
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_mathematics_needs_no_script(pages, site):
    start = site / "index.html"
    assert "<math" in start.read_text() and (site / "_static" / "STIXTwoMath-Regular.ttf").stat().st_size > 100_000
    assert not [url for url in pages[start].loaded if re.search("mathjax|katex", url, re.I)]


def test_every_verb_and_option_is_in_the_reference(pages, site):
    page = pages[site / "reference" / "cli.html"]
    verbs = next(a.choices for a in make_parser()._actions if hasattr(a, "choices") and isinstance(a.choices, dict))
    assert len(verbs) > 10
    for verb, parser in verbs.items():
        assert f"masa-{verb}" in page.anchors
        assert " ".join(parser.description.split()) in " ".join(page.text.split())
        for action in parser._actions:
            assert all(word in page.text for word in action.option_strings if word not in ("-h", "--help"))


def test_every_key_of_the_configuration_is_in_the_reference(pages, site):
    text = pages[site / "reference" / "config.html"].text
    keys = re.findall(r"^\| `([^`]+)` \|", config.describe(), re.M)
    assert len(keys) > 100
    assert not [key for key in keys if key not in text]


def test_every_public_name_and_module_is_in_the_reference(pages, site):
    anchors = set().union(*(page.anchors for page in pages.values()))
    for name in masa.__all__:
        assert f"masa.{name}" in anchors or f"masa.compression.{name}" in anchors, name
    assert not [name for name in masa.compression.__all__ if f"masa.compression.{name}" not in anchors]
    on = {name: [str(path) for path, page in pages.items() if f"module-{name}" in page.anchors] for name in modules()}
    assert not {name: found for name, found in on.items() if len(found) != 1}


def test_nothing_is_loaded_from_another_host(pages, site):
    assert len(pages) > 30
    for path, page in pages.items():
        assert not [url for url in page.loaded if urlsplit(url).netloc], path
    for path in site.rglob("*.css"):
        urls = re.findall(r"(?:@import\s+|url\(\s*)['\"]?([^'\")\s]+)", path.read_text(encoding="utf-8"))
        assert not [url for url in urls if not url.startswith("data:") and urlsplit(url).netloc], path


def test_links_within_the_site_lead_somewhere(pages, site):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                broken.append(f"{path.relative_to(site)}: {link}")
            elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{path.relative_to(site)}: {link} (no such anchor)")
    assert not broken


@cache
def _slugs(path):
    """Anchors of a Markdown file, as GitHub and MyST make them, and MyST's own targets."""
    text = re.sub(r"^( *)```.*?^\1```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    return slugs | set(re.findall(r"^\(([\w-]+)\)=$", text, re.M))


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_links_of_the_sources_lead_somewhere(page):
    """Also on a page that shows the repository itself."""
    text = re.sub(r"^( *)```.*?^\1```$|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = [label for source in PAGES for label in re.findall(r"^\(([\w-]+)\)=$", source.read_text(), re.M)]
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        parts = urlsplit(link)
        if parts.scheme or not parts.path or parts.path in targets or re.match(r"(config|masa)-[\w-]+$", parts.path):
            continue  # the last are labels of pages that are made from code, which the build checks
        target = (page.parent / parts.path).resolve()
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leads out of the repository"
        if parts.fragment and target.suffix == ".md":
            assert parts.fragment in _slugs(target), f"{page.name}: {link}"


TOLD = [*TEXTS, ROOT / "benchmarks" / "README.md"]


@pytest.mark.parametrize("page", TOLD, ids=name_of)
def test_files_and_names_of_the_package_exist(page):
    text = page.read_text(encoding="utf-8")
    paths = set(re.findall(r"(?<![\w-])masa/[\w/.]*\w", text))
    names = set(re.findall(r"(?<![\w/@.-])masa\.(?!(?:json|md|yaml)\b)[\w.]*\w", text))
    names |= {f"{file.replace('/', '.')}.{name}" for file, name in re.findall(r"`(masa/[\w/]+)\.py`: `([\w.]+)`", text)}
    assert not [path for path in paths if not (ROOT / path).exists()]
    assert not [name for name in names if not _exists(name)]


def _exists(name):
    try:
        pkgutil.resolve_name(name)
        return True
    except (ImportError, AttributeError):
        return False


def test_files_that_a_row_of_the_design_names_are_in_its_room():
    rows = re.findall(r"^\| `(masa/\w+/)` \| (.*) \|$", (DOCS / "design.md").read_text(), re.M)
    assert {room for room, _ in rows} == {f"masa/{path.parent.name}/" for path in (ROOT / "masa").glob("*/__init__.py")}
    for room, told in rows:
        named = re.findall(r"`(\w+(?:\.py|/))`", told)
        assert not [name for name in named if not (ROOT / room / name).exists()], room


def test_the_picture_of_the_house_is_made_of_its_table(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "_ext")
    import house

    assert house.PICTURE.read_text(encoding="utf-8") == house.svg(), "run: python docs/_ext/house.py"
    rooms = [room for floor in house.floors() for room in floor]
    assert len(rooms) == len(set(rooms)) == house.svg().count('class="room"')


def test_the_page_on_installing_names_every_extra():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert re.findall(r"^\| `(\w+)` \|", (DOCS / "howto" / "install.md").read_text(), re.M) == list(extras)


# ---------------------------------------------------------------------------------------------- what there is to type


def _commands():
    """(page, command) of every line of a block that begins with one of our commands."""
    for page in TEXTS:
        text = page.read_text(encoding="utf-8")
        lines = [line[4:] for line in text.splitlines() if re.match(r"    \S", line)]
        lines += [
            line.strip() for m in BLOCK.finditer(text) if m["kind"] == "console" for line in m["body"].splitlines()
        ]
        for line in lines:
            words = _first_command(line) if _is_ours(line) else []
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                yield pytest.param(page, tuple(words), id=f"{page.name}: {' '.join(words)[:70]}")


def _first_command(line):
    """The words of a command line up to a pipe or the like."""
    parser = shlex.shlex(re.sub(r"\s#\s.*$", "", line), posix=True, punctuation_chars="|&;<>")
    parser.whitespace_split = True
    words = list(parser)
    return words[: next((i for i, word in enumerate(words) if re.fullmatch(r"[|&;<>]+", word)), None)]


def _is_ours(line):
    return re.match(r"([A-Z_]+=\S+ )?(masa|snakemake|make) [\w-]", line)


def _overlays(page):
    """Name -> text of the YAML blocks that a page says to write into files."""
    blocks = [m["body"] for m in BLOCK.finditer(page.read_text(encoding="utf-8")) if m["kind"] == "yaml"]
    return {m[1]: body for body in blocks if (m := re.match(r"\s*# (\w+\.yaml)\n", body))}


def _load(page, files, folder):
    """The configuration with overlays of the repository or of the page itself."""
    made = _overlays(page)
    paths = []
    for file in map(str, files):
        if file in made:
            (folder / file).write_text(made[file])
            paths.append(folder / file)
        elif file not in ("mine.yaml", "my.yaml"):  # which need not be shown everywhere
            paths.append(ROOT / file)
    return config.load(paths)


def _check_masa(page, words, folder):
    given, left = make_parser().parse_known_args(words)
    assert not left, left
    if hasattr(given, "call"):
        c = _load(page, given.configfile, folder)
        if words[0] in ("tables", "figures"):
            known = artefacts.table_names(c) if words[0] == "tables" else experiments.active(c, "figures")
            assert set(given.names) <= set(known)


def _check_snakemake(page, words, folder):
    from snakemake.cli import get_argument_parser

    given = get_argument_parser().parse_args(words)
    c = _load(page, given.configfile or (), folder)
    rules = [
        r for file in (ROOT / "workflow").rglob("*.smk") for r in re.findall(r"^rule (\w+):", file.read_text(), re.M)
    ]
    known = {*artefacts.table_names(c), *experiments.active(c, "figures"), *rules}
    for target in given.targets:
        assert target in known or Path(target).is_relative_to(c["results"]), f"{target} is no target"
    for profile in re.findall(r"(?<=profile )\S+", " ".join(words)):
        assert (ROOT / profile / "config.yaml").is_file(), profile


def _check_make(page, words, folder):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(words) <= set(targets)


CHECKS = {"masa": _check_masa, "snakemake": _check_snakemake, "make": _check_make}


@pytest.mark.parametrize(("page", "words"), _commands())
def test_a_command_of_the_documentation_is_one(page, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("MASA_MIRROR", raising=False)
    if words[1:] not in (("--help",), ("--version",)):
        try:
            CHECKS[words[0]](page, list(words[1:]), tmp_path)
        except SystemExit:
            pytest.fail(f"{' '.join(words)}\n{capsys.readouterr().err}")


@pytest.mark.parametrize(
    ("page", "name"), [pytest.param(p, n, id=f"{p.name}: {n}") for p in PAGES for n in _overlays(p)]
)
def test_an_overlay_of_the_documentation_is_one(page, name, tmp_path):
    assert _load(page, [name], tmp_path) != config.load()


def _yaml_after(page, word):
    bodies = [m["body"] for m in BLOCK.finditer(page.read_text(encoding="utf-8")) if m["kind"] in ("yaml", "python")]
    return next(body for body in bodies if word in body)


def test_a_data_set_as_the_page_on_images_describes_it(tmp_path, monkeypatch):
    from masa.data import image_sets

    page = DOCS / "howto" / "images.md"
    entry = eval("{" + _yaml_after(page, "ImageDataset(") + "}", {"ImageDataset": image_sets.ImageDataset})
    for name, data_set in entry.items():
        monkeypatch.setitem(image_sets.DATASETS, name, data_set)
    (tmp_path / "mine.yaml").write_text(_yaml_after(page, "leaves-compact:"))
    c = config.load([tmp_path / "mine.yaml"])
    assert "leaves-compact/masa-qkvo/seed0" in experiments.all_runs(c)


def test_a_method_as_its_page_describes_it_is_planned(tmp_path, monkeypatch):
    """The cost model plans a method that it does not count, as the workflow asks while it is read."""
    from masa.sharing import spec
    from masa.study.cost import resources

    page = DOCS / "howto" / "method.md"
    monkeypatch.setitem(spec.METHODS, "scaled", spec.METHODS["sequential"])
    (tmp_path / "mine.yaml").write_text(_yaml_after(page, "method: scaled"))
    c = config.load([tmp_path / "mine.yaml"])
    vanilla = resources(c, "pretrain", "nano/vanilla/seed0", 1)
    assert resources(c, "pretrain", "nano/scaled/seed0", 1)["mem_mb"] >= 0.9 * vanilla["mem_mb"]


def _runnable():
    for page in PAGES:
        blocks = [m["body"] for m in BLOCK.finditer(page.read_text(encoding="utf-8")) if m["mark"]]
        if blocks:
            yield pytest.param(page, blocks, id=page.name)


@pytest.mark.parametrize(("page", "blocks"), _runnable())
def test_the_code_of_a_page_runs(page, blocks, tmp_path):
    shutil.copyfile(ROOT / "README.md", tmp_path / "README.md")
    script = tmp_path / f"{page.stem}_page.py"
    script.write_text("\n".join(blocks))
    ran = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    if page.stem == "tutorial":
        first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", ran.stdout).groups())
        assert 5.3 < first < 5.8 and last < 4, "as the page says"
        assert "66.6% fewer attention parameters" in ran.stdout
        assert (tmp_path / "plain" / "model.safetensors").is_file()


def test_there_are_pages_of_all_four_kinds_with_code_that_runs():
    assert {p.id for p in _runnable()} >= {"tutorial.md", "method.md", "family.md", "compress.md"}
    assert len(list(_commands())) > 60


def test_every_field_that_a_run_writes_is_described(smoke_results):
    """The layout of results/ names the files of a finished workflow and the fields of their JSON."""
    import json

    text = "".join((DOCS / "reference" / f"{name}.md").read_text() for name in ("results", "checkpoints"))
    named = ("spec", "manifest", "metrics", "provenance", "calibration", "masa", "weights", "lm_eval")
    missing = set()
    for path in smoke_results.rglob("*.json"):
        if path.stem in named and "benchmarks" not in path.parts:
            missing |= {f"{path.name}: {key}" for key in json.loads(path.read_text()) if f"`{key}`" not in text}
    for path in smoke_results.rglob("metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        missing |= {f"{path.name}: {key}" for line in lines for key in line if f"`{key}`" not in text}
    assert not missing


def test_yaml_of_the_pages_is_yaml():
    for page in PAGES:
        for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
            if found["kind"] == "yaml":
                assert isinstance(yaml.safe_load(found["body"]), dict), page
