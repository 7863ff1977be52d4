"""A run folder is looked at before anything is done in it: what goes on, what is refused, what is set aside."""

import json
import shutil
import signal

import pytest
from conftest import Forked, kill_after_checkpoints, until, whole_checkpoints
from safetensors.torch import load_file
from test_training import command as command_of
from test_training import losses, spec_of

import masa
from masa import cli
from masa.runs import run
from masa.training import earlier, images, language, trainer


def command(spec, tokens, out, *more):
    return [*command_of(spec, tokens, out)[3:], *map(str, more)]


def everything(folder, but=(".lock",)):
    """Path -> bytes of all that a folder holds."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in but)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def made(tokens, tmp_path_factory):
    """A finished run and the same one interrupted after two checkpoints, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    spec = spec_of(steps=30, checkpoint_minutes=1e-4)
    whole = language.pretrain(spec, tokens, folder / "finished")
    kill_after_checkpoints(lambda: language.pretrain(spec, tokens, folder / "cut"), folder / "cut")
    return folder, spec, whole


@pytest.fixture(params=["cut", "finished"])
def earlier_run(request, made, tmp_path):
    """Folder, spec and the finished run's manifest, of an interrupted and of a finished run."""
    folder, spec, whole = made
    shutil.copytree(folder / request.param, tmp_path / "run")
    return tmp_path / "run", spec, whole, request.param


def changed(spec, **recipe):
    return spec | {"training": spec["training"] | recipe}


