"""Training for real on a few steps: the recipe, the same data for all, the same bits again, and what can go wrong."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, kill_after_checkpoints, kill_again_and_again, language_model, ranks, stop_and_resume
from warm import started

import masa
from masa.data import tokens as token_files
from masa.evaluation.perplexity import held_out_loss
from masa.runs import run
from masa.sharing.parameters import parameter_groups
from masa.study import config
from masa.study.cost.sizes import of_run
from masa.study.cost.training import flops_a_unit
from masa.training import language, log, trainer
from masa.training.peak import Peak


def spec_of(method="masa", seed=0, **recipe):
    base = config.load([ROOT / "config" / "smoke.yaml"])["training"]
    base |= {
        "context": 32,
        "batch_size": 4,
        "micro_batch_size": 4,
        "learning_rate": 5e-3,
        "steps": 20,
        "evaluations": 4,
    }
    base.pop("tokens"), base.pop("tokens_per_parameter")
    sizes = {"num_layers": 6, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}
    sharing = method if isinstance(method, dict) else {"method": method}
    return {
        "run": f"test/{sharing['method']}/seed{seed}",
        "seed": seed,
        "model": sizes,
        "sharing": sharing,
        "training": base | recipe,
    }


def test_a_run_learns_and_stores_everything(tokens, tmp_path):
    result = language.pretrain(spec_of(steps=60), tokens, tmp_path)
    log = list(run.read_jsonl(tmp_path / "metrics.jsonl"))
    losses = [r["validation_loss"] for r in log if "validation_loss" in r]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.3
    assert result["training"]["validation_loss"] == losses[-1]
    assert result["training"]["tokens"] == 60 * 4 * 32
    rates = [r["learning_rate"] for r in log if "loss" in r]
    assert max(rates) == pytest.approx(5e-3, rel=0.02)
    assert rates[-1] == pytest.approx(5e-4, rel=0.1), "cosine to a tenth of the peak"
    provenance = run.read_json(tmp_path / "provenance.json")
    assert provenance["packages"]["torch"] == torch.__version__.split("+")[0]
    assert provenance["seed"] == 0
    assert provenance["inputs"]["tokens"]
    assert {key: provenance[key] is None for key in ("gpu", "cuda")} == dict.fromkeys(
        ("gpu", "cuda"), not torch.cuda.is_available()
    )
    assert run.read_json(tmp_path / "spec.json")["training"]["steps"] == 60
    model = masa.load(tmp_path / "model")
    ids, _ = token_files.validation_tokens(tokens)
    assert held_out_loss(model, ids, 32).mean == pytest.approx(losses[-1], rel=1e-5)
    assert not (tmp_path / "checkpoints").exists()


def test_progress_says_the_share_of_a_peak_that_is_known(tokens, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(log, "Progress", functools.partial(log.Progress, every=0.0))
    spec = spec_of("vanilla", steps=10)
    per_token = flops_a_unit(spec["training"], of_run(spec))
    first = language.pretrain(spec, tokens, tmp_path / "known", peak=Peak(per_token, {"float32": 3e12}))
    said = re.findall(r"([\d,]+) tokens/s, ([\d.]+) % of 3 TFLOP/s  ", capfd.readouterr().err)
    assert len(said) == 10
    for speed, percent in said:
        assert float(percent) == pytest.approx(100 * int(speed.replace(",", "")) * per_token / 3e12, abs=0.051)
    other = language.pretrain(spec, tokens, tmp_path / "other", peak=Peak(per_token, {"bfloat16": 3e12}))
    third = language.pretrain(spec, tokens, tmp_path / "none")
    lines = capfd.readouterr().err.splitlines()
    assert sum("tokens/s" in line for line in lines) == 20
    assert not [line for line in lines if "TFLOP" in line], "of another dtype, or none"
    assert first["sha256"] == other["sha256"] == third["sha256"]
    assert Peak(2e9, {"bfloat16": 1e14}).share(2e5, "bfloat16", 8) == "50 % of 800 TFLOP/s"


@pytest.mark.parametrize("method", ["masa", "vanilla", {"method": "masa", "coefficients": "mlp"}])
def test_the_same_run_gives_the_same_bits(method, tokens, tmp_path):
    first = language.pretrain(spec_of(method), tokens, tmp_path / "a")
    second = language.pretrain(spec_of(method), tokens, tmp_path / "b")
    assert first["sha256"] == second["sha256"]
    other = language.pretrain(spec_of(method, seed=1), tokens, tmp_path / "c")
    assert other["sha256"] != first["sha256"]


def test_all_methods_see_the_same_batches_and_start_from_the_same_common_weights(tokens, tmp_path, monkeypatch):
    seen = {}
    step = trainer.Trainer.training_step
    for method in ("vanilla", "masa", "low-rank"):
        batches, start = [], {}

        def look(self, model, inputs, *rest, batches=batches, start=start, **more):
            if not batches:
                start |= {n: p.detach().clone() for n, p in model.named_parameters() if "mlp" in n or "embed" in n}
            batches.append(inputs["input_ids"].clone())
            return step(self, model, inputs, *rest, **more)

        monkeypatch.setattr(trainer.Trainer, "training_step", look)
        language.pretrain(spec_of(method, steps=3), tokens, tmp_path / method)
        monkeypatch.setattr(trainer.Trainer, "training_step", step)
        seen[method] = batches, start
    batches, start = seen["vanilla"]
    assert len(batches) == 3
    for other, common in (seen["masa"], seen["low-rank"]):
        assert all(torch.equal(a, b) for a, b in zip(batches, other, strict=True))
        assert all(torch.equal(start[n], common[n]) for n in start)


def test_gradient_accumulation_is_the_same_step(tokens, tmp_path):
    whole = language.pretrain(spec_of(steps=5), tokens, tmp_path / "a")["training"]["validation_loss"]
    parts = language.pretrain(spec_of(steps=5, micro_batch_size=2), tokens, tmp_path / "b")["training"][
        "validation_loss"
    ]
    assert parts == pytest.approx(whole, rel=1e-5)


def test_who_decays():
    model = masa.share(language_model(), {"method": "masa", "coefficients": "mlp"})
    recipe = spec_of(coefficients_learning_rate_ratio=3.0)["training"]
    decay, plain, coefficients = parameter_groups(model, recipe)
    names = {id(p): n for n, p in model.named_parameters()}
    of = [{names[id(p)] for p in group["params"]} for group in (decay, plain, coefficients)]
    assert sum(map(len, of)) == len(names)
    assert decay["weight_decay"] == 0.1
    assert plain["weight_decay"] == coefficients["weight_decay"] == 0.0
    assert coefficients["lr"] == 3 * decay["lr"]
    assert {n for n in of[0] if "atoms" in n} == {f"model.shared.{p}.atoms" for p in "qkvo"}
    assert "model.embed_tokens.weight" in of[0]
    assert all("norm" in n or n.endswith("bias") for n in of[1])
    assert all("maker" in n for n in of[2])
    assert any("embedding" in n for n in of[2])


def test_held_out_loss_scores_every_token_once():
    model = language_model().eval()
    ids = np.random.default_rng(0).integers(0, 64, 75)
    got = held_out_loss(model, ids, 16)
    expected = []
    with torch.no_grad():
        for start in range(0, 74, 16):
            window = torch.from_numpy(ids[start : start + 17])[None]
            logp = model(window[:, :-1]).logits.double().log_softmax(-1)
            expected += (-logp[0, torch.arange(logp.shape[1]), window[0, 1:]]).tolist()
    assert len(got.nll) == 74
    torch.testing.assert_close(got.nll, torch.tensor(expected).double(), rtol=1e-4, atol=1e-5)
    assert got.perplexity(37) == pytest.approx(np.exp(sum(expected) / 37), rel=1e-4)
    assert got.by_document([40, 75]) == pytest.approx([np.mean(expected[:39]), np.mean(expected[39:])], rel=1e-4)


def test_wrong_vocabulary(tokens, tmp_path):
    spec = spec_of()
    spec["model"]["vocab_size"] = 65
    with pytest.raises(masa.MasaError, match="made with a vocabulary of 64, but the model of test/masa/seed0 has 65"):
        language.pretrain(spec, tokens, tmp_path)


def test_exploding_loss_stops_and_names_the_step(tokens, tmp_path):
    with pytest.raises(masa.MasaError, match=r"test/vanilla/seed0: the loss is \w+ at step \d+"):
        language.pretrain(spec_of("vanilla", learning_rate=1e30, max_grad_norm=1e30), tokens, tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_two_processes_do_not_write_one_run(tokens, tmp_path):
    with run.exclusive(tmp_path), pytest.raises(masa.MasaError, match=f"being written by process {os.getpid()}"):
        language.pretrain(spec_of(), tokens, tmp_path)


def command(spec, tokens, out):
    return [
        sys.executable,
        "-m",
        "masa.cli",
        "pretrain",
        "--spec",
        json.dumps(spec),
        "--tokens",
        str(tokens),
        "--out",
        str(out),
    ]


def start(spec, tokens, out, *more):
    return subprocess.Popen([*command(spec, tokens, out), *more], stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.parametrize("method", ["masa", {"method": "masa", "coefficients": "mlp"}])
def test_a_run_stopped_by_a_signal_goes_on_to_the_same_bits(method, tokens, tmp_path):
    spec = spec_of(method, steps=120)
    stop_and_resume(language.pretrain, spec, "tokens", tokens, tmp_path, lines=20)


def test_a_checkpoint_cut_short_by_a_kill_is_passed_over(tokens, tmp_path, undisturbed):
    spec = spec_of(steps=120, checkpoint_minutes=1e-4)
    whole = undisturbed(language.pretrain, spec, tokens)
    kill_after_checkpoints(lambda: language.pretrain(spec, tokens, tmp_path / "cut"), tmp_path / "cut")
    checkpoints = tmp_path / "cut" / "checkpoints"
    newest = max(checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    (newest / "complete.json").unlink(missing_ok=True)  # as if killed while writing it
    (newest / "model.safetensors").write_bytes(b"half")
    again = language.pretrain(spec, tokens, tmp_path / "cut")
    assert again["sha256"] == whole["sha256"]


@pytest.mark.parametrize("harm", ["flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(harm, tokens, tmp_path, capfd, undisturbed):
    spec = spec_of(steps=60, checkpoint_minutes=1e-4)
    whole = undisturbed(language.pretrain, spec, tokens)
    kill_after_checkpoints(lambda: language.pretrain(spec, tokens, tmp_path / "cut"), tmp_path / "cut")
    checkpoints = tmp_path / "cut" / "checkpoints"
    newest = max(checkpoints.glob("checkpoint-*/complete.json"), key=lambda p: int(p.parent.name[11:])).parent
    file = newest / "optimizer.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    {
        "flipped": lambda: file.write_bytes(data),
        "missing": file.unlink,
    }[harm]()
    again = language.pretrain(spec, tokens, tmp_path / "cut")
    said = capfd.readouterr().err
    assert f"{file} is {'missing' if harm == 'missing' else 'corrupt'}" in said
    assert again["sha256"] == whole["sha256"]


def test_twenty_kills_at_random_moments_change_no_bit(tokens, tmp_path, undisturbed):
    """SIGKILL in a process that saves all the time: between steps, in steps, and while checkpoints are written."""
    spec = spec_of("masa", steps=150, checkpoint_minutes=1e-5)
    whole = undisturbed(language.pretrain, spec, tokens)
    kills = kill_again_and_again(lambda: language.pretrain(spec, tokens, tmp_path / "cut"), tmp_path / "cut", 20)
    again = language.pretrain(spec, tokens, tmp_path / "cut")
    assert again["sha256"] == whole["sha256"]
    assert kills == 20
    steps = [r["step"] for r in run.read_jsonl(tmp_path / "cut" / "metrics.jsonl") if "loss" in r]
    assert steps == sorted(set(steps)), "no step is logged twice"


def both_train(spec, tokens, out):
    """The processes of a run alone, without what launches them."""
    both = ranks(lambda: language.pretrain(spec, tokens, out) and None, out.parent / f"said-{out.name}")
    assert [process.wait() for process in both] == [0, 0], [process.said for process in both]
    assert run.read_json(out / "provenance.json")["processes"] == 2
    assert not any("Traceback" in process.said for process in both)


def losses(out):
    return {r["step"]: r["loss"] for r in run.read_jsonl(out / "metrics.jsonl") if "loss" in r}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_give_the_loss_curve_of_one(parallel, tokens, tmp_path):
    """A batch of 4 in parts of 2: one process takes two passes a step, two processes one each."""
    whole = language.pretrain(spec_of("masa", micro_batch_size=2), tokens, tmp_path / "one")
    spec = spec_of("masa", micro_batch_size=2, processes_per_node=2, parallel=parallel)
    process = started(*command(spec, tokens, tmp_path / "two")[3:], stderr=subprocess.PIPE)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(one) == list(two) == list(range(1, 21))
    assert [two[s] for s in two] == pytest.approx([one[s] for s in one], abs=2e-5)
    manifest = run.read_json(tmp_path / "two" / "manifest.json")
    assert manifest["training"]["validation_loss"] == pytest.approx(whole["training"]["validation_loss"], abs=2e-5)
    assert run.read_json(tmp_path / "two" / "provenance.json")["processes"] == 2
    assert said.count("20/20 steps") == 1, "one process reports"
    models = (masa.load(tmp_path / name / "model").parameters() for name in ("one", "two"))
    for a, b in zip(*models, strict=True):
        assert torch.allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_stop_together_and_go_on_to_the_same_bits(parallel, tokens, tmp_path):
    spec = spec_of("masa", micro_batch_size=2, steps=60, processes_per_node=2, parallel=parallel)
    both_train(spec, tokens, tmp_path / "whole")
    process = started(*command(spec, tokens, tmp_path / "cut")[3:], stderr=subprocess.PIPE)
    log = tmp_path / "cut" / "metrics.jsonl"
    while not (log.is_file() and log.read_text().count("\n") > 5):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "masa: test/masa/seed0 was stopped by SIGUSR1 at step" in said
    assert "Traceback" not in said
    assert not (tmp_path / "cut" / "manifest.json").exists()
    both_train(spec, tokens, tmp_path / "cut")
    first, again = (run.read_json(tmp_path / name / "manifest.json") for name in ("whole", "cut"))
    assert again["sha256"] == first["sha256"]


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is of glibc")
def test_freed_memory_is_kept_for_the_next_step():
    """Counted in pages that the kernel had to give, which do not depend on how busy the machine is."""
    pages = subprocess.run([sys.executable, "-c", PAGES], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    before, after = (int(number) for number in pages.split())
    assert before > 10_000  # of 4 KiB each; tensors of 64 MiB are more than malloc ever keeps by itself
    assert after < 100


PAGES = """
import resource, torch
from masa.training import trainer

def pages():
    began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        some = [torch.ones(2**24) for _ in range(2)]
        other = [x + 1 for x in some]
        del some, other
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began

torch.set_num_threads(1)
pages()
before = pages()
trainer.set_up({"training": {"threads": 1}})
pages()
print(before, pages())
"""
