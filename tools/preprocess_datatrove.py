#!/usr/bin/env python
"""Encode raw text as tools/preprocess_data.py does, but with datatrove, on this machine or as SLURM jobs.

    python tools/preprocess_datatrove.py --input 'corpus/*.jsonl.zst' --output-prefix /shared/data/corpus \\
        --tokenizer-model tokenizer.json --append-eod --tasks 64 --slurm --partition cpu --time 04:00:00

Each task encodes some of the files, and a last task joins their outputs. The result equals that of
tools/preprocess_data.py byte for byte. Files are not divided, so give at least as many files as tasks. After
an interruption, the same command resumes. Needs datatrove (pip install datatrove).
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mesh import command
from megatron_mesh.errors import UserError


@dataclass
class SlurmOptions:
    """Run as SLURM jobs."""

    slurm: bool = False
    """Submit the tasks as an array of jobs, followed by a job that joins their outputs."""
    partition: str | None = None
    """Partition of the jobs."""
    time: str = "04:00:00"
    """Time limit of a job."""
    qos: str | None = None
    """Quality of service, if the cluster requires one. (default: none)"""
    mem_per_cpu_gb: int = 4
    """Memory of each task in GB."""
    env_command: str | None = None
    """Shell line to run before each task, e.g. 'source .venv/bin/activate'. (default: none)"""


@dataclass
class Options:
    """Options of the preprocessing."""

    input: tuple[str, ...]
    """Files or quoted globs, as for tools/preprocess_data.py."""
    output_prefix: str
    """Write PREFIX_KEY_document.bin and .idx."""
    tokenizer_model: str
    """A tokenizer.json, a directory that holds one, or a SentencePiece .model."""
    slurm: SlurmOptions
    tokenizer_type: str | None = None
    """HuggingFaceTokenizer or SentencePieceTokenizer. (default: by the file's name)"""
    json_key: str = "text"
    """Key to take from the JSON objects."""
    append_eod: bool = False
    """End every document with the end-of-document token."""
    skip_broken: bool = False
    """Leave out broken documents; the statistics count them."""
    overwrite: bool = False
    """Replace existing outputs and start from the beginning."""
    tasks: int = 1
    """Number of tasks to divide the files among; at most one per input file is used."""
    workers: int = 1
    """Largest number of tasks that run at the same time."""


def main(options: Options) -> None:
    """Encode the shards, then join them; with --slurm, submit both as jobs."""
    from datatrove.executor.local import LocalPipelineExecutor

    from megatron_mesh.data import build_tokenizer
    from megatron_mesh.data.corpus import expand_inputs
    from megatron_mesh.data.datatrove_steps import EncodeShard, JoinShards, ReadCorpus

    if not options.input:
        raise UserError("--input needs at least one value")
    build_tokenizer(options.tokenizer_type, options.tokenizer_model)  # fails here, not in a job
    paths = [path.absolute() for path in expand_inputs(list(options.input))]
    tasks = min(options.tasks, len(paths))
    prefix = str(Path(f"{options.output_prefix}_{options.json_key}_document").absolute())
    if not options.overwrite and (Path(f"{prefix}.bin").exists() or Path(f"{prefix}.idx").exists()):
        raise UserError(f"{prefix}.bin or .idx exists: choose another --output-prefix, or use --overwrite.")
    if tasks < 1 or options.workers < 1:
        raise UserError("--tasks and --workers must be at least 1.")
    work = Path(f"{prefix}_datatrove")
    if options.overwrite:
        shutil.rmtree(work, ignore_errors=True)
    model = str(Path(options.tokenizer_model).absolute())
    shards = str(work / "shards")
    encode = [
        ReadCorpus(paths, options.json_key, options.skip_broken),
        EncodeShard(shards, options.tokenizer_type, model, options.append_eod),
    ]
    join = [JoinShards(shards, tasks, prefix)]
    if options.slurm.slurm:
        _submit(encode, join, tasks, work, options)
        print(f"submitted; the jobs will write {prefix}.bin and .idx. Delete {work} when both are there.")
        return
    LocalPipelineExecutor(encode, tasks, options.workers, str(work / "logs" / "encode")).run()
    LocalPipelineExecutor(join, 1, 1, str(work / "logs" / "join")).run()
    shutil.rmtree(work)
    print(f"wrote {prefix}.bin and .idx")


def _submit(encode: list[Any], join: list[Any], tasks: int, work: Path, options: Options) -> None:
    from datatrove.executor.base import PipelineExecutor
    from datatrove.executor.slurm import SlurmPipelineExecutor

    slurm = options.slurm
    if not slurm.partition:
        raise UserError("--slurm needs a --partition.")
    if shutil.which("sbatch") is None:
        raise UserError("--slurm: this machine has no sbatch; run this on a login node of the cluster.")
    common: dict[str, Any] = {
        "time": slurm.time,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "cpus_per_task": 1,
        "mem_per_cpu_gb": slurm.mem_per_cpu_gb,
        "env_command": slurm.env_command,
    }
    encoding: PipelineExecutor = SlurmPipelineExecutor(
        encode,
        tasks,
        workers=options.workers,
        job_name="encode",
        logging_dir=str(work / "logs" / "encode"),
        **common,
    )
    SlurmPipelineExecutor(
        join, 1, job_name="join", logging_dir=str(work / "logs" / "join"), depends=encoding, **common
    ).run()


if __name__ == "__main__":
    command.run(main)
