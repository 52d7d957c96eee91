"""The order of rows: complete, without overlap, the same for any number of ranks, resumable to the row."""

from __future__ import annotations

import copy
import json
import multiprocessing
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.config import DataConfig, Source
from moetrain.data import tokenize_config, tokenize_to_file
from moetrain.data.loader import Mixture
from tests.data_helpers import data, make_tokenizer, write_jsonl

Batch = dict[str, Tensor]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    texts = [{"text": f"{i} the quick brown fox " * (1 + i * 7 % 11)} for i in range(90)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    return {"train": [{"path": str(tmp_path / "a.jsonl")}], "seq_len": 64, "batch_size": 2, "validation_fraction": 0.1}


def rows_of(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]


def global_batches(config: dict[str, Any], tmp_path: Path, ranks: int, batch_size: int, count: int) -> list[list[Any]]:
    """Rows of each global batch in the order of the ranks."""
    parts = [
        list(islice(data(config | {"batch_size": batch_size}, tmp_path, rank=r, ranks=ranks).train, count))
        for r in range(ranks)
    ]
    return [rows_of([part[i] for part in parts]) for i in range(count)]


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 12), (2, 6), (3, 4), (4, 3)])
def test_the_global_batches_do_not_depend_on_the_number_of_ranks(
    config: dict[str, Any], tmp_path: Path, ranks: int, batch_size: int
) -> None:
    expected = global_batches(config, tmp_path, 1, 12, 6)
    assert global_batches(config, tmp_path, ranks, batch_size, 6) == expected


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_ranks_together_see_every_row_once_an_epoch(config: dict[str, Any], tmp_path: Path, ranks: int) -> None:
    num_rows = data(config, tmp_path).summary["train"]["rows"]
    stride = 2 * ranks
    epochs = 3
    batches = -(-epochs * num_rows // stride)
    seen = [row for batch in global_batches(config, tmp_path, ranks, 2, batches) for row in batch]
    orders = [seen[i * num_rows : (i + 1) * num_rows] for i in range(epochs)]
    assert all(len(set(order)) == num_rows for order in orders)
    assert set(orders[0]) == set(orders[1]) == set(orders[2])
    assert orders[0] != orders[1] != orders[2]


def test_the_seed_shuffles(config: dict[str, Any], tmp_path: Path) -> None:
    def order(seed: int) -> list[Any]:
        return rows_of(list(islice(data(config, tmp_path, seed=seed).train, 5)))

    assert order(1) == order(1) != order(2)
    assert order(-1) == order(-1)


@pytest.mark.parametrize("steps", [0, 1, 17, 40])
def test_resume_continues_at_the_exact_row(config: dict[str, Any], tmp_path: Path, steps: int) -> None:
    loader = data(config, tmp_path).train
    list(islice(loader, steps))
    state = json.loads(json.dumps(loader.state_dict()))
    assert all(isinstance(value, int | str) for value in state.values())
    expected = rows_of(list(islice(loader, 12)))
    again = data(config, tmp_path).train
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert rows_of(list(islice(again, 12))) == expected
    # the same global batch of 2 rows over 2 ranks
    parts = [data(config | {"batch_size": 1}, tmp_path, rank=rank, ranks=2).train for rank in range(2)]
    for part in parts:
        part.load_state_dict(state)
    assert [row for _ in range(12) for part in parts for row in rows_of([next(part)])] == expected


def test_a_position_in_other_data_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    state = data(config, tmp_path).train.state_dict()
    data(config | {"batch_size": 5}, tmp_path, rank=1, ranks=3).train.load_state_dict(state)
    other = copy.deepcopy(config)
    other["train"][0]["weight"] = 2.0
    for changed, seed in [(config | {"seq_len": 32}, 0), (config, 1), (other, 0), (config | {"packing": False}, 0)]:
        with pytest.raises(ValueError, match="belongs to other data"):
            data(changed, tmp_path, seed=seed).train.load_state_dict(state)
    path = Path(config["train"][0]["path"])
    path.write_text(path.read_text() + '{"text": "one more"}\n')
    with pytest.raises(ValueError, match="belongs to other data"):
        data(config, tmp_path).train.load_state_dict(state)


def test_weights_are_shares_of_rows(tmp_path: Path) -> None:
    for name, count in (("a", 40), ("b", 30), ("c", 200)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name * 3} {i} " + "the fox " * 8} for i in range(count)])
    sources = [{"path": str(tmp_path / f"{name}.jsonl"), "weight": w} for name, w in (("a", 5), ("b", 1.5), ("c", 3.5))]
    loaded = data({"train": sources, "seq_len": 32, "batch_size": 4}, tmp_path)
    tokenizer = make_tokenizer()
    counts: Counter[str] = Counter()
    for taken, batch in enumerate(islice(loaded.train, 50), start=1):
        counts.update(tokenizer.decode(row)[0] for row in batch["input_ids"].tolist())
        for name, share in (("a", 0.5), ("b", 0.15), ("c", 0.35)):
            assert abs(counts[name] - share * 4 * taken) <= 1.5
    assert [source["share"] for source in loaded.summary["sources"]] == [0.5, 0.15, 0.35]
    state = loaded.train.state_dict()
    expected = rows_of([next(loaded.train)])
    again = data({"train": sources, "seq_len": 32, "batch_size": 4}, tmp_path).train
    again.load_state_dict(state)
    assert rows_of([next(again)]) == expected


def test_a_mixture_with_limits_takes_everything() -> None:
    mixture = Mixture([1.0, 3.0])
    assert Counter(mixture.next([6, 2]) for _ in range(8)) == {0: 6, 1: 2}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_validation_is_the_same_for_any_number_of_ranks(config: dict[str, Any], tmp_path: Path, ranks: int) -> None:
    whole = data(config, tmp_path).validation
    expected = rows_of(list(whole.rows(whole.num_rows)))[: whole.num_rows]
    for count in (1, 5, whole.num_rows, whole.num_rows + 100):
        parts = [list(data(config, tmp_path, rank=r, ranks=ranks).validation.rows(count)) for r in range(ranks)]
        assert len({len(part) for part in parts}) == 1
        assert all(batch["labels"].shape == (2, 64) for part in parts for batch in part)
        real = [
            tuple(ids.tolist())
            for step in zip(*parts, strict=True)
            for batch in step
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
            if (labels != -100).any()
        ]
        assert real == expected[:count]
    assert rows_of(list(whole.rows(5))) == rows_of(list(whole.rows(5)))


def test_validation_goes_through_all_sources(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 40)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name * 3} {i} " + "the fox " * 8} for i in range(count)])
    held_out = [{"path": str(tmp_path / f"{name}.jsonl"), "weight": w} for name, w in (("a", 3), ("b", 1))]
    options = {"train": [{"path": str(tmp_path / "b.jsonl")}], "validation": held_out, "seq_len": 32, "batch_size": 1}
    validation = data(options, tmp_path).validation
    assert len(set(rows_of(list(validation.rows(1000))))) == validation.num_rows == 43
    first = [make_tokenizer().decode(row)[0] for row in rows_of(list(validation.rows(4)))]
    assert Counter(first) == {"a": 3, "b": 1}


