"""Token files give back what was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moetrain.data.tokens import TokenFile, TokenWriter


@pytest.mark.parametrize(
    ("vocab_size", "masked", "dtype"), [(65536, False, "u2"), (65537, False, "u4"), (100, True, "u4")]
)
def test_round_trip(tmp_path: Path, vocab_size: int, masked: bool, dtype: str) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, vocab_size, size=n) for n in (5, 0, 1, 700)]
    documents.append(np.array([0, vocab_size - 1]))
    flags = [rng.random(len(ids)) < 0.5 if masked else None for ids in documents]
    with TokenWriter(tmp_path / "a.tokens", vocab_size=vocab_size, masked=masked) as writer:
        for ids, loss in zip(documents, flags, strict=True):
            writer.add(ids, loss)
        writer.commit({"tokenizer": "\u00e9" * 20})
    assert [path.name for path in tmp_path.iterdir()] == ["a.tokens"]
    file = TokenFile(tmp_path / "a.tokens")
    file.verify()
    assert file.lengths.tolist() == [5, 0, 1, 700, 2] and file.num_tokens == 708
    assert file.header["tokenizer"] == "\u00e9" * 20 and file.header["dtype"] == {"u2": "uint16", "u4": "uint32"}[dtype]
    for number, (ids, loss) in enumerate(zip(documents, flags, strict=True)):
        found, carries = file.read(number, 0, len(ids))
        assert found.tolist() == ids.tolist() and found.dtype == np.int64
        assert carries.tolist() == ([True] * len(ids) if loss is None else loss.tolist())
    part, _ = file.read(3, 100, 50)
    assert part.tolist() == documents[3][100:150].tolist()
    expected = 50 if not masked else int(flags[3][100:150].sum())
    assert file.labels_in(np.array([3]), np.array([100]), np.array([50])).tolist() == [expected]
    everything = TokenFile(tmp_path / "a.tokens", all_tokens=True)
    assert everything.read(3, 0, 700)[0].tolist() == documents[3].tolist() and everything.read(3, 0, 700)[1].all()


def test_equal_documents_share_a_hash_and_parts_the_hash_of_the_first(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "a.tokens", vocab_size=100, masked=False) as writer:
        for ids, part in [([1, 2], False), ([1, 3], False), ([1, 2], False), ([9], True)]:
            writer.add(np.array(ids), part=part)
        writer.commit({})
    hashes = TokenFile(tmp_path / "a.tokens").hashes.tolist()
    assert hashes[0] == hashes[2] == hashes[3] != hashes[1]


def test_an_empty_file_can_be_read(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "a.tokens", vocab_size=100, masked=False) as writer:
        writer.commit({})
    file = TokenFile(tmp_path / "a.tokens")
    file.verify()
    assert file.num_documents == 0 and file.lengths.tolist() == []
