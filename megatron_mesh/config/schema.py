"""Every setting of a run, typed and grouped. Names are Megatron-LM's wherever it has the same setting.

The field ``seq_length`` is the flag ``--seq-length`` and the YAML key ``seq_length``. The string below a
field is its help text. A setting whose default follows from others is None here, and its help text names the
default as ``(default: ...)``. Values aren't checked here but in ``checks.py``, which sees all settings
together.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ModelConfig:
    """Model: the GPT-NeoX backbone of Pythia, and the recurrence around its core."""

    recurrence: str = "mesh"
    """Recurrence scheme: how the core's output becomes the input of the next loop."""
    layers: str | None = None
    """Layers as prelude+coreRloops+coda, e.g. 4+8R2+4, or 4+8+8+4 if cores don't share weights. vanilla takes
    any of these and runs the plain model of the same depth, here 24."""
    prelude_layers: int | None = None
    """Layers before the loop (instead of --layers)."""
    core_layers: int | None = None
    """Layers of the core, the block that runs --num-loops times (instead of --layers)."""
    num_loops: int | None = None
    """Number of loops K: how often the core runs (instead of --layers)."""
    coda_layers: int | None = None
    """Layers after the loop (instead of --layers)."""
    mesh_slots: int | None = None
    """Slots N of the MeSH memory (default: K + 3)."""
    mesh_transition_query: Literal["prelude-output", "embedding"] = "prelude-output"
    """Input of the routers in the first cycle, between prelude and loop."""
    mesh_memory: Literal["factored", "slots"] = "factored"
    """Computation of the MeSH memory: factored (saves K + 2 states for backward), or slots (saves every slot
    of every cycle; a slow reference)."""
    router_init_std: float | None = None
    """Standard deviation of the initial router weights (default: --init-method-std)."""
    router_bias_init: float = 0.0
    """Initial bias of each cycle's own slot in its write and read router. Above 0, training starts close to
    base."""
    hidden_size: int = 768
    """Hidden size H."""
    num_attention_heads: int = 12
    """Attention heads; must divide --hidden-size."""
    ffn_hidden_size: int | None = None
    """Hidden size of the MLP (default: 4 x --hidden-size)."""
    seq_length: int = 2048
    """Sequence length S in tokens."""
    vocab_size: int | None = None
    """Vocabulary size before padding (default: the tokenizer's)."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this. --tensor-model-parallel-size must divide the padded size."""
    untie_embeddings_and_output_weights: bool = True
    """Use separate weights for the embedding and the output projection."""
    rotary_percent: float = 0.25
    """Fraction of each head's dimensions that get rotary position embeddings."""
    rotary_base: int = 10000
    """Base period of the rotary position embeddings."""
    norm_epsilon: float = 1e-5
    """Epsilon of LayerNorm."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights."""
    depth_scaled_init: bool = True
    """Divide the initial standard deviation of attention and MLP output projections by sqrt(2 x unrolled
    depth)."""
    scale_embeddings: bool = True
    """Multiply token embeddings by sqrt(hidden size)."""


@dataclass
class TrainingConfig:
    """Training: batch size, length, precision and recomputation."""

    micro_batch_size: int = 1
    """Sequences per forward pass of a data-parallel rank."""
    global_batch_size: int | None = None
    """Sequences per optimizer step over all ranks (default: --micro-batch-size x data-parallel size)."""
    train_iters: int | None = None
    """Optimizer steps to train for."""
    train_samples: int | None = None
    """Sequences to train on (instead of --train-iters). The learning-rate schedule then counts sequences
    too."""
    rampup_batch_size: list[int] | None = None
    """START INCREMENT SAMPLES: start with a global batch of START and grow it by INCREMENT up to
    --global-batch-size, in equal shares of the first SAMPLES sequences. Needs --train-samples."""
    seed: int = 1234
    """Random seed for the initial weights and the data order."""
    bf16: bool = False
    """Train in bfloat16, with main parameters and gradients in float32."""
    recompute_granularity: Literal["selective", "full"] | None = None
    """Recompute activations in the backward pass: attention (selective) or whole layers (full)."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full recomputation: recompute all layers in groups (uniform), or the first layers of each section
    (block) (default: uniform)."""
    recompute_num_layers: int | None = None
    """Layers per recomputed group (uniform), or recomputed layers per section (block) (default: 1)."""
    recompute_modules: list[Literal["core_attn", "mlp"]] | None = None
    """With selective recomputation: modules to recompute (default: core_attn)."""
    max_skipped_steps: int = 10
    """Stop after this many consecutive steps that were skipped because the loss or gradients weren't
    finite."""
    deterministic_mode: bool = False
    """Use only deterministic operations, also on GPUs."""
    eval_interval: int = 1000
    """Steps between validations; 0 disables validation."""
    eval_iters: int = 100
    """Global batches per validation; 0 disables validation."""


