"""The experiments: datasets, tasks, races and their reports."""
