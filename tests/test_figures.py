"""Every kind of figure as a printer sees it: its size, its fonts, no words over words, and what error bars are."""

import itertools
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from figure_results import spec_of, write_results
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image
from scipy import stats

import masa
from masa.report import canvas, figures, gap_figure, labels, style
from masa.runs import run
from masa.study import config

PAPER, EVIDENCE, BYTES = ["config/paper.yaml"], ["config/evidence.yaml"], ["config/bytes.yaml"]
ANIMALS = ["airplane", "automobile", "bird", "European fire salamander, Salamandra", "deer", "dog", "frog", "horse"]
BOXES = {"scales": ["shapes-tiny"], "seeds": [0]}
FOUR = ["vanilla", "masa-qkvo", "low-rank", "sequential"]

CASES = {
    "seven curves": ("validation_loss", {}, {}),
    "curves of three scales": ("validation_loss", {"overlays": PAPER}, {}),
    "one curve": ("validation_loss", {"names": ["vanilla"]}, {}),
    "curves of images, one seed": ("vision_loss", {"seeds": [0]}, {}),
    "gaps": ("gap", {"overlays": EVIDENCE}, {}),
    "gaps, one seed": ("gap", {"overlays": EVIDENCE, "seeds": [0]}, {}),
    "quality": ("quality_parameters", {}, {}),
    "quality of three seeds": ("quality_parameters", {"seeds": [0, 1, 2]}, {}),
    "effective ranks": ("effective_rank", {}, {}),
    "coefficients": ("coefficient_maps", {}, {}),
    "figure 2, one size": ("figure2", {}, {}),
    "figure 2, one seed": ("figure2", {"seeds": [0]}, {}),
    "figure 2, nine sizes": ("figure2", {"overlays": PAPER}, {}),
    "confusion": ("confusion", {}, {}),
    "confusion of four, long names": ("confusion", {"names": FOUR}, {"titles": ANIMALS, "classes": 8}),
    "confusion of 100 classes": ("confusion", {}, {"classes": 100}),
    "classes": ("per_class", {}, {}),
    "classes, long names, one seed": ("per_class", {"names": FOUR, "seeds": [0]}, {"titles": ANIMALS, "classes": 8}),
    "200 classes": ("per_class", {}, {"classes": 200}),
    "predictions": ("predictions", {}, {"titles": ANIMALS, "classes": 8}),
    "few predictions": ("predictions", {}, {"examples": 3}),
    "detections": ("detections", BOXES, {}),
    "few detections": ("detections", BOXES, {"examples": 4}),
    "fourteen compressions": ("perplexity_reduction", {}, {}),
    "fourteen compressions, two texts": ("perplexity_reduction", {}, {"texts": ("held_out", "wikitext")}),
    "one compression": ("perplexity_reduction", {"names": ["original", "svd-llm"], "reductions": [20]}, {}),
    "bytes of two models": ("figure_bytes", {"overlays": BYTES}, {"texts": ("held_out", "wikitext")}),
    "bytes, one text": ("figure_bytes", {"overlays": BYTES, "pretrained": ["SmolLM2-135M"]}, {}),
    "ranks": ("compression_ranks", {}, {}),
    "ranks of three models": ("compression_ranks", {"overlays": PAPER}, {}),
    "drift": ("kl_drift", {}, {}),
}


def made(name, folder, **changes):
    figure, asked, given = CASES[name]
    spec = spec_of(figure, **asked) | changes
    return spec, write_results(spec, folder, **given)


def words(figure):
    """Every text that is drawn, with its box in pixels."""
    figure.draw_without_rendering()
    unseen = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            away = 1e-6 * (high - low)
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not axes.axison or not low - away <= tick.get_loc() <= high + away:
                    unseen |= {tick.label1, tick.label2}
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in unseen]
    shown = [t for t in texts if t.axes is None or t.axes.get_visible()]
    return [(text, text.get_window_extent()) for text in shown]


def said(figure):
    return " ".join(text.get_text().replace("\n", " ") for text, _ in words(figure))


def overlapping(found):
    """Pairs of texts that cover one another by more than a hair; parallel slanted ones have boxes that say nothing."""
    pairs = []
    for (one, a), (other, b) in itertools.combinations(found, 2):
        if one.get_rotation() % 90 and other.get_rotation() % 90:
            continue
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        if width > 1 and height > 2:
            pairs.append((one.get_text(), other.get_text()))
    return pairs


@pytest.fixture
def closing():
    yield
    plt.close("all")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("error::UserWarning")  # matplotlib's, of a layout that cannot be had
