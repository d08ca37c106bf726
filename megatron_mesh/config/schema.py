"""Every setting of a run, typed and grouped. Names are Megatron-LM's wherever it has the thing.

The field ``seq_length`` is the flag ``--seq-length`` and the YAML key ``seq_length``. The string
below a field is its help text. No value is checked here: ``checks.py`` sees all of them together.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ModelConfig:
    """Model: the backbone (GPT-NeoX, as in Pythia) and the recurrence around its core."""

    recurrence: str = "mesh"
    """Recurrence scheme: how the state that enters the next loop is made from the core's output."""
    layers: str | None = None
    """Layers as prelude+coreRloops+coda, e.g. 4+8R2+4; 4+8+8+4 where cores are not shared; 24 for vanilla."""
    prelude_layers: int | None = None
    """Layers before the loop (instead of --layers)."""
    core_layers: int | None = None
    """Layers of the core, the block that is applied --num-loops times (instead of --layers)."""
    num_loops: int | None = None
    """Times the core is applied, K (instead of --layers)."""
    coda_layers: int | None = None
    """Layers after the loop (instead of --layers)."""
    mesh_slots: int | None = None
    """Slots N of the MeSH memory; K + 3 if unset."""
    mesh_transition_query: Literal["prelude-output", "embedding"] = "prelude-output"
    """What the routers of the transition cycle (prelude to loop) look at."""
    mesh_memory: Literal["factored", "slots"] = "factored"
    """Computation of the MeSH memory: factored keeps K+2 tensors, slots (a slow reference) all of them."""
    router_init_std: float | None = None
    """Standard deviation of the initial router weights; --init-method-std if unset."""
    router_bias_init: float = 0.0
    """Initial bias of each cycle's own slot in both routers; above 0, training starts near base."""
    hidden_size: int = 768
    """Hidden size H."""
    num_attention_heads: int = 12
    """Attention heads; must divide --hidden-size."""
    ffn_hidden_size: int | None = None
    """Width of the MLP; 4 x hidden size if unset."""
    seq_length: int = 2048
    """Tokens per sequence S."""
    vocab_size: int | None = None
    """Entries of the vocabulary before padding; the tokenizer's if unset."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this; tensor parallelism must divide the padded size."""
    untie_embeddings_and_output_weights: bool = True
    """Separate input embedding and output projection."""
    rotary_percent: float = 0.25
    """Share of each head's dimensions that rotary position embedding turns."""
    rotary_base: int = 10000
    """Base period of the rotary position embedding."""
    norm_epsilon: float = 1e-5
    """Epsilon of LayerNorm."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights."""
    depth_scaled_init: bool = True
    """Divide the initial std of attention and MLP output projections by sqrt(2 x unrolled depth)."""
    scale_embeddings: bool = True
    """Multiply the token embedding by sqrt(hidden size)."""


@dataclass
class TrainingConfig:
    """Training: batch, length, precision and memory."""

    micro_batch_size: int = 1
    """Sequences per forward pass and data-parallel rank."""
    global_batch_size: int | None = None
    """Sequences per optimizer step over all ranks; micro-batch size x data-parallel size if unset."""
    train_iters: int | None = None
    """Optimizer steps of the whole run."""
    train_samples: int | None = None
    """Sequences of the whole run (instead of --train-iters); the schedule then counts sequences, too."""
    rampup_batch_size: list[int] | None = None
    """START INCREMENT SAMPLES: begin with a global batch of START and increase it by INCREMENT, in equal
    shares of the first SAMPLES sequences, up to --global-batch-size. Needs --train-samples."""
    seed: int = 1234
    """Seed of the initial weights and of the order of the data."""
    bf16: bool = False
    """Train in bfloat16, with main parameters and gradients in float32."""
    recompute_granularity: Literal["selective", "full"] | None = None
    """Recompute activations in the backward pass: the attention (selective) or whole layers (full)."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full recompute: all layers in groups (uniform), or the first layers of each section (block);
    uniform if unset."""
    recompute_num_layers: int | None = None
    """Layers per recomputed group (uniform) or recomputed layers per section (block); 1 if unset."""
    recompute_modules: list[Literal["core_attn", "mlp"]] | None = None
    """With selective recompute: which parts; core_attn if unset."""
    max_skipped_steps: int = 10
    """Stop when so many steps in a row were skipped because loss or gradients were not finite."""
    deterministic_mode: bool = False
    """Use only operations that give the same bits every time, also on GPUs."""
    eval_interval: int = 1000
    """Steps between validations; 0 turns them off."""
    eval_iters: int = 100
    """Global batches of a validation; 0 turns validation off."""


