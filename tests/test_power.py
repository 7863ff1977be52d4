"""How many seeds it takes, against simulation, textbooks and the committed runs."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy import stats

from masa.report import own_tables, power
from masa.study import artefacts, config, specs


def test_power_is_what_simulation_finds():
    """Two-sided tests of a difference, and equality of two without any, by eight seeds."""
    generator = np.random.default_rng(0)
    error = 0.01 / np.sqrt(8)
    drawn = generator.normal(0, 0.01, (20000, 8))
    t = (drawn.mean(1) + 0.012) / (drawn.std(1, ddof=1) / np.sqrt(8))
    assert power.shown(0.012, error, 7) == pytest.approx(np.mean(abs(t) > stats.t.ppf(0.975, 7)), abs=0.01)
    half = stats.t.ppf(0.95, 7) * drawn.std(1, ddof=1) / np.sqrt(8)
    assert power.equal(0.011, error, 7) == pytest.approx(np.mean(abs(drawn.mean(1)) + half < 0.011), abs=0.01)


def test_seeds_that_are_needed():
    """The textbook's paired t-test: 34 pairs see half a standard deviation with a power of 80 %."""
    assert power.seeds_needed(lambda e, f: power.shown(0.5, e, f), 1.0) == 34
    assert power.seeds_needed(lambda e, f: power.shown(0.5, e, f), 1.0, methods=7) == 32  # the normal's 31.4
    assert power.seeds_needed(lambda e, f: power.equal(0.5, e, f), 1.0) == 36
    assert power.seeds_needed(lambda e, f: 0.5, 1.0) is None
    assert power.smallest(1 / np.sqrt(34), 33) == pytest.approx(0.495, abs=0.005)


def test_the_table_of_power(tmp_path):
    """Of the committed runs: the noise that docs/evidence.md tells, and how many seeds it asks for."""
    spec = artefacts.table_spec(config.load([ROOT / "config/evidence.yaml"]), "power")
    assert [scale["scale"] for scale in spec] == ["d48"] and len(spec[0]["runs"]) == 7
    own_tables.write("power", spec, ROOT / "results/reference/evidence", tmp_path)
    frame = pd.read_csv(tmp_path / "power.csv").set_index("of")
    assert frame.loc["all 7, pooled", "deviation"] == pytest.approx(0.0097 * np.sqrt(2), abs=1e-4)
    assert frame.loc["all but Sequential", "deviation"] == pytest.approx(0.0062 * np.sqrt(2), abs=1e-4)
    assert frame.loc["all 7, pooled", "seeds_to_show"] == 60
    assert "Seeds for equal within 0.01" in (tmp_path / "power.md").read_text()
    own_tables.write("power", [], tmp_path, tmp_path)  # one seed everywhere
    assert pd.read_csv(tmp_path / "power.csv")["of"].tolist() == ["no two methods have several seeds"]


def test_the_workflow_can_hand_over_every_table_of_every_configuration():
    """What Snakemake passes as --spec is checked before a table is made of it."""
    for overlay in ("evidence", "smoke"):
        asked = config.load([ROOT / f"config/{overlay}.yaml"])
        for name in artefacts.OWN_TABLES:
            specs.check(f"table {name}", json.loads(json.dumps(artefacts.table_spec(asked, name))))
