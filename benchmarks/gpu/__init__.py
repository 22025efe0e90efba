"""The one command for a machine with an NVIDIA GPU: `python -m benchmarks.gpu`.

Parts, in their order: smoke (build, the smallest meta-steps, compute-sanitizer, tests), ours (facts of the device, and
every case in every precision), profile (time by kernel), rivals (each in a process of its own, we beside it) and, if
asked for, precision. What is found is written at once; what fails is recorded in words and the rest goes on.
`--emulated` runs all of it on a CPU. docs/gpu.md has the plan for the first fifteen minutes on a GPU.

    __main__   the command          parts    what it does, one step after the other
    machine    the GPU, or the emulation in its place
    record     JSON and budgets     table    the Markdown
    check      build, tests, sanitizer, Nsight Compute       smallest   what the sanitizer watches
    cases      what is measured     facts    launch costs, rates, bandwidth
    sides      who is timed: we and the rivals               jax_rival  one of them
    ours       one case: time, then prove    rivals    one rival on one case
    entrants   a side that is built and timed in turns       profile    time by kernel
    proof      float64, and a smooth twin    precision  the meta-gradient's error in each precision

`python -m benchmarks.gpu.model` predicts without a GPU what a meta-step costs; `registers` asks the compiled library.
"""
