"""Vocabulary reduction: the tokens to keep, and cutting of tokenizer and model to them."""
