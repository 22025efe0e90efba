"""A GIF of a robot before and after adaptation, where MuJoCo finds something to render with."""

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
from maml_cuda.checkpoint import write_file

from .adaptation import adapt_and_sample
from .clock import Clock
from .environment import Environment
from .locomotion import FRAME_SKIP, Locomotion
from .settings import RLSettings

FRAMES = 100  # of each half
SIZE = (240, 320)  # height, width
LIBRARIES = ("egl", "osmesa", "glfw")  # as MUJOCO_GL names them


def renderer() -> str | None:
    """The first of EGL, OSMesa and GLFW (or the one that MUJOCO_GL names) that renders here, None where none does.

    Each is tried in a process of its own: a library that is there but does not work may end its process.
    """
    given = os.environ.get("MUJOCO_GL")
    program = (
        "import mujoco; r = mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8); "
        "r.update_scene(mujoco.MjData(r.model)); r.render()"
    )
    for library in (given,) if given else LIBRARIES:
        environment = os.environ | {"MUJOCO_GL": library}
        tried = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
        if tried.returncode == 0:
            return library
    return None


def before_and_after(
    maml: FusedMAML, environment: Environment, goals: Tensor, settings: RLSettings, generator: Generator, path: Path
) -> str:
    """Writes ``path``: the task's first episode before adaptation, then after ``test_steps`` steps. Returns what it
    did, or why it did not, in words."""
    library = renderer()
    if library is None:
        return (
            "no GIF: MuJoCo finds nothing to render with here. It needs EGL, OSMesa or a display; on Debian: "
            "apt-get install libosmesa6, then MUJOCO_GL=osmesa"
        )
    assert isinstance(environment, Locomotion)
    os.environ["MUJOCO_GL"] = library  # read when mujoco makes its first context
    frames: list[Any] = []
    record = _Recorder(environment)
    for step, _ in enumerate(
        adapt_and_sample(maml, environment, goals, settings, generator, Clock(), settings.test_steps)
    ):
        if step in (0, settings.test_steps):
            frames += _frames(environment, record.states)
        record.states.clear()
    record.stop()
    content = io.BytesIO()
    milliseconds = int(1000 * FRAME_SKIP * environment.model.opt.timestep)
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    write_file(path, content.getvalue())
    return f"before_and_after.gif: goal {', '.join(f'{g:.2f}' for g in goals[0].tolist())}, rendered by {library}"


class _Recorder:
    """Keeps the state of the first episode at each step of an environment."""

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
        self._environment._step = self._step  # type: ignore[method-assign]


def _frames(environment: Locomotion, states: list[np.ndarray]) -> list[Any]:
    import mujoco
    from PIL import Image

    data, camera = mujoco.MjData(environment.model), mujoco.MjvCamera()
    camera.type, camera.trackbodyid = mujoco.mjtCamera.mjCAMERA_TRACKING, 1
    camera.distance, camera.elevation, camera.azimuth = 4.0, -20.0, 90.0
    images = []
    with mujoco.Renderer(environment.model, *SIZE) as scene:
        for state in states[:FRAMES]:
            mujoco.mj_setState(environment.model, data, state, environment._full)
            mujoco.mj_forward(environment.model, data)
            scene.update_scene(data, camera)
            images.append(Image.fromarray(scene.render()))
    return images
