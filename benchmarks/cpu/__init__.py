"""The CPU table: every way to the same numbers, in one run, next to the bare GEMMs.

    python -m benchmarks.cpu --help

`problem` draws inputs and solves them in fp64, `providers` lists who is compared, `measure`
probes, verifies and times them, `record` keeps JSON lines, `report` makes the table.
"""
