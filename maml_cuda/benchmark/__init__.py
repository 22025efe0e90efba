"""The benchmark of a user's own model (`maml-cuda benchmark`), and what the repository's own benchmarks share with it.

`options` checks the words of the command line, `models` loads the model, `cases` draws tasks and checks that the model
takes them, `baselines` has what maml_cuda is compared with, `verification` compares a meta-gradient with the float64
reference, `timing` and `memory` measure, `measuring` puts these together, and `report` says the result in words.
"""
