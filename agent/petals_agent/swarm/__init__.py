"""What the swarm says and what we say to it: DHT records, spans, prefixes, announcements. No torch."""
