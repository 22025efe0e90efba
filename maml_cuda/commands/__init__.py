"""The commands of ``maml-cuda``, a module each: ``add_parser`` has its options, ``run`` takes the parsed ones.

Modules that need torch or an extra are imported inside ``run``, so that ``--help`` is fast and a missing package is
reported by name.
"""
