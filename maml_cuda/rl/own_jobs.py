"""The names of environments that are not part of this package. Does not import torch."""

GROUP = "maml_cuda.environments"  # entry points that register environments


def registered() -> dict[str, str]:
    """The environments that installed packages have registered: name -> ``package.module:NAME``."""
    from importlib.metadata import entry_points

    return {point.name: f"{point.module}:{point.attr}" for point in entry_points(group=GROUP)}


def is_own(job: str) -> bool:
    """Whether ``job`` names an environment that is not part of this package."""
    return ":" in job or job in registered()


def short_name(job: str) -> str:
    """The name without its file or module."""
    return job.rpartition(":")[2]
