"""Raw text: suffixes, compression, truncated files, JSON that isn't JSON Lines, long lines."""

import gzip
import json
import lzma
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard

from megatron_mesh.data import corpus
from megatron_mesh.data.corpus import expand_inputs, parse_chunk, read_chunks
from megatron_mesh.errors import UserError
from tests.unit.data.corpora import sentences, write_jsonl

TEXTS = sentences(40)


def texts(path: Path, chunk_bytes: int = 1000) -> list[str]:
    chunks = [chunk for file in expand_inputs([str(path)]) for chunk in read_chunks(file, chunk_bytes)]
    return [text for chunk in chunks for text in parse_chunk(chunk, ["text"], skip_broken=False).texts[0]]


@pytest.fixture
def plain(tmp_path: Path) -> bytes:
    return Path(write_jsonl(tmp_path / "plain.jsonl", TEXTS)).read_bytes()


def zstd_frame(window_log: int, content: bytes) -> bytes:
    """Return a frame with one block, whose header requests a window of 2**window_log bytes."""
    block = (1 | len(content) << 3).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd\x00" + bytes([window_log - 10 << 3]) + block + content


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_zstd_windows(tmp_path: Path, plain: bytes, window_log: int) -> None:
    """Files written with zstd --long=28 and --long=31 can be read."""
    (tmp_path / "c.jsonl.zst").write_bytes(zstd_frame(window_log, plain))
    assert texts(tmp_path / "c.jsonl.zst") == TEXTS


def test_a_zstd_window_that_is_too_large(tmp_path: Path, plain: bytes) -> None:
    """If a window is too large, the error says so."""
    (tmp_path / "c.jsonl.zst").write_bytes(zstd_frame(32, plain))
    with pytest.raises(UserError, match=r"c\.jsonl\.zst needs a window above 2 GiB"):
        texts(tmp_path / "c.jsonl.zst")


@pytest.mark.skipif(shutil.which("zstd") is None, reason="the zstd program is not installed")
def test_the_zstd_programs_long_windows(tmp_path: Path, plain: bytes) -> None:
    """The same with files written by the zstd program."""
    for option in ("--long=28", "--long=31"):
        compressed = subprocess.run(
            ["zstd", "-1", option, "-c"], input=plain, capture_output=True, check=True
        )
        (tmp_path / "c.jsonl.zst").write_bytes(compressed.stdout)
        assert texts(tmp_path / "c.jsonl.zst") == TEXTS


COMPRESS = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("ending", COMPRESS)
def test_several_members_are_read_and_no_truncation_is_silent(
    tmp_path: Path, plain: bytes, ending: str
) -> None:
    """Concatenated files are read, and a download cut off in either member is an error."""
    compress, path = COMPRESS[ending], tmp_path / f"c.jsonl{ending}"
    members = compress(plain[:700]) + compress(b"") + compress(plain[700:])
    path.write_bytes(members)
    assert texts(path) == TEXTS
    for length in (len(members) - 1, len(members) - 60, len(compress(plain[:700])) - 9):
        path.write_bytes(members[:length])
        with pytest.raises(UserError, match=rf"c\.jsonl\{ending} is truncated"):
            texts(path)


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_damaged_second_member_is_not_taken_for_the_end(tmp_path: Path, plain: bytes, ending: str) -> None:
    """Data after the first member are read, or are an error."""
    first, second = (COMPRESS[ending](part) for part in (plain[:700], plain[700:]))
    path = tmp_path / f"c.jsonl{ending}"
    path.write_bytes(first + b"damage" + second[6:])
    with pytest.raises(UserError, match=rf"c\.jsonl\{ending} cannot be read"):
        texts(path)


def test_padding_between_members_of_xz(tmp_path: Path, plain: bytes) -> None:
    padded = lzma.compress(plain[:700]) + bytes(4) + lzma.compress(plain[700:]) + bytes(8)
    (tmp_path / "c.jsonl.xz").write_bytes(padded)
    assert texts(tmp_path / "c.jsonl.xz") == TEXTS


def test_damaged_and_misnamed_compression(tmp_path: Path, plain: bytes) -> None:
    for ending, compress in COMPRESS.items():
        path = tmp_path / f"c.jsonl{ending}"
        path.write_bytes(plain)
        with pytest.raises(UserError, match="cannot be read"):
            texts(path)
        data = bytearray(compress(plain))
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"cannot be read|truncated|broken JSON|utf-8"):
            texts(path)


@pytest.mark.parametrize("name", ["C.JSONL", "c.Json.GZ", "c.NDJSON.Xz", "c.v2.jsonl.ZST"])
def test_upper_case_suffixes(tmp_path: Path, plain: bytes, name: str) -> None:
    compress = COMPRESS.get(Path(name).suffix.lower(), bytes)
    (tmp_path / name).write_bytes(compress(plain))
    assert texts(tmp_path / name) == TEXTS


