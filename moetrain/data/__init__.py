"""Data: text and chats from files to packed batches for each data rank.

sources   files -> records (text, messages)
messages  chat messages, checked and brought into one form
chat      messages -> token ids and the tokens that carry loss
tokens    the token file: a memory-mapped file of documents
encode    records -> token ids
tokenize  sources -> token files
packing   documents -> rows of a fixed length
isolation models: the documents of a row kept apart in attention and recurrent layers
loader    rows -> batches for this rank, resumable
build     a configuration -> loaders
preview   rows in the terminal
tokenizer training a small tokenizer
"""

from moetrain.data.build import Data, build_data
from moetrain.data.isolation import isolate_documents, packing_support
from moetrain.data.loader import Batch, Loader, Validation
from moetrain.data.preview import preview
from moetrain.data.tokenize import check_vocabulary, tokenize_config, tokenize_to_file, training_texts
from moetrain.data.tokenizer import train_tokenizer

__all__ = [
    "Batch",
    "Data",
    "Loader",
    "Validation",
    "build_data",
    "check_vocabulary",
    "isolate_documents",
    "packing_support",
    "preview",
    "tokenize_config",
    "tokenize_to_file",
    "train_tokenizer",
    "training_texts",
]
