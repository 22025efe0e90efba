"""Benchmarks of a meta-step: `python -m benchmarks` on a CPU, `python -m benchmarks.gpu` on a GPU.

Terms used in this package:

    meta-step        computing the loss and the meta-gradient of one meta-batch
    order            2: the exact meta-gradient; 1: first-order MAML, without Hessian terms
    workload         a model and the shapes of its meta-batch (workloads.py)
    case             a workload at one order
    implementation   a way to compute a meta-step: maml_cuda or a baseline
    baseline         any implementation other than maml_cuda (meta_steps.py, libraries.py, jax_meta_step.py,
                     maml_cuda/benchmark/baselines.py)
    verification     comparing a meta-gradient with the float64 reference; only verified implementations count

In the JSON files, `sides` holds the result of each implementation by name, and `fastest_rival` names the fastest
baseline.
"""
