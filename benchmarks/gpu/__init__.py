"""The benchmark for a machine with an NVIDIA GPU: `python -m benchmarks.gpu`.

It runs in parts, in this order:

    smoke       build, smallest meta-steps, compute-sanitizer, tests
    fused       rates of the device; maml_cuda on every case in every precision
    profile     time by kernel; Nsight Compute
    baselines   each baseline in its own process, timed together with maml_cuda
    precision   errors of each precision (only on request)

Results are written as soon as they exist. A failure is recorded, and the next step runs. `--emulated` runs everything
on a CPU. docs/gpu.md has the plan for the first fifteen minutes on a GPU. The modules:

    __main__         the command
    parts            its steps, in order
    record           the JSON file and the time budget
    table            the Markdown report
    machine          the GPU, or the emulation
    check            build, tests, compute-sanitizer, Nsight Compute
    smallest         the meta-steps that compute-sanitizer runs
    cases            the cases and the baselines on them
    facts            launch costs, matrix rates, bandwidth
    implementations  maml_cuda and the baselines on the GPU (jax_meta_step: JAX)
    timing           preparing and timing implementations
    verification     checks in float64 and on a smooth variant of the model
    fused, baseline  the jobs that measure maml_cuda, or one baseline, on a case
    profile          the job that measures time by kernel
    precision        the job that measures errors

Without a GPU, `python -m benchmarks.gpu.model` predicts the cost of a meta-step, with the register counts of the
compiled kernels (registers).
"""
