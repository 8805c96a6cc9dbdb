"""How KV blocks travel from one instance to another."""
