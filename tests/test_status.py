"""masa status: what it says of runs that wait, train, are stopped, killed, fail and end, seen from another process."""

import codecs
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
from pathlib import Path

import pytest
import warm
from conftest import ROOT, Forked, until, whole_checkpoints
from test_training import spec_of

from masa import cli
from masa.errors import MasaError
from masa.runs import run
from masa.study import config, experiments
from masa.study.status import holder, runs, view
from masa.study.status.clock import FileClock
from masa.study.status.survey import Surveyor
from masa.study.status.tail import last_records
from masa.training import language

RUN = "test/masa/seed0"


def long_spec(**more):
    """Many small steps, a line of the log every 1 % of them."""
    return spec_of(**({"steps": 2400, "batch_size": 1, "micro_batch_size": 1, "context": 8} | more))


def start(spec, tokens, results, log=True):
    """Train in a process of its own, as the workflow does."""
    out = results / "runs" / spec["run"]
    command = ["pretrain", "--spec", json.dumps(spec), "--tokens", str(tokens), "--out", str(out)]
    if log:
        command += ["--log", str(results / "logs" / "pretrain" / f"{spec['run']}.log")]
    return Forked(lambda: cli.main(command), results / "said.txt"), out


def see(results, *wanted):
    """The status of all runs that lie in some results, by id."""
    return {s.run: s for s in Surveyor(results, config.load(), wanted, named=False).survey().runs}


def lines(out):
    log = out / "metrics.jsonl"
    return log.read_text().count("\n") if log.is_file() else 0


@pytest.fixture
def results(tmp_path):
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


@pytest.fixture(scope="module")
def finished(tokens, tmp_path_factory):
    """Results with one run that is done."""
    folder = tmp_path_factory.mktemp("finished")
    language.pretrain(spec_of(steps=40), tokens, folder / "runs" / RUN)
    return folder


def test_a_run_is_seen_from_its_first_line_over_a_stop_to_its_end(tokens, results):
    spec = long_spec(steps=600)
    process, out = start(spec, tokens, results)
    until(lambda: lines(out) > 12, process=process)
    found = see(results)[RUN]
    assert found.state == "running", found
    assert (found.pid, found.host) == (process.pid, os.uname().nodename)
    assert 0 < found.step < found.steps == 600
    assert found.unit == "tokens"
    assert found.amount == 8 * found.step
    records = [r for r in run.read_jsonl(out / "metrics.jsonl") if "loss" in r and r["step"] <= found.step]
    assert found.loss == records[-1]["loss"]
    recent = records[-10:]
    seconds = recent[-1]["training_seconds"] - recent[0]["training_seconds"]
    steps = recent[-1]["step"] - recent[0]["step"]
    assert found.per_second == pytest.approx(8 * steps / seconds)
    since = min(found.age_seconds, 6 * seconds / steps)  # six steps a line
    assert found.eta_seconds == pytest.approx((600 - found.step) * seconds / steps - since, abs=0.01)
    assert 0 <= found.age_seconds < 60
    process.send(signal.SIGTERM)
    assert process.wait() == 75, process.said
    stopped = see(results)[RUN]
    (checkpoint,) = whole_checkpoints(out)
    assert (stopped.state, stopped.checkpoint) == ("interrupted", checkpoint)
    assert f"was stopped by SIGTERM at step {checkpoint} and can be resumed" in stopped.note
    assert stopped.eta_seconds is None
    process, out = start(spec, tokens, results)
    assert process.wait() == 0, process.said
    done = see(results)[RUN]
    manifest = run.read_json(out / "manifest.json")["training"]
    assert done.state == "done"
    assert (done.step, done.steps, done.amount) == (600, 600, 4800)
    assert done.validation_loss == manifest["validation_loss"]
    assert done.per_second == manifest["tokens_per_second"]
    assert (done.evaluated, done.note, done.checkpoint) == (False, "", None)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_killed_run_is_interrupted_and_not_running(checkpoint, tokens, results):
    process, out = start(long_spec(checkpoint_minutes=1e-3 if checkpoint else 5), tokens, results)
    until(lambda: whole_checkpoints(out) if checkpoint else lines(out) > 2, process=process)
    assert see(results)[RUN].state == "running"
    process.send(signal.SIGKILL)
    process.wait()
    found = see(results)[RUN]
    assert found.state == "interrupted"
    if checkpoint:
        assert found.note == f"the same command will go on from step {found.checkpoint:,}"
        assert found.checkpoint == whole_checkpoints(out)[-1]
    else:
        assert found.note == "the same command will begin anew: there is no checkpoint yet"


