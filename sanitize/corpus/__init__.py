"""Shards to samples, samples to pixels, and byte-exact shards out."""
