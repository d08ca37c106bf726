"""Fill in the settings that depend on others, and refuse settings that don't fit together.

A ``Config`` as the user gave it goes in, a resolved one comes out. Start with ``resolve`` below;
``model.py``, ``training.py`` and ``parallel.py`` check one group each.
"""

from dataclasses import replace

from megatron_mesh.config.resolve.model import resolve_model
from megatron_mesh.config.resolve.parallel import (
    check_context_parallel,
    check_pipeline,
    check_ranks,
    check_tensor_parallel,
)
from megatron_mesh.config.resolve.training import resolve_optimizer, resolve_precision, resolve_training
from megatron_mesh.config.schema import CheckpointConfig, Config, DataConfig, ModelConfig
from megatron_mesh.config.settings import at_least, positive
from megatron_mesh.errors import UserError


def resolve(config: Config, *, world_size: int = 1) -> Config:
    """Return the complete configuration of a run of ``world_size`` processes.

    ``layers`` is then set, and ``prelude_layers`` etc. are None. Decay and warm-up have the unit of the run's
    length: steps with ``train_iters``, samples with ``train_samples``. Resolving a second time changes
    nothing.

    Data may be missing, since a dry run needs none. If ``vocab_size`` is to come from the tokenizer, resolve
    again once it is known.

    Raises:
        UserError: a setting is out of range or doesn't fit another one.
    """
    model = resolve_model(config.model)
    check_data(config.data)
    check_vocabulary(model, config.data)
    data_parallel = check_ranks(config.parallel, world_size)
    check_tensor_parallel(config.parallel, model)
    check_context_parallel(
        config.parallel, model, config.precision.transformer_impl, bf16=config.training.bf16
    )
    training = resolve_training(config.training, model, data_parallel)
    check_pipeline(config.parallel, model, training, data_parallel)
    precision = resolve_precision(config.precision, model, training, config.parallel)
    optimizer = resolve_optimizer(config.optimizer, training)
    check_checkpoint(config.checkpoint)
    at_least(1, config.logging, "log_interval")
    return replace(config, model=model, training=training, precision=precision, optimizer=optimizer)


def check_vocabulary(model: ModelConfig, data: DataConfig) -> None:
    """Refuse a run with neither a vocabulary size nor a tokenizer."""
    if model.vocab_size is None and data.tokenizer_model is None:
        raise UserError(
            "the vocabulary size is not known; give --tokenizer-model (its size is used) or --vocab-size"
        )


def check_data(data: DataConfig) -> None:
    """Refuse a mixture of data path settings, and a missing tokenizer."""
    at_least(0, data, "num_workers")
    paths = {
        "--data-path": data.data_path,
        "--train-data-path": data.train_data_path,
        "--valid-data-path": data.valid_data_path,
        "--test-data-path": data.test_data_path,
    }
    given = [name for name, path in paths.items() if path is not None]
    for name in given:
        if not paths[name]:
            raise UserError(f"{name} is empty; give the prefix of a .bin/.idx pair, or WEIGHT PREFIX ...")
    if "--data-path" in given and len(given) > 1:
        raise UserError(
            f"--data-path and {given[1]} are both given; give --data-path alone, which --split divides, or "
            "--train-data-path, --valid-data-path and --test-data-path"
        )
    if given and not {"--data-path", "--train-data-path"} & set(given):
        raise UserError(f"{given[0]} is given without --train-data-path; add it, or use --data-path")
    if data.eod_mask_loss and data.tokenizer_model is None:
        raise UserError("--eod-mask-loss needs the tokenizer's end-of-document token; give --tokenizer-model")
    if data.eod_mask_loss_of is not None and not data.eod_mask_loss:
        raise UserError(
            f"--eod-mask-loss-of {data.eod_mask_loss_of} is given without --eod-mask-loss; add it"
        )


def check_checkpoint(checkpoint: CheckpointConfig) -> None:
    """Refuse settings of checkpoints that are out of range or lack another one."""
    at_least(1, checkpoint, "save_interval", "keep_last", "keep_every", "exit_interval")
    for name in ("exit_duration_in_mins", "exit_grace_seconds", "save_timeout_minutes"):
        positive(checkpoint, name)
    if checkpoint.keep_every is not None and checkpoint.keep_last is None:
        raise UserError("--keep-every has no effect without --keep-last; add it")
    if checkpoint.finetune and checkpoint.load is None:
        raise UserError(
            "--finetune needs a checkpoint to take the weights from; give its directory with --load"
        )