def test_a_failed_run_says_why_until_it_is_started_again(tokens, results):
    process, out = start(spec_of(learning_rate=1e30, max_grad_norm=1e30), tokens, results)
    assert process.wait() == 2, process.said
    found = see(results)[RUN]
    assert found.state == "failed"
    assert re.match(r"test/masa/seed0: the (loss|gradient norm) is \w+ at step \d+, whose batch is items", found.note)
    with run.exclusive(out):
        assert see(results)[RUN].state == "running", "somebody tries again"


def test_a_defect_is_named_by_its_last_line(tokens, results, monkeypatch):
    def defective(*_, **__):
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(language, "pretrain", defective)
    process, out = start(spec_of(), tokens, results)
    assert process.wait() == 1
    out.mkdir(parents=True)
    found = see(results)[RUN]
    assert (found.state, found.note) == ("failed", "ZeroDivisionError: of all things")


def test_looking_never_takes_the_lock_from_a_trainer_that_starts(tmp_path):
    def take():
        for _ in range(1200):
            with run.exclusive(tmp_path / "run"):
                pass

    process = Forked(take, tmp_path / "said.txt")
    looks = set()
    while process.poll() is None:
        found = holder.holder_of(tmp_path / "run")
        looks.add(found and found.alive)
    assert process.status == 0, process.said
    assert True in looks


def test_a_trainer_that_was_forked_or_waits_is_no_holder(tmp_path):
    with run.exclusive(tmp_path):
        waiting = Forked(lambda: run.exclusive(tmp_path, wait=True).__enter__() and 0, tmp_path / "said.txt")
        until(lambda: "waiting" in waiting.said, process=waiting)
        assert holder.holder_of(tmp_path).pid == os.getpid()
        assert holder.holder_of(tmp_path).alive is True
        waiting.send(signal.SIGKILL)
        waiting.wait()
    assert holder.holder_of(tmp_path).alive is False


def test_without_the_systems_table_of_locks_the_process_itself_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(holder, "LOCKS", tmp_path / "none")
    with run.exclusive(tmp_path):
        assert holder.holder_of(tmp_path).alive is True
    gone = Forked(lambda: run.exclusive(tmp_path).__enter__() and 0, tmp_path / "said.txt")
    gone.wait()
    assert holder.holder_of(tmp_path).alive is False


