import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mesh.config.resolve import resolve
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import flatten, with_values
from megatron_mesh.errors import UserError
from megatron_mesh.recurrence import SCHEMES

GOOD: dict[str, Any] = {
    "recurrence": "mesh",
    "layers": "4+8R2+4",
    "hidden_size": 768,
    "num_attention_heads": 12,
    "seq_length": 512,
    "vocab_size": 50277,
    "micro_batch_size": 4,
    "train_iters": 100,
}


def resolved(world_size: int = 1, **changes: Any) -> dict[str, Any]:
    return flatten(resolve(with_values(Config(), {**GOOD, **changes}), world_size=world_size))


def test_everything_is_filled_in() -> None:
    config = resolved(world_size=4, tensor_model_parallel_size=2, lr_warmup_fraction=0.1)
    expected = {
        "layers": "4+8R2+4",
        "mesh_slots": 5,
        "router_init_std": 0.02,
        "ffn_hidden_size": 3072,
        "global_batch_size": 8,  # micro-batch 4 x data-parallel 2
        "lr_decay_iters": 100,
        "lr_warmup_iters": 10,
        "lr_warmup_fraction": None,
    }
    assert {name: config[name] for name in expected} == expected


def test_given_values_are_kept() -> None:
    given_values = {
        "mesh_slots": 1,
        "router_init_std": 0.0,
        "ffn_hidden_size": 1000,
        "global_batch_size": 32,
        "lr_decay_iters": 50,
        "lr_warmup_iters": 3,
    }
    assert resolved(**given_values).items() >= given_values.items()


@pytest.mark.parametrize(
    ("recurrence", "given_layers", "layers", "slots"),
    [
        ("mesh", "4+8R3+4", "4+8R3+4", 6),
        ("base", "4+8R3+4", "4+8R3+4", None),
        ("vanilla", "4+8R2+4", "24", None),
        ("vanilla", "4+8+8+4", "4+8+8+4", None),
        ("vanilla", "24", "24", None),
        ("vanilla+mesh", "4+8R2+4", "4+8+8+4", 5),
        ("vanilla+mesh", "4+8+8+4", "4+8+8+4", 5),
    ],
)
def test_layers_and_slots(recurrence: str, given_layers: str, layers: str, slots: int | None) -> None:
    config = resolved(recurrence=recurrence, layers=given_layers)
    assert (config["layers"], config["mesh_slots"]) == (layers, slots)


def test_the_log_says_that_a_plain_model_replaces_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="megatron_mesh"):
        once = resolve(with_values(Config(), {**GOOD, "recurrence": "vanilla"}))
        resolve(once)
    assert [record.getMessage() for record in caplog.records] == [
        "--recurrence vanilla: a plain model of 24 layers, the unrolled depth of 4+8R2+4"
    ]


@pytest.mark.parametrize(("recurrence", "layers"), [("mesh", "1+2R3+4"), ("vanilla", "11")])
def test_four_parts_become_one_string(recurrence: str, layers: str) -> None:
    parts = {"prelude_layers": 1, "core_layers": 2, "num_loops": 3, "coda_layers": 4}
    config = resolved(recurrence=recurrence, layers=None, **parts)
    assert config["layers"] == layers
    assert all(config[name] is None for name in parts)


def test_a_run_of_samples_has_a_schedule_of_samples() -> None:
    config = resolved(train_iters=None, train_samples=100, global_batch_size=8, lr_warmup_fraction=0.1)
    names = ("train_iters", "train_samples", "lr_decay_iters", "lr_decay_samples", "lr_warmup_samples")
    assert [config[name] for name in names] == [None, 100, None, 100, 10]


def test_recompute_defaults() -> None:
    full = resolved(recompute_granularity="full")
    assert (full["recompute_method"], full["recompute_num_layers"]) == ("uniform", 1)
    assert resolved(recompute_granularity="selective")["recompute_modules"] == ["core_attn"]
    # A plain model is one section of 24 layers, a looped one three of 4, 8 and 4.
    plain = {"recurrence": "vanilla", "recompute_granularity": "full", "recompute_num_layers": 3}
    assert resolved(**plain)["recompute_num_layers"] == 3


