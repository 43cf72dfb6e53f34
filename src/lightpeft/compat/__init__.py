"""Uses of private names and internals of other libraries, which may change without notice.

Each module covers one library, and imports only that. Each function wraps one use, and is the only place that knows how
it works. Nothing here depends on pruning. `tests/test_compat.py` lists the purpose of each use, and fails if a new
version of a library lacks it.
"""
