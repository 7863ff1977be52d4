"""Small runs that share a GPU: what the configuration says, what jobs ask for and lease, what the plan says."""

import re
import subprocess
import time

import pytest
from conftest import ROOT
from projects import BIN, ENVIRONMENT
from test_devices import has, job, place, stop
from test_training import spec_of, start

import masa
from masa.cli.main import make_parser
from masa.runs import devices
from masa.study import config
from masa.study.cost import Plan, device, report, shares
from masa.study.cost.devices import GIB
from masa.study.cost.workflow import jobs

__all__ = ["place"]  # a fixture

MINE = """\
plan: { device: h100, gpus: { nano: 0.125, digits-compact: 0.05, SmolLM2-135M: 0.5 } }
"""


def merged(tmp_path, text=MINE, *overlays):
    (tmp_path / "mine.yaml").write_text(text)
    return config.load([*(ROOT / "config" / name for name in overlays), tmp_path / "mine.yaml"])


def test_hundredths_are_rounded_up():
    assert [devices.percent(share) for share in (0.001, 0.01, 0.07, 0.29, 1 / 3, 0.5, 1.0)] == [
        1,
        1,
        7,
        29,
        34,
        50,
        100,
    ]


def test_a_job_asks_for_the_share_of_its_scale_or_model(tmp_path):
    c = merged(tmp_path)
    for rule, name, expected in (
        ("pretrain", "nano/vanilla/seed0", 13),
        ("evaluate", "nano/vanilla/seed0", 13),
        ("evaluate_vision", "digits-compact/vanilla/seed1", 5),
        ("compress", "SmolLM2-135M/svd", 50),
        ("calibrate", "SmolLM2-135M/attention", 50),
        ("pretrain", "S/vanilla/seed0", 100),
        ("time_methods", "nano", 100),
    ):
        assert shares.hundredths(c, rule, name) == expected, (rule, name)
    assert shares.hundredths(c, "pretrain", "S/vanilla/seed0", 8) == 800
    assert shares.hundredths(config.load(), "pretrain", "nano/vanilla/seed0") == 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plan: { gpus: { nanoo: 0.5 } }", "plan.gpus: scale or pretrained model 'nanoo' .* Did you mean 'nano'"),
        ("plan: { gpus: { nano: 1.5 } }", "plan.gpus.nano must be a number of more than 0 and at most 1, got 1.5"),
        ("plan: { gpus: { nano: 0 } }", "plan.gpus.nano must be a number of more than 0"),
        (
            "plan: { gpus: { L: 0.5 } }\nscales: { L: { training: { processes_per_node: 8 } } }",
            r"plan.gpus.L = 0.5 shares a GPU, but runs of L have training.processes_per_node = 8: set that to 1",
        ),
        ("plan: { gpus: { nano: 0.5 } }\ntraining: { nodes: 2 }", "have training.nodes = 2"),
    ],
)
def test_a_share_that_cannot_be_is_named(tmp_path, text, message):
    with pytest.raises(masa.MasaError, match=message):
        merged(tmp_path, text)


def test_a_whole_gpu_each_is_no_share(tmp_path):
    merged(tmp_path, "plan: { gpus: { L: 1 } }\nscales: { L: { training: { processes_per_node: 8 } } }")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--cores", "8", "--resources", "gpu=2"], "Give gpu_percent=N instead, 100 a GPU"),
        (["--cores", "8", "--resources", "gpu_percent=200"], None),
        (["--profile", "workflow/profiles/slurm"], "each of these jobs asks for one"),
    ],
)
def test_the_workflow_hands_shares_on_and_says_once_what_becomes_of_them(tmp_path, given, said):
    merged(tmp_path)
    targets = ["results/runs/nano/vanilla/seed0/manifest.json", "results/runs/nano/masa-qkvo/seed0/manifest.json"]
    command = [f"{BIN}/snakemake", "-n", "-p", "--quiet", "host", *given, "--configfile", str(tmp_path / "mine.yaml")]
    done = subprocess.run([*command, "--", *targets], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-2000:]
    assert re.findall(r"masa pretrain .* --gpus (\S+) --log", text) == ["13%", "13%"]
    assert text.count("plan.gpus (") == (said is not None)
    assert said is None or said in text


LEASING = """
import sys, time
from pathlib import Path
from masa.runs import devices
with devices.leased(int(sys.argv[2]) / 100) as (gpu,):
    began = time.time()
    time.sleep(2)
    Path(sys.argv[1]).write_text(f"{gpu} {sys.argv[2]} {began} {time.time()}")
"""


