"""Language models in JAX with swappable position encodings."""
