"""The index cache: contents, damage, and several processes that build it at once."""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_mesh.data import cache
from megatron_mesh.data.indexed import IndexedWriter, inspect_prefix
from tests.unit.data.corpora import NumberTokenizer
from tests.unit.data.test_datasets import build

KEY_TEXT = "an entry of numbers"


def numbers() -> cache.Arrays:
    """Return an array larger than the two ends that are verified, and a small one."""
    return {"long": np.arange(100_000), "pairs": np.arange(6, dtype=np.int32).reshape(3, 2)}


def key(directory: Path) -> cache.Key:
    return cache.Key(directory, "numbers", KEY_TEXT)


def only_the_entry(directory: Path) -> bool:
    return list(directory.iterdir()) == [key(directory).path]


def test_the_index_is_megatrons(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    with IndexedWriter(str(tmp_path / "text"), np.uint16) as writer:
        writer.add(np.arange(lengths.sum()) % 60_000, lengths)
        writer.commit()
    ours = build(str(tmp_path / "text"), split="7,2,1", valid=9, train=50, seed=5)
    stock = GPTDatasetConfig(
        random_seed=5,
        sequence_length=16,
        blend=([str(tmp_path / "text")], None),
        split="7,2,1",
        path_to_cache=str(tmp_path / "stock"),
        tokenizer=NumberTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    low_level = GPTDataset.build_low_level_dataset(str(tmp_path / "text"), stock)
    for stream, split, documents in zip(
        ours.named().values(), Split, (range(350), range(350, 450), range(450, 500)), strict=True
    ):
        theirs = GPTDataset(low_level, "text", np.array(documents, dtype=np.int32), None, split, stock)
        ours_epoch = stream.parts[0].dataset
        for name in ("document_index", "sample_index", "shuffle_index"):
            expected, found = getattr(theirs, name), getattr(ours_epoch, name)
            assert found.dtype == expected.dtype and np.array_equal(found, expected), (split, name)


def test_a_blend_is_greedy(make_data) -> None:
    weights = [5.0, 3.0, 2.0]
    words = [
        word
        for i, weight in enumerate(weights)
        for word in (str(weight), make_data(f"part{i}", first=1 + 5000 * i))
    ]
    stream = build(*words, train=500).train
    taken = [0, 0, 0]
    for sample in range(500):
        lag = [weight / 10 * max(sample, 1) - count for weight, count in zip(weights, taken, strict=True)]
        part = lag.index(max(lag))
        expected = stream.parts[part].dataset, taken[part] % len(stream.parts[part].dataset)
        found, epoch, _ = stream._locate(sample)
        assert found.dataset is expected[0] and epoch == taken[part] // len(found.dataset)
        taken[part] += 1


def damage_truncated(entry: Path) -> None:
    os.truncate(entry / "long.npy", 400_000)


def damage_tail_is_zero(entry: Path) -> None:
    """Damage a file like an interrupted copy into a preallocated file."""
    os.truncate(entry / "long.npy", 400_000)
    os.truncate(entry / "long.npy", 100_000 * 8 + 128)


def damage_absent(entry: Path) -> None:
    (entry / "pairs.npy").unlink()


def damage_other_values(entry: Path) -> None:
    np.save(entry / "pairs.npy", np.arange(1, 7, dtype=np.int32).reshape(3, 2))


def damage_other_type(entry: Path) -> None:
    np.save(entry / "pairs.npy", np.arange(6, dtype=np.float32).reshape(3, 2))


def damage_manifest(entry: Path) -> None:
    os.truncate(entry / "manifest.json", 20)


def damage_foreign(entry: Path) -> None:
    """Put another entry in this one's place."""
    other = cache.Key(entry.parent, "numbers", "something else")
    cache.build_entry(other, numbers)
    shutil.rmtree(entry)
    other.path.rename(entry)


def damage_empty(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.mkdir()


def damage_no_directory(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("a file")


@pytest.mark.parametrize("damage", [f for name, f in globals().items() if name.startswith("damage_")])
def test_a_damaged_or_foreign_entry_is_rebuilt(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    cache.build_entry(key(tmp_path), numbers)
    assert cache.load(key(tmp_path)) is not None
    damage(key(tmp_path).path)
    assert cache.load(key(tmp_path)) is None
    cache.build_entry(key(tmp_path), numbers)
    loaded = cache.load(key(tmp_path))
    assert loaded is not None and only_the_entry(tmp_path)
    assert all(np.array_equal(loaded[name], array) for name, array in numbers().items())


def test_an_intact_entry_is_not_rebuilt(tmp_path: Path) -> None:
    cache.build_entry(key(tmp_path), numbers)
    cache.build_entry(key(tmp_path), lambda: pytest.fail("it is there"))


def _build_slowly(directory: Path, barrier, results) -> None:
    """Build at the same time as the other processes, whatever the scheduler does."""

    def make() -> cache.Arrays:
        barrier.wait(60)
        return numbers()

    cache.build_entry(key(directory), make)
    loaded = cache.load(key(directory))
    results.put(loaded is not None and np.array_equal(loaded["long"], numbers()["long"]))


@pytest.mark.parametrize("damaged", [False, True])
def test_four_jobs_at_once_all_succeed(tmp_path: Path, damaged: bool) -> None:
    if damaged:
        cache.build_entry(key(tmp_path), numbers)
        damage_truncated(key(tmp_path).path)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.SimpleQueue()
    jobs = [context.Process(target=_build_slowly, args=(tmp_path, barrier, results)) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0] * 4
    assert [results.get() for _ in jobs] == [True] * 4
    assert only_the_entry(tmp_path)


def _die_while_building(directory: Path) -> None:
    save = np.save

    def save_then_die(file, array) -> None:
        save(file, array)
        os.kill(os.getppid(), signal.SIGKILL)  # and with it, this helper process
        time.sleep(60)

    np.save = save_then_die
    cache.build_entry(key(directory), numbers)


def test_a_killed_builder_leaves_no_entry(tmp_path: Path) -> None:
    job = multiprocessing.get_context("fork").Process(target=_die_while_building, args=(tmp_path,))
    job.start()
    job.join(60)
    assert job.exitcode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left != key(tmp_path).path and cache.load(key(tmp_path)) is None
    cache.build_entry(key(tmp_path), numbers)
    assert left.exists()  # its builder might be alive, on another host
    two_days_ago = time.time() - 2 * 86_400
    os.utime(left, (two_days_ago, two_days_ago))
    shutil.rmtree(key(tmp_path).path)
    cache.build_entry(key(tmp_path), numbers)
    assert only_the_entry(tmp_path)


def test_reordered_documents_are_noticed(tmp_path: Path) -> None:
    """Even the last two of 400,000, where the first mebibyte of the index and all sizes are unchanged."""
    lengths = np.ones(400_000, np.int32)
    lengths[-2:] = 2, 3
    tokens = np.arange(lengths.sum()) % 60_000

    def fingerprint(name: str, order: slice) -> str:
        with IndexedWriter(str(tmp_path / name), np.uint16) as writer:
            writer.add(tokens, np.concatenate([lengths[:-2], lengths[-2:][order]]))
            writer.commit()
        return inspect_prefix(str(tmp_path / name)).fingerprint

    assert fingerprint("one", slice(None)) == fingerprint("same", slice(None))
    assert fingerprint("one", slice(None)) != fingerprint("other", slice(None, None, -1))


def test_reordered_documents_of_one_length_are_noticed(make_data) -> None:
    """If the file is small enough to be hashed entirely."""
    prefix = make_data("a")
    before = inspect_prefix(prefix).fingerprint
    tokens = np.fromfile(f"{prefix}.bin", np.uint16).reshape(40, 50)
    tokens[[38, 39]] = tokens[[39, 38]]
    tokens.tofile(f"{prefix}.bin")
    assert inspect_prefix(prefix).fingerprint != before


def _anonymous_bytes() -> int:
    """Return the memory of this process that is not mapped from a file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def _memory_of_a_blend(words: list[str], samples: int, results) -> None:
    before = _anonymous_bytes()
    stream = build(*words, train=samples).train
    prefixes = [stream.origin(sample).prefix for sample in range(0, samples, 997)]
    results.put((_anonymous_bytes() - before, prefixes.count(words[1]) / len(prefixes)))


def test_a_blend_is_memory_mapped(make_data) -> None:
    """The index of two million samples takes 20 MB, which the processes of a node share."""
    samples = 2_000_000
    words = ["0.7", make_data("a"), "0.3", make_data("b", first=5000)]
    build(*words, train=samples)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    job = context.Process(target=_memory_of_a_blend, args=(words, samples, results))
    job.start()
    job.join(120)
    assert job.exitcode == 0
    grown, share = results.get()
    assert grown < 4e6
    assert 0.6 < share < 0.8
