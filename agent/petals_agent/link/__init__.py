"""Messages between the agent and its container over a socketpair; the one package both import."""
