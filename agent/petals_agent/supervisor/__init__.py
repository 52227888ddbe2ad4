"""The agent process: identity, DHT node, announcements, the container's life. No torch."""