def documents_in(batches: list[Batch]) -> set[tuple[int, ...]]:
    found = set()
    for batch in batches:
        for ids, seq_idx, labels in zip(batch["input_ids"], batch["seq_idx"], batch["labels"], strict=True):
            for number in range(int(seq_idx.max()) + 1):
                if (labels[seq_idx == number] != -100).any():
                    found.add(tuple(ids[seq_idx == number].tolist()))
    return found


def test_held_out_documents_depend_on_their_content_alone(config: dict[str, Any], tmp_path: Path) -> None:
    config = config | {"seq_len": 256}
    before = data(config, tmp_path)
    held_out = documents_in(list(before.validation.rows(1000)))
    trained = documents_in(list(islice(before.train, before.summary["train"]["rows"])))
    assert 2 <= len(held_out) <= 20 and len(held_out) + len(trained) == 90 and not held_out & trained
    path = Path(config["train"][0]["path"])
    lines = path.read_text().splitlines()[::-1] + [json.dumps({"text": f"new {i}"}) for i in range(30)]
    path.write_text("\n".join(lines))
    after = data(config, tmp_path)
    assert held_out <= documents_in(list(after.validation.rows(1000)))
    assert not documents_in(list(islice(after.train, after.summary["train"]["rows"]))) & held_out


