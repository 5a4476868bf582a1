"""A plugin for vLLM on processors: its KV blocks give memory back when others need it."""
