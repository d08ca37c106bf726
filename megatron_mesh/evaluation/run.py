"""Runs an evaluation: checks the settings, plans the jobs, runs them, and stores their results."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from megatron_mesh.errors import UserError
from megatron_mesh.evaluation import harness, model_source
from megatron_mesh.evaluation.perplexity import Text, measure_perplexity, open_text
from megatron_mesh.evaluation.results import HUB, AnswerTooLong, Result, Results, Skipped, label, open_results
from megatron_mesh.evaluation.tasks import (
    SHOTS,
    TASKS,
    TRANSFORMERS,
    VLLM,
    LocalTask,
    Task,
    check_engine,
    read_local_tasks,
)
from megatron_mesh.hf.convert.open_model import check_transformers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Settings of an evaluation. The fields are the flags of tools/evaluate.py."""

    output_dir: Path
    model: Path | None = None
    load: Path | None = None
    tokenizer_model: str | None = None
    trust_remote_code: bool = False
    tasks: list[Task] = field(default_factory=lambda: list(TASKS.values()))
    num_fewshot: tuple[int, ...] = SHOTS
    text: tuple[str, ...] = ()
    json_keys: str = "text"
    local_data: Path | None = None
    limit: int | None = None
    max_length: int | None = None
    batch_size: int | str = 8
    device: str | None = None
    dtype: str = "auto"
    engine: str = TRANSFORMERS


@dataclass(frozen=True)
class EvaluationJob:
    """A measurement that gives one result. The first three fields are those of ``Result``."""

    name: str
    shots: int | None
    data: str
    measure: Callable[[Any], Result]
    """Called with a ``CheckedHFLM`` or ``CheckedVLLM``."""

    @property
    def label(self) -> str:
        """The label of the result."""
        return label(self.name, self.shots)


def run_evaluation(settings: Settings) -> Results:
    """Compute the results that ``settings`` ask for, except those already in the output directory.

    Each result is written as soon as it is finished, so the same call resumes an interrupted evaluation. If
    all results are there, the model isn't loaded.

    Raises:
        UserError: the settings contradict each other, or the model or the data cannot be read.
    """
    check_settings(settings)
    harness.check_installed(settings.engine)
    check_transformers()
    device = None if settings.engine == VLLM else str(model_source.choose_device(settings.device))
    jobs, skipped = plan(settings)
    with Console(stderr=True).status("hashing the model's files"):
        source = _source(settings)
    results = open_results(settings.output_dir, _identity(settings, source))
    results.skipped = [task for task in skipped if task.label not in results.finished]
    left = [job for job in jobs if not results.holds(job.label, job.data)]
    if len(left) < len(jobs):
        logger.info("resuming: %d of %d results exist", len(jobs) - len(left), len(jobs))
    if left:
        _run(left, results, source, settings, device)
    results.save()
    return results


def _run(
    jobs: list[EvaluationJob],
    results: Results,
    source: model_source.ModelSource,
    settings: Settings,
    device: str | None,
) -> None:
    harness.silence_warnings()
    how: dict[str, Any] = {
        "dtype": settings.dtype,
        "batch_size": settings.batch_size,
        "max_length": settings.max_length,
    }
    if device is not None:
        how["device"] = device
    with model_source.opened(source, how, settings.engine) as lm:
        for number, job in enumerate(jobs, start=1):
            logger.info("[%d/%d] %s", number, len(jobs), job.label)
            try:
                results.add(job.measure(lm))
            except AnswerTooLong as error:
                logger.warning("skipping %s: %s", job.label, error)
                results.skipped.append(Skipped(job.name, job.shots, str(error)))


