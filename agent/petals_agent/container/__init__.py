"""The serving process: loads a span, attaches to p2pd, runs the engine."""
