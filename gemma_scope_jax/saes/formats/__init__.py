"""One module for each format that SAEs are written and read in."""

WRITTEN = ("saelens", "gemma_scope", "gemma_scope_2", "dictionary_learning", "circuit_tracer")
PUBLISHED = ("saelens", "gemma_scope")
