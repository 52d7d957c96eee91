"""Benchmarks: a whole step beside native Transformers, and the parts of a Mixture-of-Experts layer on their own."""
