"""Data sets: the order of samples, blends, splits, the index cache, errors."""

import multiprocessing
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mesh.config.schema import DataConfig
from megatron_mesh.data import build_datasets, build_tokenizer
from megatron_mesh.data.datasets import Datasets
from megatron_mesh.data.indexed import IndexedWriter
from megatron_mesh.data.sources import parse_blend, parse_sets, parse_split
from megatron_mesh.data.stream import SampleStream, epoch_order
from megatron_mesh.errors import UserError
from tests.unit.data.corpora import NumberTokenizer


def build(
    *words: str, train: int = 100, valid: int = 4, seed: int = 1, length: int = 16, **settings: Any
) -> Datasets:
    config = DataConfig(data_path=list(words) or None, **{"split": "1,0,0", **settings})
    return build_datasets(
        config,
        NumberTokenizer(),  # type: ignore[arg-type]
        seq_length=length,
        seed=seed,
        train_samples=train,
        eval_samples=valid,
    )


def first_tokens(stream: SampleStream) -> list[int]:
    return [int(stream[i]["tokens"][0]) for i in range(len(stream))]


def test_a_sample_is_consecutive_text(make_data) -> None:
    sample = build(make_data("a", documents=1, length=500)).train[3]
    first = int(sample["tokens"][0])
    assert sample["tokens"].tolist() == list(range(first, first + 16))
    assert sample["labels"].tolist() == list(range(first + 1, first + 17))
    assert sample["position_ids"].tolist() == list(range(16))
    assert sample["loss_mask"].tolist() == [1.0] * 16
    assert set(sample) == {"tokens", "labels", "position_ids", "loss_mask"}


def test_a_longer_run_begins_like_a_shorter_one(make_data) -> None:
    a, b = make_data("a"), make_data("b", documents=25, first=5000)
    for words in ([a], ["0.7", a, "0.3", b]):
        assert first_tokens(build(*words, train=700).train)[:90] == first_tokens(
            build(*words, train=90).train
        )


def test_the_seed_orders_the_samples(make_data) -> None:
    prefix = make_data("a")
    assert first_tokens(build(prefix).train) != first_tokens(build(prefix, seed=2).train)


def test_every_epoch_has_every_sample_in_its_own_order(make_data) -> None:
    stream = build(make_data("a"), train=4 * 124).train
    assert len(stream.parts[0].dataset) == 124  # (40 * 50 - 1) // 16
    tokens = np.array(first_tokens(stream)).reshape(4, 124)
    assert all(sorted(epoch) == sorted(tokens[0]) for epoch in tokens)
    assert len({tuple(epoch) for epoch in tokens}) == 4


def test_the_seed_orders_every_epoch() -> None:
    """The first epoch is in Megatron's order, which has a seed of its own."""
    orders = {epoch_order(seed, epoch, 1000) for seed in range(10) for epoch in range(1, 10)}
    assert len(orders) == 90


@pytest.mark.parametrize("samples", [1, 2, 6, 97, 1000])
def test_epoch_order_is_a_permutation(samples: int) -> None:
    for epoch in range(5):
        stride, shift = epoch_order(7, epoch, samples)
        assert sorted((i * stride + shift) % samples for i in range(samples)) == list(range(samples))


def test_blend_keeps_its_proportions_everywhere(make_data) -> None:
    a, b = make_data("a"), make_data("b", first=5000)
    stream = build("3", a, "1", b, train=1000).train
    from_a = np.array([token < 5000 for token in first_tokens(stream)])
    share = np.cumsum(from_a) / np.arange(1, 1001)
    assert abs(share[50:] - 0.75).max() < 0.02
    assert Counter(stream.origin(i).prefix for i in range(1000)) == {a: from_a.sum(), b: 1000 - from_a.sum()}


