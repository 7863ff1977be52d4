"""What runs will cost: parameters exactly, FLOPs and memory against what really happens, and the printed plan."""

import copy
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
import warm
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

import masa
from masa.models import language
from masa.runs.progress import clock
from masa.study import accounting, config, experiments, order
from masa.study.cost import (
    DEVICES,
    Job,
    Plan,
    artefacts,
    device,
    limits,
    logs,
    measure,
    progress,
    report,
    resources,
    schedule,
    transformer,
)
from masa.study.cost.jobs import PROCESS
from masa.study.cost.sizes import of_pretrained, of_run
from masa.study.cost.workflow import behind, jobs


def merged(*overlays):
    return config.load([ROOT / "config" / name for name in overlays])


def small(method="vanilla", context=32, batch=2, **sizes):
    model = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 256}
    sharing = masa.SharingSpec(method).resolve(masa.ModelShape.of_sizes(model | sizes)) if method == "vanilla" else None
    sharing = sharing or masa.SharingSpec(method, atoms=2)
    training = {"context": context, "batch_size": batch, "micro_batch_size": batch}
    return {"model": model | sizes, "sharing": sharing.to_dict(), "training": training}


# ------------------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("overlays", [(), ("mirror.yaml",), ("paper.yaml", "coco.yaml")], ids=str)
def test_parameters_are_those_of_the_built_models(overlays):
    c = merged(*overlays)
    for name in dict.fromkeys(run.rsplit("/", 1)[0] for run in experiments.all_runs(c)):
        spec = experiments.run_spec(c, *name.split("/"), 0)
        with torch.device("meta"):
            model = accounting.build(spec)
        sizes = of_run(spec)
        assert sizes.parameters == sum(p.numel() for p in model.parameters()), name
        assert sizes.stored == masa.count_parameters(model).total, name
        assert sizes.tensors == sum(1 for _ in model.parameters()), name
        if name.endswith("/vanilla") and "family" not in spec["model"]:
            assert sizes.parameters == experiments.vanilla_parameters(spec["model"], spec["model"]["vocab_size"])


def test_parameters_of_pretrained_models_are_those_of_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, entry in merged()["pretrained"].items():
        known = entry["sizes"]
        sizes = {k: v for k, v in known.items() if k not in ("num_layers", "dtype", "tied")}
        with torch.device("meta"):
            model = LlamaForCausalLM(
                LlamaConfig(**sizes, num_hidden_layers=known["num_layers"], tie_word_embeddings=known.get("tied", True))
            )
        assert of_pretrained(entry, 512).parameters == sum(p.numel() for p in model.parameters()), name
    assert of_pretrained({"source": "file:x"}, 512) is None


# ------------------------------------------------------------------------------------------------------------- work


