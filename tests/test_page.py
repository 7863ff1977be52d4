"""The report's page: what it says of finished, partial and damaged results, and what a real browser makes of it."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import until
from PIL import Image
from projects import BIN, ENVIRONMENT, ROOT

from masa import cli
from masa.report.page import build, curves, graph, tables
from masa.report.page.found import Found
from masa.report.style import look
from masa.study import config, experiments
from masa.study.cost import Plan
from masa.study.cost.workflow import jobs as all_jobs

HOSTILE = "<script>window.broken = 1</script><img src=x onerror='window.broken = 2'>\"'&"
RUNS = ("smoke/vanilla/seed0", "smoke/gqa/seed0", "smoke/masa-qkvo/seed0", "digits-compact/vanilla/seed0")
FLAGS = [
    f"--{flag}"
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
    )
]


@pytest.fixture
def smoke():
    return config.load([ROOT / "config" / "smoke.yaml"])


def write_run(folder, unit="tokens", steps=20, revision="a" * 40, finished=True):
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        common = {"step": step, unit: 100 * step, "training_seconds": step / 4}
        lines.append(common | {"loss": 5 - step / steps})
        if step % 5 == 0:
            lines.append(common | {"validation_loss": 5.1 - step / steps})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    inputs = {"tokens": hashlib.sha256(unit.encode()).hexdigest()}
    facts = {"packages": {"torch": "2.0"}, "python": "3.11", "platform": "Linux", "cpu": "A processor", "seed": 0}
    (folder / "provenance.json").write_text(json.dumps(facts | {"revision": revision, "inputs": inputs}))
    if finished:
        counts = {"total": 1000, "attention": 400, "attention_reduction": 0.25}
        (folder / "manifest.json").write_text(json.dumps({"parameters": counts}))


def write_table(folder, name, rows, title="A title", note="A note."):
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)
    (folder / f"{name}.md").write_text(f"# {title}\n\n| a |\n|:--|\n| 1 |\n\n{note}\n")


def judged(label, average, paper=33.0, verdict="agrees", missing=""):
    return {
        "scale": "smoke", "method": "vanilla", "label": label, "seeds": 2, "parameters": 1000.0, "avg_pct": average,
        "avg_pct_std": 0.5, "race": None if missing else 0.25, "race_paper": 0.254, "avg_pct_paper": paper,
        "avg_pct_difference": None if average is None else average - paper, "unavailable_tasks": missing,
        "paper_scale": "S", "verdict": verdict,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """A partial results directory with one of everything, written by hand; hostile text wherever there is text."""
    folder = tmp_path / "results"
    for run in RUNS:
        write_run(folder / "runs" / run, "images" if "digits" in run else "tokens", finished=run != RUNS[1])
    rows = [
        judged("Equal", 34.0),
        judged("Far", 30.0, verdict="differs"),
        judged("Lacks", None, verdict="incomplete: race", missing="race"),
        judged("Small", 20.0, verdict="another scale"),
        judged(HOSTILE, 33.1),
    ]
    write_table(folder / "tables", "table1", rows, note=f"A note. {HOSTILE}")
    evaluation = folder / "evaluations" / RUNS[0]
    evaluation.mkdir(parents=True)
    data = {"task_data": {"race": {"unavailable": "no mirror"}}, "provenance": {"revision": HOSTILE, "cpu": "Other"}}
    (evaluation / "metrics.json").write_text(json.dumps(data))
    (folder / "figures").mkdir()
    Image.new("RGB", (640, 360), "white").save(folder / "figures" / "validation_loss.png")
    log = folder / "logs" / "pretrain" / f"{RUNS[0]}.log"
    log.parent.mkdir(parents=True)
    log.write_text("done in 83.0 s, peak memory 512 MiB\n")
    return folder


def hostile(c):
    c["experiments"]["gqa"]["label"] = HOSTILE
    c["figures"]["validation_loss"]["title"] = HOSTILE
    return c


# ---------------------------------------------------------------------------------------------------- without a browser


def test_an_empty_directory_gives_a_page_with_the_command_for_everything(smoke, tmp_path):
    page = build.page(Found(smoke, tmp_path, ["config/smoke.yaml"]))
    for name in ("table1", "vision", "throughput", "validation_loss", "kl_drift"):
        assert f"snakemake --cores all {name} --configfile config/smoke.yaml" in page
    assert "10 training runs are not there yet" in page
    assert "Damaged" not in page
    assert "No run has a log yet" in page


def test_a_directory_that_is_not_there_is_named(tmp_path, capsys):
    assert cli.main(["report", "--results", str(tmp_path / "none"), "--out", str(tmp_path / "page.html")]) == 2
    assert "none is no directory of results; make them with `snakemake --cores all`" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_directory_is_no_page(tmp_path, capsys):
    assert cli.main(["report", "--results", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "is a directory; name a file in it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{oops", "--spec is not valid JSON"),
        ("none.json", "--spec is not valid JSON"),
        ('{"results": "x"}', "the configuration needs cache, data, scales, training"),
    ],
)
def test_a_wrong_configuration_is_an_error(spec, message, tmp_path, capsys):
    assert cli.main(["report", "--spec", spec, "--results", str(tmp_path), "--out", str(tmp_path / "x.html")]) == 2
    assert message in capsys.readouterr().err


def test_the_rule_and_the_verb_write_the_same_page(smoke, results, tmp_path):
    """The rule hands the configuration over as data; its files give the same bytes, and so does a second process."""
    pages = []
    overlay = str(ROOT / "config" / "smoke.yaml")
    for number, given in enumerate([[], [], ["--spec", json.dumps(smoke, sort_keys=True)]]):
        out = tmp_path / f"{number}.html"
        command = ["report", *given, "--results", str(results), "--out", str(out), "--configfile", overlay, "--json"]
        environment = ENVIRONMENT | {"PYTHONHASHSEED": str(number)}
        done = subprocess.run(
            [sys.executable, "-m", "masa.cli", *command], cwd=ROOT, env=environment, capture_output=True, check=True
        )
        assert json.loads(done.stdout) == {"page": str(out), "bytes": out.stat().st_size, "problems": []}
        pages.append(out.read_bytes())
    assert pages[0] == pages[1] == pages[2]
    assert len(pages[0]) < 400_000, "without pictures and data the page is small"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (f"runs/{RUNS[0]}/manifest.json", "{"),
        (f"runs/{RUNS[0]}/provenance.json", "[1]"),
        (f"evaluations/{RUNS[0]}/metrics.json", "nothing"),
        ("parameters.json", "\x00"),
        ("tables/table1.csv", "a,b\n1\n"),
        ("tables/table1.csv", "a,b\n"),
        ("tables/table1.csv", ""),
        ("figures/validation_loss.png", "GIF89a"),
    ],
)
def test_a_damaged_file_is_named_and_the_page_is_written_all_the_same(smoke, results, file, text):
    (results / file).write_text(text)
    found = Found(smoke, results)
    page = build.page(found)
    assert len(found.problems) == 1
    assert str(results / file) in found.problems[0]
    assert "<strong>Damaged.</strong>" in page


def test_logs_with_numbers_that_are_not_finite_lose_those_points_only(smoke, results):
    log = results / "runs" / RUNS[0] / "metrics.jsonl"
    log.write_text(
        '{"step": 1, "tokens": 2, "training_seconds": 1, "loss": NaN}\n[1]\n{"step": 2, "tok\n' + log.read_text()
    )
    view = next(v for v in curves.views(Found(smoke, results)) if v["id"] == RUNS[0])
    assert view["train"]["steps"] == list(range(1, 21))
    assert view["held"]["losses"] == [4.85, 4.6, 4.35, 4.1]
    assert build.as_json(view)


def test_curves_keep_their_means_and_the_colours_of_the_figures(smoke, results):
    write_run(results / "runs/smoke/low-rank/seed0", steps=3 * curves.POINTS)
    view = next(v for v in curves.views(Found(smoke, results)) if "low-rank" in v["id"])
    assert view["averaged"] == 3
    assert len(view["train"]["steps"]) == curves.POINTS
    assert view["train"]["steps"][:2] == [2, 5]
    assert view["train"]["losses"][0] == pytest.approx(5 - 2 / (3 * curves.POINTS), abs=1e-5)
    assert view["colour"] == look("low-rank")["color"]


def test_runs_that_the_configuration_does_not_ask_for_are_shown_as_such(smoke, results):
    write_run(results / "runs/mine/masa-qkvo/seed7")
    found = Found(smoke, results)
    assert "finished, not of this configuration" in build.page(found)
    assert build.parts(found)["runs"] == {"asked": 10, "done": 3}


def test_a_training_of_another_recipe_counts_as_none(smoke, results):
    spec = experiments.run_spec(smoke, *experiments.parse_run(RUNS[0]))
    path = results / "runs" / RUNS[0] / "spec.json"
    path.write_text(json.dumps(spec))
    assert build.parts(Found(smoke, results))["runs"]["done"] == 3
    spec["training"]["learning_rate"] *= 2
    path.write_text(json.dumps(spec))
    found = Found(smoke, results)
    assert build.parts(found)["runs"] == {"asked": 10, "done": 2}
    page = build.page(found)
    assert "8 training runs are not there yet (1 of them only by another recipe)" in page
    assert f"<code>{RUNS[0]}</code> (outdated)" in page
    assert next(v for v in curves.views(found) if v["id"] == RUNS[0])["state"] == "outdated"


def rows_of(smoke, results):
    view = next(v for v in tables.views(Found(smoke, results)) if v["name"] == "table1")
    labels = [column["label"] for column in view["columns"]]
    return view, {row["first"]: dict(zip(labels, row["cells"], strict=True)) | row for row in view["rows"]}


@pytest.mark.parametrize(
    ("difference", "tolerance", "expected"),
    [
        (1.0, 1.0, "agrees"),
        (-1.0, 1.0, "agrees"),
        (1.0000001, 1.0, "differs"),
        (0.0, 0.0, "agrees"),
        (-2, 1.5, "differs"),
    ],
)
def test_a_difference_equal_to_the_tolerance_agrees(difference, tolerance, expected):
    assert tables.within(difference, tolerance) == expected


def test_verdicts_are_coloured_by_the_tolerance_and_said_in_words(smoke, results):
    view, rows = rows_of(smoke, results)
    assert view["judged"] == "Average (%): agrees within ± 1"
    standings = {name: (row["standing"], row["Average (%)"]["standing"]) for name, row in rows.items()}
    assert standings["Equal"] == ("agrees", "agrees")  # 34.0 to 33.0
    assert standings["Far"] == ("differs", "differs")
    assert standings["Lacks"] == ("incomplete", "")
    assert standings["Small"] == ("neutral", "")
    page = build.page(Found(smoke, results))
    assert '<span class="verdict agrees"><span aria-hidden="true">✓</span> agrees</span>' in page
    assert tables.verdicts([view]) == {"agrees": 2, "differs": 1, "incomplete": 1, "another scale": 1}
    assert tables.verdicts([]) == {"agrees": 0, "differs": 0}


def test_the_papers_value_stands_beside_ours_and_a_difference_only_where_it_means_something(smoke, results):
    _, rows = rows_of(smoke, results)
    cell = rows["Far"]["Average (%)"]
    assert (cell["text"], cell["spread"], cell["paper"], cell["difference"]) == ("30.00", "0.50", "33.00", "-3.00")
    assert rows["Small"]["Average (%)"]["paper"] == "33.00"
    assert rows["Small"]["Average (%)"]["difference"] == ""
    missing = rows["Lacks"]["RACE"]
    assert missing["reason"] == "race: no data here (no mirror)"
    assert (missing["paper"], missing["sort"]) == ("0.254", None)


def test_tables_of_numbers_that_are_not_judged(smoke, results):
    rows = [{"scale": "S", "method": "vanilla", "label": "Vanilla", "parameters_m": 109.632, "parameters_m_paper": 110}]
    write_table(results / "parts" / "tables", "parameters", rows, title="Parameter counts")
    view = next(v for v in tables.views(Found(smoke, results)) if v["name"] == "parameters")
    assert (view["title"], view["judged"], view["note"]) == ("Parameter counts", "", "A note.")
    cell = view["rows"][0]["cells"][1]
    assert (cell["text"], cell["paper"], cell["difference"]) == ("109.6", "110", "-0.368")
    rows[0] |= {"parameters_m_difference": -0.368, "verdict": "agrees"}
    write_table(results / "parts" / "tables", "parameters", rows, title="Parameter counts")
    view = next(v for v in tables.views(Found(smoke, results)) if v["name"] == "parameters")
    assert view["judged"] == "counts and reductions: agrees at the paper's own precision"
    assert (view["rows"][0]["standing"], view["rows"][0]["cells"][1]["difference"]) == ("agrees", "-0.368")


def test_results_of_several_revisions_and_processors_are_warned_of(smoke, results):
    warnings = build.parts(Found(smoke, results))["origins"]["warnings"]
    assert "Results were made with 2 different git revisions: they may not be comparable." in warnings
    assert any("2 different processors" in warning for warning in warnings)
    shutil.rmtree(results / "evaluations")
    assert build.parts(Found(smoke, results))["origins"]["warnings"] == []


def test_names_from_data_are_text_and_the_policy_allows_the_pages_own_script_alone(smoke, results):
    page = build.page(Found(hostile(smoke), results))
    assert HOSTILE not in page
    assert "<img src=x" not in page
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    styles = re.findall(r"<style>(.*?)</style>", page, re.S)
    assert (len(scripts), len(styles)) == (1, 1)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert policy.startswith("default-src 'none'; img-src data:;")
    for kind, text in (("script", scripts[0]), ("style", styles[0])):
        checksum = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{checksum}'" in policy
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?\s*(?:https?:|//)", page)
    data = re.search(r'<script type="application/json" id="curve-data">(.*?)</script>', page, re.S)[1]
    assert HOSTILE in {curve["method"] for curve in json.loads(data)}


def test_measured_times_stand_beside_their_estimates(smoke, results):
    rules = {row["rule"]: row for row in build.parts(Found(smoke, results))["rules"]}
    assert (rules["pretrain"]["jobs"], rules["pretrain"]["done"], rules["pretrain"]["seconds"]) == (10, 1, 83.0)
    assert rules["pretrain"]["longest_name"] == RUNS[0]
    assert rules["pretrain"]["estimated"] > 0
    assert rules["evaluate"]["done"] == 0


SERVED = """benchmark,what,value,spread,unit,target,met
serving,"SmolLM2-135M, original: disk",513.2,,MiB,,
serving,"SmolLM2-135M, svd-llm 20 %: disk",492.9,,MiB,,
serving,"SmolLM2-135M, svd-llm 20 %: decoding, batch 1 : original",0.953,0.01,ratio,>= 1.00,no
"""


def test_how_models_serve_is_shown_where_it_was_measured(smoke, results):
    assert "In use" not in build.page(Found(smoke, results))
    (results / "benchmarks").mkdir()
    (results / "benchmarks" / "serving.csv").write_text(SERVED)
    text = build.page(Found(smoke, results))
    assert "In use" in text and "SmolLM2-135M, svd-llm 20 %" in text and ">493<" in text and ">(0.95)<" in text
    (results / "benchmarks" / "serving.csv").write_text("what,value\nx: disk,many\n")
    found = Found(smoke, results)
    assert "In use" not in build.page(found) and any("serving.csv" in problem for problem in found.problems)


def test_the_graph_is_snakemakes_own(smoke):
    command = [f"{BIN}/snakemake", "--rulegraph", "--configfile", "config/smoke.yaml"]
    dot = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    names = dict(re.findall(r'(\d+)\[label = "(\w+)"', dot))
    gathered = {"all", "tables", "figures", "report"}
    theirs = {(names[a], names[b]) for a, b in re.findall(r"(\d+) -> (\d+)", dot)}
    assert set(graph.rules(all_jobs(Plan(smoke))).edges) == {edge for edge in theirs if edge[1] not in gathered}
    assert len(theirs) > 20


@pytest.mark.parametrize("overlay", ["smoke", "paper", "mirror", "coco"])
def test_boxes_of_the_graph_do_not_overlap_and_arrows_go_to_the_right(overlay, tmp_path):
    found = Found(config.load([ROOT / "config" / f"{overlay}.yaml"]), tmp_path)
    view = build.parts(found)["graph"]
    boxes = [(node["x"], node["y"]) for node in view["nodes"]]
    assert len(boxes) == len(set(boxes)) > 8
    for i, (x, y) in enumerate(boxes):
        assert 0 <= x <= view["width"] - graph.WIDTH
        assert 0 <= y <= view["height"] - graph.HEIGHT
        assert all(abs(x - a) >= graph.WIDTH or abs(y - b) >= graph.HEIGHT for a, b in boxes[:i])
    starts, ends = (
        {(x + graph.WIDTH, y + graph.HEIGHT / 2) for x, y in boxes},
        {(x, y + graph.HEIGHT / 2) for x, y in boxes},
    )
    for edge in view["edges"]:
        numbers = [float(n) for n in re.findall(r"[\d.]+", edge)]
        assert (numbers[0], numbers[1]) in starts
        assert (numbers[-2], numbers[-1]) in ends
        assert numbers[0] < numbers[-2]


def test_the_page_needs_neither_torch_nor_matplotlib():
    code = (
        "import sys; from masa.report.page import build;"
        "assert not {'torch', 'transformers', 'matplotlib', 'pandas'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium():
    """Debian's browser, headless."""
    path = shutil.which("chromium")
    if not path:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="the extra `test` is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    """A page in the browser, and whatever it asked for or complained of."""

    def __init__(self, browser, path, width, height=900):
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.requests, self.complaints = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.goto(path.as_uri())
        until(lambda: self.page.evaluate("document.readyState === 'complete'"))

    def check(self):
        """Nothing was asked for but the file itself and what it holds, and nothing went wrong."""
        assert self.requests, "the file itself is a request"
        assert [url[:80] for url in self.requests if not url.startswith(("file:", "data:", "blob:"))] == []
        assert sum(url.startswith("file:") for url in self.requests) == 1
        assert self.complaints == []
        assert self.page.evaluate("window.broken") is None
        wide = self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide == 0, f"the page is {wide} pixels wider than the window"

    def screenshots(self, folder, prefix):
        for section in self.page.query_selector_all("main > section"):
            name = section.get_attribute("id")
            self.page.evaluate("id => document.getElementById(id).scrollIntoView({behavior: 'instant'})", name)
            self.page.wait_for_timeout(50)
            shot = folder / f"{prefix}-{name}.png"
            self.page.screenshot(path=shot)
            assert len(Image.open(shot).convert("RGB").getcolors(1 << 20)) > 5, f"{shot} is empty"


def column(page, table, index):
    return page.locator(f"#{table} tbody tr:visible").evaluate_all(
        "(rows, i) => rows.map(r => r.cells[i].innerText)", index
    )


@pytest.mark.parametrize("width", [1280, 390])
def test_clicking_through(chromium, smoke, results, tmp_path, width):
    out = tmp_path / "page.html"
    build.write(hostile(smoke), results, out)
    opened = Opened(chromium, out, width)
    page = opened.page

    # a table is sorted by click and by key, and what has no value stays last
    heading = page.locator("#table-table1 thead th", has_text="Average (%)")
    index = heading.evaluate("th => th.cellIndex")
    assert heading.get_attribute("aria-sort") == "none"
    before = column(page, "table-table1", 0)
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    values = [text.split()[0] for text in column(page, "table-table1", index)]
    assert values == ["20.00", "30.00", "33.10", "34.00", "n/a"]
    heading.locator("button").focus()
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    after = column(page, "table-table1", 0)
    assert after != before
    assert after[0] == "Equal"
    assert after[-1] == "Lacks"

    # verdicts have colours, and the same ones in the cell that they are about
    colours = {
        name: page.locator(f"#table-table1 td.judged.{name}").first.evaluate(
            "td => getComputedStyle(td).backgroundColor"
        )
        for name in ("agrees", "differs")
    }
    assert colours == {"agrees": "rgb(226, 244, 234)", "differs": "rgb(253, 234, 229)"}

    # rows are filtered, all words count, and hostile text is text
    page.locator("#table-table1 .filter").fill("incomplete lacks")
    assert column(page, "table-table1", 0) == ["Lacks"]
    assert page.locator("#table-table1 .count").inner_text() == "1 of 5 rows"
    page.locator("#table-table1 .filter").fill("onerror")
    assert column(page, "table-table1", 0) == [HOSTILE]
    page.locator("#table-table1 .filter").fill("")
    assert len(column(page, "table-table1", 0)) == 5

    # the first column stays while a wide table moves inside its box
    box = page.locator("#table-table1 .scroll")
    left = page.locator("#table-table1 tbody th").first.bounding_box()["x"]
    box.evaluate("box => { box.scrollLeft = 150; }")
    assert page.locator("#table-table1 tbody th").first.bounding_box()["x"] == pytest.approx(left, abs=1)

    with page.expect_download() as download:
        page.locator("#table-table1 .download").click()
    assert download.value.path().read_bytes() == (results / "tables/table1.csv").read_bytes()

    # runs and axes of the chart
    count = lambda: int(page.locator("#chart").get_attribute("data-curves"))  # noqa: E731
    assert count() == 3
    page.get_by_label("digits-compact").first.check()
    assert count() == 4
    page.locator("#choose-method label", has_text="MASA-QKVO").locator("input").uncheck()
    assert count() == 3
    page.locator("#show-train").check()
    assert count() == 6
    page.locator("#legend tbody input").first.uncheck()
    assert count() == 4
    page.locator("#x-axis").select_option("seconds")
    page.locator("#log-axis").check()
    page.locator("#smoothing").fill("0.5")
    page.locator("#choose-method button").click()
    page.locator("#choose-method button").click()
    assert count() == 0
    assert page.locator("#chart-empty").is_visible()
    page.locator("#choose-method button").click()
    assert count() == 6

    # values at the pointer
    cell = page.locator("#legend tbody tr", has_text="MASA-QKVO").locator("td").first
    at_the_end = cell.inner_text()
    page.locator("#chart").scroll_into_view_if_needed()
    area = page.locator("#chart .u-over").bounding_box()
    page.mouse.move(area["x"] + 3, area["y"] + area["height"] / 2)
    # not wait_for_function: what it evaluates again and again, the page's own policy forbids
    until(lambda: page.evaluate("document.querySelector('#legend tbody').innerText !== ''"))
    assert at_the_end == "4.1000"
    assert cell.inner_text() == "4.8500"
    page.mouse.move(area["x"] - 30, area["y"] - 30)

    # a figure is enlarged, and closed by its key
    page.locator("#figure-validation_loss .picture").click()
    assert page.locator("#large img").is_visible()
    assert page.locator("#large img").evaluate("image => image.naturalWidth") == 640
    page.keyboard.press("Escape")
    assert not page.locator("#large").is_visible()

    # the configuration is folded up, and commands can be copied
    assert not page.locator("#configuration pre").is_visible()
    page.locator("#configuration summary").click()
    assert "tokenizer:" in page.locator("#configuration pre").inner_text()
    copy = page.locator("#figure-validation_loss .copy")
    copy.click()
    until(lambda: page.evaluate("document.querySelector('#figure-validation_loss .copy').textContent !== 'Copy'"))

    opened.check()
    opened.screenshots(tmp_path, width)
    page.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_a_real_run(chromium, smoke, smoke_results, tmp_path, width):
    out = tmp_path / "page.html"
    found = build.write(smoke, smoke_results, out, ["config/smoke.yaml"])
    assert found.problems == []
    parts = r'id="((?:table|figure)-[\w-]+)"'
    by_the_rule = (smoke_results / "report.html").read_text()
    assert re.findall(parts, by_the_rule) == re.findall(parts, out.read_text())
    assert "snakemake --cores all table1 --configfile config/smoke.yaml" in by_the_rule
    assert out.stat().st_size < 6e6
    opened = Opened(chromium, out, width)
    page = opened.page
    assert page.locator("#overview .cards li").first.inner_text().startswith("10 of 10")
    assert page.locator(".missing-list").count() == 0
    assert page.locator("article.table").count() == 13
    assert page.locator("figure").count() == 13
    assert page.locator(".node.done").count() == page.locator(".node").count() > 10
    assert page.locator("#chart canvas").count() == 1
    folded = page.locator("main details:not([open]) > summary")
    while folded.count():
        folded.first.click()
    assert page.locator("#configuration pre").is_visible()
    opened.check()
    opened.screenshots(tmp_path, width)
    page.close()


def test_an_empty_page_opens_too(chromium, smoke, tmp_path):
    (tmp_path / "results").mkdir()
    build.write(smoke, tmp_path / "results", tmp_path / "page.html")
    opened = Opened(chromium, tmp_path / "page.html", 390)
    opened.check()
    assert opened.page.locator(".missing-list li").count() == 26


def test_smoothing_is_an_exponential_mean(chromium):
    page = chromium.new_page()
    page.add_script_tag(content=(ROOT / "masa/report/page/templates/smooth.js").read_text())
    assert page.evaluate("smooth([1, 3, 2], 0)") == [1, 3, 2]
    assert page.evaluate("smooth([4, 4, 4], 0.9)") == pytest.approx([4, 4, 4])
    assert page.evaluate("smooth([1, 3, 2], 0.5)") == pytest.approx([1, 3.5 / 1.5, 3.75 / 1.75])


def test_the_browser_would_notice_a_request_and_an_error(chromium, tmp_path):
    """What the other tests rely on."""
    path = Path(tmp_path / "bad.html")
    path.write_text('<img src="http://localhost:9/x.png"><script>undefined.x</script>')
    opened = Opened(chromium, path, 390)
    assert any(url.startswith("http:") for url in opened.requests)
    with pytest.raises(AssertionError):
        opened.check()
    assert any("Cannot read" in text for text in opened.complaints)
