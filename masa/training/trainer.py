"""The training loop that all kinds of models share: Hugging Face's Trainer, one recipe, and runs that can be resumed.

A run directory holds ``spec.json`` (everything resolved), ``metrics.jsonl`` (append-only), ``model/`` (factored
checkpoint), ``provenance.json``, ``identity.json`` (what decides the bits), ``manifest.json`` (written last: its
presence means that the run is whole) and, while it is running, ``checkpoints/``.

In several processes (:mod:`masa.training.launch`) the same call trains one model: each takes its part of every batch,
the first writes.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data._utils import signal_handling
from transformers import TrainerCallback, TrainingArguments, get_cosine_with_min_lr_schedule_with_warmup, set_seed

from masa.errors import Interrupted, MasaError
from masa.runs import faults, memory, run
from masa.runs.files import sha256_of
from masa.sharing import checkpoint
from masa.sharing.share import ParameterCount, count_parameters
from masa.training import earlier, extending, launch, optimizers, parallel, resuming
from masa.training.fused import FusedKernels, fits
from masa.training.log import RunLog
from masa.training.peak import Peak
from masa.training.precision import CastOnce, compiles, uses_bfloat16
from masa.training.watch import Trainer, Watch


@dataclass(frozen=True)
class Task:
    """What one kind of model brings to the loop.

    Attributes:
        build: the model, newly initialised from torch's global generator.
        data: the items of all steps in their order; item i may depend on i and the seed alone. ``where(items)``, if it
            has that, says in words which data a range of items are.
        score: held-out numbers of a model; their names begin with ``validation_`` and one is ``validation_loss``.
        unit, units_per_step: what speed is counted in, "tokens" or "images".
        inputs: sha256 of what it was trained on.
        identity: changes with the spec, the inputs and the code; another identity is another run.
        code: the meaning of the code that trains.
        trainer, collate: makes the Trainer, and batches, where the loss or the batches are not Hugging Face's own.
        packages: whose versions are stored beside those of all runs.
        callbacks: called before the run's log at every event.
        final: which model is kept in the end.
        casts_once: whether its loss can be had of a model whose weights are bfloat16; else there is autocast.
        peak: what the progress lines say that speed is a share of; None where it is not known.
    """

    build: Callable[[], nn.Module]
    data: Any
    score: Callable[[nn.Module], dict[str, float]]
    unit: str
    units_per_step: int
    inputs: Mapping[str, str]
    identity: str
    code: str = ""
    trainer: Callable[..., Trainer] = Trainer
    collate: Callable[[list], dict] | None = None
    packages: Sequence[str] = ()
    callbacks: Sequence[TrainerCallback] = ()
    final: Callable[[nn.Module], nn.Module] = lambda model: model
    casts_once: bool = True
    peak: Peak | None = None


def set_up(spec: Mapping[str, Any]) -> None:
    """Threads, memory and deterministic algorithms of a run; called before anything is computed.

    A dead worker of a data loader is noticed when its data are missed, and not by a signal, which would raise an error
    anywhere, even in the middle of a checkpoint.
    """
    memory.keep_freed()
    signal_handling._SIGCHLD_handler_set = True
    torch.set_num_threads(spec["training"]["threads"])
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a kernel for each tensor, to find what we do not do


def train(
    spec: Mapping[str, Any],
    task: Task,
    out: Path,
    *,
    wait: bool = False,
    restart: earlier.Restart = None,
    extend: Path | None = None,
) -> dict[str, Any]:
    """Train one model, go on with a run that was interrupted, or see that it is finished.

    Nothing in ``out`` is touched before all of this is known: that the model can be built, and that what lies there is
    nothing, this run, or one that may be set aside.

    Args:
        spec: ``run``, ``seed`` and ``training``, everything resolved.
        task: model, data and scores.
        out: run directory.
        wait: for another process that trains in the same directory; if that one finishes this very run, nothing is
            left to do. Not where a run has several processes, which would lose each other meanwhile.
        restart: what becomes of another run there (:data:`masa.training.earlier.Restart`).
        extend: directory of a finished run, which is trained on (:func:`masa.training.extending.extended`).

    Returns:
        The manifest.

    Raises:
        MasaError: another run in the directory (what differs is said), numbers that are not finite (step and batch are
            named), a disk that cannot be written, no memory, a killed worker, or another process that trains in the
            same directory.
    """
    processes = PartialState(cpu=not torch.cuda.is_available())
    _check(spec)
    if extend is not None:
        spec, task = extending.extended(spec, task, extend)
    alone = processes.num_processes == 1
    asked = earlier.Asked(spec, task.inputs, task.code, task.identity)
    with run.exclusive(out, wait and alone) if processes.is_main_process else nullcontext() as waited:
        how = parallel.agreed(lambda: earlier.decide(out, asked, restart))
        if not isinstance(how, str):
            if waited:
                print(f"{spec['run']}: the process that was waited for has finished this run", file=sys.stderr)
            if processes.is_main_process:
                earlier.again(out, how, spec)
            return how
        checkpoints = out / "checkpoints"
        stage: list[Any] = ["building the model"]
        with _explained(spec, checkpoints, stage):
            set_seed(spec["seed"])
            model = task.build()
            stage.append("preparing the run directory")
            if processes.is_main_process:
                earlier.take(out, asked, how)
            processes.wait_for_everyone()
            _train(spec, task, model, out, stage)
        processes.wait_for_everyone()
    return run.read_json(out / "manifest.json")


def _train(spec: Mapping[str, Any], task: Task, model: nn.Module, out: Path, stage: list) -> None:
    checkpoints = out / "checkpoints"
    counts = count_parameters(model)
    trainer, log = _trainer(spec, task, model, out, checkpoints)
    stage.append(log)
    last = resuming.newest(checkpoints)
    with log.catching_signals():
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        except Exception as error:
            resuming.explain(error, last)
            raise
    PartialState().wait_for_everyone()  # the first may still be writing its checkpoint
    if log.signal is not None and trainer.state.global_step < spec["training"]["steps"]:
        raise Interrupted(
            f"{spec['run']} was stopped by {signal.Signals(log.signal).name} at step {trainer.state.global_step} "
            "and can be resumed with the same command."
        )
    log.stage = "storing the model"
    whole = parallel.whole(spec, model, task.build)
    if PartialState().is_main_process:
        _finish(spec, task, log, counts, whole, out)


@contextmanager
def _explained(spec: Mapping[str, Any], checkpoints: Path, stage: list) -> Iterator[None]:
    """Turn faults of the machine into messages, and drop a checkpoint that they left half-written.

    Args:
        stage: what is being done, or at its end the log, which knows.
    """
    try:
        yield
    except Exception as error:
        fault = None if isinstance(error, MasaError) else faults.cannot_write(error, checkpoints, checkpoints)
        fault = error if isinstance(error, faults.CannotWrite) else fault
        if PartialState().is_main_process:
            resuming.drop_unfinished(checkpoints)
        then = resuming.then(checkpoints)
        if fault is not None:
            raise MasaError(f"{spec['run']}: {fault} to {then}.") from error
        if memory.is_exhausted(error):
            doing = getattr(stage[-1], "stage", stage[-1])
            raise memory.exhausted(spec, doing, then) from error
        if killed := faults.killed_worker(error):
            raise MasaError(
                f"{spec['run']}: a data loader's worker ({killed}) while {stage[-1].stage}; most likely the machine's "
                "memory ran out. Lower training.workers, or training.micro_batch_size with --restart, or run fewer "
                f"jobs at once, and run the same command again to {then}."
            ) from error
        raise


def _finish(
    spec: Mapping[str, Any], task: Task, log: RunLog, counts: ParameterCount, model: nn.Module, out: Path
) -> None:
    """Store the model, what it was made with, and the manifest, which is the sign that all is there."""
    extends = {"extends": spec["extends"]} if "extends" in spec else {}
    checkpoint.save(task.final(model).eval(), out / "model")
    run.write_json(
        out / "provenance.json",
        run.provenance(task.inputs, task.packages)
        | {
            "seed": spec["seed"],
            "threads": spec["training"]["threads"],
            "dtype": log.dtype,
            "processes": PartialState().num_processes,
        }
        | extends,
    )
    result = {
        "run": spec["run"],
        "identity": task.identity,
        "parameters": counts.to_dict(),
        "training": log.summary(),
        "sha256": {name: sha256_of(out / "model" / name) for name in ("model.safetensors", "config.json")},
    } | extends
    earlier.finish(out, earlier.Asked(spec, task.inputs, task.code, task.identity), result)


def _check(spec: Mapping[str, Any]) -> None:
    """See that a recipe fits the processes that were started; before anything is touched.

    Raises:
        MasaError: it does not.
    """
    recipe, world = spec["training"], PartialState().num_processes
    nodes, processes = launch.layout(spec)
    if world != nodes * processes:
        raise MasaError(
            f"{spec['run']} asks for {nodes} x {processes} processes (training.nodes, training.processes_per_node), "
            f"but {world} were started."
        )
    launch.check_batch(spec)
    compiles(recipe)
    parallel.check(spec)


def _arguments(spec: Mapping[str, Any], model: nn.Module, checkpoints: Path, autocast: bool) -> TrainingArguments:
    recipe, cuda = spec["training"], torch.cuda.is_available()
    passes = recipe["batch_size"] // (recipe["micro_batch_size"] * PartialState().num_processes)
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=recipe["steps"],
        per_device_train_batch_size=recipe["micro_batch_size"],
        gradient_accumulation_steps=passes,
        max_grad_norm=recipe["max_grad_norm"],
        bf16=autocast,
        use_cpu=not cuda,
        seed=spec["seed"],
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_steps=max(1, recipe["steps"] // 100),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        dataloader_pin_memory=cuda,
        accelerator_config={"non_blocking": cuda},
        dataloader_num_workers=recipe.get("workers", 0),
        remove_unused_columns=False,
        **parallel.arguments(spec, model),
    )


def _trainer(
    spec: Mapping[str, Any], task: Task, model: nn.Module, out: Path, checkpoints: Path
) -> tuple[Trainer, RunLog]:
    recipe, cuda = spec["training"], torch.cuda.is_available()
    lower = uses_bfloat16(recipe)
    at_once = lower and task.casts_once and cuda and not parallel.is_sharded(spec)
    arguments = _arguments(spec, model, checkpoints, autocast=lower and not at_once)
    size, where = recipe["batch_size"], getattr(task.data, "where", None)

    def batch(step: int) -> str:
        items = range((step - 1) * size, step * size)
        return f"whose batch is {where(items) if where else f'items {items.start:,} to {items.stop - 1:,}'}"

    watch = Watch(spec["run"], batch, next(model.parameters()).device if not cuda else torch.device("cuda"))
    log = RunLog(spec, task, model, out / "metrics.jsonl", "bfloat16" if lower else "float32", watch)
    trainer = task.trainer(
        model=model,
        args=arguments,
        data_collator=task.collate,
        train_dataset=task.data,
        callbacks=[*task.callbacks, log],
    )
    trainer.watch = watch
    if at_once:
        cast = CastOnce(model, together=PartialState().num_processes == 1)
        trainer.around, trainer.inputs = [cast], cast.inputs
        log.scoring = partial(torch.autocast, "cuda", torch.bfloat16)
    if compiles(recipe):
        model.compile(dynamic=False)
        log.first_is_slow = True
    elif at_once and fits(model):
        trainer.around.append(FusedKernels(model))
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":  # its raw dictionaries would drown the progress lines
            trainer.remove_callback(callback)
    fused = cuda or not parallel.is_sharded(spec)
    parallel.prepare(
        trainer,
        spec,
        lambda m: optimizers.build(m, recipe, fused),
        lambda optimizer: get_cosine_with_min_lr_schedule_with_warmup(
            optimizer,
            num_warmup_steps=math.ceil(recipe["warmup_fraction"] * recipe["steps"]),
            num_training_steps=recipe["steps"],
            min_lr_rate=recipe["min_learning_rate_ratio"],
        ),
    )
    return trainer, log
