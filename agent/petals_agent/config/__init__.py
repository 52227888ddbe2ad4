"""petals-agent.toml: its schema, its loading and its error messages. No torch."""
