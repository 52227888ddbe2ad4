"""Tests of models/: checkpoints, families, spans."""
