"""All jobs of a configuration, one a job of the workflow, each with what it will cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from masa.study import compressions, experiments, kinds
from masa.study.cost import data, preparation, readings
from masa.study.cost import sizes as sizes_of
from masa.study.cost.compression import calibrate, compress
from masa.study.cost.devices import GIB, Device, device
from masa.study.cost.evaluation import available, describe_flops, harness, held_out_work
from masa.study.cost.training import Training, mode_of, train
from masa.study.cost.transformer import Work, forward, inference_bytes
from masa.study.sections.evaluation import Plan as PlanSection

PROCESS = {"training": 0.85 * GIB, "vision": 0.95 * GIB, "evaluation": 0.9 * GIB, "compression": 0.85 * GIB}
"""What a process holds before it has a model: interpreter and imported libraries, from logs of a workflow on Linux."""

LIGHT = {"tokenize": 0.7 * GIB, "images": 0.5 * GIB, "boxes": 0.5 * GIB, "count_parameters": 0.8 * GIB}
LIGHT |= {"pretrained": 0.65 * GIB}
"""The same of jobs without a model; 0.25 GiB of those that are not here, which import no torch."""

CONTEXT, GPU_HOST = 1.0 * GIB, 4.0 * GIB
"""A CUDA context with its libraries' workspaces, on the GPU; and what stands beside it in the host's memory."""

Name = tuple[str, str]


@dataclass(frozen=True)
class Job:
    """One job of the workflow.

    Attributes:
        rule, name: as in the workflow; the name is the value of its wildcards, e.g. a run id.
        seconds: of the job by itself.
        memory_bytes: peak on each GPU, or of the process on a CPU; host_bytes: peak of the process.
        disk_bytes: written at the most at one time; kept_bytes: what stays.
        flops: of matrix products.
        cores: that it takes; 0 for all of the machine. devices: GPUs.
        parameters, amount, unit: of a training: trained numbers, and tokens or images that it reads.
        known: False where the sizes of a pretrained model are not in the configuration.
        measured: of a training whose speed on one device was measured, in which mode; "" of all that is estimated.
        needs: jobs that must be done before.
    """

    rule: str
    name: str
    seconds: float
    memory_bytes: float = 0.0
    host_bytes: float = 0.0
    disk_bytes: float = 0.0
    kept_bytes: float = 0.0
    flops: float = 0.0
    cores: int = 1
    devices: int = 0
    parameters: int = 0
    amount: float = 0.0
    unit: str = ""
    known: bool = True
    measured: str = ""
    needs: tuple[Name, ...] = ()


class Plan:
    """The jobs of one configuration on one device; what two of them have in common is computed once.

    Args:
        config: checked.
        device: a :class:`Device` or the name of one; by default the configuration's ``plan.device``.
        mirrored: whether a mirror can be read, which decides what tasks there are.
    """

    def __init__(self, config: Mapping[str, Any], on: Device | str | None = None, mirrored: bool | None = None) -> None:
        self.config = config
        self.settings = PlanSection.filled(config.get("plan") or {}, "plan")
        on = on or self.settings["device"]
        self.device = device(on) if isinstance(on, str) else on
        self.mirrored = bool(config["data"]["mirror"]) if mirrored is None else mirrored
        self.paces = readings.paces(self.device, config)
        self._cache: dict[Any, Any] = {}

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    # ------------------------------------------------------------------------------------------------ of a model

    def spec(self, run: str) -> dict[str, Any]:
        """Resolved spec of a run, of seed 0: seeds cost the same."""
        scale, experiment, _ = experiments.parse_run(run)
        return self._once(("spec", scale, experiment), lambda: experiments.run_spec(self.config, scale, experiment, 0))

    def sizes(self, run: str) -> sizes_of.Sizes:
        return self._once(("sizes", *run.split("/")[:2]), lambda: sizes_of.of_run(self.spec(run)))

    def training(self, run: str) -> Training:
        """The estimate of one training run."""
        return self._once(("training", *run.split("/")[:2]), lambda: self._training(run))

    def _training(self, run: str) -> Training:
        spec, sizes = self.spec(run), self.sizes(run)
        section, entry = self.data_of(run)
        if entry is None:
            held_out = self.config["data"]["corpus"]["validation_tokens"] / sizes.tokens
            if self.paces:
                pace = partial(self.paces.reached, experiments.parse_run(run)[1], mode_of(spec["training"]))
                return train(spec, sizes, self.device, None, held_out, pace)
            return train(spec, sizes, self.device, None, held_out)
        images, _ = data.images_of(section, entry)
        return train(spec, sizes, self.device, images, data.validation_images(section, entry))

    def data_of(self, run: str) -> tuple[str, Mapping[str, Any] | None]:
        """Section and entry of a vision run's data; None for a language model."""
        scale = run.split("/")[0]
        kind = experiments.kind_of(self.config, scale)
        if kind is kinds.LANGUAGE:
            return kind.data, None
        return kind.data, self.config[kind.data][self.config["vision_scales"][scale]["data"]]

    def pretrained(self, name: str, tokens: int = 512) -> tuple[sizes_of.Sizes | None, str]:
        """Sizes of a pretrained model, if the configuration has them, and the dtype that it is stored in."""
        entry = self.config["pretrained"][name]
        stored = (entry.get("sizes") or {}).get("dtype", "bfloat16")
        return self._once(("pretrained", name), lambda: sizes_of.of_pretrained(entry, tokens)), stored

    # -------------------------------------------------------------------------------------------------- of a job

    def job(self, rule: str, name: str = "") -> Job:
        """The estimate of one job.

        Args:
            rule: of the workflow.
            name: the value of its wildcards: a run, MODEL/NAME, a scale, a text, a table …; "" where it has none.
        """
        parts = name.split("/")
        key = ("job", rule, *parts[:2]) if rule in ("pretrain", "evaluate", "evaluate_vision") else ("job", rule, name)
        found = self._once(key, lambda: self._job(rule, name))
        return found if found.name == name else dataclasses.replace(found, name=name)

    def _job(self, rule: str, name: str) -> Job:
        if rule == "pretrain":
            return self._pretrain(name)
        if rule == "evaluate":
            return self._evaluate(name)
        if rule == "evaluate_vision":
            return self._evaluate_vision(name)
        if rule in ("calibrate", "compress"):
            return self._compression(rule, *name.split("/"))
        if rule == "time_methods":
            return self._throughput(name)
        seconds, disk = preparation.cost(self, rule, name)
        held = {"images": 1, "boxes": 1, "pretrained": preparation.copies(self.config, rule, name)}.get(rule, 0)
        memory = LIGHT.get(rule, 0.25 * GIB) + held * min(disk, 2 * GIB)
        return Job(rule, name, seconds, memory, memory, disk, disk)

    def _make(self, rule: str, name: str, seconds: float, model: float, process: str, cores: int, **more: Any) -> Job:
        """A job that runs a model: on a GPU its memory is there, on a CPU in the process."""
        devices = more.pop("devices", 1)
        copied = more.pop("copied", 0.0)
        if self.device.gpu:
            memory, host = CONTEXT + model, GPU_HOST + copied
        else:
            memory = host = PROCESS[process] + model
        return Job(rule, name, seconds, memory, host, cores=cores, devices=devices if self.device.gpu else 0, **more)

    def _pretrain(self, run: str) -> Job:
        found, sizes, recipe = self.training(run), self.sizes(run), self.spec(run)["training"]
        return self._make(
            "pretrain",
            run,
            found.seconds,
            found.memory,
            "vision" if sizes.patch else "training",
            recipe["threads"] * found.world,
            devices=found.world,
            disk_bytes=found.model + 2 * found.checkpoint,
            kept_bytes=found.model,
            flops=found.flops,
            parameters=sizes.parameters,
            amount=found.amount,
            unit=found.unit,
            measured=found.measured,
        )

    def _evaluate(self, run: str) -> Job:
        sizes, spec, settings = self.sizes(run), self.spec(run), self.config["evaluation"]
        threads = spec["training"]["threads"]
        tasks = available(settings["tasks"], settings["sources"], self.mirrored)
        asked, work, longest = harness(sizes, tasks, settings, self.device, "float32", threads)
        corpus = held_out_work(sizes, self.config["data"]["corpus"]["validation_tokens"])
        seconds = 1.2 * self.device.startup_seconds + asked + corpus.seconds(self.device, "float32", threads)
        seconds += describe_flops(sizes) / self.device.lapack_flops
        batch = max((settings["batch_size"], longest), (16, sizes.tokens), key=lambda b: b[0] * b[1])
        memory = inference_bytes(sizes, *batch, "float32")
        flops = work.flops + corpus.flops
        return self._make("evaluate", run, seconds, memory, "evaluation", threads, flops=flops, kept_bytes=5e5)

    def _evaluate_vision(self, run: str) -> Job:
        sizes, spec, settings = self.sizes(run), self.spec(run), self.config["vision_evaluation"]
        section, entry = self.data_of(run)
        _, test = data.images_of(section, entry or {})
        images, threads = min(test, settings["limit"] or test), spec["training"]["threads"]
        one, batches = forward(sizes, 1), images / settings["batch_size"]
        work = Work(one.flops * images, one.elements * images, one.scores * images, one.launches * max(1.0, batches))
        seconds = 1.3 * self.device.startup_seconds + work.seconds(self.device, "float32", threads)
        seconds += describe_flops(sizes) / self.device.lapack_flops
        memory = inference_bytes(sizes, settings["batch_size"], sizes.tokens, "float32")
        return self._make(
            "evaluate_vision", run, seconds, memory, "training", threads, flops=work.flops, kept_bytes=5e5
        )

    def _compression(self, rule: str, model: str, name: str) -> Job:
        sizes, stored = self.pretrained(model)
        threads = self.config["compression"]["threads"]
        if sizes is None:
            return dataclasses.replace(self._make(rule, name, 0.0, 0.0, "compression", threads), known=False)
        if rule == "calibrate":
            entry = self.config["calibrations"][name]
            seconds, flops, memory, written = calibrate(sizes, entry, stored, self.device, threads)
        else:
            spec = compressions.run_spec(self.config, model, name)
            chosen = compressions.calibration_of(self.config, f"{model}/{name}")
            settings = self.config["evaluation"]
            tasks = available(spec["evaluation"]["tasks"], settings["sources"], self.mirrored)
            seconds, flops, memory, written = compress(
                sizes,
                spec,
                self.config["calibrations"][chosen] if chosen else None,
                preparation.text_tokens(self, spec["evaluation"]["texts"]),
                tasks,
                stored,
                self.device,
            )
        job = self._make(
            rule,
            f"{model}/{name}",
            seconds,
            memory,
            "compression",
            threads,
            copied=2.0 * sizes.parameters,
            flops=flops,
            disk_bytes=written,
            kept_bytes=written,
        )
        return dataclasses.replace(job, parameters=sizes.parameters)

    def _throughput(self, scale: str) -> Job:
        seconds, flops, memory = preparation.throughput(self, scale)
        return self._make("time_methods", scale, seconds, memory, "training", 0, flops=flops)
