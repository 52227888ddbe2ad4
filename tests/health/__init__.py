"""Findings, verdict, ladder and probing as plain objects, and what care tells systemd."""
