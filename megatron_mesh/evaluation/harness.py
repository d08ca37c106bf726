"""lm-evaluation-harness: its tasks with the measures that we report, and one task run on a model."""

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
from megatron_mesh.evaluation.engines import TRANSFORMERS, VLLM
from megatron_mesh.evaluation.local_data import LocalTask
from megatron_mesh.evaluation.results import HUB, Result
from megatron_mesh.evaluation.tasks import Task

_FOLDERS = ("arc", "hellaswag", "lambada", "mmlu/continuation", "piqa", "sciq", "wikitext", "winogrande")
_FEWSHOT_SEED = 1234  # as in lm_eval's command line; the same examples are drawn

# lm-eval computes acc_bytes for a task whose list names it, and its own task files do not.
_METRICS = [
    {"metric": name, "aggregation": "mean", "higher_is_better": True}
    for name in ("acc", "acc_norm", "acc_bytes")
]


def check_installed(engine: str = TRANSFORMERS) -> None:
    """Raise UserError if lm-eval, or what it needs for ``engine``, is not there."""
    if engine == VLLM and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "--engine vllm: vLLM is not installed here. It pins its own torch and transformers: install it "
            "with megatron_mesh[eval] in another environment, or use --engine transformers"
        )
    needed = ("lm_eval", "transformers", *(("accelerate",) if engine == TRANSFORMERS else ()))
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)} is not installed: pip install 'megatron_mesh[eval]' "
            "(in a checkout: pip install -e '.[eval]')"
        )


def version() -> str:
    """lm-eval's version, which its tasks may change with."""
    return importlib.metadata.version("lm_eval")


def quiet() -> None:
    """Leave out lm-eval's warnings, which are about settings that we make on purpose."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def run_task(lm: Any, task: Task, shots: int, *, limit: int | None, local: LocalTask | None) -> Result:
    """One task at one number of shots, as ``lm_eval run`` does it.

    Args:
        lm: ``CheckedHFLM`` or ``CheckedVLLM``.
        task: what is run.
        shots: examples in the prompt.
        limit: only this many documents (of each subject, in MMLU).
        local: the task from files; else it comes from the hub.

    Raises:
        UserError: its data cannot be had, or a local file does not give the paper's measure.
    """
    import lm_eval

    start = time.monotonic()
    loaded = _load(task, local)
    for part in loaded["tasks"].values():
        part.set_config("num_fewshot", shots)
        part.set_fewshot_seed(_FEWSHOT_SEED)
    with contextlib.redirect_stdout(sys.stderr):
        output = lm_eval.evaluate(lm, loaded, limit=limit, log_samples=False)
    assert output is not None  # only processes other than the first get nothing
    values = {
        key.removesuffix(",none"): float(value)
        for key, value in output["results"][task.name].items()
        if key.endswith(",none") and isinstance(value, (int, float))
    }
    if task.metric not in values:
        raise UserError(
            f"{local.file if local else task.name} gives no {task.metric}; correct its metric_list"
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
    """lm-eval's tasks (many in a group) with their data; new for each run, since they keep their shots."""
    metrics = {"metric_list": _METRICS} if task.normalised else {}
    if local is not None:
        spec: Any = {**local.config, **metrics}
    elif metrics:  # a group is lm-eval's way to change a setting of a task
        spec = {"group": f"{task.name}_group", "task": [{"task": task.name, **metrics}]}
    else:
        spec = task.name
    try:
        return _manager().load(spec)
    except OSError as error:  # what datasets and huggingface_hub raise for the network derives from it
        raise UserError(_unavailable(task, local, error)) from error


@functools.cache
def _manager() -> Any:
    """lm-eval's index of our tasks. That of all of its tasks takes a quarter of a minute to read."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(include_path=[root / name for name in _FOLDERS], include_defaults=False)


def _unavailable(task: Task, local: LocalTask | None, error: OSError) -> str:
    cause = (str(error).splitlines() or [type(error).__name__])[0]
    if local is not None:
        return f"the data of {task.name} cannot be read ({cause}); correct {local.file}"
    return (
        f"the data of {task.name} cannot be had from the Hugging Face hub ({cause}); go on with the same "
        "command where the hub can be reached, or give --local-data"
    )
