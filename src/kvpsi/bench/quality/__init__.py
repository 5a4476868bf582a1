"""What forgetting costs: perplexity afterwards, and facts that are still known, for every policy."""