@dataclass
class PrecisionConfig:
    """Precision: Transformer Engine, FP8 and fused gradient accumulation."""

    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation: transformer_engine, local (torch), or auto (Transformer Engine if it is installed
    and a GPU is present)."""
    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = "auto"
    """Attention backend of Transformer Engine's layers: flash (flash-attention), fused (cuDNN), unfused,
    local (torch), or auto (the fastest). Local layers always use torch's."""
    gradient_accumulation_fusion: bool = False
    """Fuse the accumulation of float32 weight gradients into the matrix products. Needs Transformer Engine or
    apex."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Compute in FP8: e4m3 everywhere, or e5m2 for gradients (hybrid). Needs Transformer Engine and
    --bf16."""
    fp8_recipe: Literal["tensorwise", "blockwise", "delayed"] = "tensorwise"
    """FP8 scaling: per tensor from current values, per block, or delayed (from an amax history)."""
    fp8_scope: Literal["core", "all"] = "core"
    """Layers in FP8: the core's, or all. A plain model counts as core."""
    fp8_param_gather: bool = False
    """Store and all-gather the weights of FP8 layers in FP8. Needs --use-distributed-optimizer."""
    first_last_layers_bf16: bool = False
    """Keep the first and last layers in bfloat16."""
    num_layers_at_start_in_bf16: int | None = None
    """With --first-last-layers-bf16: bfloat16 layers at the start of the network (default: 1)."""
    num_layers_at_end_in_bf16: int | None = None
    """With --first-last-layers-bf16: bfloat16 layers at the end of the network (default: 1)."""
    fp8_amax_history_len: int | None = None
    """With --fp8-recipe delayed: micro-batches in the amax history (default: 1024)."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] | None = None
    """With --fp8-recipe delayed: scale by the most recent amax, or the largest in the history (default:
    max)."""


@dataclass
class OptimizerConfig:
    """Optimizer: AdamW and its learning-rate schedule."""

    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = "cosine"
    """Shape of the learning-rate decay."""
    lr_decay_iters: int | None = None
    """Steps over which the learning rate decays (default: --train-iters)."""
    lr_decay_samples: int | None = None
    """With --train-samples: sequences over which the learning rate decays (default: --train-samples)."""
    lr_warmup_fraction: float | None = None
    """Fraction of the decay steps or sequences used for linear warm-up."""
    lr_warmup_iters: int | None = None
    """Steps of linear warm-up (instead of --lr-warmup-fraction)."""
    lr_warmup_samples: int | None = None
    """With --train-samples: sequences of linear warm-up (instead of --lr-warmup-fraction)."""
    lr_warmup_init: float = 0.0
    """Learning rate at the start of the warm-up."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the final decay of WSD."""
    lr_wsd_decay_iters: int | None = None
    """Steps of the final decay of WSD."""
    lr_wsd_decay_samples: int | None = None
    """With --train-samples: sequences of the final decay of WSD."""
    weight_decay: float = 0.01
    """Weight decay. Biases and norms have none."""
    adam_beta1: float = 0.9
    """Adam beta1."""
    adam_beta2: float = 0.95
    """Adam beta2."""
    adam_eps: float = 1e-8
    """Adam epsilon."""
    clip_grad: float = 1.0
    """Clip the global gradient norm to this; 0 disables clipping."""


@dataclass
class DataConfig:
    """Data: indexed data sets, blends and the tokenizer."""

    data_path: list[str] | None = None
    """Data set as a .bin/.idx prefix, or a blend: WEIGHT PREFIX WEIGHT PREFIX ..."""
    split: str = "969,30,1"
    """Split of the documents of --data-path into training, validation and test, as weights."""
    train_data_path: list[str] | None = None
    """Prefix or blend for training (instead of --data-path)."""
    valid_data_path: list[str] | None = None
    """Prefix or blend for validation, or several named sets: NAME=PREFIX ... Each set then has its own loss,
    and the validation loss is their mean. Write ./a=b for a prefix that contains an equals sign."""
    test_data_path: list[str] | None = None
    """Prefix or blend for the test after training."""
    data_cache_path: str | None = None
    """Directory of the index cache (default: next to the data)."""
    num_workers: int = 2
    """Data-loader processes per rank. They don't affect the order of the samples."""
    eod_mask_loss: bool = False
    """Exclude from the loss the predictions after end-of-document tokens, as in Megatron-LM. The
    end-of-document tokens themselves are still predicted; see --eod-mask-loss-of."""
    eod_mask_loss_of: Literal["next", "eod", "both"] | None = None
    """With --eod-mask-loss: exclude the prediction of the token after the end-of-document token (next), of
    that token itself (eod), or both (default: next)."""
    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer"] | None = None
    """Type of the tokenizer (default: from the name of --tokenizer-model)."""
    tokenizer_model: str | None = None
    """Tokenizer: a tokenizer.json, a directory that contains one, or a SentencePiece .model."""


