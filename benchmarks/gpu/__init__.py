"""The one command for a machine with an NVIDIA GPU: `python -m benchmarks.gpu`.

It builds the kernels if they are missing, runs the tests and compute-sanitizer on the GPU, measures a few facts about
it, and times every workload beside its rivals, each answer proven first, all within nine minutes. What fails is
recorded in words and the rest goes on; nothing is written that was not measured. `--emulated` runs all of it on a CPU.

    __main__   the command          parts    what it does, one part after the other
    machine    the GPU, or the emulation in its place
    record     JSON and budgets     table    the Markdown
    check      build, tests, sanitizer       smallest   what the sanitizer watches
    facts      launch costs, rates, bandwidth
    precision  the meta-gradient's error in each precision
    matrix     prove, then time one case     sides      who is timed: we and the rivals
    proof      float64, and a smooth twin    jax_rival  one of them
"""
