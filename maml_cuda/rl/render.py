"""Renders a GIF of a robot before and after adaptation, if MuJoCo can render on this machine.

``python -m maml_cuda.rl.render ENVIRONMENT`` reads states from standard input and writes the GIF to standard output.
MuJoCo chooses its OpenGL library when it is imported, and a library that does not work may crash the process, so each
library is tried in a process of its own.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch import Generator, Tensor

from maml_cuda import FusedMAML
from maml_cuda.rl.adaptation import adapt_and_sample
from maml_cuda.rl.clock import Clock
from maml_cuda.rl.environments import make_environment
from maml_cuda.rl.locomotion import FRAME_SKIP, Locomotion
from maml_cuda.rl.settings import RLSettings
from maml_cuda.train.checkpoint import write_file

FRAMES = 100  # before adaptation, and as many after it
SIZE = (240, 320)  # height and width in pixels
LIBRARIES = ("egl", "osmesa", "glfw")  # values of MUJOCO_GL


def before_and_after(
    maml: FusedMAML, environment: Locomotion, goals: Tensor, settings: RLSettings, generator: Generator, path: Path
) -> str:
    """Renders the task's first episode before adaptation and after ``test_steps`` steps, and writes it to ``path``.

    Returns:
        A sentence that says what was written, or why nothing was.
    """
    halves = []
    recorder = _Recorder(environment)
    found = adapt_and_sample(maml, environment, goals, settings, generator, Clock(), settings.test_steps)
    for step, _ in enumerate(found):
        if step in (0, settings.test_steps):
            halves += recorder.states[:FRAMES]
        recorder.states.clear()
    recorder.stop()
    states = io.BytesIO()
    np.save(states, np.stack(halves))
    given = os.environ.get("MUJOCO_GL")
    for library in (given,) if given else LIBRARIES:
        rendered = subprocess.run(
            [sys.executable, "-m", "maml_cuda.rl.render", settings.job],
            input=states.getvalue(),
            env=os.environ | {"MUJOCO_GL": library},
            capture_output=True,
        )
        if rendered.returncode == 0 and rendered.stdout.startswith(b"GIF8"):
            write_file(path, rendered.stdout)
            goal = ", ".join(f"{value:.2f}" for value in goals[0].tolist())
            return f"{path.name}: before and after adaptation to the goal {goal}, rendered by {library}"
    return (
        "no GIF: MuJoCo cannot render on this machine. It needs EGL, OSMesa or a display; on Debian, "
        "apt-get install libosmesa6 installs OSMesa"
    )


class _Recorder:
    """Records the states of the first episode of an environment."""

    def __init__(self, environment: Locomotion) -> None:
        self.states: list[np.ndarray] = []
        self._environment = environment
        self._step = environment._step
        environment._step = self._recording  # type: ignore[method-assign]

    def _recording(self, actions: Tensor) -> Any:
        if bool(self._environment.alive[0, 0]):
            self.states.append(self._environment._states[0].copy())
        return self._step(actions)

    def stop(self) -> None:
        """Restores the environment's own ``_step``."""
        self._environment._step = self._step  # type: ignore[method-assign]


def gif(name: str, states: np.ndarray) -> bytes:
    """The states ``[frames, state]`` of the environment ``name`` as a GIF, one frame per state."""
    import mujoco
    from PIL import Image

    environment = make_environment(name)
    assert isinstance(environment, Locomotion)
    model = environment.model
    data, camera = mujoco.MjData(model), mujoco.MjvCamera()
    camera.type, camera.trackbodyid = mujoco.mjtCamera.mjCAMERA_TRACKING, 1
    camera.distance, camera.elevation, camera.azimuth = 4.0, -20.0, 90.0
    images = []
    with mujoco.Renderer(model, *SIZE) as scene:
        for state in states:
            mujoco.mj_setState(model, data, state, mujoco.mjtState.mjSTATE_FULLPHYSICS)
            mujoco.mj_forward(model, data)
            scene.update_scene(data, camera)
            images.append(Image.fromarray(scene.render()))
    content = io.BytesIO()
    milliseconds = int(1000 * FRAME_SKIP * model.opt.timestep)
    images[0].save(content, "GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
    return content.getvalue()


if __name__ == "__main__":
    sys.stdout.buffer.write(gif(sys.argv[1], np.load(io.BytesIO(sys.stdin.buffer.read()))))