@pytest.mark.parametrize("method", ["vanilla", "masa"])
def test_flops_are_those_that_are_counted(method):
    spec = small(method)
    model = language.build(spec["model"], spec["sharing"], 32).train()
    model.set_attn_implementation("eager")  # the counter does not know the fused kernel of a CPU
    ids = torch.randint(0, 256, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    estimated = transformer.training_pass(of_run(spec), 2)
    assert estimated.flops == pytest.approx(counter.get_total_flops(), rel=0.05)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        masa.fold(model)(input_ids=ids)
    assert transformer.forward(of_run(spec), 2).flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_flops_of_images_are_those_that_are_counted():
    c = merged("mirror.yaml")
    for scale, tolerance in (("cifar10-compact", 0.05), ("shapes-tiny", 0.05)):
        spec = experiments.run_spec(c, scale, "vanilla", 0)
        model = accounting.build(spec).train()
        sizes, size = of_run(spec), spec["model"]["image_size"]
        with FlopCounterMode(display=False) as counter:
            model(pixel_values=torch.randn(2, 3, size, size)).logits.square().sum().backward()
        attention = 12 * 2 * sizes.tokens**2 * sizes.layers * sizes.width  # of the fused kernel, which is not counted
        estimated = transformer.training_pass(sizes, 2).flops - attention
        assert estimated == pytest.approx(counter.get_total_flops(), rel=tolerance), scale


def test_more_of_anything_costs_more():
    cpu, base = device("cpu"), of_run(small())
    first = transformer.training_pass(base, 2)
    for change in ({"num_layers": 8}, {"hidden_size": 128}, {"intermediate_size": 512}, {"vocab_size": 4096}):
        larger = of_run(small(**change))
        assert transformer.training_pass(larger, 2).seconds(cpu) > first.seconds(cpu)
        assert transformer.training_bytes(larger, 2, "float32") > transformer.training_bytes(base, 2, "float32")
        assert transformer.inference_bytes(larger, 2, 32, "float32") > transformer.inference_bytes(
            base, 2, 32, "float32"
        )
    assert transformer.training_bytes(base, 2, "bfloat16") < transformer.training_bytes(base, 2, "float32")
    assert first.seconds(cpu, threads=4) < first.seconds(cpu) < (first * 2).seconds(cpu)
    assert first.seconds(device("h100"), "bfloat16") < first.seconds(cpu)


def test_peak_memory_of_a_training_process():
    spec = small(context=256, batch=16, hidden_size=256, intermediate_size=1024, vocab_size=8000)
    code = f"""
import resource, torch, masa.training.language
from masa.models import language as models
torch.set_num_threads(1)
spec = {spec!r}
model = models.build(spec["model"], spec["sharing"], 256).train()
optimiser = torch.optim.AdamW(model.parameters(), fused=True)
ids = torch.randint(0, 8000, (16, 256))
for _ in range(2):
    model(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    optimiser.zero_grad()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    estimated = PROCESS["training"] + transformer.training_bytes(of_run(spec), 16, "float32")
    assert estimated == pytest.approx(int(done.stdout), rel=0.35)


# ------------------------------------------------------------------------------------------------------------- jobs


def test_the_jobs_are_those_of_the_workflow():
    c = merged()
    found = jobs(Plan(c))
    names = {(job.rule, job.name) for job in found}
    assert len(names) == len(found)
    assert {name for rule, name in names if rule == "pretrain"} == set(experiments.all_runs(c))
    assert ("calibrate", "SmolLM2-135M/attention") in names
    assert ("evaluate_vision", "digits-compact/vanilla/seed0") in names
    assert all(job.seconds > 0 and job.host_bytes > 0 for job in found)
    done = set()
    for job in found:  # each after those that it needs
        assert set(job.needs) <= done, job
        done.add((job.rule, job.name))


def test_limits_and_tasks_are_respected():
    c = merged()
    few = Plan(c).job("evaluate", "nano/vanilla/seed0")
    c["evaluation"]["limit"] = None
    many = Plan(c).job("evaluate", "nano/vanilla/seed0")
    assert many.flops > 20 * few.flops
    assert Plan(c, mirrored=True).job("evaluate", "nano/vanilla/seed0").flops > many.flops


def test_several_devices_share_a_run():
    c = merged("paper.yaml")
    plan = Plan(c)
    alone = plan.training("S/vanilla/seed0")
    one = Plan(c)
    one.spec("L/vanilla/seed0")["training"] |= {"nodes": 1, "processes_per_node": 1}
    plan.spec("L/vanilla/seed0")["training"] |= {"nodes": 2, "processes_per_node": 4, "micro_batch_size": 16}
    other = one.training("L/vanilla/seed0")
    shared = plan.training("L/vanilla/seed0")
    assert (alone.world, shared.world) == (1, 8)
    assert other.seconds / 8 < shared.seconds < other.seconds / 5
    assert shared.memory == other.memory
    assert shared.flops == pytest.approx(other.flops, rel=0.01)
    assert plan.job("pretrain", "L/vanilla/seed0").devices == 8


def test_resources_have_margins_and_caps():
    c = merged()
    first = resources(c, "pretrain", "nano/masa-qkvo/seed0")
    assert set(first) == {"mem_mb", "runtime", "disk_mb"}
    assert all(isinstance(value, int) and value > 0 for value in first.values())
    second = resources(c, "pretrain", "nano/masa-qkvo/seed0", attempt=2)
    assert second["mem_mb"] == pytest.approx(1.5 * first["mem_mb"], rel=0.01)
    assert resources(c, "pretrain", "nano/masa-qkvo/seed0", attempt=9)["mem_mb"] <= 2 * first["mem_mb"] + 1
    assert second["runtime"] == first["runtime"] == limits.LEAST_MINUTES
    assert resources(c, "table", "table1")["runtime"] == limits.LEAST_MINUTES
    paper = merged("paper.yaml")
    capped = copy.deepcopy(paper)
    capped["plan"]["max_hours"] = 2
    assert resources(capped, "pretrain", "M/vanilla/seed0")["runtime"] == 2 * 60
    hours = resources(paper, "pretrain", "S/vanilla/seed0")["runtime"] / 60
    assert hours == pytest.approx(2 * Plan(paper).job("pretrain", "S/vanilla/seed0").seconds / 3600, abs=0.02)
    assert resources(paper, "pretrain", "S/vanilla/seed0")["mem_mb"] < 16_000  # of the host, not of the GPU
    paper["plan"]["margin"] = 1.0
    assert resources(copy.deepcopy(paper), "pretrain", "S/vanilla/seed0")["runtime"] < 60 * hours
    unknown = merged()
    del unknown["pretrained"]["SmolLM2-135M"]["sizes"]
    assert resources(unknown, "compress", "SmolLM2-135M/svd")["runtime"] == 24 * 60


def test_scheduling():
    def job(name, seconds, cores=1, needs=()):
        return Job("table", name, seconds, cores=cores, needs=tuple(("table", need) for need in needs))

    chain = [job("a", 3), job("b", 2, needs=["a"]), job("c", 4)]
    assert schedule.makespan(chain, 1, lambda j: j.cores, {}, overhead=0) == 9
    assert schedule.makespan(chain, 2, lambda j: j.cores, {}, overhead=0) == 5
    whole = [*chain, job("d", 1, cores=0)]
    assert schedule.makespan(whole, 2, lambda j: j.cores or 2, {}, overhead=0) == 6
    late = [job("a", 3), job("b", 2), job("c", 4)]  # the longest first is shorter
    assert schedule.makespan(late, 2, lambda j: j.cores, {("table", "c"): 1}, overhead=0) == 5
    assert schedule.makespan(late, 2, lambda j: j.cores, {}, overhead=0) == 6


def test_the_artefacts_that_go_first():
    config = merged()
    config["first"] = ["table1", "table3"]
    found = order.priorities(config)
    assert found["table", "table1"] == max(found.values()) - 10  # its trainings stand above it
    runs = set(experiments.artefact_runs(config, config["tables"]["table1"]))
    first = {found["pretrain", run] for run in runs}
    others = {value for (rule, run), value in found.items() if rule == "pretrain" and run not in runs}
    assert first == {210} and others == {10}
    assert found["calibrate", "SmolLM2-135M/attention"] == 120 and found["tokenizer", ""] == 200
    del config["first"]
    assert set(order.priorities(config).values()) == {0, 5, 10, 20}


def test_how_far_a_workflow_is(tmp_path):
    """Two of four jobs alike are done, in half the time that was planned; so will the others be."""
    plan = Plan(merged())
    names = [("pretrain", f"nano/vanilla/seed{seed}") for seed in range(4)]
    planned = plan.job(*names[0]).seconds
    seen = progress.Progress(plan, names, tmp_path, 1, {})
    assert seen.line().startswith("masa: 0 of 4 jobs done, 0:00 on the clock, about ")
    for rule, name in names[:2]:
        log = tmp_path / rule / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"done in {planned / 2:.6f} s, peak memory 900 MiB\n")
    left = clock(planned + 2 * schedule.OVERHEAD)
    assert seen.line() == f"masa: 2 of 4 jobs done, 0:00 on the clock, about {left} to go"
    os.utime(tmp_path / "pretrain" / f"{names[0][1]}.log", (1, 1))  # of an earlier call
    assert seen.line().startswith("masa: 1 of 4 jobs done")
    close = seen.start()
    close()


# ---------------------------------------------------------------------------------------------------------- devices


def test_an_unknown_device_is_named_with_the_nearest():
    with pytest.raises(masa.MasaError, match="Did you mean 'h100'"):
        device("h10")
    broken = merged()
    broken["plan"]["device"] = "rtx409"
    with pytest.raises(masa.MasaError, match=r"plan\.device.*Did you mean 'rtx4090'"):
        config.check(broken)
    assert {"h100", "h200", "a100", "a6000", "rtx4090", "rtx3090", "l40s", "v100", "t4", "cpu"} == set(DEVICES)
    assert device("v100").dtype("auto") == device("cpu").dtype("auto") == "float32"
    assert device("h100").dtype("auto") == "bfloat16"


def test_rates_are_found_again_from_steps_that_they_made():
    true = dataclasses.replace(device("cpu"), matmul_flops={"float32": 5e10}, element_seconds=1e-9, launch_seconds=3e-6)
    steps = []
    for shape in measure.SHAPES:
        sizes = of_run(measure._spec(shape))
        work = transformer.training_pass(sizes, shape[-1]) + transformer.optimiser_step(sizes)
        steps.append(dataclasses.replace(work, launches=work.launches - transformer.STEP_OPERATORS).seconds(true))
    m, k, n = measure.PRODUCT
    measured = {"product": 2 * m * k * n / 5e10, "bfloat16": 2.0, "startup": 5.0, "lapack": 1e10}
    found = measure.solve(steps, measured, 1)
    assert found.rate("float32") == pytest.approx(5e10, rel=1e-3)
    assert found.rate("bfloat16") == pytest.approx(1e11, rel=1e-3)
    assert found.element_seconds == pytest.approx(1e-9, rel=1e-3)
    assert found.launch_seconds == pytest.approx(3e-6, rel=1e-3)


def test_this_machine_is_measured():
    found = measure.calibrate(seconds=3, processes=1)
    assert 1e9 < found.rate("float32") < 1e12
    assert 1e-11 < found.element_seconds < 1e-7
    assert 1 < found.startup_seconds < 120
    assert found.memory_bytes > 2**30


# ----------------------------------------------------------------------------------------------------- command line


def masa_plan(*arguments):
    return warm.masa("plan", *arguments)


@pytest.mark.parametrize(
    ("overlay", "closing"),
    [("smoke.yaml", "on 2 cores"), ("config.yaml", "on 2 cores"), ("paper.yaml", "GPU hours of h100")],
)
def test_the_plan_of_every_configuration(overlay, closing):
    done = masa_plan("--configfile", f"config/{overlay}", "--typical", "--cores", "2")
    assert done.returncode == 0, done.stderr
    c = merged(overlay)
    for name in {run.rsplit("/", 1)[0] for run in experiments.all_runs(c)}:
        assert f"\n{name} " in done.stdout
    assert closing in done.stdout
    data = json.loads(masa_plan("--configfile", f"config/{overlay}", "--typical", "--json", "--cores", "2").stdout)
    assert data["total"]["jobs"] == len(data["jobs"]) == sum(rule["jobs"] for rule in data["rules"].values())
    assert data["total"]["job_seconds"] == pytest.approx(sum(job["seconds"] for job in data["jobs"]))


def test_what_a_device_does_not_hold_is_named():
    plan = Plan(merged("paper.yaml"), "t4")
    said = "\n".join(report.too_large(plan, jobs(plan)))
    assert "lower scales.S.training.micro_batch_size (now 64)" in said
    assert "Did you mean 'h100'" in masa_plan("--device", "h10").stderr


def test_measured_jobs_stand_beside_their_estimates(tmp_path):
    from masa import cli

    c = merged("smoke.yaml")
    plan = Plan(c)
    with pytest.raises(masa.MasaError, match="Run the workflow first"):
        logs.compare(plan, tmp_path)
    log = logs.log_of(plan.job("count_parameters"), tmp_path)
    assert cli.main(["plan", "--configfile", "config/smoke.yaml", "--typical", "--log", str(log)]) == 0
    seconds, size = logs.read(log)
    assert 0 <= seconds < 300
    assert size > 2**24
    found = json.loads(logs.compare(plan, tmp_path, as_json=True))["rules"]["count_parameters"]
    assert found["jobs"] == 1
    assert found["measured_seconds"] == seconds
    assert "count_parameters" in logs.compare(plan, tmp_path)


def test_an_artefact_costs_what_is_behind_it(tmp_path):
    plan = Plan(merged("smoke.yaml"))
    found = artefacts.costs(plan, 2, tmp_path)
    assert set(found) == {job.name for job in jobs(plan) if job.rule in ("table", "figure")}
    # the jobs that `snakemake -n --forceall coefficients` lists (tests/test_workflow.py), without its short rule
    names = behind(("table", "coefficients"), {(job.rule, job.name): job.needs for job in jobs(plan)})
    own = [job for job in jobs(plan) if (job.rule, job.name) in names]
    counts = {rule: len(of_rule) for rule, of_rule in report.by_rule(own).items()}
    assert counts == {"benchmarks": 1, "tokenizer": 1, "tokenize": 1, "pretrain": 2, "evaluate": 2, "table": 1}
    one = found["coefficients"]
    assert one["jobs"] == 8
    assert one["job_seconds"] == pytest.approx(sum(job.seconds for job in own))
    assert one["job_seconds"] / 2 < one["seconds"] < one["job_seconds"] + 30
    assert one["measured_seconds"] is None
    for seconds, job in enumerate(own[:-1], 1):
        logs.log_of(job, tmp_path).parent.mkdir(parents=True, exist_ok=True)
        logs.log_of(job, tmp_path).write_text(f"done in {seconds}.0 s, peak memory 10 MiB\n")
    assert artefacts.costs(plan, 2, tmp_path)["coefficients"]["measured_seconds"] is None, "one log is missing"
    logs.log_of(own[-1], tmp_path).parent.mkdir(parents=True)
    logs.log_of(own[-1], tmp_path).write_text("done in 8.0 s, peak memory 10 MiB\n")
    measured = artefacts.costs(plan, 1, tmp_path)["coefficients"]["measured_seconds"]
    assert measured == pytest.approx(sum(range(1, 9)) + 8 * schedule.OVERHEAD + schedule.START)
    said = masa_plan("--artefacts", "--configfile", "config/paper.yaml", "--device", "h100").stdout
    assert said.splitlines()[0].split()[:4] == ["artefact", "jobs", "added", "up"]
    assert "\ntable1 " in said


def test_logs_are_where_the_workflow_puts_them():
    rules = "".join(path.read_text() for path in (ROOT / "workflow" / "rules").glob("*.smk"))
    for job in jobs(Plan(merged("mirror.yaml"))):
        folder = logs.log_of(job, logs.Path("logs")).relative_to("logs").parts[0]
        assert f"{{LOGS}}/{folder}" in rules, job.rule


def test_the_plan_needs_neither_torch_nor_numpy():
    code = (
        "import sys; from masa.study import config; from masa.study.cost import Plan, report, resources, workflow;"
        "c = config.load();"
        "resources(c, 'pretrain', 'nano/vanilla/seed0'); workflow.jobs(Plan(c));"
        "assert not {'torch', 'transformers', 'numpy', 'pandas', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
