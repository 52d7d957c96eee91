"""A look at packed rows in the terminal: which tokens carry loss, and where documents begin."""

from __future__ import annotations

import tempfile
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from moetrain.config import DataConfig
from moetrain.data.packing import Row, plan_rows, whole
from moetrain.data.tokenize import apply_chat_template_file, open_beginning
from moetrain.data.tokens import TokenFile

LOSS_STYLE, CONTEXT_STYLE, PAD_STYLE = "bold green", "dim", "dim italic"
_ROWS_READ = 4  # rows' worth of tokens that are read for each row shown, so that packing has a choice


def preview(config: DataConfig, tokenizer: PreTrainedTokenizerBase, rows: int, console: Console) -> None:
    """Print the first `rows` packed rows of each training source.

    Only the beginning of a source is read, so that the rows are like those of training but not the same.

    Raises:
        ValueError: as `build_data`.
    """
    apply_chat_template_file(config, tokenizer)
    for source in config.train:
        with tempfile.TemporaryDirectory() as directory:
            wanted = _ROWS_READ * rows * config.seq_len
            for file in open_beginning(source, config, tokenizer, Path(directory), wanted)[:1]:
                plan = plan_rows(file, whole(file, np.arange(_documents(file, wanted))), config.seq_len, config.packing)
                for row in range(min(rows, plan.num_rows)):
                    console.print(Rule(Text(f"{source.path}: row {row}"), style="bold"))
                    _print_row(plan.documents_of(row), config.seq_len, tokenizer, console)
    console.print(Text.assemble(("tokens with loss", LOSS_STYLE), "  ", ("context without loss", CONTEXT_STYLE)))


def _documents(file: TokenFile, wanted: int) -> int:
    """Documents that make up so many tokens."""
    return min(int(np.searchsorted(file.ends, wanted)) + 1, file.num_documents)


def _print_row(row: Row, seq_len: int, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    for number, (ids, loss) in enumerate(row):
        carries = loss & (np.arange(len(ids)) > 0)
        title = Text(f"document {number}: {len(ids)} tokens, {int(carries.sum())} with loss")
        console.print(Rule(title, align="left", style="cyan"))
        console.print(_coloured(ids.tolist(), carries.tolist(), tokenizer))
    used = sum(len(ids) for ids, _ in row)
    labels = sum(int(loss[1:].sum()) for _, loss in row)
    console.print(
        Text(f"{used} of {seq_len} tokens used, {labels} with loss, {seq_len - used} padding", style=PAD_STYLE)
    )


def _coloured(ids: list[int], carries: list[bool], tokenizer: PreTrainedTokenizerBase) -> Text:
    """Runs of equal colour are decoded together: a character may be spread over several tokens."""
    text = Text()
    for loss, run in groupby(zip(ids, carries, strict=True), key=lambda pair: pair[1]):
        part = tokenizer.decode(
            [token for token, _ in run], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        text.append(str(part), style=LOSS_STYLE if loss else CONTEXT_STYLE)
    return text
