"""The board: attribution methods against one retraining bank; see ``python -m benchmarks.board --help``."""
