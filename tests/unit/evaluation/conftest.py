"""A model and data that take a second to evaluate."""

from pathlib import Path

import pytest
import torch
import yaml

from tests.unit.evaluation.samples import choices, sentence, write_jsonl


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock GPT-NeoX with random weights and a byte-level tokenizer, saved with ``save_pretrained``."""
    pytest.importorskip("transformers")
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    trained = ByteLevelBPETokenizer()
    corpus = [sentence(seed, 20) for seed in range(50)]
    trained.train_from_iterator(corpus, vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False)
    directory = tmp_path_factory.mktemp("tiny")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(directory)
    config = GPTNeoXConfig(
        vocab_size=352,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=48,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def local_data(tmp_path: Path) -> Path:
    """Task files such as a user writes: PIQA with a training split, ARC easy and LAMBADA without one."""
    directory = tmp_path / "data"
    (directory / "tasks").mkdir(parents=True)
    questions = [{"query": sentence(i, 6), "choices": choices(i), "gold": i % 4} for i in range(24)]
    pairs = [
        {"goal": sentence(i, 4), "sol1": choices(i)[0], "sol2": choices(i)[1], "label": i % 2}
        for i in range(30)
    ]
    write_jsonl(directory / "arc_easy.jsonl.gz", questions)
    write_jsonl(directory / "piqa.jsonl.gz", pairs[:20])
    write_jsonl(directory / "piqa-train.jsonl.gz", pairs[20:])
    write_jsonl(directory / "lambada.jsonl.gz", [{"text": sentence(i, 9)} for i in range(16)])
    accuracy = {"aggregation": "mean", "higher_is_better": True}
    both = [{"metric": name, **accuracy} for name in ("acc", "acc_norm")]
    perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    for task in (
        {
            "task": "arc_easy_local",
            "dataset_kwargs": {"data_files": {"test": "elsewhere/arc_easy.jsonl.gz"}},
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "{{query}}\nAnswer:",
            "doc_to_target": "gold",
            "doc_to_choice": "choices",
            "metric_list": both,
        },
        {
            "task": "piqa",
            "dataset_kwargs": {
                "data_files": {"train": "piqa-train.jsonl.gz", "validation": "piqa.jsonl.gz"},
            },
            "output_type": "multiple_choice",
            "training_split": "train",
            "validation_split": "validation",
            "doc_to_text": "Question: {{goal}}\nAnswer:",
            "doc_to_target": "label",
            "doc_to_choice": "{{[sol1, sol2]}}",
            "metric_list": both,
        },
        {
            "task": "lambada_openai_local",
            "dataset_kwargs": {"data_files": {"test": "lambada.jsonl.gz"}},
            "output_type": "loglikelihood",
            "test_split": "test",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [perplexity, {"metric": "acc", **accuracy}],
        },
    ):
        content = {"dataset_path": "json", **task, "metadata": {"version": 1.0}}
        (directory / "tasks" / f"{task['task']}.yaml").write_text(yaml.safe_dump(content))
    return directory
