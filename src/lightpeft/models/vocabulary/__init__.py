"""A smaller vocabulary: which tokens of a model stay, its tokenizer with these alone, and its rows of these alone."""
