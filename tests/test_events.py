"""masa tensorboard: event files read back with TensorBoard's own reader, number by number."""

import itertools
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import warm
from conftest import ROOT, until
from test_status import RUN, lines, long_spec, start
from test_training import spec_of

from masa import cli
from masa.errors import MasaError
from masa.runs import run
from masa.study.status.tail import Growing
from masa.training import language

pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")


def scalars(folder):
    """All that TensorBoard reads of one run: tag -> [(step, value, wall time)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {t: [(e.step, e.value, e.wall_time) for e in found.Scalars(t)] for t in found.Tags()["scalars"]}, found


def expected(log):
    """What should be there, as float32, computed anew from the log."""
    tags = {"loss": "train/loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm"}
    tags |= {
        "validation_loss": "validation/loss",
        "validation_top1": "validation/top1",
        "validation_top5": "validation/top5",
    }
    found, records = {}, list(run.read_jsonl(log))
    for r in records:
        for key, tag in tags.items():
            if key in r:
                found.setdefault(tag, []).append((r["step"], float(np.float32(r[key]))))
    trained = [r for r in records if "loss" in r]
    unit = "tokens" if "tokens" in trained[0] else "images"
    for a, b in itertools.pairwise(trained):
        speed = (b[unit] - a[unit]) / (b["training_seconds"] - a["training_seconds"])
        found.setdefault(f"{unit}_per_second", []).append((b["step"], float(np.float32(speed))))
    return found


def same(folder, log):
    found, _ = scalars(folder)
    assert {t: [(s, v) for s, v, _ in events] for t, events in found.items()} == expected(log)


@pytest.fixture(scope="module")
def results(tokens, digits, tmp_path_factory):
    """A language model and a Vision Transformer that are done."""
    from test_image_training import spec_of as image_spec

    from masa.training import images

    folder = tmp_path_factory.mktemp("results")
    language.pretrain(spec_of(steps=40), tokens, folder / "runs" / RUN)
    images.pretrain(image_spec("vanilla"), digits, folder / "runs" / "digits" / "vanilla" / "seed0")
    return folder


def test_every_number_is_read_back(results, tmp_path):
    out = tmp_path / "board"
    assert cli.main(["tensorboard", "--results", str(results), "--out", str(out)]) == 0
    for name in (RUN, "digits/vanilla/seed0"):
        same(out / name, results / "runs" / name / "metrics.jsonl")
    assert {"images_per_second", "validation/top1"} <= set(scalars(out / "digits" / "vanilla" / "seed0")[0])


def test_relative_times_are_those_of_the_steps(results, tmp_path):
    cli.main(["tensorboard", RUN, "--results", str(results), "--out", str(tmp_path)])
    log = results / "runs" / RUN / "metrics.jsonl"
    records = [r for r in run.read_jsonl(log) if "loss" in r]
    times = [wall for _, _, wall in scalars(tmp_path / RUN)[0]["train/loss"]]
    assert times[-1] == pytest.approx(log.stat().st_mtime, abs=1e-3)
    seconds = [r["training_seconds"] - records[0]["training_seconds"] for r in records]
    assert [t - times[0] for t in times] == pytest.approx(seconds, abs=1e-3)


def test_the_spec_is_there_as_text_and_as_hyperparameters(results, tmp_path):
    from tensorboard.plugins.hparams import plugin_data_pb2 as messages

    cli.main(["tensorboard", RUN, "--results", str(results), "--out", str(tmp_path)])
    _, board = scalars(tmp_path / RUN)
    text = board.Tensors("spec/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads("\n".join(line[4:] for line in text.splitlines())) == run.read_json(
        results / "runs" / RUN / "spec.json"
    )
    content = board.PluginTagToContent("hparams")
    begun = messages.HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    assert begun["sharing.method"].string_value == "masa"
    assert begun["training.learning_rate"].number_value == 5e-3
    metrics = messages.HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment.metric_infos
    assert "validation/loss" in {m.name.tag for m in metrics}


def test_the_same_command_again_writes_anew_and_leaves_other_files(results, tmp_path):
    for _ in range(2):
        cli.main(["tensorboard", RUN, "--results", str(results), "--out", str(tmp_path)])
        (tmp_path / RUN / "events.out.tfevents.1.other").write_bytes(b"")
    assert len(list((tmp_path / RUN).iterdir())) == 2
    same(tmp_path / RUN, results / "runs" / RUN / "metrics.jsonl")


def watch(results, out, module="masa.start"):
    """The command in a process of its own."""
    command = [sys.executable, "-m", module, "tensorboard", "--results", str(results), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--watch", "0.1"], cwd=ROOT, env=warm.ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )


def test_watching_follows_a_training_through_a_kill_and_a_resumption(tokens, tmp_path):
    results, out = tmp_path / "results", tmp_path / "board"
    results.mkdir()
    process, folder = start(long_spec(steps=800, checkpoint_minutes=4e-3), tokens, results)
    until(lambda: lines(folder) > 4, process=process)
    watching = watch(results, out)
    try:
        until(lambda: list((out / RUN).glob("*.masa")), process=None)
        first = next((out / RUN).glob("*.masa"))
        until(lambda: list(folder.glob("checkpoints/*/complete.json")), process=process)
        before = lines(folder)
        until(lambda: lines(folder) > before + 1, process=process)  # lines that will be dropped
        process.send(signal.SIGKILL)
        process.wait()
        process, folder = start(long_spec(steps=800, checkpoint_minutes=4e-3), tokens, results)
        assert process.wait() == 0, process.said
        said = watching.communicate(timeout=60)[1]
    finally:
        watching.kill()
    assert watching.returncode == 0, said
    assert "1 run written" in said
    assert not first.exists(), "written anew where lines were dropped"
    same(out / RUN, folder / "metrics.jsonl")


def test_ctrl_c_ends_watching_with_all_that_was_there(tokens, tmp_path):
    results, out = tmp_path / "results", tmp_path / "board"
    results.mkdir()
    process, folder = start(long_spec(), tokens, results)
    until(lambda: lines(folder) > 4, process=process)
    process.send(signal.SIGKILL)  # interrupted: not over
    process.wait()
    watching = watch(results, out, "masa.cli")
    until(lambda: list((out / RUN).glob("*.masa")))
    until(lambda: "train/loss" in scalars(out / RUN)[0])
    watching.send_signal(signal.SIGINT)
    said = watching.communicate(timeout=60)[1]
    assert watching.returncode == 0, said
    same(out / RUN, folder / "metrics.jsonl")


def test_two_directories_of_one_run_do_not_mix(results, tmp_path):
    shutil.copytree(results / "runs" / RUN, tmp_path / "copy")
    command = ["tensorboard", RUN, str(tmp_path / "copy"), "--results", str(results), "--out", str(tmp_path / "board")]
    assert cli.main(command) == 2


def test_two_directories_of_one_name_do_not_mix(results, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(results / "runs" / RUN, tmp_path / place / "run")
        (tmp_path / place / "run" / "spec.json").unlink()  # which would say its id
    folders = [str(tmp_path / place / "run") for place in ("a", "b")]
    command = ["tensorboard", *folders, "--results", str(results), "--out", str(tmp_path / "board")]
    assert cli.main(command) == 2


def test_without_the_package_it_says_how_to_get_it(results, tmp_path, monkeypatch):
    from masa.report.events import Events

    for name in [n for n in sys.modules if n.split(".")[0] == "tensorboard" or n.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MasaError, match=r"needs the package tensorboard .*pip install tensorboard"):
        Events(tmp_path / "board")
    assert not (tmp_path / "board").exists()


def test_a_folder_that_cannot_be_is_named(results, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["tensorboard", "--results", str(results), "--out", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_log_that_grows_is_read_piece_by_piece(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = Growing(path)
    assert log.read() == (False, [])
    path.write_text('{"step": 1}\n{"step"')
    assert log.read() == (False, [{"step": 1}])
    assert log.read() == (False, [])
    with path.open("a") as file:
        file.write(': 2}\n{"step": 3}\n')
    assert log.read() == (False, [{"step": 2}, {"step": 3}])
    assert log.read() == (False, [])


@pytest.mark.parametrize("how", ["replaced", "rewritten", "shorter", "removed"])
def test_a_log_that_dropped_lines_is_noticed(how, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    log = Growing(path)
    log.read()
    if how == "replaced":
        (tmp_path / "new").write_text('{"step": 1}\n{"step": 2}\n{"step": 9}\n')
        (tmp_path / "new").replace(path)
    elif how == "rewritten":  # the same file, longer, but another line where the last one was
        path.write_text('{"step": 1}\n{"step": 8}\n{"step": 9}\n')
    elif how == "shorter":
        path.write_text('{"step": 9}\n')
    else:
        path.unlink()
    anew, records = log.read()
    assert anew
    assert [r["step"] for r in records] == {
        "replaced": [1, 2, 9],
        "rewritten": [1, 8, 9],
        "shorter": [9],
        "removed": [],
    }[how]
    assert log.read() == (False, [])
