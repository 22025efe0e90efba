"""Time one meta-step of maml_cuda beside its rivals: `python -m benchmarks`.

A side is timed only after its meta-gradient is proven against `maml_cuda.reference`; all sides of a case run
in one process, in interleaved rounds, on the same tensors.
"""
