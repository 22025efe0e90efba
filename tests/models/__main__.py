"""The command `python -m tests.models`."""

from __future__ import annotations

import argparse
import warnings

from tests.models.page import PAGE, maml_of, markdown, why_not
from tests.models.zoo import MODELS


def main() -> None:
    description = "Finds out which models of the list are fused, and writes docs/models.md."
    argparse.ArgumentParser(prog="python -m tests.models", description=description).parse_args()
    warnings.simplefilter("ignore", UserWarning)
    reasons = {name: why_not(maml_of(published), *published.data()[:2]) for name, published in MODELS.items()}
    PAGE.write_text(markdown(reasons), encoding="utf-8")
    print(f"{sum(not reason for reason in reasons.values())} of {len(reasons)} are fused: {PAGE}")


if __name__ == "__main__":
    main()