def test_reading_order_and_repetition_change_nothing(make_data) -> None:
    """Megatron caches the first sample's loss mask and modifies it in place, which must not show."""
    one, other = (build(make_data("a"), eod_mask_loss=False).train for _ in range(2))
    backward = [other[i] for i in reversed(range(50))][::-1]
    for i in range(50):
        assert all((one[i][name] == backward[i][name]).all() for name in one[i])


EOD_MASKS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "all predictions count": ({}, [1, 1, 1, 1, 1, 1, 1, 1]),
    "without the prediction after it": ({"eod_mask_loss": True}, [1, 1, 1, 0, 1, 1, 1, 0]),
    "the same, given explicitly": (
        {"eod_mask_loss": True, "eod_mask_loss_of": "next"},
        [1, 1, 1, 0, 1, 1, 1, 0],
    ),
    "without the prediction of it": (
        {"eod_mask_loss": True, "eod_mask_loss_of": "eod"},
        [1, 1, 0, 1, 1, 1, 0, 1],
    ),
    "without both": ({"eod_mask_loss": True, "eod_mask_loss_of": "both"}, [1, 1, 0, 0, 1, 1, 0, 0]),
}


@pytest.mark.parametrize("case", EOD_MASKS)
def test_the_loss_can_leave_out_predictions_at_an_end_of_document(tmp_path: Path, case: str) -> None:
    """The data are 5 6 7 0, 5 6 7 0 ...; token 0 ends a document."""
    with IndexedWriter(str(tmp_path / "eod"), np.uint16) as writer:
        writer.add(np.tile([5, 6, 7, 0], 50), np.full(50, 4))
        writer.commit()
    settings, mask = EOD_MASKS[case]
    stream = build(str(tmp_path / "eod"), length=8, **settings).train
    for i in (2, 3, 2):  # twice, since GPTDataset keeps the mask of its first sample
        sample = stream[i]
        assert sample["tokens"].tolist() == [5, 6, 7, 0, 5, 6, 7, 0]
        assert sample["labels"].tolist() == [6, 7, 0, 5, 6, 7, 0, 5]
        assert sample["loss_mask"].tolist() == mask and sample["loss_mask"].dtype == torch.float32


