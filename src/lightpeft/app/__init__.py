"""The product around the method: tasks, evaluation, folders, exports, runs and the command line."""