def test_as_a_printer_sees_it(name, tmp_path, closing):
    spec, results = made(name, tmp_path)
    figure = figures.draw(spec, results)
    width, height = figure.get_size_inches()
    assert width in (style.COLUMN, style.TEXT) and 1 < height < 9.5, "fits its column and a page"
    found = words(figure)
    assert min(text.get_fontsize() for text, _ in found) >= style.SMALLEST >= 6
    assert overlapping(found) == []
    whole = figure.bbox
    for text, box in found:
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= whole.x1 + 1 and box.y1 <= whole.y1 + 1
        assert inside, f"{text.get_text()!r} sticks out of the figure"
    assert re.search(r"± 1 standard (deviation|error)|no error bars|[Oo]ne seed|95 % interval", said(figure))
    assert spec["title"] in said(figure)


@pytest.mark.parametrize("name", ["seven curves", "figure 2, one size", "fourteen compressions", "detections"])
def test_files_have_the_print_size_and_embedded_fonts_and_are_the_same_twice(name, tmp_path):
    spec, results = made(name, tmp_path / "results")
    for folder in ("a", "b"):
        figures.write(spec, results, tmp_path / folder)
    png, pdf = (tmp_path / "a" / f"{spec['name']}.{suffix}" for suffix in ("png", "pdf"))
    with Image.open(png) as picture:
        assert picture.width == round(300 * (style.COLUMN if "one size" in name else style.TEXT))
        assert picture.info["dpi"] == pytest.approx((300, 300), rel=1e-3)
        size = [pixels / 300 for pixels in picture.size]
    text = pdf.read_bytes()
    box = [float(n) for n in re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", text).groups()]
    assert box == pytest.approx([72 * side for side in size], abs=0.5)
    assert b"/Type3" not in text and b"/FontFile2" in text, "TrueType, embedded"
    for file in (png, pdf):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def colours_in(figure):
    """Label -> colours of what has it."""
    found = {}
    for axes in figure.axes:
        for artist in (*axes.lines, *(c[0] for c in axes.containers if hasattr(c, "has_yerr"))):
            label = artist.get_label()
            owner = next((c for c in axes.containers if artist in c.get_children()), artist)
            name = owner.get_label() or label
            if name and not name.startswith("_"):
                found.setdefault(name, set()).add(to_hex(artist.get_color()))
    return found


def test_a_method_has_one_colour_in_all_figures(tmp_path, closing):
    seen = {}
    for name in ("seven curves", "quality", "effective ranks", "curves of images, one seed", "classes"):
        spec, results = made(name, tmp_path / name)
        for label, colours in colours_in(figures.draw(spec, results)).items():
            seen.setdefault(label, []).append(colours)
    of = {entry["label"]: name for name, entry in config.load()["experiments"].items()}
    assert len(seen) == 7 and sum(map(len, seen.values())) > 20
    for label, colours in seen.items():
        assert set().union(*colours) == {to_hex(style.look(of[label])["color"])}, label


def test_no_two_known_methods_look_the_same_and_unknown_ones_like_none():
    looks = {name: str(style.look(name)) for name in style._LOOKS}
    assert len(set(looks.values())) == len(looks)
    assert not {str(style.look(f"mine-{i}")) for i in range(300)} & set(looks.values())
    assert style.look("mine") == style.look("mine")


def test_trainings_of_the_configuration_differ_also_where_no_markers_are_drawn():
    names = config.load()["experiments"]
    assert len({str(style.look(name) | {"marker": ""}) for name in names}) == len(names) > 15


def test_words_are_dark_enough():
    assert style.contrast([0, 0, 0]) == pytest.approx(21) and style.contrast([1, 1, 1]) == pytest.approx(1)
    for colour in style.COLOURS:
        assert style.contrast(style.readable(colour)) >= 4.5
    assert style.readable("#000000") == (0, 0, 0), "dark colours stay"


@pytest.mark.parametrize("seed", range(20))
def test_labels_keep_apart_stay_inside_and_keep_their_order(seed):
    generator = np.random.default_rng(seed)
    wanted = generator.normal(0.5, 0.2, generator.integers(1, 14)).clip(0, 1).tolist()
    places = labels.spread(wanted, 0.07, 0, 1)
    assert [p for _, p in sorted(zip(wanted, places, strict=True), key=lambda x: x[0])] == sorted(places)
    assert all(b - a >= 0.07 - 1e-9 for a, b in itertools.pairwise(sorted(places)))
    assert min(places) >= -1e-9 and max(places) <= 1 + 1e-9


def test_labels_that_have_room_stay_where_they_are_and_too_many_run_on_below():
    assert labels.spread([0.9, 0.1, 0.5], 0.1, 0, 1) == pytest.approx([0.9, 0.1, 0.5])
    crowd = labels.spread([0.5] * 20, 0.1, 0, 1)
    assert max(crowd) == pytest.approx(1) and min(crowd) == pytest.approx(-0.9)


def test_labels_beside_points_cover_neither_points_nor_one_another(closing):
    """Eight points in a heap, as at one number of parameters."""
    sheet = canvas.Canvas(style.TEXT, 2.4)
    points = [labels.End(1 + 0.02 * (i % 2), 1 + 0.05 * i, f"method {i}", style.BLUE) for i in range(8)]
    axis = sheet.axes[0][0]
    axis.plot([p.x for p in points], [p.y for p in points], "o")
    axis.margins(0.3)
    sheet.label_points(axis, points)
    figure = sheet.finish("A heap")
    found = words(figure)
    assert overlapping(found) == [] and len([1 for t, _ in found if t.get_text().startswith("method")]) == 8
    for x, y in axis.transData.transform([(p.x, p.y) for p in points]):
        assert not any(box.contains(x, y) for text, box in found if text in axis.texts)


def test_long_words_are_wrapped_and_cut():
    text = labels.wrapped("one two three " * 20 + "x" * 300, 6.5, 100)
    assert all(labels.width_of(line, 6.5) <= 100 for line in text.split("\n"))
    assert text.endswith("…") and text.startswith("one two")
    assert labels.shortened("short", 6.5, 100) == "short" and labels.shortened("", 6.5, 100) == ""


@pytest.mark.parametrize("name", ["seven curves", "quality", "figure 2, one size", "fourteen compressions", "ranks"])
def test_labels_of_any_length_and_with_any_signs(name, tmp_path, closing):
    spec, results = made(name, tmp_path)
    for i, row in enumerate(spec["rows"]):
        if i % 2:
            row["label"] = f"{row['label']}, a method $x^ with {{}}_ a name of more words than any column has room for"
    figure = figures.draw(spec, results)
    assert overlapping(words(figure)) == []
    assert all(box.x1 <= figure.bbox.x1 + 1 for _, box in words(figure))


@pytest.mark.parametrize("far", [1e4, 3e12, float("inf")])
def test_what_is_far_off_leaves_the_panel_and_says_so(far, tmp_path, closing):
    spec, results = made("fourteen compressions", tmp_path)
    for row in spec["rows"]:
        if row["experiment"] == "direct-share":
            path = results / row["records"][0] / "metrics.json"
            record = json.loads(path.read_text())
            record["texts"]["held_out"]["token_perplexity"] = far
            path.write_text(json.dumps(record))
    figure = figures.draw(spec, results)
    low, high = figure.axes[0].get_ylim()
    assert high / low < 7 and overlapping(words(figure)) == []
    assert re.search(rf"DirectShare ↑ ({'∞' if far == float('inf') else '10,000|3e12'})", said(figure))
    assert "↑: above the panel" in said(figure)
    above = [(box.y0, text.get_text()) for text, box in words(figure) if " ↑ " in text.get_text()]
    assert len(above) > 2 and "DirectShare" in max(above)[1], "the worst is highest"


def test_bars_and_bands_are_said_to_be_what(tmp_path, closing):
    def note(name):
        spec, results = made(name, tmp_path / name)
        return said(figures.draw(spec, results))

    assert "Mean over 2 seeds, band: ± 1 standard deviation over them." in note("seven curves")
    assert "Mean over 3 seeds, bars: ± 1 standard deviation over them." in note("quality of three seeds")
    assert "One seed; no error bars." in note("quality")
    assert "One seed, bars: ± 1 standard error over the test images." in note("figure 2, one seed")
    assert "bars (of up to 20 classes)" in note("200 classes")


def test_the_numbers_drawn_are_those_of_the_files(tmp_path, closing):
    spec, results = made("seven curves", tmp_path)
    left, right = figures.draw(spec, results).axes
    for row in spec["rows"]:
        logs = [list(run.read_jsonl(results / "runs" / run_id / "metrics.jsonl")) for run_id in row["runs"]]
        mean = np.mean([[r["validation_loss"] for r in log] for log in logs], axis=0)
        line = next(line for line in left.lines if line.get_label() == row["label"])
        assert line.get_ydata() == pytest.approx(mean)
        assert line.get_xdata().tolist() == [r["tokens"] for r in logs[0]]
    bands = [c.get_paths()[0].vertices for c in right.collections]
    assert len(bands) == 7 and np.ptp(bands[0][:, 1]) == 0, "vanilla does not differ from itself"
    # seeds of the i-th row differ by 0.02 i, so their sample deviation is 0.02 i / sqrt(2)
    assert np.ptp(bands[3][:, 1]) == pytest.approx(2 * 0.06 / 2**0.5)


def test_a_manifest_that_says_no_parameters_is_one_clear_message(tmp_path):
    spec, results = made("gaps", tmp_path)
    (results / "runs" / spec["rows"][0]["runs"][0] / "manifest.json").write_text("{}")
    with pytest.raises(masa.MasaError, match=r"manifest\.json says no `parameters\.total`"):
        figures.draw(spec, results)


def test_gaps_and_their_intervals_are_those_of_the_files(tmp_path, closing):
    """Against least squares with a column for every method and every seed, at the last token."""
    spec, results = made("gaps", tmp_path)
    generator, finals = np.random.default_rng(0), {}
    for row in spec["rows"]:
        for run_id in row["runs"]:
            path = results / "runs" / run_id / "metrics.jsonl"
            log = [
                r | {"validation_loss": r["validation_loss"] + generator.normal(0, 0.01)} for r in run.read_jsonl(path)
            ]
            path.write_text("".join(json.dumps(r) + "\n" for r in log))
            finals.setdefault(row["label"], []).append(log[-1]["validation_loss"])
    parameters = run.read_json(results / spec["rows"][0]["records"][0] / "metrics.json")["parameters"]["total"]
    (axis,) = figures.draw(spec, results).axes
    values = np.array(list(finals.values()))
    count, seeds = values.shape
    method, seed = np.indices(values.shape)
    design = np.column_stack(
        [*(method.ravel() == i for i in range(count)), *(seed.ravel() == i for i in range(1, seeds))]
    )
    rest = np.linalg.lstsq(design.astype(float), values.ravel(), rcond=None)[1].item()
    freedom = (count - 1) * (seeds - 1)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(2 * rest / freedom / seeds)
    assert len(axis.containers) == count - 1 == 6
    for bars, mean in zip(axis.containers, values[1:].mean(1) - values[0].mean(), strict=True):
        x, y = bars.lines[0].get_data()
        low, high = bars.lines[2][0].get_segments()[-1][:, 1]
        assert y[-1] == pytest.approx(mean) and [low, high] == pytest.approx([mean - half, mean + half])
        assert x[-1] == pytest.approx(250_000 / parameters, rel=0.1), "drawn a little aside"


def test_budgets_are_1_2_and_5_times_powers_of_ten():
    twenty = np.arange(1, 21)
    assert twenty[gap_figure.budgets(twenty)].tolist() == [1, 2, 5, 10, 20]
    assert gap_figure.budgets([0.3, 0.6, 0.9]) == [1, 2], "0.5 is nearest to 0.6; the last is always there"
    assert gap_figure.budgets([3.0]) == [0]
    assert gap_figure.budgets([1.0, 5.0, 5.2]) == [0, 2], "two labels at 5 would be one on the other"


def test_errors_name_the_file_and_leave_no_figure_behind(tmp_path, closing):
    spec, results = made("seven curves", tmp_path / "curves")
    log = results / "runs" / spec["rows"][2]["runs"][1] / "metrics.jsonl"
    log.write_text('{"step": 1, "tokens": 10, "loss": 3.0}\n')
    with pytest.raises(masa.MasaError, match=r"seed1/metrics.jsonl has no held-out loss yet"):
        figures.draw(spec, results)
    for name in ("few predictions", "few detections"):
        spec, results = made(name, tmp_path / name)
        for row in spec["rows"]:
            path = results / row["records"][0] / "metrics.json"
            run.write_json(path, run.read_json(path) | {"examples": []})
        with pytest.raises(masa.MasaError, match=r"has no examples to draw; set vision_evaluation.examples"):
            figures.draw(spec, results)
    spec, results = made("coefficients", tmp_path / "maps")
    path = results / spec["rows"][0]["records"][0] / "weights.json"
    run.write_json(path, run.read_json(path) | {"coefficients": {}})
    with pytest.raises(masa.MasaError, match=r"masa-qkvo has no coefficients; name a run of MASA"):
        figures.draw(spec, results)
    assert plt.get_fignums() == []