def test_upper_case_suffix_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "A.TXT").write_text("one\ntwo\n")
    assert texts(tmp_path / "A.TXT") == ["one\ntwo\n"]


DOCUMENTS = [{"text": "one", "meta": {"a": [1]}}, {"text": "two"}]
WHOLE = {
    "pretty object": (json.dumps(DOCUMENTS[0], indent=2), "objects over several lines", "."),
    "pretty objects": ("\n".join(json.dumps(d, indent=2) for d in DOCUMENTS), "over several lines", "."),
    "half pretty": ('{"text":\n  "one"}\n', "over several lines", "."),
    "array": (json.dumps(DOCUMENTS), "a JSON array", ".[]"),
    "pretty array": (json.dumps(DOCUMENTS, indent=2), "a JSON array", ".[]"),
    "after a byte-order mark": ("\ufeff\n" + json.dumps(DOCUMENTS, indent=1), "a JSON array", ".[]"),
    "longer than a chunk": ('{\n "text": "' + "long " * 500 + '"\n}', "over several lines", "."),
}


@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.parametrize("skip_broken", [False, True])
def test_a_json_document_is_recognised(tmp_path: Path, case: str, skip_broken: bool) -> None:
    """Skipping it line by line would lose the entire file, so --skip-broken makes no difference."""
    text, kind, program = WHOLE[case]
    path = tmp_path / "c d.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        for chunk in read_chunks(path, 1000):
            parse_chunk(chunk, ["text"], skip_broken=skip_broken)
    message = str(caught.value)
    assert kind in message and f"jq -c '{program}' '{path}' > 'c d.lines.jsonl'" in message
    assert "\n" not in message


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
@pytest.mark.parametrize("name", ["c.json", "c.json.gz"])
@pytest.mark.parametrize("case", ["pretty objects", "pretty array"])
def test_the_remedy_converts_the_document(tmp_path: Path, name: str, case: str) -> None:
    """The command in the message works as it is printed."""
    data = WHOLE[case][0].encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(UserError) as caught:
        texts(tmp_path / name)
    command = str(caught.value).split("convert it with: ")[1]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert texts(tmp_path / "c.lines.jsonl") == ["one", "two"]


def test_one_broken_line_is_not_a_json_document(tmp_path: Path) -> None:
    """A bad line of JSON Lines, whether the first or a later one, gets no advice on conversion."""
    for line in ('{"text": "cut o', '["text"]', "nonsense", '{"text": 1}'):
        for lines in ([line, '{"text": "b"}'], ['{"text": "b"}', line]):
            (tmp_path / "c.jsonl").write_text("\n".join(lines))
            with pytest.raises(UserError, match="--skip-broken") as caught:
                texts(tmp_path / "c.jsonl")
            assert "convert" not in str(caught.value)


def test_skipping_a_broken_first_document(tmp_path: Path) -> None:
    """The document spans two lines; the rest of the file is JSON Lines."""
    (tmp_path / "c.jsonl").write_text('{\n"text": "a"}\n' + '{"text": "b"}\n' * 5)
    with pytest.raises(UserError, match="JSON objects over several lines"):
        texts(tmp_path / "c.jsonl")
    (chunk,) = read_chunks(tmp_path / "c.jsonl", 1000)
    parsed = parse_chunk(chunk, ["text"], skip_broken=True)
    assert parsed.texts == [["b"] * 5] and len(parsed.broken) == 2


def test_a_missing_key_lists_the_keys_there_are(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"content": "a", "id": 1}\n')
    with pytest.raises(UserError, match=r"no text under the key 'text'.*its keys are: 'content', 'id'"):
        texts(tmp_path / "c.jsonl")


class CountedBytes(bytes):
    """Counts the bytes that ``+`` copies."""

    copied = 0

    def __radd__(self, other: bytes) -> "CountedBytes":
        CountedBytes.copied += len(other) + len(self)
        return CountedBytes(bytes(other) + bytes(self))

    def __add__(self, other: bytes) -> "CountedBytes":
        CountedBytes.copied += len(other) + len(self)
        return CountedBytes(bytes(self) + bytes(other))


def test_a_long_line_is_read_in_linear_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Appending each of the line's 2,000 blocks to the previous ones would copy a thousand times as much."""
    path = Path(write_jsonl(tmp_path / "c.jsonl", ["before", "x" * 100_000, "after"]))
    whole = corpus.open_file

    class Counting:
        def __init__(self, file) -> None:
            self.file = file

        def read(self, size: int) -> bytes:
            return CountedBytes(self.file.read(size))

    @contextmanager
    def counted(path: Path) -> Iterator[tuple]:
        with whole(path) as (raw, file):
            yield raw, Counting(file)

    monkeypatch.setattr(corpus, "open_file", counted)
    assert texts(path, chunk_bytes=50) == ["before", "x" * 100_000, "after"]
    assert CountedBytes.copied < 3 * path.stat().st_size
