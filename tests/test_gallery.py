"""Captions of tables and figures, and the page that shows all figures."""

import re
import shutil

import make_gallery as gallery
from conftest import ROOT
from PIL import Image

from masa.study import config, experiments


def test_every_table_and_figure_has_a_caption_which_reruns_no_training():
    base = config.load()
    artefacts = {name: a for kind in ("tables", "figures") for name, a in base[kind].items()}
    assert all(20 < len(a.get("caption", "")) < 400 for a in artefacts.values()), "one or two sentences"
    assert not [n for n, a in artefacts.items() if re.search(r"\d\d+\.\d|outperforms", a["caption"])], "no results"
    runs = {run_id: experiments.run_spec(base, *experiments.parse_run(run_id)) for run_id in experiments.all_runs(base)}
    for artefact in artefacts.values():
        artefact["caption"] = "Another one."
    config.check(base)
    assert runs == {
        name: experiments.run_spec(base, *experiments.parse_run(name)) for name in experiments.all_runs(base)
    }


def test_the_gallery_is_up_to_date_and_its_links_lead_somewhere():
    text = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    assert text == gallery.page(), "run: python docs/make_gallery.py"
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 30 and all((ROOT / "docs" / link).is_file() for link in links)
    for name, figure in config.load()["figures"].items():
        assert text.count(f"### {figure['title']}\n") == 1 and figure["caption"] in text
        assert re.search(
            rf"`[^`]*snakemake --cores all {name}( --configfile config/mirror.yaml( config/(whole|bytes).yaml)?)?`",
            text,
        )


def test_the_gallery_says_what_is_missing_or_old(tmp_path):
    shutil.copytree(ROOT / "config", tmp_path / "config")
    assert gallery.page(tmp_path).count("the default run: no picture is kept; ") == 12
    old = tmp_path / "results" / "reference" / "laptop" / "figures" / "kl_drift.png"
    old.parent.mkdir(parents=True)
    for width, said in ((1150, True), (2025, False)):
        Image.new("L", (width, 10)).save(old)
        entry = gallery.page(tmp_path).partition("### Divergence of")[2]
        assert (
            f"![Divergence of neighbouring blocks, and the groups of layers](../{old.relative_to(tmp_path)})" in entry
        )
        assert ("an earlier version" in entry) == said
