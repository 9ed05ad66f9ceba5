"""Finding and reading models: references, checkpoint formats, stored schemes, and the memory they need."""
