"""Lists the fields of a config.json that cannot change logits, and formats values for error messages."""

from typing import Any

from megatron_mesh.runtime import strict_json

_MAX_LENGTH = 60

HARMLESS = frozenset(
    {
        # Descriptions of the model and of the file.
        "architectures",
        "model_type",
        "transformers_version",
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "license",
        "dtype",
        "torch_dtype",
        "use_bfloat16",
        "custom_pipelines",
        "transformers.js_config",
        "transformers_tested",
        # Tokens.
        "tokenizer_class",
        "prefix",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "unk_token_id",
        "mask_token_id",
        # Heads of other tasks, and training by other libraries.
        "finetuning_task",
        "task_specific_params",
        "problem_type",
        "id2label",
        "label2id",
        "num_labels",
        "tf_legacy_loss",
        "gradient_checkpointing",
        # Outputs of forward(), and its kernels.
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "tie_last_hidden_states",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "experts_implementation",
        # GPT-NeoX reads these in no supported version.
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        # Defaults of generate().
        "max_length",
        "min_length",
        "max_new_tokens",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
    }
)
"""Fields that don't change the logits of a GPT-NeoX, whatever their values."""


def short_json(value: Any) -> str:
    """Return a value as JSON, truncated for an error message."""
    text = strict_json.dumps(value)
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."
