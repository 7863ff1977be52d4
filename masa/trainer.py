"""The training loop that all kinds of models share: Hugging Face's Trainer, one recipe, and runs that can be resumed.

A run directory holds ``spec.json`` (everything resolved), ``metrics.jsonl`` (append-only), ``model/`` (factored
checkpoint), ``provenance.json``, ``manifest.json`` (written last: its presence means that the run is whole) and, while
it is running, ``checkpoints/``.

In several processes (:mod:`masa.launch`) the same call trains one model: each takes its part of every batch, the first
writes.
"""

from __future__ import annotations

import json
import math
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_cosine_with_min_lr_schedule_with_warmup,
    set_seed,
)

from masa import checkpoint, launch, parallel, run
from masa.errors import Interrupted, MasaError
from masa.progress import Progress
from masa.projections import SharedProjections, decoder
from masa.sharing import ParameterCount, count_parameters
from masa.sources import sha256_of

COMPLETE = "complete.json"
"""File that a checkpoint gets last: the sha256 of all others."""


@dataclass(frozen=True)
class Task:
    """What one kind of model brings to the loop.

    Attributes:
        build: the model, newly initialised from torch's global generator.
        data: the items of all steps in their order; item i may depend on i and the seed alone.
        score: held-out numbers of a model; their names begin with "validation_" and one is ``validation_loss``.
        unit, units_per_step: what speed is counted in, "tokens" or "images".
        inputs: sha256 of what it was trained on.
        identity: changes with anything that decides the run's bits; another identity is another run.
        trainer, collate: makes the Trainer, and batches, where the loss or the batches are not Hugging Face's own.
        packages: whose versions are stored beside those of all runs.
        callbacks: called before the run's log at every event.
        final: which model is kept in the end.
    """

    build: Callable[[], nn.Module]
    data: Any
    score: Callable[[nn.Module], dict[str, float]]
    unit: str
    units_per_step: int
    inputs: Mapping[str, str]
    identity: str
    trainer: Callable[..., Trainer] = Trainer
    collate: Callable[[list], dict] | None = None
    packages: Sequence[str] = ()
    callbacks: Sequence[TrainerCallback] = ()
    final: Callable[[nn.Module], nn.Module] = lambda model: model


def set_up(spec: Mapping[str, Any]) -> None:
    """Threads and deterministic algorithms of a run; called before anything is computed."""
    torch.set_num_threads(spec["training"]["threads"])
    torch.use_deterministic_algorithms(True, warn_only=True)


def train(spec: Mapping[str, Any], task: Task, out: Path) -> dict[str, Any]:
    """Train one model, or go on with a run that was interrupted.

    Args:
        spec: ``run``, ``seed`` and ``training``, everything resolved.
        task: model, data and scores.
        out: run directory.

    Returns:
        The manifest.

    Raises:
        MasaError: a loss that is not finite (the step is named), or another process that trains in the same directory.
    """
    recipe = spec["training"]
    processes = PartialState(cpu=not torch.cuda.is_available())
    with run.exclusive(out) if processes.is_main_process else nullcontext():
        checkpoints = out / "checkpoints"
        if processes.is_main_process:
            _prepare(out, checkpoints, spec, task.identity)
        processes.wait_for_everyone()
        set_seed(spec["seed"])
        model = task.build()
        counts = count_parameters(model)
        trainer, log = _trainer(spec, task, model, out, checkpoints)
        resumed = last_whole_checkpoint(checkpoints)
        with log.catching_signals():
            try:
                trainer.train(resume_from_checkpoint=resumed)
            except Exception as error:
                _explain(error, resumed)
                raise
        processes.wait_for_everyone()  # the first may still be writing its checkpoint
        if log.signal is not None and trainer.state.global_step < recipe["steps"]:
            raise Interrupted(
                f"{spec['run']} was stopped by {signal.Signals(log.signal).name} at step {trainer.state.global_step} "
                "and can be resumed with the same command."
            )
        trained = log.whole(model)
        if processes.is_main_process:
            _finish(spec, task, log, counts, trained, out)
        processes.wait_for_everyone()
    return run.read_json(out / "manifest.json")