def elsewhere(finished, results, age, intervals=None):
    """A run that a process of another machine has written, with a last sign of life some seconds ago."""
    out = results / "runs" / RUN
    out.mkdir(parents=True)
    records = [r for r in run.read_jsonl(finished / "runs" / RUN / "metrics.jsonl") if r["step"] <= 20]
    for r in records:
        r["training_seconds"] = r["step"] * (intervals or 0.1)
    (out / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (out / "spec.json").write_bytes((finished / "runs" / RUN / "spec.json").read_bytes())
    (out / ".lock").write_text("process 77 on node-b17 since 2026-01-02T03:04:05+00:00")
    for name in ("metrics.jsonl", ".lock"):
        os.utime(out / name, (time.time() - age,) * 2)
    return out


@pytest.mark.parametrize(
    ("age", "interval", "state"),
    [(5, 0.1, "running"), (600, 0.1, "silent"), (600, 120, "running"), (1300, 120, "silent")],
)
def test_on_another_machine_a_run_is_known_by_the_age_of_its_last_line(age, interval, state, finished, results):
    elsewhere(finished, results, age, interval)
    found = see(results)[RUN]
    assert found.state == state
    assert (found.host, found.pid) == ("node-b17", 77)
    assert found.age_seconds == pytest.approx(age, abs=5)
    if state == "silent":
        assert "from process 77 on node-b17, of which this machine knows nothing more" in found.note
        assert found.eta_seconds is None
    else:
        assert found.eta_seconds == pytest.approx(20 * interval - min(age, interval)), "a late line is no progress"


def test_on_another_machine_the_log_of_the_job_tells_of_its_end(finished, results):
    elsewhere(finished, results, 600)
    log = results / "logs" / "pretrain" / f"{RUN}.log"
    log.parent.mkdir(parents=True)
    log.write_text("masa: error: No space left on device: x; free space\n")
    found = see(results)[RUN]
    assert (found.state, found.note) == ("failed", "No space left on device: x; free space")
    os.utime(log, (time.time() - 900,) * 2)  # of an attempt before this one
    assert see(results)[RUN].state == "silent"


def test_a_wrong_clock_of_this_machine_changes_no_age(finished, results, monkeypatch):
    elsewhere(finished, results, 50)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 7200)
    found = Surveyor(results, config.load(), named=False).survey()
    assert found.clock == "file system"
    assert found.runs[0].age_seconds == pytest.approx(50, abs=5)
    assert found.runs[0].state == "running"
    assert not list(results.glob(".clock*"))


def test_where_nothing_can_be_written_the_clock_is_this_machines(tmp_path):
    clock = FileClock(tmp_path / "none")
    assert clock.now() == pytest.approx(time.time(), abs=1)
    assert clock.source == "this machine"


def test_before_its_first_line_a_run_is_running(results):
    out = results / "runs" / RUN
    with run.exclusive(out):
        run.write_json(out / "spec.json", spec_of())
        found = see(results)[RUN]
        assert (found.state, found.note, found.step, found.steps) == ("running", "no line yet", None, 20)


def test_only_the_end_of_a_log_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(1, 150_001):
            file.write(
                json.dumps({"step": step, "tokens": 8 * step, "loss": 1.0, "training_seconds": step / 10}) + "\n"
            )
            if step == 149_000:
                file.write(json.dumps({"step": step, "validation_loss": 2.0, "training_seconds": step / 10}) + "\n")
        file.write('{"step": 150001, "loss": 0.')

    def read_so_far():
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    before = read_so_far()
    found = last_records(path, "validation_loss")
    assert read_so_far() - before < 400_000 < path.stat().st_size / 20
    assert found[-1]["step"] == 150_000, "half a line is none"
    assert [r["validation_loss"] for r in found if "validation_loss" in r] == [2.0]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\n\n", b"{", b"\xff\x00\n[1]\n7\nnull\n", b'{"step": "x", "loss": []}\n', b"[" * 9999),
        b'{"step": 1, "loss": 2, "training_seconds": 1}\n{"step": 2, "loss": Infinity, "training_seconds": Infinity}\n',
    ],
)
def test_damaged_files_are_no_reason_to_fail(content, results, capsys):
    out = results / "runs" / RUN
    out.mkdir(parents=True)
    for name in ("metrics.jsonl", "spec.json", "manifest.json", ".lock"):
        (out / name).write_bytes(content)
    (out / "checkpoints").write_bytes(content)
    assert see(results)[RUN].state in ("running", "interrupted", "waiting")
    for more in ([], ["--json"]):
        assert cli.main(["status", "--results", str(results), *more]) == 0
        assert RUN in capsys.readouterr().out


