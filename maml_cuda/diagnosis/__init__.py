"""doctor: judges the meta-gradient of a training step that is not ours, and names what is wrong with it.

`borrowed` lends a model to a step and takes it back unchanged, `steps` runs the step, `watching` sees what it calls,
`differences` judges its gradient by finite differences, `variants` computes what the step would give with each fault,
`faults` has their names and mends, `judgement` draws the conclusion, and `doctoring` is what users call.
"""