def _finish(
    spec: Mapping[str, Any], task: Task, log: RunLog, counts: ParameterCount, model: nn.Module, out: Path
) -> None:
    """Store the model, what it was made with, and the manifest, which is the sign that all is there."""
    checkpoint.save(task.final(model).eval(), out / "model")
    run.write_json(
        out / "provenance.json",
        run.provenance(task.inputs, task.packages)
        | {
            "seed": spec["seed"],
            "threads": spec["training"]["threads"],
            "dtype": log.dtype,
            "processes": PartialState().num_processes,
        },
    )
    result = {
        "run": spec["run"],
        "identity": task.identity,
        "parameters": counts.to_dict(),
        "training": log.summary(),
        "sha256": {name: sha256_of(out / "model" / name) for name in ("model.safetensors", "masa.json")},
    }
    run.write_json(out / "manifest.json", result)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def _prepare(out: Path, checkpoints: Path, spec: Mapping[str, Any], identity: str) -> None:
    """Drop what an earlier, different spec or data left in the run directory, and checkpoints that are not whole."""
    (out / "manifest.json").unlink(missing_ok=True)
    marker = checkpoints / "identity"
    if not marker.is_file() or marker.read_text() != identity:
        shutil.rmtree(checkpoints, ignore_errors=True)
        (out / "metrics.jsonl").unlink(missing_ok=True)
        checkpoints.mkdir(parents=True)
        marker.write_text(identity)
    for folder in checkpoints.glob("checkpoint-*"):
        if damage := _damage(folder):
            print(f"{spec['run']}: {damage}; the checkpoint is dropped", file=sys.stderr)
            shutil.rmtree(folder)
    run.write_json(out / "spec.json", spec)


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: cut short by a kill, or a file that changed since it was written."""
    if not (folder / COMPLETE).is_file():
        return f"{folder} was not written to its end"
    try:
        sums = dict(run.read_json(folder / COMPLETE))
    except (MasaError, TypeError, ValueError):
        return f"{folder / COMPLETE} is corrupt"
    for name, expected in sums.items():
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
        if sha256_of(folder / name) != expected:
            return f"{folder / name} is corrupt (its sha256 is not the one that it was written with)"
    return None


def _explain(error: Exception, resumed: str | None) -> None:
    """Name the file of a checkpoint that cannot be read. Files are only ever read as data, never as pickled code."""
    from transformers.trainer import safe_globals

    for file in sorted(Path(resumed or "").glob("*")) if resumed and not isinstance(error, MasaError) else ():
        try:
            if file.suffix in (".pt", ".pth") or file.name == "pytorch_model.bin":
                with safe_globals():
                    torch.load(file, map_location="cpu", weights_only=True)
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    opened.keys()
            elif file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
        except (pickle.UnpicklingError, SafetensorError, RuntimeError, ValueError, EOFError, OSError) as reason:
            raise MasaError(
                f"{file} is corrupt, or holds something other than numbers, which is never run "
                f"({str(reason).partition(chr(10))[0]}). Delete {file.parent} and run the same command again."
            ) from error


def last_whole_checkpoint(checkpoints: Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    whole = [folder for folder in checkpoints.glob("checkpoint-*") if (folder / COMPLETE).is_file()]
    return str(max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]))) if whole else None


def uses_bfloat16(recipe: Mapping[str, Any]) -> bool:
    """Whether the linear layers run in bfloat16: on request, or by "auto" on a GPU that is made for it."""
    fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return recipe["dtype"] == "bfloat16" or (recipe["dtype"] == "auto" and fast)


def parameter_groups(model: nn.Module, recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """AdamW groups: matrices and token embeddings decay; norms, biases and MASA's coefficients do not.

    Neither do parameters that the model itself exempts, as timm's do (class token and position embedding).
    Coefficients (with their block embeddings and MLPs) have their own learning rate.
    """
    exempting = getattr(decoder(model), "no_weight_decay", set)()
    exempt = {id(p) for name, p in decoder(model).named_parameters() if name in exempting}
    coefficients = [
        p
        for module in model.modules()
        if isinstance(module, SharedProjections)
        for source in module.values()
        for p in source.coefficient_parameters()
    ]
    special = {id(p) for p in coefficients}
    plain = [p for p in model.parameters() if p.requires_grad and id(p) not in special]
    rate = recipe["learning_rate"]
    groups = [
        {
            "params": [p for p in plain if id(p) not in exempt and p.ndim >= 2],
            "weight_decay": recipe["weight_decay"],
            "lr": rate,
        },
        {"params": [p for p in plain if id(p) in exempt or p.ndim < 2], "weight_decay": 0.0, "lr": rate},
        {"params": coefficients, "weight_decay": 0.0, "lr": rate * recipe["coefficients_learning_rate_ratio"]},
    ]
    return [group for group in groups if group["params"]]


def _trainer(
    spec: Mapping[str, Any], task: Task, model: nn.Module, out: Path, checkpoints: Path
) -> tuple[Trainer, RunLog]:
    recipe = spec["training"]
    steps = recipe["steps"]
    cuda = torch.cuda.is_available()
    bf16 = uses_bfloat16(recipe)
    world = PartialState().num_processes
    nodes, processes = launch.layout(spec)
    if world != nodes * processes:
        raise MasaError(
            f"{spec['run']} asks for {nodes} x {processes} processes (training.nodes, training.processes_per_node), "
            f"but {world} were started."
        )
    passes, rest = divmod(recipe["batch_size"], recipe["micro_batch_size"] * world)
    if rest or not passes:
        raise MasaError(
            f"{spec['run']}: batch_size = {recipe['batch_size']} is not a multiple of micro_batch_size x processes = "
            f"{recipe['micro_batch_size']} x {world}."
        )
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=recipe["micro_batch_size"],
        gradient_accumulation_steps=passes,
        max_grad_norm=recipe["max_grad_norm"],
        bf16=bf16,
        use_cpu=not cuda,
        seed=spec["seed"],
        train_sampling_strategy="sequential",
        save_strategy="no",
        save_total_limit=2,
        logging_steps=max(1, steps // 100),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        dataloader_pin_memory=cuda,
        dataloader_num_workers=recipe.get("workers", 0),
        remove_unused_columns=False,
        **parallel.arguments(spec, model),
    )
    log = RunLog(spec, task, model, out / "metrics.jsonl", "bfloat16" if bf16 else "float32")
    trainer = task.trainer(
        model=model,
        args=arguments,
        data_collator=task.collate,
        train_dataset=task.data,
        callbacks=[*task.callbacks, log],
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":  # its raw dictionaries would drown the progress lines
            trainer.remove_callback(callback)
    fused = cuda or not parallel.is_sharded(spec)
    parallel.prepare(
        trainer,
        spec,
        lambda m: torch.optim.AdamW(parameter_groups(m, recipe), betas=tuple(recipe["adam_betas"]), fused=fused),
        lambda optimizer: get_cosine_with_min_lr_schedule_with_warmup(
            optimizer,
            num_warmup_steps=math.ceil(recipe["warmup_fraction"] * steps),
            num_training_steps=steps,
            min_lr_rate=recipe["min_learning_rate_ratio"],
        ),
    )
    return trainer, log


class RunLog(TrainerCallback):
    """Held-out scores, metrics file, progress line, checkpoints by the clock, and an orderly end on a signal."""

    def __init__(self, spec: Mapping[str, Any], task: Task, model: nn.Module, path: Path, dtype: str) -> None:
        self.spec, self.task, self.model, self.path, self.dtype = spec, task, model, path, dtype
        recipe = spec["training"]
        self.steps = recipe["steps"]
        count = min(recipe["evaluations"], self.steps)
        self.evaluate_at = {round(self.steps * (i + 1) / count) for i in range(count)}
        self.signal: int | None = None
        self.last: dict[str, Any] = {}
        self.training_seconds = 0.0
        self.progress = Progress(spec["run"], self.steps, "steps")

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Turn the first stop signal into a flag that is looked at after the running step."""

        def remember(number: int, _: Any) -> None:
            self.signal = number

        previous = {s: signal.signal(s, remember) for s in launch.STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def whole(self, model: nn.Module) -> nn.Module:
        """The model in one piece, in the first process; all must call this."""
        return parallel.whole(self.spec, model, self.task.build)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved = self.resumed_at = time.monotonic()
        self.first_step = state.global_step
        if state.global_step and state.is_world_process_zero:
            # drop what a killed process logged after its last checkpoint
            kept = (
                [r for r in run.read_jsonl(self.path) if r["step"] <= state.global_step] if self.path.is_file() else []
            )
            self.path.write_text("".join(json.dumps(r) + "\n" for r in kept))
            self.last = next((r for r in reversed(kept) if "validation_loss" in r), {})
            self.training_seconds = kept[-1]["training_seconds"] if kept else 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        self.training_seconds += now - self.step_started
        step = state.global_step
        if step in self.evaluate_at:
            model = self.whole(self.model)
            if state.is_world_process_zero:
                self.last = self._at(step) | self.task.score(model)
                self._write(self.last | {"training_seconds": self.training_seconds})
        due = now - self.saved > 60 * self.spec["training"]["checkpoint_minutes"] and step < self.steps
        stop, due = self._any_process(self.signal or 0, int(due))
        if stop:
            self.signal = stop
            control.should_save = control.should_training_stop = True
        elif due:
            control.should_save = True
            self.saved = now

    def _any_process(self, *numbers: int) -> list[int]:
        """The largest of every number over all processes: they stop and save at the same step."""
        if PartialState().num_processes == 1:
            return list(numbers)
        largest = torch.tensor(numbers, device=next(self.model.parameters()).device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return largest.tolist()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        step, loss = state.global_step, logs["loss"]
        if not math.isfinite(loss):
            raise MasaError(
                f"{self.spec['run']}: the loss is {loss} at step {step}. Lower training.learning_rate; the last "
                "checkpoint before it, if there is one, is kept."
            )
        self._write(
            self._at(step)
            | {
                "loss": loss,
                "learning_rate": logs.get("learning_rate"),
                "grad_norm": logs.get("grad_norm"),
                "training_seconds": self.training_seconds,
            }
        )
        done = (step - self.first_step) * self.task.units_per_step
        speed = done / max(time.monotonic() - self.resumed_at, 1e-9)
        self.progress.update(step, f"loss {loss:.3f}  {speed:,.0f} {self.task.unit}/s")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes its own random state
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            run.write_json(folder / COMPLETE, {str(path.relative_to(folder)): sha256_of(path) for path in files})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        scores = "  ".join(f"{name} {value:.4f}" for name, value in self._scores().items())
        self.progress.close(state.global_step, f"held-out {scores.replace('validation_', '')}")

    def _at(self, step: int) -> dict[str, Any]:
        return {"step": step, self.task.unit: step * self.task.units_per_step}

    def _scores(self) -> dict[str, float]:
        return {name: value for name, value in self.last.items() if name.startswith("validation_")}

    def _write(self, record: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def summary(self) -> dict[str, Any]:
        """What the manifest says of the training; seconds are of the steps alone."""
        done = self.steps * self.task.units_per_step
        return {
            "steps": self.steps,
            self.task.unit: done,
            **self._scores(),
            "training_seconds": round(self.training_seconds, 3),
            f"{self.task.unit}_per_second": round(done / max(self.training_seconds, 1e-9), 1),
        }
