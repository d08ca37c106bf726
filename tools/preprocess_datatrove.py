#!/usr/bin/env python
"""What tools/preprocess_data.py does, as a datatrove pipeline: on this machine or as SLURM jobs.

python tools/preprocess_datatrove.py --input 'corpus/*.jsonl.zst' --output-prefix /shared/data/corpus \\
    --tokenizer-model tokenizer.json --append-eod --tasks 64 --slurm --partition cpu --time 04:00:00

Each task encodes a run of the files; a last one joins their outputs. The result is the same as that of
tools/preprocess_data.py, byte for byte. A run that was interrupted resumes where it stopped. Files are not
divided, so there should be at least as many as there are tasks. Needs datatrove (pip install datatrove).
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor

from megatron_mesh.data import build_tokenizer
from megatron_mesh.data.corpus import expand_inputs
from megatron_mesh.data.datatrove_steps import EncodeShard, JoinShards, ReadCorpus
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error


def main(argv: Sequence[str]) -> None:
    """Encode the shards, then join them; with --slurm, submit both as jobs."""
    arguments = _parser().parse_args(argv)
    build_tokenizer(arguments.tokenizer_type, arguments.tokenizer_model)  # fails here, not in a job
    paths = [path.absolute() for path in expand_inputs(arguments.input)]
    tasks = min(arguments.tasks, len(paths))
    prefix = str(Path(f"{arguments.output_prefix}_{arguments.json_key}_document").absolute())
    if not arguments.overwrite and (Path(f"{prefix}.bin").exists() or Path(f"{prefix}.idx").exists()):
        raise UserError(f"{prefix}.bin or .idx exists: choose another --output-prefix, or use --overwrite.")
    if tasks < 1 or arguments.workers < 1:
        raise UserError("--tasks and --workers must be at least 1.")
    work = Path(f"{prefix}_datatrove")
    if arguments.overwrite:
        shutil.rmtree(work, ignore_errors=True)
    model = str(Path(arguments.tokenizer_model).absolute())
    shards = str(work / "shards")
    encode = [
        ReadCorpus(paths, arguments.json_key, arguments.skip_broken),
        EncodeShard(shards, arguments.tokenizer_type, model, arguments.append_eod),
    ]
    join = [JoinShards(shards, tasks, prefix)]
    if arguments.slurm:
        _submit(encode, join, tasks, work, arguments)
        print(f"submitted; the data will be {prefix}.bin and .idx. Delete {work} when they are there.")
        return
    LocalPipelineExecutor(encode, tasks, arguments.workers, str(work / "logs" / "encode")).run()
    LocalPipelineExecutor(join, 1, 1, str(work / "logs" / "join")).run()
    shutil.rmtree(work)
    print(f"wrote {prefix}.bin and .idx")


def _submit(
    encode: list[Any], join: list[Any], tasks: int, work: Path, arguments: argparse.Namespace
) -> None:
    if not arguments.partition:
        raise UserError("--slurm needs a --partition.")
    if shutil.which("sbatch") is None:
        raise UserError(
            "--slurm: there is no sbatch on this machine; run this on a login node of the cluster."
        )
    common: dict[str, Any] = {
        "time": arguments.time,
        "partition": arguments.partition,
        "qos": arguments.qos,
        "cpus_per_task": 1,
        "mem_per_cpu_gb": arguments.mem_per_cpu_gb,
        "env_command": arguments.env_command,
    }
    encoding: PipelineExecutor = SlurmPipelineExecutor(
        encode,
        tasks,
        workers=arguments.workers,
        job_name="encode",
        logging_dir=str(work / "logs" / "encode"),
        **common,
    )
    SlurmPipelineExecutor(
        join, 1, job_name="join", logging_dir=str(work / "logs" / "join"), depends=encoding, **common
    ).run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files or quoted globs, as for tools/preprocess_data.py")
    add("--output-prefix", required=True, help="the data are PREFIX_KEY_document.bin and .idx")
    add("--json-key", default="text", help="key to take from the JSON (default: text)")
    add(
        "--tokenizer-type",
        help="HuggingFaceTokenizer or SentencePieceTokenizer (default: by the file's name)",
    )
    add("--tokenizer-model", required=True, help="a tokenizer.json, a directory that holds one, or a .model")
    add("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add("--skip-broken", action="store_true", help="leave broken documents out; the statistics count them")
    add("--overwrite", action="store_true", help="replace existing outputs and start from the beginning")
    add("--tasks", type=int, default=1, help="parts of the work; at most one per input file is used")
    add("--workers", type=int, default=1, help="tasks that run at the same time")
    slurm = parser.add_argument_group("SLURM")
    slurm.add_argument(
        "--slurm", action="store_true", help="submit the tasks as a job array, and the joining after it"
    )
    slurm.add_argument("--partition", help="partition of the jobs")
    slurm.add_argument("--time", default="04:00:00", help="time limit of a job (default: 04:00:00)")
    slurm.add_argument("--qos", help="quality of service, where the cluster wants one")
    slurm.add_argument("--mem-per-cpu-gb", type=int, default=4, help="memory of a task in GB (default: 4)")
    slurm.add_argument("--env-command", help="shell line before each task, e.g. 'source .venv/bin/activate'")
    return parser


if __name__ == "__main__":
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
