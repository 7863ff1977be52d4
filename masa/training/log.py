"""What a training does beside its steps: held-out scores, log, progress, checkpoints by the clock, an orderly end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback

from masa.runs import run
from masa.runs.faults import writing
from masa.runs.files import whole_file
from masa.runs.hold import stop_signals
from masa.runs.progress import Progress
from masa.training import parallel, resuming
from masa.training.watch import Watch


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """A compiled model as it was written: for the few passes of a score another compilation does not pay."""
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled


class RunLog(TrainerCallback):
    """Held-out scores, metrics file, progress line, checkpoints by the clock, and an orderly end on a signal."""

    def __init__(
        self, spec: Mapping[str, Any], task: Any, model: nn.Module, path: Path, dtype: str, watch: Watch
    ) -> None:
        self.watch, self.stage = watch, "preparing to train"
        self.spec, self.task, self.model, self.path, self.dtype = spec, task, model, path, dtype
        recipe = spec["training"]
        self.steps = recipe["steps"]
        count = min(recipe["evaluations"], self.steps)
        self.evaluate_at = {round(self.steps * (i + 1) / count) for i in range(count)}
        self.signal: int | None = None
        self.last: dict[str, Any] = {}
        self.training_seconds = 0.0
        self.scoring: Callable[[], AbstractContextManager] = nullcontext
        self.first_is_slow = False  # a compiled model is compiled in its first step, which then counts as the next one
        self.progress = Progress(spec["run"], self.steps, "steps")

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Turn the first stop signal into a flag that is looked at after the running step."""

        def remember(number: int, _: Any) -> None:
            self.signal = number

        with stop_signals(remember):
            yield

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved = self.resumed_at = time.monotonic()
        self.first_step = state.global_step
        if self.path.is_file() and state.is_world_process_zero:
            # drop what a killed process logged after its last checkpoint, and lines that are not whole
            kept = [r for r in run.read_jsonl(self.path) if r.get("step", state.global_step + 1) <= state.global_step]
            with whole_file(self.path) as path:
                path.write_text("".join(json.dumps(r) + "\n" for r in kept))
            self.last = next((r for r in reversed(kept) if "validation_loss" in r), {})
            self.training_seconds = kept[-1]["training_seconds"] if kept else 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_started = time.monotonic()
        self.stage = f"training (step {state.global_step + 1:,})"

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        now, step = time.monotonic(), state.global_step
        since = step - self.first_step
        if not self.first_is_slow or since > 2:
            self.training_seconds += now - self.step_started
        elif since == 2:
            self.training_seconds += 2 * (now - self.step_started)
            self.resumed_at = now - 2 * (now - self.step_started)
        if step in self.evaluate_at:
            self.watch.check_state(step, self.model, optimizer)
            self.stage = f"scoring the held-out data (step {step:,})"
            whole = parallel.whole(self.spec, self.model, self.task.build)
            if state.is_world_process_zero:
                with self.scoring(), uncompiled(whole):
                    scores = self.task.score(whole)
                self.watch.check_scores(step, scores)
                self.last = self._at(step) | scores
                self._write(self.last | {"training_seconds": self.training_seconds})
        due = now - self.saved > 60 * self.spec["training"]["checkpoint_minutes"] and step < self.steps
        stop, due = self._any_process(self.signal or 0, int(due))
        if stop:
            self.signal = stop
            control.should_save = control.should_training_stop = True
        elif due:
            control.should_save = True
            self.saved = now
        if control.should_save:
            self.watch.check_state(step, self.model, optimizer)
            self.stage = f"writing a checkpoint (step {step:,})"

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
        self.watch.check()
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
        self.progress.update(step, f"loss {loss:.3f}  {speed:,.0f} {self.task.unit}/s{self._share(speed)}")

    def _share(self, speed: float) -> str:
        """What a speed is of all cards' peak, where that is known."""
        peak = self.task.peak
        said = peak.share(speed, self.dtype, PartialState().num_processes) if peak else ""
        return f", {said}" if said else ""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes its own random state
        if state.is_world_process_zero:
            checkpoints = Path(args.output_dir)
            resuming.finish(checkpoints, checkpoints / f"checkpoint-{state.global_step}")

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
        with writing(self.path):
            size = self.path.stat().st_size if self.path.is_file() else 0
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError:
                if self.path.is_file():
                    os.truncate(self.path, size)  # no half a line
                raise

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
