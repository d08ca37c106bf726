"""Runs single tasks of lm-evaluation-harness, with the metrics that we report."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import sys
import time
from pathlib import Path
from typing import Any

from megatron_mesh.errors import UserError
from megatron_mesh.evaluation.results import HUB, Result
from megatron_mesh.evaluation.tasks import TRANSFORMERS, VLLM, LocalTask, Task

_FOLDERS = ("arc", "hellaswag", "lambada", "mmlu/continuation", "piqa", "sciq", "wikitext", "winogrande")
_FEWSHOT_SEED = 1234  # the default of lm_eval's command line, so that the same examples are drawn

# lm-eval can compute acc_bytes, but its task files don't ask for it.
_METRICS = [
    {"metric": name, "aggregation": "mean", "higher_is_better": True}
    for name in ("acc", "acc_norm", "acc_bytes")
]


def check_installed(engine: str = TRANSFORMERS) -> None:
    """Raise UserError if lm-eval or a package that it needs for ``engine`` is not installed."""
    if engine == VLLM and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "--engine vllm: vLLM is not installed; install it with megatron_mesh[eval] in a separate "
            "environment, since it pins torch and transformers, or use --engine transformers"
        )
    needed = ("lm_eval", "transformers", *(("accelerate",) if engine == TRANSFORMERS else ()))
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)} is not installed: pip install 'megatron_mesh[eval]' "
            "(in a checkout: pip install -e '.[eval]')"
        )


def harness_version() -> str:
    """Return lm-eval's version. Its tasks may change from one version to the next."""
    return importlib.metadata.version("lm_eval")


def silence_warnings() -> None:
    """Silence lm-eval's warnings, which are about settings that we choose on purpose."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def run_task(lm: Any, task: Task, shots: int, *, limit: int | None, local: LocalTask | None) -> Result:
    """Run a task with a number of few-shot examples, with the same result as ``lm_eval run``.

    Args:
        lm: a ``CheckedHFLM`` or ``CheckedVLLM``.
        task: the task to run.
        shots: number of examples in the prompt.
        limit: use only this many documents (of each subject, in MMLU).
        local: the task's local files; if None, its data come from the Hugging Face hub.

    Raises:
        UserError: the data are unavailable, or the local task file doesn't ask for the paper's metric.
    """
    import lm_eval

    start = time.monotonic()
    loaded = _load(task, local)
    for part in loaded["tasks"].values():
        part.set_config("num_fewshot", shots)
        part.set_fewshot_seed(_FEWSHOT_SEED)
    with contextlib.redirect_stdout(sys.stderr):
        output = lm_eval.evaluate(lm, loaded, limit=limit, log_samples=False)
    assert output is not None  # None is only for processes other than the first
    values = {
        key.removesuffix(",none"): float(value)
        for key, value in output["results"][task.name].items()
        if key.endswith(",none") and isinstance(value, (int, float))
    }
    if task.metric not in values:
        raise UserError(
            f"{local.file if local else task.name} doesn't report {task.metric}; add it to its metric_list"
        )
    return Result(
        name=task.name,
        shots=shots,
        data=local.data if local else HUB,
        metrics={key: value for key, value in values.items() if "_stderr" not in key},
        stderr={key.replace("_stderr", ""): value for key, value in values.items() if "_stderr" in key},
        documents=sum(count["effective"] for count in output["n-samples"].values()),
        seconds=time.monotonic() - start,
    )


def _load(task: Task, local: LocalTask | None) -> Any:
    """Load lm-eval's tasks (a group may have many) and their data.

    Each run loads them anew, since lm-eval stores the number of shots in the task objects.
    """
    metrics = {"metric_list": _METRICS} if task.normalised else {}
    if local is not None:
        spec: Any = {**local.config, **metrics}
    elif metrics:  # lm-eval lets only a group override a task's settings
        spec = {"group": f"{task.name}_group", "task": [{"task": task.name, **metrics}]}
    else:
        spec = task.name
    try:
        return _manager().load(spec)
    except OSError as error:  # base class of the network errors of datasets and huggingface_hub
        raise UserError(_unavailable(task, local, error)) from error


@functools.cache
def _manager() -> Any:
    """Return lm-eval's index of only our tasks, since indexing all of its tasks takes 15 seconds."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(include_path=[root / name for name in _FOLDERS], include_defaults=False)


def _unavailable(task: Task, local: LocalTask | None, error: OSError) -> str:
    cause = (str(error).splitlines() or [type(error).__name__])[0]
    if local is not None:
        return f"cannot read the data of {task.name} ({cause}); correct {local.file}"
    return (
        f"cannot load the data of {task.name} from the Hugging Face hub ({cause}); repeat the command on a "
        "machine with access to the hub, which continues this evaluation, or use --local-data"
    )