def test_splits_share_no_document(make_data) -> None:
    datasets = build(make_data("a"), split="80,10,10", train=99, valid=10)
    seen = []
    for stream in datasets.named().values():
        tokens = {int(token) for i in range(len(stream)) for token in stream[i]["tokens"]}
        seen.append({(token - 1) // 50 for token in tokens})
    assert [max(documents) for documents in seen] == [31, 35, 39]
    assert seen[0].isdisjoint(seen[1]) and seen[1].isdisjoint(seen[2])


def test_separate_paths(make_data) -> None:
    a, b = make_data("a"), make_data("b", first=5000)
    datasets = build(train_data_path=[a], valid_data_path=[b], train=9, valid=5)
    assert datasets.valid is not None and datasets.test is None
    assert len(datasets.valid) == 5
    assert min(first_tokens(datasets.valid)) >= 5000 > max(first_tokens(datasets.train))


def test_several_validation_sets(make_data) -> None:
    a, b, c = make_data("a"), make_data("b", first=5000), make_data("c", first=9000)
    both = {"train_data_path": [a], "train": 9, "valid": 5}
    datasets = build(valid_data_path=[f"books={b}", f"web-2.code_x={c}"], **both)
    assert datasets.valid is None and list(datasets.valid_sets) == ["books", "web-2.code_x"]
    assert list(datasets.named()) == ["train", "valid/books", "valid/web-2.code_x"]
    alone = build(valid_data_path=[b], **both)
    assert alone.valid is not None and alone.validation == {"": alone.valid} and not alone.valid_sets
    assert first_tokens(datasets.validation["books"]) == first_tokens(alone.valid)
    assert min(first_tokens(datasets.validation["web-2.code_x"])) >= 9000
    assert not build(valid_data_path=[f"books={b}"], train_data_path=[a], valid=0).validation


def test_a_path_that_looks_like_a_named_set(make_data, monkeypatch) -> None:
    prefix = Path(make_data("text"))
    (prefix.parent / "lang=en").mkdir()
    for ending in (".bin", ".idx"):
        shutil.copy(f"{prefix}{ending}", prefix.parent / f"lang=en/text{ending}")
    monkeypatch.chdir(prefix.parent)
    assert parse_sets(["lang=en/text"], "--valid-data-path") == {"": ["lang=en/text"]}


def test_names_of_validation_sets() -> None:
    assert parse_sets(["a=p", "b=q=r"], "--valid-data-path") == {"a": ["p"], "b": ["q=r"]}
    for words in (["p"], ["data/lang=en/text"], ["0.3", "lang=en/text", "0.7", "q"]):
        assert parse_sets(words, "--valid-data-path") == {"": words}
    cases = [
        (["a=p", "a=q"], "--valid-data-path has two sets named a"),
        (["a=p", "q"], "--valid-data-path mixes NAME=PREFIX"),
        (["0.3", "a=p", "b=q"], "--valid-data-path mixes NAME=PREFIX"),
        (["loss=p"], "cannot be named loss"),
    ]
    for words, message in cases:
        with pytest.raises(UserError, match=message):
            parse_sets(words, "--valid-data-path")


@pytest.mark.parametrize("flag", ["train_data_path", "valid_data_path", "test_data_path"])
def test_a_missing_file_is_named_with_its_own_flag(make_data, flag: str) -> None:
    paths = {"train_data_path": [make_data("a")], flag: [make_data("b") + ".bin"]}
    with pytest.raises(
        UserError, match=f"--{flag.replace('_', '-')} takes the prefix .* without .bin or .idx"
    ):
        build(**paths)


def test_without_evaluation_no_data_is_needed_for_it(make_data) -> None:
    assert build(make_data("a"), split="999,1,0", valid=0).valid is None


def test_cache_is_used_and_follows_the_content(make_data, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    prefix = make_data("a")
    before = first_tokens(build(prefix, data_cache_path=str(cache)).train)
    files = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert files
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(prefix + suffix, moved)
    assert first_tokens(build(str(moved / "a"), data_cache_path=str(cache), train=900).train)[:100] == before
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == files
    make_data("a", documents=30)
    build(prefix, data_cache_path=str(cache))
    assert len(list(cache.iterdir())) == 2 * len(files)


@pytest.mark.parametrize("name", ["document_index", "sample_index", "shuffle_index", "manifest"])
def test_a_truncated_index_file_is_rebuilt(make_data, tmp_path: Path, name: str) -> None:
    """Each file of the index in turn is cut in half, as if the first build had been killed."""
    prefix, cache = make_data("a"), tmp_path / "cache"
    before = first_tokens(build(prefix, data_cache_path=str(cache)).train)
    (path,) = cache.glob(f"*/{name}.*")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert first_tokens(build(prefix, data_cache_path=str(cache)).train) == before
    assert path.read_bytes() == whole


def test_a_reordered_corpus_gets_a_new_index(tmp_path: Path) -> None:
    """The first documents, the number of documents and all sizes stay the same."""
    random = np.random.default_rng(0)
    documents = [np.full(length, i + 1) for i, length in enumerate(random.integers(1, 60, 3000))]

    def write(order: np.ndarray) -> None:
        lengths = [len(documents[i]) for i in order]
        with IndexedWriter(str(tmp_path / "text"), np.uint16) as writer:
            writer.add(np.concatenate([documents[i] for i in order]), np.array(lengths))
            writer.commit()

    def read(cache: str) -> list[list[int]]:
        stream = build(str(tmp_path / "text"), data_cache_path=str(tmp_path / cache), train=300).train
        return [stream[i]["tokens"].tolist() for i in range(300)]

    write(np.arange(3000))
    old = read("cache")
    write(np.concatenate([np.arange(1500), 1500 + random.permutation(1500)]))
    assert read("cache") == read("a new cache") != old


def _run_when_all_are_ready(run_tool, command: list[str], barrier) -> None:
    barrier.wait(60)
    os._exit(run_tool("build_data_index", *command))


def test_four_builds_of_one_index_at_once(make_data, tmp_path: Path, run_tool) -> None:
    """All succeed, and together they leave the same files, byte for byte, as a single build."""
    make_data("a", documents=400, length=90)
    blend = [
        "--data-path",
        "0.7",
        str(tmp_path / "a"),
        "0.3",
        make_data("b", documents=99),
        "--split",
        "8,1,1",
    ]
    common = [*blend, "--seq-length", "16", "--vocab-size", "60000", "--data-cache-path"]
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    jobs = [
        context.Process(
            target=_run_when_all_are_ready, args=(run_tool, [*common, str(tmp_path / "four")], barrier)
        )
        for _ in range(4)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [0] * 4
    assert run_tool("build_data_index", *common, str(tmp_path / "one")) == 0
    four, one = (
        {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*.*"))}
        for root in (tmp_path / "four", tmp_path / "one")
    )
    assert four == one and len(one) == 6 * 4 + 3  # two sources in three splits, and a blend


def test_prebuilt_cache(make_data, tmp_path: Path, hf_model: str, run_tool, capsys) -> None:
    prefix, cache = make_data("a"), tmp_path / "cache"
    command = ["--data-path", prefix, "--seq-length", "16", "--split", "90,10,0", "--seed", "1"]
    command += ["--data-cache-path", str(cache)]
    assert run_tool("build_data_index", *command, "--tokenizer-model", hf_model) == 0
    assert "train: " in capsys.readouterr().out
    files = set(cache.iterdir())
    assert len(files) == 2  # training and validation
    config = DataConfig(data_path=[prefix], split="90,10,0", data_cache_path=str(cache))
    tokenizer = build_tokenizer(None, hf_model)
    build_datasets(config, tokenizer, seq_length=16, seed=1, train_samples=300, eval_samples=9)
    assert set(cache.iterdir()) == files  # a run finds what the tool built
    assert run_tool("build_data_index", *command, "--seq-length", "9999") == 2
    assert capsys.readouterr().err.startswith("error: the train split")


def test_unwritable_cache(make_data, tmp_path: Path) -> None:
    prefix = make_data("a")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--data-cache-path"):
        build(prefix, data_cache_path=str(tmp_path / "file"))


def test_bad_input(make_data) -> None:
    a, b = make_data("a"), make_data("b")
    cases: list[tuple[list[str], dict[str, Any], str]] = [
        ([], {}, "no training data"),
        ([a + "x"], {}, "does not exist"),
        ([a], {"length": 2000}, "train split .* 2,000 tokens in 40 of 40 documents"),
        ([a], {"split": "99,1,0"}, "valid split .* 0 tokens"),
        ([a], {"split": "0,1,0"}, "no training data"),
        ([a], {"train_data_path": [b]}, "--data-path and --train-data-path"),
        ([a, b], {}, "is not a positive number"),
        (["0.5", a, b], {}, "not pairs of WEIGHT PREFIX"),
        (["0.5", a, "-1", b], {}, "is not a positive number"),
        ([a], {"split": "9x,1"}, "--split '9x,1'"),
        ([a], {"split": "0,0,0"}, "not all zero"),
    ]
    for words, settings, message in cases:
        with pytest.raises(UserError, match=message):
            build(*words, **settings)


def test_blends_and_splits_are_parsed() -> None:
    assert parse_blend(["p"], "--data-path") == [("p", 1.0)]
    assert parse_blend(["3", "p", "1", "q"], "--data-path") == [("p", 0.75), ("q", 0.25)]
    assert parse_split("90, 10") == [(0, 0.9), (0.9, 1.0), None]
