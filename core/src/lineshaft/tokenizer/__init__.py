"""Tokenizers: text to ids, ids to text (whole or token by token), and chat templates."""

from lineshaft.tokenizer.tokenizer import Detokenizer, Tokenizer

__all__ = ["Detokenizer", "Tokenizer"]