CHANGES = {
    "a learning rate": (lambda s: changed(s, learning_rate=1e-3), "training.learning_rate 0.005 -> 0.001"),
    "fewer steps": (lambda s: changed(s, steps=29), "training.steps 30 -> 29"),
    "a method": (lambda s: s | {"sharing": {"method": "vanilla"}}, 'sharing.method "masa" -> "vanilla"'),
    "a seed": (lambda s: s | {"seed": 1}, "seed 0 -> 1"),
    "a key that was not there": (lambda s: changed(s, optimizer="muon"), 'training.optimizer "adamw" -> "muon"'),
    "threads": (lambda s: changed(s, threads=2), "training.threads 1 -> 2"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_is_refused_key_by_key_and_nothing_is_touched(change, earlier_run, tokens, capfd):
    out, spec, _, state = earlier_run
    make, said = CHANGES[change]
    before = everything(out)
    assert cli.main(command(make(spec), tokens, out)) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if "error" in x]
    assert f"{out} holds another run, {'finished' if state == 'finished' else 'interrupted, with a checkpoint'}" in line
    assert said in line and "--restart" in line and "another --out" in line
    assert everything(out) == before


def test_other_data_and_other_code_are_named(earlier_run, tokens, tmp_path, capfd, monkeypatch):
    out, spec, _, _ = earlier_run
    other = tmp_path / "tokens"
    shutil.copytree(tokens, other)
    manifest = run.read_json(other / "manifest.json")
    run.write_json(other / "manifest.json", manifest | {"tokenizer": "0" * 64})
    before = everything(out)
    assert cli.main(command(spec, other, out)) == 2
    assert "the tokenizer are others (sha256 " in capfd.readouterr().err
    monkeypatch.setattr(language, "fingerprint", lambda *_: "another")
    assert cli.main(command(spec, tokens, out)) == 2
    assert "the code of masa that trains means something else now" in capfd.readouterr().err
    assert everything(out) == before


@pytest.mark.parametrize("key", ["training.checkpoint_minutes", "training.workers", "run"])
def test_keys_that_change_no_bits_go_on(key, made, tokens, tmp_path, capfd):
    folder, spec, whole = made
    out = tmp_path / "run"
    shutil.copytree(folder / "cut", out)
    kept = whole_checkpoints(out)[-1]
    other = {
        "training.checkpoint_minutes": lambda: changed(spec, checkpoint_minutes=7),
        "training.workers": lambda: changed(spec, workers=1),
        "run": lambda: spec | {"run": "test/renamed/seed0"},
    }[key]()
    assert cli.main(command(other, tokens, out)) == 0
    said = capfd.readouterr().err
    assert f"goes on with {key} " in said and "changes none of its numbers" in said
    assert run.read_json(out / "manifest.json")["sha256"] == whole["sha256"]
    assert list(losses(out)) == list(range(1, 31))
    state = json.loads((folder / "cut" / "metrics.jsonl").read_text().splitlines()[0])
    assert state == json.loads((out / "metrics.jsonl").read_text().splitlines()[0]), f"gone on from step {kept}"
    assert cli.main(command(spec, tokens, out)) == 0
    assert "finished after 30 steps" in capfd.readouterr().err


def test_a_finished_run_given_again_says_so_and_ends_with_0(made, tokens, tmp_path, capfd, monkeypatch):
    folder, spec, whole = made
    out = tmp_path / "run"
    shutil.copytree(folder / "finished", out)
    before = everything(out)
    monkeypatch.setattr(trainer, "_train", lambda *_: pytest.fail("it is trained again"))
    assert cli.main(command(spec, tokens, out)) == 0
    assert f"{out} holds this run, finished after 30 steps; nothing is trained again" in capfd.readouterr().err
    assert everything(out) == before
    (out / "manifest.json").unlink()  # as Snakemake does before it runs the job again
    assert language.pretrain(spec, tokens, out) == whole
    assert everything(out) == before
    (out / "manifest.json").write_text("{")
    assert language.pretrain(spec, tokens, out, restart="changed") == whole
    assert everything(out) == before


@pytest.mark.parametrize("harm", ["missing", "flipped"])
def test_a_finished_run_that_is_damaged_is_said_and_kept_until_another_is_whole(harm, made, tokens, tmp_path, capfd):
    folder, spec, whole = made
    out = tmp_path / "run"
    shutil.copytree(folder / "finished", out)
    file = out / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink() if harm == "missing" else file.write_bytes(data)
    before = everything(out)
    assert cli.main(command(spec, tokens, out)) == 2
    said = capfd.readouterr().err
    assert f"{file} is {'missing' if harm == 'missing' else 'damaged'}" in said and "--restart" in said
    assert everything(out) == before
    assert cli.main(command(spec, tokens, out, "--restart", "changed")) == 0
    assert run.read_json(out / "manifest.json")["sha256"] == whole["sha256"]
    assert not (out / "before").exists()


def test_restart_keeps_the_old_run_until_the_new_one_has_finished(earlier_run, tokens, tmp_path, capfd, undisturbed):
    """Killed and given again, --restart goes on with the new run; then the old one goes."""
    out, spec, _, state = earlier_run
    old = everything(out)
    other = changed(spec, learning_rate=1e-3, steps=150)
    whole = undisturbed(language.pretrain, other, tokens)
    process = Forked(lambda: cli.main(command(other, tokens, out, "--restart")), tmp_path / "said.txt")
    until(lambda: (out / "before").is_dir() and len(whole_checkpoints(out)) > 1, process=process)
    process.send(signal.SIGKILL)
    process.wait()
    assert everything(out / "before") == old
    if state == "finished":
        assert masa.load(out / "before" / "model") is not None
    assert cli.main(command(spec, tokens, out)) == 2, "the old command is of another run now"
    assert "training.learning_rate 0.001 -> 0.005" in capfd.readouterr().err
    kept = whole_checkpoints(out)[-1]
    process = Forked(lambda: cli.main(command(other, tokens, out, "--restart")), tmp_path / "said.txt")
    assert process.wait() == 0, process.said
    assert run.read_json(out / "manifest.json")["sha256"] == whole["sha256"]
    seconds = [r["training_seconds"] for r in run.read_jsonl(out / "metrics.jsonl")]
    assert seconds == sorted(seconds), f"it went on from step {kept}"
    assert not (out / "before").exists()
    assert {path.name for path in out.iterdir()} == {*old_names(), ".lock"}


def old_names():
    return {"manifest.json", "identity.json", "provenance.json", "spec.json", "metrics.jsonl", "model"}


def test_restart_of_the_same_finished_run_trains_it_again(made, tokens, tmp_path):
    folder, spec, whole = made
    out = tmp_path / "run"
    shutil.copytree(folder / "finished", out)
    seconds = whole["training"]["training_seconds"]
    assert cli.main(command(spec, tokens, out, "--restart")) == 0
    again = run.read_json(out / "manifest.json")
    assert again["sha256"] == whole["sha256"] and again["training"]["training_seconds"] != seconds


def test_a_restart_within_a_restart_loses_neither(made, tokens, tmp_path):
    folder, spec, _ = made
    out = tmp_path / "run"
    shutil.copytree(folder / "finished", out)
    first = earlier.set_aside(out)
    shutil.copytree(folder / "cut", out, dirs_exist_ok=True)
    second = earlier.set_aside(out)
    assert (first.name, second.name) == ("before", "before-2")
    assert (first / "manifest.json").is_file() and whole_checkpoints(second)
    (out / "before-notes").mkdir()
    (out / "before-3").mkdir()
    (out / "before-3" / "mine.txt").touch()
    language.pretrain(spec, tokens, out)
    assert {path.name for path in out.glob("before*")} == {"before-notes", "before-3"}, "what is not ours stays"


def test_a_kill_while_a_run_is_set_aside_is_moved_on_from(made, tokens, tmp_path, monkeypatch):
    folder, spec, _ = made
    out = tmp_path / "run"
    shutil.copytree(folder / "finished", out)
    old, moved = everything(out), []

    def replace(self, target):
        if len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(shutil.move(self, target))

    monkeypatch.setattr(earlier.Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        earlier.set_aside(out)
    monkeypatch.undo()
    asked = earlier.Asked(spec, {}, "", "")
    assert earlier.decide(out, asked) == "begin"
    assert everything(out / "before") == old


def test_the_number_of_processes_is_refused_before_anything_is_touched(made, tokens, tmp_path, capfd):
    folder, spec, _ = made
    out = tmp_path / "run"
    shutil.copytree(folder / "cut", out)
    before = everything(out)
    with pytest.raises(masa.MasaError, match=r"asks for 1 x 2 processes .*, but 1 were started"):
        language.pretrain(changed(spec, processes_per_node=2, micro_batch_size=2), tokens, out)
    assert cli.main(command(changed(spec, micro_batch_size=3), tokens, out)) == 2
    assert "batch_size = 4 is not a multiple of micro_batch_size x processes = 3 x 1" in capfd.readouterr().err
    process = Forked(
        lambda: cli.main(command(changed(spec, processes_per_node=2, micro_batch_size=2), tokens, out)),
        tmp_path / "said.txt",
    )
    assert process.wait() == 2, process.said
    assert "training.processes_per_node 1 -> 2" in process.said and "Traceback" not in process.said
    assert everything(out) == before


def test_a_model_that_cannot_be_built_sets_nothing_aside(made, tokens, tmp_path, monkeypatch):
    folder, spec, _ = made
    out = tmp_path / "run"
    shutil.copytree(folder / "finished", out)
    before = everything(out)

    def build(*_):
        raise masa.MasaError("no such model")

    monkeypatch.setattr(language.language, "build", build)
    assert cli.main(command(changed(spec, learning_rate=1e-3), tokens, out, "--restart")) == 2
    assert everything(out) == before


def test_a_folder_of_an_earlier_version_goes_on_if_its_hash_is_the_same(made, tokens, tmp_path, capfd):
    folder, spec, whole = made
    for name in ("cut", "finished"):
        out = tmp_path / name
        shutil.copytree(folder / name, out)
        identity = run.read_json(out / earlier.RECORD)["identity"]
        (out / earlier.RECORD).unlink()
        if name == "cut":
            (out / "checkpoints" / "identity").write_text(identity)
        with pytest.raises(masa.MasaError, match=r"training\.learning_rate 0\.005 -> 0\.001"):
            language.pretrain(changed(spec, learning_rate=1e-3), tokens, out)
        assert language.pretrain(spec, tokens, out)["sha256"] == whole["sha256"]
        if name == "cut":
            (out / earlier.RECORD).unlink()
            (out / "manifest.json").write_text(json.dumps(whole | {"identity": "of other code"}))
            with pytest.raises(masa.MasaError, match="an earlier version of masa kept a hash alone"):
                language.pretrain(spec, tokens, out)


def test_a_manifest_of_something_else_is_not_deleted(tokens, tmp_path, capfd):
    out = tmp_path / "tokens"
    shutil.copytree(tokens, out)
    before = everything(out)
    assert cli.main(command(spec_of(), tokens, out)) == 2
    assert f"{out / 'manifest.json'} is of something else than a training" in capfd.readouterr().err
    assert cli.main(command(spec_of(), out, out)) == 2
    assert f"--out {out} is what is read (tokens)" in capfd.readouterr().err
    assert everything(out) == before


# -------------------------------------------------------------------------------------------------------- training on


def test_a_finished_run_is_trained_on(made, tokens, tmp_path, capfd, monkeypatch):
    """20 more steps: they begin with the model's weights and the 31st batch, by a schedule of their own."""
    folder, spec, whole = made
    parent, out = folder / "finished", tmp_path / "longer"
    longer = changed(spec, steps=50)
    seen, start = [], {}
    step = trainer.Trainer.training_step

    def look(self, model, inputs, *rest, **more):
        if not seen:
            start.update({name: p.detach().clone() for name, p in model.named_parameters()})
        seen.append(inputs["input_ids"].clone())
        return step(self, model, inputs, *rest, **more)

    monkeypatch.setattr(trainer.Trainer, "training_step", look)
    assert cli.main(command(longer, tokens, out, "--extend", parent)) == 0
    monkeypatch.undo()
    stored = masa.load(parent / "model").state_dict()
    assert start and all((start[name] == stored[name]).all() for name in start)
    data = language.PackedTokens(tokens, 32, 200, 0)
    assert len(seen) == 20
    assert all((seen[i][j] == data[4 * (30 + i) + j]["input_ids"]).all() for i in (0, 19) for j in range(4))
    rates = [r["learning_rate"] for r in run.read_jsonl(out / "metrics.jsonl") if "loss" in r]
    assert max(rates) == pytest.approx(5e-3, rel=0.02) and rates[-1] < 1.2e-3
    manifest, provenance = (run.read_json(out / f"{name}.json") for name in ("manifest", "provenance"))
    extends = manifest["extends"]
    assert provenance["extends"] == extends == run.read_json(out / "spec.json")["extends"]
    assert (extends["run"], extends["identity"], extends["steps"]) == (spec["run"], whole["identity"], 30)
    assert extends["sha256"] == whole["sha256"]["model.safetensors"]
    assert "warmup" in extends["schedule"] and "without moments" in extends["schedule"]
    assert manifest["training"]["steps"] == 20
    assert cli.main(command(longer, tokens, out, "--extend", parent)) == 0
    assert "finished after 20 steps; nothing is trained again" in capfd.readouterr().err
    assert cli.main(command(changed(spec, steps=60), tokens, tmp_path / "third", "--extend", out)) == 0
    assert run.read_json(tmp_path / "third" / "manifest.json")["extends"]["steps"] == 50


def test_an_extension_that_is_killed_goes_on_to_the_same_bits(made, tokens, tmp_path):
    folder, spec, _ = made
    longer, parent = changed(spec, steps=130), folder / "finished"
    whole = language.pretrain(longer, tokens, tmp_path / "whole", extend=parent)
    out = tmp_path / "cut"
    kill_after_checkpoints(lambda: language.pretrain(longer, tokens, out, extend=parent), out)
    assert language.pretrain(longer, tokens, out, extend=parent)["sha256"] == whole["sha256"]


def test_images_are_trained_on(digits, tmp_path):
    from test_image_training import spec_of as image_spec

    spec = image_spec(steps=4)
    first = images.pretrain(spec, digits, tmp_path / "first")
    spec["training"]["steps"] = 7
    manifest = images.pretrain(spec, digits, tmp_path / "second", extend=tmp_path / "first")
    assert manifest["training"]["steps"] == 3 and manifest["extends"]["identity"] == first["identity"]


def test_what_cannot_be_trained_on_says_why(made, tokens, tmp_path, capfd):
    folder, spec, _ = made
    parent = folder / "finished"
    mlp = spec_of({"method": "masa", "coefficients": "mlp"}, steps=3)
    language.pretrain(mlp, tokens, tmp_path / "mlp")
    for given, where, message in (
        (spec, parent, "has 30 steps already, and 30 are asked for"),
        (changed(spec, steps=50) | {"seed": 1}, parent, "with the same seed"),
        (changed(spec, steps=50, batch_size=8), parent, "with the same training.batch_size"),
        (changed(spec, steps=50), folder / "cut", "manifest.json does not exist"),
        (changed(spec, steps=50), tokens, "spec.json does not exist"),
        (changed(mlp, steps=9), tmp_path / "mlp", "a saved model no longer has the MLP that made"),
    ):
        assert cli.main(command(given, tokens, tmp_path / "out", "--extend", where)) == 2
        assert message in capfd.readouterr().err
        assert not (tmp_path / "out").exists()
    damaged = tmp_path / "damaged"
    shutil.copytree(parent, damaged)
    (damaged / "model" / "model.safetensors").write_bytes(b"x")
    assert cli.main(command(changed(spec, steps=50), tokens, tmp_path / "out", "--extend", damaged)) == 2
    assert "is corrupt" in capfd.readouterr().err
    assert load_file(parent / "model" / "model.safetensors")


@pytest.mark.parametrize("restart", [(), ("--restart",)], ids=["plain", "restart"])
@pytest.mark.parametrize("name", ["checkpoints/epoch1.pt", "model/model.safetensors", "metrics.jsonl", "spec.json"])
def test_another_programs_folder_is_left_as_it_is(name, restart, tokens, tmp_path, capsys):
    theirs = tmp_path / "theirs"
    (theirs / name).parent.mkdir(parents=True)
    (theirs / name).write_text('{"epoch": 1}\n')
    before = everything(theirs)
    assert cli.main(command(spec_of(steps=2), tokens, theirs, *restart)) == 2
    said = capsys.readouterr().err.strip()
    assert f"{theirs / name.split('/')[0]} is of no run of masa and would be overwritten" in said
    assert "\n" not in said
    assert everything(theirs) == before


def test_a_batch_that_no_two_processes_can_share_is_one_line_before_any_is_started(made, tmp_path, tokens, capfd):
    folder, spec, _ = made
    shutil.copytree(folder / "cut", tmp_path / "run")
    before = everything(tmp_path / "run")
    assert cli.main(command(changed(spec, processes_per_node=2), tokens, tmp_path / "run")) == 2
    said = capfd.readouterr().err.strip()
    assert said.endswith("is not a multiple of micro_batch_size x processes = 4 x 2.") and "\n" not in said
    assert everything(tmp_path / "run") == before