def test_directories_that_come_and_go_while_they_are_read(finished, results):
    stop = threading.Event()

    def churn():
        import shutil

        while not stop.is_set():
            for seed in range(3):
                out = results / "runs" / "test" / "masa" / f"seed{seed}"
                shutil.copytree(finished / "runs" / RUN, out)
                (out / "manifest.json").unlink()
                shutil.rmtree(out)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        surveyor, seen, rounds = Surveyor(results, config.load(), named=False), 0, 0
        deadline = time.monotonic() + 60
        while rounds < 150 or not seen:  # a busy machine may let the other thread wait for 150 rounds
            seen, rounds = seen + len(surveyor.survey().runs), rounds + 1
            assert seen or time.monotonic() < deadline, f"{rounds} rounds, no run was ever seen"
    finally:
        stop.set()
        thread.join()


@pytest.fixture(scope="module")
def configured(tokens, tmp_path_factory):
    """A configuration with two runs, one of which is done, and a third on disk that it does not name."""
    folder = tmp_path_factory.mktemp("configured")
    overlay = folder / "mine.yaml"
    files = [ROOT / "config" / "smoke.yaml", overlay]
    grids = config.load(files[:1])["grids"]
    others = {name: {"scales": []} for name, grid in grids.items() if name != "main" and "scales" in grid}
    mine = {"results": str(folder / "results"), "data": {"tokenizer": {"vocab_size": 64}}}
    overlay.write_text(json.dumps(mine | {"grids": {"main": {"seeds": [0]}} | others}))
    c = config.load(files)
    named = experiments.all_runs(c)
    spec = experiments.run_spec(c, *experiments.parse_run(named[0]))
    language.pretrain(spec, tokens, folder / "results" / "runs" / named[0])
    language.pretrain(spec_of(steps=4), tokens, folder / "results" / "runs" / RUN)
    return files, folder / "results", named


