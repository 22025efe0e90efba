"""Two installed versions of maml_cuda side by side: `python -m benchmarks.same_bits OLD NEW`.

It compares the bits of everything that users can ask for, on every workload of the benchmark and on random plans, with
each instruction set; with `--time` it times the meta-steps of both versions in turn instead.
"""
