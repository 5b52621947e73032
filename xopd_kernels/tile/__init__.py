"""Triton building blocks, one home for each idea. Import them only where Triton is used."""