def test_under_snakemake_jobs_run_beside_each_other_as_their_shares_allow(place):
    """Its scheduler and the leases count the same hundredths: five quarters and a half of one GPU."""
    (place / "job.py").write_text(LEASING)
    (place / "Snakefile").write_text(
        "rule all:\n    input: list('abcdef')\n"
        "rule one:\n    output: '{n}'\n    wildcard_constraints: n='[a-f]'\n"
        "    resources: gpu_percent=lambda wildcards, attempt: 50 if wildcards.n == 'f' else 25\n"
        "    shell: 'python job.py {output} {resources.gpu_percent}'\n"
    )
    command = [f"{BIN}/snakemake", "--cores", "8", "--resources", "gpu_percent=100", "--scheduler", "greedy"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "7", "TMPDIR": str(place)}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "waiting for" not in done.stderr, "none is started that would wait"
    ran = [(place / name).read_text().split() for name in "abcdef"]
    assert {gpu for gpu, *_ in ran} == {"7"}
    spans = [(int(share), float(began), float(ended)) for _, share, began, ended in ran]
    at_once = [sum(share for share, began, ended in spans if began <= moment < ended) for _, moment, _ in spans]
    assert 75 <= max(at_once) <= 100, at_once


def gpus(*words):
    return make_parser().parse_args(["throughput", "--scale", "nano", "--out", "x", *words]).gpus


def test_the_option(capsys):
    assert gpus() is None
    assert [gpus("--gpus", text) for text in ("0.25", "25%", "1", "100%", "800%")] == [0.25, 0.25, 1.0, 1.0, 8.0]
    for text in ("0", "-1", "1.5", "150%", "some", "nan", "inf"):
        with pytest.raises(SystemExit):
            gpus(f"--gpus={text}")
        assert "must be a whole number, or a share below one" in capsys.readouterr().err


def test_a_training_leases_its_share(place, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    most = job(place, "most", 0.7)
    assert has(place, "most") == "7"
    running = start(spec_of("vanilla"), tokens, tmp_path / "fits", "--gpus", "30%")
    assert running.wait(timeout=120) == 0, "beside the other one"
    waiting = start(spec_of("vanilla"), tokens, tmp_path / "waits", "--gpus", "0.31")
    time.sleep(8)
    assert waiting.poll() is None
    assert not (tmp_path / "waits").exists()
    stop(place, "most")
    _, said = waiting.communicate(timeout=120)
    assert waiting.returncode == most.wait(timeout=10) == 0
    assert "waiting for 0.31 of one of the GPUs 7, which other jobs use" in said
    wrong = start(spec_of("vanilla", processes_per_node=2), tokens, tmp_path / "wrong", "--gpus", "0.5")
    _, said = wrong.communicate(timeout=60)
    assert wrong.returncode == 2
    assert "--gpus = 0.5, but test/vanilla/seed0 has 2 processes" in said


def test_the_plan_says_how_many_fit_a_card_and_which_share_is_too_small(tmp_path):
    plan = Plan(merged(tmp_path))
    fits = shares.at_once(plan, jobs(plan))
    need = plan.job("pretrain", "nano/gqa/seed0").memory_bytes
    largest = max(j.memory_bytes for j in jobs(plan) if j.rule == "pretrain" and j.name.startswith("nano/"))
    assert need <= largest
    assert fits["nano"] == int(80 * GIB // largest) > 10
    (line,) = re.findall(r"^at once on one h100.*", report.text(plan, 1), re.M)
    assert f"{fits['nano']} of nano" in line
    assert "10 at once make 1.43 M tokens/s in sum, one alone 0.44 M" in line
    assert not shares.too_small(plan, jobs(plan))
    small = Plan(merged(tmp_path, "plan: { device: h100, gpus: { nano: 0.01 } }"))
    (said,) = shares.too_small(small, jobs(small))
    assert said.startswith("plan.gpus.nano = 0.01 is 0.8 GiB of h100, and its jobs need up to ")
    enough = float(re.search(r"raise it to ([\d.]+)\.$", said)[1])
    assert said in report.text(small, 1)
    again = Plan(merged(tmp_path, f"plan: {{ device: h100, gpus: {{ nano: {enough} }} }}"))
    assert not shares.too_small(again, jobs(again))
    for other in ("cpu", "a100"):
        assert "tokens/s in sum" not in report.text(Plan(merged(tmp_path), other), 1)
    assert shares.at_once(Plan(merged(tmp_path), "cpu"), jobs(plan)) == {}
    paper = Plan(merged(tmp_path, "plan: { device: h100 }", "paper.yaml"))
    assert not {"S", "M", "L"} & set(shares.at_once(paper, jobs(paper))), "60 GiB of 80, and all of eight"
    assert device("h100").memory_bytes == 80 * GIB