def test_few_documents_and_a_single_one(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "few.jsonl", [{"text": f"text {i}"} for i in range(4)])
    few = data({"train": [{"path": str(tmp_path / "few.jsonl")}], "seq_len": 32}, tmp_path)
    assert few.summary["train"]["documents"] == 3 and few.summary["validation"]["documents"] == 1
    (tmp_path / "one.txt").write_text("the quick brown fox " * 200)
    (tmp_path / "nothing").mkdir()
    one = data({"train": [{"path": str(tmp_path / "one.txt")}], "seq_len": 32, "validation_fraction": 0.25}, tmp_path)
    tokens = one.summary["train"]["tokens"], one.summary["validation"]["tokens"]
    assert tokens[1] / sum(tokens) == pytest.approx(0.25, abs=0.05)


def test_separate_validation_data(config: dict[str, Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "v.jsonl", [{"text": f"held out {i}"} for i in range(7)])
    loaded = data(config | {"validation": [{"path": str(tmp_path / "v.jsonl")}]}, tmp_path)
    assert loaded.summary["train"]["documents"] == 90 and loaded.summary["validation"]["documents"] == 7


def test_counts_of_the_summary(config: dict[str, Any], tmp_path: Path) -> None:
    loaded = data(config, tmp_path)
    train = loaded.summary["train"]
    batches = list(islice(data(config | {"batch_size": 1}, tmp_path).train, train["rows"]))
    labels = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    pad = make_tokenizer().pad_token_id
    used = sum(
        64 - int(((batch["seq_idx"][0] == batch["seq_idx"][0, -1]) & (batch["input_ids"][0] == pad)).sum())
        if (batch["input_ids"][0, -2:] == pad).all()
        else 64
        for batch in batches
    )
    assert train["label_tokens"] == labels
    assert abs(train["tokens"] - used) <= train["rows"]  # a row may end in the end-of-text token, which also pads
    assert train["packing_efficiency"] == train["tokens"] / (train["rows"] * 64) > 0.9
    assert loaded.summary["sources"][0]["records"] == 90


def test_text_ends_with_the_end_of_text_token(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "the fox"}, {"text": "the dog\U0001f98a"}])
    options = {"train": [{"path": str(tmp_path / "a.jsonl")}], "seq_len": 32, "packing": False}
    both = [data(options, tmp_path).train, data(options, tmp_path).validation.rows(1)]
    tokenizer = make_tokenizer()
    texts = {tokenizer.decode(next(part)["input_ids"][0]).split("<|end|>")[0] for part in both}
    assert texts == {"the fox", "the dog\U0001f98a"}
    batch = next(both[0])
    n = int(batch["attention_mask"].sum())
    assert batch["input_ids"][0, n - 1] == tokenizer.eos_token_id
    assert batch["labels"][0, 1:n].tolist() == batch["input_ids"][0, 1:n].tolist()
    assert batch["labels"][0, 0] == -100 and (batch["labels"][0, n:] == -100).all()


def test_parts_of_one_chat_stay_on_one_side_of_the_split(tmp_path: Path) -> None:
    template = CHATML.replace("m.content + '", "(m.content if loop.last or m.role == 'user' else 'gone') + '")
    rows = [
        {"messages": [{"role": role, "content": f"{role[0]}{i}"} for role in ("user", "assistant") * 2]}
        for i in range(60)
    ]
    options = {
        "train": [{"path": str(write_jsonl(tmp_path / "a.jsonl", rows))}],
        "seq_len": 512,
        "validation_fraction": 0.3,
    }
    loaded = data(options, tmp_path, chat_template=template)
    tokenizer = make_tokenizer()
    sides = [
        {tokenizer.decode(list(ids)).split("u")[2].split("<")[0] for ids in documents_in(batches)}
        for batches in (list(loaded.validation.rows(100)), list(islice(loaded.train, 100)))
    ]
    assert loaded.summary["sources"][0]["records"] == 60
    assert loaded.summary["train"]["documents"] + loaded.summary["validation"]["documents"] == 120
    assert sides[0] and not sides[0] & sides[1]