@dataclass
class CheckpointConfig:
    """Checkpoint: saving, loading and exiting."""

    save: str | None = None
    """Directory to save checkpoints to."""
    load: str | None = None
    """Directory to load a checkpoint from. It may be the same as --save; if it has no checkpoints yet, a new
    run starts."""
    save_interval: int | None = None
    """Steps between checkpoints. The last step is always saved."""
    finetune: bool = False
    """Load only the weights. The step, optimizer, data position and random states start anew."""
    load_optim: bool = True
    """Load the optimizer state."""
    load_rng: bool = True
    """Load the state of the random number generators."""
    override_opt_param_scheduler: bool = False
    """Use learning rate, weight decay and schedule of this run's settings, not of the checkpoint."""
    require_same_data: bool = False
    """Refuse to resume if the training data, their order or the tokenizer differ from the checkpoint's."""
    load_fallback: bool = True
    """If the newest checkpoint is damaged, load the newest intact one."""
    async_save: bool = False
    """Write checkpoints in the background, from a copy in host memory, while training continues."""
    save_timeout_minutes: float = 25.0
    """End the job, with the stack of every rank, if a save blocks training for this long.
    --watchdog-timeout-minutes 0 disables it."""
    keep_last: int | None = None
    """Keep this many of the newest checkpoints (default: all)."""
    keep_every: int | None = None
    """With --keep-last: also keep checkpoints whose step is a multiple of this."""
    exit_interval: int | None = None
    """Save a checkpoint and exit after a step that is a multiple of this."""
    exit_duration_in_mins: float | None = None
    """Save a checkpoint and exit after this many minutes."""
    exit_grace_seconds: float | None = None
    """Seconds that the scheduler gives a job between its signal and the kill. Saves that take longer cause a
    warning."""


@dataclass
class ParallelConfig:
    """Parallelism: how the model and the batch are distributed over ranks."""

    tensor_model_parallel_size: int = 1
    """Degree of tensor parallelism."""
    sequence_parallel: bool = False
    """Shard activations outside the tensor-parallel regions along the sequence."""
    context_parallel_size: int = 1
    """Degree of context parallelism: ranks that share each sequence. Needs Transformer Engine's attention."""
    pipeline_model_parallel_size: int = 1
    """Degree of pipeline parallelism. Activations of a looped model circulate through these ranks as on a
    ring."""
    pipeline_model_parallel_layout: str | None = None
    """Layers of prelude/core/coda on each pipeline rank, e.g. 2,2/4,4/3,1 (default: as even as possible)."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as a layer of the prelude when distributing layers over pipeline ranks."""
    account_for_loss_in_pipeline_split: bool = False
    """Count the output projection and the loss as coda layers of equal FLOPs when distributing layers over
    pipeline ranks."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    """For vanilla: model chunks per pipeline rank. A looped model always has K + 2, its passes."""
    microbatch_group_size_per_virtual_stage: int | None = None
    """Consecutive micro-batches that run through a model chunk before the next chunk runs (default: the
    pipeline size, or the next size that fits)."""
    overlap_p2p_communication: bool = True
    """Overlap sends and receives between pipeline ranks with computation (interleaved schedules)."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlap the data-parallel reduction of gradients with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the distributed optimizer's all-gather of parameters with the next forward pass."""
    ddp_bucket_size: int | None = None
    """Parameters per bucket of the overlapped gradient reduction (default: Megatron-core's choice)."""
    distributed_timeout_minutes: float = 30.0
    """Timeout of collective operations in minutes."""
    watchdog_timeout_minutes: float = 20.0
    """End the job, with the stack of every rank, if a rank runs no forward pass for this long; 0 disables it.
    Start-up is exempt, and saves have --save-timeout-minutes."""


@dataclass
class LoggingConfig:
    """Logging: console, metrics files and trackers."""

    log_interval: int = 10
    """Steps between log lines."""
    output_dir: str | None = None
    """Directory of config.yaml and metrics.jsonl (default: --save, or else runs/<scheme>-<time>)."""
    tensorboard_dir: str | None = None
    """Write TensorBoard events to this directory."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project."""
    wandb_exp_name: str | None = None
    """Name of the Weights & Biases run."""
    log_routers: bool = True
    """For MeSH: log the routers' entropy and their mean write and read weights."""
    progress: bool = True
    """Show a live progress bar if the output is a terminal, instead of log lines."""


@dataclass
class Config:
    """All settings of a run. ``checks.resolve`` fills in those that follow from others."""

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