def check_settings(settings: Settings) -> None:
    """Raise UserError if the settings contradict each other. This reads no files."""
    if (settings.model is None) == (settings.load is None):
        raise UserError("give either --model (a Hugging Face directory) or --load (a training checkpoint)")
    if settings.tokenizer_model is not None and settings.load is None:
        raise UserError(
            "--tokenizer-model is only for --load; leave it out, since a --model directory has its own "
            "tokenizer"
        )
    if not settings.tasks and not settings.text:
        raise UserError("nothing to evaluate; give --tasks or --text")
    check_engine(settings.engine, settings.device)
    for name, value in {
        "limit": settings.limit,
        "max-length": settings.max_length,
        "batch-size": settings.batch_size,
    }.items():
        if isinstance(value, int) and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    if any(shots < 0 for shots in settings.num_fewshot):
        raise UserError(f"--num-fewshot {min(settings.num_fewshot)} must be at least 0")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "the evaluation runs in a single process; start it without torchrun (choose its GPU with "
            "--device)"
        )


def plan(settings: Settings) -> tuple[list[EvaluationJob], list[Skipped]]:
    """Return the jobs to run, and the tasks that cannot be run, with reasons.

    Raises:
        UserError: the data cannot be read, or no task can be run.
    """
    local = None if settings.local_data is None else read_local_tasks(settings.local_data)
    jobs, skipped = [], []
    for shots in dict.fromkeys(settings.num_fewshot):
        for task in settings.tasks:
            if shots and not task.averaged:
                continue
            reason = _unavailable(task, shots, local)
            if reason:
                skipped.append(Skipped(task.name, shots, reason))
            else:
                jobs.append(_task_job(task, shots, settings.limit, local[task.name] if local else None))
    if settings.text:
        jobs.append(_text_job(open_text(settings.text, settings.json_keys), settings))
    if not jobs:
        raise UserError(f"no task can be run: {'; '.join(f'{s.name}: {s.reason}' for s in skipped)}")
    return jobs, skipped


def _unavailable(task: Task, shots: int, local: dict[str, LocalTask] | None) -> str | None:
    if local is None:
        return None
    if task.name not in local:
        return "no task file in the local data"
    if shots and not local[task.name].has_examples:
        return "the local task file specifies no split for examples (training_split)"
    return None


def _task_job(task: Task, shots: int, limit: int | None, local: LocalTask | None) -> EvaluationJob:
    def run(lm: Any) -> Result:
        result = harness.run_task(lm, task, shots, limit=limit, local=local)
        logger.info(
            "%s: %s %.4f (%.0f s)", result.label, task.metric, result.metrics[task.metric], result.seconds
        )
        return result

    return EvaluationJob(task.name, shots, local.data if local else HUB, run)


def _text_job(text: Text, settings: Settings) -> EvaluationJob:
    def run(lm: Any) -> Result:
        batch_size = settings.batch_size if isinstance(settings.batch_size, int) else lm.text_batch
        with _progress(text.label) as on_batch:
            return measure_perplexity(
                text, lm, batch_size=batch_size, limit=settings.limit, on_batch=on_batch
            )

    return EvaluationJob(text.label, None, text.data, run)


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar. Yield a function to call with the number of finished tokens and their total."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        tenths = 0

        def on_batch(done: int, total: int) -> None:
            nonlocal tenths
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and 10 * done // total > tenths:
                tenths = 10 * done // total
                print(f"{label}: {done:,}/{total:,} tokens", file=sys.stderr, flush=True)

        yield on_batch


def _source(settings: Settings) -> model_source.ModelSource:
    if settings.load is not None:
        return model_source.checkpoint_source(settings.load, settings.tokenizer_model)
    assert settings.model is not None
    return model_source.huggingface_source(settings.model, trust_remote_code=settings.trust_remote_code)


def _identity(settings: Settings, source: model_source.ModelSource) -> dict[str, Any]:
    """Return what all results in one file must share."""
    return {
        "path": str(source.path),
        "model": source.sha256,
        "engine": settings.engine,
        "dtype": settings.dtype,
        "limit": settings.limit,
        "max_length": settings.max_length,
        "lm_eval": harness.harness_version(),
    }