@dataclass
class PrecisionConfig:
    """Precision: Transformer Engine, FP8 and fused gradients."""

    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation: transformer_engine, local (torch), or auto (Transformer Engine if it is installed
    and a GPU is present)."""
    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = "auto"
    """Attention of Transformer Engine's layers: flash-attention, cuDNN's (fused), unfused, torch's (local)
    or the fastest (auto). Local layers always use torch's."""
    gradient_accumulation_fusion: bool = False
    """Add weight gradients to the float32 ones inside the matrix product (Transformer Engine or apex)."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Compute in FP8: e4m3 everywhere, or e5m2 for gradients (hybrid); with Transformer Engine and --bf16."""
    fp8_recipe: Literal["tensorwise", "blockwise", "delayed"] = "tensorwise"
    """FP8 scaling: per tensor from current values, per block, or delayed (from an amax history)."""
    fp8_scope: Literal["core", "all"] = "core"
    """Layers in FP8: the core's, or prelude's and coda's too; a plain model is all core."""
    fp8_param_gather: bool = False
    """Keep the weights of FP8 layers in FP8, also when gathered; needs --use-distributed-optimizer."""
    first_last_layers_bf16: bool = False
    """Keep the first and last layers in bfloat16."""
    num_layers_at_start_in_bf16: int | None = None
    """With --first-last-layers-bf16: layers of the whole network's start; 1 if unset."""
    num_layers_at_end_in_bf16: int | None = None
    """With --first-last-layers-bf16: layers of the whole network's end; 1 if unset."""
    fp8_amax_history_len: int | None = None
    """With --fp8-recipe delayed: micro-batches whose largest values make the scales; 1024 if unset."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] | None = None
    """With --fp8-recipe delayed: the last or the largest of the history; max if unset."""


@dataclass
class OptimizerConfig:
    """Optimizer: AdamW and its schedule."""

    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = "cosine"
    """Shape of the decay."""
    lr_decay_iters: int | None = None
    """Steps over which the learning rate decays; --train-iters if unset."""
    lr_decay_samples: int | None = None
    """With --train-samples: sequences over which the learning rate decays; --train-samples if unset."""
    lr_warmup_fraction: float | None = None
    """Share of the decay (in steps or sequences) spent on linear warm-up."""
    lr_warmup_iters: int | None = None
    """Steps of linear warm-up (instead of --lr-warmup-fraction)."""
    lr_warmup_samples: int | None = None
    """With --train-samples: sequences of linear warm-up (instead of --lr-warmup-fraction)."""
    lr_warmup_init: float = 0.0
    """Learning rate at which the warm-up starts."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the final decay of WSD."""
    lr_wsd_decay_iters: int | None = None
    """Steps of the final decay of WSD."""
    lr_wsd_decay_samples: int | None = None
    """With --train-samples: sequences of the final decay of WSD."""
    weight_decay: float = 0.01
    """Weight decay; biases and norms have none."""
    adam_beta1: float = 0.9
    """First Adam beta."""
    adam_beta2: float = 0.95
    """Second Adam beta."""
    adam_eps: float = 1e-8
    """Adam epsilon."""
    clip_grad: float = 1.0
    """Largest norm of the gradients; 0 turns clipping off."""


@dataclass
class DataConfig:
    """Data: indexed data sets, blends and the tokenizer."""

    data_path: list[str] | None = None
    """One .bin/.idx prefix, or a blend: WEIGHT PREFIX WEIGHT PREFIX ..."""
    split: str = "969,30,1"
    """Shares of the documents of --data-path for training, validation and test."""
    train_data_path: list[str] | None = None
    """Prefix or blend for training (instead of --data-path)."""
    valid_data_path: list[str] | None = None
    """Prefix or blend for validation; or several sets NAME=PREFIX ..., each with a loss of its own (the
    validation loss is then their mean). Write ./a=b for a prefix that looks like one."""
    test_data_path: list[str] | None = None
    """Prefix or blend for the test at the end."""
    data_cache_path: str | None = None
    """Directory of the index cache; beside the data if unset."""
    num_workers: int = 2
    """Data-loader processes per rank; they do not change the order of the samples."""
    eod_mask_loss: bool = False
    """Don't train on what follows an end-of-document token (Megatron's meaning; the token itself is
    predicted). See --eod-mask-loss-of."""
    eod_mask_loss_of: Literal["next", "eod", "both"] | None = None
    """With --eod-mask-loss: leave out predicting the token after an end-of-document token (next), that token
    itself (eod), or both; next if unset."""
    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer"] | None = None
    """Kind of the tokenizer; from the name of --tokenizer-model if unset."""
    tokenizer_model: str | None = None
    """A tokenizer.json, a directory that holds one, or a SentencePiece .model."""


