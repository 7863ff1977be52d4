"""Jobs that are forked from a process with their imports: the same as jobs of their own, in all that can be seen."""

import json
import os
import resource
import signal
import subprocess
import sys

import psutil
import pytest
from conftest import ROOT, until
from test_training import spec_of

from masa.runs import run
from masa.start import client

pytestmark = pytest.mark.skipif(not client.possible(), reason="jobs are forked on Linux without a GPU")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The environment of a workflow that lives until the end of this file."""
    before = os.environ.pop(client.VARIABLE, None)
    owner = subprocess.Popen(["sleep", "1000"])
    close = client.open_for(owner.pid)
    yield dict(os.environ)
    close()
    owner.kill()
    owner.wait()
    if before is not None:
        os.environ[client.VARIABLE] = before


def masa(environment, *arguments, **more):
    command = [sys.executable, "-m", "masa.start", *map(str, arguments)]
    more = {"cwd": ROOT, "capture_output": True, "text": True} | more
    return subprocess.run(command, env=environment, check=False, **more)


def cold(environment):
    return {name: value for name, value in environment.items() if name != client.VARIABLE}


def servers(environment):
    """Process ids of the servers of a workflow, by the place of their sockets."""
    found = subprocess.run(["pgrep", "-f", f"masa.start.server {environment[client.VARIABLE]}/"], capture_output=True)
    return [int(line) for line in found.stdout.split()]


def test_the_same_words_files_and_status(place, tmp_path):
    for arguments in (["--version"], ["nonsense"], ["config", "--describe"], ["tables", "no-such", "--out", tmp_path]):
        one, other = masa(place, *arguments), masa(cold(place), *arguments)
        assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)
    assert len(servers(place)) == 1
    for name, environment in (("warm", place), ("cold", cold(place))):
        done = masa(environment, "parameters", "--configfile", "config/smoke.yaml", "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "warm").read_bytes() == (tmp_path / "cold").read_bytes()


def test_a_job_is_where_its_client_is_and_has_its_limits(place, tmp_path):
    """A file size of 100 bytes, another directory and umask, words through a pipe: of the client, not of the server."""

    def limit():
        os.umask(0o027)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    arguments = ["parameters", "--configfile", ROOT / "config" / "smoke.yaml", "--out"]
    spec = json.dumps([])
    done = masa(place, "parameters", "--spec", spec, "--out", "here.json", cwd=tmp_path, preexec_fn=limit)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here.json").stat().st_mode & 0o777 == 0o640
    done = masa(place, *arguments, "large.json", cwd=tmp_path, preexec_fn=limit)
    assert done.returncode == 2 and "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert masa(place, *arguments, "large.json", cwd=tmp_path).returncode == 0
    assert (tmp_path / "large.json").stat().st_size > 100


def test_a_server_that_a_limited_client_started_limits_nobody_else(tmp_path):
    """Hard limits are inherited, and only the privileged may raise them."""
    place = os.environ | {"MASA_WARM": str(tmp_path / "warm")}
    (tmp_path / "warm").mkdir()
    (tmp_path / "warm" / "owner").write_text(str(os.getpid()))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    arguments = ["parameters", "--configfile", ROOT / "config" / "smoke.yaml", "--out", "large.json"]
    assert masa(place, *arguments, cwd=tmp_path, preexec_fn=limit).returncode == 2
    assert masa(place, *arguments, cwd=tmp_path).returncode == 0
    assert len(servers(place)) == 2


def test_another_environment_is_another_server(place):
    before = len(servers(place))
    assert masa(place | {"OMP_NUM_THREADS": "3"}, "--version").returncode == 0
    assert len(servers(place)) == before + 1
    assert masa(place | {"PWD": "/", "SHLVL": "7"}, "--version").returncode == 0
    assert len(servers(place)) == before + 1


@pytest.fixture
def waiting(place, tokens, tmp_path):
    """``masa pretrain`` that waits for this process, which holds its directory; (client, the forked process)."""
    with run.exclusive(tmp_path / "run"):
        spec = json.dumps(spec_of("vanilla", steps=2))
        command = ["pretrain", "--spec", spec, "--tokens", tokens, "--out", tmp_path / "run"]
        words = [sys.executable, "-m", "masa.start", *map(str, command)]
        with subprocess.Popen(words, env=place, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            said = process.stderr.readline()
            assert "waiting for it" in said, said + process.stderr.read()
            (job,) = psutil.Process(servers(place)[0]).children()
            yield process, job
            process.kill()


def test_a_signal_reaches_the_job(waiting):
    process, job = waiting
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert "stopped by SIGTERM while waiting" in process.stderr.read()
    until(lambda: not job.is_running(), 10)


def test_a_job_dies_with_who_asked_for_it(waiting):
    process, job = waiting
    process.kill()
    until(lambda: not job.is_running(), 10)


def test_a_killed_job_is_a_killed_command(waiting):
    process, job = waiting
    job.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL


def test_a_training_ends_on_the_same_bits(place, tokens, tmp_path):
    """The first job with an import makes it itself, the second finds it."""
    spec = json.dumps(spec_of("masa", steps=3))
    sums = []
    for name, environment in (("cold", cold(place)), ("first", place), ("second", place)):
        out = tmp_path / name
        done = masa(
            environment, "pretrain", "--spec", spec, "--tokens", tokens, "--out", out, "--log", tmp_path / "log"
        )
        assert done.returncode == 0, done.stderr
        sums.append(run.read_json(out / "manifest.json")["sha256"])
    assert sums[0] == sums[1] == sums[2]


def test_without_a_server_it_runs_by_itself(place, tmp_path):
    for nowhere in ("0", str(tmp_path), str(tmp_path / "gone")):
        done = masa(place | {client.VARIABLE: nowhere}, "--version")
        assert (done.returncode, done.stdout.split()[0]) == (0, "masa"), done.stderr


def test_a_server_ends_with_its_workflow(place):
    owner = subprocess.Popen(["sleep", "1000"])
    environment = cold(place)
    command = (
        "import os, sys; from masa.start import client; client.open_for(int(sys.argv[1]));"
        "print(os.environ[client.VARIABLE], flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", command, str(owner.pid)],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as workflow:
        environment = environment | {client.VARIABLE: workflow.stdout.readline().strip()}
        assert masa(environment, "--version").returncode == 0
        (server,) = servers(environment)
        owner.kill()
        owner.wait()
        until(lambda: not psutil.pid_exists(server), 10)
        workflow.stdin.close()
