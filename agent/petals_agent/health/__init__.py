"""Probes, findings, verdict and the ladder of repairs: no I/O of its own; supervisor/ brings facts in and acts."""