def test_no_validation_batches_turn_validation_off() -> None:
    assert resolved(eval_iters=0)["eval_interval"] == 0


def test_resolve_does_not_change_its_input() -> None:
    config = with_values(Config(), GOOD)
    before = flatten(config)
    resolve(config)
    assert flatten(config) == before


RAMP = {"train_iters": None, "train_samples": 1000, "global_batch_size": 16}

ERRORS: list[tuple[dict[str, Any], list[str]]] = [
    ({"num_attention_heads": 10}, ["--hidden-size 768", "heads 10", "8 or 12"]),
    ({"num_attention_heads": 1000}, ["--num-attention-heads 1000", "use 768 heads"]),
    ({"hidden_size": 0}, ["--hidden-size 0", "at least 1"]),
    ({"num_attention_heads": -1}, ["--num-attention-heads -1", "at least 1"]),
    ({"seq_length": 0}, ["--seq-length 0", "at least 1"]),
    ({"vocab_size": 0}, ["--vocab-size 0", "at least 1"]),
    ({"norm_epsilon": 0.0}, ["--norm-epsilon 0.0", "above 0"]),
    ({"init_method_std": math.nan}, ["--init-method-std nan", "at least 0"]),
    ({"rotary_percent": 0.0}, ["--rotary-percent 0.0", "above 0 and at most 1"]),
    ({"rotary_percent": 0.05}, ["rotates 3 of a head's 64", "rotates 4"]),
    ({"num_attention_heads": 768}, ["rotates 0 of a head's 1", "lower --num-attention-heads"]),
    ({"recurrence": "mehs"}, ["mehs does not exist", "did you mean mesh?", "vanilla, base"]),
    ({"recurrence": "anchor*"}, ["did you mean anchor-emb?"]),
    ({"recurrence": "xyz"}, ["xyz does not exist; the schemes are: vanilla"]),
    ({"layers": "4+8R0+4"}, ["runs 0 times", "--num-loops"]),
    ({"layers": "rubbish"}, ["'rubbish' is not a layer layout"]),
    ({"layers": None}, ["the layers are missing", "--layers"]),
    ({"layers": None, "num_loops": 2, "core_layers": 2}, ["--prelude-layers, --coda-layers missing"]),
    ({"num_loops": 2}, ["--layers and --num-loops are both given"]),
    ({"layers": "4+8+8+4"}, ["--recurrence mesh", "write --layers 4+8R2+4", "vanilla+mesh"]),
    ({"layers": "24"}, ["--layers 24 is a plain depth", "--recurrence vanilla"]),
    ({"layers": "24", "recurrence": "vanilla+mesh"}, ["plain depth", "4+8+8+4"]),
    ({"mesh_slots": 0}, ["--mesh-slots 0", "at least 1"]),
    ({"recurrence": "base", "mesh_slots": 5}, ["--mesh-slots is a setting of MeSH", "--recurrence base"]),
    ({"recurrence": "base", "mesh_memory": "slots"}, ["--mesh-memory is a setting of MeSH"]),
    ({"recurrence": "vanilla", "mesh_transition_query": "embedding"}, ["--mesh-transition-query"]),
    ({"recurrence": "vanilla", "router_init_std": 0.1}, ["--router-init-std is a setting of MeSH"]),
    ({"recurrence": "static", "router_bias_init": 1.5}, ["--router-bias-init is a setting of MeSH"]),
    ({"vocab_size": None}, ["vocabulary size is not known", "--tokenizer-model"]),
    ({"micro_batch_size": 0}, ["--micro-batch-size 0", "at least 1"]),
    ({"global_batch_size": 10}, ["--global-batch-size 10", "= 4", "8 or 12"]),
    ({"global_batch_size": 3}, ["--global-batch-size 3", "use 4, the nearest"]),
    ({"seed": -1}, ["--seed -1", "at least 0"]),
    ({"seed": 2**32}, ["--seed 4294967296", "below 2^32"]),
    ({"train_iters": None}, ["--train-iters or --train-samples"]),
    ({"train_samples": 100}, ["--train-iters and --train-samples"]),
    ({"train_iters": None, "train_samples": 3}, ["--train-samples 3", "one global batch of 4"]),
    ({"recompute_method": "uniform"}, ["--recompute-method needs --recompute-granularity full"]),
    ({"recompute_modules": ["mlp"]}, ["--recompute-modules needs --recompute-granularity selective"]),
    (
        {"recompute_granularity": "selective", "recompute_num_layers": 1},
        ["--recompute-num-layers needs --recompute-granularity full"],
    ),
    (
        {"recompute_granularity": "full", "recompute_num_layers": 3},
        ["--recompute-num-layers 3", "every section of --layers 4+8R2+4"],
    ),
    ({"lr": 0.0}, ["--lr 0.0", "above 0"]),
    ({"lr": math.inf}, ["--lr inf", "above 0"]),
    ({"lr": 1e-4, "min_lr": 1e-3}, ["--min-lr 0.001 is above the peak, --lr 0.0001"]),
    ({"lr_warmup_init": 1.0}, ["--lr-warmup-init 1 is above the peak"]),
    ({"lr_warmup_fraction": 1.5}, ["--lr-warmup-fraction 1.5", "between 0 and 1"]),
    ({"lr_warmup_fraction": 1.0}, ["warm-up takes 100 steps", "has 100"]),
    ({"lr_warmup_iters": 200}, ["warm-up takes 200 steps", "has 100"]),
    ({"lr_warmup_fraction": 0.1, "lr_warmup_iters": 1}, ["--lr-warmup-fraction and --lr-warmup-iters"]),
    ({"lr_decay_style": "WSD"}, ["WSD needs --lr-wsd-decay-iters"]),
    ({"lr_wsd_decay_iters": 5}, ["--lr-wsd-decay-iters needs --lr-decay-style WSD"]),
    (
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 95, "lr_warmup_iters": 10},
        ["warm-up (10 steps)", "(95)", "(100)"],
    ),
    ({"clip_grad": -1.0}, ["--clip-grad -1.0", "at least 0"]),
    ({"adam_beta2": 1.0}, ["--adam-beta2 1.0", "below 1"]),
    ({"weight_decay": -0.1}, ["--weight-decay -0.1", "at least 0"]),
    ({"data_path": ["a"], "train_data_path": ["b"]}, ["--data-path", "--train-data-path are both given"]),
    ({"data_path": ["a"], "valid_data_path": ["b"]}, ["--data-path", "--valid-data-path are both given"]),
    ({"test_data_path": ["b"]}, ["--test-data-path is given without --train-data-path"]),
    ({"data_path": []}, ["--data-path is empty"]),
    ({"eod_mask_loss": True}, ["--eod-mask-loss needs the tokenizer"]),
    ({"eod_mask_loss_of": "eod"}, ["--eod-mask-loss-of eod is given without --eod-mask-loss"]),
    ({"num_workers": -1}, ["--num-workers -1", "at least 0"]),
    ({"train_iters": None, "train_samples": 3}, ["--train-samples 3", "one global batch of 4"]),
    ({"train_samples": 30}, ["--train-iters and --train-samples", "keep one"]),
    ({"rampup_batch_size": [4, 4, 100]}, ["--rampup-batch-size 4 4 100", "needs --train-samples"]),
    (RAMP | {"rampup_batch_size": [4, 100]}, ["--rampup-batch-size 4 100", "START INCREMENT SAMPLES"]),
    (RAMP | {"rampup_batch_size": [4, 5, 100]}, ["4 5 100", "16 - 4 = 12 is not a positive multiple of 5"]),
    (RAMP | {"rampup_batch_size": [16, 4, 100]}, ["16 - 16 = 0 is not a positive multiple"]),
    (
        RAMP | {"rampup_batch_size": [2, 2, 100]},
        ["--rampup-batch-size has a batch of 2", "use 4, the nearest"],
    ),
    (RAMP | {"lr_decay_iters": 5}, ["--lr-decay-iters counts steps", "use --lr-decay-samples"]),
    ({"lr_warmup_samples": 5}, ["--lr-warmup-samples counts samples", "use --lr-warmup-iters"]),
    ({"save_interval": 0, "save": "d"}, ["--save-interval 0", "at least 1"]),
    ({"finetune": True}, ["--finetune", "--load"]),
    ({"log_interval": 0}, ["--log-interval 0", "at least 1"]),
    ({"tensor_model_parallel_size": 0}, ["--tensor-model-parallel-size 0", "at least 1"]),
    ({"tensor_model_parallel_size": 2}, ["--tensor-model-parallel-size 2", "number of processes, 1"]),
    ({"sequence_parallel": True}, ["--sequence-parallel", "only one"]),
    ({"distributed_timeout_minutes": 0.0}, ["--distributed-timeout-minutes 0.0", "above 0"]),
]