def test_token_files_give_the_same_rows_as_their_source(config: dict[str, Any], tmp_path: Path) -> None:
    expected = rows_of(list(islice(data(config, tmp_path).train, 10)))
    ((source, path),) = tokenize_config(DataConfig(**config), make_tokenizer(), tmp_path / "out", progress=False)
    assert source.path == config["train"][0]["path"]
    tokens = config | {"train": [{"path": str(path)}]}
    assert rows_of(list(islice(data(tokens, tmp_path).train, 10))) == expected


def test_token_files_of_chats_keep_their_loss_mask(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"u{i}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(30)
    ]
    options = {"train": [{"path": str(write_jsonl(tmp_path / "a.jsonl", rows))}], "seq_len": 64, "batch_size": 3}
    tokenizer = make_tokenizer(CHATML)
    ((_, path),) = tokenize_config(DataConfig(**options), tokenizer, tmp_path / "out", progress=False)
    tokens = options | {"train": [{"path": str(path)}]}
    for one, two in islice(
        zip(data(options, tmp_path, chat_template=CHATML).train, data(tokens, tmp_path).train, strict=False), 4
    ):
        assert torch.equal(one["labels"], two["labels"]) and torch.equal(one["input_ids"], two["input_ids"])
    written = [token for token in one["labels"].flatten().tolist() if token != -100]
    assert "u" not in tokenizer.decode(written) and tokenizer.decode(written).count("<|im_end|>") >= 3
    everything = next(data(tokens | {"loss_on": "all"}, tmp_path).train)
    assert "u" in tokenizer.decode([t for t in everything["labels"].flatten().tolist() if t != -100])
    with pytest.raises(ValueError, match="holds text"):
        data(options | {"train": [{"path": str(text_tokens(tmp_path))}], "loss_on": "assistant"}, tmp_path)


def test_worker_processes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetrain.data.tokenize._PARALLEL_ABOVE", 0)
    monkeypatch.setattr("moetrain.data.encode.get_context", lambda name: multiprocessing.get_context("fork"))  # quick
    rows: list[Any] = [
        {"messages": [{"role": "user", "content": f"u{i}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(700)
    ]
    rows[500]["messages"][1]["role"] = 7
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    source = Source(path=str(path))
    made = DataConfig(train=[source], on_bad_line="skip")
    files = [
        tokenize_to_file(source, made, make_tokenizer(CHATML), tmp_path / f"{n}.tokens", workers=n) for n in (1, 2)
    ]
    assert files[0].path.read_bytes() == files[1].path.read_bytes()
    assert files[0].num_documents == 699 and "a.jsonl:501, message 1" in files[1].header["first_skipped"]
    with pytest.raises(ValueError, match=r"a\.jsonl:501, message 1"):
        failing = DataConfig(train=[source])
        tokenize_to_file(source, failing, make_tokenizer(CHATML), tmp_path / "c.tokens", workers=2)


def text_tokens(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "t.jsonl", [{"text": "the fox"}, {"text": "the dog"}])
    made = DataConfig(train=[Source(path=str(tmp_path / "t.jsonl"))])
    ((_, path),) = tokenize_config(made, make_tokenizer(), tmp_path / "text", progress=False)
    return path


def test_what_is_tokenised_is_used_again(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data(config, tmp_path)
    monkeypatch.setattr("moetrain.data.tokenize.tokenize_to_file", None)
    data(config | {"seq_len": 128, "batch_size": 1, "packing": False}, tmp_path, seed=4)
    with pytest.raises(TypeError):
        data(config | {"on_bad_line": "skip"}, tmp_path)