@dataclass
class CheckpointConfig:
    """Checkpoint: saving and loading."""

    save: str | None = None
    """Directory for checkpoints."""
    load: str | None = None
    """Directory of checkpoints to resume from; may equal --save, then an empty one starts a new run."""
    save_interval: int | None = None
    """Steps between checkpoints (one is always written at the end)."""
    finetune: bool = False
    """Load the weights only: step, optimizer, data position and RNG start anew."""
    load_optim: bool = True
    """Load the optimizer's state."""
    load_rng: bool = True
    """Load the state of the random number generators."""
    override_opt_param_scheduler: bool = False
    """Take learning rate, weight decay and schedule from this run's settings, not from the checkpoint."""
    require_same_data: bool = False
    """Refuse to resume if the training data, their order or the tokenizer differ from the checkpoint's."""
    load_fallback: bool = True
    """Take the newest earlier checkpoint where the newest one is damaged."""
    async_save: bool = False
    """Write checkpoints from a copy in host memory while training goes on."""
    save_timeout_minutes: float = 25.0
    """End the job, with the stack of every rank, when a save keeps training waiting for so long (with
    --watchdog-timeout-minutes 0: never)."""
    keep_last: int | None = None
    """Keep this many of the newest checkpoints (default: all)."""
    keep_every: int | None = None
    """With --keep-last: keep those of steps divisible by this as well."""
    exit_interval: int | None = None
    """Stop, with a checkpoint, after a step divisible by this."""
    exit_duration_in_mins: float | None = None
    """Stop, with a checkpoint, after so many minutes."""
    exit_grace_seconds: float | None = None
    """Time that the scheduler leaves a job after its signal; a save that takes longer gives a warning."""


@dataclass
class ParallelConfig:
    """Parallelism: how the model and the batch are spread over ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every weight matrix."""
    sequence_parallel: bool = False
    """Shard the activations between tensor-parallel regions along the sequence."""
    context_parallel_size: int = 1
    """Ranks that share a sequence in attention; needs Transformer Engine's."""
    pipeline_model_parallel_size: int = 1
    """Ranks of the pipeline; a looped model circulates on them as on a ring."""
    pipeline_model_parallel_layout: str | None = None
    """Layers of prelude/core/coda on each pipeline rank, e.g. 2,2/4,4/3,1; as even as possible if unset."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as one layer of the prelude when layers are spread over pipeline ranks."""
    account_for_loss_in_pipeline_split: bool = False
    """Count output projection and loss as the layers of the coda that have their FLOPs."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    """Model chunks of a pipeline rank, for vanilla (a looped model has its K+2 passes)."""
    microbatch_group_size_per_virtual_stage: int | None = None
    """Micro-batches that pass one chunk before the next chunk's turn; the pipeline size where it fits."""
    overlap_p2p_communication: bool = True
    """Send and receive between pipeline ranks while computing (interleaved schedules)."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over the data-parallel ranks while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather the distributed optimizer's parameters while the next forward pass runs."""
    ddp_bucket_size: int | None = None
    """Parameters of a bucket of the overlapped reduction; Megatron-core's choice if unset."""
    distributed_timeout_minutes: float = 30.0
    """Longest wait of a collective operation."""
    watchdog_timeout_minutes: float = 20.0
    """End the job, with the stack of every rank, when a rank runs no forward pass for this long; 0: never.
    Start-up is exempt; saves use --save-timeout-minutes."""


@dataclass
class LoggingConfig:
    """Logging: console, metrics files and trackers."""

    log_interval: int = 10
    """Steps between lines of the log."""
    output_dir: str | None = None
    """Directory of the resolved config and metrics.jsonl; --save if unset, or else runs/<time>."""
    tensorboard_dir: str | None = None
    """Write TensorBoard events to this directory."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project."""
    wandb_exp_name: str | None = None
    """Name of the Weights & Biases run."""
    log_routers: bool = True
    """For MeSH: log the routers' entropy and mean read and write weights."""
    progress: bool = True
    """Show a live progress bar on a terminal (plain lines elsewhere)."""


@dataclass
class Config:
    """A whole run. ``resolve`` (checks.py) fills what depends on other settings."""

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