@pytest.mark.parametrize(("changes", "named"), ERRORS, ids=lambda value: str(value)[:60])
def test_errors_name_cause_and_remedy(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UserError) as error:
        resolved(**changes)
    for part in named:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("size", "changes", "named"),
    [
        (5, {}, ["--num-attention-heads, 12"]),
        (3, {"vocab_size": 128}, ["padded vocabulary", "128"]),
        (2, {"ffn_hidden_size": 1001}, ["--ffn-hidden-size, 1001"]),
        (2, {"seq_length": 511, "sequence_parallel": True}, ["--seq-length", "511"]),
    ],
)
def test_tensor_parallelism_divides_the_model(size: int, changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UserError) as error:
        resolved(world_size=size, tensor_model_parallel_size=size, **changes)
    for part in named:
        assert part in str(error.value)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Draw settings that fit each other and leave many others to ``resolve``."""
    scheme = draw(st.sampled_from(list(SCHEMES)))
    layers = ["4+8R2+4", "1+2R3+0"] if SCHEMES[scheme].shared_core else ["4+8R2+4", "1+2+2+2+0"]
    memory = {"mesh_slots": st.none() | st.integers(1, 7), "router_init_std": st.none() | st.floats(0, 1)}
    choices = {
        **(memory if SCHEMES[scheme].uses_memory else {}),
        "layers": st.sampled_from(layers),
        "ffn_hidden_size": st.none() | st.integers(1, 2048).map(lambda n: 2 * n),
        "global_batch_size": st.none() | st.integers(1, 5).map(lambda n: 8 * n),
        "lr_warmup_fraction": st.none() | st.floats(0, 0.9),
        "recompute_granularity": st.sampled_from([None, "selective", "full"]),
        "eval_iters": st.integers(0, 2),
        "tensor_model_parallel_size": st.sampled_from([1, 2]),
        "train_iters": st.none() | st.integers(1, 1000),
    }
    drawn = {name: draw(strategy) for name, strategy in choices.items()}
    unit = "samples" if drawn["train_iters"] is None else "iters"
    drawn[f"lr_decay_{unit}"] = draw(st.none() | st.integers(20, 200))
    samples = draw(st.integers(50, 1000)) if unit == "samples" else None
    return {**drawn, "recurrence": scheme, "train_samples": samples}


@settings(max_examples=150)
@given(configs())
def test_resolving_twice_changes_nothing(changes: dict[str, Any]) -> None:
    once = resolve(with_values(Config(), {**GOOD, **changes}), world_size=2)
    assert resolve(once, world_size=2) == once
