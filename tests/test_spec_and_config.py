"""Bad input is one clear message before anything starts; every configuration that ships is right."""

import copy
import csv
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT

import masa
from masa.models import language
from masa.study import accounting, checks, config, cost, experiments

SHAPE = masa.ModelShape(12, 96, 6, 6, dict.fromkeys("qkvo", (96, 96)) | {"u": (384, 96), "d": (96, 384)})
GROUPED = masa.ModelShape(12, 96, 6, 2, {"q": (96, 96), "k": (32, 96), "v": (32, 96), "o": (96, 96)})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"method": "massa"}, "Did you mean 'masa'"),
        ({"method": "masa", "atom": 4}, "Did you mean 'atoms'"),
        ({}, "needs the key 'method'"),
        ({"method": "masa", "rank": 4}, "'rank' has no effect with method 'masa'"),
        ({"method": "masa", "projections": "qkx"}, "projection 'x' does not exist"),
        ({"method": "masa", "projections": "qqk"}, "twice"),
        ({"method": "masa", "projections": ""}, "must be a string of the letters"),
        ({"method": "masa", "atoms": 13}, "more than L = 12"),
        ({"method": "masa", "atoms": 0}, "at least 1"),
        ({"method": "masa", "atoms": "L/5"}, "not an integer here: L = 12"),
        ({"method": "masa", "atoms": "many"}, "a fraction of L, d or H"),
        ({"method": "masa", "atoms": True}, "must be an integer"),
        ({"method": "masa", "coefficients": "mpl"}, "Did you mean 'mlp'"),
        ({"method": "masa", "embedding_dim": 8}, "only with coefficients = 'mlp'"),
        ({"method": "masa", "dictionaries": 5}, "must be a list of letters"),
        ({"method": "gqa"}, "needs num_key_value_heads"),
        ({"method": "masa", "projections": "qk", "dictionaries": ["qv"]}, "does not share"),
        ({"method": "masa", "dictionaries": ["qk", "kv"]}, "twice"),
        ({"method": "masa", "atoms": {"q": 4}}, "but the dictionaries are"),
        ({"method": "sequential", "sets": 5}, r"Choose one of \[1, 2, 3, 4, 6, 12\]"),
        ({"method": "low-rank", "rank": 97}, "exceeds 96"),
        ({"method": "gqa", "num_key_value_heads": 4}, r"Choose one of \[1, 2, 3, 6\]"),
        ({"method": "masa", "projections": "qkvog"}, "projection 'g' does not exist"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(masa.MasaError, match=message):
        masa.SharingSpec.coerce(spec).resolve(SHAPE)


def test_unequal_shapes_have_no_common_dictionary():
    with pytest.raises(masa.MasaError, match="equal shapes"):
        masa.SharingSpec("masa", dictionaries=("qv",)).resolve(GROUPED)


def test_relative_numbers():
    assert masa.SharingSpec("masa").resolve(SHAPE).atoms == 4
    assert masa.SharingSpec("low-rank").resolve(SHAPE).rank == 16
    assert masa.SharingSpec("low-rank", rank="d/3").resolve(SHAPE).rank == 32
    assert masa.SharingSpec("gqa", num_key_value_heads="H/6").resolve(SHAPE).num_key_value_heads == 1
    spec = masa.SharingSpec("masa", dictionaries=("qv",), atoms={"qv": 8, "k": 4, "o": "L/6"})
    assert masa.SharingSpec.coerce(spec.resolve(SHAPE).to_dict()).resolve(SHAPE).atoms == {"qv": 8, "k": 4, "o": 2}


def vision_model(c):
    return c["vision_scales"]["digits-compact"]["model"]


BREAK = {
    "mistyped key": (lambda c: c["training"].update(learnig_rate=1), "Did you mean 'learning_rate'"),
    "mistyped top key": (lambda c: c.update(evaluatoin={}), "Did you mean 'evaluation'"),
    "wrong value": (lambda c: c["training"].update(dtype="bf16"), "Did you mean 'bfloat16'"),
    "wrong type": (lambda c: c["training"].update(learning_rate="fast"), "training.learning_rate"),
    "unknown run in a table": (lambda c: c["tables"]["table1"]["experiments"].append("vanila"), "mean 'vanilla'"),
    "unknown run in a figure": (lambda c: c["figures"]["validation_loss"]["experiments"].append("x"), "'x'"),
    "unknown grid": (lambda c: c["tables"]["table1"].update(grid="mian"), "Did you mean 'main'"),
    "unknown scale": (lambda c: c["grids"]["main"].update(scales=["nanno"]), "Did you mean 'nano'"),
    "unknown method": (lambda c: c["experiments"]["vanilla"].update(method="vanila"), "Did you mean 'vanilla'"),
    "too many atoms": (lambda c: c["experiments"]["masa-qkv"].update(atoms=13), "nano/masa-qkv/seed0: atoms = 13"),
    "sets": (lambda c: c["experiments"]["sequential"].update(sets=5), "does not divide L = 12"),
    "odd heads": (lambda c: c["scales"]["nano"]["model"].update(num_attention_heads=7), "heads of even width"),
    "micro batch": (lambda c: c["training"].update(micro_batch_size=3), "does not divide"),
    "vocabulary": (lambda c: c["scales"]["nano"]["model"].update(vocab_size=99), "needs the tokenizer's vocabulary"),
    "too few tokens": (lambda c: c["scales"]["nano"]["training"].update(tokens=100), "less than one step"),
    "missing paper": (lambda c: c["tables"]["table1"]["paper"].update(file="config/paper/x.csv"), "do not exist"),
    "mistyped task": (lambda c: c["evaluation"]["tasks"].append("hellaswagg"), "Did you mean 'hellaswag'"),
    "shell in a name": (lambda c: c["scales"].update({"a; rm -rf x": c["scales"]["nano"]}), "does not match"),
    "path in a name": (lambda c: c["experiments"].update({"../x": c["experiments"]["vanilla"]}), "does not match"),
    "unknown image data": (
        lambda c: c["vision_scales"]["digits-compact"].update(data="digit"),
        "Did you mean 'digits'",
    ),
    "unknown data set": (lambda c: c["images"]["cifar10"].update(dataset="cifar"), "Did you mean 'cifar10'"),
    "wrong channels": (lambda c: vision_model(c).update(channels=3), "channels = 3, but digits has 1"),
    "wrong classes": (lambda c: vision_model(c).update(num_classes=9), "num_classes = 9, but digits has 10"),
    "patch": (lambda c: vision_model(c).update(patch_size=3), "patch_size = 3 does not divide image_size = 8"),
    "unknown vision family": (lambda c: vision_model(c).update(family="vti"), "Did you mean 'vit'"),
    "mistyped size": (lambda c: vision_model(c).update(patchsize=2), "Did you mean 'patch_size'"),
    "vision recipe": (lambda c: c["vision_scales"]["digits-compact"]["training"].update(steps=9), "either epochs or"),
    "two scales of a name": (
        lambda c: c["vision_scales"].update(nano=c["vision_scales"]["digits-compact"]),
        "same name",
    ),
    "unknown first": (lambda c: c["first"].append("tabel1"), "Did you mean 'table1'"),
    "gqa of vision": (lambda c: c["tables"]["vision"]["experiments"].append("gqa"), "does not exist in timm"),
    "unknown only": (lambda c: c["experiments"]["masa-qkvo-s4"].update(only=["cifar10-depe"]), "mean 'cifar10-deep'"),
    "unknown judge": (lambda c: c["tables"]["vision"].update(judged="top1"), "Did you mean 'top1_pct'"),
    "unknown kind of figure": (
        lambda c: c["figures"]["confusion"].update(kind="confusoin"),
        "Did you mean 'confusion'",
    ),
    "figure of another model": (
        lambda c: c["figures"]["confusion"].update(grid="main"),
        "cannot draw models of tokens",
    ),
    "mixed grid": (lambda c: c["grids"]["vision"].update(scales=["digits-compact", "shapes-tiny"]), "mixes models of"),
    "no run": (lambda c: c["figures"]["predictions"].update(experiments=["masa-qkvo-s4"]), "none of its experiments"),
    "test fraction": (lambda c: c["images"]["cifar10"].update(test_fraction=0.3), "has a test split of its own"),
    "fractions": (lambda c: c["images"]["digits"].update(validation_fraction=0.9), "leaves nothing to train on"),
    "source of images": (lambda c: c["images"]["digits"].update(source="file:x"), "digits comes in a package"),
    "rate as text": (
        lambda c: vision_model(c).update(drop_rate="0.1"),
        "drop_rate must be a number of at least 0 and less than 1, got '0.1'",
    ),
    "unknown boxes": (lambda c: c["boxes"]["shapes"].update(dataset="shape"), "Did you mean 'shapes'"),
    "size of boxes": (
        lambda c: c["boxes"]["shapes"].update(image_size=64),
        "image_size = 32, but boxes of shapes have 64",
    ),
    "key that is no text": (lambda c: c["scales"].update({1: None}), "scales: keys must be text, got 1"),
    "null where a number is wanted": (
        lambda c: c["scales"]["nano"]["model"].update(vocab_size=None),
        "vocab_size must be an integer of at least 1, got None",
    ),
    "not finite": (lambda c: c["training"].update(learning_rate=float("inf")), "finite, got inf"),
    "family of another type": (lambda c: vision_model(c).update(family=["vit"]), "Did you mean 'vit'"),
    "key with a dot": (lambda c: c.update({"training.tokens": 5}), "the configuration: key 'training.tokens'"),
    "no vanilla": (lambda c: c["throughput"].update(methods=["gqa"]), "must begin with vanilla"),
}


@pytest.mark.parametrize("name", BREAK)
def test_bad_configuration(name):
    change, message = BREAK[name]
    broken = copy.deepcopy(config.load())
    change(broken)
    with pytest.raises(masa.MasaError, match=message):
        config.check(broken)


def test_a_removed_scale_may_still_be_named_by_only():
    merged = config.load()
    merged["vision_scales"]["cifar10-deep"] = None
    config.check(merged)


def test_kinds_of_figures_are_those_that_can_be_drawn():
    from masa.report import figures

    assert set(checks.FIGURES) == set(figures.KINDS)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(masa.MasaError, match="does not exist"):
        config.load([tmp_path / "none.yaml"])
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(masa.MasaError, match=r"broken\.yaml is not valid YAML"):
        config.load([tmp_path / "broken.yaml"])
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(masa.MasaError, match="not valid YAML"):
        config.load([tmp_path / "latin.yaml"])


def test_an_anchor_within_itself_is_a_message(tmp_path):
    (tmp_path / "round.yaml").write_text("scales: &a {x: *a}")
    with pytest.raises(masa.MasaError, match=r"round\.yaml nests too deeply"):
        config.load([tmp_path / "round.yaml"])


def test_a_plan_needs_no_key_that_has_a_default():
    merged = config.load()
    merged["boxes"]["shapes"] = {"dataset": "shapes", "image_size": 32}
    config.check(merged)
    assert cost.data.images_of("boxes", merged["boxes"]["shapes"]) == (576, 128)
    assert cost.data.images_of("images", {"dataset": "digits", "source": "pypi:scikit-learn==1.9.1"}) == (1258, 359)


OVERLAYS = sorted(
    p.name for p in (ROOT / "config").glob("*.yaml") if p.name not in ("experiments.yaml", "artefacts.yaml")
)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_run_of_every_configuration_builds_with_the_right_count(overlay):
    merged = config.load([ROOT / "config" / overlay])
    built = set()
    for run_id in experiments.all_runs(merged):
        scale, experiment, seed = experiments.parse_run(run_id)
        if (scale, experiment) in built:
            continue
        built.add((scale, experiment))
        spec = experiments.run_spec(merged, scale, experiment, seed)
        with torch.device("meta"):
            model = accounting.build(spec)
        counts = masa.count_parameters(model)
        if "family" in spec["model"]:
            assert counts.attention_dense == 4 * spec["model"]["num_layers"] * spec["model"]["hidden_size"] ** 2
            expected = {"vanilla": 0, "masa-qkv": 1 / 2, "masa-qkvo-s4": 5 / 6}.get(experiment, 2 / 3)
            rounding = 0.022 if experiment == "low-rank" else 2e-3  # d/6 rounded down; coefficients count
            assert counts.attention_reduction == pytest.approx(expected, abs=rounding), run_id
            continue
        vanilla = experiments.vanilla_parameters(spec["model"], spec["model"]["vocab_size"])
        if experiment == "vanilla":
            assert counts.total == vanilla
        fewer_biases = 2 * sum(
            block.self_attn.q_proj.out_features - block.self_attn.k_proj.out_features for block in model.model.layers
        )
        assert counts.total + (counts.attention_dense - counts.attention) + fewer_biases == vanilla
    assert built


def paper(name):
    with (ROOT / "config" / "paper" / name).open() as file:
        return list(csv.DictReader(file))


def reduction(scale, experiment):
    merged = config.load([ROOT / "config" / "paper.yaml"])
    spec = experiments.run_spec(merged, scale, experiment, 0)
    with torch.device("meta"):
        return masa.count_parameters(language.build(spec["model"], spec["sharing"], 1024))


@pytest.mark.parametrize("row", paper("table1.csv"), ids=lambda r: f"{r['scale']}-{r['method']}")
def test_reductions_of_table_1_are_the_papers(row):
    assert 100 * reduction(row["scale"], row["method"]).attention_reduction == pytest.approx(
        float(row["attn_cr_pct"]),
        abs=0.1,  # at M, d/6 is rounded down to 170
    )


@pytest.mark.parametrize("row", paper("table2.csv"), ids=lambda r: f"{r['method']}-{r['atoms']}")
def test_reductions_of_table_2_are_the_papers(row):
    name = row["method"] if row["atoms"] in ("", "4") else f"{row['method']}-s{row['atoms']}"
    assert 100 * reduction("S", name).attention_reduction == pytest.approx(float(row["attn_cr_pct"]), abs=0.06)


def test_parameter_counts_are_the_papers():
    for scale, wanted in (("S", 110), ("M", 335), ("L", 729)):
        assert round(reduction(scale, "vanilla").total / 1e6) == wanted
    large = reduction("L", "masa-qkvo")
    assert round(large.attention_dense / 1e6, 1) == 226.5
    assert round(large.attention / 1e6, 1) == 75.5
    assert 100 * reduction("S", "low-rank-text").attention_reduction == pytest.approx(33.3, abs=0.06)


def test_paper_steps_are_those_of_the_recipe():
    merged = config.load([ROOT / "config" / "paper.yaml"])
    steps = {s: experiments.run_spec(merged, s, "vanilla", 0)["training"]["steps"] for s in ("S", "M", "L")}
    assert steps == {"S": 4196, "M": 12779, "L": 27809}


def test_tokens_per_parameter_when_tokens_are_not_given():
    merged = config.load()
    merged["scales"]["nano"]["training"].pop("tokens")
    spec = experiments.run_spec(merged, "nano", "masa-qkvo", 0)
    tokens = 20 * experiments.vanilla_parameters(spec["model"], 2048)
    assert spec["training"]["steps"] == tokens // (8 * 128)


def test_config_readme_is_made_from_the_schema():
    text = (ROOT / "config" / "README.md").read_text()
    assert config.describe() in text, "run: masa config --describe, and put its output into config/README.md"


def test_every_key_has_a_sentence():
    rows = [line.split("|") for line in config.describe().splitlines()[2:]]
    assert len(rows) > 200
    assert not [row[1] for row in rows if len(row[4].strip()) < 2]


def test_the_schema_for_editors_is_made_from_the_classes():
    """And it takes every file that ships, none of which has all keys."""
    import jsonschema

    stored = yaml.safe_load(config.SCHEMA.read_text())
    assert stored == config.schema(), "run: masa config --schema > workflow/schemas/config.schema.yaml"
    for path in (ROOT / "config").glob("*.yaml"):
        jsonschema.Draft202012Validator(stored).validate(yaml.safe_load(path.read_text()))
    validator = jsonschema.Draft202012Validator(stored)
    validator.validate({"vision_scales": {"digits-compact": {"model": {"num_layers": 3}}}})
    for wrong in ({"training": {"learnig_rate": 1}}, {"scales": {"-x": None}}, {"scales": {"a b": {"zz": 1}}}):
        assert not validator.is_valid(wrong), wrong  # names too, which pydantic leaves to its own check


def test_parsing_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from masa import cli; from masa.runs import fingerprint; from masa.study import config, inputs;"
        "c = config.load(); inputs.data_spec(c);"
        "fingerprint.fingerprint('masa.training.language');"
        "assert not {'torch', 'transformers', 'datasets', 'pandas', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_an_overlay_changes_one_of_several_places_that_yaml_names_together(tmp_path):
    """As Snakemake merges: the anchor `heal` of config/compression.yaml stays what it is."""
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("compressions: {matrix-pca-healed: {heal: {steps: 2}}}\n")
    found = config.load([overlay])["compressions"]
    assert found["matrix-pca-healed"]["heal"]["steps"] == 2
    assert found["svd-llm-healed"]["heal"] == config.load()["compressions"]["svd-llm-healed"]["heal"]
    assert found["svd-llm-healed"]["heal"]["steps"] != 2
