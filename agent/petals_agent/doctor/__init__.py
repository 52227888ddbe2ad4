"""Checks of a host for `petals-agent doctor`: one idea a file, each check independent, each with a remedy."""
