"""What lightpeft uses of other libraries although they do not promise it: private names, and the insides of objects.

One module a library. A function here says what is wanted, and is the one place that knows how it is had. Nothing here
knows of pruning, and importing a module imports its library alone. `tests/test_compat.py` names what each is for, and
fails if a new version of a library has it no longer.
"""
