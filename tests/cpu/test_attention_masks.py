"""What a mask of Transformers is taken for, and where documents begin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import masking_utils

from moetrain.attention import CausalMask, recognise
from moetrain.data.isolation import Documents
from tests.cpu.test_data_isolation import LENGTHS, packed
from tests.families import build


def taken_as(**kwargs: object) -> CausalMask | None:
    """What a mask that Transformers makes for a model of `kwargs` is taken for; None: a dense mask."""
    seen: list[CausalMask | None] = []

    def note(mask_function: object, **_: object) -> None:
        seen.append(recognise(mask_function))

    config = build("mixtral").config
    for name in ("sliding_window", "attention_chunk_size", "is_causal"):
        if name in kwargs:
            setattr(config, name, kwargs.pop(name))
    maker = kwargs.pop("maker", masking_utils.create_causal_mask)
    masking_utils.AttentionMaskInterface.register("noted", note)
    config._attn_implementation = "noted"
    try:
        maker(config, torch.zeros(2, 8, 4), None, past_key_values=None, **kwargs)
    finally:
        del masking_utils.AttentionMaskInterface._global_mapping["noted"]
    return seen[0]


def test_what_a_mask_is_taken_for() -> None:
    sliding, restart = masking_utils.create_sliding_window_causal_mask, torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 2)
    causal = taken_as()
    assert causal is not None and causal.window is None and causal.cu_seqlens is None
    window = taken_as(maker=sliding, sliding_window=3)
    assert window is not None and window.window == 3 and window.cu_seqlens is None
    for other in (
        {"position_ids": restart},  # documents, but how many stands on the device
        {"maker": masking_utils.create_chunked_causal_mask, "attention_chunk_size": 4},
        {"maker": masking_utils.create_bidirectional_mask},
        {"is_causal": False},
        {"or_mask_function": lambda b, h, q, k: q == k},
        {"and_mask_function": lambda b, h, q, k: q >= k},
        {"block_sequence_ids": torch.zeros(2, 8, dtype=torch.int64)},
    ):
        assert taken_as(**other) is None, other


def test_documents_in_a_mask_function_are_found() -> None:
    _, batch = packed(LENGTHS)
    documents = Documents(batch["seq_idx"], max_documents=5)

    def same(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return batch["seq_idx"][b, q] == batch["seq_idx"][b, k]

    same.documents = documents
    theirs = masking_utils.packed_sequence_compatibility_function(
        masking_utils.sliding_window_causal_mask_function(4), batch["position_ids"], batch["seq_idx"]
    )
    mask = recognise(masking_utils.and_masks(theirs, same))
    assert mask is not None and mask.window == 4 and mask.cu_seqlens is documents.cu_seqlens
    query = torch.zeros(2, 3, 16, 8)
    whole = masking_utils.sdpa_mask(
        2, 16, 16, mask_function=masking_utils.and_masks(theirs, same), allow_is_causal_skip=False
    )
    assert torch.equal(mask.dense(query), whole)


@pytest.mark.parametrize("max_documents", [None, 3, 16])
def test_where_documents_begin(max_documents: int | None) -> None:
    _, batch = packed(LENGTHS)
    documents = Documents(batch["seq_idx"], max_documents)
    starts = [row * 16 + start for row, start, _ in documents.spans]
    assert documents.cu_seqlens.dtype == torch.int32
    assert documents.cu_seqlens.tolist() == starts + [32] * (2 * (max_documents or 3) + 1 - len(starts))


def test_more_documents_than_promised_fail() -> None:
    _, batch = packed(((1,) * 16, (16,)))
    assert Documents(batch["seq_idx"], 9).cu_seqlens[-1] == 32  # 17 fit into 2 x 9
    with pytest.raises(RuntimeError, match="max_documents"):
        _ = Documents(batch["seq_idx"], 8).cu_seqlens
