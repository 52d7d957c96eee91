"""Documents into rows: nothing lost, nothing twice, little waste, labels and positions right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moetrain.data.packing import IGNORE, Pieces, best_fit, collate, cut, plan_rows, whole
from moetrain.data.tokens import TokenFile, TokenWriter


def write(path: Path, documents: list[list[int]], loss: list[list[bool]] | None = None) -> TokenFile:
    with TokenWriter(path, vocab_size=1000, masked=loss is not None) as writer:
        for i, ids in enumerate(documents):
            writer.add(np.array(ids, np.int64), None if loss is None else np.array(loss[i], bool))
        writer.commit({})
    return TokenFile(path)


def random_documents(rng: np.random.Generator, count: int, longest: int) -> list[list[int]]:
    return [rng.integers(1, 1000, size=n).tolist() for n in rng.integers(2, longest, size=count)]


@pytest.mark.parametrize("longest", [5, 40, 200])
def test_every_token_lands_in_one_row(tmp_path: Path, longest: int) -> None:
    documents = random_documents(np.random.default_rng(longest), 500, longest)
    file = write(tmp_path / "a.tokens", documents)
    plan = plan_rows(file, whole(file, np.arange(500)), 32, packing=True)
    pieces: dict[int, list[tuple[int, list[int]]]] = {}
    for row in range(plan.num_rows):
        assert sum(len(ids) for ids, _ in plan.documents_of(row)) <= 32
    for document, start, length in zip(*plan.pieces, strict=True):
        pieces.setdefault(int(document), []).append((int(start), file.read(document, start, length)[0].tolist()))
    for number, ids in enumerate(documents):
        joined = [token for _, part in sorted(pieces[number]) for token in part]
        if len(ids) % 32 == 1 and len(ids) > 1:
            ids = ids[:-1]  # a rest of one token has nothing to predict, and is left out
        assert joined == ids
    in_rows = sorted(tuple(ids.tolist()) for row in range(plan.num_rows) for ids, _ in plan.documents_of(row))
    assert in_rows == sorted(tuple(part) for parts in pieces.values() for _, part in parts)


def test_waste_is_near_one_percent_for_documents_below_a_row() -> None:
    rng = np.random.default_rng(0)
    for name, lengths, limit in [
        ("uniform", rng.integers(1, 2048, 20_000), 0.01),
        ("log-normal", np.minimum(rng.lognormal(5.5, 1.0, 20_000).astype(np.int64) + 1, 2048), 0.01),
        ("just above half", rng.integers(1025, 1100, 1000), 0.55),  # no two fit: nothing can help
    ]:
        rows = best_fit(lengths, 2048)
        used = np.bincount(rows, weights=lengths)
        assert used.max() <= 2048, name
        assert 1 - lengths.sum() / (len(used) * 2048) < limit, name


def test_best_fit_takes_the_fullest_row_and_is_deterministic() -> None:
    lengths = np.array([6, 5, 4, 5, 3, 7])
    rows = best_fit(lengths, 10)
    assert np.bincount(rows, weights=lengths).tolist() == [10.0, 10.0, 10.0]
    many = np.random.default_rng(1).integers(1, 300, 30_000)
    assert np.array_equal(best_fit(many, 512, seed=3), best_fit(many, 512, seed=3))
    assert not np.array_equal(best_fit(many, 512, seed=3), best_fit(many, 512, seed=4))
    assert best_fit(np.zeros(0, np.int64), 10).tolist() == []


def test_cut() -> None:
    pieces = cut(Pieces(np.array([4, 9]), np.array([0, 5]), np.array([25, 10])), 10)
    assert [column.tolist() for column in pieces] == [[4, 4, 4, 9], [0, 10, 20, 5], [10, 10, 5, 10]]


def test_a_batch_by_hand() -> None:
    row = [(np.array([11, 12, 13]), np.array([True, False, True])), (np.array([21, 22]), np.array([True, True]))]
    batch = collate([row, []], 7, 99, packing=True, document_mask=True)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 21, 22, 99, 99], [99] * 7]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 13, IGNORE, 22, IGNORE, IGNORE], [IGNORE] * 7]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2, 2], [0] * 7]
    mixing = collate([row], 7, 99, packing=True, document_mask=False)
    assert sorted(mixing) == ["input_ids", "labels"]
    assert mixing["labels"].tolist() == batch["labels"][:1].tolist()
    padded = collate([row[:1], []], 5, 99, packing=False, document_mask=True)
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [0] * 5]
    assert "position_ids" not in padded
    assert "seq_idx" not in padded


def test_without_packing_a_row_is_one_document_cut_at_the_end(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tokens", [[1, 2, 3, 4, 5, 6], [7, 8]])
    plan = plan_rows(file, whole(file, np.arange(2)), 4, packing=False)
    assert [[ids.tolist() for ids, _ in plan.documents_of(row)] for row in range(plan.num_rows)] == [
        [[1, 2, 3, 4]],
        [[7, 8]],
    ]


def test_every_row_has_a_label(tmp_path: Path) -> None:
    """A piece of a chat without an answer in it teaches nothing, and a row of such pieces would divide by zero."""
    loss = [[True] + [False] * 9, [False] * 9 + [True], [False, True]]
    file = write(tmp_path / "a.tokens", [list(range(1, 11)), list(range(11, 21)), [31, 32]], loss)
    plan = plan_rows(file, whole(file, np.arange(3)), 5, packing=True)
    rows = [sorted(ids.tolist() for ids, _ in plan.documents_of(row)) for row in range(plan.num_rows)]
    assert sorted(rows) == [[[16, 17, 18, 19, 20]], [[31, 32]]]
    assert plan.num_label_tokens == 2 and plan.num_left_out == 15
