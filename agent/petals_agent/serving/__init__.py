"""The Petals wire protocol on the server's side: decode, check, call the engine, encode."""
