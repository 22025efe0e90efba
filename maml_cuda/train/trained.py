"""A trained net for use: the FusedMAML of a run, and how it takes pictures."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch

from maml_cuda.data.pictures import Pictures
from maml_cuda.extras import require
from maml_cuda.fused_maml import FusedMAML
from maml_cuda.rl.settings import RL_JOBS, RLSettings, is_rl_run
from maml_cuda.train.devices import device_of, only_on_cpu
from maml_cuda.train.jobs import make_maml, pictures_of
from maml_cuda.train.settings import JOBS, WITHOUT_INNER_LOOP, Settings


class TrainedMAML(FusedMAML):
    """A FusedMAML at a checkpoint of a run: all that a FusedMAML does, and what the run knows. ``load`` makes it.

    Attributes:
        settings: the settings of the run.
        iteration: the meta-iteration of the checkpoint.
        steps: the adaptation steps after which the run reports its test score.
    """

    settings: Settings | RLSettings
    iteration: int
    steps: int

    @property
    def pictures(self) -> Pictures:
        """How the run reads picture files.

        Raises:
            ValueError: it is not a run on pictures.
        """
        return pictures_of(self.settings)


def load(run: str | PathLike[str], checkpoint: str = "best", device: str | torch.device = "cpu") -> TrainedMAML:
    """Loads the net of a run of ``maml-cuda train``.

        maml = maml_cuda.load("runs/birds")
        x_spt, y_spt, classes, _ = maml.pictures.read_classes("support")  # a folder for each class
        fast = maml.adapt(x_spt[None], y_spt[None], maml.steps)
        x_qry = maml.pictures.read(["a.png", "b.jpg"])
        probabilities = maml.predict(fast, x_qry[None], slot=maml.steps - 1).softmax(-1)[0]

    Args:
        run: the folder of the run.
        checkpoint: "best" or "last".
        device: where the net is to be, wherever it was trained.

    Returns:
        The net, in the state in which ``maml-cuda evaluate`` tests it. For a policy, ``model`` maps observations to
            (mean, log_std), or to logits if actions are discrete.

    Raises:
        FileNotFoundError: there is no such run or checkpoint.
        ValueError: the checkpoint is damaged; or the run's algorithm has no inner loop (protonet, matching and
            nearest-pixel, with which ``maml-cuda predict`` classifies); or the machine has no such device.
        ModuleNotFoundError: safetensors is not installed.
    """
    require("safetensors", extra="train")
    from maml_cuda.train.checkpoint import DamagedCheckpoint, load_model, load_parameters
    from maml_cuda.train.run_info import restore_settings

    folder, place = Path(run) / checkpoint, device_of(str(device))
    learned, info = load_model(folder)
    given = info.get("settings", {})
    job, is_policy = given.get("job"), is_rl_run(given)
    if job not in JOBS and not is_policy:
        raise DamagedCheckpoint(folder, f"job of {folder} must be one of {', '.join(JOBS | RL_JOBS)}, got {job!r}")
    if is_policy:
        from maml_cuda.rl.training import make_policy

        only_on_cpu(job, place)
        policy = restore_settings(RLSettings, info, folder)
        maml, steps = make_policy(policy, TrainedMAML), policy.test_steps
        stored: Settings | RLSettings = policy
    else:
        settings = restore_settings(Settings, info, folder)
        if settings.algorithm in WITHOUT_INNER_LOOP:
            raise ValueError(
                f"run must be of an algorithm with an inner loop, got {settings.algorithm} ({run}), which is no "
                f"FusedMAML; maml-cuda predict {run} classifies with it"
            )
        maml, steps = make_maml(settings, TrainedMAML), 0 if settings.told else settings.test_steps
        stored = settings
        if settings.algorithm == "pretrained":  # its checkpoint also holds the classifier of the training classes
            learned = {name[5:]: tensor for name, tensor in learned.items() if name.startswith("maml.")}
    assert isinstance(maml, TrainedMAML)
    maml.settings, maml.iteration, maml.steps = stored, info["iteration"], steps
    load_parameters(maml, learned, folder)
    return maml.to(place)