def test_all_runs_of_the_configuration_and_those_beside_it(configured, capsys):
    files, _, named = configured
    arguments = ["status", "--configfile", *map(str, files)]
    assert cli.main([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    states = {r["run"]: (r["state"], r["configured"], r["outdated"]) for r in data["runs"]}
    waiting = dict.fromkeys(named[1:], ("waiting", True, False))
    assert states == {named[0]: ("done", True, False), RUN: ("done", False, False)} | waiting
    assert data["summary"]["runs"] == len(named) + 1
    assert data["summary"]["done"] == 2
    assert data["summary"]["waiting"] == len(named) - 1
    assert (data["summary"]["compressions_done"], data["summary"]["compressions"]) == (0, 5)
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "1 of these runs is not in the configuration." in said
    assert f"2 of {len(named) + 1} runs done (0 evaluated), {len(named) - 1} waiting" in said
    assert "0 of 5 compression sweeps done" in said
    assert len([line for line in said.splitlines() if line.startswith(("done", "waiting"))]) == len(named) + 1
    assert "\x1b" not in said


def test_a_run_made_with_another_spec_is_pointed_out(configured, tmp_path, capsys):
    files, _, named = configured
    other = tmp_path / "other.yaml"
    other.write_text("training: { weight_decay: 0.7 }\n")
    assert cli.main(["status", named[0], "--configfile", *map(str, files), str(other)]) == 0
    assert "the configuration asks for another spec now" in capsys.readouterr().out


def test_evaluations_and_compressions_are_counted(configured, capsys):
    files, results, named = configured
    surveyor = Surveyor(results, config.load(files))
    identity = run.read_json(results / "runs" / named[0] / "manifest.json")["identity"]
    for of, evaluated in (("an earlier training", []), (identity, [named[0]])):
        metrics = {"provenance": {"inputs": {"run": of}}}
        run.write_json(results / "evaluations" / named[0] / "metrics.json", metrics)
        assert [s.run for s in surveyor.survey().runs if s.evaluated] == evaluated
    run.write_json(results / "compression" / surveyor.compressions[0] / "manifest.json", {})
    assert surveyor.survey().compressions == (1, 5)


@pytest.mark.parametrize(
    ("wanted", "count"), [(RUN, 1), ("test/masa", 1), ("test", 1), ("t*/*/seed[0-9]", 1), ("{directory}", 1)]
)
def test_runs_are_chosen_by_id_beginning_pattern_or_directory(wanted, count, finished):
    wanted = wanted.format(directory=finished / "runs" / RUN)
    assert list(see(finished, wanted)) == [RUN] * count


def test_two_directories_of_one_id_are_two_runs(finished, results):
    out = elsewhere(finished, results, 5)
    found = Surveyor(results, config.load(), [str(out), str(finished / "runs" / RUN)], named=False).survey()
    assert [(s.run, s.state) for s in found.runs] == [(RUN, "running"), (RUN, "done")]
    bars = [line for line in view.rendered(found, 80).plain.splitlines() if "masa/seed0" in line]
    assert ["20/40" in line for line in bars] == [True, False]


def test_what_does_not_exist_is_said(finished):
    with pytest.raises(MasaError, match=r"'test/mesa/seed0' does not exist\. Did you mean 'test/masa/seed0'"):
        see(finished, "test/mesa/seed0")
    with pytest.raises(MasaError) as long:  # the configuration has 38
        Surveyor(finished, config.load(), ["nano/vanila/seed0"])
    assert re.search(r"Did you mean 'nano/vanilla/seed0' .*\? There are \d\d; `masa status` lists", str(long.value))
    assert len(str(long.value)) < 250
    for arguments, message in (
        (["--watch", "0"], "--watch = 0 must be above 0"),
        (["--watch", "nan"], "must be above 0"),
        (["--json", "--watch"], "--json and --watch exclude each other"),
    ):
        said = warm.masa("status", "--results", finished, *arguments)
        assert said.returncode == 2
        assert message in said.stderr


def test_it_neither_imports_torch_nor_needs_a_results_directory(tmp_path):
    code = "import sys; from masa import cli; status = cli.main(sys.argv[1:]); print('torch' in sys.modules, status)"
    said = subprocess.run(
        [sys.executable, "-c", code, "status", "--results", str(tmp_path / "none")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert said.splitlines()[-1] == "False 0"
    assert "There is nothing yet in" in said
    assert "0 of 0 runs done" in said


def test_results_that_are_not_there_are_said(tmp_path):
    nowhere = tmp_path / "results"
    found = Surveyor(nowhere, config.load()).survey()
    assert found.runs and {run.state for run in found.runs} == {"waiting"}
    assert f"{nowhere} does not exist here: nothing has run yet" in view.plain(found)
    nowhere.mkdir()
    assert "does not exist" not in view.plain(Surveyor(nowhere, config.load()).survey())


def test_a_file_is_no_directory_of_results(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MasaError, match="file is no directory"):
        see(tmp_path / "file")


def test_words_of_files_cannot_move_the_cursor(finished, results):
    out = elsewhere(finished, results, 600)
    (out / ".lock").write_text("process 7 on \x1b[2Jevil since now")
    survey = Surveyor(results, config.load(), named=False).survey()
    assert "\x1b" not in view.plain(survey)
    assert "\x1b" not in view.rendered(survey, 120).plain


@pytest.mark.parametrize("width", [40, 80, 132, 250])
@pytest.mark.parametrize("height", [None, 6, 24])
def test_lines_fit_the_terminal(width, height):
    many = tuple(
        runs.Status(
            run=f"digits-compact/masa-qkv-common-qkv-budget-{i}/seed{i}",
            directory=str(i),
            state=state,
            note="the reason of it, " * 9 if state == "failed" else "",
            step=123_456,
            steps=1_234_567,
            unit="images",
            loss=12.3456789,
            validation_loss=2.3,
            per_second=98_765.4,
            eta_seconds=123_456,
            age_seconds=86_400 * 3.0,
            host="a-node-with-a-long-name.cluster",
        )
        for i, state in enumerate(runs.STATES * 3)
    )
    survey = view.Survey(
        "results", tuple(sorted(many, key=lambda s: runs.STATES.index(s.state))), (3, 14), "file system"
    )
    text = view.rendered(survey, width, height).plain.splitlines()
    body, foot = text[:-1], text[-1]
    assert all(len(line) <= width for line in body)
    assert foot.startswith("3 of 18 runs done")
    if height:
        assert len(body) + len(textwrap.wrap(foot, width)) <= max(height, 4)
        assert f"and {18 - sum('seed' in line for line in body)} more" in body[-1]
    else:
        assert sum("seed" in line for line in body) == 18
        assert sum("the reason of it" in line for line in body) >= 3


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, *command, columns=80, rows=24):
        self.said, self.status = "", None
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.pid, self.file = pty.fork()
        if not self.pid:
            for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
                os.environ.pop(name, None)
            os.environ["TERM"] = "xterm-256color"
            os.chdir(ROOT)
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            os.execv(sys.executable, [sys.executable, "-m", "masa.cli", *command])

    def read(self, until_true, seconds=60):
        end = time.monotonic() + seconds
        while not until_true(self.said):
            assert time.monotonic() < end, self.said
            if select.select([self.file], [], [], 0.1)[0]:
                try:
                    piece = os.read(self.file, 65536)
                except OSError:  # its end
                    piece = b""
                if not piece:
                    break
                self.said += self.decoder.decode(piece)

    def wait(self):
        self.read(lambda _: False)
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    @property
    def frames(self):
        """What was drawn, without control sequences, line by line."""
        said = self.said.replace("\x1b[1A", "\n")  # up, for the next frame
        return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip("\r") for line in said.split("\n")]


def test_watching_redraws_within_80_columns_and_ends_with_the_last_run(tokens, results):
    process, out = start(long_spec(steps=900), tokens, results)
    until(lambda: lines(out) > 4, process=process)
    terminal = Terminal("status", "--results", str(results), "--watch", "0.2")
    terminal.read(lambda said: said.count("running  test") > 2)
    assert process.wait() == 0, process.said
    assert terminal.wait() == 0
    assert all(len(line) <= 80 for line in terminal.frames), max(terminal.frames, key=len)
    steps = [int(s) for s in re.findall(r"masa/seed0 .*?(\d+)/900", "\n".join(terminal.frames))]
    assert steps == sorted(steps)
    assert steps[0] < steps[-1] == 900
    assert "\x1b[1A" in terminal.said, "drawn over, not below"
    assert terminal.said.rstrip().endswith("\x1b[?25h"), "the cursor is back"
    assert "1 of 1 runs done" in terminal.frames[-2] + terminal.frames[-1] + terminal.frames[-3]


def test_ctrl_c_ends_watching_with_status_0(finished, results):
    elsewhere(finished, results, 5)
    terminal = Terminal("status", "--results", str(results), "--watch")
    terminal.read(lambda said: "1 running" in said)
    os.write(terminal.file, b"\x03")
    assert terminal.wait() == 0
    assert "Traceback" not in terminal.said
    assert "error" not in terminal.said


def test_watching_into_a_pipe_prints_plain_tables(finished):
    said = warm.masa("status", "--results", finished, "--watch", "0.1", check=True, timeout=60).stdout
    assert re.search(rf"^done +{RUN} +40/40 ", said, re.M)
    assert said.count("1 of 1 runs done") == 1, "over at the first look"


def test_every_field_of_the_json_is_documented(finished, capsys):
    assert cli.main(["status", "--results", str(finished), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    page = (ROOT / "docs" / "howto" / "watch.md").read_text()
    for name in [*data, *data["summary"], *data["runs"][0]]:
        assert f"`{name}`" in page, name
    for state in runs.STATES:
        assert f"| `{state}` |" in page


def test_a_key_that_changes_no_bits_makes_no_run_outdated():
    spec = spec_of()
    assert not runs.differs(spec, json.loads(json.dumps(spec)))
    other = spec_of(checkpoint_minutes=99, workers=3)
    assert not runs.differs(other, spec) and not runs.differs(spec, other)
    for changed in (spec_of(learning_rate=1.0), spec_of(seed=1), spec_of("vanilla"), spec_of(threads=2)):
        assert runs.differs(changed, spec)
